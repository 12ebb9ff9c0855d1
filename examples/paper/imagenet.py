"""The paper's ImageNet experiment: CLIP ViT-B/16, fine-tuned plainly, and TPGM after the fact.

    python examples/paper/imagenet.py DATA CLIP NAMES --devices 8

The head is CLIP's own, made of the names of the classes. After plain fine-tuning, 200 radius steps project the weights.
Prints zero-shot, plain, WiSE-FT and TPGM beside the authors' figures, on ImageNet, V2, A, R and Sketch. Nothing is
claimed about the accuracies until somebody ran it. The authors' code has no fine-tuning: what is marked ours is near
to what others use for WiSE-FT. Defaults marked authors' are those of their code.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import Classifier, evaluate, fine_tune, loader, make_trainer, report, shared_arguments
from domains import IMAGENET, check_present, folder_domain, read_names, subfolders
from images import View
from lightning.pytorch import seed_everything
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn.functional import normalize

from lightning_tpgm import project_checkpoint, wise_ft_sweep

FOLDERS = {
    "ImageNet": "val",
    "V2": "imagenetv2-matched-frequency-format-val",
    "A": "imagenet-a",
    "R": "imagenet-r",
    "Sketch": "sketch",
}
AUTHORS = {
    f"{name} (authors)": dict(zip(FOLDERS, figures, strict=True))
    for name, figures in {
        "zero-shot": (67.82, 61.19, 50.97, 75.73, 45.57),
        "plain": (84.27, 74.78, 45.54, 65.05, 48.28),
        "WiSE-FT 0.5": (82.16, 73.66, 56.63, 78.25, 54.16),
        "TPGM": (83.80, 75.27, 55.91, 76.87, 54.50),
    }.items()
}
CAPTION = "Accuracy in %. (authors): their CLIP ViT-B/16, as published with their code. The others are of this run."
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as the authors normalise
TEMPLATES = ("a photo of a {}.", "a drawing of a {}.", "a close look at a {}.", "a {} among other things.", "one {}.")


class ClipImages(nn.Module):
    """The image half of transformers' CLIPModel: embeddings of length one."""

    def __init__(self, clip: Any) -> None:
        super().__init__()
        self.vision_model, self.visual_projection = clip.vision_model, clip.visual_projection

    def forward(self, images: Tensor) -> Tensor:
        """From images (batch, 3, size, size) to embeddings (batch, width)."""
        return normalize(self.visual_projection(self.vision_model(pixel_values=images).pooler_output), dim=1)


@torch.no_grad()
def zero_shot_head(clip: Any, tokenizer: Any, names: Sequence[str], templates: Sequence[str]) -> nn.Linear:
    """A head whose rows are the mean embeddings of sentences about each class, times CLIP's scale."""
    rows = []
    for name in names:
        tokens = tokenizer([template.format(name) for template in templates], padding=True, return_tensors="pt")
        embeddings = normalize(clip.text_projection(clip.text_model(**tokens).pooler_output), dim=1)
        rows.append(normalize(embeddings.mean(dim=0), dim=0))
    head = nn.Linear(len(rows[0]), len(rows), bias=False)
    head.weight.copy_(clip.logit_scale.exp() * torch.stack(rows))
    return head


class ImageNetClassifier(Classifier):
    """A classifier that is fine-tuned by AdamW with a warm-up and one cosine over all steps."""

    lr: float
    warmup: int

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW, its rate changing from step to step."""
        adamw = torch.optim.AdamW(self.parameters(), self.lr, weight_decay=0.1)
        total, warmup = self.trainer.estimated_stepping_batches, self.warmup

        def factor(step: int) -> float:
            return min(1, (step + 1) / warmup) * (1 + math.cos(math.pi * step / total)) / 2

        schedule = torch.optim.lr_scheduler.LambdaLR(adamw, factor)
        return {"optimizer": adamw, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = shared_arguments(__doc__, IMAGENET, epochs=10, whose="ours", batch_size=512)
    parser.add_argument("clip", type=Path, metavar="CLIP", help="folder of transformers' CLIPModel and its tokenizer")
    parser.add_argument(
        "names", type=Path, metavar="NAMES", help='JSON {"n01440764": "tench", ...}, or lines "n01440764 tench"'
    )
    parser.add_argument("--templates", type=Path, help="file of sentences with {} for the name (default: five of ours)")
    parser.add_argument("--lr", type=float, default=3e-5, help="of AdamW (default: %(default)s, ours)")
    parser.add_argument("--warmup", type=int, default=500, help="steps of warm-up (default: %(default)s, ours)")
    parser.add_argument("--radius-steps", type=int, default=200, help="in all (default: %(default)s, authors')")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Fine-tune, project, test all on every domain, and print the table."""
    arguments = parse(argv)
    view = View(arguments.size, MEAN, STD)
    classes = subfolders(arguments.data / "train")
    names = read_names(arguments.names, classes)
    train = folder_domain(arguments.data, "train", "train", classes).items
    domains = [
        folder_domain(arguments.data, name, folder, classes, part=name in {"A", "R"})
        for name, folder in FOLDERS.items()
    ]
    folder = arguments.output / "imagenet"

    from transformers import AutoTokenizer, CLIPModel

    seed_everything(arguments.seed, verbose=False)
    check_present(arguments.clip, "a folder with config.json, model.safetensors and the tokenizer's files")
    clip = CLIPModel.from_pretrained(arguments.clip)
    templates = arguments.templates.read_text().splitlines() if arguments.templates else TEMPLATES
    head = zero_shot_head(clip, AutoTokenizer.from_pretrained(arguments.clip), names, templates)
    model = ImageNetClassifier(ClipImages(clip).train(), head, classes)
    model.lr, model.warmup = arguments.lr, arguments.warmup
    pretrained = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    columns = {"zero-shot": evaluate(model, domains, view, arguments)}

    validation = loader(domains[0].items, view, arguments.batch_size, arguments)
    training = loader(train, view, arguments.batch_size, arguments, train=True)
    plain = fine_tune(model, folder / "plain", arguments, training, validation, gradient_clip_val=1.0)
    columns["plain"] = evaluate(model, domains, view, arguments)

    wise_ft_sweep(make_trainer(arguments), model, pretrained, "val_acc", alphas=[0.5], dataloaders=validation)
    columns["WiSE-FT 0.5"] = evaluate(model, domains, view, arguments)

    project_checkpoint(
        model,
        pretrained,
        plain,
        loader(domains[0].items, view, arguments.radius_batch_size, arguments, shuffle=True),
        folder / "projected.ckpt",
        norm="l2",
        radius_lr=arguments.radius_lr,
        radius_steps=arguments.radius_steps,
        trainer=make_trainer(arguments),
    )
    columns["TPGM"] = evaluate(model, domains, view, arguments)
    report({**columns, **AUTHORS}, list(FOLDERS), CAPTION, folder / "table.md")


if __name__ == "__main__":
    main()
