"""What users see of a method: logs."""

from __future__ import annotations

from typing import Any, Literal, get_args

from torch import Tensor
from typing_extensions import override

from lightning_tpgm.framework import Callback, MisconfigurationException, callbacks_of, logging_step, logs_are_due, pl
from lightning_tpgm.reporting import PER_TENSOR, by_name, in_short

Log = Literal["summary", "all", "none"]


class ObservedCallback(Callback):
    """Base of all methods: shows what the method does, through whichever loggers the trainer has.

    Names begin with the method's, ``tpgm/distance``. Of several callbacks of one method in a trainer the second writes
    ``tpgm_2/distance`` and so on, in the order of the trainer's list. Nothing is read from the device but when the
    trainer's ``log_every_n_steps`` says that logs are due.

    Args:
        log: ``"summary"``, ``"all"`` or ``"none"``.
    """

    _KEY = ""  # what the names begin with
    _IN_BAR: tuple[str, ...] = ()  # what the method itself logs at each of its updates

    def __init__(self, log: Log) -> None:
        if log not in get_args(Log):
            raise MisconfigurationException(f"`log` should be one of {get_args(Log)}, found {log!r}.")
        self._logged = log  # `log` is taken: Lightning gives its callbacks the module's method of that name
        self._forget_seen()

    # ---- what a method gives

    def quantities(self) -> dict[str, Tensor]:
        """Vectors of one number per constrained tensor, on the device: distance, radius, ratio, binds, omega.

        Empty where nothing is constrained. Collective where parameters are split over processes.
        """
        raise NotImplementedError

    def tensors(self) -> dict[str, Tensor]:
        """The anchors by name, in the order of `quantities`."""
        raise NotImplementedError

    def scalars(self) -> dict[str, Tensor]:
        """What else is known, by name."""
        return {}

    # ---- Lightning's hooks

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs, at the trainer's cadence."""
        if not logs_are_due(trainer):
            return
        quantities = self.quantities()
        if quantities and self._logged != "none":
            values = {name: value for name, value in in_short(quantities).items() if name not in self._IN_BAR}
            self._log_dict(trainer, pl_module, values)
            self._log_each(trainer, quantities)

    # ---- shared steps

    def _forget_seen(self) -> None:
        """Back to the state of a new callback."""

    def _conclude(self, trainer: pl.Trainer) -> None:
        """Log the values at the end of the fit, where `log_dict` is not allowed any more."""
        quantities = self.quantities()
        if quantities and self._logged != "none":
            key = self._key(trainer)
            values = {f"{key}/{name}": float(value) for name, value in self._everything(quantities).items()}
            for logger in trainer.loggers:
                logger.log_metrics(values, step=logging_step(trainer))
            self._log_each(trainer, quantities)

    def _everything(self, quantities: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**self.scalars(), **in_short(quantities)}

    def _key(self, trainer: pl.Trainer) -> str:
        same = [other for other in callbacks_of(trainer) if getattr(other, "_KEY", None) == self._KEY]
        index = next((index for index, other in enumerate(same) if other is self), 0)
        return f"{self._KEY}_{index + 1}" if index else self._KEY

    def _log_dict(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, values: dict[str, Tensor], prog_bar: bool = False
    ) -> None:
        key = self._key(trainer)
        named = {f"{key}/{name}": value for name, value in values.items()}
        pl_module.log_dict(named, prog_bar=prog_bar, logger=self._logged != "none" and bool(trainer.loggers))

    def _log_each(self, trainer: pl.Trainer, quantities: dict[str, Tensor]) -> None:
        """The values of each tensor, past `log_dict`, whose price is a third of a millisecond a name."""
        if self._logged != "all" or not trainer.loggers:
            return
        key = self._key(trainer)
        values: dict[str, float] = {}
        for quantity in (name for name in PER_TENSOR if name in quantities):
            values.update(by_name(f"{key}_{quantity}/", self.tensors(), quantities[quantity]))
        for logger in trainer.loggers:
            logger.log_metrics(values, step=logging_step(trainer))
