"""What a method did, in up to three sentences that say no more than the numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_tpgm.observing.names import in_words, layers
from lightning_tpgm.observing.reporting import PINNED, by_block, left
from lightning_tpgm.projection import MIN_RADIUS

MOST = 24  # layers that are judged one by one
FREE, PLAIN = 0.3, 0.1  # of the steps: what is bound in fewer
TIGHT = 0.5  # of what was wanted: what is allowed less
LITTLE, MUCH = 0.1, 0.9  # of the distance, after the fact


def explain(names: Sequence[str], quantities: Mapping[str, Tensor]) -> str:
    """Which part of the network was held, for how much of the run, and what that suggests.

    Args:
        names: Of T tensors; they are judged by layer, many layers by block.
        quantities: Shape (T,) each, on the CPU.
    """
    if not quantities:
        return "Nothing was constrained yet."
    sizes, shown = by_block(layers(names), quantities, MOST)
    labels = list(sizes)
    if not bool((shown.get("wanted", shown["distance"]) > MIN_RADIUS).any()):
        return "No constrained tensor has moved yet."
    if "wanted" not in shown:
        return _distances(labels, shown, quantities)
    return _of_steps(labels, shown) if "bound" in shown else _after_the_fact(labels, shown)


def _of_steps(labels: Sequence[str], shown: Mapping[str, Tensor]) -> str:
    r"""Who was bound in few steps moved freely; who was allowed less than half of what was wanted was held tightly.

    >>> text = _of_steps(["stem", "body", "head"], {"wanted": torch.ones(3), "allowed": torch.tensor([0.1, 0.7, 1.0]),
    ...     "bound": torch.tensor([1.0, 0.6, 0.2]), "pinned": torch.tensor([0.9, 0.0, 0.0])})
    >>> print(text.replace(". ", ".\n").replace("; ", ";\n"))
    head moved freely: bound in 20 % of the steps.
    body was held back: bound in 60 % of the steps, and allowed 70 % of the distance that was wanted.
    stem was pinned: at the pretrained value in 90 % of the steps;
    lower the learning rate, or exclude it, if accuracy in distribution matters more.
    """
    ratios, bound, acted = left(shown), shown["bound"], shown["wanted"] > MIN_RADIUS
    pinned = acted & (shown["pinned"] >= PINNED)
    free = acted & ~pinned & (bound < FREE)
    tight = acted & ~pinned & ~free & (ratios < TIGHT)
    tight &= ~pinned.any()  # there is one sentence for those that were held most
    held = acted & ~pinned & ~free & ~tight

    def bounds(chosen: Tensor) -> str:
        steps, allowed = _percent(bound, chosen), _percent(ratios, chosen)
        return f"bound in {steps} of the steps, and allowed {allowed} of the distance that was wanted"

    sentences = []
    if free.any():
        sentences.append(f"{_who(labels, free)} moved freely: bound in {_percent(bound, free)} of the steps")
    if held.any():
        sentences.append(f"{_was(labels, held)} held back: {bounds(held)}")
    if tight.any():
        sentences.append(f"{_was(labels, tight)} held tightly: {bounds(tight)}{_advice(tight)}")
    if pinned.any():
        steps = f"in {_percent(shown['pinned'], pinned)} of the steps"
        sentences.append(f"{_was(labels, pinned)} pinned: at the pretrained value {steps}{_advice(pinned)}")
    if bool((bound[acted] < PLAIN).all()):
        sentences.append("So this was nearly plain fine-tuning")
    return ". ".join(sentences) + "."


def _advice(held: Tensor) -> str:
    excluded = "" if bool(held.all()) else f", or exclude {'it' if _is_one(held) else 'them'},"
    return f"; lower the learning rate{excluded} if accuracy in distribution matters more"


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
        sentences.append(f"{_was(labels, home)} put back to the pretrained value: {remains}")
    return ". ".join(sentences) + "."


def _distances(labels: Sequence[str], shown: Mapping[str, Tensor], quantities: Mapping[str, Tensor]) -> str:
    """Of methods without radii."""
    total, farthest = float(quantities["distance"].norm()), int(shown["distance"].argmax())
    count = len(quantities["distance"])
    text = (
        f"All {count} tensors together are at a distance of {total:.3g} from their pretrained values,"
        f" {labels[farthest]} is farthest with {float(shown['distance'][farthest]):.3g}."
    )
    if "omega" in quantities:
        omega = _percent(quantities["omega"], torch.ones(count, dtype=torch.bool))
        text += f" Of a gradient's part that leads away, {omega} is taken out now."
    return text


def _who(labels: Sequence[str], chosen: Tensor) -> str:
    whole = len(labels) > 1 and bool(chosen.all())
    return "All constrained layers" if whole else in_words(labels, chosen.tolist())


def _was(labels: Sequence[str], chosen: Tensor) -> str:
    several = int(chosen.sum()) > 1
    return f"{_who(labels, chosen)} {'were' if several else 'was'}"


def _is_one(chosen: Tensor) -> bool:
    return int(chosen.sum()) == 1


def _percent(values: Tensor, chosen: Tensor) -> str:
    """From the least to the most, rounded.

    >>> _percent(torch.tensor([0.2, 0.9, 0.449]), torch.tensor([True, False, True]))
    '20 to 45 %'
    """
    ends = sorted({round(100 * float(end)) for end in values[chosen].aminmax()})
    return f"{' to '.join(map(str, ends))} %"
