"""Atomic writes, and a lock on a folder."""

import contextlib
import functools
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from config import UserError


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yields a temporary path to write to, which is renamed on success.

    Args:
        path: the file to write; its folder is created if necessary.

    Yields:
        A path in the same folder, with the same ending.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # One name for all processes: what a killed one leaves is written over.
    part = path.with_name(f".part-{path.name}")
    try:
        yield part
        with open(part, "rb+") as handle:
            os.fsync(handle.fileno())
        os.replace(part, path)
        _sync_folder(path.parent)
    finally:
        part.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Makes sure that a new name survives a power cut."""
    if os.name == "nt":  # which cannot open folders
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # not every disk can
            os.fsync(handle)
    finally:
        os.close(handle)


def check_disk(folder: Path, needed: int) -> None:
    """Checks that there is room before work begins that would fill it.

    Args:
        folder: in the cache; it need not exist yet.
        needed: bytes that will be added to it.

    Raises:
        UserError: if the disk has less left.
    """
    place = next(each for each in (folder, *folder.parents) if each.exists())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise UserError(
            f"{folder} needs {needed / 1e9:.1f} GB more and the disk has "
            f"{free / 1e9:.1f} GB left: free some space, or give --data-dir on "
            "another disk"
        )


def reason(error: BaseException) -> str:
    """What an error says, in one line; libraries may say a lot."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if isinstance(error, UserError) else text[:200]


@contextlib.contextmanager
def reading(path: Path, advice: str) -> Iterator[None]:
    """Reports in one line whatever goes wrong while a file is read.

    Args:
        path: the file.
        advice: what to do then.

    Raises:
        UserError: instead of what libraries raise for damaged files; one that
            names the file already is left as it is.
    """
    try:
        yield
    except MemoryError:  # which is not the file's fault
        raise
    except Exception as error:
        if isinstance(error, UserError) and str(path) in str(error):
            raise
        raise UserError(
            f"{path} cannot be read ({reason(error)}): {advice}"
        ) from None


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object; empty if it is missing or damaged."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically, as UTF-8."""
    with atomic_path(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any, **options: Any) -> None:
    """Writes a JSON file atomically.

    Args:
        path: of the file.
        value: what JSON can hold; NaN is an error.
        **options: of `json.dumps`.
    """
    options = {"indent": 2, "allow_nan": False, **options}
    write_text(path, json.dumps(value, **options) + "\n")


def write_csv(path: Path, rows: Any, columns: list[str] | None = None) -> None:
    """Writes what pandas.DataFrame takes atomically as CSV."""
    table = pd.DataFrame(rows, columns=columns)
    with atomic_path(path) as part:
        table.to_csv(part, index=False, encoding="utf-8", lineterminator="\n")


@contextlib.contextmanager
def lock(path: Path, wait: bool = False) -> Iterator[None]:
    """Holds a lock that ends with the process, however that ends.

    Args:
        path: the folder to lock. The lock file lies beside it, so that the
            folder can be moved; the file stays and means nothing by itself.
        wait: for another process to release the lock, instead of raising.

    Raises:
        UserError: if another process holds the lock.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.with_name(f".{path.name}.lock")
    timeout = -1 if wait else 0
    held: BaseFileLock = FileLock(file, fallback_to_soft=False)
    try:
        try:
            held.acquire(timeout)
        except OSError as error:
            # Timeout is an OSError too. An error that names a file is about
            # opening it; others come from flock, which some disks lack.
            if isinstance(error, Timeout) or error.filename:
                raise
            _note_soft_lock(error.strerror or str(error))
            # Where its process is gone, filelock takes the marker away.
            held = SoftFileLock(file.with_suffix(".softlock"))
            held.acquire(timeout)
    except Timeout:
        text = f"another process is using {path}: wait for it to finish"
        if isinstance(held, SoftFileLock):
            # Its process may be on another machine.
            text += f" (if none is running, delete {held.lock_file})"
        raise UserError(text) from None
    try:
        yield
    finally:
        held.release()


@functools.cache
def _note_soft_lock(reason: str) -> None:
    print(
        f"Note: this disk has no file locks ({reason}); marker files keep "
        "other processes out instead.",
        file=sys.stderr,
    )
