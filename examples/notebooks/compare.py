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
shifted = {name: TensorDataset(*images[::4]) for name, images in shifted_domains().items()}

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
scores = {"pretrained": [score(DigitClassifier(weights=str(CHECKPOINT)))], "plain": [], "WiSE-FT": [], "TPGM": []}
for seed in range(3):
    plain, trainer = fine_tune(seed)
    scores["plain"].append(score(plain))
    plain_weights = {name: weight.detach().clone() for name, weight in plain.named_parameters()}

    wise_ft_sweep(trainer, plain, str(CHECKPOINT), monitor="val_acc", datamodule=Digits(seed))
    scores["WiSE-FT"].append(score(plain))

    tpgm = TPGMCallback()
    robust, trainer = fine_tune(seed, tpgm)
    scores["TPGM"].append(score(robust))

print(f"{'accuracy, %':12}{'new digits':>12}{'shifted':>12}")
for method, found in scores.items():
    new, old = (100 * fmean(accuracies) for accuracies in zip(*found, strict=True))
    print(f"{method:12}{new:12.1f}{old:12.1f}")

# %% [markdown]
"""
Each point is one run. The best place is at the top right: nothing forgotten, all learned.
"""

# %%
figure, ax = plt.subplots(figsize=(6, 4), layout="constrained")
for (method, found), marker in zip(scores.items(), "*osD", strict=True):
    ax.scatter(*zip(*found, strict=True), label=method, marker=marker, s=60)
ax.set(xlabel="accuracy on new digits", ylabel="accuracy on shifted digits")
ax.legend()
plt.show()

# %% [markdown]
"""
## What TPGM did

The callback of the last seed tells it. Each row of the figure is a tensor: how far it may go, and how far it is.
Where the constraint binds, the optimizer wants to go farther.
"""

# %%
figure, ax = tpgm.plot()

# %% [markdown]
"""
Over the steps: dark tensors stayed near to their pretrained values.
"""

# %%
figure, ax = tpgm.plot("steps", "distance")

# %% [markdown]
"""
Beside the plain run with the same seed: how far does each tensor go with the constraint, and without?
Here the distance is the root of the sum of squares, for both.
"""

# %%
names = list(tpgm.anchor)
free = [torch.dist(plain_weights[name], tpgm.anchor[name]).item() for name in names]
bound = [torch.dist(robust.get_parameter(name).detach(), tpgm.anchor[name]).item() for name in names]
figure, ax = plt.subplots(figsize=(7.5, 4), layout="constrained")
ax.bar(names, free, color="lightgrey", label="plain")
ax.bar(names, bound, width=0.5, label="TPGM")
ax.tick_params(axis="x", rotation=90)
ax.set(ylabel="distance from the pretrained value")
ax.legend()
plt.show()

# %% [markdown]
"""
## Next

- With your own model, begin with `TPGMCallback(exclude=[...])`, where the patterns name the new head.
- Compare with plain fine-tuning at your learning rate. Where nothing is forgotten, nothing can be won.
- The [second notebook](after.ipynb) starts from a fine-tuning that is finished.
"""
