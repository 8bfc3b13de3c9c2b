"""Texts to train on: the standard library's documentation, text files, data sets of the hub, and whatever `DATASETS` has."""

from __future__ import annotations

import ast
import hashlib
import re
import sysconfig
import warnings
from pathlib import Path

from language_model import DATASETS, dataset

SPLITS = ("train", "validation", "test")


class NoText(ValueError):
    """There is no such text, or nothing in it; the sentence says what is missing and what to do."""


def split_of(name: str) -> str:
    """Where a file goes, by its name alone: of twenty, one to validation and one to test."""
    return {0: "validation", 1: "test"}.get(int(hashlib.sha256(name.encode()).hexdigest(), 16) % 20, "train")


@dataset("stdlib")
def standard_library(config: str | None) -> dict[str, list[str]]:
    """The documentation strings of Python's standard library, a document for each; all of a module are in one split."""
    if config is not None:
        raise NoText("stdlib takes no --dataset_config")
    splits = {name: [] for name in SPLITS}
    root, seen = Path(sysconfig.get_path("stdlib")), set()
    for path in sorted(root.rglob("*.py")):
        module = path.relative_to(root)
        if module.parts[0] in ("site-packages", "test", "idlelib", "turtledemo", "lib2to3") or "tests" in module.parts:
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node)
                if text and len(text) > 40 and text not in seen:
                    seen.add(text)
                    splits[split_of(str(module))].append(text)
    return splits


def read(name: str, config: str | None) -> dict[str, list[str]]:
    """The documents of "train", "validation" and "test".

    Args:
        name: of `DATASETS`, a text file, a folder of them, or a data set on the hub, with a column `text`.
        config: of a data set on the hub, or a file, for a name of `DATASETS` that takes one.

    Raises:
        NoText: there is no such text, or nothing in it.
    """
    if name in DATASETS:
        try:
            splits = DATASETS[name](config)
        except OSError as error:
            raise NoText(f"--dataset_config {config}: {error.strerror}") from None
    elif Path(name).exists():
        if config is not None:
            raise NoText(f"{name} is a file or folder, and takes no --dataset_config")
        splits = files(Path(name))
    else:
        splits = from_hub(name, config)
    for split in SPLITS:
        if not any(text.strip() for text in splits.get(split, [])):
            raise NoText(f"{name} has no text for {split}: a text of several paragraphs, or several files, is needed")
    return splits


def files(path: Path) -> dict[str, list[str]]:
    """A folder's text files, a document each; of one file the paragraphs, which blank lines part. Every tenth is for validation,
    and the one after it for the test."""
    found = sorted(path.rglob("*.txt")) if path.is_dir() else [path]
    if not found:
        raise NoText(f"{path} has no file that ends in .txt")
    try:
        texts = [file.read_text(encoding="utf-8") for file in found]
    except UnicodeDecodeError as error:
        raise NoText(f"a text in {path} is not UTF-8, at byte {error.start}: convert it first, such as with iconv") from None
    if len(texts) == 1:
        texts = [part for part in texts[0].split("\n\n") if part.strip()]
    if len(texts) < 3:
        raise NoText(f"{path} has {len(texts)} documents, and each of three splits needs one: part them by blank lines")
    splits = {name: [] for name in SPLITS}
    for number, text in enumerate(texts):
        splits[SPLITS[1] if number % 10 == 1 else SPLITS[2] if number % 10 == 2 else SPLITS[0]].append(text)
    return splits


def from_hub(name: str, config: str | None) -> dict[str, list[str]]:
    from datasets import load_dataset

    try:
        found = load_dataset(name, config)
    except Exception as error:
        why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise NoText(
            f"there is no text {name}: not one of {', '.join(sorted(DATASETS))}, no file or folder, and on the hub: {why}"
        ) from None
    if "train" not in found or "text" not in found["train"].column_names:
        columns = ", ".join(f"{split} with {' and '.join(rows.column_names)}" for split, rows in found.items())
        raise NoText(f"{name} has no split train with a column text; it has {columns}")
    texts = {split: list(found[split]["text"]) for split in SPLITS if split in found}
    return {split: articles(lines) for split, lines in texts.items()} if "wikitext" in name else texts


def articles(lines: list[str]) -> list[str]:
    """WikiText is given line by line. A line such as " = Title = " begins an article; " = = Section = = " does not."""
    found = []
    for line in lines:
        if not found or re.fullmatch(r" = [^=]+ = \n?", line):
            found.append([])
        found[-1].append(line)
    return ["".join(part) for part in found]
