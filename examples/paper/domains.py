"""Which images there are: DomainNet's list files, ImageNet's folders. What does not fit together is refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from images import Item
from PIL import Image

DOMAINNET = """DATA/
    real/aircraft_carrier/real_001_000001.jpg ...    and likewise sketch/ painting/ infograph/ clipart/
    real_train.txt    lines "real/aircraft_carrier/real_001_000001.jpg 0"
    real_test.txt sketch_test.txt painting_test.txt infograph_test.txt clipart_test.txt"""
IMAGENET = """DATA/
    train/n01440764/*.JPEG ...    and likewise val/ imagenet-a/ imagenet-r/ sketch/
    imagenetv2-matched-frequency-format-val/0/*.jpeg ...    0 to 999, in the order of the sorted folders of train/"""


@dataclass(frozen=True)
class Domain:
    """Images to test on. ``classes`` are the only ones that occur, among which the answer is chosen. None: all."""

    name: str
    items: Sequence[Item]
    classes: tuple[int, ...] | None = None


def check_classes(source: str, found: Sequence[str], expected: Sequence[str]) -> None:
    """Exit unless a source of labels has the classes of the training images in their order."""
    if len(found) != len(expected):
        raise SystemExit(f"{source} has {len(found)} classes, the training images have {len(expected)}.")
    for label, (name, other) in enumerate(zip(found, expected, strict=True)):
        if name != other:
            raise SystemExit(f"{source} has {name!r} as class {label}, the training images have {other!r}.")


def check_present(path: Path, layout: str) -> Path:
    """The path; exit if nothing is there, and say what should be."""
    if not path.exists():
        raise SystemExit(f"{path} is missing. Expected is this layout:\n{layout}")
    return path


def read_list(root: Path, name: str) -> list[Item]:
    """The images of a list file, with their labels."""
    path = check_present(root / f"{name}.txt", DOMAINNET)
    lines = [line.rsplit(maxsplit=1) for line in path.read_text().splitlines() if line.strip()]
    items = [(root / image, int(label)) for image, label in lines]
    check_present(items[0][0], DOMAINNET)
    return items


def list_classes(items: Sequence[Item], source: str) -> dict[int, str]:
    """The folder of each label; exit if a label has two."""
    names: dict[int, str] = {}
    for path, label in items:
        if names.setdefault(label, path.parent.name) != path.parent.name:
            raise SystemExit(f"{source} gives label {label} to both {names[label]!r} and {path.parent.name!r}.")
    return names


def train_classes(items: Sequence[Item]) -> list[str]:
    """The folders of the training images in the order of their labels; exit unless those count from 0."""
    names = list_classes(items, "real_train.txt")
    absent = sorted(set(range(max(names) + 1)) - set(names))
    if absent:
        raise SystemExit(f"real_train.txt has labels up to {max(names)}, and no image with label {absent[0]}.")
    return [names[label] for label in range(len(names))]


def list_domain(root: Path, name: str, classes: Sequence[str]) -> Domain:
    """The test images of a domain; exit if its labels are not those of the training list."""
    source = f"{name}_test.txt"
    items = read_list(root, f"{name}_test")
    for label, found in list_classes(items, source).items():
        expected = classes[label] if 0 <= label < len(classes) else None
        if found != expected:
            raise SystemExit(f"{source} has {found!r} as class {label}, real_train.txt has {expected!r}.")
    return Domain(name, items)


def split(items: Sequence[Item], seed: int) -> tuple[list[Item], list[Item]]:
    """Training images, and a random tenth that is held out from them."""
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(seed)).tolist()
    held_out = len(items) // 10
    return [items[i] for i in order[held_out:]], [items[i] for i in order[:held_out]]


def subfolders(folder: Path) -> list[str]:
    """Their sorted names; exit without any."""
    check_present(folder, IMAGENET)
    found = sorted(path.name for path in folder.iterdir() if path.is_dir())
    if not found:
        raise SystemExit(f"{folder} has no folders. Expected is this layout:\n{IMAGENET}")
    return found


def images_in(folder: Path) -> list[Path]:
    """The files that pillow can read by their names, sorted; exit without any. A file manager may have left others."""
    known = Image.registered_extensions()
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in known and path.name[0] != ".")
    if not found:
        raise SystemExit(f"{folder} has no images. Expected is this layout:\n{IMAGENET}")
    return found


def folder_domain(root: Path, name: str, folder: str, classes: Sequence[str], *, part: bool = False) -> Domain:
    """The images of a folder of folders; exit if those are not the classes, or with ``part`` some of them."""
    found = subfolders(root / folder)
    if all(one.isdecimal() for one in found):  # numbers: sorted as such, "10" follows "9"
        check_classes(folder, sorted(found, key=int), [str(label) for label in range(len(classes))])
        labels = {one: int(one) for one in found}
    else:
        unknown = sorted(set(found) - set(classes))
        if unknown:
            raise SystemExit(f"{folder} has folders that train has not, for instance {', '.join(unknown[:3])}.")
        absent = sorted(set(classes) - set(found))
        if absent and not part:
            raise SystemExit(f"{folder} lacks folders that train has, for instance {', '.join(absent[:3])}.")
        labels = {one: classes.index(one) for one in found}
    items = [(path, labels[one]) for one in found for path in images_in(root / folder / one)]
    return Domain(name, items, None if len(labels) == len(classes) else tuple(sorted(labels.values())))


def read_names(path: Path, classes: Sequence[str]) -> list[str]:
    """Names of the classes for sentences, from JSON {"n01440764": "tench", ...} or lines "n01440764 tench"."""
    text = check_present(path, 'a JSON object {"n01440764": "tench", ...}, or lines "n01440764 tench"').read_text()
    pairs = [line.split(maxsplit=1) for line in text.splitlines() if line.strip()] if path.suffix != ".json" else None
    names: dict[str, str] = json.loads(text) if pairs is None else {folder: name.strip() for folder, name in pairs}
    check_classes(str(path), sorted(names), classes)
    return [names[folder] for folder in classes]
