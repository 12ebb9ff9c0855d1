"""Memory and time of transformers of 10 million to a billion parameters: the methods beside plain training, on CPU.

Every fit is a process of its own, or two with FSDP2. What is in large.csv is not measured again. Fits that need more
than the machine's memory are left out.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from lightning_tpgm import FTPCallback, SPDCallback, TPGMCallback
from models import CLASSES, Transformer
from overhead import RESULTS, HeldOut, Module, append, done

SIZES = ((256, 12), (512, 10), (768, 14), (1024, 24), (1536, 20), (2048, 20))  # width and depth
WORDS = 1000
STEPS = 5  # the first is not timed; of the other four one updates the radii
PLAIN, AT_END = "plain", "TPGM at the end, from a file"
METHODS: dict[str, Callable[[Path], pl.Callback]] = {
    "FTP": lambda file: FTPCallback(),
    "SPD": lambda file: SPDCallback(),
    "TPGM": lambda file: TPGMCallback(HeldOut()),
    AT_END: lambda file: TPGMCallback(
        HeldOut(), when="fit_end", radius_steps=4, pretrained=str(file), save_anchor=False
    ),
}
COPIES = {PLAIN: 2.5, "FTP": 4.5, "SPD": 4.5, "TPGM": 5.5, AT_END: 5.5}
"""Memory of a fit, in units of the weights: to leave out what does not fit."""


class Large(Module):
    """A transformer with random weights, trained by SGD without momentum, so that the methods' own memory shows.

    Args:
        width: Of the transformer.
        depth: Its blocks.
        is_split: Whether FSDP2 splits it.
    """

    def __init__(self, width: int, depth: int, is_split: bool) -> None:
        super().__init__(nn.Identity())
        self.width, self.depth, self.is_split = width, depth, is_split
        if not is_split:
            self.model = self._network()

    def _network(self) -> Transformer:
        words = nn.Embedding(WORDS, self.width)
        return Transformer(words, self.width, self.depth, self.width // 64)

    def configure_model(self) -> None:
        """Split it before it has memory: no process ever holds the whole."""
        if not self.is_split or isinstance(self.model, Transformer):
            return
        with torch.device("meta"):
            self.model = self._network()
        mesh = self.device_mesh["data_parallel"]
        for block in self.model.blocks.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(self.model, mesh=mesh)
        self.model.to_empty(device="cpu")
        with torch.no_grad():
            for parameter in self.model.parameters():
                (parameter.to_local() if isinstance(parameter, DTensor) else parameter).normal_(0, 0.02)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """No state of its own."""
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class Watch(pl.Callback):
    """Seconds of each step, and the most memory that the process has held beyond what it holds now."""

    def __init__(self) -> None:
        self.before = held()
        self.seconds, self.peak, self.running = list[float](), 0, True
        self.thread = threading.Thread(target=self._look, daemon=True)
        self.thread.start()

    def _look(self) -> None:
        while self.running:
            self.peak = max(self.peak, held() - self.before)
            time.sleep(0.005)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """A step begins."""
        self.started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """It has ended, and what the methods do has, too."""
        now = time.perf_counter()
        self.seconds.append(now - self.started)
        self.during, self.started = self.peak, now

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """What the methods do at the end is done."""
        self.end = time.perf_counter() - self.started
        self.running = False
        self.thread.join()


def held() -> int:
    """Bytes of this process, without what is mapped from files."""
    return 1024 * int(re.search(r"RssAnon:\s*(\d+) kB", Path("/proc/self/status").read_text())[1])


def one(width: int, depth: int, method: str, processes: int, file: Path) -> None:
    """A fit, whose figures are printed: the other end of `measured`."""
    torch.manual_seed(0)
    watch = Watch()
    module = Large(width, depth, is_split=processes > 1)
    batch = [torch.randint(WORDS, (1, 16)), torch.randint(CLASSES, (1,))]
    HeldOut.batch = batch
    trainer = pl.Trainer(
        max_steps=STEPS,
        accelerator="cpu",
        devices=processes,
        strategy=ModelParallelStrategy(processes, tensor_parallel_size=1) if processes > 1 else "auto",
        callbacks=[*([METHODS[method](file)] if method in METHODS else []), watch],
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader([batch] * STEPS, batch_size=None))
    parameters = sum(parameter.numel() for parameter in module.parameters())
    found = {"parameters": parameters, "seconds": mean(watch.seconds[1:]), "end": watch.end}
    line = json.dumps(found | {"during": watch.during, "peak": watch.peak})
    os.write(sys.stdout.fileno(), f"{line}\n".encode())  # at once: two processes write to the same pipe
    if dist.is_initialized():
        dist.destroy_process_group()


def measured(width: int, depth: int, method: str, processes: int) -> dict[str, Any]:
    """Seconds of the slowest process, bytes of all together."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    threads = str(max(1, torch.get_num_threads() // processes))
    # what is freed goes back at once: else glibc keeps up to half of a small model's weights, by chance
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "MALLOC_MMAP_THRESHOLD_": "65536"}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "pretrained.pt"
        if method == AT_END:
            torch.save(Large(width, depth, is_split=False).state_dict(), file)
        arguments = ["--one", str(width), str(depth), method, str(processes), str(file)]
        command = [sys.executable, *launch, __file__, *arguments]
        finished = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    ranks = [json.loads(line) for line in finished.stdout.splitlines() if line.startswith("{")]
    return {
        "parameters": ranks[0]["parameters"],
        "seconds": f"{max(rank['seconds'] for rank in ranks):.4g}",
        "end_seconds": f"{max(rank['end'] for rank in ranks):.4g}",
        "during_bytes": sum(rank["during"] for rank in ranks),
        "peak_bytes": sum(rank["peak"] for rank in ranks),
    }


def main() -> None:
    """Measure what is not measured yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--quick", action="store_true", help="the smallest only")
    parser.add_argument("--one", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    if arguments.one:
        width, depth, method, processes, file = arguments.one
        one(int(width), int(depth), method, int(processes), Path(file))
        return
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / "large.csv"
    memory = 0.85 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for width, depth in SIZES[: 1 if arguments.quick else None]:
        for processes in (1, 2):
            for method in (PLAIN, *METHODS):
                name, what = f"{width} x {depth}", f"{method}, FSDP2" if processes > 1 else method
                fits = 4 * 12 * depth * width**2 * COPIES[method] < memory
                if fits and (name, what) not in done(path):
                    print(name, what, flush=True)
                    row = measured(width, depth, method, processes)
                    append(path, [{"model": name, "method": what, **row}])


if __name__ == "__main__":
    main()
