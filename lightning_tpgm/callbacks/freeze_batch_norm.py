"""Keeps BatchNorm's running statistics as they are while a `Trainer` fits a pretrained module."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from typing_extensions import override

from lightning_tpgm.callbacks.framework import (
    Callback,
    MisconfigurationException,
    join_later_imports,
    pl,
    rank_zero_warn,
)
from lightning_tpgm.callbacks.shared import configuration_errors
from lightning_tpgm.methods.method import check
from lightning_tpgm.selection import clean_name


class FreezeBatchNorm(Callback):
    """Keeps the running statistics of BatchNorm layers, and normalises by them in training batches, too.

    They are buffers, so no bound on the weights reaches them. A few batches of new data overwrite what the pretraining
    has seen. During the fit these layers are in eval mode. Afterwards they are in their own again. Their weights and
    biases are trained as before. Layers without statistics, and InstanceNorm, are left alone.

    Args:
        patterns: fnmatch patterns over the names of modules, for instance ``["backbone.*"]``. ``"*"``: all BatchNorm
            layers. Leave out new layers: they have no statistics yet.

    Raises:
        MisconfigurationException: For an argument of another type. When the fit starts, if a pattern matches no
            BatchNorm layer.

    >>> from lightning.pytorch import Trainer
    >>> callback = FreezeBatchNorm(["backbone.*"])
    >>> trainer = Trainer(
    ...     callbacks=[callback],
    ...     accelerator="cpu",
    ... )
    >>> callback
    FreezeBatchNorm(patterns=('backbone.*',))
    """

    def __init__(self, patterns: Sequence[str] = ("*",)) -> None:
        join_later_imports()
        several = isinstance(patterns, Sequence) and not isinstance(patterns, str) and len(patterns) > 0
        with configuration_errors():
            expected = "a sequence of one pattern or more"
            check(several and all(isinstance(p, str) for p in patterns), "patterns", expected, patterns)
        self.patterns = tuple(patterns)
        self._before: list[tuple[nn.Module, bool]] = []  # each layer, and whether it was in train mode
        self._trained = True  # whether the whole module was

    @override
    def __repr__(self) -> str:
        """One line with the arguments."""
        return f"{type(self).__name__}(patterns={self.patterns!r})"

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Finds the layers: the module is complete now, and nothing has run yet."""
        self._put_back(pl_module)
        layers = self._matched(pl_module)
        self._before, self._trained = [(layer, layer.training) for layer in layers.values()], pl_module.training
        new = [name for name, layer in layers.items() if _has_seen_nothing(layer)]
        if new:
            rank_zero_warn(
                f"{type(self).__name__} freezes {len(new)} layers that have seen no data yet, {new[0]!r} among them:"
                " their mean is 0 and their variance 1, so they normalise nothing. Load the pretrained weights before"
                " the fit, or leave new layers out of `patterns`."
            )

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Puts the layers into eval mode."""
        self._freeze()

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Does so again: whatever has called ``train()`` since, no batch meets a layer in train mode."""
        self._freeze()

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Puts the modes back. Until now, since others may evaluate the module at the end of the training."""
        self._put_back(pl_module)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Puts the modes back."""
        self._put_back(pl_module)

    def _matched(self, pl_module: pl.LightningModule) -> dict[str, nn.Module]:
        found = {clean_name(name): layer for name, layer in pl_module.named_modules() if has_statistics(layer)}
        if not found:
            raise MisconfigurationException(
                f"{self!r} found no BatchNorm layer with running statistics in {type(pl_module).__name__}."
                " Leave it out of the callbacks."
            )
        for pattern in self.patterns:
            if not any(fnmatchcase(name, pattern) for name in found):
                names = ", ".join(map(repr, list(found)[:5])) + (", ..." if len(found) > 5 else "")
                raise MisconfigurationException(
                    f"`patterns` has {pattern!r}, which matches none of the {len(found)} BatchNorm layers. Their names"
                    f" are {names}."
                )
        return {n: layer for n, layer in found.items() if any(fnmatchcase(n, p) for p in self.patterns)}

    def _freeze(self) -> None:
        for layer, _ in self._before:
            if layer.training:
                layer.training = False

    def _put_back(self, pl_module: pl.LightningModule) -> None:
        """Unless somebody has put the whole module into another mode since: then that is theirs, too."""
        before, self._before = self._before, []
        if pl_module.training == self._trained:
            for layer, training in before:
                layer.training = training


def has_statistics(layer: nn.Module) -> bool:
    """Whether it is a BatchNorm layer with running means and variances."""
    return isinstance(layer, _BatchNorm) and layer.running_mean is not None


def _has_seen_nothing(layer: nn.Module) -> bool:
    mean, variance = layer.running_mean, layer.running_var
    return isinstance(mean, Tensor) and not mean.any() and isinstance(variance, Tensor) and bool((variance == 1).all())
