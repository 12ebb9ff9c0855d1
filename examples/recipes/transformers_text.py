"""transformers: BERT with a new head. About ten seconds on two cores, on random weights and made-up tokens.

python examples/recipes/transformers_text.py
"""

import torch
from lightning import LightningModule, Trainer
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, BertConfig

from lightning_tpgm import TPGMCallback

TINY = BertConfig(
    vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, num_labels=2
)


class Classifier(LightningModule):
    """Two classes."""

    def __init__(self):
        super().__init__()
        # yours: AutoModelForSequenceClassification.from_pretrained("bert-base-uncased", num_labels=2)
        self.model = AutoModelForSequenceClassification.from_config(TINY)

    def training_step(self, batch, batch_idx):
        """Of what a tokenizer gives, and labels."""
        return self.model(**batch).loss

    def validation_step(self, batch, batch_idx):
        """The same, to be logged."""
        self.log("val_loss", self.model(**batch).loss)

    def configure_optimizers(self):
        """No weight decay: it would pull to zero what should stay near its pretrained value."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3, weight_decay=0)


def loader(count, shuffle=False):
    """Sentences of twelve words, which are of one kind or of another."""
    tokens = torch.randint(50, (count, 12)) + 50 * torch.randint(2, (count, 1))
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row[0] // 50} for row in tokens]
    return DataLoader(rows, batch_size=16, shuffle=shuffle)


model = Classifier()
# DistilBERT has two new layers: "model.*classifier.*". Llama and its like: "model.score.*"
tpgm = TPGMCallback(exclude=["model.classifier.*"])
trainer = Trainer(max_epochs=5, callbacks=[tpgm])
trainer.fit(model, loader(128, shuffle=True), loader(32))
for row in tpgm.report():
    print(f"{row['name']:70} {row['distance']:.4f}")
