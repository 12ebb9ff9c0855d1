"""One fine-tuning run and its evaluation: what demo.py and choose.py share."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Iterable, Mapping
from statistics import fmean
from typing import NamedTuple

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import TQDMProgressBar
from torch import nn
from torch.utils.data import TensorDataset

from data import CHECKPOINT, Digits
from model import DigitClassifier

EPOCHS = 20


class Score(NamedTuple):
    """What a model is worth on a data set: a share of right answers and a mean cross entropy."""

    accuracy: float
    loss: float


@torch.inference_mode()
def evaluate(model: nn.Module, data: TensorDataset) -> Score:
    """Score `model`, in eval mode, on `data` (images and labels)."""
    model.eval()
    images, labels = data.tensors
    logits = torch.cat([model(batch) for batch in images.split(500)])
    return Score((logits.argmax(dim=1) == labels).double().mean().item(), F.cross_entropy(logits, labels).item())


def mean_accuracy(model: nn.Module, domains: Mapping[str, TensorDataset]) -> float:
    """The accuracy of `model`, averaged over `domains`."""
    return fmean(evaluate(model, domain).accuracy for domain in domains.values())


def fine_tune(
    digits: Digits,
    callbacks: Iterable[Callback] = (),
    *,
    epochs: int = EPOCHS,
    freeze_statistics: bool = True,
    progress_bar: bool = False,
) -> tuple[DigitClassifier, float]:
    """Fine-tune the pretrained classifier on `digits`; all that tells one method from another is in `callbacks`.

    The running statistics of batch normalisation stay frozen by default, for every method. They are no parameters, so
    no bound on the weights reaches them. 400 digits of one kind would overwrite those of the pretraining.

    Returns:
        The classifier and the seconds that `Trainer.fit` took.
    """
    seed_everything(digits.seed, verbose=False)
    model = DigitClassifier(weights=str(CHECKPOINT), freeze_statistics=freeze_statistics)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=[*callbacks, *([TQDMProgressBar()] if progress_bar else [])],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=progress_bar,
    )
    start = time.perf_counter()
    trainer.fit(model, datamodule=digits)
    return model, time.perf_counter() - start


def quieten_lightning() -> None:
    """Leave out Lightning's start-up messages and the remarks that do not apply to a task of a few seconds."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    warnings.filterwarnings("ignore", message=".*LeafSpec")
