"""Faults that come of one object doing everything, each looked for in every method that could have it."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, TensorDataset

import lightning_tpgm.callbacks.weights
from lightning_tpgm import TPGMCallback
from properties import assert_inside_ball, assert_same
from test_contract import METHODS, Branches, Method, for_manual_optimization, outcome, parameters, run
from toys import BATCH_SIZE, images, quiet_trainer, train_loader, val_loader

Act = Callable[[pl.Trainer, Any], Any]
IN_TRAINING = {name: method for name, method in METHODS.items() if not method.at_end}
plain_sgd = partial(torch.optim.SGD, lr=0.05)  # without momentum: it has no state


@pytest.fixture(params=METHODS.values(), ids=METHODS)
def method(request: pytest.FixtureRequest) -> Method:
    return request.param


@pytest.fixture(params=IN_TRAINING.values(), ids=IN_TRAINING)
def in_training(request: pytest.FixtureRequest) -> Method:
    """One that acts on every step."""
    return request.param


class At(pl.Callback):
    """Acts in one hook, at every global step or at one."""

    def __init__(self, hook: str, act: Act, step: int | None = None) -> None:
        def at(trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
            if step in (None, trainer.global_step):
                act(trainer, pl_module)

        setattr(self, hook, at)


class Stop(Exception):
    pass


def stop(*_: Any) -> None:
    raise Stop


def fit(module: pl.LightningModule, *callbacks: pl.Callback, train: Any = None, **options: Any) -> pl.Trainer:
    """Six steps, from the same seeds every time."""
    return run(module, *callbacks, train=train, **{"max_epochs": 1, "limit_val_batches": 0, **options})


def make(method: Method, **arguments: Any) -> Any:
    """A callback whose held-out data, if it has any, are one batch: it learns the same whenever it looks at them."""
    if isinstance(method.make(), TPGMCallback):
        arguments["dataloader"] = [list(images(6, seed=2).tensors)]
    return method.make(**arguments)


def shown_by(callback: Any) -> dict[str, Any]:
    """What users see by name."""
    names = [name for name in ("anchor", "radii", "distances", "omegas") if hasattr(callback, name)]
    return {name: getattr(callback, name) for name in names}


class Wide(pl.LightningModule):
    """Two layers, whose weights are large enough to tell them from statistics."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.body, self.head = nn.Linear(16, 24), nn.Linear(24, 12)
        self.raises_in = ""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.raises_in == "held-out loss" and not self.training:
            raise Stop
        x = self.head(torch.tanh(self.body(batch[0].flatten(1))))
        return nn.functional.mse_loss(x.mean(1), batch[1].mean(1))

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.training_step(batch, batch_idx)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return Breaking(self)


class Breaking(torch.optim.SGD):
    """May raise within its third step, when the gradients are there."""

    def __init__(self, module: Wide) -> None:
        super().__init__(module.parameters(), lr=0.05, momentum=0.9)
        self.module = module

    def step(self, closure: Any = None) -> Any:
        if self.module.raises_in == "step" and self.module.trainer.global_step == 2:
            closure()
            raise Stop
        return super().step(closure)


# --- several optimizers ---


class Uneven(pl.LightningModule):
    """Manual optimization: one optimizer owns 250,500 elements and steps once, one owns 15 and steps every time."""

    def __init__(self) -> None:
        super().__init__()
        self.large, self.small = nn.Linear(500, 500), nn.Linear(4, 3)
        self.automatic_optimization = False
        self.worked: list[int] = []

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = batch[0].flatten(1)
        return self.small(x[:, :4]).square().mean() + self.large(nn.functional.pad(x, (0, 484))).square().mean()

    def training_step(self, batch: Any, batch_idx: int) -> None:
        large, small = self.optimizers()
        large.zero_grad()
        small.zero_grad()
        self.manual_backward(self.validation_step(batch, batch_idx))
        with Elements() as work:
            small.step()
        if batch_idx == 0:
            large.step()
        else:  # after the first step all tensors are measured once, for `plot`
            self.worked.append(work.count)

    def configure_optimizers(self) -> Any:
        return [plain_sgd(part.parameters()) for part in (self.large, self.small)]


class Elements(TorchDispatchMode):
    """Counts the elements that are computed, copied or written; views are none of it."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.count += sum(leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        return result


def test_a_step_works_on_its_own_tensors_only(in_training: Method) -> None:
    """The held-out loss is one of the whole module: some thousands of activations are part of the count."""
    torch.manual_seed(0)
    module, callback = Uneven(), for_manual_optimization(in_training)
    assert [sum(p.numel() for p in part.parameters()) for part in (module.large, module.small)] == [250_500, 15]
    fit(module, callback)
    assert len(callback.anchor) == 4
    assert len(module.worked) == 5
    assert all(0 < elements < 25_000 for elements in module.worked), module.worked


def test_only_gradients_of_its_own_tensors_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[int]] = []
    grad = torch.autograd.grad

    def spy(loss: Tensor, inputs: list[Tensor], **options: Any) -> Any:
        asked.append([tensor.numel() for tensor in inputs])
        return grad(loss, inputs, **options)

    monkeypatch.setattr(torch.autograd, "grad", spy)
    fit(Uneven(), for_manual_optimization(METHODS["TPGM mars"]))
    assert asked == [[12, 3], [250_000, 500], *[[12, 3]] * 5]


# --- optimizers that are replaced ---


def by_assignment(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    trainer.optimizers = [plain_sgd(pl_module.parameters())]


def by_the_strategy(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    trainer.strategy.setup_optimizers(trainer)


@pytest.mark.parametrize("replace", [by_assignment, by_the_strategy])
def test_replaced_optimizers_are_followed(in_training: Method, replace: Act, tmp_path: Path) -> None:
    """The run in which plain SGD is replaced is the run in which it is not, to the bit."""
    results, optimizers = [], set[int]()
    for acts in (lambda *_: None, replace):
        module, callback = Branches(plain_sgd), make(in_training)
        at = At("on_train_batch_end", acts, step=3)
        see = At("on_train_batch_start", lambda trainer, _: optimizers.add(id(trainer.optimizers[0])))
        trainer = fit(module, *([at, callback] if replace is by_the_strategy else [callback, at]), see)
        results.append(outcome(trainer, module, tmp_path, callback))
    assert len(optimizers) == 3
    assert_same(results[1], results[0])


class StepsTheOldOne(Branches):
    """Manual optimization; from the third batch on it steps what was its optimizer, in one way or the other."""

    def __init__(self, raw: bool) -> None:
        super().__init__(plain_sgd)
        self.automatic_optimization, self.raw = False, raw
        self.old: Any = None
        self.plain_steps = 0

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.old = self.old or self.optimizers(use_pl_optimizer=not self.raw)
        optimizer = self.old if batch_idx >= 2 else self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(sum(self.losses(batch), torch.zeros(())))
        start, grads = parameters(self), {n: p.grad.clone() for n, p in self.named_parameters()}
        optimizer.step()
        if batch_idx >= 2:
            assert_same(parameters(self), {n: start[n].add(grads[n], alpha=-0.05) for n in start})
            self.plain_steps += 1


@pytest.mark.filterwarnings("ignore:.* is outside of its ball:UserWarning")  # and this is said
@pytest.mark.parametrize("raw", [True, False], ids=["around Lightning", "as Lightning's"])
def test_optimizers_that_were_replaced_are_left_alone(method: Method, raw: bool) -> None:
    """Their steps are plain steps, with the gradients that the backward left."""
    module = StepsTheOldOne(raw)
    fit(module, for_manual_optimization(method), At("on_train_batch_end", by_assignment, step=2))
    assert module.plain_steps == 4
    inner = getattr(module.old, "optimizer", module.old)
    assert not [*inner._optimizer_step_pre_hooks, *inner._optimizer_step_post_hooks]


# --- layers that are frozen after they were constrained ---


class Freezes(pl.Callback):
    """Freezes one branch in some steps, and looks at its weights after every batch."""

    def __init__(self, steps: range) -> None:
        self.steps = steps
        self.seen: list[dict[str, Tensor]] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        pl_module.left.requires_grad_(trainer.global_step not in self.steps)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.seen.append(parameters(pl_module.left))


def batches(numbers: list[int]) -> DataLoader:
    x, y = (tensor.unflatten(0, (-1, BATCH_SIZE))[numbers].flatten(0, 1) for tensor in images(48, seed=1).tensors)
    return DataLoader(TensorDataset(x, y), BATCH_SIZE)


def test_a_frozen_layer_is_left_alone_and_goes_on_when_it_thaws(method: Method) -> None:
    """As far as a layer can tell, three steps in which it is frozen are the run without these batches, to the bit."""
    frozen = range(4, 7)
    expected, reference = Branches(), make(method)
    fit(expected, reference, train=batches([i for i in range(12) if i not in frozen]))

    module, callback, freezes = Branches(), make(method), Freezes(frozen)
    fit(module, callback, freezes, train=batches([*range(12)]))
    for step in frozen:
        assert_same(freezes.seen[step], freezes.seen[3])
    assert not torch.equal(freezes.seen[7]["weight"], freezes.seen[3]["weight"])
    assert_same(parameters(module.left), parameters(expected.left))
    assert_same(left_of(callback), left_of(reference))


def left_of(callback: Any) -> dict[str, Any]:
    """What is known of the left branch."""
    return {kind: {n: v for n, v in of.items() if "left" in n} for kind, of in shown_by(callback).items()}


@cache
def plain_right() -> Tensor:
    """The weight of the right branch after a fit without callback: it does not know what happens to the left one."""
    module = Branches()
    fit(module, train=batches([*range(12)]))
    return module.right.weight.detach()


def test_a_layer_that_is_frozen_at_the_end_is_left_alone(method: Method) -> None:
    module, callback, freezes = Branches(), make(method), Freezes(range(3, 12))
    fit(module, freezes, callback, train=batches([*range(12)]))
    assert_same(freezes.seen[3:], [freezes.seen[2]] * 9)
    assert_same(parameters(module.left), freezes.seen[2])
    assert not torch.equal(module.right.weight, plain_right())
    assert list(callback.anchor) == list(parameters(module))  # it is still constrained
    if isinstance(callback, TPGMCallback) and not method.at_end:
        assert_inside_ball(module, callback.anchor, callback.radii, callback.norm)


# --- what stays ---


def reachable(root: object, *leaves: type) -> Iterator[object]:
    """All that is alive because of an object, less what is so in any program: classes, modules, globals.

    Args:
        root: The object.
        leaves: Types of objects that are not looked at, nor into.
    """
    seen: dict[int, object] = {}
    todo = [root]
    while todo:
        found = todo.pop()
        if id(found) in seen or isinstance(found, (type, ModuleType, BuiltinFunctionType, *leaves)):
            continue
        seen[id(found)] = found
        yield found
        if isinstance(found, FunctionType):
            todo += [found.__closure__, found.__defaults__, found.__kwdefaults__]
        elif not isinstance(found, Tensor):
            todo += gc.get_referents(found)


PARTS_OF_A_FIT = (pl.Trainer, nn.Module, torch.optim.Optimizer)


def large(found: Iterable[object]) -> dict[int, torch.Size]:
    """The shapes of the tensors with more than 512 bytes, by their memory."""
    tensors = [value for value in found if isinstance(value, Tensor) and value.nbytes > 512]
    return {tensor.untyped_storage().data_ptr(): tensor.shape for tensor in tensors}


def assert_nothing_of_a_fit(callback: Any, module: nn.Module) -> None:
    """No trainer, optimizer, module or tensor of one; of larger tensors only those that a checkpoint needs."""
    found = [*reachable(callback)]
    assert [type(value).__name__ for value in found if isinstance(value, (*PARTS_OF_A_FIT, nn.Parameter))] == []
    assert not large(found).keys() & large(module.parameters()).keys()
    needed = Counter(large(tree_leaves(callback.state_dict())).values())
    assert Counter(large(found).values()) - needed == Counter()


def saved_by(trainer: pl.Trainer, folder: Path) -> Any:
    """What callbacks have in a checkpoint that is written now."""
    trainer.save_checkpoint(folder / "now.ckpt")
    return torch.load(folder / "now.ckpt", weights_only=True)["callbacks"]


MOMENTS = {
    "batch end": At("on_train_batch_end", stop, step=3),
    "before the step": At("on_before_optimizer_step", stop, step=2),
    "step": At("on_fit_start", lambda trainer, module: vars(module).update(raises_in="step")),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_nothing_stays_after_an_exception(method: Method, moment: str, tmp_path: Path) -> None:
    """But what a later save needs, which is what it would have saved before."""
    module, callback, states = Wide(), make(method), list[Any]()
    save = At("on_train_batch_end", lambda trainer, _: states.append(saved_by(trainer, tmp_path)))
    trainer = quiet_trainer(callback, save, MOMENTS[moment], limit_val_batches=0)
    with pytest.raises(Stop):
        trainer.fit(module, train_loader(), val_loader())
    assert_nothing_of_a_fit(callback, module)
    assert len(states) == (3 if moment == "batch end" else 2)
    assert_same(saved_by(trainer, tmp_path), states[-1])
    assert list(callback.anchor) == list(parameters(module))


@pytest.mark.parametrize("name", ["TPGM mars", "TPGM l2", "TPGM at fit end"])
def test_nothing_stays_after_an_exception_in_the_held_out_loss(name: str) -> None:
    module, callback = Wide(), make(METHODS[name])
    module.raises_in = "held-out loss"
    with pytest.raises((Stop, MisconfigurationException)):  # the second with likely causes
        fit(module, callback)
    assert_nothing_of_a_fit(callback, module)


def test_nothing_stays_after_an_exception_before_the_fit_begins(method: Method, tmp_path: Path) -> None:
    """What `pretrained` holds has been read by then."""
    torch.save(Wide().state_dict(), tmp_path / "pretrained.pt")
    module, callback = Wide(), make(method, pretrained=tmp_path / "pretrained.pt")
    trainer = quiet_trainer(callback, At("on_sanity_check_start", stop))
    with pytest.raises(Stop):
        trainer.fit(module, train_loader(), val_loader())
    assert_nothing_of_a_fit(callback, module)
    assert callback.state_dict() == {}
    trainer.save_checkpoint(tmp_path / "a.ckpt")


def test_nothing_stays_after_an_exception_before_the_first_batch(method: Method, tmp_path: Path) -> None:
    module, callback = Wide(), make(method)
    trainer = quiet_trainer(callback, At("on_train_epoch_start", stop), limit_val_batches=0)
    with pytest.raises(Stop):
        trainer.fit(module, train_loader(), val_loader())
    assert_nothing_of_a_fit(callback, module)
    assert_same(saved_by(trainer, tmp_path)[callback.state_key]["anchor"], parameters(module))


def test_nothing_stays_after_a_fit(method: Method, tmp_path: Path) -> None:
    module, callback, states = Wide(), make(method), list[Any]()
    trainer = fit(module, callback, At("on_train_end", lambda trainer, _: states.append(saved_by(trainer, tmp_path))))
    assert_nothing_of_a_fit(callback, module)
    assert_same([saved_by(trainer, tmp_path)], states)
    assert list(callback.anchor) == list(parameters(module))


@pytest.mark.parametrize("end", ["fit", "exception", "validation"])
def test_the_module_can_be_collected_while_the_callback_lives(end: str) -> None:
    """All methods in one test: a garbage collection takes long."""

    def train(callback: pl.Callback) -> weakref.ref[nn.Module]:
        module = Wide()
        trainer = quiet_trainer(callback, *([At("on_train_batch_end", stop)] if end == "exception" else []))
        with pytest.raises(Stop) if end == "exception" else nullcontext():
            trainer.fit(module, train_loader(2), val_loader())
        if end == "validation":
            trainer.validate(module, val_loader(), verbose=False)
        return weakref.ref(module)

    callbacks = {name: make(method) for name, method in METHODS.items()}
    modules = {name: train(callback) for name, callback in callbacks.items()}
    gc.collect()
    assert [name for name, module in modules.items() if module() is not None] == []
    assert [len(callback.report()) for callback in callbacks.values()] == [4] * len(METHODS)


def test_what_was_seen_can_be_asked_for_after_an_exception(method: Method) -> None:
    callback, seen = make(method), list[Any]()
    look = At("on_train_batch_end", lambda *_: seen.append([callback.report(), shown_by(callback)]))
    with pytest.raises(Stop):
        fit(Branches(), callback, look, At("on_train_batch_end", stop, step=3))
    assert_same([callback.report(), shown_by(callback)], seen[-1])


def fit_on_a_device_that_breaks(callback: Any, module: pl.LightningModule, patch: pytest.MonkeyPatch) -> None:
    """The user's exception is followed by one of everything that comes to the CPU in our `on_exception`."""
    on_exception = callback.on_exception

    def broken(*args: Any) -> None:
        with patch.context() as context:
            context.setattr(Tensor, "cpu", lost)
            on_exception(*args)

    def lost(*_: Any, **__: Any) -> None:
        calls.append("cpu")
        raise RuntimeError("CUDA error: the device is lost")

    calls: list[str] = []
    callback.on_exception = broken
    try:
        fit(module, callback, At("on_train_batch_end", stop, step=2))
    finally:
        assert calls
        del callback.on_exception


def test_a_broken_device_does_not_hide_the_users_exception(method: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    module = Branches()
    with pytest.raises(Stop):
        fit_on_a_device_that_breaks(make(method), module, monkeypatch)
    optimizer = module.trainer.optimizers[0]
    assert not [*optimizer._optimizer_step_pre_hooks, *optimizer._optimizer_step_post_hooks]


def test_a_broken_device_does_not_keep_the_module(method: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    module, callback = Branches(), make(method)
    with pytest.raises(Stop):
        fit_on_a_device_that_breaks(callback, module, monkeypatch)
    assert [type(value).__name__ for value in reachable(callback) if isinstance(value, nn.Parameter)] == []


# --- `pretrained` and what is frozen ---


class Thaws(pl.Callback):
    """The body is frozen until a step."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        pl_module.body.requires_grad_(False)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        pl_module.body.requires_grad_(trainer.global_step >= 3)


def test_pretrained_copies_nothing_of_what_is_frozen(
    method: Method, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The module holds its pretrained values already; neither memory nor a checkpoint holds them again."""
    monkeypatch.setattr(lightning_tpgm.callbacks.weights, "SMALL", 8)  # an evaluation copies small tensors
    torch.save({f"net.{name}": value for name, value in Wide().state_dict().items()}, tmp_path / "pretrained.pt")
    module, callback = Wide(), make(method, pretrained=tmp_path / "pretrained.pt")
    copies: list[int] = []

    def look(trainer: pl.Trainer, pl_module: Wide) -> None:
        state = saved_by(trainer, tmp_path)[callback.state_key]
        joined = trainer.global_step > 3
        assert state["waiting"] == ({} if joined else {"body.weight": None, "body.bias": None})
        assert ("body.weight" in state["anchor"]) == joined == ("body.weight" in callback.anchor)
        own = large(pl_module.parameters())
        found = large(reachable(callback, *PARTS_OF_A_FIT))
        copies.append([shape for of, shape in found.items() if of not in own].count(pl_module.body.weight.shape))

    fit(module, Thaws(), callback, At("on_train_batch_end", look))
    assert copies[:3] == [0, 0, 0]
    assert min(copies[3:]) >= 1  # the anchor: the look finds copies
    assert_same(callback.anchor["body.weight"], Wide().body.weight.detach())


# --- one Trainer, and a module that has changed ---


def fitted_and_changed(method: Method, change: Callable[[Wide], None], **arguments: Any) -> Any:
    module, callback = Wide(), make(method, **arguments)
    trainer = fit(module, callback, train=train_loader(2))
    change(module)
    trainer.fit_loop.max_epochs = 2
    return trainer, module, callback


def grow_head(module: Wide) -> None:
    module.head = nn.Linear(24, 13)


def remove_bias(module: Wide) -> None:
    module.body.bias = None


CHANGES: dict[Callable[[Wide], None], str] = {
    grow_head: r"'head\.weight' had shape \(12, 24\) in the fit before, found shape \(13, 24\) now\.",
    remove_bias: r"'body\.bias' had shape \(24,\) in the fit before, found no such parameter now\.",
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_same_trainer_with_changed_parameters(method: Method, change: Callable[[Wide], None]) -> None:
    """A clear error, the second time too; with a new trainer the callback starts from the present weights."""
    trainer, module, callback = fitted_and_changed(method, change)
    for _ in range(2):
        with pytest.raises(MisconfigurationException, match=f"^{CHANGES[change]} .*Use a new Trainer"):
            trainer.fit(module, train_loader(2), val_loader())
    start = parameters(module)
    fit(module, callback, train=train_loader(2))
    assert_same(callback.anchor, start)


def test_the_same_trainer_with_a_grown_head_that_is_excluded(method: Method) -> None:
    trainer, module, callback = fitted_and_changed(method, grow_head, exclude=["head.*"])
    trainer.fit(module, train_loader(2), val_loader())
    assert_same(callback.anchor, {f"body.{name}": value for name, value in parameters(Wide().body).items()})


def add_layers(module: Wide) -> None:
    """One at the end of the model and one in the middle of its names."""
    torch.manual_seed(5)
    module.body.register_parameter("scale", nn.Parameter(torch.full((24, 1), 1.5)))
    module.extra = nn.Linear(12, 12)
    module.body.register_forward_hook(lambda layer, _, output: output * layer.scale[:, 0])
    module.head.register_forward_hook(lambda _layer, _, output: module.extra(output))


@pytest.mark.parametrize("pretrained", [None, Wide()], ids=["", "pretrained"])
def test_the_same_trainer_takes_new_layers_in(method: Method, pretrained: Wide | None) -> None:
    """Their anchors are their present weights, those of the others the original ones; `pretrained` lacks them."""
    trainer, module, callback = fitted_and_changed(method, add_layers, pretrained=pretrained)
    start = parameters(module)
    trainer.fit(module, train_loader(2), val_loader())
    original = parameters(Wide())
    new = {} if pretrained else {name: value for name, value in start.items() if name not in original}
    assert len(new) == (0 if pretrained else 3)
    assert_same(callback.anchor, original | new)
    names = [name for name in start if name in original or name in new]  # in the order of the model
    assert [row["name"] for row in callback.report()] == names
    assert not torch.equal(module.extra.weight, start["extra.weight"])
    if not method.no_ball:
        assert_inside_ball(module, callback.anchor, callback.radii, callback.norm)


# --- copies ---


def pickled(callback: pl.Callback) -> Any:
    return pickle.loads(pickle.dumps(callback))


def test_copies_in_mid_fit(method: Method, tmp_path: Path) -> None:
    """They know what the original knows, hold nothing of its fit, and leave it as it is, to the bit."""

    def logged_fit(*others: pl.Callback) -> Any:
        module = Branches()
        options = {"logger": CSVLogger(tmp_path), "log_every_n_steps": 2}
        trainer = fit(module, *others[:1], callback, *others[1:], **options)
        return outcome(trainer, module, tmp_path, callback)

    def look(copied: Callable[[Any], Any]) -> None:
        found = copied(callback)
        assert_same([found.state_dict(), shown_by(found)], [callback.state_dict(), shown_by(callback)])
        assert_same([found.report(), repr(found)], [callback.report(), repr(callback)])
        assert not [value for value in reachable(found) if isinstance(value, (*PARTS_OF_A_FIT, nn.Parameter))]
        copies.append((found, copy.deepcopy(callback.state_dict())))

    def make_one() -> Any:
        if isinstance(make(method), TPGMCallback):
            return method.make(dataloader=DataLoader(images(10, seed=2), BATCH_SIZE, shuffle=True))
        return make(method)

    copies: list[Any] = []
    callback = make_one()
    expected = logged_fit()
    callback = make_one()
    before = At("on_train_batch_end", lambda *_: look(copy.deepcopy))
    after = At("on_train_batch_end", lambda *_: look(pickled))
    at_first = At("on_train_epoch_start", lambda *_: look(copy.deepcopy))
    assert_same(logged_fit(before, after, at_first), expected)
    assert len(copies) == 13
    for found, state in copies:  # the fit has gone on without them
        assert_same(found.state_dict(), state)


def test_a_shallow_copy_in_mid_fit_stays_as_it_is(method: Method) -> None:
    """It shares tensors with the callback, in whose memory a fit could go on."""
    callback, copies = make(method), list[Any]()
    look = At("on_train_batch_end", lambda *_: copies.extend([copy.copy(callback), pickled(callback)]), step=3)
    fit(Branches(), callback, look)
    assert_same(copies[0].state_dict(), copies[1].state_dict())


def test_a_copy_made_in_mid_fit_trains_as_a_new_callback(method: Method, tmp_path: Path) -> None:
    copies: list[Any] = []
    callback = make(method)
    fit(Branches(), callback, At("on_train_batch_end", lambda *_: copies.append(copy.deepcopy(callback)), step=3))
    results = []
    for one in (copies[0], make(method)):
        module = Branches(plain_sgd)
        results.append(outcome(fit(module, one), module, tmp_path, one))
    assert_same(*results)


class OneClassOnly(pickle.Unpickler):
    """Finds no class but one, and no function at all."""

    def __init__(self, file: Any, allowed: type) -> None:
        super().__init__(file)
        self.allowed = allowed

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) != (self.allowed.__module__, self.allowed.__qualname__):
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed")
        return self.allowed


def test_an_unfitted_callback_pickles_to_plain_data(method: Method) -> None:
    callback = method.make(exclude=["head.*"], log="all")
    found = OneClassOnly(io.BytesIO(pickle.dumps(callback)), type(callback)).load()
    assert type(found) is type(callback)
    assert repr(found) == repr(callback)
    assert_same(found.__getstate__(), callback.__getstate__())


@pytest.mark.skipif(not hasattr(torch.serialization, "safe_globals"), reason="came with torch 2.5")
@pytest.mark.parametrize("fitted", [False, True], ids=["unfitted", "fitted"])
def test_torch_loads_a_callback_with_weights_only(method: Method, fitted: bool) -> None:
    """Its own class is all that has to be allowed, also when it has learned something."""
    callback, file = method.make(exclude=["left.bias"]), io.BytesIO()
    if fitted:
        fit(Branches(), callback)
    torch.save(callback, file)
    file.seek(0)
    with torch.serialization.safe_globals([type(callback)]):
        found = torch.load(file, weights_only=True)
    assert_same(found.state_dict(), callback.state_dict())
    assert_same([repr(found), found.report()], [repr(callback), callback.report()])


# --- one sentence of contract ---


class LooksAfterItsStep(Branches):
    """The first who could see a step."""

    look: Callable[[], None]

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.look()


def test_all_is_done_when_on_train_batch_end_runs(method: Method) -> None:
    """Radius update and projection of the batch's step, whether a callback is listed before ours or after it."""
    module, callback = LooksAfterItsStep(), make(method)
    start, moments = parameters(module), {"step": list[Any](), "before": list[Any](), "after": list[Any]()}

    def look(who: str) -> None:
        moments[who].append([parameters(module), shown_by(callback), callback.report()])

    module.look = lambda: look("step")
    before, after = (At("on_train_batch_end", lambda *_, who=who: look(who)) for who in ("before", "after"))
    fit(module, before, callback, after)
    assert len(moments["step"]) == 6
    assert_same(moments["before"], moments["step"])
    assert_same(moments["after"], moments["step"])
    if not method.no_ball and not method.at_end:
        radii = [shown["radii"] for _, shown, _ in moments["before"]]
        for (weights, *_), of in zip(moments["before"], radii, strict=True):
            assert_inside_ball(weights, start, of, callback.norm)
        assert all(a != b for a, b in pairwise(radii))
