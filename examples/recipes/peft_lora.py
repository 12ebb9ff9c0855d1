"""peft: BERT with LoRA adapters. About ten seconds on two cores, on random weights and made-up tokens.

Only the adapters are constrained. The weights below them are frozen, and the new head is free. An adapter's anchor is
its value at the start, where it adds nothing. So the radii bound how far the model may be from the pretrained one.

    python examples/recipes/peft_lora.py
"""

import torch
from lightning import LightningModule, Trainer
from peft import LoraConfig, TaskType, get_peft_model
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
        model = AutoModelForSequenceClassification.from_config(TINY)
        adapters = LoraConfig(task_type=TaskType.SEQ_CLS, r=4, target_modules=["query", "value"])
        self.model = get_peft_model(model, adapters)

    def training_step(self, batch, batch_idx):
        """Of what a tokenizer gives, and labels."""
        return self.model(**batch).loss

    def validation_step(self, batch, batch_idx):
        """The same, to be logged."""
        self.log("val_loss", self.model(**batch).loss)

    def configure_optimizers(self):
        """All but the adapters and the head is frozen."""
        return torch.optim.AdamW(filter(lambda p: p.requires_grad, self.parameters()), lr=1e-2, weight_decay=0)


def loader(count, shuffle=False):
    """Sentences of twelve words, which are of one kind or of another."""
    tokens = torch.randint(50, (count, 12)) + 50 * torch.randint(2, (count, 1))
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row[0] // 50} for row in tokens]
    return DataLoader(rows, batch_size=16, shuffle=shuffle)


model = Classifier()
tpgm = TPGMCallback(exclude=["*.classifier.*"])
trainer = Trainer(max_epochs=5, callbacks=[tpgm])
trainer.fit(model, loader(128, shuffle=True), loader(32))
for row in tpgm.report():
    print(f"{row['name']:70} {row['distance']:.4f}")
