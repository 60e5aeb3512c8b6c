"""Folders of pictures as data: which files belong, which labels they carry, which batches they make."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from onnxcomp.calibration.batches import Batch, Dataset, regroup
from onnxcomp.calibration.fit import Interface, check_shape, fit_values
from onnxcomp.calibration.images import Preprocess
from onnxcomp.calibration.sources import reading
from onnxcomp.errors import DataError

__all__ = ["IMAGE_SUFFIXES", "Picture", "find_pictures", "picture_batches"]

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp"})


@dataclass(frozen=True)
class Picture:
    """An image file and its class, None if the folder gives no classes."""

    path: Path
    label: int | None


def picture_batches(folder: Path, model: Interface, preprocess: Any, seed: int) -> Dataset:
    """A dataset of the pictures in `folder`, in an order shuffled with `seed`; the first one is checked now.

    Raises DataError if there are none or they do not fit, UsageError for senseless preprocessing.
    """
    with reading(str(folder)):
        pictures = find_pictures(folder)
    if not pictures:
        kinds = sorted({path.suffix for path in folder.iterdir() if path.is_file()})
        found = f"only files of the kinds {', '.join(kinds)}" if kinds else "nothing"
        raise DataError(
            f"{folder} holds {found}; expected .npz or .npy files, test_data_set_N folders, "
            f"or pictures ({', '.join(sorted(IMAGE_SUFFIXES))})"
        )
    if len(model.inputs) != 1:
        raise DataError(
            f"{folder} holds pictures, but the model has {len(model.inputs)} inputs: "
            f"{', '.join(model.names)}; prepare the data as .npz"
        )
    spec = model.inputs[0]
    steps = Preprocess.from_spec(preprocess, spec)
    order = np.random.default_rng(seed).permutation(len(pictures))
    if model.fixed is not None and len(pictures) < model.fixed:
        raise DataError(
            f"{folder} has {len(pictures)} picture(s), but the model takes batches of exactly {model.fixed}"
        )

    def each() -> Iterator[Batch]:
        for index in order:
            picture = pictures[index]
            where = str(picture.path)
            pixels = steps.load(picture.path)[None]
            check_shape(spec, pixels.shape, where, free_first=True)
            label = None if picture.label is None else np.array([picture.label], np.int64)
            yield Batch({spec.name: fit_values(spec, pixels, where, None)}, label, 1, where)

    next(each())
    exact = model.fixed is not None
    length = len(pictures) // model.size * model.size if exact else len(pictures)
    labelled = pictures[0].label is not None
    return Dataset(str(folder), labelled, length, lambda: regroup(each(), model.size, exact=exact), not exact)


def find_pictures(folder: Path) -> list[Picture]:
    """All pictures of a folder and its sub-folders, in the order of their paths.

    Labels come from `labels.csv` (columns file and label, with or without a header; it then also says which
    pictures belong), else from two or more class sub-folders if no picture lies beside them. Classes are
    numbered 0..n-1 in the order of their names, unless all names are whole numbers, which are then the
    labels. A single sub-folder is a class only if its name is a number. Hidden files are left out. Raises
    DataError for an unusable `labels.csv`.
    """
    table = folder / "labels.csv"
    if table.is_file():
        return _listed(folder, table)
    paths = []
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            if not name.startswith(".") and Path(name).suffix.lower() in IMAGE_SUFFIXES:
                paths.append(Path(place, name))
    paths.sort()
    relative = [path.relative_to(folder).parts for path in paths]
    classes = {parts[0] for parts in relative if len(parts) > 1}
    if all(len(parts) > 1 for parts in relative) and (len(classes) > 1 or all(map(_is_integer, classes))):
        numbers = _numbered(classes)
        beside = {
            entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")
        }
        if beside - classes and not all(map(_is_integer, classes)):
            raise DataError(
                f"{folder / min(beside - classes)} holds no pictures, so that the classes cannot be numbered "
                "by their sub-folders; remove it, or give a labels.csv with the columns file,label"
            )
        return [Picture(path, numbers[parts[0]]) for path, parts in zip(paths, relative, strict=True)]
    return [Picture(path, None) for path in paths]


def _listed(folder: Path, table: Path) -> list[Picture]:
    with reading(str(table)), table.open(newline="", encoding="utf-8-sig") as file:
        rows = [
            (number, row)
            for number, row in enumerate(csv.reader(file), 1)
            if any(cell.strip() for cell in row)
        ]
    header = [cell.strip().lower() for cell in rows[0][1]] if rows else []
    columns = (0, 1)
    if "file" in header and "label" in header:
        columns = (header.index("file"), header.index("label"))
        rows = rows[1:]
    pairs = []
    for number, row in rows:
        if len(row) <= max(columns):
            raise DataError(
                f"{table} line {number}: expected the columns file,label, found {','.join(row)!r}"
            )
        path = folder / row[columns[0]].strip()
        if not path.is_file():
            raise DataError(
                f"{table} line {number}: there is no picture {path}; the columns must be file,label"
            )
        pairs.append((path, row[columns[1]].strip()))
    numbers = _numbered({label for _, label in pairs})
    return [Picture(path, numbers[label]) for path, label in pairs]


def _numbered(classes: set[str]) -> dict[str, int]:
    if all(map(_is_integer, classes)):
        return {name: int(name) for name in classes}
    return {name: number for number, name in enumerate(sorted(classes))}


def _is_integer(text: str) -> bool:
    return text.isascii() and text.removeprefix("-").isdigit()
