"""Lightning's life cycle for any method: the one class that has Lightning's hooks."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_tpgm.anchors import AnchorDevice
from lightning_tpgm.callbacks.asked import Asked
from lightning_tpgm.callbacks.averages import end_averages
from lightning_tpgm.callbacks.copies import PlainCopies
from lightning_tpgm.callbacks.framework import (
    Callback,
    callbacks_of,
    join_later_imports,
    logs_are_due,
    pl,
    rank_zero_info,
    rank_zero_warn,
)
from lightning_tpgm.callbacks.logs import Log, Logs
from lightning_tpgm.callbacks.neighbours import check_neighbours, check_others, warn_of_leaving
from lightning_tpgm.callbacks.shared import as_plain_numbers, check_shared, configuration_errors, write_out_shared
from lightning_tpgm.callbacks.surroundings import (
    check_something_to_do,
    check_step_was_seen,
    check_strategy,
    no_state,
    steps_of,
    tell_of_moving_statistics,
    warn_of_no_steps,
    warn_of_random_anchors,
)
from lightning_tpgm.constraint import Constraint
from lightning_tpgm.methods.method import Method, Step
from lightning_tpgm.pretrained import Pretrained, path_of, read_pretrained
from lightning_tpgm.selection import constrainable
from lightning_tpgm.sharding import reshard
from lightning_tpgm.steps import Steps


class MethodCallback(Asked, PlainCopies, Callback):
    """Lets a method act on a module while a `Trainer` fits it.

    The arguments are those of `lightning_tpgm.callbacks.shared.Shared`; callbacks add their own. Nothing is read from
    the device but when the trainer's ``log_every_n_steps`` says that logs are due.
    """

    _KEY = ""  # what logged names begin with
    _METHOD: type[Any] = Method
    _SHOWN: tuple[str, ...] = ()  # the arguments in `repr`, the method's own if there are none

    def __init__(
        self,
        exclude: Sequence[str] = (),
        pretrained: Pretrained | None = None,
        log: Log = "summary",
        summary: bool = False,
        anchor_device: AnchorDevice = None,
        save_anchor: bool = True,
    ) -> None:
        join_later_imports()
        check_shared(exclude, pretrained, log, summary, anchor_device, save_anchor)
        self.exclude = tuple(exclude)
        self.pretrained = pretrained
        self._logged = log  # `log` is taken: Lightning gives its callbacks the module's method of that name
        self.summary = summary
        self.anchor_device, self.save_anchor = anchor_device, save_anchor
        vars(self).update(as_plain_numbers(vars(self)))
        self._start_anew()

    @override
    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "__init__" in vars(cls):
            write_out_shared(cls, vars(cls)["__init__"], MethodCallback.__init__)

    def make_method(self) -> Any:
        """A new method with this callback's arguments of the same names."""
        return self._METHOD(**{name: getattr(self, name) for name in inspect.signature(self._METHOD).parameters})

    @override
    def _start_anew(self) -> None:
        """Back to the state of a new callback."""
        self._logs = Logs(self._KEY, self._logged)
        with configuration_errors():
            arguments = self.make_method(), self.anchor_device, self.save_anchor, type(self).__name__
        self._constraint = Constraint(*arguments, rank_zero_warn, rank_zero_info)
        self._constraint.steps = Steps(self._before_step, self._settle, self._after_step)
        self._loaded: dict[str, Any] | None = None  # a checkpoint's state, until the fit starts
        self._fitted: Callable[[], pl.LightningModule | None] = lambda: None  # a weak reference: the last fit's module
        self._announced: Optimizer | None = None  # whose gradients Lightning said were there
        self._saw_batch = False  # in this epoch

    @override
    def __repr__(self) -> str:
        """One line with the arguments that shape the method."""
        shown = self._SHOWN or (*inspect.signature(self._METHOD).parameters, "exclude")
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)!r}' for name in shown)})"

    # ---- Lightning's hooks

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuses unsupported strategies and reads ``pretrained``, so that mistakes show before any work is done."""
        if stage != "fit":
            return
        if trainer.fit_loop.total_batch_idx < 0:  # a fresh trainer: a checkpoint that it resumes from is loaded later
            self._start_anew()
        check_strategy(trainer, type(self).__name__)
        if self.pretrained is not None:
            with configuration_errors():
                read_pretrained(self.pretrained)  # again when the fit starts: a file may change until then

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Captures or restores the anchors: the first moment at which all strategies have loaded all weights."""
        self._begin(trainer, pl_module)
        check_neighbours(trainer, self)
        self._saw_batch = False
        self._follow(trainer)

    def _follow(self, trainer: pl.Trainer) -> None:
        with configuration_errors():
            self._constraint.follow(trainer.optimizers)

    def _join(self, stepped: Collection[int] = ()) -> None:
        """Take in what has thawed or is stepped, unless another callback acts on it that does not go with this one."""
        if self._constraint.join(stepped) and (module := self._fitted()) is not None:
            check_others(module.trainer, self)

    def _before_step(self, step: Step) -> None:
        # Lightning's hook does not announce a step of the bare optimizer, and closures may be called at other weights
        by_hand = (module := self._fitted()) is not None and not module.automatic_optimization
        self._constraint.retake(settled=by_hand)
        self._join()
        self._constraint.before(step, look_now=by_hand)

    def _settle(self, step: Step) -> None:
        self._constraint.settle(step, self._join)  # the training step may have frozen and thawed layers

    def _after_step(self, step: Step) -> None:
        if self._constraint.method.changes_gradients:
            check_step_was_seen(step.optimizer, self._announced, type(self).__name__)
            self._announced = None
        self._constraint.after(step)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Follows what was replaced, and takes in parameters that were unfrozen, since the last batch."""
        begins, self._saw_batch = not self._saw_batch, True
        self._follow(trainer)
        if begins:
            self._constraint.find_tensors()
            self._constraint.retake(buffers=True)
        self._join()

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Changes the gradients, if the method does: they are unscaled and not clipped yet."""
        self._announced = optimizer
        self._constraint.retake(settled=True)  # the module's own hooks and its step run later than this callback
        step = self._constraint.steps.step_of(optimizer)
        if step is not None:  # one that was replaced since the batch began is followed no more
            if not self._constraint.is_settled:
                self._join(self._constraint.stepped(step))
            with configuration_errors():
                self._constraint.change_gradients(step)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs, at the trainer's cadence; says after the first batch what spoils a fit."""
        if trainer.fit_loop.total_batch_idx == 0:
            tell_of_moving_statistics(trainer, pl_module, self)
        if not logs_are_due(trainer):
            return
        quantities = self._constraint.quantities()
        anchors = self._constraint.anchors.joined  # `anchor` would read a file where they stay in it
        self._logs.due(trainer, pl_module, self._constraint.reporter, anchors, quantities)
        for trouble in self._constraint.troubles(quantities):
            rank_zero_warn(trouble)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Warns if no optimizer has stepped: then nothing is constrained."""
        missed, self._saw_batch = self._saw_batch and not self._constraint.steps.any_seen, False
        self._constraint.steps.any_seen = False
        if missed:
            warn_of_no_steps(type(self).__name__)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stops following the optimizers; methods that act at the end do so."""
        self._stop()
        self._constraint.finish()
        if self._constraint.method.acts_at_end:
            callbacks = callbacks_of(trainer)
            end_averages(callbacks[: callbacks.index(self)])
        self._conclude(trainer)

    def _stop(self) -> None:
        """No step follows: what happens at the end may need the anchors."""
        self._constraint.steps.stop()
        with configuration_errors():
            self._constraint.fetch()

    def _conclude(self, trainer: pl.Trainer) -> None:
        """Keep the values at the end of the fit, and log them."""
        quantities = self._constraint.quantities()
        self._constraint.reporter.conclude(quantities)
        self._logs.end(trainer, self._constraint.reporter, self.anchor, quantities, self._scalars())

    def _scalars(self) -> dict[str, Tensor]:
        """What else is logged at the end, by name."""
        return {}

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Says which weights have left their balls since; prints the summary, if that was asked for."""
        warn_of_leaving(trainer, self)
        if self.summary and trainer.is_global_zero:
            self._constraint.reporter.print_table(self.anchor)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Lets go of the module; what was learned stays for a checkpoint that is written now."""
        with suppress(RuntimeError):  # of a device that is broken: the user's own exception is the one to see
            self._let_go()

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Lets go of the module and of device memory; what a later `save_checkpoint` needs stays, on the CPU."""
        self._let_go()

    def _let_go(self) -> None:
        self._announced = None
        for name in ("log", "log_dict"):  # the module's, which Lightning has given its callbacks
            vars(self).pop(name, None)
        self._constraint.steps.stop()
        self._constraint.release()

    @property
    @override
    def state_key(self) -> str:
        """Two instances with different `exclude` have different keys."""
        return self._generate_state_key(exclude=sorted(self.exclude))

    @override
    def state_dict(self) -> dict[str, Any]:
        """Anchors, the names that may join, and what was learned, on the CPU; empty before the fit has started."""
        if self._loaded is not None:  # asked for between loading and the start of the fit, by a tuner
            return self._loaded
        return {} if self._constraint.anchors.origin == "none" else self._constraint.state_dict()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps the state until the fit starts: strategies differ in whether the module is ready now."""
        if self._constraint.steps.optimizers and state_dict:  # in mid-fit: a tuner puts back what was before it
            self._constraint.load(state_dict)
        else:
            self._loaded = state_dict or None

    def _begin(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the constrained parameters of this fit, their anchors, and what was learned before."""
        reshard(pl_module)
        self._constraint.steps.stop()
        state, same, fresh = self._loaded, self._fitted() is pl_module, trainer.fit_loop.total_batch_idx < 0
        with configuration_errors():
            given = None if self.pretrained is None else read_pretrained(self.pretrained)
            candidates = constrainable(pl_module, self.exclude, buffers=self._constraint.method.constrains_buffers)
            if state is not None:
                self._constraint.restore(pl_module, candidates, state, given, path_of(self.pretrained))
            elif same and not fresh and self._constraint.anchors.origin != "none" and trainer.ckpt_path is None:
                self._constraint.go_on(pl_module, candidates, given)
            else:
                if not fresh and trainer.ckpt_path is not None and given is None:
                    raise ValueError(no_state(trainer.ckpt_path, type(self).__name__, self.state_key))
                if given is None:
                    warn_of_random_anchors(pl_module, type(self).__name__)
                self._start_anew()
                self._constraint.begin(pl_module, candidates, given, path_of(self.pretrained))
        self._loaded = None
        self._constraint.record_every = max(1, trainer.log_every_n_steps)  # type: ignore[attr-defined]
        self._constraint.reporter.run = steps_of(trainer)
        self._fitted = weakref.ref(pl_module)
        check_something_to_do(trainer, pl_module, self)
