"""The pretrained weights: read from anywhere, matched by name and never by position, captured at the right moment."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import BaseFinetuning
from torch import Tensor, nn

from lightning_tpgm import TPGMCallback
from lightning_tpgm.anchors import capture
from lightning_tpgm.pretrained import match_pretrained, read_pretrained
from properties import assert_same
from toys import Toy, quiet_trainer, toy, train_loader, val_loader

NAMES = [
    "backbone.0.weight",
    "backbone.0.bias",
    "backbone.1.weight",
    "backbone.1.bias",
    "norm.weight",
    "norm.bias",
    "hidden.weight",
    "hidden.bias",
    "head.weight",
    "head.bias",
]  # and "scale", which named_parameters() lists first


def weights(module: nn.Module) -> dict[str, Tensor]:
    """A copy of all parameters by name."""
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def anchors(callback: TPGMCallback) -> dict[str, Tensor]:
    """The anchors that a checkpoint would hold now."""
    return callback.state_dict()["anchor"]


def fit(module: pl.LightningModule, *callbacks: pl.Callback, **options: Any) -> None:
    quiet_trainer(*callbacks, **options).fit(module, train_loader(), val_loader())


# --- reading


def lightning_checkpoint(module: Toy, path: Path) -> Path:
    trainer = quiet_trainer(max_steps=0)
    trainer.fit(module, train_loader(), val_loader())
    trainer.save_checkpoint(path / "pretrained.ckpt")
    return path / "pretrained.ckpt"


def plain_file(module: nn.Module, path: Path) -> Path:
    torch.save(module.state_dict(), path / "pretrained.pt")
    return path / "pretrained.pt"


def legacy_file(module: nn.Module, path: Path) -> Path:
    torch.save(module.state_dict(), path / "pretrained.pt", _use_new_zipfile_serialization=False)
    return path / "pretrained.pt"


def safetensors_file(module: nn.Module, path: Path) -> str:
    save_file = pytest.importorskip("safetensors.torch").save_file
    save_file(module.state_dict(), path / "pretrained.safetensors")
    return str(path / "pretrained.safetensors")


SOURCES = {
    "Lightning checkpoint": lightning_checkpoint,
    "plain file": plain_file,
    "file of torch before 1.6": legacy_file,
    "safetensors": safetensors_file,
    "mapping": lambda module, path: module.state_dict(),
    "checkpoint in memory": lambda module, path: {"epoch": 3, "state_dict": module.state_dict()},
    "module": lambda module, path: module,
}


@pytest.mark.parametrize("source", SOURCES)
def test_pretrained_from(source: str, tmp_path: Path) -> None:
    """All kinds of sources give the same tensors, and the callback takes them for anchors."""
    pretrained = toy(seed=1)
    expected = weights(pretrained)
    given = SOURCES[source](pretrained, tmp_path)

    read = read_pretrained(given)
    assert_same({name: read[name] for name in expected}, expected)
    assert not any(tensor.requires_grad for tensor in read.values())

    callback = TPGMCallback(pretrained=given)
    fit(toy(seed=2), callback, max_steps=2)
    assert_same(anchors(callback), expected)


def test_compiled_names_are_cleaned() -> None:
    read = read_pretrained({"model._orig_mod.0.weight": torch.zeros(2), "other": 1, 3: torch.zeros(1)})
    assert_same(read, {"model.0.weight": torch.zeros(2)})


def test_module_with_tied_parameters_has_all_their_names() -> None:
    module = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
    module["b"].weight = module["a"].weight
    assert list(read_pretrained(module)) == ["a.weight", "b.weight"]


# --- matching


def matched(pretrained: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """The anchors and what was reported."""
    reports: list[str] = []
    return match_pretrained(pretrained, parameters, reports.append), reports


def tensors(*names: str, prefix: str = "") -> dict[str, Tensor]:
    """A tensor for each name; all have one shape and different values."""
    return {prefix + name: torch.full((2,), float(i)) for i, name in enumerate(names)}


def test_names_match_as_they_are() -> None:
    given = tensors(*NAMES)
    assert matched(given, tensors(*NAMES)) == (given, [])


def test_matched_by_name_not_by_position() -> None:
    """All shapes are equal and the order is another: only names can tell the tensors apart."""
    given = tensors(*NAMES)
    shuffled = {name: given[name] for name in sorted(NAMES, key=lambda name: name[::-1])}
    assert list(shuffled) != NAMES
    for prefix in ("", "model."):
        parameters = {prefix + name: torch.empty(2) for name in NAMES}
        found, _ = matched(shuffled, parameters)
        assert list(found) == list(parameters)
        assert all(found[prefix + name] is given[name] for name in NAMES)


@pytest.mark.parametrize("prefix", ["model.", "backbone.", "module.", "net.encoder.", "anything_at_all."])
def test_prefix_is_resolved_and_reported(prefix: str) -> None:
    plain, prefixed = tensors("conv.weight", "conv.bias", "fc.weight"), ("conv.weight", "conv.bias", "fc.weight")
    found, reports = matched(plain, tensors(*prefixed, prefix=prefix))
    assert {name: found[prefix + name] for name in plain} == plain
    assert reports == [f"`pretrained` fits with prefix {prefix!r} put before its names."]

    given = tensors(*prefixed, prefix=prefix)
    found, reports = matched(given, plain)
    assert {prefix + name: tensor for name, tensor in found.items()} == given
    assert reports == [f"`pretrained` fits with prefix {prefix!r} taken from its names."]


def test_compiled_prefix_needs_no_report() -> None:
    """`_orig_mod.` is no prefix like the others: it is taken out of both names before they are compared."""
    given = read_pretrained(tensors("conv.weight", "fc.weight", prefix="_orig_mod."))
    assert matched(given, tensors("conv.weight", "fc.weight"))[1] == []


def test_prefix_next_to_a_new_head() -> None:
    """A backbone's weights under a prefix; the head is new, and one name fits by chance, in another shape."""
    given = tensors("conv.weight", "fc.weight")
    parameters = tensors("backbone.conv.weight", "fc.bias") | {"fc.weight": torch.zeros(3)}
    found, reports = matched(given, parameters)
    assert list(found) == ["backbone.conv.weight"]
    assert reports == [
        "`pretrained` fits with prefix 'backbone.' put before its names.",
        "Not constrained, because `pretrained` lacks them: fc.bias, fc.weight.",
    ]


def test_a_name_that_fits_by_chance_does_not_hide_the_prefix() -> None:
    given = tensors("scale", "conv.weight", "fc.weight")
    found, reports = matched(given, tensors("scale", *(f"backbone.{name}" for name in given)))
    assert found == {f"backbone.{name}": tensor for name, tensor in given.items()}
    assert reports == [
        "`pretrained` fits with prefix 'backbone.' put before its names.",
        "Not constrained, because `pretrained` lacks them: scale.",
    ]


def test_names_as_they_are_come_before_an_equally_good_prefix() -> None:
    given = tensors("w")
    assert matched(given, tensors("w", "copy.w")) == (
        given,
        ["Not constrained, because `pretrained` lacks them: copy.w."],
    )


def test_prefix_that_includes_another_is_not_ambiguous() -> None:
    """Numbered layers match under several prefixes; one of them explains all that the others do, and more."""
    given = tensors("0.weight", "1.weight", "1.0.weight")
    found, _ = matched(given, tensors("net.0.weight", "net.1.weight", "net.1.0.weight"))
    assert found == {f"net.{name}": tensor for name, tensor in given.items()}


@pytest.mark.parametrize(
    ("pretrained", "parameters", "ways"),
    [
        (
            tensors("w", "b"),
            tensors("student.w", "student.b", "teacher.w", "teacher.b"),
            "prefix 'student.' put before its names; prefix 'teacher.' put before its names",
        ),
        (
            tensors("student.w", "teacher.w"),
            tensors("w"),
            "prefix 'student.' taken from its names; prefix 'teacher.' taken from its names",
        ),
        (
            tensors("a", "b", "c"),
            tensors("left.a", "left.b", "right.c"),
            "prefix 'left.' put before its names; prefix 'right.' put before its names",
        ),
        (
            tensors("a", "b", "c"),
            tensors("c", "left.a", "left.b"),
            "its names as they are; prefix 'left.' put before its names",
        ),
    ],
)
def test_ambiguous_prefixes_are_an_error(pretrained: dict, parameters: dict, ways: str) -> None:
    with pytest.raises(ValueError, match="`pretrained` fits the module in several ways") as error:
        matched(pretrained, parameters)
    assert f"in several ways: {ways}. Pass a mapping with the module's own parameter names." in str(error.value)


def test_other_shapes_are_not_constrained_and_reported() -> None:
    given = {"body": torch.zeros(2, 3), "head.weight": torch.zeros(10, 3), "head.bias": torch.zeros(10)}
    parameters = {"body": torch.ones(2, 3), "head.weight": torch.ones(4, 3), "head.bias": torch.ones(4)}
    found, reports = matched(given, parameters)
    assert list(found) == ["body"]
    assert reports == [
        "Not constrained, because `pretrained` has them in another shape: head.weight (4, 3) (pretrained (10, 3)),"
        " head.bias (4,) (pretrained (10,))."
    ]


def test_shapes_are_compared_whole() -> None:
    """No broadcasting, no equal number of elements: (2, 3), (3, 2), (6,) and (1, 2, 3) are different shapes."""
    for shape in [(3, 2), (6,), (1, 2, 3), (1, 3), ()]:
        found, _ = matched({"w": torch.zeros(shape), "v": torch.zeros(1)}, {"w": torch.zeros(2, 3), "v": torch.ones(1)})
        assert list(found) == ["v"]


def test_missing_parameters_are_not_constrained_and_reported() -> None:
    found, reports = matched(tensors("a"), tensors("a", "head.weight", "head.bias"))
    assert list(found) == ["a"]
    assert reports == ["Not constrained, because `pretrained` lacks them: head.weight, head.bias."]


def test_nothing_matches_is_an_error_that_shows_both_sides() -> None:
    given, parameters = tensors("x.1", "x.2", "x.3", "x.4", "x.5"), {"body.w": torch.zeros(3), "body.b": torch.zeros(3)}
    message = (
        r"matches no parameter by name and shape\. It holds 'x\.1', 'x\.2', 'x\.3' and 2 more\. The parameters to"
        r" constrain are 'body\.w', 'body\.b'\. Pass the weights of this module"
    )
    with pytest.raises(ValueError, match=message):
        matched(given, parameters)
    with pytest.raises(ValueError, match="matches no parameter by name and shape"):
        matched(tensors("body.w", "body.b"), parameters)  # the names fit, no shape does


# --- the callback: what is constrained, and what it says


def test_what_pretrained_lacks_is_trained_freely_and_reported(caplog: pytest.LogCaptureFixture) -> None:
    pretrained = {f"net.{name}": tensor for name, tensor in weights(toy(seed=1)).items() if "head" not in name}
    pretrained["net.hidden.bias"] = torch.zeros(7)
    module = toy()
    before = weights(module)
    callback = TPGMCallback(pretrained=pretrained)
    with caplog.at_level(logging.INFO):
        fit(module, callback)

    free = {"head.weight", "head.bias", "hidden.bias"}
    assert set(callback.radii) == set(callback.distances) == set(before) - free
    assert "TPGMCallback: `pretrained` fits with prefix 'net.' taken from its names." in caplog.text
    assert "in another shape: hidden.bias (5,) (pretrained (7,))." in caplog.text
    assert "Not constrained, because `pretrained` lacks them: head.weight, head.bias." in caplog.text

    assert not torch.equal(module.head.weight, before["head.weight"])


def test_radii_follow_the_module_whatever_the_order_of_the_file(tmp_path: Path) -> None:
    """Two runs that differ only in the order of the pretrained names are the same run."""
    pretrained = weights(toy(seed=1))
    runs = []
    for order in (list(pretrained), list(reversed(pretrained))):
        module, callback = toy(), TPGMCallback(pretrained={name: pretrained[name] for name in order})
        fit(module, callback)
        assert list(callback.radii) == [name for name, _ in module.named_parameters()]
        runs.append((weights(module), callback.radii, callback.distances))
    assert_same(*runs)


# --- the moment of capture


class LoadsIn(Toy):
    """Loads its pretrained weights in one of Lightning's hooks, as people do."""

    def __init__(self, hook: str, source: dict[str, Tensor]) -> None:
        super().__init__()
        self.hook, self.source = hook, source

    def load(self, hook: str) -> None:
        if hook == self.hook:
            self.load_state_dict(self.source)

    def setup(self, stage: str) -> None:
        self.load("setup")

    def configure_model(self) -> None:
        self.load("configure_model")

    def on_fit_start(self) -> None:
        self.load("on_fit_start")


class LoadsCallback(pl.Callback):
    """Loads the weights in the last hook before training that a callback can act in."""

    def __init__(self, source: dict[str, Tensor]) -> None:
        self.source = source

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        pl_module.load_state_dict(self.source)


@pytest.mark.parametrize("hook", ["setup", "configure_model", "on_fit_start", "a callback's on_fit_start"])
def test_anchor_is_captured_after_the_weights_are_loaded(hook: str) -> None:
    source = toy(seed=1).state_dict()
    callback = TPGMCallback()
    fit(LoadsIn(hook, source), callback, LoadsCallback(source) if hook.startswith("a callback") else pl.Callback())
    assert_same(anchors(callback), {name: source[name] for name in anchors(callback)})
    assert len(anchors(callback)) == 11


class Creates(pl.LightningModule):
    """Creates its layers in configure_model."""

    def configure_model(self) -> None:
        if not hasattr(self, "layer"):
            self.layer = toy(seed=1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.mse_loss(self.layer(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_parameters_created_in_configure_model() -> None:
    callback = TPGMCallback(val_loader(), exclude=["layer.head.*"])
    quiet_trainer(callback).fit(Creates(), train_loader())
    expected = {f"layer.{name}": value for name, value in weights(toy(seed=1)).items() if "head" not in name}
    assert_same(anchors(callback), expected)


class Unfreeze(BaseFinetuning):
    """Trains everything but the hidden layer at first, that layer from the second epoch on."""

    def freeze_before_training(self, pl_module: pl.LightningModule) -> None:
        self.freeze(pl_module.hidden)

    def finetune_function(self, pl_module: pl.LightningModule, epoch: int, optimizer: torch.optim.Optimizer) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.hidden, optimizer)


@pytest.mark.parametrize("given", [True, False])
def test_parameters_unfrozen_later_join_with_the_anchor_of_the_start(given: bool) -> None:
    module = toy()
    start = weights(toy(seed=1) if given else module)
    callback = TPGMCallback(pretrained=dict(start) if given else None)
    fit(module, callback, Unfreeze(), max_epochs=1)
    assert set(start) - set(callback.radii) == {"hidden.weight", "hidden.bias"}

    module, callback = toy(), TPGMCallback(pretrained=dict(start) if given else None)
    fit(module, callback, Unfreeze(), max_epochs=2)
    assert set(callback.radii) == set(start)
    assert_same(anchors(callback), {name: start[name] for name in anchors(callback)})
    assert not torch.equal(module.hidden.weight, toy().hidden.weight)


# --- copies


class SpoilSource(pl.Callback):
    """Overwrites the tensors that the user passed, in place, during the first epoch."""

    def __init__(self, source: Mapping[str, Tensor]) -> None:
        self.source = source

    def on_train_batch_end(self, *_: Any) -> None:
        with torch.no_grad():
            for tensor in self.source.values():
                tensor.fill_(99.0)


@pytest.mark.parametrize("kind", ["mapping", "module"])
def test_later_changes_of_the_source_do_not_reach_the_anchor(kind: str) -> None:
    """Not even those of parameters that are unfrozen, and so constrained, after the change."""
    source = toy(seed=1)
    expected = weights(source)
    pretrained: Any = source.state_dict() if kind == "mapping" else source
    callback = TPGMCallback(pretrained=pretrained)
    fit(toy(), callback, Unfreeze(), SpoilSource(dict(source.named_parameters())), max_epochs=2)
    assert source.scale == 99.0
    assert_same(anchors(callback), {name: expected[name] for name in anchors(callback)})
    assert set(anchors(callback)) == set(expected)


def test_training_moves_no_anchor() -> None:
    module = toy()
    start = weights(module)
    callback = TPGMCallback()
    fit(module, callback)
    assert_same(anchors(callback), start)
    assert not torch.equal(module.hidden.weight, start["hidden.weight"])


# --- dtype and layout


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("source_dtype", [torch.float64, torch.float32, torch.float16])
def test_anchor_has_the_dtype_of_its_parameter(dtype: torch.dtype, source_dtype: torch.dtype) -> None:
    parameter, value = nn.Parameter(torch.zeros(2, 3, dtype=dtype)), torch.rand(2, 3).to(source_dtype)
    anchor = capture(value, parameter)
    assert anchor.dtype == dtype
    assert torch.equal(anchor, value.to(dtype))
    assert not anchor.requires_grad
    assert not isinstance(anchor, nn.Parameter)


def test_anchor_has_the_memory_layout_of_its_parameter() -> None:
    parameter = nn.Parameter(torch.rand(2, 3, 4, 4).to(memory_format=torch.channels_last))
    anchor = capture(torch.rand(2, 3, 4, 4), parameter)
    assert anchor.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("precision", "dtype"), [("64-true", torch.float64), ("bf16-true", torch.bfloat16)])
def test_anchors_in_the_checkpoint_keep_their_dtype(precision: str, dtype: torch.dtype) -> None:
    callback = TPGMCallback(pretrained=weights(toy(seed=1)))
    fit(toy(), callback, precision=precision)
    assert {anchor.dtype for anchor in anchors(callback).values()} == {dtype}
    assert_same(anchors(callback), {name: value.to(dtype) for name, value in weights(toy(seed=1)).items()})
