"""timm: a ResNet with a new head. About fifteen seconds on two cores, on random weights and made-up images.

python examples/recipes/timm_images.py
"""

import timm
import torch
from lightning import LightningModule, Trainer
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_tpgm import FreezeBatchNorm, TPGMCallback


class Classifier(LightningModule):
    """Three classes."""

    def __init__(self):
        super().__init__()
        # yours: timm.create_model("resnet50", pretrained=True, num_classes=3)
        self.model = timm.create_model("test_resnet", pretrained=False, num_classes=3)

    def training_step(self, batch, batch_idx):
        """Of a batch of images and labels."""
        images, labels = batch
        return cross_entropy(self.model(images), labels)

    def validation_step(self, batch, batch_idx):
        """The same, to be logged."""
        self.log("val_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self):
        """No weight decay: it would pull to zero what should stay near its pretrained value."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3, weight_decay=0)


def loader(count, shuffle=False):
    """Images that are brighter in one channel, which is the label."""
    images, labels = torch.rand(count, 3, 64, 64), torch.randint(3, (count,))
    images[range(count), labels] += 0.5
    return DataLoader(TensorDataset(images, labels), batch_size=16, shuffle=shuffle)


model = Classifier()
print("the head:", model.model.default_cfg["classifier"])  # "fc" here, "head" in a ViT, "classifier" in an EfficientNet
tpgm = TPGMCallback(exclude=["model.fc.*"])
trainer = Trainer(max_epochs=2, callbacks=[FreezeBatchNorm(), tpgm])
trainer.fit(model, loader(128, shuffle=True), loader(32))
for row in tpgm.report():
    print(f"{row['name']:70} {row['distance']:.4f}")
