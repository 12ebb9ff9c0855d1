"""What users ask for: the report, the table, the pictures, and the history behind them."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import pytest
import torch
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from matplotlib.colors import LogNorm, Normalize
from torch import Tensor

from lightning_tpgm import DiGraPCallback, FTPCallback, L2SPCallback, TPGMCallback, WiSEFTCallback, project_checkpoint
from lightning_tpgm.observing.history import History
from lightning_tpgm.observing.plotting import SHOWN_NAMES, plot_layers, plot_steps
from lightning_tpgm.observing.reporting import print_table, rows_of
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
        assert list(row) == ["name", "shape", "radius", "distance", "ratio", "binds"]
        assert row["shape"] == tuple(parameter.shape)
        assert (row["radius"], row["distance"]) == (callback.radii[name], callback.distances[name])
        deviation = parameter.detach().double() - callback.anchor[name].double()
        rounding = max(resolution(parameter, callback.anchor[name], "mars"))
        assert row["distance"] == pytest.approx(max(distances(deviation, "mars")), rel=1e-5, abs=rounding)
        assert row["binds"] is (row["ratio"] < 1)
        types = {type(row[key]) for key in ("radius", "distance", "ratio")}
        assert types == {float}
    assert {row["binds"] for row in rows} == {True, False}


@pytest.mark.parametrize(("make", "keys"), [(DiGraPCallback, ["distance", "omega"]), (L2SPCallback, ["distance"])])
def test_report_of_methods_without_radius(make: Any, keys: list[str]) -> None:
    assert all(list(row) == ["name", "shape", *keys] for row in fitted(make()).report())


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no:UserWarning")
def test_report_after_the_fact(tmp_path: Path) -> None:
    torch.save(toy(1).state_dict(), tmp_path / "finetuned.pt")
    callback = project_checkpoint(
        toy(), toy().state_dict(), tmp_path / "finetuned.pt", val_loader(), radius_steps=2, trainer=quiet_trainer()
    )
    assert {row["name"]: row["radius"] for row in callback.report()} == callback.radii
    callback.plot()


# --- the table


def test_table_at_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    fitted(TPGMCallback(summary=True))
    out = capsys.readouterr().out
    for expected in (
        "TPGMCallback(",
        "backbone.0.weight",
        "3×1×3×3",
        "radius",
        "distance",
        "ratio",
        "binds",
        "tensors",
    ):
        assert expected in out
    fitted(TPGMCallback())
    assert capsys.readouterr().out == ""


def test_table_shows_the_two_ends(capsys: pytest.CaptureFixture[str]) -> None:
    names = {f"layer{i}": torch.zeros(2) for i in range(9)}
    print_table("[b]title[/b]", rows_of(names, {"distance": torch.arange(9.0)}), each_end=2)
    out = capsys.readouterr().out
    shown = [word for word in out.split() if word.startswith("layer")]
    assert shown == ["layer8", "layer7", "layer1", "layer0"]  # the farthest first
    assert "5 more" in out
    assert "[b]title[/b]" in out  # no markup
    assert f"9 tensors, total distance {204**0.5:.3g}" in out


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
    torch.save(checkpoint, tmp_path / "old.ckpt")
    resumed = TPGMCallback()
    quiet_trainer(resumed, max_epochs=2).fit(toy(), train_loader(), val_loader(), ckpt_path=tmp_path / "old.ckpt")
    assert resumed._constraint.reporter.history.steps == [1, 2, 3, 4, 5, 6]
    resumed.plot("steps")


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
    _, axes = callback.plot()
    drawn = {c.get_label(): c.get_offsets().tolist() for c in axes.collections if not c.get_label().startswith("_")}
    rows = list(enumerate(callback.report()))
    assert drawn["radius"] == [[row["radius"], i] for i, row in rows]
    assert drawn["distance, constraint binds"] == [[row["distance"], i] for i, row in rows if row["binds"]]
    assert drawn["distance, inside"] == [[row["distance"], i] for i, row in rows if not row["binds"]]


@pytest.mark.parametrize("quantity", ["distance", "radius"])
def test_heat_map_ends_with_the_present(quantity: str) -> None:
    callback = fitted(TPGMCallback())
    _, axes = callback.plot("steps", quantity)
    drawn = axes.collections[0].get_array()
    expected = [row[quantity] for row in callback.report()]
    assert drawn.shape == (len(expected), 6)
    lowest = drawn.min()  # a zero is drawn as the lowest colour
    assert drawn[:, -1].tolist() == pytest.approx([max(value, lowest) for value in expected])


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


def test_many_tensors_have_every_nth_name_written() -> None:
    names = [f"{'block.' * 20}{i}" for i in range(150)]
    values: Tensor = torch.linspace(0, 1, 150)
    _, axes = plot_layers(names, {"distance": values}, "")
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert SHOWN_NAMES / 2 < len(labels) <= SHOWN_NAMES
    assert labels[1] == "…" + names[4][-38:]


def test_scale_is_logarithmic_where_values_span_decades() -> None:
    even, wide = torch.tensor([[1.0, 2.0]]), torch.tensor([[1e-8, 2.0]])
    for values, scale, norm in ((even, "linear", Normalize), (wide, "symlog", LogNorm)):
        _, axes = plot_layers(["a", "b"], {"distance": values[0]}, "")
        assert axes.get_xscale() == scale
        _, axes = plot_steps(["a", "b"], [1], values, "")
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
