"""TPGM after the fact: learns the radii between two existing checkpoints, without any training."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_tpgm.anchors import capture
from lightning_tpgm.callbacks.evaluation import Loss
from lightning_tpgm.callbacks.framework import (
    Callback,
    DummyLogger,
    MisconfigurationException,
    is_overridden,
    pl,
    same_package,
    starts_functions,
)
from lightning_tpgm.callbacks.shared import configuration_errors
from lightning_tpgm.callbacks.tpgm import TPGMCallback
from lightning_tpgm.methods.method import check
from lightning_tpgm.methods.radii import RadiusLr
from lightning_tpgm.norms import Norm
from lightning_tpgm.pretrained import Pretrained, match_names, path_of, read_file, read_pretrained, state_dict_in
from lightning_tpgm.selection import clean_name
from lightning_tpgm.sharding import full, local, reshard

if TYPE_CHECKING:
    from collections.abc import Iterator


def project_checkpoint(
    model: pl.LightningModule,
    pretrained: Pretrained,
    finetuned: str | os.PathLike[str],
    dataloader: DataLoader[Any] | Callable[[], Any] | Iterable[Any] | str,
    output: str | os.PathLike[str] | None = None,
    *,
    norm: Norm = "l2",
    radius_lr: RadiusLr = "auto",
    radius_steps: int = 200,
    exclude: Sequence[str] = (),
    loss: Loss = None,
    eval_mode: bool = True,
    trainer: pl.Trainer | None = None,
) -> TPGMCallback:
    """Learn how far each tensor may be from its pretrained value, and write the projected fine-tuned checkpoint.

    The authors' recipe for CLIP on ImageNet, and the defaults here: a finished plain fine-tuning, the l2 norm, 200
    radius updates. The file that is written equals ``finetuned`` but for the projected weights. It is loaded as before:
    a Lightning checkpoint keeps its hyperparameters, a state dict its names.

    Args:
        model: The module of both checkpoints; its weights do not matter. Afterwards it holds the projected ones.
        pretrained: Where the anchors come from, as in `TPGMCallback`.
        finetuned: A Lightning checkpoint, a state dict file, or a ``.safetensors`` file.
        dataloader: Held-out in-distribution data, as in `TPGMCallback`.
        output: The file to write, with the suffix of ``finetuned``. None: beside it, ``model.ckpt`` becomes
            ``model-projected.ckpt``.
        norm: ``"l2"`` or ``"mars"``.
        radius_lr: ``"auto"``: in all updates together a radius can move as far as its tensor is from its anchor. A
            number: Adam's learning rate for all radii (the authors': 0.01).
        radius_steps: Number of radius updates.
        exclude: fnmatch patterns over parameter names; those keep their fine-tuned value.
        loss: As in `TPGMCallback`.
        eval_mode: As in `TPGMCallback`; the modes are those that ``model`` comes in.
        trainer: Its accelerator, devices, strategy and precision are used, and its progress bar. None: Lightning's
            automatic choice.

    Returns:
        The callback, with the learned `radii` and `distances`.

    Raises:
        MisconfigurationException: For an argument out of its range, or checkpoints that do not fit the module.

    Source: Tian et al., "Trainable Projected Gradient Method for Robust Fine-tuning", CVPR 2023, section 4.2.
    """
    finetuned = Path(finetuned)
    output = finetuned.with_stem(f"{finetuned.stem}-projected") if output is None else Path(output)
    output = output.resolve()  # of a link the file
    if (finetuned.suffix == ".safetensors") != (output.suffix == ".safetensors"):
        raise MisconfigurationException(
            f"`output` should be of the same kind as `finetuned` ({finetuned.suffix!r}), found {output.suffix!r}."
        )
    with configuration_errors():
        check_output(output, pretrained)
        check(pretrained is not None, "pretrained", "a path, a mapping of tensors by name or a module", pretrained)
        path = path_of(pretrained)
        if path is not None and path.resolve() == finetuned.resolve():
            raise ValueError(
                f"`pretrained` and `finetuned` should be two files, found {str(finetuned)!r} twice: nothing has moved"
                " between them. Pass the checkpoint from before the fine-tuning as `pretrained`."
            )
    callback = TPGMCallback(
        dataloader,
        norm=norm,
        radius_lr=radius_lr,
        radius_steps=radius_steps,
        exclude=exclude,
        pretrained=pretrained,
        loss=loss,
        eval_mode=eval_mode,
        when="fit_end",
    )
    if trainer is None:
        make = same_package(model, "trainer:Trainer")
        trainer = make(logger=False, enable_checkpointing=False, enable_model_summary=False)
    if starts_functions(trainer):
        raise MisconfigurationException(
            "`trainer` should run in the process that calls it, found a strategy that starts its processes as functions"
            " (ddp_spawn, ddp_notebook). These keep what they learned to themselves. Pass strategy='ddp'."
        )
    validation = [()] if is_overridden("validation_step", model) else None  # without any, Lightning warns
    at_start = _AtStart(callback, finetuned)
    with _without_training(trainer, model, at_start):
        trainer.fit(model, train_dataloaders=[()], val_dataloaders=validation)
    if trainer.is_global_zero:
        _write(finetuned, output, at_start.projected)
    trainer.strategy.barrier()
    return callback


def check_output(output: Path, pretrained: Pretrained) -> None:
    """Raise a ValueError if nothing can or should be written there."""
    check(output.parent.is_dir(), "output", "in an existing folder", str(output))
    check(output.is_file() or not output.exists(), "output", "a file", str(output))
    writable = os.access(output.parent, os.W_OK) and (not output.exists() or os.access(output, os.W_OK))
    check(writable, "output", "a file that may be written, in such a folder", str(output))
    path = path_of(pretrained)
    if path is not None and path.resolve() == output:
        raise ValueError(
            f"`output` should not be the file of `pretrained`, found {str(output)!r}: the pretrained weights would be"
            " lost. Choose another name."
        )


class _AtStart(Callback):
    """Lets a callback do all its work when a fit starts: the module is on its devices, and no training follows."""

    def __init__(self, callback: TPGMCallback, finetuned: Path) -> None:
        self.callback, self.finetuned = callback, finetuned
        self.projected: dict[str, Tensor] = {}  # by the names in the fine-tuned file

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.callback.setup(trainer, pl_module, stage)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        loaded = self._load(pl_module)
        callback = self.callback
        callback._begin(trainer, pl_module)
        callback._constraint.finish()
        callback._conclude(trainer)
        parameters = callback._constraint.anchors.parameters.values()
        projected = {id(parameter): full(parameter.detach()).cpu() for parameter in parameters}
        self.projected = {name: projected[id(tensor)] for name, tensor in loaded.items() if id(tensor) in projected}

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.callback.on_exception(trainer, pl_module, exception)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.callback.teardown(trainer, pl_module, stage)

    def _load(self, pl_module: pl.LightningModule) -> dict[str, Tensor]:
        """Load the fine-tuned weights and buffers, and say which tensor of the module is found under which name.

        The file may hold a tied parameter under each of its names.
        """
        reshard(pl_module)
        named = [
            *pl_module.named_parameters(remove_duplicate=False),
            *pl_module.named_buffers(remove_duplicate=False),
        ]
        targets = {clean_name(name): tensor for name, tensor in named}
        try:
            tensors = read_pretrained(self.finetuned)
            names = match_names(tensors, targets, report=lambda text: None)
        except (ValueError, OSError, ImportError) as error:
            raise MisconfigurationException(str(error).replace("`pretrained`", "`finetuned`")) from error
        found = {id(targets[name]) for name in names}
        expected = [clean_name(name) for name in pl_module.state_dict()]  # knows of buffers that are never saved
        missing = [name for name in expected if name in targets and id(targets[name]) not in found]
        if missing:
            raise MisconfigurationException(
                f"`finetuned` {str(self.finetuned)!r} should hold all weights of {type(pl_module).__name__}, and lacks"
                f" {missing}, or has them in another shape. Pass the module that was fine-tuned."
            )
        with torch.no_grad():
            for name, source in names.items():
                local(targets[name]).copy_(local(capture(tensors[source], targets[name])))
        return {source: targets[name] for name, source in names.items()}


@contextmanager
def _without_training(trainer: pl.Trainer, model: pl.LightningModule, callback: pl.Callback) -> Iterator[None]:
    """A fit of this trainer sets everything up for the callback, trains on nothing and logs nothing.

    The module's own optimizers are not made: their schedules may need the number of steps.
    """
    attributes: dict[str, Any] = vars(trainer)
    kept = {name: attributes[name] for name in ("limit_train_batches", "limit_val_batches", "callbacks")}
    progress = [bar for bar in [trainer.progress_bar_callback] if bar is not None]
    loggers, loop = trainer.loggers, trainer.fit_loop
    epochs = loop.min_epochs, loop.max_epochs
    optimizers = {name: value for name, value in vars(model).items() if name == "configure_optimizers"}
    try:
        attributes.update(limit_train_batches=0, limit_val_batches=0, callbacks=[callback, *progress])
        trainer.loggers = [DummyLogger()]
        loop.min_epochs, loop.max_epochs = None, 1
        vars(model)["configure_optimizers"] = lambda: torch.optim.SGD(model.parameters(), lr=0.0)
        yield
    finally:
        del vars(model)["configure_optimizers"]
        vars(model).update(optimizers)
        loop.min_epochs, loop.max_epochs = epochs
        trainer.loggers = loggers
        attributes.update(kept)


def _write(finetuned: Path, output: Path, projected: Mapping[str, Tensor]) -> None:
    # beside it, and renamed when it is whole: an interruption leaves what was there
    part = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        _save(finetuned, part, projected)
        if output.exists():
            shutil.copymode(output, part)
        part.replace(output)
    finally:
        part.unlink(missing_ok=True)


def _save(finetuned: Path, path: Path, projected: Mapping[str, Tensor]) -> None:
    content = read_file(finetuned)
    state = state_dict_in(content)
    with torch.no_grad():
        for name, value in state.items():
            if clean_name(name) in projected:
                value.copy_(projected[clean_name(name)])
    if finetuned.suffix == ".safetensors":
        from safetensors import safe_open
        from safetensors.torch import save_file

        with safe_open(finetuned, "pt") as file:
            metadata = file.metadata()
        save_file(dict(state), path, metadata)
    else:
        torch.save(content, path)
