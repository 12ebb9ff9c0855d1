"""What users ask for: the report, the table, the pictures, and the history behind them."""

from __future__ import annotations

import inspect
import math
import sys
from copy import deepcopy
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import matplotlib
import matplotlib.pyplot as plt
import pytest
import torch
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from matplotlib.colors import LogNorm, Normalize

from lightning_tpgm import (
    DiGraPCallback,
    FTPCallback,
    L2SPCallback,
    TPGMCallback,
    WiSEFTCallback,
    constrain,
    project_checkpoint,
)
from lightning_tpgm.methods import FTP
from lightning_tpgm.observing.history import History
from lightning_tpgm.observing.names import blocks, in_words, shortened
from lightning_tpgm.observing.plotting import BLUE, ORANGE, ROWS, plot_layers, plot_steps
from lightning_tpgm.observing.reporting import PINNED, by_block
from lightning_tpgm.observing.table import print_table
from lightning_tpgm.observing.verdict import FEW, explain
from lightning_tpgm.projection import MIN_RADIUS
from properties import assert_same, distances, resolution
from toys import Toy, quiet_trainer, toy, train_loader, val_loader

matplotlib.use("Agg")


@pytest.fixture(autouse=True)
def _close_figures() -> Any:
    yield
    plt.close("all")


def fitted(callback: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    quiet_trainer(callback, **options).fit(toy(), train_loader(), val_loader())
    return callback


def fitted_with(callback: Any, *others: pl.Callback, **options: Any) -> None:
    torch.manual_seed(0)
    quiet_trainer(callback, *others, **options).fit(toy(), train_loader(), val_loader())


# --- the report


def test_report_is_plain_data() -> None:
    callback = TPGMCallback()
    assert callback.report() == []
    module = toy()
    quiet_trainer(callback).fit(module, train_loader(), val_loader())
    rows = callback.report()
    assert [row["name"] for row in rows] == [name for name, _ in module.named_parameters()]
    for row, parameter in zip(rows, module.parameters(), strict=True):
        name = row["name"]
        seen = ["wanted", "allowed", "bound", "pinned"]
        assert list(row) == ["name", "shape", "radius", "distance", "ratio", "binds", *seen]
        assert row["shape"] == tuple(parameter.shape)
        expected = (callback.radii[name], callback.distances[name])
        assert (row["radius"], row["distance"]) == pytest.approx(expected, rel=0, abs=0, nan_ok=True)
        deviation = parameter.detach().double() - callback.anchor[name].double()
        rounding = max(resolution(parameter, callback.anchor[name], "mars"))
        assert row["distance"] == pytest.approx(max(distances(deviation, "mars")), rel=1e-5, abs=rounding)
        assert row["binds"] is (row["ratio"] < 1)
        types = {type(row[key]) for key in ("radius", "distance", "ratio", *seen)}
        assert types == {float}
    assert any(row["binds"] for row in rows)  # a bias before a norm moves by rounding alone


@pytest.mark.parametrize(("make", "keys"), [(DiGraPCallback, ["distance", "omega"]), (L2SPCallback, ["distance"])])
def test_report_of_methods_without_radius(make: Any, keys: list[str]) -> None:
    assert all(list(row) == ["name", "shape", *keys] for row in fitted(make()).report())


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no:UserWarning")
def test_report_after_the_fact(tmp_path: Path) -> None:
    torch.save(toy(1).state_dict(), tmp_path / "finetuned.pt")
    callback = project_checkpoint(
        toy(), toy().state_dict(), tmp_path / "finetuned.pt", val_loader(), radius_steps=2, trainer=quiet_trainer()
    )
    rows = callback.report()
    found = {row["name"]: row["radius"] for row in rows}
    assert found == pytest.approx(callback.radii, rel=0, abs=0, nan_ok=True)  # some have the pretrained values
    between = {name: value.double() - toy().state_dict()[name].double() for name, value in toy(1).state_dict().items()}
    for row in rows:  # there is one projection: the last step is all there is
        assert row["wanted"] == pytest.approx(max(distances(between[row["name"]], "l2")), rel=1e-5)
        assert row["allowed"] == row["distance"]
        assert row["allowed"] == pytest.approx(row["ratio"] * row["wanted"], rel=1e-5)
        assert not {"bound", "pinned"} & row.keys()
    assert min(row["ratio"] for row in rows) < 0.99
    _, axes = callback.plot()
    assert {text.get_text() for text in axes.texts} == {"before", "after"}
    assert axes.figure.axes[1].get_title("left") == "kept, %"
    assert " of the distance" in callback.explain()
    assert "steps" not in callback.explain()


# --- what is counted over the steps


class Counting(pl.Callback):
    """Counts after every step what the report should have counted, from the method's own vectors."""

    def __init__(self, tpgm: Any) -> None:
        self.tpgm = tpgm
        self.seen: dict[str, list[tuple[float, float, float]]] = {}  # radius, distance before and after each projection

    def on_train_batch_end(self, *_: Any) -> None:
        radii = self.tpgm._constraint.method.radii
        vectors = radii.value.tolist(), radii.reach.tolist(), radii.distance.tolist()
        for name, *values in zip(radii.names, *vectors, strict=True):
            self.seen.setdefault(name, []).append(tuple(values))

    def check(self) -> None:
        rows = self.tpgm.report()
        assert [row["name"] for row in rows] == list(self.seen)
        for row in rows:
            steps = self.seen[row["name"]]
            expected = {
                "wanted": sum(before for _, before, _ in steps),
                "allowed": sum(after for _, _, after in steps),
                "bound": sum(radius < before for radius, before, _ in steps),
                "pinned": sum(after < 0.1 * before for _, before, after in steps),
            }
            found = {key: row[key] * len(steps) for key in expected}
            assert found == pytest.approx(expected, rel=1e-5, abs=1e-12)


def test_shares_are_those_of_all_steps() -> None:
    """Those of the last step alone would be 0 or 1."""
    callback = TPGMCallback()
    counting = Counting(callback)
    fitted_with(callback, counting, max_epochs=3)
    counting.check()
    assert any(0 < row["bound"] < 1 for row in callback.report())


def test_a_tensor_that_thaws_counts_its_own_steps() -> None:
    class Thaws(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
            pl_module.head.requires_grad_(False)

        def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
            if trainer.current_epoch == 1:
                pl_module.head.requires_grad_(True)

    class AllOfThem(Toy):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.05)

    callback = FTPCallback()
    counting = Counting(callback)
    torch.manual_seed(0)
    quiet_trainer(Thaws(), callback, counting, max_epochs=2).fit(AllOfThem(), train_loader(), val_loader())
    assert {name: len(steps) for name, steps in counting.seen.items()}["head.weight"] == 6
    counting.check()


def test_shares_of_a_schedule_that_ends_at_zero() -> None:
    """Nothing binds at the last step, which says nothing about the run."""

    class Decays(Toy):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.05)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step < 20))
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    callback = TPGMCallback()
    torch.manual_seed(0)
    quiet_trainer(callback, max_epochs=4).fit(Decays(), train_loader(), val_loader())
    rows = callback.report()
    assert all(row["ratio"] > 0.999 for row in rows)
    assert not any(row["binds"] for row in rows)
    moved = [row for row in rows if row["wanted"] > MIN_RADIUS]
    assert len(moved) == len(rows) - 1  # the normalisation takes out what the bias before it adds
    assert all(row["bound"] > 0.5 for row in moved)
    assert all(row["allowed"] < 0.9 * row["wanted"] for row in moved)
    assert "held" in callback.explain()
    assert "backbone.0.bias" not in callback.explain()


@pytest.mark.parametrize("make", [FTPCallback, lambda: TPGMCallback(val_loader())])
def test_counts_go_on_after_a_checkpoint(make: Any, tmp_path: Path) -> None:
    whole, stopped, resumed = make(), make(), make()
    loader = train_loader()
    quiet_trainer(whole, max_epochs=2).fit(toy(), loader, val_loader())
    trainer = quiet_trainer(stopped, max_epochs=1)
    trainer.fit(toy(), loader, val_loader())
    trainer.save_checkpoint(tmp_path / "stopped.ckpt")
    quiet_trainer(resumed, max_epochs=2).fit(toy(), loader, val_loader(), ckpt_path=tmp_path / "stopped.ckpt")
    assert resumed.report() == whole.report()
    assert resumed.report() != stopped.report()
    assert resumed.explain() == whole.explain()


# --- the table


def test_table_at_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    callback = fitted(TPGMCallback(summary=True))
    out = capsys.readouterr().out
    for expected in ("TPGMCallback", "backbone.0.weight", "wanted", "allowed", "ratio", "bound in steps", "tensors"):
        assert expected in out
    rows = {row["name"]: row for row in callback.report()}
    line = next(line for line in out.splitlines() if "hidden.weight" in line)
    row = rows["hidden.weight"]
    numbers = row["wanted"], row["allowed"], row["allowed"] / row["wanted"], 100 * row["bound"]
    assert [float(word) for word in line.split() if word[0].isdigit()] == pytest.approx(numbers, rel=6e-3)
    assert callback.explain().endswith(".")
    assert callback.explain() in " ".join(out.split())
    fitted(TPGMCallback())
    assert capsys.readouterr().out == ""


def test_table_of_one_projection(capsys: pytest.CaptureFixture[str]) -> None:
    fitted(TPGMCallback(summary=True, when="fit_end", norm="l2", radius_steps=2))
    out = capsys.readouterr().out
    assert all(heading in out for heading in ("before", "after", "ratio"))
    assert "bound in steps" not in out
    assert "mean distance" not in out


def test_table_of_many_tensors_is_by_block(capsys: pytest.CaptureFixture[str]) -> None:
    names = [f"layer{i}.{part}" for i in range(9) for part in ("a", "b", "c")]
    print_table("[b]title[/b]", names, {"distance": torch.ones(27)}, "[b]verdict[/b]")
    out = capsys.readouterr().out
    assert [word for word in out.split() if word.startswith("layer")] == [f"layer{i}" for i in range(9)]
    assert out.count("1.73") == 9  # the root of the sum of squares
    assert "[b]title[/b]" in out  # no markup
    assert "[b]verdict[/b]" in out
    assert f"27 tensors, total distance {27**0.5:.3g}" in " ".join(out.split())


def test_table_calls_those_pinned_that_were_nearly_always(capsys: pytest.CaptureFixture[str]) -> None:
    shares = torch.tensor([PINNED - 0.01, PINNED])
    names, ones = ["seldom", "often"], torch.ones(2)
    quantities = {"radius": ones, "distance": ones, "wanted": ones, "allowed": ones, "bound": ones, "pinned": shares}
    print_table("", names, quantities, "")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines if "%, pinned" in line] == ["often"]


def test_table_needs_rich(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_tpgm.callbacks.shared.find_spec", lambda name: None)
    with pytest.raises(MisconfigurationException, match="needs rich: pip install rich"):
        TPGMCallback(summary=True)


# --- the history


def test_history_is_bounded_and_even() -> None:
    history = History()
    for step in range(1, 1001):
        if history.due():
            history.add({"radius": torch.full((2,), float(step))})
        assert len(history.steps) < History.LIMIT
        gaps = {b - a for a, b in zip(history.steps, history.steps[1:], strict=False)}
        assert gaps <= {history.stride}
    assert history.steps[0] == 1
    assert history.stride == 8
    assert history.matrices()["radius"][:, 0].tolist() == history.steps
    assert 1000 - history.steps[-1] < history.stride


def test_history_knows_when_tensors_joined() -> None:
    history = History()
    for size in (1, 3):
        assert history.due()
        history.add({"radius": torch.ones(size)})
    expected = torch.tensor([[1, torch.nan, torch.nan], [1, 1, 1]])
    assert_same(history.matrices()["radius"], expected)


def test_history_copies() -> None:
    """A vector that is changed in place later is recorded as it was."""
    history, radius = History(), torch.ones(2)
    history.due()
    history.add({"radius": radius})
    radius.zero_()
    assert history.matrices()["radius"].tolist() == [[1, 1]]


def test_history_goes_on_after_a_checkpoint() -> None:
    def steps(history: History, count: int) -> None:
        for _ in range(count):
            if history.due(every=3):
                history.add({"radius": torch.full((2,), float(history.count))})

    whole, stopped, resumed = History(), History(), History()
    steps(whole, 1000)
    steps(stopped, 501)
    resumed.load_state_dict(stopped.state_dict())
    steps(resumed, 499)
    assert_same(resumed.state_dict(), whole.state_dict())


def test_checkpoint_without_history_loads(tmp_path: Path) -> None:
    """Those that were written before there was one."""
    callback = TPGMCallback()
    trainer = quiet_trainer(callback)
    trainer.fit(toy(), train_loader(), val_loader())
    trainer.save_checkpoint(tmp_path / "new.ckpt")
    checkpoint = torch.load(tmp_path / "new.ckpt", weights_only=True)
    state = checkpoint["callbacks"][callback.state_key]
    del state["history"], state["method"]["reach"]
    for name in ("projections", "bound", "pinned", "wanted", "allowed"):
        del state["method"][name]
    torch.save(checkpoint, tmp_path / "old.ckpt")
    resumed = TPGMCallback()
    quiet_trainer(resumed, max_epochs=2).fit(toy(), train_loader(), val_loader(), ckpt_path=tmp_path / "old.ckpt")
    assert resumed._constraint.reporter.history.steps == [1, 2, 3, 4, 5, 6]
    assert resumed._constraint.method.radii.projections.tolist() == [6] * len(resumed.radii)  # from here on
    resumed.plot("steps")


def test_history_of_a_quantity_that_came_later() -> None:
    """Checkpoints that were written before it was kept."""
    history = History()
    for step in range(200):
        if history.due():
            new = {"ratio": torch.full((2,), float(history.count))} if step > 50 else {}
            history.add({"radius": torch.full((2,), float(history.count)), **new})
    found = history.matrices()
    assert found["radius"][:, 0].tolist() == history.steps
    late = [step for step in history.steps if step > 51]
    assert found["ratio"].shape == found["radius"].shape
    assert found["ratio"][-len(late) :, 1].tolist() == late
    assert bool(found["ratio"][: -len(late)].isnan().all())


@pytest.mark.parametrize(("make", "steps"), [(TPGMCallback, range(1, 13)), (L2SPCallback, range(1, 13, 4))])
def test_steps_recorded(make: Any, steps: range) -> None:
    """All where the values are at hand; at the logging cadence where they have to be measured."""
    callback = fitted(make(), max_epochs=2, log_every_n_steps=4)
    assert callback._constraint.reporter.history.steps == list(steps)


# --- the pictures


@pytest.mark.parametrize("make", [TPGMCallback, FTPCallback, DiGraPCallback, L2SPCallback, WiSEFTCallback])
def test_plots_of_every_method(make: Any) -> None:
    callback = fitted(make())
    names = [row["name"] for row in callback.report()]
    for over in ("layers", "steps"):
        figure, axes = callback.plot(over)
        assert figure is axes.figure
        assert [label.get_text() for label in axes.get_yticklabels()] == names
        figure.canvas.draw()


def test_layers_plot_shows_the_report() -> None:
    callback = fitted(TPGMCallback())
    figure, axes = callback.plot()
    drawn = {c.get_label(): c.get_offsets().tolist() for c in axes.collections if not c.get_label().startswith("_")}
    rows = callback.report()
    for end in ("wanted", "allowed"):
        places = [pytest.approx([row[end], i], rel=1e-6) for i, row in enumerate(rows) if row["wanted"] > MIN_RADIUS]
        assert [place for place in drawn[end] if None not in place] == places  # others have not moved
    assert {text.get_text() for text in axes.texts} == {"wanted", "allowed"}
    kept, bound = (other for other in figure.axes if other is not axes)
    assert [bar.get_width() for bar in bound.patches] == pytest.approx([100 * row["bound"] for row in rows])
    marks = [" pinned" if row["pinned"] >= 0.8 else "" for row in rows]
    assert [text.get_text() for text in bound.texts] == [
        f"{100 * row['bound']:.0f}{mark}" for row, mark in zip(rows, marks, strict=True)
    ]
    moved = [row["wanted"] > 0 for row in rows]
    shares = [100 * row["allowed"] / row["wanted"] if moves else 100 for row, moves in zip(rows, moved, strict=True)]
    assert [bar.get_width() for bar in kept.patches] == pytest.approx(shares)
    assert [other.get_title("left") for other in (kept, bound)] == ["kept, %", "bound, %"]


def test_layers_plot_marks_what_is_pinned() -> None:
    ones = torch.ones(2)
    quantities = {"wanted": ones, "allowed": ones / 2, "bound": ones, "pinned": torch.tensor([0.9, 0.1])}
    figure, _ = plot_layers(["a", "b"], {"radius": ones, "distance": ones, **quantities}, "")
    bars = figure.axes[2]
    assert [text.get_text() for text in bars.texts] == ["100 pinned", "100"]
    colors = [matplotlib.colors.to_hex(bar.get_facecolor()).upper() for bar in bars.patches]
    assert colors == [ORANGE, BLUE]


def test_layers_plot_marks_what_its_scale_does_not_reach() -> None:
    """A pinned tensor was allowed 1e-8: that would take all of a logarithmic scale."""
    wanted, allowed = torch.tensor([1.0, 1.0]), torch.tensor([1e-8, 0.5])
    quantities = {"wanted": wanted, "allowed": allowed, "bound": wanted, "pinned": torch.tensor([1.0, 0.0])}
    _, axes = plot_layers(["a", "b"], {"distance": allowed, **quantities}, "")
    drawn = {c.get_label(): c.get_offsets().tolist() for c in axes.collections}
    assert [place for place in drawn["allowed"] if None not in place] == [[0.5, 1.0]]
    ((end, row),) = (place for place in drawn["allowed less than the scale shows"] if None not in place)
    assert (end, row) == (pytest.approx(1e-4), 0.0)


def test_layers_plot_marks_nothing_where_its_scale_reaches_all() -> None:
    """Neither on a linear scale nor on a logarithmic one, whose least value is there."""
    for least in (0.0, 0.01, 0.5):
        allowed, wanted = torch.tensor([least, 0.5]), torch.tensor([1.0, 1.0])
        shares = {"bound": wanted, "pinned": torch.zeros(2)}
        _, axes = plot_layers(["a", "b"], {"distance": allowed, "wanted": wanted, "allowed": allowed, **shares}, "")
        drawn = {c.get_label(): c.get_offsets().tolist() for c in axes.collections}
        assert drawn["allowed"] == [pytest.approx([least, 0.0]), [0.5, 1.0]]
        assert all(None in place for place in drawn["allowed less than the scale shows"])


def test_layers_plot_says_what_its_distances_are_means_of() -> None:
    """Of the steps, where there were some; what there was once is no mean."""
    ones = {name: torch.ones(2) for name in ("distance", "wanted", "allowed")}
    of_steps = {**ones, "bound": torch.ones(2), "pinned": torch.zeros(2)}
    for quantities, more in ((of_steps, ", mean over the steps"), (ones, ""), ({"distance": torch.ones(2)}, "")):
        _, axes = plot_layers(["a", "b"], quantities, "")
        assert axes.get_xlabel() == f"distance from the pretrained value{more}"


def test_layers_plot_says_that_nothing_has_moved() -> None:
    for quantities in (
        {"distance": torch.zeros(2)},
        {name: torch.zeros(2) for name in ("distance", "wanted", "allowed")},
    ):
        _, axes = plot_layers(["a", "b"], quantities, "")
        assert [text.get_text() for text in axes.texts] == ["no constrained tensor has moved"]
        axes.figure.canvas.draw()


def test_steps_are_whole_numbers() -> None:
    _, axes = plot_steps(["a", "b"], [7], torch.ones(1, 2), "", "distance")
    axes.figure.canvas.draw()
    shown = [label.get_text() for label in axes.get_xticklabels() if 6.5 <= label.get_position()[0] <= 7.5]
    assert shown == ["7"]


@pytest.mark.parametrize("make", [TPGMCallback, L2SPCallback])
def test_what_thaws_late_stands_where_the_model_has_it(make: Any, capsys: pytest.CaptureFixture[str]) -> None:
    class Thaws(pl.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            pl_module.backbone.requires_grad_(False)

        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            pl_module.backbone.requires_grad_(trainer.current_epoch > 0)

    callback = make(summary=True)
    module = toy()
    quiet_trainer(Thaws(), callback, max_epochs=2).fit(module, train_loader(), val_loader())
    names = [name for name, _ in module.named_parameters()]
    assert list(callback.anchor) != names
    for asked in (callback, deepcopy(callback)):
        rows = {row["name"]: row for row in asked.report()}
        assert list(rows) == names
        assert all(rows[name]["distance"] == distance for name, distance in asked._constraint.distances.items())
        for over in ("layers", "steps"):
            assert [label.get_text() for label in asked.plot(over)[1].get_yticklabels()] == names
        _, axes = asked.plot("steps")
        drawn = axes.collections[0].get_array()
        assert drawn[:, -1].tolist() == pytest.approx([max(rows[name]["distance"], drawn.min()) for name in names])
    table = capsys.readouterr().out
    assert table.index("backbone.0.weight") < table.index("head.weight")


def test_ratio_over_the_steps() -> None:
    callback = fitted(TPGMCallback(), max_epochs=2)
    _, axes = callback.plot("steps", "ratio")
    drawn = axes.collections[0].get_array()
    assert drawn.shape == (len(callback.report()), 12)
    assert drawn[:, -1].tolist() == pytest.approx([row["ratio"] for row in callback.report()])
    assert 0 < drawn.min() < 0.9  # a ratio of 0.9 and one of 0.99 have two colours
    colors = axes.collections[0].to_rgba([0.95, 0.995, 0.9995, 1.0])
    assert all(abs(one - next_one).max() > 0.05 for one, next_one in pairwise(colors))


@pytest.mark.parametrize("quantity", ["distance", "radius"])
def test_heat_map_ends_with_the_present(quantity: str) -> None:
    callback = fitted(TPGMCallback())
    _, axes = callback.plot("steps", quantity)
    drawn = axes.collections[0].get_array()
    expected = [row[quantity] for row in callback.report()]
    assert drawn.shape == (len(expected), 6)
    lowest = drawn.min()  # a zero is drawn as the lowest colour, and so is a tensor without radius
    assert drawn[:, -1].tolist() == pytest.approx([max(lowest, value) for value in expected])


def test_heat_map_adds_the_end_of_the_fit() -> None:
    """Of a method that acts there, and of one whose last step was not recorded."""
    for callback in (TPGMCallback(when="fit_end"), L2SPCallback()):
        fitted(callback, log_every_n_steps=4)
        _, axes = callback.plot("steps")
        drawn = axes.collections[0].get_array()
        distances = [row["distance"] for row in callback.report()]
        least = drawn.min()  # where a tensor is drawn that has not moved: on a logarithmic scale 0 would be blank
        assert drawn[:, -1].tolist() == pytest.approx([distance or least for distance in distances])
        assert least < min(distance for distance in distances if distance > 0)


def test_plot_into_given_axes() -> None:
    callback = fitted(TPGMCallback())
    figure, (left, right) = plt.subplots(1, 2)
    assert callback.plot(ax=left) == (figure, left)
    assert callback.plot("steps", ax=right) == (figure, right)


def resnet(*depths: int) -> list[str]:
    parts = ["conv1.weight", "bn1.weight", "bn1.bias", "conv2.weight", "bn2.weight", "bn2.bias"]
    layers = [
        f"layer{i}.{block}.{part}" for i, depth in enumerate(depths, 1) for block in range(depth) for part in parts
    ]
    return [f"model.{name}" for name in ("conv1.weight", "bn1.weight", "bn1.bias", *layers, "fc.weight", "fc.bias")]


def test_many_tensors_are_shown_by_block() -> None:
    names = resnet(3, 4, 6, 3)
    _, axes = plot_layers(names, {"distance": torch.linspace(0, 1, len(names))}, "")
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert len(labels) <= ROWS
    assert labels[:4] == ["conv1", "bn1.weight", "bn1.bias", "layer1.0"]
    assert labels[-2:] == ["fc.weight", "fc.bias"]
    few = [name for name in names if "layer4.2" in name]
    _, axes = plot_layers(few, {"distance": torch.ones(len(few))}, "")
    assert [label.get_text() for label in axes.get_yticklabels()][:2] == ["conv1.weight", "bn1.weight"]


def test_blocks_hold_each_tensor_once() -> None:
    transformer = [f"layers.{i}.{part}.weight" for i in range(80) for part in "qkvo"] + ["embed.weight", "norm.weight"]
    for names in (resnet(3, 4, 6, 3), resnet(1), transformer, [f"p{i}" for i in range(100)]):
        for most in (24, 40):
            found = blocks(names, most)
            assert sorted(index for indices in found.values() for index in indices) == list(range(len(names)))
            assert min(most, len(names)) / 4 < len(found) <= most
    assert "layers.0-3" in blocks(transformer, 24)


def test_numbers_of_a_block() -> None:
    names = [f"{block}.{part}" for block in range(ROWS) for part in "ab"]
    lengths, shares = torch.tensor([3.0, 4.0]).repeat(ROWS), torch.tensor([0.2, torch.nan]).repeat(ROWS)
    sizes, found = by_block(names, {"distance": lengths, "bound": shares}, ROWS)
    assert sizes == {str(block): 2 for block in range(ROWS)}
    assert found["distance"].tolist() == [5.0] * ROWS
    assert found["bound"].tolist() == pytest.approx([0.2] * ROWS)  # of those that had a step


def test_heat_map_of_many_tensors_is_by_block() -> None:
    names = resnet(3, 4, 6, 3)
    _, axes = plot_steps(names, [1, 2, 3], torch.rand(3, len(names)), "", "ratio")
    assert axes.collections[0].get_array().shape == (len(blocks(names, ROWS)), 3)


def test_names_are_shortened_to_what_differs() -> None:
    assert shortened(["a.b.c.weight", "a.b.d.weight"]) == ["c", "d"]
    assert shortened(["a.weight", "a.bias"]) == ["weight", "bias"]
    assert shortened(["a", "a.b"]) == ["a", "a.b"]
    assert shortened(["only.one"]) == ["only.one"]
    assert in_words(list("abcdefghi"), [letter not in "bdfh" for letter in "abcdefghi"]) == "a, c and 3 others"
    runs = [True, False, True, False, True, True, True, False, True]
    assert in_words(list("abcdefghi"), runs) == "a, c and 4 others"  # a run counts with all of its labels


def test_blocks_do_not_hold_most_of_a_deep_network() -> None:
    """At the depth that gives few blocks all encoder layers would be one."""
    of_layer = [f"encoder.layer.{i}.{part}" for i in range(24) for part in ("query", "out", "dense")]
    found = blocks([*of_layer, "embeddings.words", "embeddings.norm", "pooler.dense", "classifier"], 24)
    assert max(map(len, found.values())) == 6
    assert list(found)[:2] == ["encoder.layer.0-1", "encoder.layer.2-3"]


# --- the verdict


def verdict(steps: int = 500, is_fixed: bool = False, **shares: list[float]) -> str:
    """Of tensors of the layers a, b, c, ..."""
    count = len(shares["bound"])
    wanted = torch.tensor(shares.pop("wanted", [1.0] * count))
    quantities = {name: torch.tensor(values) for name, values in shares.items()}
    names = [f"{letter}.weight" for letter in "abcdefgh"[:count]]
    return explain(names, {"radius": wanted, "distance": wanted, "wanted": wanted, **quantities}, steps, is_fixed)


def test_verdict_says_who_was_held() -> None:
    text = verdict(allowed=[1e-3, 1e-3, 0.8, 0.99], bound=[1, 1, 0.6, 0.1], pinned=[0.8, 0.95, 0, 0])
    assert text == (
        "d moved freely: bound in 10 % of the steps. c was held back: bound in 60 % of the steps, and kept 80 % of the"
        " distance. a and b were pinned: held almost at the pretrained value in 80 to 95 % of the steps. For more"
        " accuracy in distribution, lower the learning rate, or exclude them."
    )


def test_verdict_says_no_more_than_the_numbers() -> None:
    free = verdict(allowed=[1.0, 1.0], bound=[0.0, 0.09], pinned=[0, 0])
    assert (
        free
        == "All constrained layers moved freely: bound in 0 to 9 % of the steps. So this was nearly plain fine-tuning."
    )
    less = verdict(allowed=[1.0, 1.0], bound=[0.0, 0.2], pinned=[0, 0])
    assert less == "All constrained layers moved freely: bound in 0 to 20 % of the steps."
    held = verdict(allowed=[0.9, 0.9], bound=[0.8, 0.8], pinned=[0, 0])
    assert held.endswith("and kept 90 % of the distance.")  # no advice
    tight = verdict(allowed=[0.9, 0.4], bound=[0.8, 0.9], pinned=[0, 0])
    assert "b was held tightly: bound in 90 % of the steps, and kept 40 % of the distance." in tight
    assert tight.endswith(" For more accuracy in distribution, exclude it.")  # a lower rate may lose some
    all_tight = verdict(allowed=[0.4, 0.4], bound=[0.9, 0.9], pinned=[0, 0])
    assert all_tight.endswith(" Plain fine-tuning at this learning rate would tell what that costs in distribution.")
    resting = verdict(allowed=[0.4, 0.0], bound=[0.9, 0.0], pinned=[0, 0], wanted=[1.0, 0.0])
    assert resting.endswith(" Plain fine-tuning at this learning rate would tell what that costs in distribution.")
    fixed = verdict(allowed=[0.4, 0.4], bound=[0.9, 0.9], pinned=[0, 0], is_fixed=True)
    assert fixed.endswith(" For more accuracy in distribution, raise `radius_lr` or use 'auto'.")
    seldom = verdict(allowed=[0.4], bound=[0.29], pinned=[0])
    assert seldom == "a moved freely: bound in 29 % of the steps."  # and is not also held tightly
    assert "a was held tightly" in verdict(allowed=[0.4], bound=[0.3], pinned=[0])
    all_pinned = verdict(allowed=[0, 0.0], bound=[1.0, 1.0], pinned=[1.0, 1.0])
    assert all_pinned.endswith(" lower the learning rate.")  # if all were excluded, nothing would be left
    still = verdict(allowed=[0.0], bound=[0.0], pinned=[0.0], wanted=[0.0])
    assert still == "No constrained tensor has moved yet."


def test_verdict_at_its_bounds() -> None:
    at = verdict(allowed=[0.5, 0.6], bound=[0.3, 0.9], pinned=[0.0, 0.0])
    assert at == (
        "All constrained layers were held back: bound in 30 to 90 % of the steps, and kept 50 to 60 % of the distance."
    )
    assert "a was pinned" in verdict(allowed=[0.05, 1.0], bound=[1.0, 0.1], pinned=[0.8, 0.0])
    plain = verdict(allowed=[1.0], bound=[0.1], pinned=[0.0])
    assert plain == "a moved freely: bound in 10 % of the steps."


def test_verdict_advises_nothing_after_few_steps() -> None:
    """Radii start at half of the first distance: all are tight then."""
    tight = {"allowed": [0.9, 0.4], "bound": [0.8, 0.9], "pinned": [0.0, 0]}
    assert verdict(49, **tight).endswith(" of the distance. After 49 steps this says little yet.")
    assert "exclude it" in verdict(50, **tight)


def test_verdict_knows_that_a_fixed_rate_holds_radii_back() -> None:
    text = verdict(is_fixed=True, allowed=[0.4, 0.9], bound=[0.9, 0.8], pinned=[0, 0])
    assert text.endswith("For more accuracy in distribution, raise `radius_lr` or use 'auto', or exclude it.")
    loaders = train_loader(), val_loader()
    for rate in (1e-9, "auto"):
        callback = TPGMCallback(radius_lr=rate, every_n_steps=1)  # type: ignore[arg-type]
        trainer = quiet_trainer(callback, max_epochs=-1, max_steps=FEW)
        trainer.fit(toy(), *loaders)
        assert ("raise `radius_lr`" in callback.explain()) is (rate != "auto")


def test_verdict_names_no_tensor_that_had_no_step() -> None:
    nan = torch.nan
    text = verdict(allowed=[0.0, 1.0], wanted=[0.0, 1.0], bound=[nan, 0.2], pinned=[nan, 0.0])
    assert text == "b moved freely: bound in 20 % of the steps."


def test_verdict_judges_layers_not_their_tensors() -> None:
    names = [f"layers.{i}.{part}" for i in range(2) for part in ("weight", "bias")] + ["scale"]
    vectors = {
        "wanted": [4.0, 3, 4, 3, 1],
        "allowed": [2.4, 3.2, 4, 3, 1],
        "bound": [1.0, 0.5, 0, 0, 0],
        "pinned": [0.0] * 5,
    }
    quantities = {name: torch.tensor(values) for name, values in vectors.items()}
    text = explain(names, {**quantities, "distance": quantities["allowed"]}, 500)
    assert text == (
        "layers.1 and scale moved freely: bound in 0 % of the steps. layers.0 was held back: bound in 75 % of the"
        " steps, and kept 80 % of the distance."
    )


def test_verdict_has_short_sentences() -> None:
    """One for each way of being held, and one that says what to do; at most 25 words each."""
    bound, allowed = [1.0, 1, 0.5, 0.1] * 2, [0, 0.3, 0.7, 1.0, 0.01, 0.45, 0.9, 0.99]
    for fixed in (False, True):
        text = verdict(is_fixed=fixed, allowed=allowed, bound=bound, pinned=[1.0, 0, 0, 0, 0.85, 0, 0, 0])
        sentences = text.removesuffix(".").split(". ")
        assert [sentence.split(":")[0].rpartition(" ")[2] for sentence in sentences[:4]] == [
            "freely",
            "back",
            "tightly",
            "pinned",
        ]
        assert len(sentences) == 5
        assert max(len(sentence.split()) for sentence in sentences) <= 25


@pytest.mark.parametrize("make", [L2SPCallback, DiGraPCallback, WiSEFTCallback])
def test_verdict_of_methods_without_radii(make: Any) -> None:
    callback = make()
    assert callback.explain() == "Nothing was constrained yet."
    rows = fitted(callback).report()
    layers: dict[str, list[float]] = {}
    for row in rows:
        layers.setdefault(row["name"].rpartition(".")[0] or row["name"], []).append(row["distance"])
    farthest = max(layers, key=lambda name: math.hypot(*layers[name]))
    text = callback.explain()
    assert f" {farthest} is farthest, at {math.hypot(*layers[farthest]):.3g}." in text
    assert ("%" in text) is ("omega" in rows[0])
    assert "held" not in text


def test_verdict_in_a_plain_loop() -> None:
    model = torch.nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    constraint = constrain(model, FTP(), optimizer)
    assert constraint.explain() == "No constrained tensor has moved yet."
    for _ in range(5):
        model(torch.ones(2, 3)).sum().backward()
        optimizer.step()
    assert " of the steps" in constraint.explain()
    said = constraint.explain()
    constraint.remove()
    assert constraint.explain() == said


def test_scale_is_logarithmic_where_values_span_decades() -> None:
    even, wide = torch.tensor([[1.0, 2.0]]), torch.tensor([[1e-8, 2.0]])
    for values, scale, norm in ((even, "linear", Normalize), (wide, "log", LogNorm)):
        _, axes = plot_layers(["a", "b"], {"distance": values[0]}, "")
        assert axes.get_xscale() == scale
        _, axes = plot_steps(["a", "b"], [1], values, "", "distance")
        assert type(axes.collections[0].norm) is norm


def test_nothing_to_plot_yet() -> None:
    with pytest.raises(ValueError, match="nothing to draw yet"):
        TPGMCallback().plot()


def test_bad_plot_arguments() -> None:
    callback = fitted(L2SPCallback())
    with pytest.raises(ValueError, match="`over` should be 'layers' or 'steps', found 'time'"):
        callback.plot("time")
    with pytest.raises(ValueError, match=r"`quantity` should be one of \['distance'\], found 'radius'"):
        callback.plot("steps", "radius")


def test_matplotlib_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    callback = fitted(TPGMCallback())
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for over in ("layers", "steps"):
        with pytest.raises(ModuleNotFoundError, match=r"pip install 'lightning-tpgm\[plots\]'"):
            callback.plot(over)


# --- progress


@pytest.mark.skipif(
    "_live_stack" not in inspect.getsource(RichProgressBar._init_progress),
    reason="this Lightning's own RichProgressBar does not run with rich 14.1 or newer",
)
def test_own_bar_beside_a_rich_bar(capsys: pytest.CaptureFixture[str]) -> None:
    """The updates at the fit's end show in the bar that the trainer has."""
    callback = TPGMCallback(when="fit_end", radius_steps=3)
    trainer = quiet_trainer(callback, RichProgressBar(leave=True), enable_progress_bar=True)
    trainer.fit(toy(), train_loader(), val_loader())
    assert trainer.global_step == 6
    captured = capsys.readouterr()
    assert "Learning radii" in captured.out
    assert "Learning radii" not in captured.err


def test_ratio_of_a_tensor_that_another_optimizer_steps_stays() -> None:
    """It is that of its own last projection, not of what the other optimizer's step finds inside the ball."""

    class Two(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                self.manual_backward(self.loss(batch))
                optimizer.step()

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(self.hidden.parameters(), lr=0.5), torch.optim.SGD(self.head.parameters(), lr=0.5)]

    callback = TPGMCallback(
        radius_lr=1e-4, every_n_steps=1, loss="validation_step", exclude=["backbone.*", "norm.*", "scale"]
    )
    quiet_trainer(callback).fit(Two(), train_loader(), val_loader())
    assert all(row["binds"] for row in callback.report())
