"""The methods in plain PyTorch loops, under Lightning Fabric, in anybody's trainer."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lightning_tpgm.anchors import AnchorDevice
from lightning_tpgm.constraint import Constraint
from lightning_tpgm.freshness import fresh_layers
from lightning_tpgm.gradients import PlainHeldOut
from lightning_tpgm.methods import TPGM, Method
from lightning_tpgm.optimizers import is_optimizer
from lightning_tpgm.pretrained import Pretrained, path_of, read_pretrained
from lightning_tpgm.references import check_save_anchor
from lightning_tpgm.selection import check_patterns, constrainable
from lightning_tpgm.sharding import reshard


def constrain(
    model: nn.Module,
    method: Method,
    optimizers: Optimizer | Iterable[Optimizer] = (),
    *,
    exclude: Sequence[str] = (),
    pretrained: Pretrained | None = None,
    held_out_loss: Callable[[], Tensor] | None = None,
    anchor_device: AnchorDevice = None,
    save_anchor: bool = True,
) -> Constraint:
    """Let a method act on a model in a plain PyTorch loop, under Lightning Fabric, or in anybody's trainer.

    It acts in the hooks of the optimizers, so ``optimizer.step()`` is all that the loop does. Call this when the model
    holds its pretrained weights and is where it will be trained (on its device, wrapped, sharded).

    Args:
        model: Its parameters are constrained; wrapped by DistributedDataParallel or Fabric or not.
        method: One of `lightning_tpgm.methods`, a new object for each model.
        optimizers: Those that step the model's parameters. None are needed for a method that acts at the end.
        exclude: fnmatch patterns over parameter names, for instance ``["head.*"]``; those are not constrained.
        pretrained: Where the anchors come from, a file, a mapping or a module. None: the model's weights now.
        held_out_loss: For `TPGM`: returns the loss on the next held-out batch, a scalar tensor, at the model's present
            weights. Train or eval mode and the batches are its own affair.
        anchor_device: ``"cpu"``: the anchors are kept in the host's memory. None: on the parameters' device. A method
            that acts at the end brings them there then, and has them in the host's memory before.
        save_anchor: Whether ``state_dict()`` holds the anchors. False: it holds the path of the ``pretrained`` file and
            a fingerprint of its tensors. ``load_state_dict()`` compares them with the file that is passed here, or else
            where it was. A method that acts at the end reads it again in ``finish()``, and has no distances before.

    Returns:
        The constraint: ``radii``, ``distances``, ``report()``, ``plot()``, ``state_dict()`` and ``load_state_dict()``
        for checkpoints, ``finish()`` for methods that act at the end, ``remove()``. Call ``finish()`` once:
        WiSE-FT would interpolate again.

    Raises:
        ValueError: For a pattern that matches nothing, pretrained weights that do not fit, or nothing to constrain. For
            optimizers that step nothing of it, `TPGM` without ``held_out_loss``, or a method that was used before.
        TypeError: For something else than a method, or a string as ``exclude``. For an optimizer without hooks on its
            step, or one that evaluates other weights than it steps.

    >>> import torch
    >>> from torch.nn.functional import mse_loss
    >>> from lightning_tpgm.methods import TPGM
    >>> model, x, y = nn.Linear(3, 1), torch.randn(8, 3), torch.randn(8, 1)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> held_out = lambda: mse_loss(model(x[4:]), y[4:])
    >>> constraint = constrain(model, TPGM(), optimizer, exclude=["bias"], held_out_loss=held_out)
    >>> mse_loss(model(x[:4]), y[:4]).backward()
    >>> optimizer.step()
    >>> list(constraint.radii)
    ['weight']
    """
    if not isinstance(method, Method):
        raise TypeError(
            f"`method` should be an object of lightning_tpgm.methods, TPGM() for instance, found {method!r}."
        )
    check_patterns(exclude)
    given: Any = optimizers
    followed: list[Optimizer] = [given] if is_optimizer(given) else list(given)
    model = _unwrapped(model)
    title = type(method).__name__
    if isinstance(method, TPGM) and held_out_loss is None:
        raise ValueError("`held_out_loss` is missing: TPGM learns its radii from it. FTP needs no held-out data.")
    if held_out_loss is not None and not isinstance(method, TPGM):
        raise ValueError(f"`held_out_loss` has no effect with {title}. Leave it out.")
    reshard(model)
    candidates = constrainable(model, exclude, buffers=method.constrains_buffers)
    if not candidates:
        raise ValueError(f"{title} has nothing to constrain: no parameter remains after `exclude` = {list(exclude)}.")
    stepped = {id(p) for optimizer in followed for group in optimizer.param_groups for p in group["params"]}
    if not method.acts_at_end and not stepped & {id(p) for p in candidates.values()}:
        raise ValueError(
            f"{title} acts in the steps of `optimizers`, found {len(followed)} of them, which step no"
            " parameter of the model that is to be constrained. Pass those that train it."
        )
    check_save_anchor(save_anchor, pretrained)
    read = None if pretrained is None else read_pretrained(pretrained)
    constraint = Constraint(method, anchor_device, save_anchor)  # takes the method, or refuses it
    if isinstance(method, TPGM) and held_out_loss is not None:
        method.held_out = PlainHeldOut(model, held_out_loss)
    constraint.begin(model, candidates, read, path_of(pretrained))
    constraint.follow(followed)
    fresh = fresh_layers(model, constraint.anchors.parameters) if pretrained is None else None
    if fresh is not None:
        warnings.warn(fresh.text(constraint.title, exclude), stacklevel=2)
    return constraint


def _unwrapped(model: nn.Module) -> nn.Module:
    """The user's own module, whatever DDP and Fabric put around it."""
    for name in ("_original_module", "_orig_mod"):  # of Fabric, of torch.compile
        if isinstance(inner := getattr(model, name, None), nn.Module):
            return _unwrapped(inner)
    return _unwrapped(model.module) if isinstance(model, DistributedDataParallel) else model
