"""What goes to the trainer's loggers and progress bar, and when."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

from torch import Tensor

from lightning_tpgm.callbacks.framework import callbacks_of, logging_step, pl, same_package
from lightning_tpgm.observing.reporter import Quantities, Reporter
from lightning_tpgm.observing.reporting import in_short

Log = Literal["summary", "all", "none"]


class Logs:
    """Sends a method's quantities to loggers.

    Names begin with the method's, ``tpgm/distance``. Of several callbacks of one method in a trainer the second writes
    ``tpgm_2/distance`` and so on, in the order of the trainer's list. The values of each tensor have groups of their
    own, ``tpgm_radius/NAME``. Under ``tpgm/`` they would hide the summary among them. Stores that make a folder of each
    group could not have ``tpgm/distance/NAME`` beside ``tpgm/distance``.

    Args:
        kind: Of these names.
        log: What goes to the loggers. ``"none"``: nothing, nor to the progress bar.
    """

    def __init__(self, kind: str, log: Log) -> None:
        self.kind, self.log = kind, log

    def show(self, trainer: pl.Trainer, pl_module: pl.LightningModule, values: Mapping[str, Tensor]) -> None:
        """Log scalars as the module's own, while that is allowed."""
        name = self.name_in(trainer)
        self._log(trainer, pl_module, {f"{name}/{key}": value for key, value in values.items()}, in_bar=False)

    def in_bar(self, trainer: pl.Trainer, pl_module: pl.LightningModule, value: Tensor) -> None:
        """Show one number under the method's name in the progress bar.

        On the CPU, because Lightning reads what is in the bar again after every batch.
        """
        self._log(trainer, pl_module, {self.name_in(trainer): value.cpu()}, in_bar=True)

    def _log(self, trainer: pl.Trainer, pl_module: pl.LightningModule, named: dict[str, Tensor], in_bar: bool) -> None:
        if self.log == "none" or not named or trainer.barebones:  # which warns of every call
            return
        logger = not in_bar and bool(trainer.loggers)
        lightning = same_package(pl_module, "core:LightningModule")
        if all(getattr(getattr(pl_module, f), "__func__", None) is getattr(lightning, f) for f in ("log", "log_dict")):
            pl_module.log_dict(named, prog_bar=in_bar, logger=logger)
            return
        log = pl_module.log if _takes_our_arguments(pl_module.log) else partial(lightning.log, pl_module)
        for key, value in named.items():
            log(key, value, prog_bar=in_bar, logger=logger)

    def due(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        reporter: Reporter,
        anchors: Mapping[str, Tensor],
        quantities: Quantities,
    ) -> None:
        """At a batch whose logs go to the loggers."""
        if quantities and self.log != "none":
            self.show(trainer, pl_module, in_short(quantities))
            self._each(trainer, reporter, anchors, quantities)

    def end(
        self,
        trainer: pl.Trainer,
        reporter: Reporter,
        anchors: Mapping[str, Tensor],
        quantities: Quantities,
        more: Mapping[str, Tensor],
    ) -> None:
        """At the end of the fit: a module cannot log any more."""
        if quantities and self.log != "none":
            name = self.name_in(trainer)
            values = {f"{name}/{key}": float(value) for key, value in {**more, **in_short(quantities)}.items()}
            for logger in trainer.loggers:
                logger.log_metrics(values, step=logging_step(trainer))
            self._each(trainer, reporter, anchors, quantities)

    def _each(
        self, trainer: pl.Trainer, reporter: Reporter, anchors: Mapping[str, Tensor], quantities: Quantities
    ) -> None:
        """Past `log_dict`, which takes a third of a millisecond a name."""
        if self.log == "all" and trainer.loggers:
            values = reporter.each(self.name_in(trainer), anchors, quantities)
            for logger in trainer.loggers:
                logger.log_metrics(values, step=logging_step(trainer))

    def name_in(self, trainer: pl.Trainer) -> str:
        """The method's name among the callbacks of the trainer."""
        same = [logs for c in callbacks_of(trainer) if (logs := getattr(c, "_logs", None)) and logs.kind == self.kind]
        index = next((index for index, other in enumerate(same) if other is self), 0)
        return f"{self.kind}_{index + 1}" if index else self.kind


def _takes_our_arguments(log: Callable[..., Any]) -> bool:
    try:
        inspect.signature(log).bind("name", 0.0, prog_bar=False, logger=False)
    except (TypeError, ValueError):
        return False
    return True
