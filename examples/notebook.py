"""What the constraint did, in pictures, in cells: open it as a notebook in an editor that knows `# %%`, or run it.

A classifier of digits is fine-tuned for 65 steps. The figures show what was wanted and what was allowed, and how far
the tensors go without the constraint, by tensor and for one layer's filters. About twenty seconds on two cores:

    python examples/notebook.py
"""

# %% The data and the classifier are those of examples/digits
import sys
from pathlib import Path

import matplotlib.pyplot as plt
from lightning.pytorch import Callback, Trainer, seed_everything

sys.path.append(str(Path(__file__).resolve().parent / "digits"))

from data import CHECKPOINT, Digits
from lightning_tpgm import TPGMCallback
from model import DigitClassifier

OUTPUT = Path("demo_output")
OUTPUT.mkdir(exist_ok=True)


# %% Fine-tune with the constraint and without
def fine_tune(*callbacks: Callback) -> DigitClassifier:
    """The same run but for the callbacks."""
    seed_everything(0, verbose=False)
    model = DigitClassifier(weights=str(CHECKPOINT), freeze_statistics=True)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=5,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, datamodule=Digits())
    return model


tpgm = TPGMCallback(norm="l2")
constrained, plain = fine_tune(tpgm), fine_tune()
names = list(tpgm.radii)

# %% What happened, in words; then by tensor: what was wanted, what was allowed, in how many steps it was bound
print(tpgm.explain())
figure, _ = tpgm.plot()
figure.savefig(OUTPUT / "layers.png")

# %% Over the steps: a dark tensor is held at its pretrained value
figure, _ = tpgm.plot("steps", "ratio")
figure.savefig(OUTPUT / "steps.png")

# %% By tensor: where the constraint has held the weights back
without = [float((plain.get_parameter(name).detach() - anchor).norm()) for name, anchor in tpgm.anchor.items()]
figure, ax = plt.subplots(figsize=(8, 4.5), layout="constrained")
ax.bar(names, without, color="lightgrey", label="without the constraint")
ax.bar(names, list(tpgm.distances.values()), color="tab:blue", width=0.5, label="with it")
ax.tick_params(axis="x", rotation=90)
ax.set(ylabel="distance from the pretrained weights")
ax.legend()
figure.savefig(OUTPUT / "tensors.png")

# %% One layer: the same for each of its filters
anchor = tpgm.anchor["features.0.0.weight"]
figure, ax = plt.subplots(figsize=(8, 3), layout="constrained")
for model, colour, label in ((plain, "lightgrey", "without the constraint"), (constrained, "tab:blue", "with it")):
    deviation = model.features[0][0].weight.detach() - anchor
    ax.bar(range(len(deviation)), deviation.flatten(1).norm(dim=1), color=colour, label=label)
ax.set(title="features.0.0.weight", xlabel="filter", ylabel="distance of the filter")
ax.legend()
figure.savefig(OUTPUT / "filters.png")

# %% In a notebook the figures are shown where they are made
plt.show()
