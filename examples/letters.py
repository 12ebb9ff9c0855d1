"""A first project: a small vision transformer that knows letters in many fonts is fine-tuned on one font.

    python examples/letters.py

Plain fine-tuning forgets the other fonts. One line, `TPGMCallback()`, keeps more of them: nothing is tuned. The fonts
come with matplotlib. It prints accuracy at three learning rates, means of five seeds: 10 minutes on two cores.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import warnings
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer, seed_everything
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from lightning_tpgm import TPGMCallback

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
SIZE = 28
FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
TARGET = "cmtt10"  # a typewriter's, to fine-tune on
UNSEEN = ("STIXGeneralItalic", "STIXGeneralBolIta", "DejaVuSansMono-Oblique", "DejaVuSerif-BoldItalic", "cmb10")
SEEN = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSans-Oblique",
    "DejaVuSansMono",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "STIXGeneral",
    "cmr10",
    "cmss10",
)


def draw(fonts: tuple[str, ...], copies: int, seed: int) -> TensorDataset:
    """Each letter in each font so many times: other sizes, places, slants and noise. Images (N, 1, 28, 28), labels."""
    rng = np.random.default_rng(seed)
    images, labels = [], []
    for font in fonts:
        for label, letter in enumerate(LETTERS):
            for _ in range(copies):
                image = Image.new("L", (SIZE, SIZE))
                typeface = ImageFont.truetype(FONTS / f"{font}.ttf", int(rng.integers(17, 25)))
                place = (SIZE / 2 + rng.uniform(-3, 3), SIZE / 2 + rng.uniform(-3, 3))
                ImageDraw.Draw(image).text(place, letter, 255, typeface, "mm")
                image = image.rotate(rng.uniform(-12, 12))
                images.append(np.asarray(image, np.float32) / 255 + rng.normal(0, 0.1, (SIZE, SIZE)))
                labels.append(label)
    return TensorDataset(torch.tensor(np.array(images), dtype=torch.float32)[:, None], torch.tensor(labels))


class Reader(LightningModule):
    """A vision transformer of three layers, 0.16 million parameters, as one writes it at first."""

    def __init__(self, lr: float = 1e-3, width: int = 64) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.patches = nn.Conv2d(1, width, 7, stride=7)
        self.position = nn.Parameter(0.02 * torch.randn(16, width))
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.1, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.head = nn.Linear(width, len(LETTERS))

    def forward(self, images: Tensor) -> Tensor:
        """Logits, shape (N, 26)."""
        tokens = self.patches(images).flatten(2).transpose(1, 2) + self.position
        return self.head(self.encoder(tokens).mean(dim=1))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross entropy."""
        images, labels = batch
        return F.cross_entropy(self(images), labels)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the accuracy."""
        images, labels = batch
        self.log("val_acc", (self(images).argmax(dim=1) == labels).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW, over all parameters."""
        return torch.optim.AdamW(self.parameters(), lr=self.hparams["lr"])


def fit(model: Reader, train: TensorDataset, epochs: int, held_out: object = None, callbacks: object = None) -> None:
    """An ordinary fit."""
    trainer = Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, callbacks=callbacks, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    loaders = DataLoader(train, batch_size=32, shuffle=True), held_out and DataLoader(held_out, batch_size=32)
    trainer.fit(model, *loaders)


@torch.inference_mode()
def accuracy(model: Reader, data: TensorDataset) -> float:
    """Percent of the letters that are read right."""
    images, labels = data.tensors
    return 100 * (model.eval()(images).argmax(dim=1) == labels).double().mean().item()


def main() -> None:
    """Pretrain once, fine-tune with and without the callback at several rates and seeds, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-4, 1e-3, 3e-3])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=20, help="of fine-tuning (default: %(default)s)")
    parser.add_argument("--pretraining", type=int, default=30, help="epochs of pretraining (default: %(default)s)")
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")

    tests = {
        "that font": draw((TARGET,), 40, 1),
        "fonts seen": draw(SEEN, 8, 2),
        "fonts never seen": draw(UNSEEN, 8, 3),
    }
    seed_everything(0, verbose=False)
    pretrained = Reader()
    fit(pretrained, draw(SEEN, 20, 4), arguments.pretraining)
    print("| learning rate | | " + " | ".join(tests) + " |\n|---|---|" + "---:|" * len(tests))
    print("| | pretrained | " + " | ".join(f"{accuracy(pretrained, test):.1f}" for test in tests.values()) + " |")
    for lr in arguments.rates:
        found: dict[str, list[list[float]]] = {"plain": [], "TPGMCallback()": []}
        for seed in range(arguments.seeds):
            for name, accuracies in found.items():
                seed_everything(seed, verbose=False)
                train, held_out = random_split(draw((TARGET,), 10, 100 + seed), [0.8, 0.2])
                model = Reader(lr)
                model.load_state_dict(pretrained.state_dict())
                fit(model, train, arguments.epochs, held_out, [] if name == "plain" else [TPGMCallback()])
                accuracies.append([accuracy(model, test) for test in tests.values()])
        for name, accuracies in found.items():
            cells = [f"{statistics.mean(column):.1f}" for column in zip(*accuracies, strict=True)]
            print(f"| {lr:g} | {name} | " + " | ".join(cells) + " |", flush=True)
        differences = [
            [with_it - plain for plain, with_it in zip(*pair, strict=True)]
            for pair in zip(*found.values(), strict=True)
        ]
        if arguments.seeds > 1:
            cells = [
                f"{statistics.mean(column):+.1f} ± {statistics.stdev(column) / arguments.seeds**0.5:.1f}"
                for column in zip(*differences, strict=True)
            ]
            print("| | difference | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
