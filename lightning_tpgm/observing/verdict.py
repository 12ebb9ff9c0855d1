"""What a method did, in a few short sentences that say no more than the numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_tpgm.observing.names import in_words, layers
from lightning_tpgm.observing.reporting import PINNED, by_block, left
from lightning_tpgm.projection import MIN_RADIUS

MOST = 24  # layers that are judged one by one
FREE, PLAIN = 0.3, 0.1  # of the steps: what is bound in fewer
TIGHT = 0.5  # of the distance: what keeps less
LITTLE, MUCH = 0.1, 0.9  # of the distance, after the fact
FEW = 50  # steps: radii start at half of the first distance, and need some steps to leave it


def explain(names: Sequence[str], quantities: Mapping[str, Tensor], steps: int, is_fixed: bool = False) -> str:
    """Which part of the network was held, for how much of the run, and what that suggests.

    Args:
        names: Of T tensors; they are judged by layer, many layers by block.
        quantities: Shape (T,) each, on the CPU.
        steps: How many optimizer steps there were.
        is_fixed: Whether a number given by the user bounds how fast radii grow.
    """
    if not quantities:
        return "Nothing was constrained yet."
    sizes, shown = by_block(layers(names), quantities, MOST)
    labels = list(sizes)
    if not bool((shown.get("wanted", shown["distance"]) > MIN_RADIUS).any()):
        return "No constrained tensor has moved yet."
    if "wanted" not in shown:
        return _distances(labels, shown, quantities)
    return _of_steps(labels, shown, steps, is_fixed) if "bound" in shown else _after_the_fact(labels, shown)


def _of_steps(labels: Sequence[str], shown: Mapping[str, Tensor], steps: int, is_fixed: bool) -> str:
    r"""Who was bound in few steps moved freely; who kept less than half of the distance was held tightly.

    >>> text = _of_steps(["stem", "body", "head"], {"wanted": torch.ones(3), "allowed": torch.tensor([0.1, 0.7, 1.0]),
    ...     "bound": torch.tensor([1.0, 0.6, 0.2]), "pinned": torch.tensor([0.9, 0.0, 0.0])}, 500, is_fixed=False)
    >>> print(text.replace(". ", ".\n"))
    head moved freely: bound in 20 % of the steps.
    body was held back: bound in 60 % of the steps, and kept 70 % of the distance.
    stem was pinned: held almost at the pretrained value in 90 % of the steps.
    For more accuracy in distribution, lower the learning rate, or exclude it.
    """
    ratios, bound, acted = left(shown), shown["bound"], shown["wanted"] > MIN_RADIUS
    pinned = acted & (shown["pinned"] >= PINNED)
    free = acted & ~pinned & (bound < FREE)
    tight = acted & ~pinned & ~free & (ratios < TIGHT)
    held = acted & ~pinned & ~free & ~tight

    sentences = []
    if free.any():
        sentences.append(f"{_who(labels, free)} moved freely: bound in {_percent(bound, free)} of the steps")
    for chosen, how in ((held, "held back"), (tight, "held tightly")):
        if chosen.any():
            often, kept = _percent(bound, chosen), _percent(ratios, chosen)
            bounds = f"bound in {often} of the steps, and kept {kept} of the distance"
            sentences.append(f"{_was(labels, chosen)} {how}: {bounds}")
    if pinned.any():
        share = _percent(shown["pinned"], pinned)
        sentences.append(f"{_was(labels, pinned)} pinned: held almost at the pretrained value in {share} of the steps")
    if (pinned | tight).any():
        sentences.append(_advice(pinned, (pinned | tight)[acted], steps, is_fixed))
    if bool((bound[acted] < PLAIN).all()):
        sentences.append("So this was nearly plain fine-tuning")
    return ". ".join(sentences) + "."


def _advice(pinned: Tensor, held: Tensor, steps: int, is_fixed: bool) -> str:
    if steps < FEW:
        return f"After {steps} step{'s' * (steps != 1)} this says little yet"
    ways = []
    if is_fixed:
        ways.append("raise `radius_lr` or use 'auto'")
    elif pinned.any():
        ways.append("lower the learning rate")
    if not bool(held.all()):
        ways.append(f"exclude {'it' if _is_one(held) else 'them'}")
    if not ways:
        return "Plain fine-tuning at this learning rate would tell what that costs in distribution"
    return f"For more accuracy in distribution, {', or '.join(ways)}"


def _after_the_fact(labels: Sequence[str], shown: Mapping[str, Tensor]) -> str:
    """Of one projection.

    >>> _after_the_fact(["body", "head"], {"wanted": torch.ones(2), "allowed": torch.tensor([0.6, 1.0])})
    'head kept nearly all of the distance: 100 %. body was taken back to 60 % of the distance.'
    """
    ratios, acted = left(shown), shown["wanted"] > MIN_RADIUS
    kept, home = acted & (ratios > MUCH), acted & (ratios < LITTLE)
    back = acted & ~kept & ~home
    sentences = []
    if kept.any():
        sentences.append(f"{_who(labels, kept)} kept nearly all of the distance: {_percent(ratios, kept)}")
    if back.any():
        sentences.append(f"{_was(labels, back)} taken back to {_percent(ratios, back)} of the distance")
    if home.any():
        remains = f"{_percent(ratios, home)} of the distance is left"
        sentences.append(f"{_was(labels, home)} put back almost to the pretrained value: {remains}")
    return ". ".join(sentences) + "."


def _distances(labels: Sequence[str], shown: Mapping[str, Tensor], quantities: Mapping[str, Tensor]) -> str:
    r"""Of methods without radii.

    >>> found = {"distance": torch.tensor([3.0, 4.0]), "omega": torch.tensor([0.2, 0.5])}
    >>> print(_distances(["body", "head"], found, found).replace(". ", ".\n"))
    The constrained tensors together are 5 away from their pretrained values.
    head is farthest, at 4.
    Of what leads away in a gradient, DiGraP now takes out 20 to 50 %.
    """
    total, farthest = float(quantities["distance"].norm()), int(shown["distance"].argmax())
    count = len(quantities["distance"])
    text = f"The constrained tensors together are {total:.3g} away from their pretrained values."
    text += f" {labels[farthest]} is farthest, at {float(shown['distance'][farthest]):.3g}."
    if "omega" in quantities:
        omega = _percent(quantities["omega"], torch.ones(count, dtype=torch.bool))
        text += f" Of what leads away in a gradient, DiGraP now takes out {omega}."
    return text


def _who(labels: Sequence[str], chosen: Tensor) -> str:
    whole = len(labels) > 1 and bool(chosen.all())
    return "All constrained layers" if whole else in_words(labels, chosen.tolist())


def _was(labels: Sequence[str], chosen: Tensor) -> str:
    return f"{_who(labels, chosen)} {'was' if _is_one(chosen) else 'were'}"


def _is_one(chosen: Tensor) -> bool:
    return int(chosen.sum()) == 1


def _percent(values: Tensor, chosen: Tensor) -> str:
    """From the least to the most, rounded.

    >>> _percent(torch.tensor([0.2, 0.9, 0.449]), torch.tensor([True, False, True]))
    '20 to 45 %'
    """
    ends = sorted({round(100 * float(end)) for end in values[chosen].aminmax()})
    return f"{' to '.join(map(str, ends))} %"
