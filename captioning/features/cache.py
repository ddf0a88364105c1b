"""The feature cache on disk: one memory-mapped float16 array.

A folder holds `features.npy` (images, regions, channels), `images.csv` (row
-> image), `meta.json` (what the features depend on), `digests.bin` (16 bytes a
row, of the image's pixels) and `finished.bin` (one byte a row, not 0 once the
row's other bytes are on disk). The array is filled in place; only rows that
`finished.bin` names count. Rows are only ever appended, so that a cache grows
with its dataset.
"""

import hashlib
import io
import json
import mmap
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from captioning.files import lock, write_csv, write_text
from config import UserError

# Raised when images are read or resized differently, so that caches made
# before are not mixed with new ones.
PREPROCESSING = "opencv-area-1"
DIGEST_BYTES = 16


class Cache(NamedTuple):
    """An open feature cache."""

    folder: Path
    features: np.ndarray  # float16 (rows, regions, channels), memory-mapped
    finished: np.ndarray  # uint8 (rows,), memory-mapped
    row: dict[str, int]  # image -> row


def describe(
    encoder: str,
    layer: str,
    weights: str,
    image_size: int,
    magnification: int = 1,
) -> dict[str, Any]:
    """What features depend on; another value means another cache folder."""
    description = {
        "encoder": encoder,
        "layer": layer,
        "weights": weights,
        "image_size": image_size,
        "preprocessing": PREPROCESSING,
    }
    if magnification > 1:
        description["magnification"] = magnification
    return description


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

    Images that the cache knows keep their rows; new ones follow. Several
    processes may call it at once.

    Args:
        folder: where the cache is.
        description: from `describe`.
        versions: of the software, recorded and not compared.
        images: the names of all images that are wanted.
        shape: (regions, channels).

    Raises:
        UserError: if the disk is too small, or what is there does not fit.
    """
    with lock(folder, wait=True):
        made = (folder / "meta.json").exists()
        if made:
            _check_meta(folder, description)
        marked = _check_files(folder, shape)
        names = _names(folder) if (folder / "images.csv").exists() else []
        known = set(names)
        names += [name for name in images if name not in known]
        shape = (len(names), *shape)
        _check_disk(folder, shape)
        folder.mkdir(parents=True, exist_ok=True)
        if not made:
            meta = {**description, "versions": versions}
            write_text(folder / "meta.json", json.dumps(meta, indent=2) + "\n")
        write_csv(folder / "images.csv", {"image": names})
        # finished.bin comes last: its rows are in the other files, whenever
        # the process ends.
        _lengthen_array(folder / "features.npy", shape, marked == 0)
        _lengthen(folder / "digests.bin", DIGEST_BYTES * len(names))
        _lengthen(folder / "finished.bin", len(names))
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


def write(
    cache: Cache,
    rows: Sequence[int],
    values: np.ndarray,
    digests: Sequence[bytes],
) -> None:
    """Writes rows to the disk; `commit` makes them count.

    Not through the memory map: a write tells of a full disk by an error, a
    map by killing the process; and of two machines that write to one page of
    a network disk through maps, one undoes what the other wrote.

    Args:
        cache: from `create`.
        rows: where to.
        values: float16 (rows, regions, channels).
        digests: of the pixels of each row, DIGEST_BYTES.
    """
    path, start = cache.folder / "features.npy", cache.features.offset
    _write_rows(path, start, rows, values)
    table = np.frombuffer(b"".join(digests), np.uint8)
    table = table.reshape(len(rows), DIGEST_BYTES)
    _write_rows(cache.folder / "digests.bin", 0, rows, table)


def commit(cache: Cache, marks: Mapping[int, int]) -> None:
    """Marks rows as finished, after their bytes are on disk.

    Args:
        cache: from `create`; the rows have been written to its features.
        marks: row -> what to write for it in `finished`.
    """
    cache.features.flush()
    rows = sorted(marks)
    values = np.array([marks[row] for row in rows], np.uint8)
    _write_rows(cache.folder / "finished.bin", 0, rows, values)


def load_digests(cache: Cache) -> np.ndarray:
    """The digests of the pixels of all rows, uint8 (rows, DIGEST_BYTES).

    Equal digests are equal pixels, as the encoder sees them; rows that are
    not finished have zeros.
    """
    path, rows = cache.folder / "digests.bin", len(cache.finished)
    table = np.fromfile(path, np.uint8, DIGEST_BYTES * rows)
    table = table.reshape(rows, DIGEST_BYTES)
    return table * (cache.finished[:, None] != 0)


def read_rows(features: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Reads rows of a cache, asking the disk for all of them at once.

    Else the system reads what is not in memory piece by piece, each when the
    one before has come: a fourth as fast, from a disk that seeks.

    Args:
        features: (all rows, regions, channels), memory-mapped or not.
        rows: which of them, int (rows,).

    Returns:
        (rows, regions, channels).
    """
    file = features.base
    if isinstance(file, mmap.mmap) and hasattr(mmap, "MADV_WILLNEED"):
        width = features[0].nbytes
        for row in rows:
            start = features.offset + int(row) * width
            page = start - start % mmap.PAGESIZE
            file.madvise(mmap.MADV_WILLNEED, page, start + width - page)
    return features[rows]


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
        reason = " ".join(str(error).split())
        raise UserError(
            f"{path} cannot be read ({reason}): delete {folder} and run "
            "preprocess.py again"
        ) from None


def _check_meta(folder: Path, description: dict[str, Any]) -> None:
    path = folder / "meta.json"
    try:
        found = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        found = {}
    for name, wanted in description.items():
        if found.get(name) != wanted:
            raise UserError(
                f"{path}: {name} is {found.get(name)!r}, not {wanted!r}: "
                f"delete {folder} and run preprocess.py again"
            )


def _check_disk(folder: Path, shape: tuple[int, ...]) -> None:
    path = folder / "features.npy"
    here = 0
    if path.exists():
        status = path.stat()
        # What is reserved, where the system says so: a file may have holes.
        blocks = getattr(status, "st_blocks", None)
        here = status.st_size if blocks is None else blocks * 512
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


def _check_files(folder: Path, shape: tuple[int, int]) -> int:
    """Holds the files of a cache that grows against each other.

    What is missing or cut off would be filled up with zeros, and count.

    Returns:
        How many rows `finished.bin` has; 0 if the cache is still to be made.
    """
    marked = _size(folder / "finished.bin")
    if not marked:
        return 0
    advice = f"delete {folder} and run preprocess.py again"
    for name in ("meta.json", "images.csv"):
        if not (folder / name).exists():
            raise UserError(f"{folder / name} is missing: {advice}")
    named = len(_names(folder))
    if named < marked:
        raise UserError(
            f"{folder / 'images.csv'} names {named} images where {marked} rows "
            f"are wanted: {advice}"
        )
    path = folder / "features.npy"
    found = _open_array(path, "r", advice)
    fits = found.shape[1:] == shape and found.dtype == np.float16
    if not fits or len(found) < marked:
        raise UserError(
            f"{path} has the shape {found.shape} where {(marked, *shape)} is "
            f"wanted: {advice}"
        )
    # A process that ended while it lengthened them leaves some longer than
    # others.
    for name, start, width in (
        ("features.npy", found.offset, 2 * shape[0] * shape[1]),
        ("digests.bin", 0, DIGEST_BYTES),
    ):
        size = _size(folder / name)
        least, most = start + marked * width, start + named * width
        if not least <= size <= most:
            raise UserError(
                f"{folder / name} has {size:,} bytes where {least:,} to "
                f"{most:,} are wanted: {advice}"
            )
    return marked


def _lengthen_array(path: Path, shape: tuple[int, ...], anew: bool) -> None:
    """Makes features.npy as long as `shape` says, keeping what it holds.

    numpy leaves room in the header for the first dimension to grow, so that
    the header can be written anew in front of the rows.
    """
    header = io.BytesIO()
    fields = {"descr": "<f2", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, fields)
    size = header.tell() + 2 * int(np.prod(shape, dtype=np.int64))
    if anew:
        path.unlink(missing_ok=True)
    _lengthen(path, size)
    with open(path, "r+b") as handle:
        handle.write(header.getvalue())
        handle.flush()
        os.fsync(handle.fileno())


def _lengthen(path: Path, size: int) -> None:
    """Makes a file `size` bytes long; what is new is 0, and reserved.

    Reserved, so that a disk that fills up later does not stop what was begun.
    """
    with open(path, "ab") as handle:
        old = handle.tell()
        if size <= old:
            return
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(handle.fileno(), old, size - old)
            else:
                handle.truncate(size)
        except OSError as error:
            handle.truncate(old)
            error.filename = str(path)
            raise
        os.fsync(handle.fileno())


def _write_rows(
    path: Path, start: int, rows: Sequence[int], values: np.ndarray
) -> None:
    """Writes rows of equal length; what follows each other at once.

    Args:
        path: the file.
        start: where its row 0 begins, in bytes.
        rows: where to.
        values: (rows, ...).
    """
    if not len(rows):
        return
    width = values[0].nbytes
    breaks = np.flatnonzero(np.diff(rows) != 1) + 1
    try:
        with open(path, "r+b", opener=_open_synchronous) as handle:
            for first, some in zip(
                np.split(np.asarray(rows), breaks),
                np.split(values, breaks),
                strict=True,
            ):
                handle.seek(start + int(first[0]) * width)
                handle.write(np.ascontiguousarray(some).data.cast("B"))
            handle.flush()
            os.fsync(handle.fileno())
    except OSError as error:
        error.filename = str(path)
        raise


def _open_synchronous(path: str, flags: int) -> int:
    """Opens a file whose writes are on the disk when they return.

    Network disks then send the bytes that were written and no others; else
    they may send the whole page, with old bytes of other machines' rows.
    """
    return os.open(path, flags | getattr(os, "O_DSYNC", 0))


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _open_array(path: Path, mode: str, advice: str) -> np.ndarray:
    try:
        return np.lib.format.open_memmap(path, mode)
    # What numpy raises for a header of odd bytes is not documented.
    except Exception as error:
        raise UserError(f"{path} does not fit ({error}): {advice}") from None


def _map(
    folder: Path, names: list[str], shape: tuple[int, ...] | None, mode: str
) -> Cache:
    path = folder / "features.npy"
    # It tells more, or ends what was begun.
    advice = "run preprocess.py again with the same flags"
    features = _open_array(path, mode, advice)
    marked = _size(folder / "finished.bin")
    expected = (len(names), *(shape or features.shape)[1:])
    fits = features.shape == expected and features.dtype == np.float16
    if not fits or marked != len(names):
        raise UserError(
            f"{path} has the shape {features.shape} and {marked} finished "
            f"rows where {expected} is wanted: {advice}"
        )
    size, wanted = _size(path), features.offset + features.nbytes
    if size != wanted:
        raise UserError(
            f"{path} has {size:,} bytes where {wanted:,} are wanted: {advice}"
        )
    finished = np.memmap(folder / "finished.bin", np.uint8, mode)
    row = {name: place for place, name in enumerate(names)}
    return Cache(folder, features, finished, row)
