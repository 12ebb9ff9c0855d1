"""The command line: ``python -m lightning_tpgm project --help``."""

from __future__ import annotations

from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Any

from lightning_tpgm.callbacks.framework import classes, pl, same_package
from lightning_tpgm.callbacks.post_hoc import project_checkpoint
from lightning_tpgm.methods.radii import RadiusLr
from lightning_tpgm.norms import Norm

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

    from lightning_tpgm.callbacks.tpgm import TPGMCallback
else:
    LightningModule = reduce(or_, classes("core:LightningModule"))  # of either package


def project(
    model: LightningModule,
    pretrained: str,
    finetuned: str,
    dataloader: str,
    output: str,
    norm: Norm = "l2",
    radius_lr: RadiusLr = "auto",
    radius_steps: int = 200,
    exclude: list[str] | str | None = None,
    loss: str | None = None,
    eval_mode: bool = True,
    accelerator: str = "auto",
    devices: int | list[int] | str = "auto",
    precision: str | None = None,
) -> None:
    """Project a fine-tuned checkpoint towards its pretrained one, with radii learned on held-out data (TPGM).

    Args:
        model: Import path of the LightningModule, with its arguments under it.
        pretrained: The pretrained checkpoint, state dict or .safetensors file.
        finetuned: The fine-tuned one.
        dataloader: Import path of a loader of held-out data, or of a function that makes one, for instance
            my_project.data:held_out.
        output: The file to write, of the same kind as the fine-tuned one.
        norm: l2 or mars.
        radius_lr: auto, or Adam's learning rate of the radii (the authors': 0.01).
        radius_steps: Number of radius updates.
        exclude: fnmatch patterns over parameter names that keep their fine-tuned value.
        loss: Leave out for the module's training_step, or validation_step.
        eval_mode: false evaluates the loss in train mode, for a training_step that needs it.
        accelerator: As in Lightning's Trainer.
        devices: As in Lightning's Trainer.
        precision: As in Lightning's Trainer.
    """
    options: dict[str, Any] = {"accelerator": accelerator, "devices": devices, "precision": precision}
    trainer: pl.Trainer = same_package(model, "trainer:Trainer")(
        **options, logger=False, enable_checkpointing=False, enable_model_summary=False
    )
    callback = project_checkpoint(
        model,
        pretrained,
        finetuned,
        dataloader,
        output,
        norm=norm,
        radius_lr=radius_lr,
        radius_steps=radius_steps,
        exclude=[exclude] if isinstance(exclude, str) else exclude or (),
        loss=loss,  # type: ignore[arg-type]  # checked by the callback, with its message
        eval_mode=eval_mode,
        trainer=trainer,
    )
    if trainer.is_global_zero:
        _show(callback, output)


def _show(callback: TPGMCallback, output: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("parameter", "before", "after", "ratio", title=output)
    for row in callback.report():
        numbers = (f"{row[name]:.4g}" for name in ("wanted", "distance", "ratio"))
        table.add_row(row["name"], *numbers)
    console = Console()
    console.print(table)
    console.print(callback.explain(), markup=False, highlight=False)


def main(args: list[str] | None = None) -> None:
    """Run the command line with these arguments, by default those of the process."""
    try:
        from jsonargparse import CLI  # type: ignore[attr-defined]  # `auto_cli` is newer than the oldest supported
    except ImportError as error:
        raise SystemExit("The command line needs jsonargparse: pip install 'lightning-tpgm[cli]'.") from error
    CLI({"project": project}, args=args, as_positional=False, prog="python -m lightning_tpgm")  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main()
