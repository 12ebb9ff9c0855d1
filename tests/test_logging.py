"""What users see in their loggers: names, cadence, x axis, and what the values are."""

from __future__ import annotations

import csv
import math
import re
from pathlib import Path
from typing import Any

import lightning
import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_tpgm import DiGraPCallback, FTPCallback, L2SPCallback, SPDCallback, TPGMCallback, WiSEFTCallback
from lightning_tpgm.callbacks.framework import logging_step, logs_are_due
from toys import quiet_trainer, toy, train_loader, val_loader

SUMMARY = ["binding", "bound", "distance", "heldout_loss", "mean_ratio", "min_ratio", "pinned"]
NAMES = [name for name, _ in toy().named_parameters()]
NEVER_MOVED = "backbone.0.bias"  # the BatchNorm behind it takes its gradient away, so it has no radius


def fit(tmp_path: Path, *callbacks: pl.Callback, **options: Any) -> list[dict[str, float]]:
    """Two epochs of six steps; the rows of the CSV file, without its empty cells and epochs."""
    options = {"max_epochs": 2, "log_every_n_steps": 4, **options}
    trainer = quiet_trainer(*callbacks, logger=CSVLogger(tmp_path, version=""), **options)
    trainer.fit(toy(), train_loader(), val_loader())
    with (tmp_path / "lightning_logs" / "metrics.csv").open() as file:
        rows = [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]
    return [{name: value for name, value in row.items() if name != "epoch"} for row in rows]


def columns(rows: list[dict[str, float]]) -> list[str]:
    return sorted({name for row in rows for name in row} - {"step", "val_loss"})


class Watching(pl.Callback):
    """Notes the callback's own numbers after every step, by the loggers' x axis."""

    def __init__(self, tpgm: Any) -> None:
        self.tpgm, self.seen = tpgm, {}

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.seen[logging_step(trainer)] = self.tpgm.report()


def test_summary_by_default(tmp_path: Path) -> None:
    callback = TPGMCallback()
    watching = Watching(callback)
    rows = fit(tmp_path, callback, watching)
    assert columns(rows) == [f"tpgm/{name}" for name in SUMMARY]
    rows = [row for row in rows if "tpgm/distance" in row]
    assert [row["step"] for row in rows] == [3, 7, 11, 12]  # the trainer's cadence, and after the last step
    for row in rows:
        report = watching.seen[min(row["step"], 11)]
        ratios = torch.tensor([tensor["ratio"] for tensor in report])
        found = [row[f"tpgm/{name}"] for name in ("binding", "distance", "mean_ratio", "min_ratio")]
        binding = sum(tensor["binds"] for tensor in report) / len(report)
        distance = sum(tensor["distance"] ** 2 for tensor in report) ** 0.5
        assert found == pytest.approx([binding, distance, float(ratios.mean()), float(ratios.min())], rel=1e-5)
        assert row["tpgm/bound"] == pytest.approx(sum(tensor["bound"] for tensor in report) / len(report), rel=1e-5)
        pinned = sum(tensor["pinned"] >= 0.8 for tensor in report) / len(report)
        assert row["tpgm/pinned"] == pytest.approx(pinned, rel=1e-5)
    assert 0 < rows[0]["tpgm/binding"] <= 1


def test_values_of_each_tensor_on_request(tmp_path: Path) -> None:
    callback = TPGMCallback(log="all")
    watching = Watching(callback)
    rows = fit(tmp_path, callback, watching)
    for quantity in ("radius", "distance", "ratio", "bound"):
        found = [row for row in rows if f"tpgm_{quantity}/scale" in row]
        assert [row["step"] for row in found] == [3, 7, 11, 12]
        for row in found:
            expected = {tensor["name"]: tensor[quantity] for tensor in watching.seen[min(row["step"], 11)]}
            assert list(expected) == NAMES
            named = {name: row[key] for name in NAMES if (key := f"tpgm_{quantity}/{name}") in row}
            assert named == {name: value for name, value in expected.items() if not math.isnan(value)}
            assert {*NAMES} - {*named} <= {NEVER_MOVED}


def test_none(tmp_path: Path) -> None:
    assert columns(fit(tmp_path, TPGMCallback(log="none"))) == []


@pytest.mark.parametrize(
    ("make", "summary", "each"),
    [
        (
            FTPCallback,
            ["ftp/binding", "ftp/bound", "ftp/distance", "ftp/mean_ratio", "ftp/min_ratio", "ftp/pinned"],
            ["ftp_allowed", "ftp_bound", "ftp_distance", "ftp_radius", "ftp_ratio", "ftp_wanted"],
        ),
        (DiGraPCallback, ["digrap/distance", "digrap/mean_omega"], ["digrap_distance", "digrap_omega"]),
        (SPDCallback, ["spd/distance"], ["spd_distance"]),
        (L2SPCallback, ["l2sp/distance"], ["l2sp_distance"]),
        (WiSEFTCallback, ["wise_ft/distance"], ["wise_ft_distance"]),
    ],
)
def test_every_method_has_names_of_its_own(make: Any, summary: list[str], each: list[str], tmp_path: Path) -> None:
    exclude = [name for name in NAMES if name != "scale"]
    exclude += ["*.running_*"] if make is WiSEFTCallback else []
    rows = fit(tmp_path, make(exclude=exclude, log="all"))
    assert columns(rows) == sorted([*summary, *(f"{group}/scale" for group in each)])


def test_distance_of_methods_without_radius(tmp_path: Path) -> None:
    """The Frobenius norm of what is really there; that of WiSE-FT halves when it interpolates."""
    callback, module, start = WiSEFTCallback(alpha=0.5, exclude=["backbone.*"]), toy(), toy()
    logger = CSVLogger(tmp_path, version="")
    options = {"log_every_n_steps": 6, "logger": logger}
    quiet_trainer(callback, **options).fit(module, train_loader(), val_loader())
    pairs = zip(module.named_parameters(), start.parameters(), strict=True)
    squares = [
        float((a - b).detach().double().square().sum()) for (name, a), b in pairs if not name.startswith("backbone")
    ]
    with (tmp_path / "lightning_logs" / "metrics.csv").open() as file:
        found = [float(row["wise_ft/distance"]) for row in csv.DictReader(file) if row["wise_ft/distance"]]
    assert found == pytest.approx([2 * sum(squares) ** 0.5, sum(squares) ** 0.5], rel=1e-5)
    assert sum(row["distance"] ** 2 for row in callback.report()) == pytest.approx(sum(squares), rel=1e-5)


def test_two_of_a_kind_do_not_collide(tmp_path: Path) -> None:
    """The second of the trainer's list has a number; what they write is their own."""
    first = TPGMCallback(exclude=["head.*", "scale"], log="all")
    second = TPGMCallback(exclude=["backbone.*", "norm.*", "hidden.*"], log="all")
    rows = fit(tmp_path, first, SPDCallback(), second)
    assert {name for name in columns(rows) if name.startswith("tpgm_2/")} == {f"tpgm_2/{name}" for name in SUMMARY}
    last: dict[str, float] = {}
    for row in rows:
        last |= row
    for key, callback in (("tpgm", first), ("tpgm_2", second)):
        assert {n: last[f"{key}_radius/{n}"] for n in callback.radii} == callback.radii
        assert last[f"{key}/distance"] == pytest.approx(sum(d**2 for d in callback.distances.values()) ** 0.5)
    assert "tpgm_radius/scale" not in last


def test_at_fit_end_the_end_is_logged(tmp_path: Path) -> None:
    """While the fit is plain fine-tuning, its distance is all there is to see."""
    callback = TPGMCallback(when="fit_end", radius_steps=3, norm="l2")
    rows = [row for row in fit(tmp_path, callback) if "tpgm/distance" in row]
    assert [sorted(row.keys() - {"step"}) for row in rows[:-1]] == [["tpgm/distance"]] * 3
    of_one_projection = [name for name in SUMMARY if name not in ("bound", "pinned")]
    assert rows[-1].keys() == {"step", *(f"tpgm/{name}" for name in of_one_projection)}
    assert rows[-1]["tpgm/distance"] < rows[-2]["tpgm/distance"]


def test_accumulation_logs_once_a_step(tmp_path: Path) -> None:
    """At the batch that steps, as Lightning does, and at the same place on the x axis."""
    rows = fit(tmp_path, TPGMCallback(log="all"), accumulate_grad_batches=3, log_every_n_steps=1)
    assert [row["step"] for row in rows if "tpgm/distance" in row] == [0, 1, 2, 3, 4]
    assert [row["step"] for row in rows if "tpgm_radius/scale" in row] == [0, 1, 2, 3, 4]


def test_tensorboard(tmp_path: Path) -> None:
    callback = TPGMCallback(log="all")
    logger = TensorBoardLogger(tmp_path)
    trainer = quiet_trainer(callback, logger=logger, log_every_n_steps=2)
    trainer.fit(toy(), train_loader(), val_loader())
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    tags = {tag for tag in events.Tags()["scalars"] if tag.startswith("tpgm")}
    quantities = ("radius", "distance", "ratio", "bound", "wanted", "allowed")
    each = {f"tpgm_{quantity}/{name}" for quantity in quantities for name in NAMES}
    assert tags | {f"tpgm_radius/{NEVER_MOVED}"} == each | {f"tpgm/{name}" for name in SUMMARY}
    for tag in tags:
        end = [] if tag == "tpgm/heldout_loss" else [6]  # it was logged with its update
        if NEVER_MOVED not in tag:
            assert [event.step for event in events.Scalars(tag)] == [1, 3, 5, *end]
    others = {name: radius for name, radius in callback.radii.items() if name != NEVER_MOVED}
    last = {name: events.Scalars(f"tpgm_radius/{name}")[-1].value for name in others}
    assert last == pytest.approx(others, rel=1e-6)


def test_several_loggers_all_get_everything(tmp_path: Path) -> None:
    class Kept(DummyLogger):
        def __init__(self) -> None:
            super().__init__()
            self.names: set[str] = set()

        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            assert all(type(value) is float for name, value in metrics.items() if name != "epoch")
            assert step is not None
            self.names |= metrics.keys()

    loggers = [Kept(), Kept()]
    trainer = quiet_trainer(TPGMCallback(log="all"), logger=loggers, log_every_n_steps=2)
    trainer.fit(toy(), train_loader(), val_loader())
    for logger in loggers:
        assert {"tpgm/distance", "tpgm/heldout_loss", "tpgm_radius/scale"} <= logger.names


class Bar(pl.Callback):
    """What the progress bar has of ours, before every batch."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.shown: list[dict[str, float]] = []

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        ours = {name: value for name, value in trainer.progress_bar_metrics.items() if name.startswith(self.kind)}
        self.shown.append(ours)


def test_progress_bar_has_one_short_entry(tmp_path: Path) -> None:
    """At every step, however seldom the loggers are written to."""
    callback, bar = TPGMCallback(), Bar("tpgm")
    options = {"logger": CSVLogger(tmp_path), "log_every_n_steps": 50, "enable_progress_bar": True}
    quiet_trainer(callback, bar, **options).fit(toy(), train_loader(), val_loader())
    assert [list(shown) for shown in bar.shown[1:]] == [["tpgm"]] * 5
    ratios = callback._constraint.reporter.history.matrices()["ratio"].mean(dim=1).tolist()
    assert [shown["tpgm"] for shown in bar.shown[1:]] == pytest.approx(ratios[:5], rel=1e-6)
    assert len({*ratios}) > 1


def test_without_a_progress_bar_nothing_is_computed_for_it() -> None:
    bar = Bar("tpgm")
    quiet_trainer(TPGMCallback(), bar).fit(toy(), train_loader(), val_loader())
    assert bar.shown == [{}] * 6


def test_nothing_in_the_progress_bar_without_logs() -> None:
    bar = Bar("tpgm")
    trainer = quiet_trainer(TPGMCallback(log="none"), bar, enable_progress_bar=True)
    trainer.fit(toy(), train_loader(), val_loader())
    assert bar.shown == [{}] * 6
    assert not [name for name in trainer.callback_metrics if name.startswith("tpgm")]


BROKEN = pytest.mark.skipif(
    lightning.__version__.startswith("2.4."), reason="the bar of Lightning 2.4 itself raises an IndexError with rich 15"
)


@pytest.mark.parametrize("make", [TQDMProgressBar, pytest.param(RichProgressBar, marks=BROKEN)])
def test_progress_bar_fits_eighty_columns(
    make: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("TTY_INTERACTIVE", "1")
    trainer = quiet_trainer(TPGMCallback(), make(), enable_progress_bar=True)
    trainer.fit(toy(), train_loader(), val_loader())
    out = "".join(capfd.readouterr())
    lines = [line for line in re.split(r"[\r\n]", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out)) if "tpgm" in line]
    assert lines
    assert all(len(line) <= 80 for line in lines)
    assert re.search(r"tpgm(=|: )0\.\d\d", lines[-1])
    assert "tpgm/" not in out


def test_values_can_be_monitored(tmp_path: Path) -> None:
    """Early stopping and checkpoints find them among the callback metrics."""
    trainer = quiet_trainer(TPGMCallback(), log_every_n_steps=1)
    trainer.fit(toy(), train_loader(), val_loader())
    assert {f"tpgm/{name}" for name in SUMMARY} <= trainer.callback_metrics.keys()


def test_bad_log() -> None:
    with pytest.raises(MisconfigurationException, match=r"`log` should be one of .*'summary'.*, found 'everything'"):
        TPGMCallback(log="everything")  # type: ignore[arg-type]


def test_private_parts_of_lightning_agree_with_what_it_does(tmp_path: Path) -> None:
    """`logs_are_due` and `logging_step` say, at a batch's end, when and where Lightning itself is about to log."""

    class Notes(pl.Callback):
        due: list[int]

        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
            pl_module.log("users", 1.0)
            if logs_are_due(trainer):
                self.due = [*getattr(self, "due", []), logging_step(trainer)]

    notes = Notes()
    rows = fit(tmp_path, notes, log_every_n_steps=2, accumulate_grad_batches=2)
    assert [int(row["step"]) for row in rows if "users" in row] == notes.due
    assert len(notes.due) == 3
