"""TPGM after the fact: learns the radii between two existing checkpoints, without any training."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_tpgm.anchor import Pretrained, capture, match_names, read_file, read_pretrained, state_dict_in
from lightning_tpgm.callbacks.base import configuration_errors
from lightning_tpgm.callbacks.tpgm import TPGMCallback
from lightning_tpgm.evaluation import Loss
from lightning_tpgm.norms import Norm
from lightning_tpgm.selection import clean_name, constrainable
from lightning_tpgm.sharding import full, local, reshard

if TYPE_CHECKING:
    from collections.abc import Iterator


def project_checkpoint(
    model: pl.LightningModule,
    pretrained: Pretrained,
    finetuned: str | os.PathLike[str],
    dataloader: DataLoader[Any] | Callable[[], Any] | Iterable[Any] | str,
    output: str | os.PathLike[str],
    *,
    norm: Norm = "l2",
    radius_lr: float = 1e-2,
    radius_steps: int = 200,
    exclude: Sequence[str] = (),
    loss: Loss = None,
    trainer: pl.Trainer | None = None,
) -> TPGMCallback:
    """Learn how far each tensor may be from its pretrained value, and write the projected fine-tuned checkpoint.

    The authors' recipe for CLIP on ImageNet, and the defaults here: a finished plain fine-tuning, the l2 norm, 200
    radius updates. The file that is written equals ``finetuned`` but for the projected weights, so it is loaded as
    before: a Lightning checkpoint keeps its hyperparameters, a state dict its names.

    Args:
        model: The module of both checkpoints; its weights do not matter. Afterwards it holds the projected ones.
        pretrained: Where the anchors come from, as in `TPGMCallback`.
        finetuned: A Lightning checkpoint, a state dict file, or a ``.safetensors`` file.
        dataloader: Held-out in-distribution data, as in `TPGMCallback`.
        output: The file to write; it should have the suffix of ``finetuned``.
        norm: ``"l2"`` or ``"mars"``.
        radius_lr: Adam learning rate of the radii.
        radius_steps: Number of radius updates.
        exclude: fnmatch patterns over parameter names; those keep their fine-tuned value.
        loss: As in `TPGMCallback`.
        trainer: Its accelerator, devices, strategy and precision are used, and its progress bar; None: Lightning's
            automatic choice.

    Returns:
        The callback, with the learned `radii` and `distances`.

    Raises:
        MisconfigurationException: For an argument out of its range, or checkpoints that do not fit the module.

    Source: Tian et al., "Trainable Projected Gradient Method for Robust Fine-tuning", CVPR 2023, section 4.2.
    """
    finetuned, output = Path(finetuned), Path(output)
    if (finetuned.suffix == ".safetensors") != (output.suffix == ".safetensors"):
        raise MisconfigurationException(
            f"`output` should be of the same kind as `finetuned` ({finetuned.suffix!r}), found {output.suffix!r}."
        )
    callback = _ProjectCheckpoint(
        finetuned,
        dataloader,
        norm=norm,
        radius_lr=radius_lr,
        radius_steps=radius_steps,
        exclude=exclude,
        pretrained=pretrained,
        loss=loss,
        when="fit_end",
    )
    if trainer is None:
        trainer = pl.Trainer(logger=False, enable_checkpointing=False, enable_model_summary=False)
    with _without_training(trainer, callback):
        trainer.fit(model, train_dataloaders=[()])
    if trainer.is_global_zero:
        _write(finetuned, output, callback.projected)
    trainer.strategy.barrier()
    return callback


class _ProjectCheckpoint(TPGMCallback):
    """Does all work when the fit starts: the module is on its devices, and no training follows."""

    def __init__(self, finetuned: Path, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.finetuned = finetuned
        self.projected: dict[str, Tensor] = {}  # by the names in the fine-tuned file

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        names = self._load(pl_module)
        self._begin(trainer, pl_module)
        self.constrain_now(trainer, pl_module)
        self.projected = {names[name]: full(parameter.detach()).cpu() for name, parameter in self._parameters.items()}

    def _load(self, pl_module: pl.LightningModule) -> dict[str, str]:
        """Load the fine-tuned weights, and say under which name each is found in their file."""
        reshard(pl_module)
        with configuration_errors():
            tensors = read_pretrained(self.finetuned)
            targets = constrainable(pl_module, buffers=True)
            names = match_names(tensors, targets, self._report)
        missing = [
            name for name, _ in pl_module.named_parameters() if clean_name(name) in targets.keys() - names.keys()
        ]
        if missing:
            raise MisconfigurationException(
                f"`finetuned` {str(self.finetuned)!r} should hold all weights of {type(pl_module).__name__}, and lacks"
                f" {missing}. Pass the module that was fine-tuned."
            )
        with torch.no_grad():
            for name, source in names.items():
                local(targets[name]).copy_(local(capture(tensors[source], targets[name])))
        return names


@contextmanager
def _without_training(trainer: pl.Trainer, callback: pl.Callback) -> Iterator[None]:
    """A fit of this trainer sets everything up for the callback and trains on nothing."""
    attributes: dict[str, Any] = vars(trainer)
    kept = {name: attributes[name] for name in ("limit_train_batches", "limit_val_batches", "callbacks")}
    progress = [bar for bar in [trainer.progress_bar_callback] if bar is not None]
    try:
        attributes.update(limit_train_batches=0, limit_val_batches=0, callbacks=[callback, *progress])
        yield
    finally:
        attributes.update(kept)


def _write(finetuned: Path, output: Path, projected: dict[str, Tensor]) -> None:
    content = read_file(finetuned)
    state = state_dict_in(content)
    for name, value in list(state.items()):
        if clean_name(name) in projected:
            state[name] = projected[clean_name(name)].to(value.dtype)  # type: ignore[index]  # read as a dict
    if output.suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file(dict(state), output)
    else:
        torch.save(content, output)
