"""The feature cache on disk: one memory-mapped float16 array.

A folder holds

    features.npy    float16 (rows, regions, channels)
    images.csv      row -> image, with size and modification time of its file
    digests.bin     16 bytes per row: a digest of the image's pixels
    finished.bin    one byte per row, not 0 once the row's other bytes are on
                    disk; only these rows count
    meta.json       what the features depend on, the versions that made them,
                    and the folder that the images were last seen in

Rows are only ever appended, so that all text folders of a dataset share one
cache and no image is encoded twice. Files grow in the order images.csv,
features.npy, digests.bin, finished.bin: wherever a process is killed,
finished.bin names no row that the others lack.
"""

import contextlib
import hashlib
import io
import itertools
import json
import mmap
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from captioning.files import (
    check_disk,
    lock,
    read_json,
    reading,
    write_csv,
    write_json,
)
from config import ENCODERS, SCENES, UserError, flag

# Changes when images are read or resized differently, so that old features
# are not mixed with new ones.
PREPROCESSING = "opencv-area-1"
DIGEST_BYTES = 16
FILE = ["size", "modified"]  # columns of images.csv: bytes, nanoseconds
# That run says more, or finishes what was begun.
AGAIN = "run preprocess.py again with the same flags"


class Cache(NamedTuple):
    """An open feature cache."""

    folder: Path
    features: np.memmap  # float16 (rows, regions, channels)
    finished: np.ndarray  # uint8 (rows,), memory-mapped
    row: dict[str, int]  # image -> row
    files: np.ndarray  # size and modification time, int64 (rows, 2)


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
    images_dir: Path,
    images: Sequence[str],
    shape: tuple[int, int],
) -> Cache:
    """Opens a cache for writing; creates or extends it as needed.

    Images that the cache knows keep their rows; new ones follow. Several
    processes may call it at once.

    Args:
        folder: where the cache is.
        description: from `describe`.
        versions: of the software, recorded and not compared.
        images_dir: where the images are.
        images: the names of all images that are wanted.
        shape: (regions, channels).

    Raises:
        UserError: if the disk is too small, or what is there does not fit.
    """
    with _table_lock(folder):
        if (folder / "meta.json").exists():
            _check_meta(folder, description)
        advice = f"delete {folder} and run preprocess.py again"
        marked, table = _check_files(folder, shape, advice)
        meta = read_json(folder / "meta.json") or {
            **description,
            "versions": versions,
        }
        was, now = meta.get("images_dir", ""), str(images_dir.resolve())
        new = pd.Index(images).difference(table["image"], sort=False)
        added = pd.DataFrame({"image": new, **dict.fromkeys(FILE, 0)})
        # pandas 2 warns when one of the tables is empty.
        tables = [table, added] if len(table) else [added]
        table = pd.concat(tables, ignore_index=True)
        full = (len(table), *shape)
        check_disk(folder, _missing_bytes(folder, full))
        folder.mkdir(parents=True, exist_ok=True)
        if was != now and os.path.isdir(was):
            # Other files under the same names, perhaps of equal size and
            # time: only their pixels can tell.
            table[FILE] = 0
        if len(new) or was != now:
            write_csv(folder / "images.csv", table)
        if was != now:
            write_json(folder / "meta.json", {**meta, "images_dir": now})
        _lengthen_array(folder / "features.npy", full, keep=marked > 0)
        _lengthen(folder / "digests.bin", DIGEST_BYTES * len(table))
        _lengthen(folder / "finished.bin", len(table))
        return _map(folder, table, len(table), "r+")


def load(folder: Path, description: dict[str, Any]) -> Cache:
    """Opens a cache for reading.

    Rows that another process is adding, or was when it was killed, are left
    out.

    Raises:
        UserError: if it is not there, or does not fit its own files or the
            description.
    """
    if not (folder / "meta.json").exists():
        raise UserError(
            f"there are no features in {folder}: run preprocess.py first, "
            f"with the same flags{_that_fit(folder.parent, description)}"
        )
    _check_meta(folder, description)
    marked, table = _check_files(folder, None, AGAIN)
    if not marked:
        raise UserError(f"{folder} has no finished features yet: {AGAIN}")
    return _map(folder, table.iloc[:marked], marked, "r")


def _that_fit(folder: Path, description: dict[str, Any]) -> str:
    """The end of an error: the flags for which features exist."""
    found = []
    here = {"magnification": 1, **description}
    for path in sorted(folder.glob("*/meta.json")):
        meta = {"magnification": 1, **read_json(path)}
        if meta.get("encoder") not in ENCODERS or not {*here} <= {*meta}:
            continue  # damaged, or of another version
        flags = [
            f"{flag(name)} {meta[name]}"
            for name in ("encoder", "image_size", "magnification")
            if meta[name] != here[name]
        ]
        if (weights := meta["weights"]) != here["weights"]:
            kind = weights.partition("-")[0]
            if weights == ENCODERS[meta["encoder"]].imagenet:
                kind = "imagenet"
            elif (
                kind == "half" and meta["encoder"] == SCENES != here["encoder"]
            ):
                kind = SCENES
            elif kind == "half":
                kind = f"FILE (the one of {weights})"
            flags.append(f"--encoder-weights {kind}")
        if flags:
            found.append(" ".join(flags))
    return f". Features exist with {' or '.join(found)}" if found else ""


def images_dir(folder: Path) -> str:
    """The folder that the images of a cache were last in; may be empty."""
    return read_json(folder / "meta.json").get("images_dir", "")


def record_files(
    cache: Cache, rows: Sequence[int] | np.ndarray, files: np.ndarray
) -> None:
    """Writes which files some rows are of.

    Args:
        cache: from `create`.
        rows: int (rows,).
        files: size and modification time of each, int64 (rows, 2).
    """
    if not len(rows):
        return
    with _table_lock(cache.folder):
        table = _read_table(cache.folder / "images.csv", AGAIN)
        table.loc[rows, FILE] = files
        write_csv(cache.folder / "images.csv", table)
    cache.files[rows] = files


def write(
    cache: Cache,
    rows: Sequence[int],
    values: np.ndarray,
    digests: Sequence[bytes],
) -> None:
    """Writes rows to the disk; `commit` makes them count.

    Not through the memory map: on a full disk a write fails with an error,
    while a map kills the process; and when two machines write to one page of
    a network disk through maps, one undoes what the other wrote.

    Args:
        cache: from `create`.
        rows: where to.
        values: float16 (rows, regions, channels).
        digests: of the pixels of each row, DIGEST_BYTES long.
    """
    path, start = cache.folder / "features.npy", cache.features.offset
    _write_rows(path, start, rows, values)
    table = np.frombuffer(b"".join(digests), np.uint8)
    table = table.reshape(len(rows), DIGEST_BYTES)
    _write_rows(cache.folder / "digests.bin", 0, rows, table)


def commit(cache: Cache, marks: Mapping[int, int]) -> None:
    """Marks rows as finished, or as not.

    Args:
        cache: from `create`; `write` has put the rows on disk.
        marks: row -> its byte in finished.bin; 0 takes the row back.
    """
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

    Otherwise the system reads what is not in memory piece by piece, each
    after the one before: a quarter of the speed on a disk that seeks.

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


def _table_lock(folder: Path) -> contextlib.AbstractContextManager[None]:
    return lock(folder.with_name(f"{folder.name}.table"), wait=True)


def _read_table(path: Path, advice: str) -> pd.DataFrame:
    """Reads images.csv; its columns are image and those of FILE."""
    with reading(path, advice):
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
        return table[["image", *FILE]].astype(dict.fromkeys(FILE, "int64"))


def _check_meta(folder: Path, description: dict[str, Any]) -> None:
    path = folder / "meta.json"
    found = read_json(path)
    for name, wanted in description.items():
        if found.get(name) != wanted:
            raise UserError(
                f"{path}: {name} is {found.get(name)!r}, not {wanted!r}: "
                f"delete {folder} and run preprocess.py again"
            )


def _missing_bytes(folder: Path, shape: tuple[int, ...]) -> int:
    """How many bytes features.npy has to grow to hold a shape."""
    path = folder / "features.npy"
    here = 0
    if path.exists():
        status = path.stat()
        # What is reserved, where the system says so: a file may have holes.
        blocks = getattr(status, "st_blocks", None)
        here = status.st_size if blocks is None else blocks * 512
    return 2 * int(np.prod(shape, dtype=np.int64)) - here


def _check_files(
    folder: Path, shape: tuple[int, int] | None, advice: str
) -> tuple[int, pd.DataFrame]:
    """Checks that the files of a cache fit each other, and `shape` if given.

    What is missing or cut off would otherwise be filled with zeros, and
    count. `advice` is what to do if they do not fit.

    Returns:
        How many rows `finished.bin` has, 0 if the cache is still to be made;
        and the table in images.csv, which may have more.
    """
    marked = _size(folder / "finished.bin")
    names = folder / "images.csv"
    if not marked:
        empty = pd.DataFrame(columns=["image", *FILE])
        return 0, _read_table(names, advice) if names.exists() else empty
    for path in (folder / "meta.json", names):
        if not path.exists():
            raise UserError(f"{path} is missing: {advice}")
    table = _read_table(names, advice)
    if len(table) < marked:
        raise UserError(
            f"{names} names {len(table)} images instead of {marked}: {advice}"
        )
    path = folder / "features.npy"
    found = _open_array(path, advice)
    wanted = (marked, *(shape or found.shape[1:]))
    fits = found.shape[1:] == wanted[1:] and found.dtype == np.float16
    if not fits or len(found) < marked or found.ndim != 3:
        raise UserError(
            f"{path} has the shape {found.shape} and type {found.dtype} "
            f"instead of {wanted} and float16: {advice}"
        )
    # A process that was killed while it extended the cache leaves some files
    # longer than others.
    widths = {
        "features.npy": (found.offset, 2 * int(np.prod(wanted[1:]))),
        "digests.bin": (0, DIGEST_BYTES),
    }
    for name, (start, width) in widths.items():
        size = _size(folder / name)
        least, most = start + marked * width, start + len(table) * width
        if not least <= size <= most:
            raise UserError(
                f"{folder / name} has {size:,} bytes instead of {least:,} to "
                f"{most:,}: {advice}"
            )
    return marked, table


def _lengthen_array(path: Path, shape: tuple[int, ...], keep: bool) -> None:
    """Makes features.npy (rows, regions, channels) as long as `shape` says.

    NumPy pads the header so that the first dimension has room to grow: the
    header can be rewritten in front of the rows. What the file holds goes,
    unless `keep` is set.
    """
    header = io.BytesIO()
    fields = {"descr": "<f2", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, fields)
    size = header.tell() + 2 * int(np.prod(shape, dtype=np.int64))
    if not keep:
        path.unlink(missing_ok=True)
    _lengthen(path, size)
    with open(path, "r+b") as handle:
        handle.write(header.getvalue())
        handle.flush()
        os.fsync(handle.fileno())


def _lengthen(path: Path, size: int) -> None:
    """Makes a file `size` bytes long; what is new is 0, and reserved.

    Reserved, so that a disk that fills up later does not stop the work.
    """
    path.touch()
    # Not for appending: glibc refuses that where the disk cannot reserve.
    with open(path, "r+b") as handle:
        old = handle.seek(0, os.SEEK_END)
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
    """Writes rows (rows, ...) to the disk, neighbours in one go.

    Row 0 of the file begins at the byte `start`.
    """
    if not len(rows):
        return
    width = values[0].nbytes
    breaks = (np.flatnonzero(np.diff(rows) != 1) + 1).tolist()
    try:
        with open(path, "r+b", opener=_open_synchronous) as handle:
            for first, last in itertools.pairwise([0, *breaks, len(rows)]):
                handle.seek(start + int(rows[first]) * width)
                some = np.ascontiguousarray(values[first:last])
                handle.write(some.data.cast("B"))
            handle.flush()
            os.fsync(handle.fileno())
    except OSError as error:
        error.filename = str(path)
        raise


def _open_synchronous(path: str, flags: int) -> int:
    """Opens a file whose writes are on the disk when they return.

    Network disks then send only the bytes that were written; otherwise they
    may send the whole page, with old bytes of other machines' rows.
    """
    return os.open(path, flags | getattr(os, "O_DSYNC", 0))


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _open_array(path: Path, advice: str) -> np.memmap:
    with reading(path, advice):
        return np.lib.format.open_memmap(path, "r")


def _map(folder: Path, table: pd.DataFrame, rows: int, mode: Any) -> Cache:
    """Maps the first rows of the files of a cache."""
    path = folder / "features.npy"
    found = _open_array(path, AGAIN)
    shape = (rows, *found.shape[1:])
    return Cache(
        folder,
        np.memmap(path, np.float16, mode, found.offset, shape),
        np.memmap(folder / "finished.bin", np.uint8, mode, 0, (rows,)),
        {name: row for row, name in enumerate(table["image"])},
        table[FILE].to_numpy(np.int64, copy=True),
    )
