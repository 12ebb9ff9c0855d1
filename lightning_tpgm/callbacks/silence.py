"""Nothing that a step logs arrives anywhere, while loggers keep their names and folders."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from typing import Any

from typing_extensions import Self, override

from lightning_tpgm.callbacks.framework import classes, pl, results_put_aside

_PLAIN = (str, bytes, int, float, os.PathLike, type(None))


@contextmanager
def silent(trainer: pl.Trainer) -> Iterator[None]:
    """Nothing is logged: neither through the loggers nor through Lightning's `log` and `log_dict`.

    A module's own `log` is called as it is. What it passes on to Lightning's goes nowhere.
    """
    loggers = trainer.loggers
    own = [(kind, name, vars(kind)[name]) for kind in classes("core:LightningModule") for name in ("log", "log_dict")]
    try:
        trainer.loggers = [SilentLogger(logger) for logger in loggers]  # type: ignore[misc]  # stands for one
        for kind, name, _ in own:
            setattr(kind, name, _ignore)
        with results_put_aside(trainer):
            yield
    finally:
        for kind, name, function in own:
            setattr(kind, name, function)
        trainer.loggers = loggers


def _ignore(*_: Any, **__: Any) -> None:
    pass


class SilentLogger:
    """Stands for a logger: passes for one of its class and has its name, version and folders, but writes nothing.

    Args:
        logger: The one it stands for.
    """

    def __init__(self, logger: Any) -> None:
        vars(self)["_logger"] = logger

    @property  # type: ignore[explicit-override]  # mypy finds none on a property with a setter
    @override
    def __class__(self) -> type:  # the trainer's `log_dir` asks for it, and so do users
        return type(self._logger)

    @__class__.setter
    def __class__(self, value: type) -> None:
        raise TypeError

    @property
    def experiment(self) -> Any:
        """Takes every call; what is plain in the logger's own one, a folder for instance, can be read."""
        return _Nothing(vars(self._logger).get("_experiment"))  # the logger's property might open files

    def __getattr__(self, name: str) -> Any:
        """What is plain; methods do nothing."""
        value = getattr(self._logger, name)
        if isinstance(value, _PLAIN):
            return value
        if type(value) in (dict, list, tuple, set):
            return copy(value)
        return _ignore if callable(value) else _Nothing(value)


class _Nothing:
    """Takes every call, index and assignment, as deep as they go, and does nothing."""

    def __init__(self, real: Any = None) -> None:
        vars(self)["_real"] = real

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = getattr(self._real, name, None)
        return value if isinstance(value, _PLAIN) and value is not None else _Nothing()

    @override
    def __setattr__(self, name: str, value: object) -> None:
        pass

    def __call__(self, *_: Any, **__: Any) -> Self:
        return self

    def __getitem__(self, key: object) -> Self:
        return self

    def __setitem__(self, key: object, value: object) -> None:
        pass

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass
