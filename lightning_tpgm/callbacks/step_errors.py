"""What a user's step raises on a held-out batch, as one error: what was evaluated, likely causes, remedies."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any, Literal, NamedTuple

from torch import Tensor

from lightning_tpgm.callbacks.framework import MisconfigurationException, is_own_error

StepName = Literal["training_step", "validation_step", "loss callable"]
Description = Mapping[str, str]  # what is found at each place of a batch: {"": "list of 2", "[0]": "..."}

_PLACES, _DEPTH, _SHOWN = 50, 4, 3  # the places of a batch that are looked at, how deep, and how many are named

_OTHER_LOSS = "'validation_step', or a callable (pl_module, batch) -> Tensor"


class Evaluation(NamedTuple):
    """What is evaluated, in which mode, on which batch; and what the last training batch was like, if that is known."""

    step: StepName
    eval_mode: bool
    batch: Any
    trained_on: Description | None


@contextmanager
def explained(evaluation: Evaluation, gradient: bool = False) -> Iterator[None]:
    """Errors become one with the likely causes and remedies, the original chained. Those of Lightning pass through.

    Args:
        evaluation: What is done inside.
        gradient: Whether it is the loss's gradient that is taken.
    """
    try:
        yield
    except Exception as error:
        if is_own_error(error):
            raise
        raise MisconfigurationException(_explanation(error, evaluation, gradient)) from error


@contextmanager
def loading(what: str) -> Iterator[None]:
    """Errors of a loader become one that names it, the original chained; those of Lightning pass through.

    Args:
        what: What it does inside.
    """
    try:
        yield
    except Exception as error:
        if is_own_error(error):
            raise
        raise MisconfigurationException(
            f"The held-out loader failed to {what}: {_said(error)}\nIt gives the batches that the radii are learned"
            " on. The error is one of its data set, sampler, collate_fn or worker, or of the function that makes it."
            " Mend that, or pass another `dataloader`."
        ) from error


def described(batch: Any) -> Description:
    """Types, shapes and keys by place, and no values.

    >>> import torch
    >>> described([torch.zeros(8, 6), 3])
    {'': 'list of 2', '[0]': 'float32 tensor of shape (8, 6)', '[1]': 'int'}
    """
    try:
        return dict(islice(_places(batch, "", 0), _PLACES))
    except Exception:  # noqa: BLE001  # of a container that is like no other: training goes on
        return {"": type(batch).__name__}


def _places(value: Any, place: str, depth: int) -> Iterator[tuple[str, str]]:
    parts: Iterator[tuple[Any, Any]] = iter(())
    if isinstance(value, Tensor):
        yield place, f"{str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)}"
    elif isinstance(value, Mapping):
        keys = list(islice(value.keys(), _PLACES))
        yield place, f"{type(value).__name__} with the keys {keys}"
        parts = ((key, value[key]) for key in keys)
    elif isinstance(value, list | tuple):
        yield place, f"{type(value).__name__} of {len(value)}"
        parts = enumerate(islice(value, _PLACES))
    else:
        yield place, type(value).__name__
    if depth < _DEPTH:
        for key, part in parts:
            yield from _places(part, f"{place}[{key!r}]", depth + 1)


def _explanation(error: Exception, evaluation: Evaluation, gradient: bool) -> str:
    step, found = evaluation.step, described(evaluation.batch)
    what = f"gradient of the held-out loss of the {step}" if gradient else step
    mode = "eval mode" if evaluation.eval_mode else "the modes that the module trains in"
    differences = None if evaluation.trained_on is None else _differences(found, evaluation.trained_on)
    causes = enumerate(_causes(error, evaluation, gradient, differences), 1)
    listed = "".join(f"\n({i}) {cause}." for i, cause in causes)
    return (
        f"The {what} failed on a held-out batch: {_said(error)}\n"
        f"It was evaluated in {mode}, to learn the radii, on a batch that is {_shown(found)}."
        f" {_compared(differences)}\nLikely causes, the likeliest first:{listed}"
    )


def _said(error: Exception) -> str:
    """Its class and its text; an error may fail to say it."""
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:  # noqa: BLE001
        return f"{type(error).__name__}, whose text cannot be read"


def _shown(found: Description) -> str:
    parts = [f"{place}: {kind}" for place, kind in found.items() if place]
    more = f", and {len(parts) - _SHOWN} more" if len(parts) > _SHOWN else ""
    return _a(found[""]) + (f" ({', '.join(parts[:_SHOWN])}{more})" if parts else "")


def _differences(found: Description, trained_on: Description) -> list[str]:
    """Where a held-out batch is unlike a training batch, whatever the number of examples in them."""
    return [
        f"{place or 'the batch'} is {_a(kind)}, in training {_a(trained_on[place])}"
        for place, kind in found.items()
        if place in trained_on and _of_one_example(kind) != _of_one_example(trained_on[place])
    ]


def _a(kind: str) -> str:
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"


def _of_one_example(kind: str) -> str:
    before, shape, sizes = kind.partition(" tensor of shape (")
    return before + shape + sizes.partition(",")[2]


def _compared(differences: list[str] | None) -> str:
    if differences is None:
        return "There is no training batch to compare it with."
    if not differences:
        return "The last training batch has the same structure."
    more = f", and {len(differences) - _SHOWN} more" if len(differences) > _SHOWN else ""
    return f"It differs in structure from the last training batch: {'; '.join(differences[:_SHOWN])}{more}."


def _causes(error: Exception, evaluation: Evaluation, gradient: bool, differences: list[str] | None) -> list[str]:
    """Causes with their remedies, the likeliest first."""
    step, eval_mode, *_ = evaluation
    batch = (
        "held-out batches look different from those that it is written for. Pass a `dataloader`, or define"
        f" tpgm_dataloader(), with batches that look like them. Or pass another `loss`: {_OTHER_LOSS}"
    )
    mode = (
        f"the {step} needs train mode, as in detectors, auxiliary heads and layers that refuse a backward pass in eval"
        " mode. Pass `eval_mode=False`"
    )
    validation = (
        "what validation does is not made for a gradient (changes in place, numpy). Pass another `loss`: None for the"
        " training_step, or a callable (pl_module, batch) -> Tensor"
    )
    own = (
        f"the {step} needs what only the training loop gives it, or has a mistake of its own, which the error above"
        f" shows. Mend it, or pass another `loss`: {_OTHER_LOSS}"
    )
    memory = "the batch is too large for a backward pass here. Pass a `dataloader` with smaller ones"
    if step == "validation_step":
        causes = [validation, batch, mode, own]
    elif step == "training_step":
        causes = [batch, mode, own] if differences else [mode, batch, own]
    else:
        causes = [batch, own, mode] if differences else [own, batch, mode]
    if gradient:
        causes = [mode, *(cause for cause in causes if cause in (validation, own))]
    if not eval_mode:
        causes.remove(mode)
    return [memory, *causes] if "out of memory" in _said(error) else causes
