"""Trains a small module with a method on one or several CPU processes; run by tests/test_distributed.py.

``python -m torch.distributed.run --standalone --nproc-per-node=2 tests/distributed_worker.py FOLDER`` runs all cases in
one start of the processes and writes what each rank saw to FOLDER.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from lightning_tpgm import (
    AnchorDecayCallback,
    DiGraPCallback,
    FTPCallback,
    L2SPCallback,
    SPDCallback,
    TPGMCallback,
    WiSEFTCallback,
)
from lightning_tpgm.callbacks.method import MethodCallback
from toys import leave_group

STEPS = 6  # in two epochs
GLOBAL_BATCH = 8
METHODS: dict[str, dict[str, Any]] = {
    "tpgm_mars": {"class": TPGMCallback, "radius_lr": 0.05},
    "tpgm_l2": {"class": TPGMCallback, "norm": "l2", "radius_lr": 0.05, "radius_steps": 2, "anchor_device": "cpu"},
    "tpgm_auto": {"class": TPGMCallback, "every_n_steps": 2},
    "tpgm_fit_end": {"class": TPGMCallback, "norm": "l2", "radius_steps": 3, "when": "fit_end"},
    "ftp_mars": {"class": FTPCallback, "k": 0.5},
    "ftp_l2": {"class": FTPCallback, "norm": "l2"},
    "digrap": {"class": DiGraPCallback, "omega_lr": 0.3},
    "spd": {"class": SPDCallback, "anchor_device": "cpu"},
    "l2sp": {"class": L2SPCallback, "strength": 0.3},
    "anchor_decay": {"class": AnchorDecayCallback, "strength": 0.5},
    "wise_ft": {"class": WiSEFTCallback, "alpha": 0.3},
    "wise_ft_sweep": {
        "class": WiSEFTCallback,
        "alpha": "sweep",
        "alphas": (0.0, 0.5, 1.0),
        "monitor": "val_loss",
        "mode": "min",
    },
}
STRATEGIES = ("ddp", "fsdp2", "tensor_parallel")


class Net(nn.Module):
    """Odd sizes: rows do not divide evenly among processes, and one bias has a single element."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 10)
        self.norm = nn.LayerNorm(10)
        self.second = nn.Linear(10, 6)
        self.head = nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.norm(self.first(x)))))).squeeze(1)


class Module(pl.LightningModule):
    def __init__(self, strategy: str, optimizer: str = "sgd") -> None:
        super().__init__()
        self.strategy, self.optimizer = strategy, optimizer
        torch.manual_seed(1)
        self.net = Net().double()  # so that the order of sums does not matter to nine digits

    def configure_model(self) -> None:
        if any(isinstance(parameter, DTensor) for parameter in self.parameters()):
            return
        if self.strategy == "fsdp2":
            mesh = self.device_mesh["data_parallel"]
            fully_shard(self.net.first, mesh=mesh)
            fully_shard(self.net, mesh=mesh)
        if self.strategy in ("tensor_parallel", "mesh"):
            plan = {"second": ColwiseParallel(), "head": RowwiseParallel()}
            parallelize_module(self.net, self.device_mesh["tensor_parallel"], plan)
        if self.strategy == "sequence_parallel":  # the rows of a batch are its sequence
            parts = PrepareModuleOutput(output_layouts=Replicate(), desired_output_layouts=Shard(0))
            norm, second = SequenceParallel(sequence_dim=0), ColwiseParallel(input_layouts=Shard(0))
            plan = {"first": parts, "norm": norm, "second": second, "head": RowwiseParallel()}
            parallelize_module(self.net, self.device_mesh["tensor_parallel"], plan)
        if self.strategy == "mesh":  # parts of rows, of columns, and what is split twice
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = nn.functional.mse_loss(self.net(batch[0]), batch[1])
        self.log("loss", loss, sync_dist=True)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", nn.functional.mse_loss(self.net(batch[0]), batch[1]), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.optimizer == "adamw":
            return torch.optim.AdamW(self.parameters(), lr=0.02)
        return torch.optim.SGD(self.parameters(), lr=0.2, momentum=0.9)


class Seen(pl.Callback):
    """What a rank sees after every batch, and what it sends in the steps of optimizers."""

    COLLECTIVES = ("all_reduce", "barrier", "broadcast", "all_gather", "all_gather_object", "broadcast_object_list")

    def __init__(self, callback: MethodCallback) -> None:
        self.callback = callback
        self.learned: list[dict[str, float]] = []
        self.sent: list[str] = []
        self.place = ""  # of the anchors
        self._usual = {name: getattr(dist, name) for name in self.COLLECTIVES}

    def on_before_optimizer_step(self, *_: object) -> None:
        for name, function in self._usual.items():
            setattr(dist, name, self._noting(name, function))

    def _noting(self, name: str, function: Any) -> Any:
        def send(*args: Any, **options: Any) -> Any:
            self.sent.append(name)
            return function(*args, **options)

        return send

    def on_train_batch_end(self, *_: object) -> None:
        for name, function in self._usual.items():
            setattr(dist, name, function)
        self.place = self.callback._constraint.anchors.place
        name = "radii" if hasattr(self.callback, "radii") else "omegas"
        self.learned.append(dict(getattr(self.callback, name, {})))


def data(rows: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(
        *(torch.randn(*size, generator=generator, dtype=torch.float64) for size in ((rows, 6), (rows,)))
    )


def full_weights(module: pl.LightningModule) -> dict[str, Tensor]:
    whole = {}
    for name, parameter in module.named_parameters():
        value = parameter.detach()
        whole[name] = (value.full_tensor() if isinstance(value, DTensor) else value).clone()
    return whole


def train(
    strategy: str,
    method: str,
    *,
    rank: int = 0,
    world_size: int = 1,
    own_loader: bool = False,
    file: Path | None = None,
    optimizer: str = "sgd",
    max_steps: int = STEPS,
    save_to: Path | None = None,
    resume_from: Path | None = None,
    shards: bool = False,
) -> dict[str, Any]:
    """One fit; the result holds what this rank saw."""
    # the processes of one tensor-parallel group see the same batches
    groups = {"tensor_parallel": (1, 0), "sequence_parallel": (1, 0), "mesh": (2, rank // 2)}
    shares, share = groups.get(strategy, (world_size, rank))
    batch = GLOBAL_BATCH // shares
    train_set, held_out = data(STEPS * GLOBAL_BATCH, seed=2), data(3 * GLOBAL_BATCH, seed=3)
    sampler = DistributedSampler(train_set, shares, share, shuffle=False)
    options = {name: value for name, value in METHODS[method].items() if name != "class"}
    if METHODS[method]["class"] is TPGMCallback and not own_loader:
        options["dataloader"] = DataLoader(held_out, batch)
    if file is not None:
        options |= {"pretrained": file, "save_anchor": False}
    callback = METHODS[method]["class"](exclude=["net.head.bias"], **options)
    seen = Seen(callback)
    module = Module(strategy, optimizer)
    meshes = {"fsdp2": (2, 1), "tensor_parallel": (1, 2), "sequence_parallel": (1, 2), "mesh": (2, 2)}
    sizes = meshes.get(strategy, (1, 1))
    strategies: dict[str, Any] = {
        "single": "auto",
        "ddp": DDPStrategy(process_group_backend="gloo"),
        "ddp_find_unused": DDPStrategy(process_group_backend="gloo", find_unused_parameters=True),
        "ddp_static": DDPStrategy(process_group_backend="gloo", static_graph=True),
    }
    if strategy not in strategies:
        strategies[strategy] = ModelParallelStrategy(*sizes, save_distributed_checkpoint=shards)
    pl.seed_everything(5, verbose=False)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=world_size,
        strategy=strategies[strategy],
        max_steps=max_steps,
        limit_train_batches=STEPS // 2,
        callbacks=[callback, seen],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=True,
        num_sanity_val_steps=2,
    )
    weights: dict[str, Tensor] = {}

    class Collect(pl.Callback):  # while the processes are together
        def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            weights.update(full_weights(pl_module))
            if save_to is not None:
                trainer.save_checkpoint(save_to)

    trainer.callbacks.append(Collect())
    trainer.fit(
        module, DataLoader(train_set, batch, sampler=sampler), DataLoader(held_out, batch), ckpt_path=resume_from
    )
    anchor = {name: _whole(value) for name, value in callback.anchor.items()}
    return {"weights": weights, "learned": seen.learned, "sent": seen.sent, "place": seen.place, "anchor": anchor}


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def pretrained_file(folder: Path) -> Path:
    """What all fits start from."""
    torch.save(Module("single").state_dict(), folder / "pretrained.pt")
    return folder / "pretrained.pt"


SUMMED = ("tpgm_mars", "ftp_mars", "digrap", "spd", "l2sp")  # what goes by gradients, which are parts of a sum
FROM_FILE = ("tpgm_mars", "tpgm_fit_end", "wise_ft")
# saved after the first epoch on the first and resumed on the second
RESUMED = [("single", "ddp"), ("ddp", "single"), ("single", "fsdp2"), ("fsdp2", "single"), ("fsdp2", "fsdp2")]
RESUMED_METHODS = ("tpgm_mars", "ftp_mars", "digrap")
# by the strategy that saved: checkpoints that name the file of the anchors, and folders of shards
RESUMED_ALIKE = [("ddp", "file"), ("fsdp2", "file"), ("fsdp2", "shards")]


def cases(folder: Path) -> dict[str, dict[str, Any]]:
    """What runs on two processes, in order; checkpoints of one process are in the folder already."""
    found: dict[str, dict[str, Any]] = {}
    for strategy in STRATEGIES:
        for method in METHODS:
            found[f"{strategy}-{method}"] = {"strategy": strategy, "method": method}
        for method in FROM_FILE:
            found[f"{strategy}-{method}-file"] = {
                "strategy": strategy,
                "method": method,
                "file": folder / "pretrained.pt",
            }
        found[f"{strategy}-own_loader"] = {"strategy": strategy, "method": "tpgm_mars", "own_loader": True}
        found[f"{strategy}-adamw"] = {"strategy": strategy, "method": "tpgm_l2", "optimizer": "adamw"}
    for method in SUMMED:
        found[f"sequence_parallel-{method}"] = {"strategy": "sequence_parallel", "method": method}
    for strategy in ("ddp_find_unused", "ddp_static"):
        found[f"{strategy}-tpgm_mars"] = {"strategy": strategy, "method": "tpgm_mars"}
    for method in RESUMED_METHODS:
        for strategy in ("ddp", "fsdp2"):
            half = {"max_steps": STEPS // 2, "save_to": folder / f"{strategy}-{method}.ckpt"}
            found[f"{strategy}-{method}-half"] = {"strategy": strategy, "method": method, **half}
        for first, second in RESUMED:
            if second != "single":
                resumed = {"resume_from": folder / f"{first}-{method}.ckpt"}
                found[f"{first}-{second}-{method}-resumed"] = {"strategy": second, "method": method, **resumed}
    for strategy, kind in RESUMED_ALIKE:
        options: dict[str, Any] = {"strategy": strategy, "method": "tpgm_mars"}
        options |= {"file": folder / "pretrained.pt"} if kind == "file" else {"shards": True}
        path = folder / f"{strategy}-{kind}.ckpt"
        found[f"{strategy}-{kind}-half"] = {**options, "max_steps": STEPS // 2, "save_to": path}
        found[f"{strategy}-{kind}-resumed"] = {**options, "resume_from": path}
    return found


def cases_of_four(folder: Path) -> dict[str, dict[str, Any]]:
    """What runs on four processes, in a mesh of two dimensions; single-METHOD.ckpt are in the folder already."""
    found: dict[str, dict[str, Any]] = {f"mesh-{method}": {"strategy": "mesh", "method": method} for method in METHODS}
    for method in FROM_FILE:
        found[f"mesh-{method}-file"] = {"strategy": "mesh", "method": method, "file": folder / "pretrained.pt"}
    for method in RESUMED_METHODS:
        half = {"max_steps": STEPS // 2, "save_to": folder / f"mesh-{method}.ckpt"}
        found[f"mesh-{method}-half"] = {"strategy": "mesh", "method": method, **half}
        for first in ("single", "mesh"):
            resumed = {"resume_from": folder / f"{first}-{method}.ckpt"}
            found[f"{first}-mesh-{method}-resumed"] = {"strategy": "mesh", "method": method, **resumed}
    return found


def main(folder: Path) -> None:
    """All cases on the processes that torchrun started; the results of a rank go to one file."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    torch.set_num_threads(1)
    results = {}
    for case, options in (cases if world_size == 2 else cases_of_four)(folder).items():
        if rank == 0:
            print(case, flush=True)
        results[case] = train(**options, rank=rank, world_size=world_size)
    torch.save(results, folder / f"rank-{rank}-of-{world_size}.pt")
    leave_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
