"""Checkpoints that name the file of the anchors instead of holding them."""

from __future__ import annotations

import gc
import pickle
import re
import sys
from contextlib import nullcontext
from copy import deepcopy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

import lightning_tpgm
from lightning_tpgm import FTPCallback, SPDCallback, TPGMCallback, WiSEFTCallback, constrain, references
from lightning_tpgm.callbacks import method
from lightning_tpgm.methods import FTP
from lightning_tpgm.observing.history import History
from lightning_tpgm.pretrained import read_pretrained
from lightning_tpgm.references import fingerprint
from properties import assert_same
from test_resume import EPOCHS, by_save_checkpoint, resumable
from toys import Toy, quiet_trainer, toy, train_loader, val_loader

METHODS = {"TPGM": TPGMCallback, "FTP": FTPCallback, "WiSE-FT": WiSEFTCallback}
PAIR = (TPGMCallback, FTPCallback)


def pretrained_file(folder: Path) -> Path:
    """Lightning's kind of checkpoint, with a prefix on all names."""
    state = {f"net.{name}": value for name, value in toy(5).state_dict().items()}
    torch.save({"state_dict": state}, folder / "pretrained.ckpt")
    return folder / "pretrained.ckpt"


def run(folder: Path, callback: Any, *others: Any, resume: Path | None = None, **options: Any) -> dict[str, Any]:
    """What a run ends with."""
    torch.manual_seed(7)
    module = resumable(0)
    trainer = quiet_trainer(callback, *others, **{"max_epochs": EPOCHS, **options})
    trainer.fit(module, ckpt_path=resume)
    trainer.save_checkpoint(folder / "last.ckpt")
    saved = torch.load(folder / "last.ckpt", weights_only=True)
    return {"weights": saved["state_dict"], "callback": saved["callbacks"][callback.state_key]}


def file_of(folder: Path, kind: str) -> Path:
    """Pretrained weights, those of `toy(5)`; a link as in a Hugging Face cache, to a file without suffix."""
    if kind == "torch":
        return pretrained_file(folder)
    file = folder / "pretrained.safetensors"
    pytest.importorskip("safetensors.torch").save_file(toy(5).state_dict(), file)
    if kind == "link":
        (folder / "blobs").mkdir()
        file.symlink_to(file.rename(folder / "blobs" / "0123"))
    return file


def first_run(folder: Path, make: Any, kind: str = "torch") -> tuple[Path, Path]:
    """The file of the anchors, and a checkpoint that names it."""
    file = file_of(folder, kind)
    return file, by_save_checkpoint(lambda: make(pretrained=file, save_anchor=False), folder)


def state_in(checkpoint: Path) -> dict[str, Any]:
    (state,) = torch.load(checkpoint, weights_only=True)["callbacks"].values()
    return state


@pytest.mark.parametrize("make", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("moves", [False, True])
@pytest.mark.parametrize("kind", ["torch", "link"])
def test_exact_resume(make: Any, moves: bool, kind: str, tmp_path: Path) -> None:
    file, checkpoint = first_run(tmp_path, make, kind)
    expected = run(tmp_path, make(pretrained=file))
    state = state_in(checkpoint)
    assert state["anchor"]
    assert all(isinstance(value, str) for value in state["anchor"].values())
    place = file.rename(tmp_path / f"elsewhere{file.suffix}") if moves else file
    found = run(tmp_path, make(pretrained=place, save_anchor=False), resume=checkpoint)
    assert found["callback"].pop("file")["path"] == str(place)
    found["callback"]["anchor"] = expected["callback"]["anchor"]  # only their names are there
    if make is WiSEFTCallback:  # its anchors were in the file meanwhile: no distances were seen
        assert found["callback"].pop("history")["values"] != expected["callback"].pop("history")["values"]
    assert_same(found, expected)


def test_a_link_may_lead_elsewhere_later(tmp_path: Path) -> None:
    """Checkpoints name what it led to."""
    link = tmp_path / "latest.ckpt"
    link.symlink_to(pretrained_file(tmp_path))
    checkpoint = by_save_checkpoint(lambda: TPGMCallback(pretrained=link, save_anchor=False), tmp_path)
    link.unlink()
    torch.save(toy(6).state_dict(), link)
    run(tmp_path, TPGMCallback(), resume=checkpoint)


def test_resuming_needs_no_argument_where_the_file_is_in_place(tmp_path: Path) -> None:
    """And checkpoints hold the anchors again, unless `save_anchor` says otherwise."""
    file, checkpoint = first_run(tmp_path, TPGMCallback)
    assert_same(run(tmp_path, TPGMCallback(), resume=checkpoint), run(tmp_path, TPGMCallback(pretrained=file)))


@pytest.mark.parametrize("copied", [deepcopy, lambda callback: pickle.loads(pickle.dumps(callback))])
def test_a_copy_holds_the_anchors_and_its_checkpoints_name_them(copied: Any, tmp_path: Path) -> None:
    file = pretrained_file(tmp_path)
    callback = TPGMCallback(pretrained=file, save_anchor=False)
    run(tmp_path, callback)
    file.unlink()
    copy = copied(callback)
    assert copy.anchor
    assert_same(copy.anchor, callback.anchor)
    assert_same(copy.state_dict(), callback.state_dict())


def test_a_copy_before_a_resumed_fit_reads_the_file(tmp_path: Path) -> None:
    file, checkpoint = first_run(tmp_path, TPGMCallback)
    callback = TPGMCallback()
    callback.load_state_dict(state_in(checkpoint))
    assert_same(deepcopy(callback).anchor, {name: toy(5).state_dict()[name] for name in deepcopy(callback).anchor})
    file.unlink()
    with pytest.raises(ValueError, match="there is no such file"):
        deepcopy(callback)


def change(file: Path) -> None:
    content = torch.load(file, weights_only=True)
    next(iter(content["state_dict"].values())).view(-1)[0] += 1e-3
    torch.save(content, file)


def lose(file: Path) -> None:
    content = torch.load(file, weights_only=True)
    content["state_dict"].popitem()
    torch.save(content, file)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1000])


IS_IN = r"^The anchors are in '.*pretrained\.ckpt' \(`save_anchor` = False\), and "
FIRST = r"\. Pass the file that the first run started from as `pretrained`\.$"
OTHER = r"^'.*other\.ckpt' holds other tensors than the anchors of this run, which came from '.*pretrained\.ckpt'\."
UNREADABLE = "^`pretrained` file '.*' cannot be read with weights_only=True"


@pytest.mark.parametrize(
    ("spoil", "passed", "message"),
    [
        (Path.unlink, None, IS_IN + r"there is no such file\. Pass the file's new place as `pretrained`\.$"),
        (Path.unlink, "pretrained.ckpt", r"there is no such file\..* If it has moved, pass its new place\."),
        (change, None, IS_IN + "that file has changed since" + FIRST),
        (change, "pretrained.ckpt", IS_IN + "that file has changed since" + FIRST),
        (change, "other.ckpt", OTHER + FIRST[2:]),
        (lose, None, IS_IN + r"that file has changed since\. It lacks '.*'" + FIRST),
        (lose, "pretrained.ckpt", IS_IN + r"that file has changed since\. It lacks '.*'" + FIRST),
        (lose, "other.ckpt", OTHER + " It lacks '.*'" + FIRST),
        (cut, None, IS_IN + "that file cannot be read" + FIRST),
        (cut, "pretrained.ckpt", UNREADABLE),
        (cut, "other.ckpt", UNREADABLE),
    ],
)
def test_clear_failure_of_another_file(spoil: Any, passed: str | None, message: str, tmp_path: Path) -> None:
    """No `pretrained`, the same one as in the first run, and another file, whose content is spoilt."""
    file, checkpoint = first_run(tmp_path, TPGMCallback)
    spoil(file.rename(tmp_path / passed) if passed else file)
    pretrained = {} if passed is None else {"pretrained": tmp_path / passed, "save_anchor": False}
    with pytest.raises(MisconfigurationException, match=message) as raised:
        run(tmp_path, TPGMCallback(**pretrained), resume=checkpoint)
    if spoil is cut and passed is None:
        assert "weights_only" in str(raised.value.__cause__.__cause__)  # what torch said is not lost


@pytest.mark.parametrize("as_mapping", [False, True])
def test_clear_failure_of_other_tensors_that_are_no_file(as_mapping: bool, tmp_path: Path) -> None:
    _, checkpoint = first_run(tmp_path, TPGMCallback)
    given = nn.ModuleDict({"net": toy(6)})  # the names of the file
    message = r"^`pretrained` holds other tensors than the anchors of this run, which came from '.*pretrained\.ckpt'"
    with pytest.raises(MisconfigurationException, match=message + FIRST):
        run(tmp_path, TPGMCallback(pretrained=given.state_dict() if as_mapping else given), resume=checkpoint)


@pytest.mark.parametrize("as_mapping", [False, True])
def test_the_same_tensors_need_no_file(as_mapping: bool, tmp_path: Path) -> None:
    file, checkpoint = first_run(tmp_path, TPGMCallback)
    file.unlink()
    given = nn.ModuleDict({"net": toy(5)})  # the names of the file
    callback = TPGMCallback(pretrained=given.state_dict() if as_mapping else given)
    run(tmp_path, callback, resume=checkpoint)
    assert_same(callback.anchor, {name: toy(5).state_dict()[name] for name in callback.anchor})


def test_a_relative_path_is_stored_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretrained_file(tmp_path)
    monkeypatch.chdir(tmp_path)
    found = run(tmp_path, TPGMCallback(pretrained="pretrained.ckpt", save_anchor=False))
    assert found["callback"]["file"]["path"] == str(tmp_path / "pretrained.ckpt")


@pytest.mark.parametrize("save_anchor", [True, False])
def test_a_plain_loop_finds_a_file_that_has_moved(save_anchor: bool, tmp_path: Path) -> None:
    file, module = pretrained_file(tmp_path), toy(0)
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    state = constrain(module, FTP(), optimizer, pretrained=file, save_anchor=False).state_dict()
    place = file.rename(tmp_path / "elsewhere.ckpt")
    constraint = constrain(module, FTP(), optimizer, pretrained=place, save_anchor=save_anchor)
    constraint.load_state_dict(state)
    assert constraint.anchor
    assert_same(constraint.anchor, {name: toy(5).state_dict()[name] for name in constraint.anchor})
    assert save_anchor or constraint.state_dict()["file"]["path"] == str(place)


def test_the_checkpoints_after_one_that_holds_its_anchors_do_so_too(tmp_path: Path) -> None:
    file = pretrained_file(tmp_path)
    checkpoint = by_save_checkpoint(lambda: TPGMCallback(pretrained=file), tmp_path)
    with pytest.warns(UserWarning, match="`save_anchor` = False has no effect. The checkpoint holds") as warned:
        found = run(tmp_path, TPGMCallback(pretrained=file, save_anchor=False), resume=checkpoint)
    assert len([warning for warning in warned if "save_anchor" in str(warning.message)]) == 1
    assert_same(found, run(tmp_path, TPGMCallback(pretrained=file)))


def test_layers_that_wait_at_the_values_of_the_file_notice_that_it_has_changed(tmp_path: Path) -> None:
    """The state holds no value that is read: they thaw around what the model holds."""
    file, module = pretrained_file(tmp_path), toy(5).requires_grad_(False)
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    constraint = constrain(module, FTP(), optimizer, pretrained=file, save_anchor=False)
    state = constraint.state_dict()
    assert set(state["waiting"].values()) == {None}
    constraint.load_state_dict(state)
    change(file)
    with pytest.raises(ValueError, match="has changed since"):
        constraint.load_state_dict(state)


def test_two_callbacks_share_a_file(tmp_path: Path) -> None:
    """Each acts on its part of the model, and resumes exactly."""
    file = pretrained_file(tmp_path)

    def two(**options: Any) -> list[Any]:
        parts = (["head.*"], ["[!h]*", "hidden.*"])
        return [make(pretrained=file, exclude=part, **options) for make, part in zip(PAIR, parts, strict=True)]

    def both(**options: Any) -> list[Any]:
        found = run(tmp_path, *two(save_anchor=False), **options)
        states = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]
        return [found["weights"], states]

    expected = both()
    assert all(state["anchor"] for state in expected[1].values())
    both(max_epochs=1)
    found = both(resume=(tmp_path / "last.ckpt").rename(tmp_path / "first.ckpt"))
    assert_same(found[0], expected[0])
    assert_same(found[1], expected[1])
    whole = run(tmp_path, *two())
    assert_same(found[0], whole["weights"])


@pytest.mark.parametrize("pretrained", [None, {}, nn.Linear(2, 2)])
def test_clear_failure_without_a_file(pretrained: Any) -> None:
    with pytest.raises(MisconfigurationException, match="`save_anchor` = False needs the path of a file"):
        TPGMCallback(pretrained=pretrained, save_anchor=False)


def test_frozen_layers_wait_by_reference(tmp_path: Path) -> None:
    """A layer that is frozen when the checkpoint is written thaws after it, around the file's weights."""
    file = pretrained_file(tmp_path)

    class Freeze(pl.Callback):
        def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
            pl_module.head.requires_grad_(False)

        def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
            pl_module.head.requires_grad_(trainer.current_epoch > 0)

    run(tmp_path, TPGMCallback(pretrained=file, save_anchor=False), Freeze(), max_epochs=1)
    checkpoint = (tmp_path / "last.ckpt").rename(tmp_path / "first.ckpt")
    assert isinstance(state_in(checkpoint)["waiting"]["head.weight"], str)
    callback = TPGMCallback()
    run(tmp_path, callback, Freeze(), resume=checkpoint)
    assert torch.equal(callback.anchor["head.weight"], toy(5).head.weight)


def test_a_checkpoint_is_hardly_larger_than_a_plain_one(tmp_path: Path) -> None:
    """In a plain loop, before the first step: FTP remembers the last weights after it."""
    model = nn.Sequential(nn.Linear(500, 500), nn.Linear(500, 500))
    torch.save(model.state_dict(), tmp_path / "w.pt")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sizes = []
    for save_anchor in (True, False):
        constraint = constrain(model, FTP(), optimizer, pretrained=tmp_path / "w.pt", save_anchor=save_anchor)
        torch.save(constraint.state_dict(), tmp_path / "state.pt")
        sizes.append((tmp_path / "state.pt").stat().st_size)
        state = torch.load(tmp_path / "state.pt", weights_only=True)
        constraint.load_state_dict(state)
        assert_same(constraint.anchor, dict(model.state_dict()))
        constraint.remove()
    assert sizes[0] > 2_000_000
    assert sizes[1] < 20_000


def test_the_fingerprint_is_of_all_there_is() -> None:
    tensors = {"a": torch.zeros(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}
    sources = {"x": "a", "y": "b"}
    same = fingerprint({"b": tensors["b"].clone(), "a": tensors["a"].t().contiguous().t(), "c": torch.ones(1)}, sources)
    assert fingerprint(tensors, sources) == same
    others = [
        {**tensors, "a": tensors["a"].view(3, 2)},
        {**tensors, "a": tensors["a"].int()},
        {**tensors, "b": tensors["b"] * 2},
    ]
    assert len({same, *(fingerprint(other, sources) for other in others)}) == 4
    assert fingerprint(tensors, {"x": "a"}) != same


AT_END = {
    "TPGM": lambda **options: TPGMCallback(when="fit_end", radius_steps=2, **options),
    "WiSE-FT": lambda **options: WiSEFTCallback(0.3, **options),
    "sweep": lambda **options: WiSEFTCallback("sweep", monitor="val_loss", mode="min", **options),
}


class Held(pl.Callback):
    """The bytes of all tensors that there are in mid-run."""

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == 4:
            gc.collect()
            storages = {
                tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
                for tensor in gc.get_objects()
                if type(tensor) in (torch.Tensor, nn.Parameter) and tensor.device.type == "cpu"
            }
            self.bytes = sum(storages.values())


class Wide(Toy):
    """One large layer beside the toy's."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(1000, 1000)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


@pytest.mark.parametrize("make", AT_END.values(), ids=AT_END)
@pytest.mark.parametrize("frozen", [False, True])
def test_what_acts_at_the_end_needs_no_memory_until_then(make: Any, frozen: bool, tmp_path: Path) -> None:
    """Nor do layers that are frozen at other values than the file's."""
    torch.save(Wide().state_dict(), tmp_path / "pretrained.pt")
    found = []
    for callback in ([], [make(pretrained=tmp_path / "pretrained.pt", save_anchor=False)]):
        held = Held()
        module = Wide()
        module.wide.requires_grad_(not frozen)
        quiet_trainer(*callback, held).fit(module, train_loader(), val_loader())
        found.append(held.bytes)
    plain, added = found[0], found[1] - found[0]
    assert plain > 4_000_000
    assert added < 0.01 * plain


class Trained(Wide):
    """All of it is stepped."""

    def loss(self, batch: Any) -> torch.Tensor:
        return super().loss(batch) + self.wide.weight.square().sum()


def documented_sizes() -> dict[str, list[int]]:
    text = (Path(__file__).parents[1] / "docs" / "several.md").read_text().partition("| checkpoint |")[2]
    rows = re.findall(r"^\| ([^|]+) \| (\d) \| (?:(\d) )?\|$", text, re.MULTILINE)
    return {name: [int(size) for size in sizes if size] for names, *sizes in rows for name in names.split(", ")}


@pytest.mark.parametrize("name", documented_sizes())
def test_checkpoints_are_as_large_as_documented(name: str, tmp_path: Path) -> None:
    file, found = tmp_path / "pretrained.pt", []
    torch.save(Trained().state_dict(), file)
    make: Any = None if name == "plain fine-tuning" else getattr(lightning_tpgm, f"{name.replace('-', '')}Callback")
    for save_anchor in [True] if make is None else [True, False]:
        callbacks = [] if make is None else [make(pretrained=file, save_anchor=save_anchor)]
        trainer = quiet_trainer(*callbacks)
        trainer.fit(Trained(), train_loader(), val_loader())
        trainer.save_checkpoint(tmp_path / "end.ckpt")
        found.append((tmp_path / "end.ckpt").stat().st_size / file.stat().st_size)
    assert found == pytest.approx(documented_sizes()[name], abs=0.02)


class Large(Toy):
    """A matrix of 100 MB, stepped by its first element, and as many small tensors as a ResNet-50 has."""

    def __init__(self) -> None:
        super().__init__()
        self.large = nn.Parameter(torch.ones(5000, 5000))
        self.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(75))

    def loss(self, batch: Any) -> torch.Tensor:
        small = sum(parameter.square().sum() for parameter in self.layers.parameters())
        return super().loss(batch) + self.large[0, 0].square() + small

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def fill(history: History) -> None:
    """As full as it can be, as after hundreds of steps; a number takes its bytes whatever it is."""
    last = {name: records[-1] for name, records in history.values.items()}
    while len(history.steps) < history.LIMIT - 1:
        history.due()
        history.add(last)


@pytest.mark.parametrize(("make", "documented"), [(TPGMCallback, 2200), (SPDCallback, 600)])
def test_with_a_file_a_checkpoint_of_100_mb_grows_by_its_history_alone(
    make: Any, documented: int, tmp_path: Path
) -> None:
    torch.save(Large().state_dict(), tmp_path / "pretrained.pt")
    callback, sizes = make(pretrained=tmp_path / "pretrained.pt", save_anchor=False), []
    for callbacks in ([], [callback]):
        trainer = quiet_trainer(
            *callbacks, max_steps=1, limit_val_batches=1, num_sanity_val_steps=0, log_every_n_steps=1
        )
        trainer.fit(Large(), train_loader(), val_loader())
        if callbacks:
            fill(callback._constraint.reporter.history)
        trainer.save_checkpoint(tmp_path / "end.ckpt")
        sizes.append((tmp_path / "end.ckpt").stat().st_size)
    tensors, grown = len(callback.anchor), sizes[1] - sizes[0]
    assert sizes[0] > 100_000_000
    assert tensors > 150
    assert 0.8 * documented * tensors < grown < documented * tensors
    assert grown < 1_000_000


@pytest.mark.parametrize("make", AT_END.values(), ids=AT_END)
@pytest.mark.parametrize("second", [False, True], ids=["one fit", "two fits"])
@pytest.mark.parametrize("kind", ["torch", "link"])
def test_anchors_that_stay_in_the_file_give_the_same_end(make: Any, second: bool, kind: str, tmp_path: Path) -> None:
    file, found = file_of(tmp_path, kind), []
    for save_anchor in (True, False):
        torch.manual_seed(7)
        module, callback = resumable(0), make(pretrained=file, save_anchor=save_anchor)
        trainer = quiet_trainer(callback, max_epochs=1)
        trainer.fit(module)
        if second:
            trainer.fit_loop.max_epochs = 2
            trainer.fit(module)
        found.append({"weights": module.state_dict(), "anchor": callback.anchor, "copied": deepcopy(callback).anchor})
    assert_same(found[1], found[0])


@pytest.mark.parametrize("make", AT_END.values(), ids=AT_END)
def test_what_acts_at_the_end_reads_the_file_three_times(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the fit, when it starts and at its end, whenever logs are due."""
    read: list[Any] = []

    def reading(path: Any) -> Any:
        read.append(path)
        return read_pretrained(path)

    for module in (method, references):
        monkeypatch.setattr(module, "read_pretrained", reading)
    callback = make(pretrained=pretrained_file(tmp_path), save_anchor=False)
    quiet_trainer(callback, log_every_n_steps=1).fit(resumable(0))
    assert len(read) == 3


def test_anchors_that_stay_in_the_file_can_be_asked_for(tmp_path: Path) -> None:
    """In mid-run, of a copy from there, and after an exception."""
    file, seen = pretrained_file(tmp_path), []
    callback = WiSEFTCallback(pretrained=file, save_anchor=False)

    class Ask(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            seen.extend([callback.anchor, deepcopy(callback).anchor])
            assert all("distance" not in row for row in callback.report())
            raise KeyboardInterrupt

    with pytest.raises((KeyboardInterrupt, SystemExit)):
        quiet_trainer(callback, Ask()).fit(resumable(0))
    pretrained = toy(5).state_dict()
    for anchor in [*seen, callback.anchor]:
        assert_same(anchor, {name: pretrained[name] for name in anchor})
        assert "head.weight" in anchor


def test_a_file_that_changes_before_the_end_is_an_error(tmp_path: Path) -> None:
    file = pretrained_file(tmp_path)

    class Change(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            change(file)

    with pytest.raises(MisconfigurationException, match="has changed since"):
        quiet_trainer(WiSEFTCallback(pretrained=file, save_anchor=False), Change()).fit(resumable(0))


@pytest.mark.parametrize("make", AT_END.values(), ids=AT_END)
def test_a_file_that_is_gone_at_the_end_costs_no_training(make: Any, tmp_path: Path) -> None:
    """As docs/troubleshooting.md says: the last checkpoint goes on with the file's new place."""
    file, checkpoint, place = pretrained_file(tmp_path), tmp_path / "during.ckpt", tmp_path / "elsewhere.ckpt"
    expected = run(tmp_path, make(pretrained=file, save_anchor=False))

    class Move(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == 8:
                trainer.save_checkpoint(checkpoint)
                file.rename(place)

    with pytest.raises(MisconfigurationException, match="there is no such file"):
        run(tmp_path, make(pretrained=file, save_anchor=False), Move())
    found = run(tmp_path, make(pretrained=place, save_anchor=False), resume=checkpoint)
    assert_same(found["weights"], expected["weights"])


def overwrite(file: Path) -> None:
    """In place, and as long as before: who looks at it now sees zeros."""
    content = file.read_bytes()
    for tensor in toy(5).state_dict().values():
        content = content.replace(tensor.numpy().tobytes(), bytes(tensor.nbytes)) if tensor.dim() else content
    with file.open("r+b") as opened:
        opened.write(content)


@pytest.mark.parametrize("kind", ["torch", "safetensors"])
@pytest.mark.parametrize("save_anchor", [True, False])
@pytest.mark.parametrize("make", METHODS.values(), ids=METHODS)
def test_a_file_that_is_overwritten_changes_no_anchor(make: Any, save_anchor: bool, kind: str, tmp_path: Path) -> None:
    """Neither those of frozen layers, nor those that were asked for, nor those of copies."""
    file, seen = file_of(tmp_path, kind), []
    callback = make(pretrained=file, save_anchor=save_anchor)

    class Overwrite(pl.Callback):
        def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
            pl_module.head.requires_grad_(False)

        def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 1:
                seen.extend([callback.anchor, deepcopy(callback).anchor])
                overwrite(file)
            elif batch_idx == 2:
                pl_module.head.requires_grad_(True)

    stays = make is WiSEFTCallback and not save_anchor
    with pytest.raises(MisconfigurationException, match="has changed since") if stays else nullcontext():
        quiet_trainer(callback, Overwrite()).fit(resumable(0))
    pretrained = toy(5).state_dict()
    for anchor in seen if stays else [*seen, callback.anchor]:
        assert_same(anchor, {name: pretrained[name] for name in anchor})
    assert "backbone.0.weight" in seen[0]
    assert stays or "head.weight" in callback.anchor


@pytest.mark.parametrize("kind", ["torch", "safetensors"])
def test_a_file_that_is_overwritten_after_the_end_changes_no_anchor(kind: str, tmp_path: Path) -> None:
    file, module = file_of(tmp_path, kind), resumable(0)
    module.head.requires_grad_(False)
    callback = WiSEFTCallback(pretrained=file, save_anchor=False)
    quiet_trainer(callback).fit(module)
    overwrite(file)
    held = callback._constraint.anchors.state_dict()
    pretrained = toy(5).state_dict()
    assert held["anchor"].keys() | held["waiting"].keys() >= {"backbone.0.weight", "head.weight"}
    for place in held.values():
        assert_same(place, {name: pretrained[name] for name in place})


def resident() -> int:
    """Bytes of this process that are not mapped from files."""
    found = re.search(r"RssAnon:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


@pytest.mark.skipif(sys.platform != "linux", reason="memory is counted by Linux")
@pytest.mark.parametrize("kind", ["torch", "safetensors"])
def test_reading_and_comparing_a_file_takes_no_memory(kind: str, tmp_path: Path) -> None:
    model = nn.Linear(4000, 4000)  # 64 MB: memory of its own, which nothing that was freed can give
    file = tmp_path / f"pretrained.{kind}"
    if kind == "torch":
        torch.save(model.state_dict(), file)
    else:
        pytest.importorskip("safetensors.torch").save_file(model.state_dict(), file)
    before = resident()
    tensors = read_pretrained(file)
    fingerprint(tensors, {name: name for name in tensors})
    assert resident() - before < 6_000_000


@pytest.mark.parametrize("make", METHODS.values(), ids=METHODS)
def test_a_file_that_changes_between_two_fits_is_an_error(make: Any, tmp_path: Path) -> None:
    """What the checkpoints of the second one name would be other anchors than those of the first."""
    file, module = pretrained_file(tmp_path), resumable(0)
    trainer = quiet_trainer(make(pretrained=file, save_anchor=False), max_epochs=1)
    trainer.fit(module)
    change(file)
    trainer.fit_loop.max_epochs = 2
    with pytest.raises(MisconfigurationException, match=r"^The anchors are in '.*has changed since"):
        trainer.fit(module)


@pytest.mark.parametrize(("grows", "expected"), [(False, 1), (True, 2)])
def test_a_second_fit_hashes_the_file_again_only_for_more_parameters(
    grows: bool, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To compare it takes one pass over the file, which is minutes for one of 140 GB."""
    file, module = pretrained_file(tmp_path), resumable(0)
    bias = module.head.bias
    if grows:
        module.head.bias = None
    callback = FTPCallback(pretrained=file, save_anchor=False)
    trainer = quiet_trainer(callback, max_epochs=1)
    trainer.fit(module)
    module.head.bias, hashed = bias, []
    monkeypatch.setattr(references, "fingerprint", lambda *of: hashed.append(of) or fingerprint(*of))
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module)
    assert len(hashed) == expected
    monkeypatch.undo()
    state = callback.state_dict()
    assert "head.bias" in state["file"]["sources"]
    assert state["file"]["fingerprint"] == fingerprint(read_pretrained(file), state["file"]["sources"])


def test_a_state_of_waiting_layers_alone_names_the_file(tmp_path: Path) -> None:
    """They thaw around what is in it."""
    file, module = pretrained_file(tmp_path), resumable(0).requires_grad_(False)
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    constraint = constrain(module, FTP(), optimizer, pretrained=file, save_anchor=False)
    state = constraint.state_dict()
    assert state["anchor"] == {}
    constraint.load_state_dict(state)
    module.requires_grad_(True)
    constraint.join()
    assert_same(constraint.anchor, {name: toy(5).state_dict()[name] for name in constraint.anchor})
    assert "head.weight" in constraint.anchor
