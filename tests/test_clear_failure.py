"""Invariant 7, "Clear failure": bad arguments fail in the constructor, bad combinations before the first step.

Each message says what was found, what was expected and what to do.
"""

from __future__ import annotations

import itertools
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, BaseFinetuning
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_tpgm import L2SPCallback, TPGMCallback, project_checkpoint, wise_ft_sweep
from properties import assert_same
from toys import Toy, images, quiet_trainer, toy, train_loader, val_loader


def says(message: str) -> Any:
    """Expect Lightning's error with this text, the whole of it; `...` stands for any text."""
    pattern = ".*".join(re.escape(part) for part in message.split("..."))
    return pytest.raises(MisconfigurationException, match=f"(?s)^{pattern}$")


@contextmanager
def told() -> Iterator[list[str]]:
    """The warnings, as a list that is filled on exit; `pytest.warns` would raise those of others again."""
    texts: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield texts
    texts += [str(warning.message) for warning in caught]


def fit(module: pl.LightningModule, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    trainer = quiet_trainer(*callbacks, **options)
    trainer.fit(module, train_loader(), val_loader())
    return trainer


# --- arguments, in the constructor

NOT_LOADER = "`dataloader` should be a loader, a function that returns one, an import path or None, found ..."
NOT_PATH = "`dataloader` should be an import path like 'my_project.data:held_out', found ..."
NOT_PATTERNS = "`exclude` should be a sequence of patterns, found ..."
NOT_IN_BRACKETS = "`exclude` should be a sequence of patterns, found 'head.*'. Write ['head.*']."
NOT_PRETRAINED = "`pretrained` should be a path, a mapping of tensors by name, a module or None, found ..."
NOT_LOSS = "`loss` should be None, 'validation_step' or a callable (pl_module, batch) -> Tensor, found ..."
BAD_ARGUMENTS: list[tuple[str, Any, str]] = [
    *(
        ("radius_lr", v, "`radius_lr` should be a positive number or 'auto', found ...")
        for v in (0, -0.1, "0.01", None, True)
    ),
    *(
        ("radius_lr", v, "`radius_lr` should be a positive number or 'auto', found ...")
        for v in (float("nan"), float("inf"))
    ),
    *(("norm", v, "`norm` should be one of 'mars', 'l2', found ...") for v in ("l1", "MARS", None, 2, ["l2"])),
    *(("radius_steps", v, "`radius_steps` should be a positive integer, found ...") for v in (0, -1, 1.0, True, "2")),
    *(("every_n_steps", v, "`every_n_steps` should be a positive integer, found ...") for v in (0, -3, 2.5, False)),
    ("exclude", "head.*", NOT_IN_BRACKETS),
    *(("exclude", v, NOT_PATTERNS) for v in ([1], [None], {"head.*"}, 3, None)),
    *(("pretrained", v, NOT_PRETRAINED) for v in (3, ["a.ckpt"], torch.zeros(2))),
    *(
        ("anchor_device", v, "`anchor_device` should be None or 'cpu', found ...")
        for v in ("cuda", 0, torch.device("cpu"))
    ),
    *(("loss", v, NOT_LOSS) for v in ("training_step", "val", 3, ["validation_step"])),
    *(("dataloader", v, NOT_LOADER) for v in (3, 0.5, object())),
    *(
        ("dataloader", v, f"`dataloader` should be a loader, found a {type(v).__name__} of shape (3, 4). Pass ...")
        for v in (torch.zeros(3, 4), np.zeros((3, 4)))
    ),
    *(("dataloader", v, NOT_PATH) for v in ("held_out", "", "my project:data", "my_project.data:", "a:b:c", "1a.b")),
]


@pytest.mark.parametrize(("name", "value", "message"), BAD_ARGUMENTS)
def test_bad_argument(name: str, value: Any, message: str) -> None:
    with says(message.replace("found ...", f"found {value!r}.")):
        TPGMCallback(**{name: value})


GOOD_ARGUMENTS: list[dict[str, Any]] = [
    {},
    {"radius_lr": 1, "norm": "l2", "radius_steps": 200, "every_n_steps": 7, "exclude": []},
    {"exclude": ("a", "b*")},
    {"dataloader": "package.module:name", "pretrained": "weights.pt"},
    {"dataloader": "package.module.name", "pretrained": Path("weights.pt")},
    {"dataloader": val_loader, "pretrained": {}},
    {"dataloader": [], "pretrained": nn.Linear(1, 1)},
    {"loss": "validation_step"},
    {"loss": lambda pl_module, batch: torch.zeros(())},
]


@pytest.mark.parametrize("arguments", GOOD_ARGUMENTS, ids=lambda arguments: ",".join(arguments) or "none")
def test_good_arguments_are_taken_as_they_are(arguments: dict[str, Any]) -> None:
    callback = TPGMCallback(**arguments)
    for name, value in arguments.items():
        assert getattr(callback, name) == (tuple(value) if name == "exclude" else value)
    assert callback.radii == callback.distances == {}
    assert "\n" not in repr(callback)


def test_options_are_keywords() -> None:
    """Only the loader goes by position: a forgotten name is not taken for another argument."""
    with pytest.raises(TypeError):
        TPGMCallback(None, 0.1)  # type: ignore[misc]


# --- loss


class Manual(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()


@pytest.mark.parametrize("strategy", [FSDPStrategy, DeepSpeedStrategy])
@pytest.mark.parametrize("method", [TPGMCallback, L2SPCallback])
def test_strategy_that_is_not_supported(strategy: Any, method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both want a GPU, and DeepSpeed wants to be installed, so neither gets as far as `setup` here by itself."""
    trainer = quiet_trainer()
    monkeypatch.setattr(pl.Trainer, "strategy", strategy.__new__(strategy))
    with says(
        f"{method.__name__} does not support {strategy.__name__}, which hides the parameters in flat buffers. Use"
        " DDPStrategy, or ModelParallelStrategy (FSDP2, tensor parallel)."
    ):
        method().setup(trainer, toy(), "fit")


def test_manual_optimization_needs_a_loss() -> None:
    message = (
        "TPGMCallback cannot evaluate the training_step of a module with manual optimization: it would step the"
        " optimizers. Pass `loss`: 'validation_step', or a callable (pl_module, batch) -> Tensor."
    )
    with says(message):
        fit(Manual(), TPGMCallback())


@pytest.mark.parametrize("loss", ["validation_step", Toy.loss])
def test_manual_optimization_with_a_loss(loss: Any) -> None:
    callback = TPGMCallback(loss=loss)
    fit(Manual(), callback)
    assert len(callback.radii) == 11


class NoValidation(pl.LightningModule):
    """Has a training_step only."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.layer(batch[1]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_validation_step_is_not_defined() -> None:
    message = (
        "`loss` = 'validation_step', but NoValidation defines no validation_step. Define one that returns the loss, or"
        " pass another `loss`."
    )
    with says(message):
        quiet_trainer(TPGMCallback(val_loader(), loss="validation_step")).fit(NoValidation(), train_loader())


class Returns(Toy):
    """Returns something else than a loss from its validation_step."""

    output: Any = None

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        super().validation_step(batch, batch_idx)
        return self.output(self(batch[0])) if callable(self.output) else self.output


BAD_OUTPUTS: dict[str, tuple[Any, str]] = {
    "None": (None, "'NoneType'"),
    "number": (0.5, "'float'"),
    "dict": ({"accuracy": 1.0}, "a dict with the keys ['accuracy']"),
    "vector": (lambda out: out[:, 0], "a tensor of shape (4,)"),
    "dict of vector": (lambda out: {"loss": out[0]}, "a dict with the keys ['loss']"),
}


@pytest.mark.parametrize("kind", BAD_OUTPUTS)
def test_validation_step_returns_no_loss(kind: str) -> None:
    module = Returns()
    module.output, found = BAD_OUTPUTS[kind]
    message = (
        "The validation_step should return the loss to learn the radii from (a scalar tensor, or a dict with one under"
        f" 'loss'), found {found}. Return it there, or pass another `loss`: None for the training_step,"
        " 'validation_step', or a callable (pl_module, batch) -> Tensor."
    )
    with says(message):
        fit(module, TPGMCallback(loss="validation_step"))


def test_loss_callable_returns_no_loss() -> None:
    with says("The loss callable should return the loss..., found a tensor of shape (4, 2)...."):
        fit(toy(), TPGMCallback(loss=lambda module, batch: module(batch[0])))


def no_grad_loss(module: Toy, batch: Any) -> Tensor:
    with torch.no_grad():
        return module.loss(batch)


@pytest.mark.parametrize(
    "loss", [no_grad_loss, lambda module, batch: module.loss(batch).detach(), lambda module, batch: torch.tensor(1.0)]
)
def test_loss_without_gradient(loss: Callable[..., Tensor]) -> None:
    message = (
        "The held-out loss of the loss callable has no gradient: it is detached, computed under torch.no_grad(), or"
        " depends on no trainable parameter. Mend that, or pass another `loss`."
    )
    with says(message):
        fit(toy(), TPGMCallback(loss=loss))


# --- held-out data


def test_no_held_out_data() -> None:
    message = (
        "TPGMCallback found no held-out data to learn the radii from. Pass `dataloader`, or define tpgm_dataloader() or"
        " val_dataloader() in the datamodule or the module. FTPCallback needs none."
    )
    with says(message):
        quiet_trainer(TPGMCallback()).fit(NoValidation(), train_loader())


EMPTY: dict[str, Callable[[], Any]] = {
    "no items": lambda: DataLoader(images(0, seed=0), 4),
    "list": list,
    "last batch dropped": lambda: DataLoader(images(3, seed=0), 4, drop_last=True),
    "factory": lambda: lambda: DataLoader(images(0, seed=0), 4),
}
GAVE_NO_BATCH = (
    "The held-out loader gave no batch: it is empty, or can be iterated only once. Pass a `dataloader` with at least"
    " one batch that can be iterated again."
)


@pytest.mark.parametrize("kind", EMPTY)
def test_empty_loader(kind: str) -> None:
    with says(GAVE_NO_BATCH):
        fit(toy(), TPGMCallback(EMPTY[kind]()))


def batches_of_one_pass() -> Iterator[Any]:
    yield from val_loader()


class OnePass(Iterator[Any]):
    """Says itself that it is an iterator."""

    def __next__(self) -> Any:
        raise StopIteration


END_FOR_GOOD: dict[str, Callable[[], Any]] = {
    "generator": batches_of_one_pass,
    "list_iterator": lambda: iter([*val_loader()]),
    "map": lambda: map(tuple, val_loader()),
    "cycle": lambda: itertools.cycle(val_loader()),
    "_SingleProcessDataLoaderIter": lambda: iter(val_loader()),
    "OnePass": lambda: OnePass(),
}


@pytest.mark.parametrize("kind", END_FOR_GOOD)
def test_iterator_that_ends_for_good(kind: str) -> None:
    found = f"should begin anew in each pass, found an iterator of type '{kind}', which ends for good. Pass the loader"
    remedy = "itself, or as `dataloader` a function that makes an iterator for each pass."
    with says(f"`dataloader` {found} {remedy}"):
        TPGMCallback(END_FOR_GOOD[kind]())
    module = Toy()
    module.val_dataloader = END_FOR_GOOD[kind]  # type: ignore[method-assign]
    with says(f"val_dataloader() of Toy {found} {remedy}"):
        quiet_trainer(TPGMCallback(), limit_val_batches=0).fit(module, train_loader())
    with says(f"`dataloaders` {found} itself, or a list of its batches."):
        wise_ft_sweep(quiet_trainer(), toy(), toy(1), "val_loss", dataloaders=[END_FOR_GOOD[kind]()])


a_generator = batches_of_one_pass()


def test_import_path_of_an_iterator() -> None:
    with says("`dataloader` should begin anew in each pass, found an iterator of type 'generator', which ends..."):
        fit(toy(), TPGMCallback("test_clear_failure:a_generator"))


@pytest.mark.parametrize("by", ["function", "tpgm_dataloader", "tpgm_dataloader with several"])
def test_function_that_makes_iterators_is_called_for_each_pass(by: str) -> None:
    seen: list[Tensor] = []

    def own_loss(pl_module: Toy, batch: Any) -> Tensor:
        seen.append(batch[0])
        return pl_module.loss(batch)

    module = toy()
    if by != "function":
        made = {"a": batches_of_one_pass, "b": val_loader} if by.endswith("several") else {"": batches_of_one_pass}
        module.tpgm_dataloader = lambda: [make() for make in made.values()]  # type: ignore[assignment]
    callback = TPGMCallback(batches_of_one_pass if by == "function" else None, loss=own_loss, every_n_steps=1)
    fit(module, callback, max_epochs=2)
    one_pass = [batch[0] for batch in val_loader()]
    if not by.endswith("several"):
        assert_same(seen, 4 * one_pass)
    else:  # what is a loader is shuffled
        assert_same([seen[:3], seen[6:9]], [one_pass, one_pass])


def test_function_that_gives_the_same_iterator_again() -> None:
    batches = batches_of_one_pass()
    with says(GAVE_NO_BATCH):
        fit(toy(), TPGMCallback(lambda: batches, every_n_steps=1))


def test_iterator_that_its_class_begins_anew() -> None:
    """Such are Lightning's CombinedLoader and those of other libraries."""

    class Again:
        def __iter__(self) -> Any:
            self.batches = iter(val_loader())
            return self

        def __next__(self) -> Any:
            return next(self.batches)

    fit(toy(), TPGMCallback(Again(), every_n_steps=1), max_epochs=2)


not_a_loader = 3


@pytest.mark.parametrize(
    ("dataloader", "message"),
    [
        (
            "no_such_package.data:held_out",
            "...leads nowhere: No module named 'no_such_package'. It should look like...",
        ),
        ("toys:no_such_name", "...import path 'toys:no_such_name' leads nowhere: ...no_such_name..."),
        (
            "test_clear_failure:not_a_loader",
            "`dataloader` should give an iterable of batches, found int from 'test_c... Let it return a loader.",
        ),
        (
            lambda: None,
            "`dataloader` should give an iterable of batches, found NoneType from <function... Let it return a loader.",
        ),
    ],
)
def test_dataloader_that_leads_to_none(dataloader: Any, message: str) -> None:
    with says(message):
        fit(toy(), TPGMCallback(dataloader))


# --- nothing left to constrain

NOTHING = (
    "TPGMCallback has nothing to constrain. Of 11 parameters, {left} remain after `exclude` = {exclude}, and none of"
    " them is trainable. Exclude less, or unfreeze some (a `BaseFinetuning` callback may do so later)."
)


def test_all_excluded() -> None:
    with says(NOTHING.format(left=0, exclude=["*"])):
        fit(toy(), TPGMCallback(exclude=["*"]))


class MostlyFrozen(Toy):
    """All frozen but the head."""

    def __init__(self) -> None:
        super().__init__()
        self.requires_grad_(False)
        self.head.requires_grad_(True)


def test_all_frozen_that_is_not_excluded() -> None:
    with says(NOTHING.format(left=9, exclude=["head.*"])):
        fit(MostlyFrozen(), TPGMCallback(exclude=["head.*"]))


def test_frozen_is_no_error_with_a_finetuning_callback() -> None:
    """In the first epoch nothing is constrained; in the second the backbone joins."""
    callback = TPGMCallback(exclude=["[!b]*", "backbone.1.*"])
    fit(toy(), BackboneFinetuning(1, train_bn=False), callback, max_epochs=1)
    assert callback.radii == callback.distances == {}
    fit(toy(), BackboneFinetuning(1, train_bn=False), callback, max_epochs=2)
    assert set(callback.radii) == {"backbone.0.weight", "backbone.0.bias"}


class Idle(BaseFinetuning):
    def freeze_before_training(self, pl_module: pl.LightningModule) -> None:
        pass

    def finetune_function(self, *_: Any) -> None:
        pass


def test_a_finetuning_callback_cannot_unfreeze_what_is_excluded() -> None:
    with says(NOTHING.format(left=0, exclude=["*"])):
        fit(toy(), Idle(), TPGMCallback(exclude=["*"]))


def test_exclude_pattern_without_match() -> None:
    message = "`exclude` pattern 'model.head.*' matches no parameter. The closest names are 'head.bias', 'head.weight'."
    message += " Patterns are compared with the names in `model.named_parameters()`."
    with says(message):
        fit(toy(), TPGMCallback(exclude=["model.head.*"]))


def test_lazy_parameter() -> None:
    class Lazy(NoValidation):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.LazyLinear(2)

    with says("Parameter 'layer.weight' has no shape yet. Run one batch through ... or name it in `exclude`."):
        quiet_trainer(TPGMCallback(val_loader())).fit(Lazy(), train_loader())


# --- pretrained


class NeedsCode:
    """What weights_only refuses to load: to read it would leave a file behind."""

    def __reduce__(self) -> Any:
        return Path.touch, (Path("executed"),)


def write(content: Any, path: Path) -> Path:
    torch.save(content, path)
    return path


FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (
        lambda path: path,
        "`pretrained` should be an existing file, found '{path}': there is no such file. Check its name. If it"
        " has moved, pass its new place. If the model holds its pretrained weights already, leave `pretrained` out.",
    ),
    "misspelt": (
        lambda path: write(toy().state_dict(), path).with_stem("aa"),
        "`pretrained` should be an existing file, found '...aa.pt': there is no such file. The closest in that folder"
        " is 'a.pt'. Check...",
    ),
    "relative": (
        lambda path: "weights/pretrained.pt",
        "`pretrained` should be an existing file, found 'weights/pretrained.pt': there is no such file. It is looked"
        " for in '{cwd}'. Check...",
    ),
    "folder": (
        lambda path: path.parent,
        "`pretrained` should be an existing file, found '...': that is a folder. Pass a file in it.",
    ),
    "no torch file": (
        lambda path: path.write_text("hello") and path,
        "`pretrained` file '{path}' cannot be read with weights_only=True: ... Save its weights alone,"
        " torch.save(model.state_dict(), path), and pass that file.",
    ),
    "whole module": (
        lambda path: write({"state_dict": toy().state_dict(), "x": NeedsCode()}, path),
        "`pretrained` file '{path}' cannot be read with weights_only=True: ... Save its weights alone,"
        " torch.save(model.state_dict(), path), and pass that file.",
    ),
    "list": (
        lambda path: write([torch.zeros(2)], path),
        "`pretrained` file '{path}' should hold a state dict, found list.",
    ),
    "tensor": (
        lambda path: write(torch.zeros(2), path),
        "`pretrained` file '{path}' should hold a state dict, found Tensor.",
    ),
    "no tensors": (
        lambda path: write({"epoch": 3, "model": {"w": torch.zeros(2)}}, path),
        "`pretrained` should hold tensors by parameter name (a state dict, or a Lightning checkpoint with one under"
        " 'state_dict'), found the keys ['epoch', 'model']. Pass the mapping that holds the tensors.",
    ),
    "empty": (
        lambda path: write({}, path),
        "`pretrained` should hold tensors by parameter name..., found the keys []...",
    ),
    "other model": (
        lambda path: write(nn.Linear(7, 7).state_dict(), path),
        "`pretrained` matches no parameter by name and shape. It holds 'weight', 'bias'. The parameters to constrain"
        " are 'scale', 'backbone.0.weight', 'backbone.0.bias' and 8 more. Pass the weights of this module, or a mapping"
        " with its parameter names.",
    ),
}


@pytest.mark.parametrize("kind", FILES)
def test_bad_pretrained_file(kind: str, tmp_path: Path) -> None:
    make, message = FILES[kind]
    path = tmp_path / "a.pt"
    pretrained = make(path)
    started = Started()
    with says(message.format(path=path, cwd=Path.cwd())):
        fit(toy(), TPGMCallback(pretrained=pretrained), started)
    assert not started.training


def test_nothing_in_a_file_is_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(toy().state_dict(), "good.pt")
    bad = write({"state_dict": toy().state_dict(), "x": NeedsCode()}, tmp_path / "bad.pt")
    with says("`pretrained` file '...bad.pt' cannot be read with weights_only=True: ..."):
        fit(toy(), TPGMCallback(pretrained=bad))
    with says("`finetuned` file '...bad.pt' cannot be read with weights_only=True: ..."):
        project_checkpoint(toy(), "good.pt", bad, val_loader(), trainer=quiet_trainer())
    with says("`pretrained` file '...bad.pt' cannot be read with weights_only=True: ..."):
        wise_ft_sweep(quiet_trainer(), toy(), bad, "val_loss", dataloaders=val_loader())
    assert not Path("executed").exists()
    torch.load(bad, weights_only=False)  # it would have been
    assert Path("executed").exists()


class Started(pl.Callback):
    """Whether a training batch was begun."""

    training = False

    def on_train_batch_start(self, *_: Any) -> None:
        self.training = True


def test_bad_safetensors_file(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"hello")
    with says(f"`pretrained` file '{path}' cannot be read as safetensors: ..."):
        fit(toy(), TPGMCallback(pretrained=path))


def test_safetensors_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("safetensors", "safetensors.torch"):
        monkeypatch.setitem(__import__("sys").modules, name, None)
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"")
    with says("Reading 'a.safetensors' as `pretrained` needs the package safetensors: pip install safetensors."):
        fit(toy(), TPGMCallback(pretrained=path))


def test_ambiguous_prefixes() -> None:
    class Two(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.student, self.teacher = toy(0), toy(1)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.student.loss(batch) + self.teacher.loss(batch)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    message = (
        "`pretrained` fits the module in several ways: prefix 'student.' put before its names; prefix 'teacher.' put"
        " before its names. Pass a mapping with the module's own parameter names."
    )
    with says(message):
        quiet_trainer(TPGMCallback(val_loader(), pretrained=toy(2))).fit(Two(), train_loader())
    callback = TPGMCallback(val_loader(), pretrained=toy(2), exclude=["teacher.*"])
    quiet_trainer(callback).fit(Two(), train_loader())
    assert len(callback.radii) == 11


# --- resuming


def checkpoint_without_state(path: Path) -> Path:
    """A checkpoint of a run that did not have the callback."""
    fit(toy(0), max_epochs=1).save_checkpoint(path / "plain.ckpt")
    return path / "plain.ckpt"


def resume(path: Path, callback: TPGMCallback) -> None:
    quiet_trainer(callback, max_epochs=2).fit(toy(1), train_loader(), val_loader(), ckpt_path=path)


def test_resumed_without_the_callbacks_state(tmp_path: Path) -> None:
    path = checkpoint_without_state(tmp_path)
    message = (
        f"The checkpoint '{path}' has no state of this TPGMCallback (key \"TPGMCallback{{'exclude': []}}\"). So the"
        " pretrained weights are not known any more. Pass them as `pretrained`, for instance the checkpoint that the"
        " first run started from."
    )
    with says(message):
        resume(path, TPGMCallback())


def test_resumed_with_another_exclude(tmp_path: Path) -> None:
    """Its state is another instance's; the message shows the key with the present `exclude`."""
    fit(toy(0), TPGMCallback()).save_checkpoint(tmp_path / "a.ckpt")
    message = (
        "The checkpoint '...a.ckpt' has no state of this TPGMCallback (key ...head.*...Pass them as `pretrained`..."
    )
    with told() as warned, says(message):
        resume(tmp_path / "a.ckpt", TPGMCallback(exclude=["head.*"]))
    assert any('Please add the following callbacks: ["TPGMCallback' in text for text in warned)


def test_resumed_without_state_but_with_pretrained(tmp_path: Path) -> None:
    path = checkpoint_without_state(tmp_path)
    callback = TPGMCallback(pretrained=toy(5))
    resume(path, callback)
    assert_same(callback.state_dict()["anchor"], {n: p.detach() for n, p in toy(5).named_parameters()})
    assert callback.state_dict()["method"]["steps"] == {0: 6}


def tampered(path: Path, name: str, value: Any) -> Path:
    """A checkpoint with one anchor replaced."""
    callback = TPGMCallback()
    fit(toy(0), callback).save_checkpoint(path / "a.ckpt")
    checkpoint = torch.load(path / "a.ckpt", weights_only=True)
    checkpoint["callbacks"][callback.state_key]["anchor"][name] = value
    return write(checkpoint, path / "a.ckpt")


def test_anchor_of_another_shape_in_the_checkpoint(tmp_path: Path) -> None:
    message = (
        "The checkpoint's anchor of 'head.weight' has shape (3, 5), found shape (2, 5) among those to constrain. Resume"
        " with the module and the `exclude` of the run that wrote the checkpoint."
    )
    with says(message):
        resume(tampered(tmp_path, "head.weight", torch.zeros(3, 5)), TPGMCallback())


def test_anchor_of_an_unknown_parameter_in_the_checkpoint(tmp_path: Path) -> None:
    message = (
        "The checkpoint's anchor of 'neck.weight' has shape (2,), found no such parameter among those to constrain..."
    )
    with says(message):
        resume(tampered(tmp_path, "neck.weight", torch.zeros(2)), TPGMCallback())


def test_two_instances_with_the_same_exclude() -> None:
    with pytest.raises(RuntimeError, match=r"Found more than one stateful callback of type `TPGMCallback`"):
        quiet_trainer(TPGMCallback(exclude=["a"]), TPGMCallback(exclude=["a"], norm="l2"))


def test_two_instances_for_the_same_parameters() -> None:
    message = (
        "TPGMCallback(...exclude=('head.*',)...) and TPGMCallback(...exclude=()...) both act on 9 tensors,"
        " 'backbone.0.bias' among them. What the first does then counts twice, or for nothing. Exclude them in one."
    )
    with says(message):
        fit(toy(), TPGMCallback(exclude=["head.*"]), TPGMCallback(val_loader()))


# --- a held-out loss that is not finite


class Sometimes:
    """A loss that is not finite, or whose gradient is not, in some evaluations."""

    def __init__(self, bad: Mapping[int, float], where: str) -> None:
        self.bad, self.where, self.calls = bad, where, 0

    def __call__(self, module: Toy, batch: Any) -> Tensor:
        self.calls += 1
        loss = module.loss(batch)
        if self.calls not in self.bad:
            return loss
        value = self.bad[self.calls]
        if self.where == "loss":
            return loss * value
        loss.register_hook(lambda grad: grad * value)
        return loss


class Record(pl.Callback):
    """The radii's state after every batch."""

    def __init__(self, callback: TPGMCallback) -> None:
        self.callback, self.states = callback, []

    def on_train_batch_end(self, *_: Any) -> None:
        self.states.append(self.callback.state_dict()["method"]["radii"])


@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_update_is_skipped_with_one_warning(where: str, value: float) -> None:
    """Adam stands still in the third to fifth updates; a radius changes at most by the clamp; training goes on."""
    module = toy()
    callback = TPGMCallback(loss=Sometimes({3: value, 4: value, 5: value}, where), every_n_steps=1)
    record = Record(callback)
    with told() as warned:
        fit(module, callback, record)
    assert [text for text in warned if "held-out loss" in text] == [
        "The held-out loss, or its gradient, is not finite: that radius update was skipped, training goes on. Further"
        " ones are skipped without a warning."
    ]

    moved = record.states[-1]["value"].isfinite()  # a bias before a norm does not, and has no radius
    adam = [{key: state[key][moved] for key in ("exp_avg", "exp_avg_sq", "step")} for state in record.states]
    assert_same(adam[1], adam[2])
    assert_same(adam[2], adam[4])
    assert [state["step"].unique().tolist() for state in adam] == [[1], [2], [2], [2], [2], [3]]
    radii = [state["value"][moved] for state in record.states]
    for before, after in pairwise(radii[1:5]):
        assert (after <= before.clamp(min=1e-8)).all()  # that far a radius is lifted when its tensor begins to move
    assert all(torch.isfinite(parameter).all() for parameter in module.parameters())


def test_non_finite_in_the_first_update() -> None:
    """The radii have their first values, half of the smallest distance, and start learning with the next update."""
    callback = TPGMCallback(loss=Sometimes({1: float("nan")}, "loss"), every_n_steps=1)
    with told() as warned:
        fit(toy(), callback)
    assert any("not finite: that radius update was skipped" in text for text in warned)
    radii = callback.state_dict()["method"]["radii"]
    assert radii["step"][radii["value"].isfinite()].unique().tolist() == [5]
    assert callback.radii["hidden.weight"] > 0
