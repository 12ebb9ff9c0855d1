"""The held-out batches: from where they come, in which order, and that a resumed run draws the same."""

from __future__ import annotations

import gc
import itertools
import random
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from multiprocessing import active_children
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    WeightedRandomSampler,
)
from torch.utils.data.distributed import DistributedSampler

from lightning_tpgm import TPGMCallback
from lightning_tpgm.callbacks import heldout
from lightning_tpgm.callbacks.heldout import HeldOutBatches, held_out_batches, rebuild_loader, resolve_loader
from lightning_tpgm.callbacks.heldout_gradient import HeldOutGradient
from properties import assert_same
from toys import CLASSES, FEATURES, Blobs, Classifier, blobs, trainer_in

# Python 3.12 warns of every fork of a process with threads, and torch has some.
forks = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


def numbers(count: int, start: int = 0) -> list[Tensor]:
    return [torch.tensor(float(i)) for i in range(start, start + count)]


class Noisy(Dataset[Tensor]):
    """Its transform draws from all three global generators."""

    def __init__(self, count: int = 7) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        return index + torch.rand(3, dtype=torch.float64) + random.random() + float(np.random.rand())


class Streamed(IterableDataset[Tensor]):
    """Has no length, and draws at random."""

    def __iter__(self) -> Iterator[Tensor]:
        for index in range(random.randint(3, 8)):
            yield index + torch.rand(3)


class WithoutLength:
    """An iterable of batches that is no DataLoader and has no length."""

    def __init__(self, count: int = 5) -> None:
        self.count = count

    def __iter__(self) -> Iterator[Tensor]:
        return iter(numbers(self.count))


def drawn(batches: HeldOutBatches, count: int) -> list[Any]:
    return [batches.draw() for _ in range(count)]


# --- drawing ---


def test_cycles_without_end() -> None:
    batches = HeldOutBatches([DataLoader(numbers(5), batch_size=2)], seed=0)
    assert [batch.tolist() for batch, _, _ in drawn(batches, 7)] == [[0, 1], [2, 3], [4], [0, 1], [2, 3], [4], [0, 1]]


def test_draws_from_several_loaders_in_turn() -> None:
    batches = HeldOutBatches([DataLoader(numbers(3), batch_size=2), DataLoader(numbers(1, start=7))], seed=0)
    found = [(batch.tolist(), batch_idx, loader_idx) for batch, batch_idx, loader_idx in drawn(batches, 5)]
    assert found == [([0, 1], 0, 0), ([2], 1, 0), ([7], 0, 1), ([0, 1], 0, 0), ([2], 1, 0)]


@pytest.mark.parametrize("loader", [WithoutLength(5), DataLoader(Streamed(), batch_size=None), numbers(5)])
def test_loader_without_length_cycles(loader: Any) -> None:
    random.seed(0)
    indices = [batch_idx for _, batch_idx, _ in drawn(HeldOutBatches([loader], seed=0), 20)]
    starts = [i for i, batch_idx in enumerate(indices) if batch_idx == 0]
    assert len(starts) >= 3
    for begin, end in itertools.pairwise(starts):
        assert indices[begin:end] == list(range(end - begin))


class LongerThanItSays:
    """Goes on past its length: without end, or as `zip(..., strict=True)` does, with an error."""

    def __init__(self, beyond: Callable[[], Iterable[Tensor]]) -> None:
        self.beyond = beyond

    def __len__(self) -> int:
        return 2

    def __iter__(self) -> Iterator[Tensor]:
        yield from numbers(2)
        yield from self.beyond()


def fails() -> Any:
    raise ValueError


@pytest.mark.parametrize("beyond", [fails, lambda: itertools.repeat(torch.tensor(9.0))], ids=["error", "endless"])
def test_loader_is_not_asked_for_more_than_its_length(beyond: Any) -> None:
    """Lightning's loops do not, so there are such loaders."""
    found = drawn(HeldOutBatches([LongerThanItSays(beyond), numbers(1, start=7)], seed=0), 5)
    assert found == [(0, 0, 0), (1, 1, 0), (7, 0, 1), (0, 0, 0), (1, 1, 0)]


def test_combined_loader_gives_its_batches() -> None:
    """Lightning's own container of loaders yields (batch, index, loader index), which is no batch to a module."""
    three, two = WithoutLength(3), WithoutLength(2)
    in_turn = HeldOutBatches([CombinedLoader([two, three], "sequential")], seed=0)
    assert drawn(in_turn, 6) == [(0, 0, 0), (1, 1, 0), (0, 0, 1), (1, 1, 1), (2, 2, 1), (0, 0, 0)]
    together = HeldOutBatches([CombinedLoader({"a": three, "b": two}, "max_size_cycle")], seed=0)
    expected = [{"a": 0, "b": 0}, {"a": 1, "b": 1}, {"a": 2, "b": 0}, {"a": 0, "b": 0}]
    assert [batch for batch, _, _ in drawn(together, 4)] == expected


@pytest.mark.parametrize("loaders", [[], [[]], [DataLoader([])], [[], WithoutLength(0)]])
def test_empty_loader_is_an_error(loaders: list[Any]) -> None:
    with pytest.raises(MisconfigurationException, match=r"held-out loader gave no batch: it is empty.*Pass a"):
        HeldOutBatches(loaders, seed=0).draw()


def test_loader_for_one_pass_only_is_an_error() -> None:
    batches = HeldOutBatches([iter(numbers(2))], seed=0)
    drawn(batches, 2)
    with pytest.raises(MisconfigurationException, match="can be iterated only once"):
        batches.draw()


# --- resuming ---


def shuffling_loader(data: Any) -> DataLoader[Any]:
    return DataLoader(data, batch_size=2, shuffle=True)


def loader_with_its_own_generator(data: Any) -> DataLoader[Any]:
    return DataLoader(data, batch_size=2, shuffle=True, generator=torch.Generator().manual_seed(3))


def sampler_with_its_own_generator(data: Any) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(3)
    return DataLoader(data, batch_size=2, sampler=WeightedRandomSampler([0.1] * 7, 7, generator=generator))


def batch_sampler_with_its_own_generator(data: Any) -> DataLoader[Any]:
    sampler = RandomSampler(range(7), generator=torch.Generator().manual_seed(3))
    return DataLoader(data, batch_sampler=BatchSampler(sampler, 2, drop_last=True))


def distributed_loader(data: Any) -> Any:
    return rebuild_loader(shuffling_loader(data), shuffle=None, seed=5, num_replicas=2, rank=1)


def streamed_loader(data: Any) -> DataLoader[Any]:
    return DataLoader(Streamed(), batch_size=2)


LOADERS = [
    shuffling_loader,
    loader_with_its_own_generator,
    sampler_with_its_own_generator,
    batch_sampler_with_its_own_generator,
    distributed_loader,
    streamed_loader,
]


def two_loaders(make: Callable[[], Any]) -> HeldOutBatches:
    return HeldOutBatches([make(Noisy()), DataLoader(Noisy(3), shuffle=True)], seed=11)


@pytest.mark.parametrize("make", LOADERS)
def test_resumes_exactly_at_every_position(make: Callable[[], Any]) -> None:
    """Random transforms and shuffling included, and whatever the global generators did meanwhile."""
    uninterrupted = two_loaders(make)
    expected, states = [], []
    for _ in range(16):
        states.append(uninterrupted.state_dict())
        expected.append(tuple(uninterrupted.draw()))
    assert uninterrupted.passes >= 1
    for position, state in enumerate(states):
        torch.rand(position)
        resumed = two_loaders(make)
        resumed.seed = 999
        resumed.load_state_dict(state)
        assert_same([tuple(batch) for batch in drawn(resumed, 16 - position)], expected[position:])
        assert resumed.state_dict() == uninterrupted.state_dict()


@pytest.mark.parametrize("make", LOADERS)
def test_passes_differ_where_the_loader_shuffles(make: Callable[[], Any]) -> None:
    batches = HeldOutBatches([make(numbers(7))], seed=11)
    passes: list[list[float]] = []
    while len(passes) < 5:
        batch, batch_idx, _ = batches.draw()
        passes += [[]] if batch_idx == 0 else []
        passes[-1] += batch.flatten().tolist()
    assert len({tuple(values) for values in passes}) == 5


def test_generators_of_the_user_are_left_as_they_were() -> None:
    """The generator may be that of the training loader, too."""
    loader = loader_with_its_own_generator(numbers(7))
    before = loader.generator.get_state()
    drawn(HeldOutBatches([loader], seed=0), 10)
    assert torch.equal(loader.generator.get_state(), before)


@forks
def test_resumes_exactly_with_workers() -> None:
    def make() -> HeldOutBatches:
        loader = DataLoader(Noisy(4), batch_size=2, shuffle=True, num_workers=1)
        return HeldOutBatches([rebuild_loader(loader, shuffle=None, seed=5, num_replicas=1, rank=0)], seed=11)

    uninterrupted = make()
    drawn(uninterrupted, 3)
    state = uninterrupted.state_dict()
    resumed = make()
    resumed.load_state_dict(state)
    assert_same([tuple(b) for b in drawn(resumed, 2)], [tuple(b) for b in drawn(uninterrupted, 2)])


@forks
@pytest.mark.parametrize("end", ["completed", "exception"])
def test_workers_end_with_the_fit(end: str, tmp_path: Path) -> None:
    """At once: if the garbage collector has to find them, each of them delays it by seconds."""

    class Stop(pl.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            running.append(len(active_children()))
            if end == "exception":
                raise KeyError

    running: list[int] = []
    loader = DataLoader(blobs(64), batch_size=8, num_workers=1)
    trainer = trainer_in(tmp_path, callbacks=[TPGMCallback(loader), Stop()])
    gc.collect()
    gc.disable()
    try:
        with pytest.raises(KeyError) if end == "exception" else nullcontext():
            trainer.fit(Classifier(), Blobs())
        assert not active_children()
    finally:
        gc.enable()
    assert running == [1] * (1 if end == "exception" else 4)


# --- rebuilding ---


def collate(samples: list[Tensor]) -> list[float]:
    return [float(sample) for sample in samples]


def init_worker(worker_id: int) -> None:
    pass


def rebuilt(loader: Any, shuffle: bool | None = None, num_replicas: int = 1, rank: int = 0) -> Any:
    return rebuild_loader(loader, shuffle=shuffle, seed=0, num_replicas=num_replicas, rank=rank)


def test_rebuilt_loader_keeps_its_settings() -> None:
    settings: dict[str, Any] = {
        "batch_size": 3,
        "drop_last": True,
        "collate_fn": collate,
        "num_workers": 2,
        "timeout": 7,
        "worker_init_fn": init_worker,
        "prefetch_factor": 5,
        "multiprocessing_context": "spawn",
        "persistent_workers": True,
    }
    loader: DataLoader[Any] = DataLoader(numbers(8), **settings)
    new = rebuilt(loader)
    assert new is not loader
    assert new.dataset is loader.dataset
    assert new.multiprocessing_context is loader.multiprocessing_context
    for name in settings.keys() - {"multiprocessing_context"}:
        assert getattr(new, name) == settings[name], name


@pytest.mark.filterwarnings("ignore:.*pin_memory:UserWarning")  # there may be no accelerator to pin memory for
@pytest.mark.parametrize("pin_memory", [True, False])
def test_rebuilt_loader_keeps_pin_memory(pin_memory: bool) -> None:
    assert rebuilt(DataLoader(numbers(8), pin_memory=pin_memory)).pin_memory is pin_memory


@pytest.mark.parametrize("persistent", [True, False])
def test_rebuilt_loader_keeps_persistent_workers(persistent: bool) -> None:
    loader = DataLoader(numbers(8), num_workers=1, persistent_workers=persistent)
    assert rebuilt(loader).persistent_workers is persistent


def test_rebuilt_loader_without_batching() -> None:
    assert sorted(map(float, rebuilt(DataLoader(numbers(4), batch_size=None)))) == [0, 1, 2, 3]


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("asked", [True, False, None])
def test_rebuilt_loader_shuffles_if_asked_or_as_before(own: bool, asked: bool | None) -> None:
    new = rebuilt(DataLoader(numbers(50), batch_size=50, shuffle=own), shuffle=asked)
    order = next(iter(new)).tolist()
    assert (order != sorted(order)) is (own if asked is None else asked)
    assert sorted(order) == list(range(50))


def test_rebuilt_loader_keeps_the_shuffling_of_a_distributed_sampler() -> None:
    for own in (True, False):
        sampler = DistributedSampler(numbers(50), num_replicas=1, rank=0, shuffle=own)  # type: ignore[arg-type]
        order = next(iter(rebuilt(DataLoader(numbers(50), batch_size=50, sampler=sampler)))).tolist()
        assert (order != sorted(order)) is own


class Backwards(SequentialSampler):
    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self.data_source) - 1, -1, -1))


class OwnLoader(DataLoader[Any]):
    """Does more than DataLoader: building another one would lose it."""

    def __iter__(self) -> Any:
        return map(torch.neg, super().__iter__())


@pytest.mark.parametrize(
    "loader",
    [
        DataLoader(numbers(8), sampler=WeightedRandomSampler([1.0] * 8, 8)),
        DataLoader(numbers(8), sampler=[3, 1]),
        DataLoader(numbers(8), sampler=Backwards(numbers(8))),
        DataLoader(numbers(8), batch_sampler=[[3, 1], [2]]),
        DataLoader(Streamed()),
        OwnLoader(numbers(8)),
        WithoutLength(),
        numbers(3),
    ],
    ids=["sampler", "list", "subclass", "batch_sampler", "iterable", "loader", "object", "batches"],
)
def test_order_that_is_the_users_affair_is_left_alone(loader: Any) -> None:
    assert rebuilt(loader, shuffle=True, num_replicas=2, rank=1) is loader


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("count", [16, 17])
def test_two_processes_share_all_data(shuffle: bool, count: int) -> None:
    """Every item comes once a pass; an odd one out is given twice, so that both have as many."""
    loader = DataLoader(numbers(count), batch_size=4)
    orders = []
    for _ in range(2):  # both processes twice: the order is a matter of the seed
        shares = [HeldOutBatches([rebuilt(loader, shuffle, 2, rank)], seed=0) for rank in range(2)]
        per_pass = (count + 7) // 8
        passes = [[[x for b in drawn(share, per_pass) for x in b[0].tolist()] for share in shares] for _ in range(2)]
        for one, other in passes:
            assert len(one) == len(other) == (count + 1) // 2
            assert sorted(set(one) | set(other)) == list(range(count))
        assert (passes[0] != passes[1]) is shuffle
        orders.append(passes)
    assert orders[0] == orders[1]


# --- what the user passes ---


def make_loader() -> DataLoader[Any]:
    return DataLoader(numbers(4))


LOADER = make_loader()


class Data:
    held_out = staticmethod(make_loader)


class LoaderOfNothing(DataLoader[Any]):
    """A class that makes a loader when it is called without arguments."""

    def __init__(self) -> None:
        super().__init__(numbers(2))


@pytest.mark.parametrize("path", ["test_heldout:make_loader", "test_heldout.make_loader", "test_heldout:Data.held_out"])
def test_import_path_of_a_function(path: str) -> None:
    found = resolve_loader(path)
    assert isinstance(found, DataLoader)
    assert found is not LOADER


@pytest.mark.parametrize("source", ["test_heldout:LOADER", "test_heldout.LOADER", LOADER, lambda: LOADER])
def test_the_loader_itself_is_taken_as_it_is(source: Any) -> None:
    assert resolve_loader(source) is LOADER


def test_class_is_called() -> None:
    assert isinstance(resolve_loader(LoaderOfNothing), LoaderOfNothing)


@pytest.mark.parametrize("path", ["no_such_package:loader", "test_heldout:no_such_name", "test_heldout.Data.nothing"])
def test_import_path_that_leads_nowhere(path: str) -> None:
    expected = rf"import path '{path}' leads nowhere: .*look like 'my_project\.data:held_out'"
    with pytest.raises(MisconfigurationException, match=expected):
        resolve_loader(path)


def test_result_that_cannot_be_iterated() -> None:
    with pytest.raises(MisconfigurationException, match="should give an iterable of batches, found int"):
        resolve_loader(lambda: 3)  # type: ignore[arg-type,return-value]


def test_function_is_called_once_and_not_before_it_is_needed(tmp_path: Path) -> None:
    moments: list[tuple[bool, int]] = []

    def factory() -> DataLoader[Any]:
        moments.append((trainer.training, trainer.global_step))
        return Blobs().val_dataloader()

    callback = TPGMCallback(factory)
    trainer = trainer_in(tmp_path, max_epochs=3, callbacks=[callback])
    trainer.fit(Classifier(), Blobs())
    assert moments == [(True, 0)]  # in the first optimizer step


# --- the callback's own loaders ---


class Marked(Dataset[Any]):
    """Blobs that write into a list, for every item, to which data set it belongs."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log, self.dataset = name, log, blobs(16)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        self.log.append(self.name)
        return self.dataset[index]


class Several(Classifier):
    """Takes any number of validation loaders."""

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return super().validation_step(batch, batch_idx)


@pytest.fixture
def messages(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the callback said of the data it uses."""
    said: list[str] = []
    monkeypatch.setattr(heldout, "rank_zero_info", said.append)
    return said


def fit_two_epochs(tmp_path: Path, module: pl.LightningModule, *data: Any, **settings: Any) -> TPGMCallback:
    callback = TPGMCallback(every_n_steps=1)
    # validation itself would write into the lists, too
    settings = {"max_epochs": 2, "num_sanity_val_steps": 0, "check_val_every_n_epoch": 9, **settings}
    trainer_in(tmp_path, callbacks=[callback], **settings).fit(module, *data)
    return callback


def loader_of(log: list[str], name: str, **kwargs: Any) -> DataLoader[Any]:
    return DataLoader(Marked(name, log), batch_size=8, **kwargs)


@pytest.mark.parametrize("limit_val_batches", [1.0, 0])
def test_tpgm_dataloader_of_the_datamodule_comes_first(
    limit_val_batches: float, messages: list[str], tmp_path: Path
) -> None:
    log: list[str] = []

    class Data(Blobs):
        def tpgm_dataloader(self) -> DataLoader[Any]:
            return loader_of(log, "datamodule")

    class Module(Classifier):
        def tpgm_dataloader(self) -> DataLoader[Any]:
            return loader_of(log, "module")

    fit_two_epochs(tmp_path, Module(), Data(), limit_val_batches=limit_val_batches)
    assert messages == ["The radii are learned on tpgm_dataloader() of Data."]
    assert log == ["datamodule"] * 64  # 8 optimizer steps of 8 items


def test_tpgm_dataloader_of_the_module_may_give_several(messages: list[str], tmp_path: Path) -> None:
    log: list[str] = []

    class Module(Classifier):
        def tpgm_dataloader(self) -> dict[str, DataLoader[Any]]:
            return {"one": loader_of(log, "first"), "other": loader_of(log, "second")}

    fit_two_epochs(tmp_path, Module(), Blobs())
    assert messages == ["The radii are learned on tpgm_dataloader() of Module."]
    assert log == (["first"] * 16 + ["second"] * 16) * 2


@pytest.mark.parametrize("limit_val_batches", [1.0, 0])
@pytest.mark.parametrize("home", ["fit", "datamodule", "module"])
def test_validation_loaders_are_the_default(
    home: str, limit_val_batches: float, messages: list[str], tmp_path: Path
) -> None:
    """Wherever they are defined, in turn, also where validation is switched off; said once, with a warning."""
    log: list[str] = []
    loaders = [loader_of(log, "first"), loader_of(log, "second")]
    module, data = Several(), Blobs()
    train = data.train_dataloader()
    arguments: dict[str, tuple[Any, ...]] = {"fit": (train, loaders), "datamodule": (data,), "module": (train,)}
    owner = {"fit": None, "datamodule": data, "module": module}[home]
    if owner is not None:
        owner.val_dataloader = lambda: loaders  # type: ignore[method-assign]
    fit_two_epochs(tmp_path, module, *arguments[home], limit_val_batches=limit_val_batches)
    assert len(messages) == 1
    expected = r"learned on the validation data\..*optimistic.* pass `dataloader` or define tpgm_dataloader\(\)"
    assert re.search(expected, messages[0])
    assert log == (["first"] * 16 + ["second"] * 16) * 2


def test_default_loader_shuffles_and_leaves_the_validation_loader_alone(tmp_path: Path) -> None:
    class Order(Classifier):
        orders: dict[str, list[float]]

        def loss(self, batch: Any) -> Tensor:
            self.orders["train" if self.training else "eval"].extend(batch[0][:, 0].tolist())
            return super().loss(batch)

    module = Order()
    module.orders = orders = {"train": [], "eval": []}
    data = Blobs()
    in_order = data.val.tensors[0][:, 0].tolist()

    seen: list[list[float]] = []

    def own_loss(pl_module: Order, batch: Any) -> Tensor:
        seen.append(batch[0][:, 0].tolist())
        return Classifier.loss(pl_module, batch)

    trainer_in(tmp_path, max_epochs=2, callbacks=[TPGMCallback(loss=own_loss, every_n_steps=1)]).fit(module, data)
    assert orders["eval"] == in_order * 3  # a sanity check and two validations
    assert [len(batch) for batch in seen] == [8] * 8
    passes = [seen[i] + seen[i + 1] for i in range(0, 8, 2)]
    assert all(sorted(one_pass) == sorted(in_order) for one_pass in passes)
    assert len({tuple(one_pass) for one_pass in [*passes, in_order]}) == 5


def test_default_order_depends_on_the_seed_alone(tmp_path: Path) -> None:
    """And a resumed run keeps that of its start, whatever it is seeded with."""

    def first_batches(seed: int, state: dict[str, int] | None = None) -> tuple[list[Any], dict[str, int]]:
        torch.manual_seed(seed)
        trainer, module = trainer_in(tmp_path, limit_train_batches=0), Classifier()
        trainer.fit(module, Blobs(val=64))
        torch.rand(seed)
        held_out = HeldOutGradient(None, None)
        held_out.load_state_dict(state or {})
        held_out.attach(trainer, module)
        batches = held_out_batches(trainer, module, None, held_out.state_dict(), announce=False)
        return [batch.batch for batch in drawn(batches, 20)], batches.state_dict()

    one, state = first_batches(1)
    again, _ = first_batches(1)
    other, _ = first_batches(2)
    assert_same(again, one)
    assert not torch.equal(other[0][0], one[0][0])
    at_the_start = {**state, "drawn": 0, "passes": 0, "position": 0}
    assert_same(first_batches(2, at_the_start)[0], one)


@pytest.mark.parametrize("use_distributed_sampler", [True, False])
@pytest.mark.parametrize("given", [True, False], ids=["given", "default"])
def test_every_process_has_its_share(given: bool, use_distributed_sampler: bool, tmp_path: Path) -> None:
    """A loader of the user is shared out if the trainer shares out loaders; the callback's own one always."""
    module, data = Classifier(), Blobs()
    trainer = trainer_in(tmp_path, limit_train_batches=0)
    trainer.fit(module, data)
    shares = []
    for rank in range(2):
        process: Any = SimpleNamespace(
            strategy=trainer.strategy,
            distributed_sampler_kwargs={"num_replicas": 2, "rank": rank},
            _accelerator_connector=SimpleNamespace(use_distributed_sampler=use_distributed_sampler),
            val_dataloaders=data.val_dataloader(),
        )
        start = {"seed": 0, "drawn": 0, "passes": 0, "position": 0}
        batches = held_out_batches(process, module, data.val_dataloader() if given else None, start, announce=False)
        one_pass = 2 if given and not use_distributed_sampler else 1
        shares.append({row for batch in drawn(batches, one_pass) for row in map(tuple, batch.batch[0].tolist())})
    whole = set(map(tuple, data.val.tensors[0].tolist()))
    assert shares[0] | shares[1] == whole
    if given and not use_distributed_sampler:
        assert shares[0] == shares[1] == whole
    else:
        assert not shares[0] & shares[1]


class WithoutValidation(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(FEATURES, CLASSES)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.layer(batch[0]).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.parametrize("datamodule", [True, False])
def test_no_held_out_data_is_an_error(datamodule: bool, tmp_path: Path) -> None:
    train = Blobs().train_dataloader()
    data = pl.LightningDataModule.from_datasets(train.dataset) if datamodule else train
    expected = r"found no held-out data.*Pass `dataloader`, or define tpgm_dataloader\(\) or val_dataloader\(\)"
    with pytest.raises(MisconfigurationException, match=expected):
        fit_two_epochs(tmp_path, WithoutValidation(), data)


def test_no_validation_loader_in_the_list_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=r"because there is no validation loader\. Pass `dataloader`"):
        fit_two_epochs(tmp_path, Classifier(), Blobs().train_dataloader(), [])


def test_tpgm_dataloader_that_returns_nothing_is_an_error(tmp_path: Path) -> None:
    class Data(Blobs):
        def tpgm_dataloader(self) -> None:
            pass

    with pytest.raises(MisconfigurationException, match=r"tpgm_dataloader\(\) of Data.*found NoneType"):
        fit_two_epochs(tmp_path, Classifier(), Data())


def test_position_survives_in_the_checkpoint(tmp_path: Path) -> None:
    """Two epochs in one go, and one epoch, then another one from its checkpoint, in a process with another seed."""

    def run(epochs: int, seed: int, ckpt_path: Path | None = None) -> tuple[pl.Trainer, list[Any]]:
        seen: list[Any] = []

        def own_loss(pl_module: Classifier, batch: Any) -> Tensor:
            seen.append([batch[0].clone(), torch.rand(2), random.random(), float(np.random.rand())])
            return pl_module.loss(batch)

        torch.manual_seed(seed)
        callback = TPGMCallback(loss=own_loss, radius_steps=2, every_n_steps=1)
        trainer = trainer_in(tmp_path, max_epochs=epochs, callbacks=[callback])
        trainer.fit(Classifier(), Blobs(val=24), ckpt_path=ckpt_path)
        return trainer, seen

    _, expected = run(2, seed=1)
    trainer, first = run(1, seed=1)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    _, second = run(2, seed=7, ckpt_path=tmp_path / "one.ckpt")
    assert len(expected) == 16
    assert_same(first + second, expected)


def test_private_parts_of_lightning_that_are_used_exist(tmp_path: Path) -> None:
    trainer, module = trainer_in(tmp_path), Classifier()
    assert trainer._accelerator_connector.use_distributed_sampler is True
    assert trainer._logger_connector._current_fx is None
    results = trainer.fit_loop.epoch_loop._results
    assert (results.training, results.batch, results.batch_size) == (True, None, None)
    assert (trainer.fit_loop.total_batch_idx, trainer.ckpt_path) == (-1, None)

    loader = Blobs().val_dataloader()
    trainer.fit(module, Blobs().train_dataloader(), loader)
    source = trainer.fit_loop.epoch_loop.val_loop._data_source
    assert source.is_defined()
    assert source.dataloader() is loader
    assert trainer.fit_loop.total_batch_idx == 3
    assert trainer.distributed_sampler_kwargs is None
    batch = next(iter(loader))
    assert module._on_before_batch_transfer(batch, dataloader_idx=0) is batch

    trainer.fit(WithoutValidation(), Blobs().train_dataloader())
    assert not trainer.fit_loop.epoch_loop.val_loop._data_source.is_defined()
