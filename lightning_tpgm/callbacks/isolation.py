"""Running a module's step without leaving a trace: everything that it changes is put back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from operator import itemgetter
from time import perf_counter
from typing import Any

from torch import Tensor, nn

from lightning_tpgm.callbacks.framework import is_overridden, isolate_rng, pl, rank_zero_warn
from lightning_tpgm.callbacks.memory import ATOMS, Known, Memory, same_items
from lightning_tpgm.callbacks.opaque import position
from lightning_tpgm.callbacks.silence import silent
from lightning_tpgm.callbacks.structure import Structure
from lightning_tpgm.callbacks.weights import Weights

_COSTLY = 1e-2  # seconds


class Isolation:
    """Evaluates a module without leaving a trace, and remembers from one evaluation to the next what that takes.

    Put back are

    - the generators of torch, numpy and python;
    - the train / eval flag, the buffers and the attributes of every module, and with them the states of metrics.
      Attributes are numbers, tensors, arrays, containers at any depth, generators, and those of objects among them;
    - parameters that the step itself changes, such as a teacher's.

    Nothing reaches `self.log` or the loggers. The parameters whose gradient is asked for are the caller's business.

    Not put back are

    - what the step does to the outside world: files, printed text, its own threads;
    - what is opaque: objects of the standard library that are no containers, arrays in files, sparse tensors, what a
      function encloses, attributes of classes;
    - containers of more than a thousand entries: only what is appended is taken off again;
    - large arrays that the first evaluation left alone, and large tensors that are written to through numpy.
    """

    def __init__(self) -> None:
        self._weights = Weights()
        self._arrays = Known()
        self._structures: dict[int, tuple[nn.Module, Structure]] = {}
        self._sources: list[list[Tensor]] = []  # what the following three were found in
        self._evaluated: list[Tensor] = []
        self._fixed: list[Tensor] = []
        self._settled: set[int] = set()
        self._advancing: set[str] = set()  # attributes that were named
        self._costly, self._said = 0, False  # evaluations in a row that took long, and whether that was said
        self._evaluations = 0

    @contextmanager
    def no_trace(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        evaluated: Sequence[Tensor] = (),
        eval_mode: bool = True,
    ) -> Iterator[None]:
        """Everything that running the module's step changes is put back on exit, also when it raises.

        Inside, metrics are empty and every module is in eval mode, or in the mode that ``on_validation_model_eval`` of
        the LightningModule gives it.

        Args:
            trainer: Its loggers are silent inside.
            pl_module: The module.
            evaluated: Parameters that are left alone.
            eval_mode: False: every module is in the mode that it is in already.

        Raises:
            MisconfigurationException: If something changed that cannot be put back.
        """
        with ExitStack() as stack:
            stack.enter_context(isolated_generators())
            structure, values = self._structure(pl_module)
            self._keep(pl_module, structure, values, evaluated, stack)
            stack.enter_context(silent(trainer))
            stack.callback(setattr, trainer, "should_stop", trainer.should_stop)
            stack.enter_context(structure.evaluating(values, eval_mode))
            for metric in structure.metrics:
                metric.reset()
            if is_overridden("on_validation_model_eval", pl_module):  # it knows what stays in train mode
                wrapper = trainer.model  # Lightning's own version of the hook switches this one
                if wrapper is not None:
                    stack.callback(setattr, wrapper, "training", wrapper.training)
                own_modes = structure.modes(values)
                pl_module.on_validation_model_eval()
                if not eval_mode:
                    own_modes()
            yield

    def _keep(
        self, root: nn.Module, structure: Structure, values: list[Any], evaluated: Sequence[Tensor], stack: ExitStack
    ) -> None:
        """Remember a module and all that hangs on it until the stack unwinds."""
        memory = Memory(self._arrays)
        stack.callback(memory.restore)
        found, sources = [(structure, values)], []
        spent: list[tuple[float, Any, Structure]] = []
        loose: dict[int, Tensor] = {}
        for structure, values in found:  # grows by modules that are hidden in attributes
            stack.enter_context(structure.unchanged(values))
            spent += [
                (self._keep_value(value, memory, structure, stack), value, structure)
                for value in values
                if type(value) not in ATOMS and not memory.keep_plain(value)
            ]
            for key in [*memory.hidden]:
                hidden = memory.hidden.pop(key)
                if not any(key in known.ids for known, _ in found):
                    found.append(self._structure(hidden))
            fixed, buffers = structure.tensors()
            sources.append(fixed)
            loose.update((id(tensor), tensor) for tensor in buffers)
        self._say_of_costs(spent)
        structures = [structure for structure, _ in found]
        if len(self._structures) > len(structures):  # of modules that are gone
            self._structures = {k: known for k, known in self._structures.items() if known[1] in structures}
        loose.update(memory.tensors)
        self._sort(sources, evaluated)
        others = [tensor for key, tensor in loose.items() if key not in self._settled]
        stack.enter_context(self._weights.unchanged(self._fixed, others, lambda tensor: _name(root, tensor)))
        self._evaluations += 1

    def _sort(self, sources: list[list[Tensor]], evaluated: Sequence[Tensor]) -> None:
        """Find the fixed tensors that are not evaluated, unless all is as it was the last time."""
        if same_items(sources, self._sources) and same_items(evaluated, self._evaluated):
            return
        self._sources, self._evaluated = sources, list(evaluated)
        fixed = {id(tensor): tensor for tensors in sources for tensor in tensors}
        own = {*map(id, evaluated)}
        self._settled = {*fixed, *own}
        self._fixed = [tensor for key, tensor in fixed.items() if key not in own]

    def _structure(self, module: nn.Module) -> tuple[Structure, list[Any]]:
        """The structure of a module, and its values."""
        root, structure = self._structures.get(id(module), (None, None))
        if structure is not None and root is module and structure.is_current():
            with suppress(KeyError):  # as many attributes as before, and not the same ones
                return structure, structure.values()
        structure = Structure(module)
        self._structures[id(module)] = module, structure
        return structure, structure.values()

    def _keep_value(self, value: Any, memory: Memory, structure: Structure, stack: ExitStack) -> float:
        """Remember a value; the seconds that it took."""
        start = perf_counter()
        memory.keep(value)
        seconds = perf_counter() - start
        while memory.iterators:
            self._say_of_iterator(memory.iterators.pop(), structure.owner_of(value), stack)
        return seconds

    def _say_of_costs(self, spent: list[tuple[float, Any, Structure]]) -> None:
        """Say once what takes long to remember, alone or together; the first evaluation finds out what changes."""
        total = sum(seconds for seconds, _, _ in spent)
        self._costly = self._costly + 1 if self._evaluations and total > _COSTLY else 0
        if self._costly == 3 and not self._said:  # it is not the machine that was busy
            self._said = True
            most = sorted(spent, key=itemgetter(0), reverse=True)[:3]
            named = ", ".join(
                f"{structure.owner_of(value)} ({seconds * 1e3:.1f} ms)" for seconds, value, structure in most
            )
            rank_zero_warn(
                f"Each evaluation of the held-out loss takes {total * 1e3:.0f} ms to remember what the step may change."
                f" The most costly of {len(spent)} attributes: {named}. Keep them outside of the module, or evaluate"
                " less often (`every_n_steps`)."
            )

    def _say_of_iterator(self, iterator: Iterator[Any], owner: str, stack: ExitStack) -> None:
        """Say once of an attribute that the step advances an iterator, or that it may."""
        before = position(iterator)

        def say() -> None:
            if owner not in self._advancing and (before is None or position(iterator) != before):
                self._advancing.add(owner)
                rank_zero_warn(
                    f"Each evaluation of the held-out loss {'may advance' if before is None else 'advances'} the"
                    f" iterator in {owner}, and cannot put it back: training would miss what it gave. Draw from it in a"
                    " hook outside of the step, on_train_batch_start for instance, or pass a `loss` that does not."
                )

        stack.callback(say)


@contextmanager
def isolated_generators() -> Iterator[None]:
    """`isolate_rng` that also restores when the body raises."""
    isolation = isolate_rng()
    isolation.__enter__()
    try:
        yield
    finally:
        isolation.__exit__(None, None, None)


def _name(root: nn.Module, tensor: Tensor) -> str:
    for named in (root.named_parameters(remove_duplicate=False), root.named_buffers(remove_duplicate=False)):
        for name, found in named:
            if found is tensor:
                return repr(name)
    return f"a tensor of shape {tuple(tensor.shape)} that hangs on the module"
