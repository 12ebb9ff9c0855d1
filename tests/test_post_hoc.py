"""TPGM after the fact: at the end of a fit, between two checkpoints, and from the command line."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_tpgm import TPGMCallback, project_checkpoint
from lightning_tpgm.__main__ import main
from lightning_tpgm.methods import TPGM
from properties import assert_inside_ball, assert_same
from reference import ReferenceTPGM
from test_exact_method import Tensors, fit, loss_of
from toys import quiet_trainer, toy, train_loader, val_loader

ROOT = Path(__file__).parents[1]


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


# --- at the end of a fit ---


class Look(pl.Callback):
    """Keeps the weights as they are at the end of the training, before callbacks that are listed later."""

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.seen = state(pl_module)


@pytest.mark.parametrize("norm", ["mars", "l2"])
def test_fit_end_is_plain_fine_tuning_until_then(norm: str, tmp_path: Path) -> None:
    plain, module, look = toy(), toy(), Look()
    quiet_trainer(max_epochs=2).fit(plain, train_loader(), val_loader())
    callback = TPGMCallback(norm=norm, when="fit_end", radius_steps=3)
    during = ModelCheckpoint(tmp_path, filename="during")
    trainer = quiet_trainer(look, callback, during, max_epochs=2, enable_checkpointing=True)
    trainer.fit(module, train_loader(), val_loader())

    assert_same(look.seen, state(plain))
    assert_same(dict(torch.load(tmp_path / "during.ckpt", weights_only=True)["state_dict"]), state(plain))
    anchors = dict(toy().named_parameters())
    assert_inside_ball(module, anchors, callback.radii, norm)
    moved = {name for name, value in state(module).items() if not torch.equal(value, look.seen[name])}
    assert {"hidden.weight", "head.weight", "backbone.0.weight", "scale"} <= moved <= set(anchors)


@pytest.mark.parametrize("norm", ["mars", "l2"])
@pytest.mark.parametrize("radius_steps", [1, 20])
@pytest.mark.parametrize("radius_lr", [1e-3, "auto"])
def test_fit_end_radii_equal_a_float64_loop(norm: str, radius_steps: int, radius_lr: float | str) -> None:
    """The reference, applied once to the weights of plain fine-tuning with that many radius steps."""
    generator = torch.Generator().manual_seed(1)
    train, held_out = (torch.randn(n, 64, generator=generator, dtype=torch.float64) for n in (7, 4))
    plain, module = Tensors(1.0, 0.05, seed=0), Tensors(1.0, 0.05, seed=0)
    anchors = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    fit(plain, [], DataLoader(TensorDataset(train)), precision="64-true")
    batches = cycle(held_out)

    def gradients(at: dict[str, Tensor]) -> dict[str, Tensor | None]:
        leaves = {name: weight.detach().clone().requires_grad_() for name, weight in at.items()}
        grads = torch.autograd.grad(loss_of(leaves, next(batches)), list(leaves.values()), allow_unused=True)
        return dict(zip(leaves, grads, strict=True))

    reference = ReferenceTPGM(anchors, norm, radius_lr, radius_steps, at_end=True)
    expected = reference.after_step(dict(plain.named_parameters()), gradients)

    loader = DataLoader(TensorDataset(held_out))
    callback = TPGMCallback(loader, norm=norm, radius_lr=radius_lr, when="fit_end", radius_steps=radius_steps)
    fit(module, [callback], DataLoader(TensorDataset(train)), precision="64-true")
    assert callback.radii == pytest.approx(reference.radii, rel=1e-6, abs=1e-9, nan_ok=True)
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=1e-6, atol=1e-9)


def test_fit_end_with_an_early_stop_and_not_after_an_exception() -> None:
    """It belongs to a fit that ends, however early; one that is broken off keeps its weights."""

    class Act(pl.Callback):
        def __init__(self, error: type[Exception] | None) -> None:
            self.error = error

        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == 3:
                trainer.should_stop = True
                if self.error is not None:
                    raise self.error

    callback = TPGMCallback(when="fit_end")
    quiet_trainer(callback, Act(None)).fit(toy(), train_loader(), val_loader())
    assert all((radius == radius) == (callback.distances[name] > 0) for name, radius in callback.radii.items())
    module, plain = toy(), toy()
    with pytest.raises(ArithmeticError):
        quiet_trainer(TPGMCallback(when="fit_end"), Act(ArithmeticError)).fit(module, train_loader(), val_loader())
    with pytest.raises(ArithmeticError):
        quiet_trainer(Act(ArithmeticError)).fit(plain, train_loader(), val_loader())
    assert_same(state(module), state(plain))


def test_updates_by_default() -> None:
    """One each time while training. At the end all at once, as many as between two checkpoints."""
    between = inspect.signature(project_checkpoint).parameters["radius_steps"].default
    assert TPGMCallback(when="fit_end").radius_steps == TPGM(when="fit_end").radius_steps == between == 200
    assert TPGMCallback().radius_steps == TPGM().radius_steps == 1
    assert TPGMCallback(when="fit_end", radius_steps=3).make_method().radius_steps == 3


# --- between two checkpoints ---


class Sized(pl.LightningModule):
    """Has a hyperparameter, BatchNorm, and a buffer of integers that its output depends on."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(16, width, bias=False), nn.BatchNorm1d(width), nn.Tanh())
        self.head = nn.Linear(width, 2)
        self.register_buffer("order", torch.arange(16))

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.mse_loss(self.head(self.net(batch[0].flatten(1)[:, self.order])), batch[1])

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self.loss(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def sized(seed: int) -> Sized:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = Sized(width=6)
        module.order = torch.randperm(16)
        return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both ends of a plain fine-tuning in every kind of file; do not write into it."""
    path = tmp_path_factory.mktemp("checkpoints")
    module = sized(0)
    trainer = quiet_trainer(max_epochs=2)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(path / "pretrained.ckpt", weights_only=True)
    for name in ("pretrained", "finetuned"):
        torch.save(module.state_dict(), path / f"{name}.pt")
        save_file(module.state_dict(), path / f"{name}.safetensors", metadata={"format": "pt", "by": "its maker"})
        trainer.fit(module, train_loader())
    trainer.save_checkpoint(path / "unused.ckpt")
    module.load_state_dict(torch.load(path / "finetuned.pt", weights_only=True))
    trainer.save_checkpoint(path / "finetuned.ckpt")
    return path


OPTIONS: dict[str, Any] = {"norm": "mars", "radius_steps": 5, "radius_lr": 0.05}


def project(folder: Path, output: Path | None, kind: str = "pt", **options: Any) -> tuple[Sized, TPGMCallback]:
    module = options.pop("module", None) or sized(9)
    ends = {name: folder / f"{name}.{kind}" for name in ("pretrained", "finetuned")}
    ends |= {name: options.pop(name) for name in ends if name in options}
    arguments = {"trainer": quiet_trainer(), "dataloader": val_loader(), **ends, **OPTIONS, **options}
    return module, project_checkpoint(module, output=output, **arguments)


def tensors(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return load_file(path)
    content = torch.load(path, weights_only=True)
    return dict(content.get("state_dict", content))


@pytest.mark.parametrize("kind", ["ckpt", "pt", "safetensors"])
def test_project_checkpoint_equals_the_end_of_a_fit(kind: str, folder: Path, tmp_path: Path) -> None:
    """To the bit, in every kind of file; buffers and the order of names are those of the fine-tuned file."""
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    output = tmp_path / f"projected.{kind}"
    module, callback = project(folder, output, kind)

    expected = sized(0)
    at_end = TPGMCallback(val_loader(), when="fit_end", **OPTIONS)
    fit(expected, [at_end], train_loader(), max_epochs=2)
    fine, found = tensors(folder / f"finetuned.{kind}"), tensors(output)
    assert_same(fine["order"], expected.order)
    assert_same(found, {name: state(expected)[name] for name in fine})
    assert_same(state(module), state(expected))
    assert callback.radii == at_end.radii
    assert callback.distances == at_end.distances
    assert not torch.equal(found["net.1.weight"], fine["net.1.weight"])
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_project_checkpoint_writes_what_loads_as_before(folder: Path, tmp_path: Path) -> None:
    """A Lightning checkpoint keeps all that it holds: hyperparameters, optimizer state, progress."""
    output = tmp_path / "projected.ckpt"
    module, _ = project(folder, output, "ckpt")
    loaded = Sized.load_from_checkpoint(output, map_location="cpu", weights_only=True)
    assert loaded.hparams == {"width": 6}
    assert_same(state(loaded), state(module))
    found, fine = (torch.load(p, weights_only=True) for p in (output, folder / "finetuned.ckpt"))
    assert_same({**found, "state_dict": 0}, {**fine, "state_dict": 0})
    quiet_trainer(max_epochs=3).fit(sized(1), train_loader(), ckpt_path=output)  # resumes


def test_project_checkpoint_keeps_the_metadata_of_safetensors(folder: Path, tmp_path: Path) -> None:
    """Libraries that load such files look there for their format."""
    project(folder, tmp_path / "projected.safetensors", "safetensors")
    with safe_open(tmp_path / "projected.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "by": "its maker"}


def renamed(path: Path, rename: Callable[[str], str], output: Path) -> Path:
    torch.save({rename(name): value for name, value in tensors(path).items()}, output)
    return output


@pytest.mark.parametrize(
    ("pretrained", "finetuned"),
    [
        (lambda name: f"module.{name}", lambda name: name),
        (lambda name: name, lambda name: f"model.{name}"),
        (lambda name: f"a.b.{name}", lambda name: f"_orig_mod.{name}"),
    ],
)
def test_project_checkpoint_with_other_prefixes(
    pretrained: Callable[[str], str], finetuned: Callable[[str], str], folder: Path, tmp_path: Path
) -> None:
    """The output has the names of the fine-tuned file."""
    ends = {
        "pretrained": renamed(folder / "pretrained.pt", pretrained, tmp_path / "a.pt"),
        "finetuned": renamed(folder / "finetuned.pt", finetuned, tmp_path / "b.pt"),
    }
    module, _ = project(folder, tmp_path / "projected.pt", **ends)
    same, _ = project(folder, tmp_path / "same.pt")
    assert_same(state(module), state(same))
    assert_same(tensors(tmp_path / "projected.pt"), {finetuned(n): v for n, v in tensors(tmp_path / "same.pt").items()})


def test_project_checkpoint_with_pretrained_of_the_backbone_alone(folder: Path, tmp_path: Path) -> None:
    """What the pretrained file lacks keeps its fine-tuned value."""
    backbone = {n.removeprefix("net."): v for n, v in tensors(folder / "pretrained.pt").items() if "net." in n}
    _, callback = project(folder, tmp_path / "projected.pt", pretrained=backbone)
    assert list(callback.radii) == ["net.1.weight", "net.2.weight", "net.2.bias"]
    found, fine = tensors(tmp_path / "projected.pt"), tensors(folder / "finetuned.pt")
    assert_same([found["head.weight"], found["head.bias"]], [fine["head.weight"], fine["head.bias"]])
    assert not torch.equal(found["net.1.weight"], fine["net.1.weight"])


def test_project_checkpoint_exclude(folder: Path, tmp_path: Path) -> None:
    _, callback = project(folder, tmp_path / "projected.pt", exclude=["head.*", "net.2.*"])
    assert list(callback.radii) == ["net.1.weight"]
    found, fine = tensors(tmp_path / "projected.pt"), tensors(folder / "finetuned.pt")
    changed = {name for name in fine if not torch.equal(found[name], fine[name])}
    assert changed == {"net.1.weight"}


def test_project_checkpoint_by_another_loss(folder: Path, tmp_path: Path) -> None:
    """The negative loss moves the radii the other way: one step of Adam is its learning rate at first."""
    _, callback = project(folder, tmp_path / "a.pt", radius_steps=1)
    _, other = project(folder, tmp_path / "b.pt", radius_steps=1, loss=lambda module, batch: -module.loss(batch))
    assert abs(callback.radii["net.1.weight"] - other.radii["net.1.weight"]) == pytest.approx(2 * 0.05)


class Tied(pl.LightningModule):
    """One weight under two names, the second of which is the one that comes last in a state dict."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.second = nn.Linear(16, 16)
        self.second.weight = self.first.weight
        self.head = nn.Linear(16, 2)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        hidden = self.second(torch.tanh(self.first(batch[0].flatten(1))))
        return nn.functional.mse_loss(self.head(hidden), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("copies", [False, True])
def test_project_checkpoint_of_tied_weights(copies: bool, tmp_path: Path) -> None:
    """A state dict holds them under each of their names, shared or as copies: all of them are projected."""
    module = Tied()
    torch.save(module.state_dict(), tmp_path / "a.pt")
    quiet_trainer().fit(module, train_loader())
    torch.save({n: v.clone() if copies else v for n, v in module.state_dict().items()}, tmp_path / "b.pt")
    output = tmp_path / "projected.pt"
    projected = Tied()
    project_checkpoint(
        projected, tmp_path / "a.pt", tmp_path / "b.pt", val_loader(), output, trainer=quiet_trainer(), **OPTIONS
    )
    loaded = Tied()
    loaded.load_state_dict(torch.load(output, weights_only=True))
    assert_same(state(loaded), state(projected))
    assert not torch.equal(loaded.second.weight, module.second.weight)


class Scheduled(Sized):
    """Its learning rate schedule needs the number of steps, of which there are none here."""

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        steps = int(self.trainer.estimated_stepping_batches)
        return [optimizer], [torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=steps)]


def test_project_checkpoint_of_a_module_with_a_schedule(folder: Path, tmp_path: Path) -> None:
    """No optimizer is needed, so the module's own are not made."""
    module = Scheduled(width=6)
    project(folder, tmp_path / "a.pt", module=module)
    project(folder, tmp_path / "b.pt")
    assert_same(tensors(tmp_path / "a.pt"), tensors(tmp_path / "b.pt"))
    assert module.configure_optimizers.__func__ is Scheduled.configure_optimizers
    assert "configure_optimizers" not in vars(module)


def test_project_checkpoint_leaves_the_trainer_as_it_was(folder: Path, tmp_path: Path) -> None:
    """Whatever happens; and the trainer fits as a new one afterwards."""
    names = ["limit_train_batches", "limit_val_batches", "callbacks", "max_epochs", "loggers", "ckpt_path"]
    callbacks = [EarlyStopping("val_loss"), ModelCheckpoint(tmp_path, monitor="val_loss")]
    options = {"limit_train_batches": 4, "limit_val_batches": 2, "max_epochs": 2, "enable_checkpointing": True}
    trainer = quiet_trainer(*callbacks, **options)
    before = {name: getattr(trainer, name) for name in names}
    for pretrained in (folder / "pretrained.pt", {"nothing": torch.zeros(1)}, folder / "pretrained.pt"):
        try:
            project(folder, tmp_path / "projected.pt", trainer=trainer, pretrained=pretrained)
        except MisconfigurationException as error:
            assert str(error).startswith("`pretrained` matches no parameter")  # noqa: PT017
        assert {name: getattr(trainer, name) for name in names} == before
        assert trainer.callbacks is before["callbacks"]

    module, expected = toy(), toy()
    trainer.fit(module, train_loader(), val_loader())
    quiet_trainer(max_epochs=2, limit_train_batches=4).fit(expected, train_loader(), val_loader())
    assert trainer.global_step == 8
    assert_same(state(module), state(expected))
    project(folder, tmp_path / "again.pt", trainer=trainer)  # also when it has trained
    assert_same(tensors(tmp_path / "again.pt"), tensors(tmp_path / "projected.pt"))


def test_project_checkpoint_beside_the_fine_tuned_file(folder: Path, tmp_path: Path) -> None:
    """Where it is written if nothing is said, also over an older one."""
    copy = tmp_path / "last-step=3.pt"
    copy.write_bytes((folder / "finetuned.pt").read_bytes())
    for _ in range(2):
        project(folder, None, finetuned=copy)
    assert {file.name for file in tmp_path.iterdir()} == {"last-step=3.pt", "last-step=3-projected.pt"}
    project(folder, tmp_path / "same.pt")
    assert_same(tensors(tmp_path / "last-step=3-projected.pt"), tensors(tmp_path / "same.pt"))


def test_project_checkpoint_keeps_the_dtype_of_the_file(folder: Path, tmp_path: Path) -> None:
    half = {n: v.bfloat16() if v.is_floating_point() else v for n, v in tensors(folder / "finetuned.pt").items()}
    torch.save(half, tmp_path / "half.pt")
    module, _ = project(folder, tmp_path / "projected.pt", finetuned=tmp_path / "half.pt")
    assert module.head.weight.dtype == torch.float32
    assert_same(tensors(tmp_path / "projected.pt"), {n: v.to(half[n].dtype) for n, v in state(module).items()})


class WritesToItsLogger(Sized):
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        self.logger.experiment.add_scalar("a", 1.0)
        self.log("loss", 1.0)
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("logged", [True, False])
def test_project_checkpoint_logs_nothing(logged: bool, folder: Path, tmp_path: Path) -> None:
    """Whether the trainer has a logger or not, and if the module expects one."""
    logger = CSVLogger(tmp_path / "logs") if logged else False
    trainer = quiet_trainer(logger=logger)
    project(folder, tmp_path / "projected.pt", module=WritesToItsLogger(width=6), trainer=trainer)
    assert not (tmp_path / "logs").exists()
    assert trainer.loggers == ([logger] if logged else [])


def test_project_checkpoint_makes_a_trainer(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without one Lightning chooses devices; nothing else is written than the output."""
    monkeypatch.chdir(tmp_path)
    project(folder, tmp_path / "a.pt", trainer=None)
    assert [file.name for file in tmp_path.iterdir()] == ["a.pt"]
    project(folder, tmp_path / "b.pt")
    torch.testing.assert_close(tensors(tmp_path / "a.pt"), tensors(tmp_path / "b.pt"))


@pytest.mark.parametrize("shown", [True, False])
def test_project_checkpoint_progress_bar(
    shown: bool, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    project(folder, tmp_path / "a.pt", trainer=quiet_trainer(enable_progress_bar=shown), radius_steps=7)
    printed = "".join(capsys.readouterr())
    assert ("Learning radii" in printed) is shown
    assert ("7/7" in printed) is shown


def lacking(folder: Path, tmp_path: Path) -> dict[str, Any]:
    content = {name: value for name, value in tensors(folder / "finetuned.pt").items() if name != "head.bias"}
    torch.save(content, tmp_path / "lacking.pt")
    return {"finetuned": tmp_path / "lacking.pt"}


def of_another_shape(folder: Path, tmp_path: Path) -> dict[str, Any]:
    torch.save({**tensors(folder / "finetuned.pt"), "head.bias": torch.zeros(3)}, tmp_path / "other.pt")
    return {"finetuned": tmp_path / "other.pt"}


def of_something_else(folder: Path, tmp_path: Path) -> dict[str, Any]:
    torch.save({"step": 3}, tmp_path / "else.pt")
    return {"finetuned": tmp_path / "else.pt"}


FAILURES: list[tuple[Callable[[Path, Path], dict[str, Any]], str]] = [
    (lacking, r"^`finetuned` '.*lacking\.pt' should hold all weights of Sized, and lacks \['head.bias'\]"),
    (of_another_shape, r"^`finetuned` '.*other\.pt' should hold all weights of Sized, and lacks \['head.bias'\]"),
    (of_something_else, r"^`finetuned` should hold tensors by parameter name .*\['step'\]"),
    (lambda *_: {"finetuned": "nowhere.pt"}, r"^`finetuned` should be an existing file, found 'nowhere\.pt'"),
    (lambda *_: {"pretrained": "nowhere.pt"}, r"^`pretrained` should be an existing file, found 'nowhere\.pt'"),
    (
        lambda folder, _: {"finetuned": folder / "finetuned.safetensors"},
        r"^`output` should be of the same kind as `finetuned` \('.safetensors'\), found '.pt'\.",
    ),
    (lambda *_: {"pretrained": None}, "^`pretrained` should be a path, a mapping .* or a module, found None"),
    (lambda *_: {"radius_steps": 0}, "^`radius_steps` should be a positive integer, found 0"),
    (lambda *_: {"exclude": ["*"]}, "has nothing to constrain"),
    (lambda *_: {"dataloader": []}, "^The held-out loader gave no batch"),
    (
        lambda *_: {"trainer": quiet_trainer(strategy="ddp_spawn", devices=2)},
        r"^`trainer` should .* found .*ddp_spawn.* strategy='ddp'",
    ),
]


@pytest.mark.parametrize(("make", "message"), FAILURES)
def test_project_checkpoint_clear_failure(
    make: Callable[[Path, Path], dict[str, Any]], message: str, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        project(folder, tmp_path / "projected.pt", **make(folder, tmp_path))
    assert not (tmp_path / "projected.pt").exists()


def test_project_checkpoint_into_a_folder_that_does_not_exist(folder: Path, tmp_path: Path) -> None:
    """Said before the radii are learned."""
    with pytest.raises(MisconfigurationException, match=r"^`output` should be in an existing folder, found '.*nowhere"):
        project(folder, tmp_path / "nowhere" / "a.pt", pretrained="nowhere.pt")


def test_project_checkpoint_never_writes_over_the_pretrained_file(folder: Path, tmp_path: Path) -> None:
    """Nor over a link to it."""
    torch.save(tensors(folder / "pretrained.pt"), tmp_path / "pretrained.pt")
    (tmp_path / "link.pt").symlink_to(tmp_path / "pretrained.pt")
    before = (tmp_path / "pretrained.pt").read_bytes()
    for output in ("pretrained.pt", "link.pt"):
        with pytest.raises(MisconfigurationException, match=r"^`output` should not be the file of `pretrained`"):
            project(folder, tmp_path / output, pretrained=tmp_path / "pretrained.pt")
    assert (tmp_path / "pretrained.pt").read_bytes() == before


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are named pipes on POSIX only")
def test_project_checkpoint_into_something_that_is_no_file(folder: Path, tmp_path: Path) -> None:
    """A renamed file would take a device's place."""
    os.mkfifo(tmp_path / "pipe.ckpt")
    for output in (tmp_path, tmp_path / "pipe.ckpt"):
        with pytest.raises(MisconfigurationException, match=r"^`output` should be a file, found"):
            project(folder, output, finetuned=folder / "finetuned.ckpt", pretrained="nowhere.pt")


def test_project_checkpoint_replaces_what_a_link_leads_to(folder: Path, tmp_path: Path) -> None:
    """With the permissions that it has."""
    (tmp_path / "real.pt").touch(mode=0o640)
    (tmp_path / "link.pt").symlink_to(tmp_path / "real.pt")
    project(folder, tmp_path / "link.pt")
    assert (tmp_path / "link.pt").is_symlink()
    assert (tmp_path / "real.pt").stat().st_mode & 0o777 == 0o640
    assert "head.bias" in tensors(tmp_path / "real.pt")


# --- the command line ---


def command(folder: Path, output: Path) -> list[str]:
    return [
        "project",
        "--model=test_post_hoc.Sized",
        "--model.width=6",
        f"--pretrained={folder / 'pretrained.ckpt'}",
        f"--finetuned={folder / 'finetuned.ckpt'}",
        "--dataloader=toys:val_loader",
        f"--output={output}",
        "--norm=mars",
        "--radius_lr=0.05",
        "--radius_steps=5",
        "--accelerator=cpu",
    ]


def test_command_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(command(folder, tmp_path / "a.ckpt"))
    printed = capsys.readouterr()
    _, callback = project(folder, tmp_path / "b.ckpt", "ckpt")
    assert_same(tensors(tmp_path / "a.ckpt"), tensors(tmp_path / "b.ckpt"))
    for row in callback.report():
        numbers = [f"{row[key]:.4g}" for key in ("wanted", "distance", "ratio")]
        assert re.search(r"\W+".join(map(re.escape, [row["name"], *numbers])), printed.out)
    assert callback.explain() in " ".join(printed.out.split())
    assert "Learning radii" in printed.err


def test_command_line_exclude_and_loss(folder: Path, tmp_path: Path) -> None:
    main([*command(folder, tmp_path / "a.ckpt"), "--exclude=[head.*, net.2.*]"])
    found, fine = tensors(tmp_path / "a.ckpt"), tensors(folder / "finetuned.ckpt")
    assert {n for n in fine if not torch.equal(found[n], fine[n])} == {"net.1.weight"}
    with pytest.raises(MisconfigurationException, match="'validation_step', but Sized defines no validation_step"):
        main([*command(folder, tmp_path / "b.ckpt"), "--loss=validation_step"])


def test_command_line_help() -> None:
    call = [sys.executable, "-m", "lightning_tpgm", "project", "--help"]
    found = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.startswith("usage: python -m lightning_tpgm")
    for argument in ("model", "pretrained", "finetuned", "dataloader", "output", "radius_steps", "exclude"):
        assert f"--{argument}" in found.stdout


def test_command_line_without_jsonargparse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jsonargparse", None)
    with pytest.raises(SystemExit, match=r"needs jsonargparse: pip install 'lightning-tpgm\[cli\]'"):
        main(["project", "--help"])
