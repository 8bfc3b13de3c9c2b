"""Image classification data: drawn images of 101 classes, a folder of images, or Food-101 from the hub.

A drawn image is a shape filled with a texture in a pair of colours, on a noisy grey ground; its class is the three together.
The two colours of a pair add up to white, so the mean colour of an image says next to nothing about its class. Image number n of a
split is the same on every machine and in every process, and nothing is stored.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from shardlab.data.datasets import load_from_hub
from shardlab.data.squad_file import DataError

SHAPES = ("disc", "square", "triangle", "ring", "cross", "diamond")
TEXTURES = ("rows", "columns", "diagonals", "checks", "circles")
PAIRS = {
    "red and cyan": ((1, 0, 0), (0, 1, 1)),
    "green and magenta": ((0, 1, 0), (1, 0, 1)),
    "blue and yellow": ((0, 0, 1), (1, 1, 0)),
    "white and black": ((1, 1, 1), (0, 0, 0)),
}
SEED = 2026
COUNT = 101
"""Classes, as many as Food-101 has; of the 120 combinations, the others do not occur."""


def _combinations() -> list[tuple[str, str, str]]:
    every = [(shape, texture, pair) for shape in SHAPES for texture in TEXTURES for pair in PAIRS]
    kept = sorted(np.random.default_rng(SEED).permutation(len(every))[:COUNT])
    return [every[at] for at in kept]


CLASSES = _combinations()
"""By label: shape, texture and pair of colours."""


def _inside(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Which pixels belong to a shape that reaches to 1 in each direction."""
    radius, farthest, nearest = np.hypot(x, y), np.maximum(abs(x), abs(y)), np.minimum(abs(x), abs(y))
    return {
        "disc": radius < 1,
        "square": farthest < 0.85,
        "triangle": (y < 0.8) & (y > 2 * abs(x) - 1),
        "ring": (radius < 1) & (radius > 0.5),
        "cross": (farthest < 1) & (nearest < 0.35),
        "diamond": abs(x) + abs(y) < 1.05,
    }[shape]


def _wave(texture: str, x: np.ndarray, y: np.ndarray, phase: float) -> np.ndarray:
    """A value per pixel; where it is positive stands the pair's first colour."""
    return {
        "rows": np.sin(y + phase),
        "columns": np.sin(x + phase),
        "diagonals": np.sin((x + y) / 1.4 + phase),
        "checks": np.sin(x + phase) * np.sin(y + phase),
        "circles": np.sin(np.hypot(x, y) + phase),
    }[texture]


def draw(label: int, random: np.random.Generator, size: int = 32) -> np.ndarray:
    """One image of a class; place, scale, phase, contrast and ground are drawn.

    Args:
        label: 0 to 100.
        random: where the numbers come from.
        size: height and width, pixels.

    Returns:
        uint8 of shape [size, size, 3].
    """
    shape, texture, pair = CLASSES[label]
    y, x = np.mgrid[0:size, 0:size] / size - 0.5
    left, top = random.uniform(-0.12, 0.12, 2)
    reach, waves, phase = random.uniform(0.28, 0.4), random.uniform(5, 6.5), random.uniform(0, 2 * np.pi)
    first, second = np.array(PAIRS[pair], float)
    in_first = _wave(texture, 2 * np.pi * waves * (x - left), 2 * np.pi * waves * (y - top), phase) > 0
    filling = 0.5 + random.uniform(0.6, 1.0) * (np.where(in_first[..., None], first, second) - 0.5)
    slope = x * random.uniform(-0.3, 0.3) + y * random.uniform(-0.3, 0.3)
    ground = (0.5 + random.uniform(-0.3, 0.3) + slope + random.normal(0, 0.08, (size, size)))[..., None]
    inside = _inside(shape, (x - left) / reach, (y - top) / reach)
    image = np.where(inside[..., None], filling, ground) + random.normal(0, 0.04, (size, size, 3))
    return (image.clip(0, 1) * 255).astype(np.uint8)


class DrawnImages:
    """Drawn images of one split, an RGB `PIL.Image` and a label each; any two splits, and any two numbers, are drawn apart.

    Args:
        split: `train` or `validation`.
        count: images in it; the classes take turns.
        size: height and width, pixels.
    """

    classes = [" ".join(parts) for parts in CLASSES]

    def __init__(self, split: str, count: int, size: int = 32):
        if split not in ("train", "validation"):
            raise DataError(f"there is no split '{split}' of drawn images; there are train and validation")
        if count < 1 or size < 8:
            raise DataError(f"{count} images of {size} pixels: at least one image, of at least 8 pixels, is needed")
        self.split, self.count, self.size = split, count, size

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> tuple[Image.Image, int]:
        if not -self.count <= number < self.count:
            raise IndexError(f"image {number} of {self.count}")
        number = int(number) % self.count
        label = number % COUNT
        random = np.random.default_rng([SEED, 1 if self.split == "train" else 2, number])
        return Image.fromarray(draw(label, random, self.size)), label


class StoredImages:
    """Images of one split that are stored: of a folder, or of a data set of the hub with columns `image` and `label`."""

    def __init__(self, rows, classes: list[str]):
        self.rows, self.classes = rows, classes

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> tuple[Image.Image, int]:
        row = self.rows[int(number)]
        return row["image"].convert("RGB"), row["label"]


def load_images(source: str = "drawn", *, train: int | None = None, validation: int | None = None) -> dict:
    """Images with labels, as `{"train": …, "validation": …}`; each has `classes`, a length, and pairs of an RGB image and a label.

    Args:
        source: `drawn`; a folder with `train` and `validation` in it, and one folder per class in each; or a name on the hub
            such as `ethz/food101`, read from the local cache if the hub cannot be reached.
        train, validation: how many of each; by default all, and 6,060 and 1,010 that are drawn.

    Raises:
        DataError: the source is none of these, or the folder has not this form.
    """
    wanted = {"train": train, "validation": validation}
    if source == "drawn":
        usual = {"train": 60 * COUNT, "validation": 10 * COUNT}
        return {split: DrawnImages(split, wanted[split] or usual[split]) for split in usual}
    if Path(source).is_dir():
        found = _read_folder(Path(source))
    else:
        found = load_from_hub(source, ("image", "label"), "'drawn', nor a folder", "a folder of images")
    rows = {
        split: found[split].select(range(min(limit or len(found[split]), len(found[split])))) for split, limit in wanted.items()
    }
    return {split: StoredImages(data, data.features["label"].names) for split, data in rows.items()}


def _read_folder(folder: Path) -> dict:
    from datasets import load_dataset

    classes = {}
    for split in ("train", "validation"):
        if not (folder / split).is_dir():
            raise DataError(
                f"{folder}: it has no folder {split}; train and validation are needed, with one folder per class in each."
            )
        classes[split] = sorted(path.name for path in (folder / split).iterdir() if path.is_dir())
    if not classes["train"]:
        raise DataError(f"{folder}/train: no folder in it; one folder per class is needed.")
    if unknown := sorted(set(classes["validation"]) - set(classes["train"])):
        raise DataError(f"{folder}/validation: {', '.join(unknown[:5])} is no class of {folder}/train, so no model can learn it.")
    try:
        return load_dataset("imagefolder", data_dir=str(folder))
    except Exception as error:
        raise DataError(f"{folder}: its images cannot be read: {str(error).strip().splitlines()[0]}") from error
