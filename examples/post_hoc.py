"""TPGM after the fact: from two checkpoints that exist already, a third that remembers more.

A classifier is fine-tuned as always and saved. `project_checkpoint` then learns the radii on held-out digits without
any training. `wise_ft_sweep` shows what one number for all tensors can do. About twenty seconds on two cores:

    python examples/post_hoc.py
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from lightning.pytorch import Trainer, seed_everything

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE / "digits"))

from data import CHECKPOINT, Digits, shifted_domains  # noqa: E402
from experiment import evaluate, mean_accuracy  # noqa: E402
from lightning_tpgm import project_checkpoint, wise_ft_sweep  # noqa: E402
from model import DigitClassifier  # noqa: E402


def main() -> None:
    """Fine-tune, project, and compare on the test digits and on shifted MNIST images."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20, help="epochs of fine-tuning (default: %(default)s)")
    parser.add_argument("--radius-steps", type=int, default=50, help="radius updates (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="folder of the checkpoints")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    finetuned, projected = arguments.output / "finetuned.ckpt", arguments.output / "projected.ckpt"

    seed_everything(0, verbose=False)
    digits, domains = Digits(), shifted_domains()

    def report(name: str, model: DigitClassifier) -> None:
        in_distribution, shifted = evaluate(model, digits.test).accuracy, mean_accuracy(model, domains)
        print(f"{name:12s} {in_distribution:6.1%} in distribution  {shifted:6.1%} shifted")

    # the first checkpoint is there, the pretrained one; this makes the second
    options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    trainer = Trainer(max_epochs=arguments.epochs, enable_progress_bar=False, **options)
    model = DigitClassifier(weights=str(CHECKPOINT), freeze_statistics=True)
    trainer.fit(model, datamodule=digits)
    trainer.save_checkpoint(finetuned)
    report("fine-tuned", model)

    # from here on only files are needed
    project_checkpoint(
        DigitClassifier(),
        CHECKPOINT,
        finetuned,
        digits.val_dataloader(),
        projected,
        radius_steps=arguments.radius_steps,
        trainer=Trainer(**options),
    )
    model_from_file = DigitClassifier()
    model_from_file.load_state_dict(torch.load(projected, weights_only=True)["state_dict"])
    report("projected", model_from_file)

    sweep = wise_ft_sweep(trainer, model, CHECKPOINT, monitor="val_acc", datamodule=digits)
    report("WiSE-FT", model)
    print(f"alpha of WiSE-FT: {sweep.best_alpha}; checkpoints: {finetuned}, {projected}")


if __name__ == "__main__":
    main()
