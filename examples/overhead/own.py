"""Time of each method's own work on the weights, beside transcriptions of the papers and copies of the weights.

Nothing is evaluated, so the size of the batch does not matter. Gradients are random, and TPGM takes them for those of
the held-out loss. In about half of the tensors SPD and DiGraP find something to do. Everything runs in one process and
in alternating rounds. What is in own.csv is not measured again. About five minutes on two cores.
"""

from __future__ import annotations

import argparse
import gc
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_tpgm import constrain
from lightning_tpgm.methods import FTP, L2SP, SPD, TPGM, DiGraP, Method, Step
from models import MODELS
from naive import NaiveDiGraP, NaiveFTP, NaiveSPD, Peer
from overhead import RESULTS, append, done, seconds

METHODS: dict[str, Callable[[], Method]] = {
    "TPGM, mars": lambda: TPGM(every_n_steps=1),
    "TPGM, l2": lambda: TPGM(every_n_steps=1, norm="l2"),
    "TPGM, no update": lambda: TPGM(every_n_steps=10**9),  # but on the first step, which is not timed
    "FTP": FTP,
    "SPD": SPD,
    "DiGraP": DiGraP,
    "L2-SP": L2SP,
}
PEERS: dict[str, Callable[[Optimizer], Peer]] = {
    "naive FTP": lambda optimizer: NaiveFTP(optimizer, "mars"),
    "naive SPD": NaiveSPD,
    "naive DiGraP": NaiveDiGraP,
}
ROUNDS = 15
WARM_UP = 3  # rounds that are not counted: the second and third have a check that training makes on every 50th step


class AtHand:
    """In place of a held-out loss: gradients that cost nothing."""

    processes = 1

    def __call__(self, parameters: Sequence[Tensor]) -> tuple[Tensor, list[Tensor | None]]:
        """A loss, and the gradients of the step."""
        return torch.ones(()), [parameter.grad for parameter in parameters]

    def mean(self, vector: Tensor) -> Tensor:
        """Over one process."""
        return vector


class Ours:
    """A method of the package, whose steps are taken by hand, with the interface of `Peer`."""

    def __init__(self, model: nn.Module, method: Method, optimizer: Optimizer) -> None:
        held_out = {"held_out_loss": lambda: torch.ones(())} if isinstance(method, TPGM) else {}
        self.constraint, self.at = constrain(model, method, optimizer, **held_out), Step(optimizer, 0)
        self.constraint.steps.stop()
        self.constraint.record_every = 10**9  # to measure distances for the report is no part of a method
        if isinstance(method, TPGM):
            method.held_out = AtHand()

    def before(self) -> None:
        """What comes before the optimizer's step."""
        self.constraint.before(self.at)
        self.constraint.change_gradients(self.at)

    def after(self) -> None:
        """What comes after it."""
        self.constraint.after(self.at)


def measured(model: nn.Module, rounds: int) -> dict[str, list[float]]:
    """Seconds of each method's own work in each round, and of the copies beside them."""
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    methods: dict[str, Ours | Peer] = {name: Ours(model, make(), optimizer) for name, make in METHODS.items()}
    methods |= {name: make(optimizer) for name, make in PEERS.items()}
    weights, copy = ([p.detach().clone() for p in model.parameters()] for _ in range(2))
    times: dict[str, list[float]] = {}
    for round_ in range(-WARM_UP, rounds):
        for name, method in methods.items():
            for parameter in model.parameters():
                parameter.grad = torch.randn_like(parameter)
            with torch.no_grad():
                copying = seconds(torch._foreach_copy_, copy, weights)
                own = seconds(method.before)
                optimizer.step()
                own += seconds(method.after)
            if round_ >= 0:
                times.setdefault("copy", []).append(copying)
                times.setdefault(name, []).append(own)
    return times


def main() -> None:
    """Measure what is not measured yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--quick", action="store_true", help="one round of the last two models")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / "own.csv"
    gc.freeze()  # `seconds` collects garbage each time, and need not look at what is there already
    for name, (make, _) in [*MODELS.items()][-2 if arguments.quick else 0 :]:
        if (name, "1") in done(path):
            continue
        print(name, flush=True)
        model = make()
        sizes = [p.numel() for p in model.parameters()]
        key = {"model": name, "batch": 1, "parameters": sum(sizes), "tensors": len(sizes)}
        times = measured(model, 1 if arguments.quick else ROUNDS)
        append(path, [key | {"what": w, "seconds": f"{median(t):.6g}", "rounds": len(t)} for w, t in times.items()])


if __name__ == "__main__":
    main()
