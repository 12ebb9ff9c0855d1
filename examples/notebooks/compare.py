# %% [markdown]
"""
# Compare three ways to fine-tune

A small CNN was pretrained on MNIST. Here it learns 400 digits of another source, scikit-learn's.
We look at two things: how well it knows the new digits, and how much of MNIST it forgets.

- **Plain** fine-tuning moves every weight wherever the new digits pull it.
- **WiSE-FT** mixes the pretrained and the fine-tuned weights after the fit.
- **TPGM** learns during the fit how far each layer may move, and keeps it there.

Run this notebook in `examples/notebooks` of a checkout, after `pip install '.[examples]' ipykernel`.
It takes less than two minutes on two cores.
"""

# %%
import sys
from statistics import fmean
from textwrap import fill

import matplotlib.pyplot as plt
import torch
from lightning.pytorch import Trainer, seed_everything
from torch.utils.data import TensorDataset

from lightning_tpgm import FreezeBatchNorm, TPGMCallback, wise_ft_sweep

sys.path.append("../digits")

from data import CHECKPOINT, Digits, shifted_domains
from experiment import evaluate, mean_accuracy, quieten_lightning
from model import DigitClassifier

quieten_lightning()
torch.set_num_threads(1)  # the network is too small for more
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
colors = {"pretrained": "grey", "plain": "black", "WiSE-FT": "#E69F00", "TPGM": "#0072B2"}

# %% [markdown]
"""
## The data

`Digits` is a datamodule: 400 digits to train on, 100 held out, 797 to test with.
The shifted data are MNIST images as they are, and under six changes. Every fourth of 2,000 images is enough here.

The pretraining saw images like the shifted ones. So accuracy on them measures what fine-tuning forgets.
"""

# %%
digits = Digits(seed=0)
digits.setup("test")
domains = shifted_domains().items()
shifted = {name: TensorDataset(*part[::4]) for name, part in domains}

shown = {"new": digits.test, **shifted}
figure, axes = plt.subplots(1, len(shown), figsize=(8, 1.4), layout="constrained")
for ax, (name, images) in zip(axes, shown.items(), strict=True):
    ax.imshow(images[3][0].squeeze(), cmap="gray", vmin=0, vmax=1)
    ax.set_title(name, fontsize=8)
    ax.axis("off")

# %% [markdown]
"""
## Fine-tune

The module and the datamodule are ordinary Lightning code. The methods differ by a callback.

All runs have `FreezeBatchNorm()`. Otherwise the new digits overwrite BatchNorm's running statistics, which no bound on
the weights can prevent.

`TPGMCallback()` has its defaults. Nothing is excluded, because the head is pretrained, too: it knows ten digits.
A new head would need `exclude=["head.*"]`.
"""


# %%
def fine_tune(seed, *callbacks):
    seed_everything(seed, verbose=False)
    model = DigitClassifier(weights=str(CHECKPOINT))
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=20,
        callbacks=[FreezeBatchNorm(), *callbacks],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, datamodule=Digits(seed))
    return model, trainer


def score(model):
    return evaluate(model, digits.test).accuracy, mean_accuracy(model, shifted)


# %% [markdown]
"""
## Three seeds

A seed decides which digits are trained on and which are held out. The test digits are always the same.

WiSE-FT starts from the plain run. `wise_ft_sweep` validates at eleven mixtures and keeps the best one.
"""

# %%
scores = {method: [] for method in colors}
scores["pretrained"].append(score(DigitClassifier(weights=str(CHECKPOINT))))
for seed in range(3):
    plain, trainer = fine_tune(seed)
    scores["plain"].append(score(plain))
    plain_weights = {n: w.detach().clone() for n, w in plain.named_parameters()}

    wise_ft_sweep(
        trainer,
        plain,
        str(CHECKPOINT),
        monitor="val_acc",
        datamodule=Digits(seed),
    )
    scores["WiSE-FT"].append(score(plain))

    tpgm = TPGMCallback()
    robust, trainer = fine_tune(seed, tpgm)
    scores["TPGM"].append(score(robust))

print(f"{'accuracy, %':12}{'new digits':>12}{'shifted':>12}")
for method, found in scores.items():
    new, old = (100 * fmean(part) for part in zip(*found, strict=True))
    print(f"{method:12}{new:12.1f}{old:12.1f}")

# %% [markdown]
"""
Each point is one run. The best place is at the top right: nothing forgotten, all learned.
"""

# %%
figure, ax = plt.subplots(figsize=(6, 4), layout="constrained")
for method, found in scores.items():
    ax.scatter(*zip(*found, strict=True), color=colors[method], s=40)
    highest = max(found, key=lambda accuracies: accuracies[1])
    options = {"ha": "center", "color": colors[method]}
    ax.annotate(method, highest, (0, 6), textcoords="offset points", **options)
ax.margins(0.12)
ax.set(xlabel="accuracy on new digits", ylabel="accuracy on shifted digits")
plt.show()

# %% [markdown]
"""
## What TPGM did

The callback of the last seed tells it in words:
"""

# %%
print(fill(tpgm.explain(), width=56))

# %% [markdown]
"""
Each row of the figure is a tensor, the first layer at the top.
Its line ends where the optimizer wanted to be and where it was allowed to be, as means over the steps.
The bars at the right say in how many of its steps a tensor was bound.
"""

# %%
figure, ax = tpgm.plot()

# %% [markdown]
"""
Over the steps: what each projection left of the distance. Dark means that it took much back.
"""

# %%
figure, ax = tpgm.plot("steps", "ratio")

# %% [markdown]
"""
The same in numbers:
"""

# %%
columns = ["wanted", "allowed", "bound", "pinned"]
print(" " * 18, *(f"{column:>8}" for column in columns))
for row in tpgm.report():
    print(f"{row['name']:18}", *(f"{row[column]:8.3f}" for column in columns))

# %% [markdown]
"""
Beside the plain run with the same seed: how far does each tensor go with the constraint, and without?
Here the distance is the root of the sum of squares, for both.
"""


# %%
def distances(weights):
    pairs = ((weights[n].detach(), w) for n, w in tpgm.anchor.items())
    return [torch.dist(*pair).item() for pair in pairs]


names, bounded = list(tpgm.anchor), dict(robust.named_parameters())
figure, ax = plt.subplots(figsize=(7.5, 4), layout="constrained")
free, held = distances(plain_weights), distances(bounded)
farthest = free.index(max(free))
ax.bar(names, free, color="lightgrey")
ax.bar(names, held, 0.5, color=colors["TPGM"])
ax.text(farthest, free[farthest], "plain", ha="center", va="bottom", color="0.4")
ax.text(farthest - 0.45, held[farthest], "TPGM", ha="right", va="center", color=colors["TPGM"])
ax.tick_params(axis="x", rotation=90)
ax.set(ylabel="distance from the pretrained value")
plt.show()

# %% [markdown]
"""
## Next

- With your own model, begin with `TPGMCallback(exclude=[...])`, where the patterns name the new head.
- Compare with plain fine-tuning at your learning rate. Where nothing is forgotten, nothing can be won.
- The [second notebook](after.ipynb) starts from a fine-tuning that is finished.
"""
