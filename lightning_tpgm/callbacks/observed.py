"""What users see of a method: logs, a report, pictures, warnings."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, Literal, get_args

from torch import Tensor
from typing_extensions import override

from lightning_tpgm.framework import (
    Callback,
    MisconfigurationException,
    callbacks_of,
    logging_step,
    logs_are_due,
    pl,
    rank_zero_warn,
)
from lightning_tpgm.history import History
from lightning_tpgm.plotting import plot_layers, plot_steps
from lightning_tpgm.reporting import PER_TENSOR, Row, by_name, in_short, print_table, rows_of
from lightning_tpgm.troubles import Watch

Log = Literal["summary", "all", "none"]


class ObservedCallback(Callback):
    """Base of all methods: shows what the method does.

    Names in the logs begin with the method's, ``tpgm/distance``. Of several callbacks of one method in a trainer the
    second writes ``tpgm_2/distance`` and so on, in the order of the trainer's list. Nothing is read from the device but
    when the trainer's ``log_every_n_steps`` says that logs are due.

    Args:
        log: What goes to the loggers: ``"summary"``, ``"all"`` or ``"none"``.
        summary: Whether the fit ends with a printed table.
    """

    _KEY = ""  # what logged names begin with
    _IN_BAR: tuple[str, ...] = ()  # what the method itself logs after every batch

    def __init__(self, log: Log, summary: bool) -> None:
        if log not in get_args(Log):
            raise MisconfigurationException(f"`log` should be one of {get_args(Log)}, found {log!r}.")
        if summary and find_spec("rich") is None:
            raise MisconfigurationException("`summary` = True needs rich: pip install rich.")
        self._logged = log  # `log` is taken: Lightning gives its callbacks the module's method of that name
        self.summary = summary
        self._forget_seen()

    # ---- what a method gives

    def tensors(self) -> dict[str, Tensor]:
        """The anchors by name, in the order of `quantities`."""
        raise NotImplementedError

    def quantities(self) -> dict[str, Tensor]:
        """Vectors on the device, see `lightning_tpgm.reporting`; empty where nothing is constrained now.

        Collective where parameters are split over processes.
        """
        raise NotImplementedError

    def quantities_are_at_hand(self) -> bool:
        """Whether `quantities` costs nothing: then all steps may be recorded, else those at which logs are due."""
        return False

    def sizes(self) -> Tensor:
        """The norm of each anchor, shape (T,); collective."""
        raise NotImplementedError

    def growth(self) -> float:
        """By how much a radius can grow in an optimizer step."""
        return 0.0

    def scalars(self) -> dict[str, Tensor]:
        """What else is known, by name."""
        return {}

    # ---- what users ask for

    def report(self) -> list[Row]:
        """What the method did so far, one dict per constrained tensor; empty before the first fit.

        Keys: ``name``, ``shape`` and ``distance`` (from the pretrained value: the largest row distance in the norm
        mars, else the Frobenius norm). Methods with radii have ``radius``, ``ratio`` (what the last projection left of
        the deviation of the farthest row; 1: inside the ball) and ``binds``; DiGraP has ``omega``.
        ``pandas.DataFrame(callback.report())`` makes a table of it.

        During a fit with parameters split over processes (FSDP2, tensor parallel) every process must call it.
        """
        return rows_of(self.tensors(), self.quantities() or self._last)

    def plot(
        self,
        over: Literal["layers", "steps"] = "layers",
        quantity: Literal["distance", "radius", "omega"] = "distance",
        ax: Any = None,
    ) -> tuple[Any, Any]:
        """Draw what the method did, after or during a fit.

        Args:
            over: ``"layers"``: radius and distance of each tensor now, from the input's side of the network to the
                output's. ``"steps"``: a heat map of one quantity, tensors by optimizer steps.
            quantity: What the heat map shows.
            ax: Matplotlib axes to draw into; None: a new figure.

        Returns:
            The matplotlib figure and axes.

        Raises:
            ModuleNotFoundError: If matplotlib is not installed.
            ValueError: For an argument out of its range, before the first fit, or if the method has no such quantity.
        """
        names, now = list(self.tensors()), self.quantities() or self._last
        if over not in ("layers", "steps"):
            raise ValueError(f"`over` should be 'layers' or 'steps', found {over!r}.")
        if not now:
            raise ValueError(f"{type(self).__name__} has nothing to draw yet. Plot during or after a fit.")
        title = type(self).__name__.removesuffix("Callback")
        if over == "layers":
            return plot_layers(names, {name: vector.cpu() for name, vector in now.items()}, title, ax)
        if quantity not in now:
            raise ValueError(f"`quantity` should be one of {[q for q in PER_TENSOR if q in now]}, found {quantity!r}.")
        steps, matrix = self._history.with_present(quantity, now[quantity])
        return plot_steps(names, steps, matrix, f"{title}: {quantity}", ax)

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
        self._look(quantities)

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prints the summary, if that was asked for."""
        if self.summary and self._last and trainer.is_global_zero:
            print_table(repr(self), rows_of(self.tensors(), self._last))

    # ---- shared steps

    def _forget_seen(self) -> None:
        """Back to the state of a new callback."""
        self._history = History()
        self._last: dict[str, Tensor] = {}  # the quantities at the end of the fit
        self._watch = Watch()

    def _record(self, trainer: pl.Trainer) -> None:
        """Called after each optimizer step."""
        every = 1 if self.quantities_are_at_hand() else max(1, trainer.log_every_n_steps)  # type: ignore[attr-defined]
        if self._history.due(every):
            self._history.add({name: value for name, value in self.quantities().items() if name in PER_TENSOR})

    def _look(self, quantities: dict[str, Tensor]) -> None:
        """Warn of what goes wrong silently."""
        if quantities:
            for trouble in self._watch.look(self._history.count, quantities, self.sizes, self.growth()):
                rank_zero_warn(f"{type(self).__name__}: {trouble}")

    def _conclude(self, trainer: pl.Trainer) -> None:
        """Keep the values at the end of the fit, and log them: `log_dict` is not allowed any more."""
        quantities = self.quantities()
        self._last = {name: vector.cpu() for name, vector in quantities.items()}
        if quantities and self._logged != "none":
            key = self._key(trainer)
            scalars = {**self.scalars(), **in_short(quantities)}
            values = {f"{key}/{name}": float(value) for name, value in scalars.items()}
            for logger in trainer.loggers:
                logger.log_metrics(values, step=logging_step(trainer))
            self._log_each(trainer, quantities)

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
        """The values of each tensor, past `log_dict`, which takes a third of a millisecond a name.

        They have groups of their own, ``tpgm_radius/NAME``: under ``tpgm/`` they would hide the summary among them, and
        stores that make a folder of each group could not have ``tpgm/distance/NAME`` beside ``tpgm/distance``.
        """
        if self._logged != "all" or not trainer.loggers:
            return
        key = self._key(trainer)
        values: dict[str, float] = {}
        for quantity in (name for name in PER_TENSOR if name in quantities):
            values |= by_name(f"{key}_{quantity}/", self.tensors(), quantities[quantity])
        for logger in trainer.loggers:
            logger.log_metrics(values, step=logging_step(trainer))
