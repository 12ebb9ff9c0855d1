"""torchmetrics: a score of yours decides how near to the pretrained weights the model goes back.

It runs on random weights and made-up images, in about ten seconds on two cores. Metrics of `training_step` see training
batches only: what the callback evaluates leaves no trace in them.

    python examples/recipes/torchmetrics_images.py
"""

import torch
from lightning import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassF1Score

from lightning_tpgm import TPGMCallback, WiSEFTCallback


class Classifier(LightningModule):
    """Three classes."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 32), nn.ReLU())
        # yours: self.features.load_state_dict(torch.load("pretrained.pt"))
        self.head = nn.Linear(32, 3)
        self.train_f1, self.val_f1 = MulticlassF1Score(3), MulticlassF1Score(3)

    def training_step(self, batch, batch_idx):
        """Of a batch of images and labels."""
        images, labels = batch
        logits = self.head(self.features(images))
        self.train_f1(logits, labels)
        self.log("train_f1", self.train_f1, on_epoch=True)
        return nn.functional.cross_entropy(logits, labels)

    def validation_step(self, batch, batch_idx):
        """The score, over all batches."""
        images, labels = batch
        self.val_f1(self.head(self.features(images)), labels)
        self.log("val_f1", self.val_f1)

    def configure_optimizers(self):
        """No weight decay: it would pull to zero what should stay near its pretrained value."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3, weight_decay=0)


def loader(count, shuffle=False):
    """Images that are brighter in one channel, which is the label."""
    images, labels = torch.rand(count, 3, 8, 8), torch.randint(3, (count,))
    images[range(count), labels] += 0.1
    return DataLoader(TensorDataset(images, labels), batch_size=16, shuffle=shuffle)


model, new = Classifier(), ["head.*"]
tpgm = TPGMCallback(exclude=new)
sweep = WiSEFTCallback(alpha="sweep", monitor="val_f1", tolerance=0.01, exclude=new)
trainer = Trainer(max_epochs=5, callbacks=[tpgm, sweep])
trainer.fit(model, loader(256, shuffle=True), loader(128))
print("alpha", sweep.sweep.chosen_alpha, "radii", tpgm.radii)
