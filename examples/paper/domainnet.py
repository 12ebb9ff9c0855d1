"""The paper's DomainNet experiment: CLIP ResNet-50, fine-tuned on real photos, tested on four other domains.

    python examples/paper/domainnet.py DATA WEIGHTS --devices 4

Fine-tunes twice, plainly and with TPGM at every step, and prints both beside the authors' figures. Nothing is claimed
about the accuracies until somebody ran it. Defaults marked authors' are those of the paper's published commands.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

import torch
from common import Classifier, evaluate, fine_tune, loader, report, shared_arguments
from domains import DOMAINNET, check_present, list_domain, read_list, split, train_classes
from images import View
from lightning.pytorch import seed_everything
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn

from lightning_tpgm import TPGMCallback
from lightning_tpgm.pretrained import read_pretrained

SHIFTED = ("sketch", "painting", "infograph", "clipart")
AUTHORS = {
    "plain (authors)": dict(zip(("real", *SHIFTED), (79.43, 30.43, 41.24, 18.66, 42.36), strict=True)),
    "TPGM (authors)": dict(zip(("real", *SHIFTED), (82.41, 37.53, 45.71, 26.77, 46.07), strict=True)),
}
CAPTION = "Accuracy in %. (authors): their CLIP ResNet-50, as published with their code. The others are of this run."
MEAN, STD = (0.5964, 0.5712, 0.5336), (0.3228, 0.3165, 0.3374)  # of the real domain, as the authors normalise


class DomainNetClassifier(Classifier):
    """A classifier that is fine-tuned as the authors did: SGD with Nesterov momentum, one cosine over all epochs."""

    lr: float

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """SGD, its rate falling from epoch to epoch."""
        sgd = torch.optim.SGD(self.parameters(), self.lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
        return [sgd], [torch.optim.lr_scheduler.CosineAnnealingLR(sgd, self.trainer.max_epochs or 1)]


def load_encoder(name: str, weights: Path) -> nn.Module:
    """An encoder with its pretrained weights.

    Args:
        name: Of a timm model, or the import path of a function without arguments, ``"my_project.models:resnet"``.
        weights: A state dict, by ``torch.save`` or as ``.safetensors``; of a timm model in any form that timm converts.
    """
    if ":" in name:
        sys.path.append(str(Path.cwd()))  # Python looks in the folder of the script alone
        module, _, function = name.partition(":")
        make: Callable[[], nn.Module] = getattr(import_module(module), function)
        encoder = make()
        encoder.load_state_dict(read_pretrained(weights))
        return encoder
    import timm

    # the features of CLIP are its embeddings, after the projection that timm calls a classifier
    options = {} if "clip" in name else {"num_classes": 0}
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": str(weights)}, **options)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = shared_arguments(__doc__, DOMAINNET, epochs=50, whose="authors'", batch_size=256)
    parser.add_argument("weights", type=Path, metavar="WEIGHTS", help="state dict of the encoder")
    parser.add_argument(
        "--encoder", default="resnet50_clip.openai", help="timm's name, or module:function (default: %(default)s)"
    )
    parser.add_argument("--lr", type=float, default=1e-3, help="of plain fine-tuning (default: %(default)s, authors')")
    parser.add_argument("--tpgm-lr", type=float, default=1e-2, help="with TPGM (default: %(default)s, authors')")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Fine-tune with and without TPGM, test on all domains, and print the table."""
    arguments = parse(argv)
    view = View(arguments.size, MEAN, STD)
    items = read_list(arguments.data, "real_train")
    classes = train_classes(items)
    domains = [list_domain(arguments.data, name, classes) for name in ("real", *SHIFTED)]
    train, held_out = split(items, arguments.seed)
    check_present(arguments.weights, "a state dict of the encoder, saved by torch.save")

    columns = {}
    for name, lr in {"plain": arguments.lr, "TPGM": arguments.tpgm_lr}.items():
        seed_everything(arguments.seed, verbose=False)
        encoder = load_encoder(arguments.encoder, arguments.weights)
        with torch.inference_mode():
            width = encoder.eval()(torch.zeros(1, 3, arguments.size, arguments.size)).shape[1]
        model = DomainNetClassifier(encoder.train(), nn.Linear(width, len(classes)), classes)
        model.lr = lr
        tpgm = TPGMCallback(
            loader(held_out, view, arguments.radius_batch_size, arguments, shuffle=True),
            norm="mars",
            radius_lr=arguments.radius_lr,
            radius_steps=1,
            every_n_steps=1,
            exclude=["head.*"],
        )
        fine_tune(
            model,
            arguments.output / "domainnet" / name,
            arguments,
            loader(train, view, arguments.batch_size, arguments, train=True),
            loader(held_out, view, arguments.batch_size, arguments),
            [tpgm] if name == "TPGM" else [],
        )
        columns[name] = evaluate(model, domains, view, arguments)
    report({**columns, **AUTHORS}, SHIFTED, CAPTION, arguments.output / "domainnet" / "table.md")


if __name__ == "__main__":
    main()
