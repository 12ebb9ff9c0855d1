"""The emoji images: 15 classes drawn in six styles, which are the domains of the emoji suite.

`prepare.py` makes the file that `load` reads. Nothing in it is committed: see README.md for origins and licences.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

SIZE = 64
CAP = 130  # code points of a class
PACKAGES = {
    "emoji-datasource-google": "16.0.0",
    "emoji-datasource-twitter": "16.0.0",
    "@lobehub/fluent-emoji-3d": "1.1.0",
    "@lobehub/fluent-emoji-flat": "1.1.0",
    "openmoji": "17.0.0",
}
# class: the categories and the beginnings of subcategories of emoji.json that it takes
CLASSES: dict[str, tuple[tuple[str, ...], ...]] = {
    "face": (("Smileys & Emotion", "face-"),),
    "emotion": (("Smileys & Emotion", "heart", "emotion"),),
    "person": (("People & Body", "person"),),
    "hand": (("People & Body", "hand", "body-parts"),),
    "animal": (("Animals & Nature", "animal-"), ("Smileys & Emotion", "cat-face", "monkey-face")),
    "plant": (("Animals & Nature", "plant-"),),
    "food": (("Food & Drink", ""),),
    "activity": (("Activities", ""),),
    "clothing": (("Objects", "clothing"),),
    "tool": (("Objects", "tool", "household", "office", "science", "medical", "lock"),),
    "device": (("Objects", "computer", "phone", "light & video", "sound", "music"),),
    "sign": (("Symbols", ""),),
    "vehicle": (("Travel & Places", "transport-"),),
    "place": (("Travel & Places", "place-", "hotel"),),
    "sky": (("Travel & Places", "sky", "time"),),
}


class Emoji(NamedTuple):
    """The emoji of all styles, in one order.

    Attributes:
        codes: Code points, ``1f600``, one an emoji.
        labels: int64, shape (N,): position of the class in `CLASSES`.
        images: By style: uint8, shape (N, 3, 64, 64).
    """

    codes: list[str]
    labels: Tensor
    images: dict[str, Tensor]


def class_of(category: str, subcategory: str) -> str | None:
    """The class that takes this kind of emoji, if any does.

    >>> class_of("Smileys & Emotion", "monkey-face"), class_of("Component", "skin-tone")
    ('animal', None)
    """
    for name, kinds in CLASSES.items():
        for wanted, *beginnings in kinds:
            if category == wanted and subcategory.startswith(tuple(beginnings)):
                return name
    return None


def from_png(data: bytes) -> NDArray[np.uint8]:
    """Decode a picture onto white: (3, 64, 64)."""
    picture = Image.open(io.BytesIO(data)).convert("RGBA").resize((SIZE, SIZE), Image.Resampling.LANCZOS)
    white = Image.new("RGBA", picture.size, "white")
    return np.asarray(Image.alpha_composite(white, picture).convert("RGB")).transpose(2, 0, 1)


def from_svg(path: Path) -> NDArray[np.uint8]:
    """Render a drawing onto white: (3, 64, 64)."""
    import resvg_py

    return from_png(bytes(resvg_py.svg_to_bytes(svg_path=str(path), width=2 * SIZE, height=2 * SIZE)))


Files = Callable[[Mapping[str, str]], list[Path]]  # an entry of emoji.json -> where its picture may be


def styles(folders: Mapping[str, Path]) -> dict[str, Files]:
    """Where each style keeps an emoji: with all code points, or without the variation selector.

    Args:
        folders: The unpacked packages by name.
    """
    google, twitter = folders["emoji-datasource-google"], folders["emoji-datasource-twitter"]
    fluent_3d, fluent_flat = folders["@lobehub/fluent-emoji-3d"], folders["@lobehub/fluent-emoji-flat"]
    openmoji = folders["openmoji"]

    def codes(entry: Mapping[str, str]) -> list[str]:
        return [entry["unified"], entry["non_qualified"] or entry["unified"]]

    return {
        "google": lambda entry: [google / "img/google/64" / entry["image"]],
        "twitter": lambda entry: [twitter / "img/twitter/64" / entry["image"]],
        "openmoji": lambda entry: [openmoji / "color/svg" / f"{code.upper()}.svg" for code in codes(entry)],
        "openmoji black": lambda entry: [openmoji / "black/svg" / f"{code.upper()}.svg" for code in codes(entry)],
        "fluent 3d": lambda entry: [fluent_3d / "assets" / f"{code.lower()}.webp" for code in codes(entry)],
        "fluent flat": lambda entry: [fluent_flat / "assets" / f"{code.lower()}.svg" for code in codes(entry)],
    }


def build(folders: Mapping[str, Path], path: Path) -> None:
    """Draw every emoji that all styles have and that is no sequence joined by U+200D, and save them.

    Of a class with more than 130 a fixed random 130 are taken. Joined sequences are left out. Most are variants of
    another emoji, which would put near-duplicates into training and test sets. Flags are left out because the fluent
    styles took theirs from another one.
    """
    entries = json.loads((folders["emoji-datasource-google"] / "emoji.json").read_text())
    found: dict[str, list[tuple[str, dict[str, Path]]]] = {name: [] for name in CLASSES}
    for entry in sorted(entries, key=lambda entry: entry["unified"]):
        kind = class_of(entry["category"], entry["subcategory"])
        if kind is None or "200D" in entry["unified"]:
            continue
        files = {
            style: next((file for file in places(entry) if file.exists()), None)
            for style, places in styles(folders).items()
        }
        present = {style: file for style, file in files.items() if file is not None}
        if len(present) == len(files):
            found[kind].append((entry["unified"].lower(), present))
    order = np.random.default_rng(0)
    kept: list[tuple[str, str, dict[str, Path]]] = []
    for kind, candidates in found.items():
        chosen = sorted(order.permutation(len(candidates))[:CAP])
        kept += [(kind, *candidates[i]) for i in chosen]

    def draw(file: Path) -> NDArray[np.uint8]:
        return from_svg(file) if file.suffix == ".svg" else from_png(file.read_bytes())

    names = list(CLASSES)
    np.savez(
        path,
        codes=np.array([code for _, code, _ in kept]),
        labels=np.array([names.index(kind) for kind, _, _ in kept], dtype=np.int64),
        **{style: np.stack([draw(files[style]) for _, _, files in kept]) for style in styles(folders)},
    )


def load(path: Path) -> Emoji:
    """Read what `build` saved."""
    with np.load(path) as file:
        images = {name: torch.from_numpy(file[name]) for name in file.files if name not in ("codes", "labels")}
        return Emoji(file["codes"].tolist(), torch.from_numpy(file["labels"]), images)
