"""segmentation_models_pytorch: a U-Net whose encoder is pretrained. About fifteen seconds on two cores.

It runs on random weights and made-up images. The decoder is new as well as the head, and so is its BatchNorm.

    python examples/recipes/smp_segmentation.py
"""

import segmentation_models_pytorch as smp
import torch
from lightning import LightningModule, Trainer
from torch.utils.data import DataLoader, TensorDataset

from lightning_tpgm import FreezeBatchNorm, TPGMCallback


class Segmentation(LightningModule):
    """One class against the background."""

    def __init__(self):
        super().__init__()
        # yours: smp.Unet("resnet34", encoder_weights="imagenet", classes=1)
        self.model = smp.Unet("resnet18", encoder_weights=None, classes=1)
        self.loss = smp.losses.DiceLoss("binary")

    def training_step(self, batch, batch_idx):
        """Of a batch of images and masks."""
        images, masks = batch
        return self.loss(self.model(images), masks)

    def validation_step(self, batch, batch_idx):
        """The same, to be logged."""
        self.log("val_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self):
        """No weight decay: it would pull to zero what should stay near its pretrained value."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3, weight_decay=0)


def loader(count, shuffle=False):
    """Bright squares on noise, and where they are."""
    images, masks = torch.rand(count, 3, 32, 32), torch.zeros(count, 1, 32, 32)
    for i, (row, column) in enumerate(torch.randint(16, (count, 2))):
        masks[i, :, row : row + 16, column : column + 16] = 1
    return DataLoader(TensorDataset(images + masks, masks), batch_size=8, shuffle=shuffle)


model = Segmentation()
# where the decoder is pretrained, too: exclude=["model.segmentation_head.*"] and FreezeBatchNorm()
tpgm = TPGMCallback(exclude=["model.decoder.*", "model.segmentation_head.*"])
trainer = Trainer(max_epochs=2, callbacks=[FreezeBatchNorm(["model.encoder.*"]), tpgm])
trainer.fit(model, loader(64, shuffle=True), loader(16))
for row in tpgm.report():
    print(f"{row['name']:70} {row['distance']:.4f}")
