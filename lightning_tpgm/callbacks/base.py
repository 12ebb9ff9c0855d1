"""What all methods share: the anchor, the selection, detection of optimizer steps, state and teardown."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_tpgm.anchor import AnchorDevice, Pretrained, capture, match_pretrained, read_pretrained
from lightning_tpgm.blocks import PLAIN, Blocks
from lightning_tpgm.callbacks.observed import Log, ObservedCallback
from lightning_tpgm.framework import (
    MisconfigurationException,
    callbacks_of,
    classes,
    join_later_imports,
    pl,
    rank_zero_info,
    rank_zero_warn,
    starts_functions,
)
from lightning_tpgm.history import History
from lightning_tpgm.layout import Layout, Matrices
from lightning_tpgm.norms import Norm
from lightning_tpgm.selection import constrainable
from lightning_tpgm.sharding import Sharding, full, is_split, local, local_gradient, reshard
from lightning_tpgm.troubles import never_trained


@contextmanager
def configuration_errors() -> Iterator[None]:
    """Errors of the pure code become Lightning's `MisconfigurationException`, the message unchanged."""
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError) as error:
        raise MisconfigurationException(str(error)) from error


def check(condition: bool, name: str, expected: str, found: object) -> None:
    """Raise Lightning's `MisconfigurationException` about an argument unless the condition holds."""
    if not condition:
        raise MisconfigurationException(f"`{name}` should be {expected}, found {found!r}.")


def is_number(value: object) -> bool:
    """Whether the value is a finite int or float; True and False are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")


def to_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU; those that are split over processes stay where they are."""
    return {name: tensor if is_split(tensor) else tensor.cpu() for name, tensor in tensors.items()}


def unfreezes(trainer: pl.Trainer) -> bool:
    """Whether a finetuning callback may unfreeze parameters later."""
    unfreezing = classes("callbacks:BaseFinetuning")
    return any(isinstance(callback, unfreezing) for callback in callbacks_of(trainer))


_AVERAGING = {"StochasticWeightAveraging", "WeightAveraging"}  # by name: older releases of Lightning lack the second


def _nothing() -> None:
    pass


class AnchoredCallback(ObservedCallback):
    """Base of all methods: knows the constrained parameters and their anchors, and acts after every optimizer step.

    The anchor of a parameter is captured when the parameter is first seen trainable: at the start of the fit, or when a
    callback such as `BaseFinetuning` unfreezes it. A resumed run takes the anchors from the checkpoint.

    Args:
        exclude: fnmatch patterns over parameter names; those parameters are not constrained.
        pretrained: Where the anchors come from: a file, a mapping, a module; None: the weights at the start of the fit.
        log: See `ObservedCallback`.
        summary: See `ObservedCallback`.
        anchor_device: ``"cpu"``: the anchors are kept in the host's memory; None: on the parameters' device.
    """

    norm: Norm = "l2"
    _constrains_buffers = False  # parameters only
    _SHOWN: tuple[str, ...] = ("exclude",)  # the arguments in `repr`

    def __init__(
        self,
        exclude: Sequence[str] = (),
        pretrained: Pretrained | None = None,
        log: Log = "summary",
        summary: bool = False,
        anchor_device: AnchorDevice = None,
    ) -> None:
        join_later_imports()
        patterns: object = exclude
        usable = isinstance(patterns, Sequence) and not isinstance(patterns, str)
        check(usable and all(isinstance(p, str) for p in exclude), "exclude", "a sequence of patterns", exclude)
        accepted = isinstance(pretrained, str | os.PathLike | Mapping | nn.Module | None)
        check(accepted, "pretrained", "a path, a mapping of tensors by name, a module or None", pretrained)
        check(anchor_device in (None, "cpu"), "anchor_device", "None or 'cpu'", anchor_device)
        super().__init__(log, summary)
        self.anchor_device = anchor_device
        self.exclude = tuple(exclude)
        self.pretrained = pretrained
        self._parameters: dict[str, Tensor] = {}  # constrained now
        self._anchor: dict[str, Tensor] = {}  # of these, by the same names
        self._waiting: dict[str, Tensor] = {}  # frozen yet
        self._may_join: dict[str, Tensor | None] = {}  # their names and pretrained values; None: what they are then
        self._pretrained: dict[str, Tensor] | None = None  # all that `pretrained` holds, until the fit starts
        self._loaded: dict[str, Any] | None = None  # a checkpoint's state, until the fit starts
        self._layout = Layout([], self.norm)
        self._sharding = Sharding([], self._layout, self.norm)
        self._anchors: Matrices = []  # this process's parts, in that layout
        self._handles: list[RemovableHandle] = []
        # a weak reference to the module of the last fit
        self._fitted: Callable[[], pl.LightningModule | None] = _nothing
        self._begun = False  # a fit has: there is something to save
        self._saw_batch = self._saw_step = False  # in this epoch
        self._depth = 0  # of optimizer steps within each other

    def __getstate__(self) -> dict[str, Any]:
        """A copy in another process or place knows no module."""
        return {**vars(self), "_fitted": _nothing}

    @override
    def __repr__(self) -> str:
        """One line with the arguments that shape the method."""
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)!r}' for name in self._SHOWN)})"

    @property
    def anchor(self) -> dict[str, Tensor]:
        """The pretrained value of each constrained parameter, by name; empty before the first fit."""
        return dict(self._anchor)

    # ---- what a method adds

    def before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Called right before a step of an optimizer; with automatic optimization there are no gradients yet."""

    def after_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer) -> None:
        """Called right after a step of an optimizer that really happened, before anything else sees the weights."""

    def joined(self, names: list[str]) -> None:
        """Called when parameters have become constrained; `_parameters` and `_anchor` hold them already."""

    def method_state(self) -> dict[str, Any]:
        """What the method learned, for the checkpoint: tensors on the CPU, plain numbers, dicts and lists."""
        return {}

    def load_method_state(self, state: dict[str, Any]) -> None:
        """Take over `method_state`; `_parameters` and `_anchor` are in place."""

    def reset_method(self) -> None:
        """Forget what was learned: a new fit begins."""

    def at_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called after the last step of a fit."""

    @override
    def tensors(self) -> dict[str, Tensor]:
        return self._anchor

    @override
    def quantities(self) -> dict[str, Tensor]:
        """The distance of each constrained tensor, measured now."""
        if not self._parameters:
            return {}
        with torch.no_grad():
            return {
                "distance": self._largest(self._layout.distances(self._layout.arrange(self._weights), self._anchors))
            }

    @override
    def sizes(self) -> Tensor:
        """In the method's norm; the largest row's."""
        with torch.no_grad():
            return self._largest(self._layout.norms(self._anchors))

    # ---- Lightning's hooks

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuses unsupported strategies and reads ``pretrained``, so that mistakes show before any work is done."""
        if stage != "fit":
            return
        if trainer.fit_loop.total_batch_idx < 0:  # a fresh trainer: a checkpoint that it resumes from is loaded later
            self._loaded = None
            self._forget()
        if isinstance(trainer.strategy, classes("strategies:FSDPStrategy") + classes("strategies:DeepSpeedStrategy")):
            raise MisconfigurationException(
                f"{type(self).__name__} does not support {type(trainer.strategy).__name__}, which hides the parameters"
                " in flat buffers. Use DDPStrategy, or ModelParallelStrategy (FSDP2, tensor parallel)."
            )
        if starts_functions(trainer):
            rank_zero_warn(
                f"Of this fit, what {type(self).__name__} learns stays in the processes that ddp_spawn (or"
                " ddp_notebook) starts, and in the checkpoints that they write. The weights come back; the callback's"
                " attributes and a later trainer.save_checkpoint know nothing of the fit. With strategy='ddp' they do."
            )
        if self.pretrained is not None:
            with configuration_errors():
                self._pretrained = read_pretrained(self.pretrained)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Captures or restores the anchors: the first moment at which all strategies have loaded all weights."""
        self._begin(trainer, pl_module)
        self._listen(trainer, pl_module)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Takes in parameters that were unfrozen since the last batch."""
        self._depth, self._saw_batch = 0, True
        if any(parameter.requires_grad for parameter in self._waiting.values()):
            self._join()

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Warns if no optimizer has stepped: then nothing is constrained."""
        missed, self._saw_batch, self._saw_step = self._saw_batch and not self._saw_step, False, False
        if missed:
            rank_zero_warn(
                f"{type(self).__name__} saw no step of the module's optimizers in this epoch: nothing was constrained."
                " It acts after each `step` of the optimizers that configure_optimizers returns: train with those."
            )

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stops listening to the optimizers."""
        self._stop_listening()
        self.at_fit_end(trainer, pl_module)
        self._conclude(trainer)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Stops listening to the optimizers; what was learned stays for a checkpoint that is written now."""
        self._stop_listening()

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Lets go of the parameters and of device memory; anchors stay, on the CPU, for a later `save_checkpoint`."""
        if stage == "fit":
            self._stop_listening()
            self._anchor = to_cpu(self._anchor)
            self._history.leave_device()
            self._parameters, self._waiting, self._anchors, self._pretrained = {}, {}, [], None

    @property
    @override
    def state_key(self) -> str:
        """Two instances with different `exclude` have different keys."""
        return self._generate_state_key(exclude=sorted(self.exclude))

    @override
    def state_dict(self) -> dict[str, Any]:
        """Anchors, the names that may join, and what was learned, on the CPU; empty before the fit has started."""
        if self._loaded is not None:  # asked for between loading and the start of the fit, by a tuner
            return self._loaded
        if not self._begun:
            return {}
        anchor = {name: full(anchor).cpu() for name, anchor in self._anchor.items()}
        waiting = {name: None if value is None else full(value).cpu() for name, value in self._may_join.items()}
        seen = self._history.state_dict()
        return {"anchor": anchor, "waiting": waiting, "method": self.method_state(), "history": seen}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps the state until the fit starts: strategies differ in whether the module is ready now."""
        if self._handles and state_dict:  # in mid-fit: a tuner puts back what was before it
            self._load_state(state_dict)
        else:
            self._loaded = state_dict or None

    # ---- shared steps

    def _begin(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the constrained parameters of this fit, their anchors, and what was learned before."""
        self._stop_listening()
        reshard(pl_module)
        with configuration_errors():
            candidates = constrainable(pl_module, self.exclude, buffers=self._constrains_buffers)
        state, self._loaded = self._loaded, None
        if state is not None:
            self._anchor, self._may_join = self._verified(state["anchor"], candidates), state["waiting"]
        elif trainer.fit_loop.total_batch_idx < 0 or trainer.ckpt_path is not None or self._fitted() is not pl_module:
            self._forget()
            if trainer.fit_loop.total_batch_idx >= 0 and trainer.ckpt_path is not None and self.pretrained is None:
                raise MisconfigurationException(
                    f"The checkpoint {str(trainer.ckpt_path)!r} has no state of this {type(self).__name__} (key"
                    f" {self.state_key!r}), so the pretrained weights are not known any more. Pass them as"
                    " `pretrained`, for instance the checkpoint that the first run started from."
                )
            self._may_join = dict.fromkeys(candidates)
            if self._pretrained is not None and candidates:
                with configuration_errors():
                    self._may_join = {**match_pretrained(self._pretrained, candidates, self._report)}
        # else the same trainer goes on with the same module, and everything is still here
        if state is None and not self._begun and self.pretrained is None:
            self._check_anchors(pl_module)
        self._fitted = weakref.ref(pl_module)
        self._begun, self._saw_batch, self._saw_step = True, False, False
        self._parameters = {name: candidates[name] for name in self._anchor}
        self._anchor = {name: self._captured(anchor, candidates[name]) for name, anchor in self._anchor.items()}
        self._waiting = {name: candidates[name] for name in self._may_join if name in candidates}
        self._pretrained = None
        self._arrange()
        if state is not None:
            self._load_state(state)
        self._join()
        for name, value in self._may_join.items():
            if value is not None:  # a copy: the source may be a module that goes on training
                self._may_join[name] = value.clone()
        self._check_something_to_do(trainer, pl_module)

    def _load_state(self, state: dict[str, Any]) -> None:
        self.load_method_state(state["method"])
        self._history = History()
        if "history" in state:  # older checkpoints have none
            self._history.load_state_dict(state["history"])

    def _forget(self) -> None:
        """Back to the state of a new callback."""
        self._anchor, self._begun = {}, False
        self._forget_seen()
        self.reset_method()

    def _verified(self, anchor: dict[str, Tensor], candidates: dict[str, Tensor]) -> dict[str, Tensor]:
        """A checkpoint's anchors, if they are those of the present module."""
        for name, value in anchor.items():
            if name not in candidates or candidates[name].shape != value.shape:
                found = f"shape {tuple(candidates[name].shape)}" if name in candidates else "no such parameter"
                raise MisconfigurationException(
                    f"The checkpoint's anchor of {name!r} has shape {tuple(value.shape)}, found {found} among those to"
                    f" constrain. Resume with the module and the `exclude` of the run that wrote the checkpoint."
                )
        return anchor

    def _report(self, text: str) -> None:
        rank_zero_info(f"{type(self).__name__}: {text}")

    def _check_something_to_do(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._parameters and not (self._waiting and unfreezes(trainer)):
            raise MisconfigurationException(
                f"{type(self).__name__} has nothing to constrain: of {len(list(pl_module.parameters()))} parameters"
                f" {len(self._waiting)} remain after `exclude` = {list(self.exclude)}, and none of them is trainable."
                " Exclude less, or unfreeze some (a `BaseFinetuning` callback may do so later)."
            )

    def _check_has_the_last_word(self, trainer: pl.Trainer) -> None:
        """Warn of callbacks that will overwrite what this one does at the end of the fit."""
        callbacks = callbacks_of(trainer)
        for other in callbacks[callbacks.index(self) + 1 :]:
            if _AVERAGING & {base.__name__ for base in type(other).__mro__}:
                name, other_name = type(self).__name__, type(other).__name__
                rank_zero_warn(
                    f"At the end of the fit {other_name} writes its average into the module after {name} has acted,"
                    f" of which nothing will remain. List {other_name} before {name}."
                )

    def _check_anchors(self, pl_module: pl.LightningModule) -> None:
        evidence = never_trained(pl_module)
        if evidence:
            rank_zero_warn(
                f"{type(self).__name__}: the anchors look like a random initialisation: {evidence}. Fine-tuning is kept"
                " near them, so load the pretrained weights before the fit, or pass them as `pretrained`."
            )

    def _join(self) -> None:
        """Constrain the waiting parameters that are trainable now."""
        new = {n: p for n, p in self._waiting.items() if p.requires_grad or not isinstance(p, nn.Parameter)}
        for name, parameter in new.items():
            value = self._may_join.pop(name)
            self._anchor[name] = self._captured(parameter if value is None else value, parameter)
            self._parameters[name] = self._waiting.pop(name)
        if new:
            self._arrange()
            self.joined(list(new))

    def _captured(self, value: Tensor, parameter: Tensor) -> Tensor:
        if self.anchor_device is not None and is_split(parameter):
            raise MisconfigurationException(
                f"`anchor_device` = {self.anchor_device!r} does not support parameters that are split over processes:"
                " their anchors are split with them, and stay beside them. Leave it out."
            )
        return capture(value, parameter, self.anchor_device)

    @torch.no_grad()
    def _arrange(self) -> None:
        """Prepare the work on all constrained parameters."""
        weights = self._weights
        self._layout = Layout(weights, self.norm, self._blocks_for(weights))
        self._sharding = Sharding(list(self._parameters.values()), self._layout, self.norm)
        self._anchors = self._layout.arrange([local(anchor) for anchor in self._anchor.values()])

    def _blocks_for(self, weights: list[Tensor]) -> Blocks:
        """What the work on these weights is done by."""
        return PLAIN

    @property
    def _weights(self) -> list[Tensor]:
        """This process's parts of the constrained parameters: in-place changes reach the module. Under no_grad only."""
        return [local(parameter) for parameter in self._parameters.values()]

    def _largest(self, norms: Tensor) -> Tensor:
        """The largest of each whole tensor, shape (T,), from the norms of the rows of this process's parts."""
        return self._sharding.largest(self._layout.largest(self._sharding.distances(norms)))

    def _owned(self, optimizer: Optimizer) -> list[bool]:
        """Which of the constrained parameters this optimizer steps."""
        stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        return [id(parameter) in stepped for parameter in self._parameters.values()]

    def _gradients(self, optimizer: Optimizer) -> list[Tensor | None]:
        """This process's parts of the gradients, None for a tensor that this optimizer does not step now."""
        return [
            None if p.grad is None or not owned else local_gradient(p.grad, p)
            for p, owned in zip(self._parameters.values(), self._owned(optimizer), strict=True)
        ]

    def _check_gradients_can_be_read(self, trainer: pl.Trainer) -> None:
        """Refuse optimizers that undo a gradient scaler's scaling inside their step: ``.grad`` is scaled before it."""
        for optimizer in trainer.optimizers:
            fused = getattr(optimizer, "_step_supports_amp_scaling", False)
            if fused and getattr(trainer.precision_plugin, "scaler", None) is not None:
                raise MisconfigurationException(
                    f"{type(self).__name__} needs unscaled gradients, but {type(optimizer).__name__} unscales them"
                    " inside its step (it is fused, and the precision is 16-mixed). Pass fused=False to the optimizer,"
                    " or precision='bf16-mixed' to the Trainer."
                )

    def _listen(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        def stepping(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            self._depth += 1
            if self._depth == 1 and self._parameters:
                with torch.no_grad():
                    self.before_optimizer_step(optimizer)

        def stepped(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            self._depth -= 1  # torch calls the hooks within, too, if a step calls the step of its base class
            self._saw_step = True
            if self._depth == 0 and self._parameters:
                with torch.no_grad():
                    self.after_optimizer_step(trainer, pl_module, optimizer)
                    self._record(trainer)

        for optimizer in trainer.optimizers:
            self._handles += [
                optimizer.register_step_pre_hook(stepping),
                optimizer.register_step_post_hook(stepped),
            ]

    def _stop_listening(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
