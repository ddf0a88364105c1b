"""The feature cache on disk: one memory-mapped float16 array.

A folder holds `features.npy` (images, regions, channels), `images.csv` (row
-> image), `meta.json` (what the features depend on) and `finished.bin` (one
byte a row, not 0 once the row's bytes are on disk). The array is filled in
place; only rows that `finished.bin` names count.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from captioning.files import write_csv, write_text
from config import UserError

# Raised when images are read or resized differently, so that caches made
# before are not mixed with new ones.
PREPROCESSING = "opencv-area-1"


class Cache(NamedTuple):
    """An open feature cache."""

    folder: Path
    features: np.ndarray  # float16 (rows, regions, channels), memory-mapped
    finished: np.ndarray  # uint8 (rows,), memory-mapped
    row: dict[str, int]  # image -> row


def describe(
    encoder: str, layer: str, weights: str, image_size: int
) -> dict[str, Any]:
    """What features depend on; another value means another cache folder."""
    return {
        "encoder": encoder,
        "layer": layer,
        "weights": weights,
        "image_size": image_size,
        "preprocessing": PREPROCESSING,
    }


def key(description: dict[str, Any]) -> str:
    """The name of the cache folder of a description."""
    text = json.dumps(description, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return f"{description['encoder']}-{description['image_size']}-{digest}"


def create(
    folder: Path,
    description: dict[str, Any],
    versions: dict[str, str],
    images: Sequence[str],
    shape: tuple[int, int],
) -> Cache:
    """Opens a cache for writing; makes it, or makes it longer, if need be.

    Images that the cache knows keep their rows; new ones follow.

    Args:
        folder: where the cache is.
        description: from `describe`.
        versions: of the software, recorded and not compared.
        images: the names of all images that are wanted.
        shape: (regions, channels).

    Raises:
        UserError: if the disk is too small, or what is there does not fit.
    """
    names = _names(folder) if (folder / "images.csv").exists() else []
    known = set(names)
    names += [name for name in images if name not in known]
    shape = (len(names), *shape)
    _check_disk(folder, shape)
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "meta.json").exists():
        _check_meta(folder, description)
    else:
        meta = {**description, "versions": versions}
        write_text(folder / "meta.json", json.dumps(meta, indent=2) + "\n")
    write_csv(folder / "images.csv", {"image": names})
    _lengthen(folder / "features.npy", shape)
    with open(folder / "finished.bin", "ab") as handle:
        handle.truncate(len(names))
    return _map(folder, names, shape, "r+")


def load(folder: Path, description: dict[str, Any]) -> Cache:
    """Opens a cache for reading.

    Raises:
        UserError: if it is not there, or does not fit its own files or the
            description.
    """
    if not (folder / "meta.json").exists():
        raise UserError(
            f"there are no features in {folder}: run preprocess.py first, "
            "with the same flags"
        )
    _check_meta(folder, description)
    names = _names(folder)
    return _map(folder, names, None, "r")


def commit(cache: Cache, marks: Mapping[int, int]) -> None:
    """Marks rows as finished, after their bytes are on disk.

    Args:
        cache: from `create`; the rows have been written to its features.
        marks: row -> what to write for it in `finished`.
    """
    cache.features.flush()
    cache.finished[list(marks)] = list(marks.values())
    cache.finished.flush()


def channel_statistics(
    cache: Cache, rows: np.ndarray, most: int = 1024
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation of each channel.

    Args:
        cache: the features.
        rows: of the training split.
        most: how many images, evenly spread over `rows`, to look at; 1,024
            images of 49 regions tell a mean to a two-hundredth of its
            deviation.

    Returns:
        Mean and standard deviation, float32 (channels,). A channel that
        hardly ever fires is not blown up: no deviation is below a hundredth
        of the mean deviation.
    """
    chosen = rows[
        np.linspace(0, len(rows) - 1, min(most, len(rows))).astype(int)
    ]
    total = squares = 0.0
    for start in range(0, len(chosen), 64):
        # Sorted, so that the disk is read in one direction.
        some = cache.features[np.sort(chosen[start : start + 64])]
        some = some.astype(np.float64)  # (64, regions, channels)
        total = total + some.sum((0, 1))
        squares = squares + np.square(some).sum((0, 1))
    number = len(chosen) * cache.features.shape[1]
    mean = total / number
    deviation = np.sqrt(np.maximum(squares / number - mean**2, 0))
    least = max(0.01 * deviation.mean(), 1e-6)
    return (
        mean.astype(np.float32),
        np.maximum(deviation, least).astype(np.float32),
    )


def _names(folder: Path) -> list[str]:
    path = folder / "images.csv"
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
        return table["image"].tolist()
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{path} cannot be read ({error}): delete {folder} and run "
            "preprocess.py again"
        ) from None


def _check_meta(folder: Path, description: dict[str, Any]) -> None:
    path = folder / "meta.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        found = {}
    for name, wanted in description.items():
        if found.get(name) != wanted:
            raise UserError(
                f"{path}: {name} is {found.get(name)!r}, not {wanted!r}: "
                f"delete {folder} and run preprocess.py again"
            )


def _check_disk(folder: Path, shape: tuple[int, ...]) -> None:
    path = folder / "features.npy"
    here = path.stat().st_blocks * 512 if path.exists() else 0
    needed = 2 * int(np.prod(shape, dtype=np.int64)) - here
    place = folder
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if needed > free:
        raise UserError(
            f"{folder} needs {needed / 1e9:.1f} GB more and the disk has "
            f"{free / 1e9:.1f} GB left: make room, or give --data-dir on "
            "another disk"
        )


def _lengthen(path: Path, shape: tuple[int, ...]) -> None:
    """Makes features.npy as long as `shape` says, keeping what it holds.

    numpy leaves room in the header for the first dimension to grow, so that
    the header can be written anew in front of the rows.
    """
    header = {"descr": "<f2", "fortran_order": False, "shape": shape}
    with open(path, "r+b" if path.exists() else "w+b") as handle:
        handle.seek(0, os.SEEK_END)
        old = handle.tell()
        handle.seek(0)
        np.lib.format.write_array_header_1_0(handle, header)
        offset = handle.tell()
        size = offset + 2 * int(np.prod(shape, dtype=np.int64))
        if size != old:
            handle.truncate(size)
            # Reserved now: a disk that fills up later would kill the process
            # with a bus error where it writes to the memory map.
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(handle.fileno(), 0, size)
        handle.flush()
        os.fsync(handle.fileno())


def _map(
    folder: Path, names: list[str], shape: tuple[int, ...] | None, mode: str
) -> Cache:
    path = folder / "features.npy"
    advice = f"delete {folder} and run preprocess.py again"
    try:
        features = np.load(path, mmap_mode=mode)
        finished = np.memmap(folder / "finished.bin", np.uint8, mode)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} does not fit ({error}): {advice}") from None
    expected = (len(names), *(shape or features.shape)[1:])
    fits = features.shape == expected and features.dtype == np.float16
    if not fits or len(finished) != len(names):
        raise UserError(
            f"{path} has the shape {features.shape} and {len(finished)} "
            f"finished rows where {expected} is wanted: {advice}"
        )
    row = {name: place for place, name in enumerate(names)}
    return Cache(folder, features, finished, row)
