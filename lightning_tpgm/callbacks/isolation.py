"""Running a module's step without leaving a trace: everything that it changes is put back."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Collection, Iterator, MutableMapping
from contextlib import ExitStack, contextmanager
from operator import is_
from types import FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torchmetrics import Metric

from lightning_tpgm.callbacks.framework import DummyLogger, classes, is_overridden, isolate_rng, pl, results_put_aside


@contextmanager
def no_trace(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Iterator[None]:
    """Everything that running the module's step changes is put back on exit, also when it raises.

    Inside, metrics are empty and every module is in eval mode, or in the mode that ``on_validation_model_eval`` of the
    LightningModule gives it. Put back are: the generators of torch, numpy and python; the train / eval flag, buffers
    and attributes of every module (numbers, tensors, arrays, containers at any depth, generators, and the attributes of
    objects that hang on a module), and with them the states of metrics; nothing reaches `self.log` or the loggers. The
    module's parameters are the caller's business.

    Not put back: what the step does to the outside world (files, printed text, its own threads) and tensors inside
    containers that are changed in place.
    """
    with ExitStack() as stack:
        stack.enter_context(isolated_generators())
        stack.enter_context(_silent(trainer, pl_module))
        stack.enter_context(_unchanged(pl_module))
        for module in pl_module.modules():
            module.training = False  # not eval(): adapters that merge themselves there would change frozen weights
            if isinstance(module, Metric):
                module.reset()
        if is_overridden("on_validation_model_eval", pl_module):  # it knows what stays in train mode
            wrapper = trainer.model  # Lightning's own version of the hook switches this one
            if wrapper is not None:
                stack.callback(setattr, wrapper, "training", wrapper.training)
            pl_module.on_validation_model_eval()
        yield


def without_subclass(tensor: Tensor) -> Tensor:
    """The same elements as an ordinary tensor, for libraries whose tensors have methods or metadata of their own.

    Tensors that are made of others (DTensor) stay what they are: they have no elements of their own.
    """
    ordinary = type(tensor) is Tensor or type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__
    return tensor if ordinary else tensor.as_subclass(Tensor)


@contextmanager
def isolated_generators() -> Iterator[None]:
    """`isolate_rng` that also restores when the body raises."""
    isolation = isolate_rng()
    isolation.__enter__()
    try:
        yield
    finally:
        isolation.__exit__(None, None, None)


@contextmanager
def _silent(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Iterator[None]:
    """Nothing is logged: neither through `self.log` of the module and its parts nor through the loggers."""
    loggable = classes("core:LightningModule")
    modules = [module for module in pl_module.modules() if isinstance(module, loggable)]
    own: list[dict[str, Any]] = [{k: vars(m)[k] for k in ("log", "log_dict") if k in vars(m)} for m in modules]
    loggers = trainer.loggers
    try:
        trainer.loggers = [DummyLogger() for _ in loggers]
        for module in modules:
            vars(module).update(log=_ignore, log_dict=_ignore)
        with results_put_aside(trainer):
            yield
    finally:
        for module, names in zip(modules, own, strict=True):
            for name in ("log", "log_dict"):
                vars(module).pop(name, None)
            vars(module).update(names)
        trainer.loggers = loggers


def _ignore(*_: Any, **__: Any) -> None:
    pass


@contextmanager
def _unchanged(root: nn.Module) -> Iterator[None]:
    """Flags, buffers and attributes of all modules are as before on exit."""
    modules = list(root.modules())
    flags = [module.training for module in modules]
    memory = _Memory()
    for module in modules:
        memory.keep_module(module)
    try:
        yield
    finally:
        memory.restore()
        for module, training in zip(modules, flags, strict=True):
            if module.training != training:
                module.training = training


class _Memory:
    """Remembers values so that each can be restored *in place*: whoever else holds them sees them restored too."""

    _MODULE_STATE = frozenset(vars(nn.Module())) - {"_buffers"}  # torch's own bookkeeping
    _ATOMS = frozenset({bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size})
    _OPAQUE = (
        *(Tensor, np.ndarray, type, ModuleType, FunctionType, MethodType),
        *(torch.utils.data.Dataset, torch.utils.data.DataLoader),
    )
    _FOREIGN = frozenset(
        {"torch", "lightning", "pytorch_lightning", "lightning_fabric", "torchmetrics", "numpy", "lightning_tpgm"}
    )

    def __init__(self) -> None:
        lightning = ("trainer:Trainer", "core:LightningDataModule", "callbacks:Callback")
        self._opaque = (*self._OPAQUE, *(found for name in lightning for found in classes(name)))
        self._undo: list[Callable[[], None]] = []
        self._seen: dict[int, Any] = {}

    def restore(self) -> None:
        """Undo everything, also what comes after an undo that raises."""
        with ExitStack() as stack:  # last in, first out
            for undo in self._undo:
                stack.callback(undo)

    def keep_module(self, module: nn.Module) -> None:
        if id(module) in self._seen:
            return
        self._seen[id(module)] = module
        for buffer in module.buffers(recurse=False):
            self._keep_array(buffer)
        if isinstance(module, torch.jit.ScriptModule):
            return  # its attributes live in TorchScript
        self._keep_mapping(vars(module))
        for name, value in vars(module).items():
            if name not in self._MODULE_STATE and type(value) not in self._ATOMS:
                self._keep_array(value)
                self._keep(value)

    def _keep(self, value: Any, inside_object: bool = False) -> None:
        """Remember what a container or object holds; tensors and arrays in it by reference only."""
        if id(value) in self._seen or isinstance(value, self._opaque):
            return
        if isinstance(value, nn.Module):  # one that is hidden in a container
            for module in value.modules():
                self.keep_module(module)
            return
        self._seen[id(value)] = value
        parts: Any = ()
        if isinstance(value, dict):  # not every mapping: reading or writing others may do more than that
            self._keep_mapping(value)
            parts = value.values()
        elif isinstance(value, list | deque):
            self._keep_items(value, value.extend)
            parts = value
        elif isinstance(value, tuple):
            parts = value
        elif isinstance(value, set):
            self._keep_items(value, value.update)
        elif isinstance(value, torch.Generator):
            self._later(value.set_state, value.get_state())
        elif isinstance(value, random.Random):
            self._later(value.setstate, value.getstate())
        elif isinstance(value, np.random.Generator):
            self._later(lambda state: setattr(value.bit_generator, "state", state), value.bit_generator.state)
        elif isinstance(value, np.random.RandomState):
            self._later(value.set_state, value.get_state())
        elif not inside_object and self._is_users_object(value):
            self._keep_mapping(vars(value))
            parts, inside_object = vars(value).values(), True
            for part in parts:
                self._keep_array(part)
        if not set(map(type, parts)) <= self._ATOMS:
            for part in parts:
                if type(part) not in self._ATOMS:
                    self._keep(part, inside_object)

    def _is_users_object(self, value: Any) -> bool:
        package = type(value).__module__.partition(".")[0]
        return hasattr(value, "__dict__") and package not in self._FOREIGN

    def _later(self, undo: Callable[[Any], Any], argument: Any) -> None:
        self._undo.append(lambda: undo(argument))

    def _keep_array(self, value: Any) -> None:
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter) and not value.is_inference():
            value = _own_elements(without_subclass(value))
            copy = value.detach().clone()
            # a graph of the training step that is still in use finds the version that it saw
            version = _unsafe_preserve_version_counter(value)

            def undo() -> None:  # whatever the version says: BatchNorm does not count its changes there
                with version, torch.no_grad():
                    value.copy_(copy)

            self._undo.append(undo)
        elif isinstance(value, np.ndarray):
            self._later(lambda kept: np.copyto(value, kept), value.copy())

    def _keep_mapping(self, value: MutableMapping[Any, Any]) -> None:
        kept = dict(value)

        def undo() -> None:
            if not _same_items(value, kept):  # also the order: names of buffers and metrics
                value.clear()
                value.update(kept)
            elif not _same_items(value.values(), kept.values()):
                for key, item in kept.items():
                    value[key] = item

        self._undo.append(undo)

    def _keep_items(self, value: list[Any] | deque[Any] | set[Any], refill: Callable[[list[Any]], None]) -> None:
        kept = list(value)

        def undo() -> None:
            if not _same_items(value, kept):
                value.clear()
                refill(kept)

        self._undo.append(undo)


def _same_items(a: Collection[Any], b: Collection[Any]) -> bool:
    return len(a) == len(b) and all(map(is_, a, b))


def _own_elements(tensor: Tensor) -> Tensor:
    """The elements of a tensor that have memory of their own: an expanded dimension has one."""
    for dim, (size, stride) in enumerate(zip(tensor.size(), tensor.stride(), strict=True)):
        if stride == 0 and size > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor
