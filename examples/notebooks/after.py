# %% [markdown]
"""
# After the fact

A fine-tuning is finished, and the model has forgotten some of what it knew. Two files are left: the pretrained weights
and the fine-tuned ones. What can be recovered without training again?

- `wise_ft_sweep` mixes the two with one number for all weights, alpha. Validation chooses it.
- `project_checkpoint` learns for each tensor how far it may be from its pretrained value. This is TPGM.

Run this notebook in `examples/notebooks` of a checkout, after `pip install '.[examples]' ipykernel`.
It takes less than two minutes on two cores.
"""

# %%
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from lightning.pytorch import Trainer, seed_everything
from torch.utils.data import TensorDataset

from lightning_tpgm import FreezeBatchNorm, project_checkpoint, wise_ft_sweep

sys.path.append("../digits")

from data import CHECKPOINT, Digits, shifted_domains
from experiment import evaluate, mean_accuracy, quieten_lightning
from model import DigitClassifier

quieten_lightning()
torch.set_num_threads(1)  # the network is too small for more
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
output = Path("demo_output")
output.mkdir(exist_ok=True)
options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}

# %% [markdown]
"""
## The fine-tuning that is finished

A small CNN, pretrained on MNIST, learns 400 digits of another source. Nothing is constrained.
"""

# %%
seed_everything(0, verbose=False)
digits = Digits(seed=0)
model = DigitClassifier(weights=str(CHECKPOINT))
trainer = Trainer(max_epochs=20, callbacks=[FreezeBatchNorm()], enable_model_summary=False, **options)
trainer.fit(model, datamodule=digits)
trainer.save_checkpoint(output / "finetuned.ckpt")

# %% [markdown]
"""
From here on only files are needed, and the 100 held-out digits.

We score each model on 797 new digits, and on MNIST images as they are and under six changes.
The pretraining saw images like these, so their score tells what is forgotten. Nothing below is chosen by it.
"""

# %%
shifted = {name: TensorDataset(*images[::4]) for name, images in shifted_domains().items()}
digits.setup("test")
scores = {}


def note(method, model):
    scores[method] = evaluate(model, digits.test).accuracy, mean_accuracy(model, shifted)
    new, old = scores[method]
    print(f"{method:28} new digits {new:6.1%}   shifted {old:6.1%}")


def load(file):
    model = DigitClassifier()
    model.load_state_dict(torch.load(file, weights_only=True)["state_dict"])
    return model


note("pretrained", DigitClassifier(weights=str(CHECKPOINT)))
note("fine-tuned", load(output / "finetuned.ckpt"))

# %% [markdown]
"""
## One number for all weights

At alpha 0 the model is the pretrained one, at 1 the fine-tuned one. The sweep validates at eleven values.
It keeps the best one, and among equals the one nearest to the pretrained weights.
"""

# %%
model = load(output / "finetuned.ckpt")
sweep = wise_ft_sweep(trainer, model, str(CHECKPOINT), monitor="val_acc", datamodule=digits)
note(f"WiSE-FT, alpha {sweep.chosen_alpha}", model)

# %% [markdown]
"""
Held-out data are few, and alphas that are near to each other can hardly be told apart.
With a tolerance the sweep goes on towards the pretrained weights, as far as validation cannot see a loss.
One standard error is a wide tolerance where a hundred digits are held out. A number, such as 0.01, is narrower.
"""

# %%
model = load(output / "finetuned.ckpt")
sweep = wise_ft_sweep(
    trainer, model, str(CHECKPOINT), monitor="val_acc", tolerance="one_standard_error", datamodule=digits
)
note(f"with a tolerance, alpha {sweep.chosen_alpha}", model)
figure, ax = sweep.plot()

# %% [markdown]
"""
## What the sweep cannot see

Every dot is an alpha, from the pretrained model to the fine-tuned one. The sweep knew neither axis.
"""

# %%
pretrained = DigitClassifier(weights=str(CHECKPOINT)).state_dict()
finetuned = load(output / "finetuned.ckpt").state_dict()
path = []
for alpha in sweep.alphas:
    mixture = {name: torch.lerp(pretrained[name].float(), finetuned[name].float(), alpha) for name in pretrained}
    model.load_state_dict(mixture)
    path.append((evaluate(model, digits.test).accuracy, mean_accuracy(model, shifted)))

figure, ax = plt.subplots(figsize=(6, 4), layout="constrained")
ax.plot(*zip(*path, strict=True), marker="o", color="0.7")
ax.annotate("alpha 0: pretrained", path[0], (0, -20), textcoords="offset points", color="0.4")
ax.annotate("alpha 1: fine-tuned", path[-1], (-8, -4), textcoords="offset points", color="0.4", ha="right")
for (method, found), color in zip(list(scores.items())[2:], ("#D55E00", "#0072B2"), strict=True):
    ax.scatter(*found, s=60, color=color, zorder=3)
    ax.annotate(method, found, (-8, -4), textcoords="offset points", color=color, ha="right")
ax.set(xlabel="accuracy on new digits", ylabel="accuracy on shifted digits")
plt.show()

# %% [markdown]
"""
## A radius for each tensor

`project_checkpoint` learns the radii on the held-out digits, in 200 updates and without training.
It writes a checkpoint that is loaded as the fine-tuned one is.

Held-out digits look like the training digits. Where they give no reason to take a tensor back, it stays as it is.
"""

# %%
done = project_checkpoint(
    DigitClassifier(),
    str(CHECKPOINT),
    output / "finetuned.ckpt",
    digits.val_dataloader(),
    output / "projected.ckpt",
    trainer=Trainer(**options),
)
note("projected", load(output / "projected.ckpt"))
figure, ax = done.plot()

# %% [markdown]
"""
Here little is recovered: the projected model is nearly the fine-tuned one.
The held-out digits gave no reason to take more back.

A sweep can follow, because a projected model is a fine-tuned model like any other.
"""

# %%
model = load(output / "projected.ckpt")
sweep = wise_ft_sweep(
    trainer, model, str(CHECKPOINT), monitor="val_acc", tolerance="one_standard_error", datamodule=digits
)
note(f"both, alpha {sweep.chosen_alpha}", model)
trainer.save_checkpoint(output / "robust.ckpt")

# %% [markdown]
"""
## All together
"""

# %%
figure, ax = plt.subplots(figsize=(7, 3), layout="constrained")
new, shifted_digits = zip(*scores.values(), strict=True)
rows = range(len(scores))
ax.hlines(rows, new, shifted_digits, color="0.85")
for name, accuracies, color in (("new digits", new, "#0072B2"), ("shifted digits", shifted_digits, "#D55E00")):
    ax.scatter(accuracies, rows, s=40, color=color, zorder=3)
    ax.annotate(name, (accuracies[0], 0), (0, 8), textcoords="offset points", color=color, ha="center")
ax.set_yticks(rows, list(scores))
ax.set_ylim(len(scores) - 0.6, -0.8)
ax.margins(x=0.15)
ax.set_xlabel("accuracy")
plt.show()

# %% [markdown]
"""
## Next

- This is one seed. Repeat it with others before you prefer one method to another.
- What is kept in training need not be recovered. The [first notebook](compare.ipynb) has the callback for it.
- Read `python -m lightning_tpgm project --help` for the same from a shell.
"""
