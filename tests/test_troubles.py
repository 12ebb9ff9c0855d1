"""What goes wrong silently is said, once, with its remedy; and not where nothing is wrong."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    IterableDataset,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
    random_split,
)

from lightning_tpgm import FTPCallback, L2SPCallback, SPDCallback, TPGMCallback, WiSEFTCallback
from lightning_tpgm.callbacks.overlap import look_at_examples, shared_examples
from lightning_tpgm.initialisation import never_trained
from lightning_tpgm.observing.watch import Watch
from toys import Toy, images, quiet_trainer, sgd, toy, train_loader, val_loader

PATIENCE = Watch.PATIENCE


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Watch, "PATIENCE", 20)


def warned(
    callback: Any, optimizer: Any = None, module: Toy | None = None, batches: int = 6, **options: Any
) -> list[str]:
    """What our package warns of in a fit of 42 steps, looked at every 5."""
    module = trained(optimizer) if module is None else module
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = quiet_trainer(callback, **{"max_epochs": 42 // batches, "log_every_n_steps": 5, **options})
        trainer.fit(module, train_loader(batches), val_loader())
    texts = [str(warning.message) for warning in caught]
    return [text for text in texts if text.startswith(type(callback).__name__) or "held-out examples" in text]


def trained(optimizer: Any = None) -> Toy:
    """A toy that does not look as if nobody had trained it."""
    module = toy(0, optimizer)
    with torch.no_grad():
        module.norm.weight.copy_(torch.linspace(0.9, 1.1, 12))
    return module


# --- the anchors

NOT_TRAINED = {
    "BatchNorm": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)),
    "transformer": lambda: nn.TransformerEncoderLayer(16, 2),
    "linear layers": lambda: nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 5)),
    "without bias": lambda: nn.Conv2d(8, 8, 3, bias=False),
    "half precision": lambda: nn.Linear(64, 64).to(torch.bfloat16),
    "toy": toy,
}


@pytest.mark.parametrize("make", NOT_TRAINED.values(), ids=NOT_TRAINED)
@pytest.mark.parametrize("seed", range(3))
def test_random_initialisation_is_recognised(make: Callable[[], nn.Module], seed: int) -> None:
    torch.manual_seed(seed)
    assert never_trained(make()) is not None


def after_some_training(module: nn.Module, x: Tensor) -> nn.Module:
    optimizer = torch.optim.AdamW(module.parameters(), 1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        (module(x) - 1).square().mean().backward()
        optimizer.step()
    return module


def embedding_and_head() -> nn.Module:
    """Perhaps the embedding comes from elsewhere: of its values nobody can say."""
    return nn.ModuleDict({"embedding": nn.Embedding(50, 8), "head": nn.Linear(8, 300)})


class Fancy(nn.Module):
    """A kind of layer that nobody knows."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5))
        self.linear = nn.Linear(20, 30)


MAYBE_TRAINED = {
    "trained linear layers": lambda: after_some_training(nn.Sequential(nn.Linear(20, 30)), torch.randn(8, 20)),
    "trained with norm": lambda: after_some_training(
        nn.Sequential(nn.Linear(9, 9), nn.LayerNorm(9)), torch.randn(8, 9)
    ),
    "trained without norm, a new norm in the head": lambda: nn.Sequential(
        after_some_training(nn.Linear(20, 30), torch.randn(8, 20)), nn.LayerNorm(30), nn.Linear(30, 2)
    ),
    "statistics only": lambda: nn.Sequential(nn.Linear(2, 2), filled(nn.BatchNorm1d(2))),
    "embedding": embedding_and_head,
    "unknown layer": Fancy,
    "parametrized": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(20, 30)),
    "too small to say": lambda: nn.Linear(3, 3),
    "lazy": lambda: nn.LazyLinear(3),
    "nothing": nn.ReLU,
}


def filled(norm: nn.BatchNorm1d) -> nn.BatchNorm1d:
    norm(torch.randn(8, norm.num_features))
    return norm


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
@pytest.mark.parametrize("make", MAYBE_TRAINED.values(), ids=MAYBE_TRAINED)
def test_other_modules_raise_no_alarm(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    assert never_trained(make()) is None


def test_judging_changes_nothing() -> None:
    """Spectral norm iterates whenever its weight is read in training mode."""
    module = nn.utils.parametrizations.spectral_norm(nn.Linear(20, 30))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    never_trained(module)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_random_anchors_are_said_once() -> None:
    (text,) = warned(TPGMCallback(), module=toy(), max_epochs=2)
    assert "random initialisation" in text
    assert "pass them as `pretrained`" in text
    assert warned(TPGMCallback(pretrained=toy(1)), module=toy(), max_epochs=1) == []
    assert warned(TPGMCallback(), max_epochs=1) == []


# --- held-out data

DATA = images(24, seed=1)


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter(DATA)


SHARING = {
    "the same data set": (DATA, DATA, (24, 24)),
    "a part of it": (DATA, Subset(DATA, range(5)), (5, 5)),
    "parts that overlap": (Subset(DATA, range(20)), Subset(DATA, range(18, 24)), (2, 6)),
    "parts of parts": (Subset(Subset(DATA, range(10, 20)), [0, 1]), Subset(DATA, [10, 3]), (1, 2)),
    "a split": (*random_split(DATA, [16, 8]), (0, 8)),
    "other data": (DATA, images(24, seed=1), (0, 24)),
    "a stream": (Stream(), Stream(), (0, 0)),
}


@pytest.mark.parametrize(("training", "held_out", "expected"), SHARING.values(), ids=SHARING)
def test_shared_examples(training: Any, held_out: Any, expected: tuple[int, int]) -> None:
    shuffle = not isinstance(training, IterableDataset)
    assert shared_examples([DataLoader(training, 4, shuffle=shuffle)], [DataLoader(held_out, 4)]) == expected


def test_shared_examples_by_samplers() -> None:
    """One data set, split by what is drawn from it; what a sampler of another kind draws is not known."""
    first, second = (DataLoader(DATA, 4, sampler=SubsetRandomSampler(range(a, b))) for a, b in ((0, 16), (15, 24)))
    weighted = DataLoader(DATA, 4, sampler=WeightedRandomSampler([1.0] * 24, 24))
    assert shared_examples([first], [second]) == (1, 9)
    assert shared_examples([first], [weighted]) == (0, 0)
    assert shared_examples([weighted], [first]) == (0, 16)
    assert shared_examples([first, [1, 2, 3]], [[1, 2, 3]]) == (0, 0)
    assert shared_examples([first, first], [second, second, first]) == (16, 24)
    assert shared_examples([first, second], [DataLoader(DATA, 4)]) == (24, 24)

    class Own(DataLoader[Any]):
        def __iter__(self) -> Any:
            return iter([])

    assert shared_examples([first], [Own(DATA, 4)]) == (0, 0)


def test_training_data_as_held_out_data() -> None:
    loader = train_loader()
    with pytest.warns(UserWarning, match="24 of the 24 held-out examples are training examples, too") as caught:
        quiet_trainer(TPGMCallback(loader), max_epochs=2).fit(trained(), loader, val_loader())
    assert len([w for w in caught if "held-out examples" in str(w.message)]) == 1
    module, dataset = trained(), loader.dataset
    with pytest.warns(UserWarning, match="24 of the 24"):  # by way of the validation data
        quiet_trainer(TPGMCallback()).fit(module, DataLoader(dataset, 4, shuffle=True), DataLoader(dataset, 4))


def few(caplog: pytest.LogCaptureFixture, **options: Any) -> list[str]:
    """What a fit says of few held-out data."""
    caplog.clear()
    with caplog.at_level("INFO"):
        trainer = quiet_trainer(TPGMCallback(**options), max_epochs=1)
        module = trained()
        trainer.fit(module, train_loader(), val_loader())
    return [text for text in caplog.messages if "The held-out data have few examples" in text]


def many(count: int, **options: Any) -> DataLoader[Any]:
    return DataLoader(images(count, seed=1), 4, **options)


def test_few_held_out_examples(caplog: pytest.LogCaptureFixture) -> None:
    (text,) = few(caplog, dataloader=many(99))
    assert text.startswith("The held-out data have few examples, 99.")
    assert few(caplog, dataloader=many(100)) == []
    (text,) = few(caplog, dataloader=DataLoader(Subset(DATA, range(5)), 4, shuffle=True), when="fit_end")
    assert text.startswith("The held-out data have few examples, 5.")
    (text,) = few(caplog, loss="validation_step")
    assert text.startswith("The held-out data have few examples, 10.")


def test_what_is_not_known_to_be_few_raises_no_message(caplog: pytest.LogCaptureFixture) -> None:
    """Streams, lists of batches, and what draws from training data, too: one such loader is enough."""
    weighted = many(24, sampler=WeightedRandomSampler([1.0] * 24, 24))
    of_batches = DataLoader([*many(8)], batch_size=None)
    mixed = CombinedLoader([many(24), weighted], "sequential")
    for loader in (DataLoader(Stream(), 4), [*many(8)], of_batches, weighted, mixed):
        assert few(caplog, dataloader=loader) == []
    assert len(few(caplog, dataloader=CombinedLoader([many(24), many(24)], "sequential"))) == 1
    assert few(caplog, dataloader=CombinedLoader([many(60), many(60)], "sequential")) == []
    same = many(60)
    assert len(few(caplog, dataloader=CombinedLoader([same, same], "sequential"))) == 1


def test_few_examples_that_are_trained_on_are_not_for_more_of_these(caplog: pytest.LogCaptureFixture) -> None:
    """The one message would ask for what the other warns of."""
    loader = train_loader()
    with caplog.at_level("INFO"), pytest.warns(UserWarning, match="24 of the 24 held-out examples"):
        quiet_trainer(TPGMCallback(loader), max_epochs=1).fit(trained(), loader, val_loader())
    assert not any("few examples" in text for text in caplog.messages)


def test_few_examples_of_one_process_of_several_may_be_many(caplog: pytest.LogCaptureFixture) -> None:
    """Unless they are split by torch's sampler, which knows all of them."""
    trainer: Any = SimpleNamespace(train_dataloader=None, world_size=2)
    split = DataLoader(DATA, 4, sampler=DistributedSampler(DATA, 2, 0))
    with caplog.at_level("INFO"):
        for nothing in ([many(24)], []):
            look_at_examples(trainer, nothing, may_overlap=False)
            assert caplog.messages == []
        look_at_examples(trainer, [split], may_overlap=False)
    assert len(caplog.messages) == 1


# --- the numbers

tiny = partial(torch.optim.SGD, lr=1e-12)


@pytest.mark.parametrize("make", [TPGMCallback, FTPCallback, SPDCallback, L2SPCallback, WiSEFTCallback])
def test_nothing_moves(make: Any) -> None:
    (text,) = warned(make(exclude=["backbone.1.*"]), tiny)  # its statistics move by themselves
    assert text.startswith(f"{make.__name__}: After 20 optimizer steps no constrained tensor has moved by more than")
    assert "Raise the learning rate" in text


def training_loss(pl_module: Toy, batch: Any) -> Tensor:
    """The loss of the only batch that is trained on."""
    return pl_module.loss(next(iter(train_loader(1))))


def opposite(pl_module: Toy, batch: Any) -> Tensor:
    """A held-out loss that rises wherever training goes."""
    return -training_loss(pl_module, batch)


def test_all_radii_at_their_floor() -> None:
    callback = TPGMCallback(loss=opposite, exclude=["backbone.*"])
    (text,) = warned(callback, partial(torch.optim.SGD, lr=1e-3), batches=1)
    assert "all 7 radii have been at their floor of 1e-08" in text
    assert "Lower the learning rate" in text


def test_every_constraint_binds_while_radii_grow_as_fast_as_they_can() -> None:
    callback = TPGMCallback(loss=training_loss, radius_lr=1e-6, exclude=["backbone.*", "scale"])
    (text,) = warned(callback, partial(torch.optim.SGD, lr=1e-2), batches=1)
    assert "constraints have been at their bound" in text
    assert "of 42 optimizer steps" in text
    assert "Use `radius_lr` = 'auto'" in text


def look(watch: Watch, step: int, **quantities: list[float]) -> list[str]:
    vectors = {name: torch.tensor(value) for name, value in quantities.items()}
    return list(watch.look(step, {"ratio": torch.full((2,), 0.5), **vectors}, lambda: torch.ones(2), 0.01, run=2000))


@pytest.mark.parametrize(("run", "since"), [(1, 10), (60, 30), (5000, 100), (math.inf, 100)])
def test_short_runs_are_judged_by_their_share(run: float, since: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network that stays where it is, and radii that stay at their floor."""
    monkeypatch.setattr(Watch, "PATIENCE", PATIENCE)
    radii = {"radius": torch.full((2,), 1e-8), "binds": torch.ones(2, dtype=torch.bool)}
    watch, said = Watch(), {}
    for step in range(200):
        found = watch.look(step, {"distance": torch.zeros(2), **radii}, lambda: torch.ones(2), 0.01, run)
        said |= {text.split(" optimizer steps ")[1][:9]: step for text in found}
    assert said == {"no constr": since, "all 2 rad": since}


@pytest.mark.parametrize(("run", "since"), [(1, 10), (60, 30), (5000, 2500), (math.inf, None)])
def test_a_bound_is_judged_by_its_share_of_the_run(run: float, since: int | None) -> None:
    watch, said = Watch(), []
    for step in range(5000):
        radius = torch.full((2,), 1 + 0.01 * step)
        quantities = {"radius": radius, "distance": radius, "binds": torch.ones(2, dtype=torch.bool)}
        said += [step for _ in watch.look(step, quantities, lambda: torch.ones(2), 0.01, run)]
    assert said == ([] if since is None else [since])


@pytest.mark.parametrize(("slope", "alarm"), [(0.01, True), (0.0, False)])
def test_constraints_that_bind_at_rest_are_no_trouble(slope: float, alarm: bool) -> None:
    """Where the held-out data hold a radius back, the method does what it is for."""
    watch, said = Watch(), []
    for step in range(0, 2000, 50):
        radius = [1 + slope * step] * 2
        said += look(watch, step, radius=radius, distance=radius, binds=[True, True])
    assert len(said) == alarm


def test_a_stretch_that_ends_is_no_trouble(monkeypatch: pytest.MonkeyPatch) -> None:
    """One tensor that leaves its bound, or its floor, once in a while."""
    monkeypatch.setattr(Watch, "PATIENCE", 100)
    watch = Watch()
    for step in range(0, 3000, 50):
        often = step % 400 > 0
        radius = [0.01 * step + 1] * 2
        assert look(watch, step, radius=radius, distance=radius, binds=[True, often]) == []
    for step in range(3000, 6000, 50):
        radius = [1e-8, 1e-8 if step % 100 else 1.0]
        assert look(watch, step, radius=radius, distance=[1.0, 1.0], binds=[True, False]) == []


def test_a_stretch_begins_with_the_radii() -> None:
    """Before that there are none to be at a bound."""
    watch, said = Watch(), []
    for step in range(0, 2000, 50):
        radius = [1 + 0.01 * step if step > 400 else torch.nan] * 2
        said += look(watch, step, radius=radius, distance=[1.0, 1.0], binds=[step > 400] * 2)
    assert "For 1000 of 2000 optimizer steps all 2 constraints have been at their bound" in said[0]


@pytest.mark.parametrize("never_moved", [True, False])
def test_a_tensor_without_radius_hides_no_trouble(never_moved: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bias before a BatchNorm for instance. The others are at their floor, or at a bound that cannot grow faster."""
    monkeypatch.setattr(Watch, "PATIENCE", 100)
    first = torch.nan if never_moved else 1e-8
    watch, said = Watch(), []
    for step in range(0, 300, 50):
        said += look(watch, step, radius=[first, 1e-8], distance=[0.0, 1.0], binds=[not never_moved, True])
    assert f"all {2 - never_moved} radii have been at their floor" in said[0]
    for step in range(0, 2000, 50):
        rising = 1 + 0.01 * step
        radius = [torch.nan if never_moved else rising, rising]
        said += look(watch, step, radius=radius, distance=[0.0, rising], binds=[not never_moved, True])
    assert f"all {2 - never_moved} constraints have been at their bound" in said[1]
    assert len(said) == 2


@pytest.mark.parametrize(
    "make",
    [
        TPGMCallback,
        partial(TPGMCallback, norm="l2"),
        partial(TPGMCallback, every_n_steps=5),
        partial(TPGMCallback, when="fit_end"),
        FTPCallback,
        SPDCallback,
        WiSEFTCallback,
    ],
)
def test_no_alarm_in_an_ordinary_run(make: Any) -> None:
    assert warned(make(), sgd) == []


def test_a_tensor_that_starts_at_zero_counts_as_moved() -> None:
    """It has no size to compare with: a LoRA factor, a bias."""
    sizes = torch.tensor([1.0, 0.0])
    for distance, alarms in ((1e-3, 0), (1e-9, 1)):
        quantities = {"distance": torch.tensor([0.0, distance])}
        assert len(list(Watch().look(100, quantities, lambda: sizes, growth=0.0, run=100))) == alarms


def test_training_data_without_length_are_looked_at_without_harm() -> None:
    class Endless(IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter(images(8, seed=1))

    callback = TPGMCallback()
    for steps, known in ((-1, math.inf), (3, 3)):
        trainer = quiet_trainer(callback, max_steps=steps)
        trainer.fit(toy(), DataLoader(Endless(), 4), val_loader())
        assert callback._constraint.reporter.run == known


@pytest.mark.parametrize(
    "odd",
    [nn.Parameter(torch.empty(0)), nn.Parameter(torch.ones(3).to(torch.float8_e4m3fn), requires_grad=False)],
    ids=["a split bias of which this process has nothing", "a type that cannot be compared"],
)
def test_odd_tensors_are_no_evidence(odd: nn.Parameter) -> None:
    layer = nn.ConvTranspose2d(16, 3, 2)
    layer.bias = odd
    never_trained(layer)


@pytest.mark.parametrize("method", ["tpgm", "spd", "l2sp"])
def test_sparse_gradients(method: str) -> None:
    class Sparse(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(4, 2, sparse=True)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.table(torch.zeros(len(x), dtype=torch.long))

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    callback = {"tpgm": TPGMCallback, "spd": SPDCallback, "l2sp": L2SPCallback}[method]()
    fit = partial(quiet_trainer(callback).fit, Sparse(), train_loader(), val_loader())
    if method == "l2sp":
        with pytest.raises(MisconfigurationException, match=r"'table\.weight' is sparse"):
            fit()
    else:
        fit()
        assert callback.anchor["table.weight"].shape == (4, 2)
