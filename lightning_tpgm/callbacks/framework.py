"""Lightning under both of its names, and what this package needs of its private parts.

`lightning.pytorch` and `pytorch_lightning` are the same code twice, with classes that do not know each other. A project
uses one of them. This package goes along with the one that is imported when it is first imported itself. If none is,
its classes derive from those of all that are installed. The other may be imported later, where a project uses one and a
dependency of it the other. Then its classes are joined as well. Everything that this package takes from Lightning comes
through here, so this is also the one place to look at when Lightning changes.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from itertools import chain
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from lightning.pytorch import Callback
    from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
    from lightning.pytorch.loggers.logger import DummyLogger
    from lightning.pytorch.utilities.combined_loader import CombinedLoader
    from lightning.pytorch.utilities.exceptions import MisconfigurationException
    from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
    from lightning.pytorch.utilities.seed import isolate_rng
    from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
    from torch import Tensor

__all__ = [
    "Callback",
    "CombinedLoader",
    "DummyLogger",
    "MisconfigurationException",
    "Tqdm",
    "batch_values",
    "callbacks_of",
    "classes",
    "comes_in_turn",
    "exchange_average",
    "is_overridden",
    "is_own_error",
    "is_param_in_hook_signature",
    "isolate_rng",
    "join_later_imports",
    "logging_step",
    "logs_are_due",
    "pl",
    "rank_zero_info",
    "rank_zero_warn",
    "results_put_aside",
    "same_package",
    "starts_functions",
    "to_device",
    "uses_distributed_sampler",
    "validate_aside",
    "validation_loader",
    "validation_source",
    "with_progress_bar",
]

PACKAGES = ("lightning.pytorch", "pytorch_lightning")


def _in_use() -> list[str]:
    """What the project has imported; if it has imported none yet, all that are installed."""
    imported = [package for package in PACKAGES if sys.modules.get(package)]
    return imported or [package for package in PACKAGES if find_spec(package.partition(".")[0])]


def _find(package: str, name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(import_module(f"{package}.{module}"), attribute)


def classes(name: str) -> tuple[type, ...]:
    """A class in every package that is imported, for `isinstance`.

    Args:
        name: Module and name within the package.

    >>> {found.__name__ for found in classes("callbacks:BaseFinetuning")}
    {'BaseFinetuning'}
    """
    return tuple(_find(package, name) for package in PACKAGES if sys.modules.get(package))


def same_package(found: object, name: str) -> Any:
    """Something from the package that an object's class comes from, by default from the first in use.

    Args:
        found: A trainer, a module or a callback.
        name: Module and name within the package.
    """
    origins = (f"{base.__module__}." for base in type(found).__mro__)
    found_in = (package for origin in origins for package in PACKAGES if origin.startswith(f"{package}."))
    package = next(found_in, IN_USE[0])
    return _find(package, name)


IN_USE = _in_use()
if not IN_USE:
    raise ImportError("lightning_tpgm needs Lightning: pip install lightning, or pip install pytorch-lightning.")


class _OfEveryPackage:
    """Stands for a class of Lightning among the bases of one of ours: that of every package in use."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __mro_entries__(self, bases: tuple[object, ...]) -> tuple[type, ...]:
        return tuple(_find(package, self.name) for package in IN_USE)


_CALLBACK, _ERROR = "callbacks:Callback", "utilities.exceptions:MisconfigurationException"


def join_later_imports() -> None:
    """Let our classes derive from those of a package, too, that was imported since.

    Else a Trainer of that package would not know a bare callback of ours for one, nor would its LightningCLI.
    """
    for name in (_CALLBACK, _ERROR):
        found = classes(name)
        derived: list[type] = [*set(chain.from_iterable(base.__subclasses__() for base in found))]
        for ours in derived:
            if ours.__module__.startswith("lightning_tpgm."):
                ours.__bases__ = (*ours.__bases__, *(base for base in found if base not in ours.__mro__))


if not TYPE_CHECKING:
    pl = import_module(IN_USE[0])
    Callback = _OfEveryPackage(_CALLBACK)

    class MisconfigurationException(_OfEveryPackage(_ERROR)):
        """Lightning's error about settings that do not work."""

    # whichever package these come from: they ask nothing about their arguments' classes
    Tqdm = _find(IN_USE[0], "callbacks.progress.tqdm_progress:Tqdm")
    DummyLogger = _find(IN_USE[0], "loggers.logger:DummyLogger")
    CombinedLoader = _find(IN_USE[0], "utilities.combined_loader:CombinedLoader")
    rank_zero_info = _find(IN_USE[0], "utilities.rank_zero:rank_zero_info")
    rank_zero_warn = _find(IN_USE[0], "utilities.rank_zero:rank_zero_warn")
    isolate_rng = _find(IN_USE[0], "utilities.seed:isolate_rng")
    is_param_in_hook_signature = _find(IN_USE[0], "utilities.signature_utils:is_param_in_hook_signature")


def is_overridden(method: str, pl_module: pl.LightningModule) -> bool:
    """Whether a module defines this method itself."""
    return bool(same_package(pl_module, "utilities.model_helpers:is_overridden")(method, pl_module))


def is_own_error(error: Exception) -> bool:
    """Whether it is one of Lightning's own, or of ours, which derive from them."""
    origins = tuple(f"{package}." for package in ("lightning", "pytorch_lightning", "lightning_fabric"))
    return any(f"{base.__module__}.".startswith(origins) for base in type(error).__mro__)


def with_progress_bar(trainer: pl.Trainer, steps: range, text: str) -> Any:
    """The steps, shown as the trainer shows its own; silently if it shows none."""
    bar = trainer.progress_bar_callback
    shown = bar is not None and trainer.is_global_zero
    live = getattr(bar, "progress", None)  # there can be only one at a time
    if shown and live is not None and isinstance(bar, classes("callbacks:RichProgressBar")):
        return live.track(steps, description=text)
    return Tqdm(steps, desc=text, disable=not shown)


# ---- private parts, each pinned by a test


def validation_source(trainer: pl.Trainer) -> Any:
    """Where validation loaders come from: fit's argument, the datamodule or the module.

    `trainer.val_dataloaders` is None when validation is switched off.
    """
    return trainer.fit_loop.epoch_loop.val_loop._data_source


def validation_loader(trainer: pl.Trainer) -> CombinedLoader | None:
    """What validation iterates over, with its mode; None before its loaders are made, or when it is switched off.

    `trainer.val_dataloaders` has only the loaders in it: whether they come in turn or together is lost there.
    """
    return trainer.fit_loop.epoch_loop.val_loop._combined_loader


def comes_in_turn(loader: CombinedLoader) -> bool:
    """Whether it gives the batches of one loader after the other, and not those of all together."""
    return loader._mode == "sequential"


def uses_distributed_sampler(trainer: pl.Trainer) -> bool:
    """The Trainer's argument of that name."""
    return bool(trainer._accelerator_connector.use_distributed_sampler)


def to_device(trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, dataloader_idx: int) -> Any:
    """What happens to a batch on its way into a step: precision, the module's hooks, the device."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = pl_module._on_before_batch_transfer(batch, dataloader_idx=dataloader_idx)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=dataloader_idx)


@contextmanager
def results_put_aside(trainer: pl.Trainer) -> Iterator[None]:
    """What is logged inside is thrown away, also by parts of a module that were given its bound method `log`."""
    loop, connector = trainer.fit_loop.epoch_loop, trainer._logger_connector
    results, current_fx = loop._results, connector._current_fx
    try:
        loop._results = type(results)(training=True)
        loop._results.batch, loop._results.batch_size = results.batch, results.batch_size
        yield
    finally:
        loop._results, connector._current_fx = results, current_fx


def validate_aside(trainer: pl.Trainer) -> dict[str, Tensor]:
    """The metrics that `Trainer.validate` gives, in the middle of a fit and on the fit's validation data.

    The module and all callbacks see a `Trainer.validate`, which checkpoints and early stopping pass over. No metric
    goes to the loggers, and those of the fit stay the trainer's.
    """
    loop, fit, connector = trainer.validate_loop, trainer.fit_loop.epoch_loop.val_loop, trainer._logger_connector
    before = [(owner, dict(vars(owner))) for owner in (trainer.state, connector)]
    source, verbose, loaded = loop._data_source, loop.verbose, fit._combined_loader
    try:
        trainer.state.fn, loop.verbose, trainer.validating = type(trainer.state.fn)("validate"), False, True  # type: ignore[misc]
        connector.reset_results()
        connector.reset_metrics()
        connector.log_metrics = lambda *_, **__: None  # type: ignore[method-assign]
        again = None if loaded is None else type(loaded)(loaded.iterables, loaded._mode)  # the fit's keeps its place
        loop._data_source = fit._data_source if again is None else type(source)(again, source.name)
        loop.run()
        return dict(trainer.callback_metrics)
    finally:
        loop.teardown()
        loop._data_source, loop.verbose = source, verbose
        for owner, attributes in before:
            vars(owner).clear()
            vars(owner).update(attributes)


@contextmanager
def batch_values(trainer: pl.Trainer, name: str) -> Iterator[list[tuple[Any, int]]]:
    """The values that `Trainer.validate` makes a metric from, each with its number of examples, as they are logged.

    Of a torchmetrics object that was updated without its `forward`, which keeps no value of a batch: None.
    """
    results = trainer.validate_loop._results
    update, extracted, found = results.update_metrics, _find(IN_USE[0], "utilities.data:extract_batch_size"), []

    def record(key: str, value: Any, size: int) -> None:
        update(key, value, size)
        if name in results._forked_name(results[key], on_step=False):
            if not results[key].is_tensor:
                examples = 1 if results.batch is None else extracted(results.batch)
                value, size = value._forward_cache, max(size, examples)
            found.append((None if value is None else value.detach().clone(), size))

    results.update_metrics = record
    try:
        yield found
    finally:
        del results.update_metrics


def logs_are_due(trainer: pl.Trainer) -> bool:
    """Whether what is logged in this batch goes to the loggers at its end."""
    automatic = trainer.lightning_module.automatic_optimization
    if automatic and trainer.fit_loop._should_accumulate():
        return False
    return bool(trainer._logger_connector.should_update_logs)


def logging_step(trainer: pl.Trainer) -> int:
    """The loggers' x axis while training."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def starts_functions(trainer: pl.Trainer) -> bool:
    """Whether the strategy starts its processes as functions, which keep to themselves what they change."""
    return isinstance(trainer.strategy.launcher, classes("strategies.launchers:_MultiProcessingLauncher"))


def callbacks_of(trainer: pl.Trainer) -> list[Callback]:
    """All callbacks of the trainer."""
    found: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # a connector sets it
    return found


def exchange_average(callback: Callback, average: Any = None) -> Any:
    """Give a `WeightAveraging` this average and return its own; None: it swaps nothing in for validation, nor saves."""
    own, callback._average_model = callback._average_model, average  # type: ignore[attr-defined]
    return own
