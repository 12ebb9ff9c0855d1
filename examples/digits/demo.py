"""Fine-tune an MNIST classifier on another set of digits and see how much of MNIST it forgets.

Compares the pretrained classifier, plain fine-tuning, and fine-tuning with a `TPGMCallback` added to the trainer: as it
comes, and tuned on other digits. From the root of the repository, in about three minutes on two cores:

    python examples/digits/demo.py --seeds 3 --output demo_output
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path
from typing import Any

from rich.console import Console

from data import CHECKPOINT, Digits, shifted_domains
from experiment import EPOCHS, evaluate, fine_tune, mean_accuracy, quieten_lightning
from lightning_tpgm import TPGMCallback
from model import DigitClassifier
from report import FOOTNOTE, Outcome, draw_figure, results_table

# What choose.py chose, on digits that serve neither training nor testing.
TUNED: dict[str, dict[str, Any]] = {
    "mars": {"radius_lr": 0.1, "radius_steps": 1},
    "l2": {"radius_lr": 0.01, "radius_steps": 1},
}


def main() -> None:
    """Run every method with every seed, print the table and draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="epochs of fine-tuning (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="folder of the figure")
    parser.add_argument(
        "--update-statistics",
        action="store_true",
        help="let fine-tuning change batch normalisation's running statistics",
    )
    arguments = parser.parse_args()
    if arguments.seeds < 1:
        parser.error(f"--seeds should be at least 1, found {arguments.seeds}.")

    quieten_lightning()
    console = Console(highlight=False)
    domains = shifted_domains()
    outcomes: defaultdict[str, list[Outcome]] = defaultdict(list)
    shown: list[TPGMCallback] = []

    def record(method: str, model: DigitClassifier, digits: Digits, seconds: float) -> None:
        outcome = Outcome(evaluate(model, digits.test).accuracy, mean_accuracy(model, domains), seconds)
        outcomes[method].append(outcome)
        console.print(f"{method:18s}  seed {digits.seed}  {outcome.in_distribution:.1%}  {outcome.shifted:.1%}")

    for seed in range(arguments.seeds):
        digits = Digits(seed)
        shown.append(TPGMCallback())
        methods = {
            "plain fine-tuning": [],
            "TPGM": [shown[-1]],
            "TPGM (mars, tuned)": [TPGMCallback(norm="mars", every_n_steps=1, **TUNED["mars"])],
            "TPGM (l2, tuned)": [TPGMCallback(norm="l2", every_n_steps=1, **TUNED["l2"])],
        }
        if seed == 0:
            digits.setup("test")
            record("pretrained", DigitClassifier(weights=str(CHECKPOINT)), digits, seconds=0.0)
        for method, callbacks in methods.items():
            model, seconds = fine_tune(
                digits,
                callbacks,
                epochs=arguments.epochs,
                freeze_statistics=not arguments.update_statistics,
                progress_bar=console.is_terminal,
            )
            record(method, model, digits, seconds)

    arguments.output.mkdir(parents=True, exist_ok=True)
    figure = arguments.output / "digits.png"
    draw_figure(shown[0], outcomes, figure)
    statistics = "updated" if arguments.update_statistics else "frozen"
    console.print(results_table(outcomes, title=f"Fine-tuning on 400 digits, running statistics {statistics}"))
    console.print(FOOTNOTE)
    console.print(f"Figure: {figure}")


if __name__ == "__main__":
    main()
