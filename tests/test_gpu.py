"""On a CUDA device the callbacks follow the run on the CPU and never make the device wait. Where it makes sense each
test runs on the CPU, too, which shows that its body works.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_tpgm import (
    AnchorDecayCallback,
    DiGraPCallback,
    FTPCallback,
    L2SPCallback,
    SPDCallback,
    TPGMCallback,
)
from lightning_tpgm.callbacks.method import MethodCallback
from lightning_tpgm.callbacks.radii import WithRadii
from properties import assert_inside_balls
from toys import FEATURES, AfterEachStep, Blobs, Classifier, blobs, seed_everything, trainer_in, weights_of

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])]
METHODS: dict[str, Callable[..., MethodCallback]] = {  # so strong that they show
    "TPGM mars": TPGMCallback,
    "TPGM l2": partial(TPGMCallback, norm="l2", radius_steps=2),
    "FTP": FTPCallback,
    "SPD": SPDCallback,
    "DiGraP": partial(DiGraPCallback, omega_lr=0.5),
    "L2-SP": partial(L2SPCallback, strength=1.0),
    "AnchorDecay": partial(AnchorDecayCallback, strength=1.0),
}
# How far the run may be from that in 32-true on the CPU, as a fraction of the way that the latter went: sums have
# another order on a GPU, float16 has a relative resolution of 2^-11, bfloat16 of 2^-8, either adds up over 16 steps.
PRECISIONS = {"32-true": 0.001, "16-mixed": 0.05, "bf16-mixed": 0.3}


def held_out() -> DataLoader[Any]:
    return DataLoader(blobs(24, seed=3), batch_size=4)


def sgd(module: Classifier) -> torch.optim.Optimizer:
    """Goes too far and comes back: otherwise SPD and DiGraP would have nothing to do."""
    return torch.optim.SGD(module.parameters(), lr=0.5, momentum=0.9)


def fused(module: Classifier) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=0.02, fused=True)


def run(
    tmp_path: Path,
    device: str,
    *callbacks: pl.Callback,
    precision: str = "32-true",
    module: Classifier | None = None,
    optimizer: Callable[[Classifier], torch.optim.Optimizer] = sgd,
    **options: Any,
) -> Classifier:
    """Four epochs of four steps; the module afterwards, on the CPU."""
    seed_everything(0)
    module = module or Classifier()
    module.configure_optimizers = lambda: optimizer(module)  # type: ignore[method-assign]
    if precision == "16-mixed":  # a scale that skips no step
        scaler = torch.amp.GradScaler(device, init_scale=256.0)
        options["plugins"] = [MixedPrecision("16-mixed", device, scaler)]
    else:
        options["precision"] = precision
    accelerator = "gpu" if device == "cuda" else "cpu"
    trainer_in(tmp_path, accelerator=accelerator, callbacks=list(callbacks), max_epochs=4, **options).fit(
        module, Blobs()
    )
    return module.cpu()


def apart(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return float(torch.cat([(a[name].double() - b[name].double()).flatten() for name in b]).norm())


def assert_follows(found: Classifier, expected: Classifier, tolerance: float) -> None:
    start, reference = weights_of(type(expected)()), weights_of(expected)
    assert apart(weights_of(found), reference) <= tolerance * apart(reference, start)


def assert_inside(found: Classifier, callback: MethodCallback) -> None:
    """Of its balls, if the method has any."""
    if isinstance(callback, WithRadii):
        assert_inside_balls(found, callback.anchor, callback.radii, callback.norm)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_shows(method: str, tmp_path: Path) -> None:
    """Else a run could follow the one on the CPU without it."""
    plain, found = (run(tmp_path, "cpu", *callbacks) for callbacks in ([], [METHODS[method]()]))
    start = weights_of(Classifier())
    assert apart(weights_of(found), weights_of(plain)) > 0.01 * apart(weights_of(plain), start)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("method", METHODS)
def test_follows_the_cpu(method: str, precision: str, device: str, tmp_path: Path) -> None:
    callback = METHODS[method]()
    found = run(tmp_path, device, callback, precision=precision)
    assert_follows(found, run(tmp_path, "cpu", METHODS[method]()), PRECISIONS[precision])
    assert_inside(found, callback)
    assert {anchor.device.type for anchor in callback.anchor.values()} == {"cpu"}  # after the fit


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_fused_optimizer(precision: str, device: str, tmp_path: Path) -> None:
    """The projection sees the weights that the fused kernel wrote."""
    callback = TPGMCallback()
    found = run(tmp_path, device, callback, precision=precision, optimizer=fused)
    assert_follows(found, run(tmp_path, "cpu", TPGMCallback(), optimizer=fused), PRECISIONS[precision])
    assert_inside_balls(found, callback.anchor, callback.radii)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("method", METHODS)
def test_deterministic_run_of_16_bits(
    method: str, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing that the method does is refused, and a second run ends at the same bits."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as Lightning does, which leaves it
    try:
        ends = [
            run(tmp_path, device, METHODS[method](), precision="bf16-true", deterministic=True).state_dict()
            for _ in range(2)
        ]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(map(torch.equal, *(end.values() for end in ends)))


@pytest.mark.parametrize("device", DEVICES)
def test_compiled_submodule(device: str, tmp_path: Path) -> None:
    """On a GPU by the default backend."""
    module, callback = Classifier(), TPGMCallback()
    plain = module.backbone
    module.backbone = torch.compile(plain, **({} if device == "cuda" else {"backend": "aot_eager"}))
    found = run(tmp_path, device, callback, module=module)
    found.backbone = plain
    assert_follows(found, run(tmp_path, "cpu", TPGMCallback()), 0.001)
    assert_inside_balls(found, callback.anchor, callback.radii)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize("device", DEVICES)
def test_pinned_loader_with_workers(device: str, tmp_path: Path) -> None:
    pinned = DataLoader(held_out().dataset, 4, pin_memory=device == "cuda", num_workers=2)
    found = run(tmp_path, device, TPGMCallback(pinned))
    assert_follows(found, run(tmp_path, "cpu", TPGMCallback(held_out())), 0.001)


class Recurrent(Classifier):
    """With a layer that cuDNN goes back through in train mode alone."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.rnn = nn.LSTM(FEATURES, FEATURES, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.rnn(x[:, None])[0][:, -1])


@pytest.mark.parametrize("device", DEVICES)
def test_recurrent_layers_in_the_held_out_evaluation(device: str, tmp_path: Path) -> None:
    callback = TPGMCallback(every_n_steps=1)
    found = run(tmp_path, device, callback, module=Recurrent())
    assert_follows(found, run(tmp_path, "cpu", TPGMCallback(every_n_steps=1), module=Recurrent()), 0.001)
    assert_inside_balls(found, callback.anchor, callback.radii)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("method", METHODS)
def test_anchors_in_the_hosts_memory(method: str, device: str, tmp_path: Path) -> None:
    """They are pinned there, so that copies of them wait for nothing."""
    callback = METHODS[method](anchor_device="cpu")
    where: set[tuple[str, bool]] = set()

    def look(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        where.update(
            (anchor.device.type, anchor.is_pinned()) for anchor in callback._constraint.anchors.joined.values()
        )

    found = run(tmp_path, device, callback, AfterEachStep(look))
    assert where == {("cpu", device == "cuda")}
    assert_follows(found, run(tmp_path, "cpu", METHODS[method]()), 0.001)
    assert_inside(found, callback)


@pytest.fixture
def default_sync_mode() -> Iterator[None]:
    yield
    if torch.cuda.is_available():
        torch.cuda.set_sync_debug_mode("default")


class SyncMode(AfterEachStep):
    """Sets what torch does when a GPU is waited for, at each moment of a step that callbacks act at, in their order.

    The first steps may fill caches.
    """

    def __init__(self, device: str, mode: str) -> None:
        super().__init__(self._switch)
        self.device, self.mode = device, mode

    def _switch(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.device == "cuda" and trainer.fit_loop.total_batch_idx > 1:
            torch.cuda.set_sync_debug_mode(self.mode)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        for optimizer in trainer.optimizers:
            optimizer.register_step_pre_hook(lambda *_: self.function(trainer, pl_module))

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        self.function(trainer, pl_module)


@pytest.mark.usefixtures("default_sync_mode")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("optimizer", [sgd, fused])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("method", METHODS)
def test_nothing_waits_for_the_device(method: str, precision: str, optimizer: Any, device: str, tmp_path: Path) -> None:
    """In all that a callback does before and after an optimizer step, the held-out evaluation included."""
    callback = METHODS[method]()
    if callback.make_method().reads_gradients and optimizer is fused and precision == "16-mixed":
        pytest.skip("refused under a gradient scaler: see test_contract.py")
    if isinstance(callback, TPGMCallback):  # batches that are on the device: to bring them there is the loader's affair
        callback.dataloader = lambda: [[part.to(device) for part in batch] for batch in held_out()]
    around = SyncMode(device, "error"), SyncMode(device, "default")
    found = run(tmp_path, device, around[0], callback, around[1], precision=precision, optimizer=optimizer)
    assert_inside(found, callback)
