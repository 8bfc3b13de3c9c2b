"""Images: every process draws the same ones, the mean colour says nothing of the class, and folders are read or named."""

import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from shardlab.data.images import CLASSES, COUNT, DrawnImages, draw, load_images
from shardlab.data.squad_file import DataError


def pixels(images, count: int) -> np.ndarray:
    return np.stack([np.asarray(images[number][0], float) for number in range(count)])


def test_classes_are_101_different_combinations():
    assert len(CLASSES) == len(set(CLASSES)) == COUNT == 101


def test_every_process_draws_the_same():
    told = """
import zlib
from shardlab.data.images import DrawnImages
print([zlib.crc32(DrawnImages("train", 300)[number][0].tobytes()) for number in (0, 7, 299)])
"""
    first, second = (
        subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, check=True).stdout for _ in range(2)
    )
    assert first == second
    assert len(set(first.strip("[]\n").split(", "))) == 3


def test_splits_and_numbers_are_drawn_apart():
    train, validation = DrawnImages("train", 202), DrawnImages("validation", 202)
    drawn = {images[number][0].tobytes() for images in (train, validation) for number in range(202)}
    assert len(drawn) == 404
    labels = Counter(label for images in (train, validation) for _, label in (images[number] for number in range(202)))
    assert set(labels.values()) == {4} and len(labels) == COUNT
    assert train[-1][1] == train[201][1]
    with pytest.raises(IndexError):
        train[202]


def test_mean_colour_does_not_tell_the_class():
    """The nearest of the classes' mean colours is right for a few per cent; 1 % is chance."""
    train, validation = DrawnImages("train", 20 * COUNT), DrawnImages("validation", 4 * COUNT)
    means = pixels(train, len(train)).mean((1, 2)).reshape(20, COUNT, 3).mean(0)
    of_each = pixels(validation, len(validation)).mean((1, 2))
    nearest = np.linalg.norm(of_each[:, None] - means[None], axis=2).argmin(1)
    assert (nearest == np.arange(len(validation)) % COUNT).mean() < 0.05


def test_the_images_themselves_do_tell_it():
    """Drawn with the same numbers, so in the same place and scale, the images of any two classes differ."""
    drawn = np.stack([draw(label, np.random.default_rng(1), 32) for label in range(COUNT)]).astype(float)
    apart = np.abs(drawn[:, None] - drawn[None]).mean((2, 3, 4))
    assert apart[~np.eye(COUNT, dtype=bool)].min() > 2


@pytest.fixture
def folder(tmp_path):
    for split, count in (("train", 3), ("validation", 1)):
        for name, colour in (("bread", (200, 100, 0)), ("soup", (0, 90, 200))):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (20, 16), colour).save(tmp_path / split / name / f"{number}.png")
    Image.new("L", (20, 16), 7).save(tmp_path / "train" / "soup" / "grey.png")
    return tmp_path


def test_a_folder_is_read(folder):
    found = load_images(str(folder))
    assert found["train"].classes == ["bread", "soup"] and len(found["train"]) == 7 and len(found["validation"]) == 2
    image, label = found["validation"][1]
    assert image.mode == "RGB" and image.getpixel((0, 0)) == (0, 90, 200) and label == 1
    assert {found["train"][number][0].mode for number in range(7)} == {"RGB"}
    assert len(load_images(str(folder), train=2)["train"]) == 2


@pytest.mark.parametrize(
    "spoil, said",
    [
        (lambda folder: (folder / "validation").rename(folder / "val"), "no folder validation"),
        (lambda folder: (folder / "validation" / "soup").rename(folder / "validation" / "stew"), "stew is no class of"),
        (lambda folder: [path.rename(folder / path.name) for path in (folder / "train").iterdir()], "one folder per class"),
    ],
)
def test_a_folder_of_another_form_is_named(folder, spoil, said):
    spoil(folder)
    with pytest.raises(DataError, match=said):
        load_images(str(folder))


def test_what_is_no_source_is_one_sentence(monkeypatch):
    # What the variable HF_HUB_OFFLINE sets; the libraries have been imported by now.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="neither 'drawn', nor a folder"):
        load_images("nobody/has-this")
    with pytest.raises(DataError, match="no split 'test'"):
        DrawnImages("test", 5)
