"""Names of tensors as people read them: what differs, by block where there are many, runs of them in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import groupby

Blocks = dict[str, list[int]]  # the label of each block, and which tensors are in it


def shortened(names: Sequence[str]) -> list[str]:
    """The names without the parts that all of them begin or end with; a number keeps the part before it.

    >>> shortened(["model.encoder.0.weight", "model.encoder.1.weight", "model.head.weight"])
    ['encoder.0', 'encoder.1', 'head']
    >>> shortened(["model.layers.0.weight", "model.layers.1.weight"])
    ['layers.0', 'layers.1']
    """
    parts = [name.split(".") for name in names]
    spare = min(map(len, parts), default=1) - 1  # each keeps one part
    if len(names) < 2:
        return list(names)
    first = next((i for i in range(spare) if len({part[i] for part in parts}) > 1), spare)
    if first > 0 and any(part[first].isdigit() for part in parts):
        first -= 1
    last = next((i for i in range(spare - first) if len({part[-1 - i] for part in parts}) > 1), spare - first)
    return [".".join(part[first : len(part) - last]) for part in parts]


def layers(names: Sequence[str]) -> list[str]:
    """The layer of each tensor; a tensor beside layers is one of its own.

    >>> layers(["model.position", "model.head.weight", "model.head.bias"])
    ['model.position', 'model.head', 'model.head']
    """
    parents = [name.rpartition(".")[0] for name in names]
    above = {parent[:end] for parent in parents for end, letter in enumerate(parent) if letter == "."}
    return [name if not parent or parent in above else parent for name, parent in zip(names, parents, strict=True)]


def end_of(name: str, length: int = 38) -> str:
    """A name that is not too long: the end of one says most.

    >>> end_of("text_model.encoder.layers.11.self_attn.k_proj.weight")
    '…oder.layers.11.self_attn.k_proj.weight'
    """
    return name if len(name) <= length else f"…{name[-length:]}"


def blocks(names: Sequence[str], most: int) -> Blocks:
    """Tensors by block, in their order: those of one name if there are few names, else those that begin alike.

    The names are cut at the finest depth that gives few enough blocks. If these are far fewer, neighbours of the next
    depth are put together instead.

    Args:
        names: Of the tensors, or of their layers.
        most: How many blocks there may be, where names are not all of families of their own.

    >>> blocks(["stem.weight", "layer.0.weight", "layer.0.bias", "layer.1.weight", "layer.1.bias"], most=3)
    {'stem': [0], 'layer.0': [1, 2], 'layer.1': [3, 4]}
    """
    if len(set(names)) <= most:
        return _cut([(name,) for name in names], 1)
    short = _telling([tuple(name.split(".")) for name in shortened(names)])
    cuts = [_cut(short, depth) for depth in range(1, max(map(len, short)) + 1)]
    fitting = [cut for cut in cuts if len(cut) <= most]
    best = fitting[-1] if fitting else {}
    finer = cuts[len(fitting)] if len(fitting) < len(cuts) else None
    largest = max(map(len, best.values()), default=len(names))  # tensors in one block
    if finer is None or (len(best) >= most / 4 and largest <= len(names) / 2):
        return best
    return _together(finer, most)


def _telling(names: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Each name as far as it begins like another one, and one part more."""
    count = Counter(name[:depth] for name in names for depth in range(1, len(name) + 1))
    return [next((name[:d] for d in range(1, len(name)) if count[name[:d]] == 1), name) for name in names]


def _cut(names: Sequence[Sequence[str]], depth: int) -> Blocks:
    found: Blocks = {}
    for index, parts in enumerate(names):
        found.setdefault(".".join(parts[:depth]), []).append(index)
    return found


def _together(fine: Blocks, most: int) -> Blocks:
    """Neighbours with one parent, as many to a block as are needed to be few enough."""
    families = [list(family) for _, family in groupby(fine, lambda label: label.rpartition(".")[0])]
    size, runs = 1, [[label] for label in fine]
    while len(runs) > max(most, len(families)):
        size += 1
        runs = [family[i : i + size] for family in families for i in range(0, len(family), size)]
    return {_span(run): [index for label in run for index in fine[label]] for run in runs}


def _span(run: Sequence[str]) -> str:
    last = run[-1].rpartition(".")[2]
    return run[0] if len(run) == 1 else f"{run[0]}-{last}"


def in_words(labels: Sequence[str], chosen: Sequence[bool], most: int = 3) -> str:
    """Which of the labels are chosen, runs of neighbours as one; empty if none is.

    >>> in_words(["stem", "layer1", "layer2", "layer3", "head"], [True, False, True, True, True])
    'stem and layer2 to head'
    >>> in_words("abcdefgh", [letter not in "bdf" for letter in "abcdefgh"])
    'a, c and 3 others'
    """
    pairs = groupby(zip(labels, chosen, strict=True), lambda pair: pair[1])
    runs = [[label for label, _ in run] for is_chosen, run in pairs if is_chosen]
    words: list[str] = []
    covers: list[int] = []  # how many labels each word stands for
    for run in runs:
        few = len(run) <= 2
        words += run if few else [f"{run[0]} to {run[-1]}"]
        covers += [1] * len(run) if few else [len(run)]
    if len(words) > most:
        words = [*words[: most - 1], f"{sum(covers[most - 1 :])} others"]
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))
