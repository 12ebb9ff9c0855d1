"""Radii and distances as pictures, in cells: open it as a notebook in an editor that knows `# %%`, or run it.

A classifier of digits is fine-tuned for 65 steps; the figures show how far each tensor may go and has gone, over the
steps and over the depth, and what that means for one layer's filters. About fifteen seconds on two cores:

    python examples/notebook.py
"""

# %% The data and the classifier are those of examples/digits
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from lightning.pytorch import Callback, Trainer, seed_everything
from matplotlib.colors import LogNorm

sys.path.append(str(Path(__file__).resolve().parent / "digits"))

from data import CHECKPOINT, Digits
from lightning_tpgm import TPGMCallback
from model import DigitClassifier

OUTPUT = Path("demo_output")
OUTPUT.mkdir(exist_ok=True)


# %% A callback that keeps what the constraint did after every step
class History(Callback):
    """Keeps the radii and distances of a callback that comes before it in the trainer's list."""

    def __init__(self, tpgm: TPGMCallback) -> None:
        self.tpgm = tpgm
        self.radii: list[list[float]] = []
        self.distances: list[list[float]] = []

    def on_train_batch_end(self, *args: object) -> None:
        """Keep the present ones."""
        self.radii.append(list(self.tpgm.radii.values()))
        self.distances.append(list(self.tpgm.distances.values()))


# %% Fine-tune
seed_everything(0, verbose=False)
tpgm = TPGMCallback(norm="l2", radius_lr=0.01)
history = History(tpgm)
trainer = Trainer(
    accelerator="cpu",
    max_epochs=5,
    callbacks=[tpgm, history],
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
model = DigitClassifier(weights=str(CHECKPOINT), freeze_statistics=True)
trainer.fit(model, datamodule=Digits())

# %% Over the steps: a bright tensor may go far, a dark one is pinned
names = list(tpgm.radii)
radii, distances = np.array(history.radii), np.array(history.distances)
figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True, layout="constrained")
for ax, values, title in zip(axes, (radii, distances), ("radius", "distance"), strict=True):
    image = ax.imshow(values.T.clip(1e-3), aspect="auto", norm=LogNorm(1e-3, radii.max()), interpolation="none")
    ax.set(title=title, xlabel="optimizer step")
axes[0].set_yticks(range(len(names)), names)
figure.colorbar(image, ax=axes, label="in the norm l2; 0.001 and less are one colour")
figure.savefig(OUTPUT / "steps.png")

# %% Over the depth: where a distance reaches its radius, the constraint binds
figure, ax = plt.subplots(figsize=(8, 4.5), layout="constrained")
ax.bar(names, distances[-1], color="tab:blue", label="distance")
ax.plot(names, radii[-1], "_", color="black", markersize=18, markeredgewidth=2, label="radius")
ax.tick_params(axis="x", rotation=90)
ax.set(ylabel="after the last step")
ax.legend()
figure.savefig(OUTPUT / "depth.png")

# %% One layer: the deviation of each filter from its pretrained value
weight = model.features[0][0].weight.detach()
deviation = (weight - tpgm.anchor["features.0.0.weight"]).flatten(1).norm(dim=1)
figure, ax = plt.subplots(figsize=(8, 3), layout="constrained")
ax.bar(range(len(deviation)), deviation)
ax.set(title="features.0.0.weight", xlabel="filter", ylabel="distance of the filter")
figure.savefig(OUTPUT / "filters.png")

# %% In a notebook the figures are shown where they are made
plt.show()
