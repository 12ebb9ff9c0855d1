"""What an evaluation puts back of teachers and averages, of things that are not ours, and what that costs."""

from __future__ import annotations

import itertools
import logging
import random
import threading
import warnings
from argparse import Namespace
from array import array
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from queue import Queue
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from lightning_tpgm import TPGMCallback, WiSEFTCallback
from lightning_tpgm.callbacks.isolation import Isolation
from lightning_tpgm.callbacks.memory import Memory
from lightning_tpgm.callbacks.weights import SMALL
from properties import assert_same
from toys import FEATURES, Blobs, Classifier, trainer_in

WIDE = SMALL // FEATURES + 1  # a layer that is too large to be copied without a reason


class Bare(pl.LightningModule):
    """A module without anything, to hang one thing on."""


def evaluate(module: pl.LightningModule, action: Callable[[], Any], times: int = 3, **kwargs: Any) -> Isolation:
    isolation, trainer = Isolation(), trainer_in(Path(), **kwargs)
    for _ in range(times):
        with isolation.no_trace(trainer, module):
            action()
    return isolation


# --- parameters that the step itself changes


class Teaching(Classifier):
    """A step that moves a teacher along; only ``unused`` is constrained."""

    def __init__(self, update: Callable[[Tensor, Tensor], None], width: int, hidden: bool = False) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.student, teacher = nn.Linear(FEATURES, width), nn.Linear(FEATURES, width).requires_grad_(False)
            self.frozen = nn.Linear(FEATURES, WIDE).requires_grad_(False)  # nothing changes it
        self.teacher: Any = [teacher] if hidden else teacher
        self.unused = nn.Parameter(torch.ones(3))
        self.update = update

    def loss(self, batch: Any) -> Tensor:
        teacher = self.teacher[0] if isinstance(self.teacher, list) else self.teacher
        with torch.no_grad():
            for mean, weight in zip(teacher.parameters(), self.student.parameters(), strict=True):
                self.update(mean, weight)
        return super().loss(batch) + (self.student(batch[0]) - teacher(batch[0])).square().mean()


def in_place(mean: Tensor, weight: Tensor) -> None:
    mean.mul_(0.9).add_(weight, alpha=0.1)


def through_data(mean: Tensor, weight: Tensor) -> None:
    mean.data.mul_(0.9).add_(weight.data, alpha=0.1)


def swapped_data(mean: Tensor, weight: Tensor) -> None:
    mean.data = 0.9 * mean.data + 0.1 * weight.data


def at_once(mean: Tensor, weight: Tensor) -> None:
    torch._foreach_mul_([mean], 0.9)
    torch._foreach_add_([mean], [weight], alpha=0.1)


def part_of_it(mean: Tensor, weight: Tensor) -> None:
    mean[:1].copy_(weight[:1])
    torch.add(mean[1:2], 1, out=mean[1:2])


UPDATES = [in_place, through_data, swapped_data, at_once, part_of_it]


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("width", [4, WIDE])
@pytest.mark.parametrize("update", UPDATES)
def test_teacher_is_put_back(update: Any, width: int, hidden: bool, tmp_path: Path) -> None:
    runs = []
    others = ["backbone.*", "head.*", "student.*", "frozen.*", *([] if hidden else ["teacher.*"])]
    for callbacks in ([], [TPGMCallback(exclude=others, radius_steps=2)]):
        module = Teaching(update, width, hidden)
        trainer_in(tmp_path, callbacks=callbacks).fit(module, Blobs())
        teacher = module.teacher[0] if hidden else module.teacher
        runs.append([dict(module.state_dict()), dict(teacher.state_dict())])
    assert_same(*runs)


def test_averaged_model_is_put_back(tmp_path: Path) -> None:
    class Averaging(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.average = AveragedModel(self.backbone, multi_avg_fn=get_ema_multi_avg_fn(0.9))
            self.unused = nn.Parameter(torch.ones(3))

        def loss(self, batch: Any) -> Tensor:
            self.average.update_parameters(self.backbone)
            return super().loss(batch)

    runs = []
    for callbacks in ([], [TPGMCallback(exclude=["backbone.*", "head.*", "average.*"])]):
        module = Averaging()
        trainer_in(tmp_path, callbacks=callbacks).fit(module, Blobs())
        runs.append(dict(module.state_dict()))
    assert_same(*runs)


class Sizes(TorchDispatchMode):
    """Notes how many elements are cloned inside."""

    cloned = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "clone" in function._schema.name:
            self.cloned += args[0].numel()
        return function(*args, **(kwargs or {}))


def test_what_does_not_change_is_not_copied() -> None:
    module = Teaching(in_place, WIDE)
    step = [torch.randn(2, FEATURES), torch.zeros(2, dtype=torch.long)]
    isolation, trainer = Isolation(), trainer_in(Path())
    changing = module.teacher.weight.numel()
    for _ in range(3):
        with Sizes() as sizes, isolation.no_trace(trainer, module, list(module.student.parameters())):
            module.loss(step)
        assert changing <= sizes.cloned < changing + SMALL


def test_change_that_torch_does_not_show_is_an_error() -> None:
    """An operation of a compiled function, for instance, writes without a word and counts the tensor's version up."""
    module = Bare()
    module.frozen = nn.Linear(FEATURES, WIDE).requires_grad_(False)
    with (
        pytest.raises(MisconfigurationException, match=r"changed 'frozen.weight'.*`loss`"),
        Isolation().no_trace(trainer_in(Path()), module),
    ):
        torch.autograd.graph.increment_version(module.frozen.weight)


@pytest.mark.parametrize("tensor", ["parameter", "buffer", "own buffer", "in a dict"])
@pytest.mark.parametrize("size", [4, SMALL + 1])
@pytest.mark.parametrize("update", UPDATES)
def test_what_begins_to_change_late_is_put_back(update: Any, size: int, tensor: str) -> None:
    """A teacher that moves every second step, or after a warm-up."""
    module = Bare()
    module.norm = nn.BatchNorm1d(size).requires_grad_(False)
    module.register_buffer("queue", torch.zeros(size))
    module.shadow = {"mean": torch.zeros(size)}
    found = {
        "parameter": module.norm.weight,
        "buffer": module.norm.running_var,
        "own buffer": module.queue,
        "in a dict": module.shadow["mean"],
    }[tensor]
    assert isinstance(found, Tensor)
    before, version, memory = found.detach().clone(), found._version, found.data_ptr()
    isolation, trainer = Isolation(), trainer_in(Path())
    for evaluation in range(4):
        with isolation.no_trace(trainer, module), torch.no_grad():
            if evaluation % 2:
                update(found, torch.full((size,), 7.0))
                assert not torch.equal(found, before)
        assert torch.equal(found, before)
        assert (found._version, found.data_ptr()) == (version, memory)


def test_what_training_changes_between_evaluations_stays() -> None:
    """In place, past the version, and by other memory: the next evaluation puts back what it found."""
    module = Bare()
    module.small, module.large = (nn.Parameter(torch.zeros(size)) for size in (4, SMALL + 1))
    isolation, trainer = Isolation(), trainer_in(Path())
    for value, update in enumerate([in_place, through_data, swapped_data, at_once] * 2):
        with torch.no_grad():
            for tensor in (module.small, module.large):
                update(tensor, torch.full_like(tensor, value + 1))
        before = [tensor.detach().clone() for tensor in (module.small, module.large)]
        with isolation.no_trace(trainer, module), torch.no_grad():
            module.small.data.add_(1)
            module.large.data.add_(1)
        assert torch.equal(module.small, before[0])
        assert torch.equal(module.large, before[1])


def test_averages_in_a_dict_are_put_back() -> None:
    module = Bare()
    module.shadow = {"small": torch.zeros(2), "large": torch.zeros(SMALL + 1)}
    kept = dict(module.shadow)

    def change() -> None:
        for mean in module.shadow.values():
            mean.add_(1)
        module.shadow["small"] = torch.ones(2)

    evaluate(module, change)
    assert all(module.shadow[name] is mean and not mean.any() for name, mean in kept.items())


def test_parameters_that_are_replaced_come_back() -> None:
    module = Bare()
    module.layer = nn.Linear(2, 2)
    weight, layer = module.layer.weight, module.layer

    def change() -> None:
        module.layer.weight = nn.Parameter(torch.zeros(2, 2))
        module.layer = nn.Linear(2, 2)
        module.more = nn.Linear(2, 2)

    evaluate(module, change)
    assert module.layer is layer
    assert layer.weight is weight
    assert not hasattr(module, "more")


def test_batch_norm_in_train_mode_is_put_back() -> None:
    """Its operator does not say that it writes to the statistics."""
    module = Bare()
    module.norm = nn.BatchNorm1d(SMALL + 1)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    evaluate(module, lambda: module.norm.train()(torch.randn(2, SMALL + 1)))
    assert_same(dict(module.state_dict()), dict(before))


def test_compiled_functions_stay_compiled() -> None:
    """Torch gives up what it meets under an ordinary dispatch mode, for good."""
    ran = []

    def backend(graph: Any, _: Any) -> Any:
        return lambda *args: ran.append(1) or graph(*args)

    module = Bare()
    module.frozen = nn.Linear(FEATURES, WIDE).requires_grad_(False)  # there is something to watch
    compiled = torch.compile(lambda x: x.sin() + 1, backend=backend)
    evaluate(module, lambda: compiled(torch.ones(3)))
    assert len(ran) == 3


# --- what is not ours


class Waiting(threading.Thread):
    """A project's own class, of a kind that is opaque."""

    done = False


def test_things_of_the_standard_library_are_left_alone() -> None:
    module = Bare()
    module.future, module.event, module.queue, module.thread = Future(), threading.Event(), Queue(), Waiting()
    module.lock, module.condition = threading.Lock(), threading.Condition()
    module.secure, module.kept = random.SystemRandom(), {"event": threading.Event()}

    def change() -> None:
        if not module.future.done():
            module.future.set_result(3)
        module.event.set()
        module.queue.put(1)
        module.thread.done = True
        module.kept["event"].set()

    evaluate(module, change, times=1)
    assert module.future.result(timeout=0) == 3
    assert module.event.is_set()
    assert module.kept["event"].is_set()
    assert module.queue.get_nowait() == 1
    assert module.thread.done


@dataclass(slots=True)
class Slotted:
    count: int
    values: list[int]


@dataclass(frozen=True, slots=True)
class Base:
    values: list[int]


class Derived(Base):
    __slots__ = ("more",)


def test_containers_and_slots_are_put_back() -> None:
    module = Bare()
    module.slotted, module.frozen_one = Slotted(0, []), Derived([])
    module.simple, module.arguments, module.random = SimpleNamespace(n=0), Namespace(n=0, a=[]), random.Random(1)
    values, state = module.slotted.values, module.random.getstate()

    def change() -> None:
        module.slotted.count += 1
        module.slotted.values.append(1)
        module.slotted.values = [2]
        module.frozen_one.values.append(1)
        object.__setattr__(module.frozen_one, "more", 1)
        module.simple.n = module.arguments.n = 1
        module.arguments.a.append(1)
        module.random.random()

    evaluate(module, change)
    assert module.slotted == Slotted(0, [])
    assert module.slotted.values is values
    assert module.frozen_one.values == []
    assert not hasattr(module.frozen_one, "more")
    assert (module.simple.n, module.arguments.n, module.arguments.a) == (0, 0, [])
    assert module.random.getstate() == state


def test_arrays_that_nobody_writes_are_not_copied(tmp_path: Path) -> None:
    module = Bare()
    module.fixed = np.zeros(3)
    module.fixed.flags.writeable = False
    module.view = np.broadcast_to(np.zeros(1), (3,))
    np.save(tmp_path / "a.npy", np.zeros(3))
    module.read = np.load(tmp_path / "a.npy", mmap_mode="r")
    module.written = np.load(tmp_path / "a.npy", mmap_mode="r+")[1:]
    module.named = np.zeros(2, dtype=[("a", float), ("b", int)])

    def change() -> None:
        module.written[0] = 1
        module.named["a"] = 1

    evaluate(module, change)
    assert module.written[0] == 1  # it is a file
    assert not module.named["a"].any()


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "coo": lambda x: x.to_sparse(),
    "csr": lambda x: x.to_sparse_csr(),
    "csc": lambda x: x.to_sparse_csc(),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")
@pytest.mark.parametrize("make", [TPGMCallback, WiSEFTCallback])
def test_sparse_tensors_are_trained_with(layout: str, make: Any, tmp_path: Path) -> None:
    class Graph(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("adjacency", LAYOUTS[layout](torch.eye(8)))
            self.attribute, self.listed = LAYOUTS[layout](torch.eye(8)), [LAYOUTS[layout](torch.eye(8))]

        def loss(self, batch: Any) -> Tensor:
            x, y = batch
            return super().loss((self.listed[0] @ (self.attribute @ (self.adjacency @ x)), y))

    module = Graph()
    trainer_in(tmp_path, callbacks=[make()]).fit(module, Blobs())
    assert torch.equal(module.adjacency.to_dense(), torch.eye(8))


@pytest.mark.parametrize("view", [lambda z: z.conj(), lambda z: z.conj().imag], ids=["conjugate", "negative"])
@pytest.mark.parametrize("size", [8, 20_000])
def test_buffers_that_are_conjugated_when_they_are_read(
    view: Callable[[Tensor], Tensor], size: int, tmp_path: Path
) -> None:
    class Spectral(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("spectrum", view(torch.arange(size) * (1 + 2j)))

        def loss(self, batch: Any) -> Tensor:
            if not self.training:
                self.spectrum.mul_(2)
            return super().loss(batch)

    module, expected = Spectral(), view(torch.arange(size) * (1 + 2j))
    trainer_in(tmp_path, callbacks=[TPGMCallback()], limit_val_batches=0).fit(module, Blobs())
    assert torch.equal(module.spectrum, expected)


@pytest.mark.parametrize("wrap", [lambda f: f, lambda f: partial(f), lambda f: [partial(partial(f), by=1)]])
def test_objects_behind_bound_methods_are_put_back(wrap: Callable[[Any], Any], tmp_path: Path) -> None:
    class Average:
        def __init__(self) -> None:
            self.updates, self.value = 0, torch.zeros(3)

        def update(self, by: int = 1) -> None:
            self.updates += by
            self.value += by

    class Averages(Classifier):
        def __init__(self, average: Average) -> None:
            super().__init__()
            self.up = wrap(average.update)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            (self.up[0] if isinstance(self.up, list) else self.up)()
            return self.loss(batch)

    average = Average()
    trainer = trainer_in(tmp_path, callbacks=[TPGMCallback(every_n_steps=1)])
    trainer.fit(Averages(average), Blobs())
    assert average.updates == trainer.global_step
    assert torch.equal(average.value, torch.full((3,), float(trainer.global_step)))


def test_containers_that_do_more_than_hold_are_not_asked() -> None:
    class Lazy(dict[str, Any]):
        def values(self) -> Any:
            raise RuntimeError("loads from a disk")

    class Loads(list[Any]):
        def __iter__(self) -> Any:
            raise RuntimeError("loads from a disk")

    module = Bare()
    module.lazy, module.loads = Lazy(a=[1]), Loads([[1]])

    def change() -> None:
        module.lazy["a"].append(2)
        module.loads[0].append(2)

    evaluate(module, change)
    assert module.lazy["a"] == module.loads[0] == [1]


def test_should_stop_is_put_back(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path)
    with Isolation().no_trace(trainer, Bare()):
        trainer.should_stop = True
    assert trainer.should_stop is False


# --- what it costs


class Prefetcher:
    """Its thread writes to it."""

    def __init__(self) -> None:
        self.ready, self.lock = False, threading.Lock()


def test_an_object_with_a_lock_is_left_alone() -> None:
    module = Bare()
    module.prefetcher = Prefetcher()
    evaluate(module, lambda: setattr(module.prefetcher, "ready", True), times=1)
    assert module.prefetcher.ready


def drawn_from(iterator: Any) -> list[str]:
    module = Bare()
    module.stream = {"batches": iterator}
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        evaluate(module, lambda: next(iterator))
    return [str(warning.message) for warning in found if "iterator" in str(warning.message)]


@pytest.mark.parametrize(
    "make",
    [
        lambda: iter(range(9)),
        lambda: itertools.count(),
        lambda: iter(DataLoader(list(range(9)))),
        lambda: iter([0] * 9),
    ],
)
def test_an_iterator_that_the_step_advances_is_named_once(make: Any) -> None:
    (text,) = drawn_from(make())
    assert "advances the iterator in the attribute 'stream' of Bare" in text
    assert "`loss`" in text
    module = Bare()
    module.stream = make()
    evaluate(module, lambda: None)  # warnings are errors


def test_an_iterator_of_unknown_position_is_named_once() -> None:
    (text,) = drawn_from(i for i in range(9))
    assert "may advance" in text


class Node:
    def __init__(self, inner: Any = None) -> None:
        self.n, self.inner = 0, inner


class WithAttribute(dict[str, Any]):
    n = 0


class Refusing(list[int]):
    def clear(self) -> None:
        raise RuntimeError

    extend: Any = clear


def test_objects_in_objects_are_put_back() -> None:
    module = Bare()
    module.node, module.table, module.bytes = Node([{"a": Node(Node())}]), WithAttribute(), bytearray(b"ab")
    module.numbers, module.objects, module.refusing = (
        array("d", [1.0]),
        np.array([Node(), 0], dtype=object),
        Refusing([1]),
    )
    outer = module.node.inner[0]["a"]

    def change() -> None:
        for node in (module.node, outer, outer.inner, module.table, module.objects[0]):
            node.n += 1
        module.bytes[0] = 1
        module.bytes.append(1)
        module.numbers[0] = 2.0
        module.numbers.append(1.0)
        module.objects[1] = 1
        module.refusing.append(2)

    evaluate(module, change)
    nodes = [module.node, outer, outer.inner, module.table, module.objects[0]]
    assert [node.n for node in nodes] == [0] * 5
    assert (module.bytes, module.numbers) == (bytearray(b"ab"), array("d", [1.0]))
    assert module.objects[1] == 0
    assert list(module.refusing) == [1]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_deep_lists_and_large_tuples_cost_little(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Bare()
    module.deep = deep = []
    for _ in range(3_000):
        deep.append([])
        deep = deep[0]
    module.large, module.nested = (0,) * 2_000, torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    kept: list[Any] = []
    keep = Memory.keep
    monkeypatch.setattr(Memory, "keep", lambda self, value: kept.append(value) or keep(self, value))
    evaluate(module, lambda: module.deep.append(1), times=1)
    assert len(module.deep) == 1
    assert not [value for value in kept if value is module.large]


def test_large_containers_are_not_descended_into() -> None:
    module = Bare()
    module.items = [{"n": [i]} for i in range(2_000)]
    module.table, module.window = {i: [i] for i in range(2_000)}, deque(range(2_000), maxlen=2_000)
    module.nested = [[[i] for i in range(500)] for _ in range(500)]

    def change() -> None:
        module.items.append({})
        module.table["new"] = 1
        module.window.extend("abc")
        module.nested.append([])

    evaluate(module, change)
    assert len(module.items) == len(module.table) == 2_000
    assert list(module.window) == list(range(2_000))
    assert len(module.nested) == 500


def test_large_arrays_are_copied_if_they_change() -> None:
    module = Bare()
    module.still, module.moving = np.zeros(SMALL + 1), np.full(SMALL + 1, np.nan)

    def change() -> None:
        module.moving[:] = 1

    isolation = evaluate(module, change)
    assert np.isnan(module.moving).all()
    assert isolation._arrays.changes(module.still) is False
    assert isolation._arrays.changes(module.moving) is True


def test_an_attribute_that_is_costly_is_named_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_tpgm.callbacks.isolation._COSTLY", -1)
    module = Bare()
    module.replay_buffer = np.zeros(10)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        evaluate(module, lambda: None, times=6)
    texts = [str(warning.message) for warning in found]
    assert sum("replay_buffer" in text and "Bare" in text for text in texts) == 1


def test_many_attributes_that_are_costly_together_are_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = count()
    monkeypatch.setattr("lightning_tpgm.callbacks.isolation.perf_counter", lambda: next(clock) * 4e-3)
    module = Bare()
    for name in ("first", "second", "third", "fourth"):
        setattr(module, name, {"a": [name]})
    with pytest.warns(UserWarning, match=r"takes \d+ ms .* The most costly of \d+ attributes: .*\(4\.0 ms\)") as found:
        evaluate(module, lambda: None, times=6)
    assert len([warning for warning in found if "most costly" in str(warning.message)]) == 1


def test_submodules_that_come_between_evaluations_are_seen() -> None:
    module, isolation, trainer = Bare(), Isolation(), trainer_in(Path())
    module.layer = nn.Sequential(nn.Dropout(0.5))
    for added in (nn.BatchNorm1d(2), nn.Dropout(0.1)):
        with isolation.no_trace(trainer, module):
            pass
        module.layer.append(added)
        with isolation.no_trace(trainer, module):
            assert not added.training
            added.note = 1
        assert added.training
        assert not hasattr(added, "note")


def test_attributes_that_are_exchanged_between_evaluations_are_seen() -> None:
    """As many as before, of other names."""
    module, isolation, trainer = Bare(), Isolation(), trainer_in(Path())
    module.first = [1]
    for name, other in (("first", "second"), ("second", "third")):
        with isolation.no_trace(trainer, module):
            getattr(module, name).append(2)
        assert getattr(module, name) == [1]
        delattr(module, name)
        setattr(module, other, [1])


def test_short_lists_are_put_back_in_place() -> None:
    module = Bare()
    module.numbers, module.empty, module.again, module.pair, module.one = [1, 2], [], [3], ([4], 5), [1]
    module.same = numbers = module.numbers
    inner = module.pair[0]

    def change() -> None:
        module.one[0] = True  # equal, and another object
        module.numbers[0] = 7
        module.numbers.append([1])
        module.empty.append(1)
        module.again = [3]
        inner.append(6)

    again = module.again
    evaluate(module, change)
    assert module.numbers is module.same is numbers
    assert module.again is again
    assert [numbers, module.empty, again, module.pair] == [[1, 2], [], [3], ([4], 5)]
    assert type(module.one[0]) is int


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("eval_mode", [True, False])
@pytest.mark.parametrize("overridden", [True, False])
@pytest.mark.parametrize("change", ["nothing", "train", "eval", "one"])
def test_modes_of_an_evaluation(eval_mode: bool, overridden: bool, change: str) -> None:
    """Inside as asked for, afterwards as they were, to the object; parts in TorchScript, too."""

    class Own(Bare):
        def on_validation_model_eval(self) -> None:
            self.train()

    module = Own() if overridden else Bare()
    module.layers = nn.Sequential(nn.Linear(2, 2), nn.Dropout(), nn.BatchNorm1d(2).eval(), nn.Dropout().eval())
    module.scripted = torch.jit.script(nn.Sequential(nn.Dropout()))
    before = [part.training for part in module.modules()]
    assert len({*before}) == 2
    isolation, trainer = Isolation(), trainer_in(Path())
    for _ in range(3):
        with isolation.no_trace(trainer, module, eval_mode=eval_mode):
            inside = [part.training for part in module.modules()]
            expected = before if not eval_mode else [overridden] * len(before)
            assert inside == expected
            if change == "one":
                module.layers[2].train()
                module.layers[0].eval()
            elif change != "nothing":
                module.train(change == "train")
        assert [part.training for part in module.modules()] == before


def test_simple_attributes_cost_next_to_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of torch's own layers: numbers, texts, tuples and short lists of them."""
    kept: list[Any] = []
    keep = Memory.keep
    monkeypatch.setattr(Memory, "keep", lambda self, value: kept.append(value) or keep(self, value))
    module = Bare()
    module.layers = nn.Sequential(nn.Conv2d(1, 1, 1), nn.LayerNorm(2), nn.BatchNorm2d(1), nn.MaxPool2d(2), nn.GELU())
    module.mine = {"a": 1}
    evaluate(module, lambda: None, times=1)
    assert [value for value in kept if value == {"a": 1}] == [module.mine]
    assert not [value for value in kept if isinstance(value, tuple | list)]


# --- loggers and logs


@pytest.mark.parametrize("kind", [CSVLogger, TensorBoardLogger])
def test_logger_keeps_its_folders_and_writes_nothing(kind: Any, tmp_path: Path) -> None:
    logger = kind(tmp_path, name="mine", version="v1")
    trainer = trainer_in(tmp_path, logger=logger)
    expected = (trainer.log_dir, logger.log_dir, logger.save_dir, logger.root_dir, logger.name, logger.version)
    with Isolation().no_trace(trainer, Bare()):
        silent = trainer.logger
        assert silent is not logger
        assert isinstance(silent, kind)
        found = (trainer.log_dir, silent.log_dir, silent.save_dir, silent.root_dir, silent.name, silent.version)
        assert found == expected
        silent.log_metrics({"a": 1}, step=0)
        silent.log_hyperparams({"b": 1})
        silent.experiment.add_scalar("a", 1).more[0].deep(1)
        silent.experiment["a"] = 1
        with silent.experiment.run() as run:
            run.log(1)
        silent.note = 1
        silent.save()
        silent.finalize("success")
    assert trainer.logger is logger
    assert not hasattr(logger, "note")
    assert not list(tmp_path.rglob("*.*"))


class OwnLog(Classifier):
    def log(self, name: Any, value: Any, prog_bar: bool = False) -> None:
        self.names = [*getattr(self, "names", []), name]


class OwnLogDict(Classifier):
    def log_dict(self, metrics: Any) -> None:
        raise AssertionError


class TakesAll(Classifier):
    def log(self, *args: Any, **kwargs: Any) -> None:
        super().log(f"mine/{args[0]}", *args[1:], **kwargs)


class IsNoFunction(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.log: Any = logging.getLogger("a project's own")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.log.info("a step")
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    validation_step: Any = training_step


@pytest.mark.parametrize(("kind", "prefix"), [(OwnLog, ""), (OwnLogDict, ""), (TakesAll, "mine/"), (IsNoFunction, "")])
def test_own_log_of_a_module_gets_what_it_takes(kind: Any, prefix: str, tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path, callbacks=[TPGMCallback(DataLoader(Blobs().val, 8))])
    trainer.fit(kind(), Blobs())
    assert f"{prefix}tpgm/heldout_loss" in trainer.callback_metrics
