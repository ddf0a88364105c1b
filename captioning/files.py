"""Files that are whole or not there: atomic writes, and a lock."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from config import UserError


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Lends a temporary path that becomes `path` when all went well.

    Args:
        path: the file to write; its folder is made if it is not there.

    Yields:
        A path in the same folder, with the same ending, to write to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        yield part
        with open(part, "rb+") as handle:
            os.fsync(handle.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically, as UTF-8."""
    with atomic_path(path) as part:
        part.write_text(text, encoding="utf-8")


def write_csv(path: Path, rows: Any, columns: list[str] | None = None) -> None:
    """Writes a table atomically as CSV.

    Args:
        path: the file.
        rows: what pandas.DataFrame takes.
        columns: the names of the columns.
    """
    table = pd.DataFrame(rows, columns=columns)
    with atomic_path(path) as part:
        table.to_csv(part, index=False, encoding="utf-8", lineterminator="\n")


@contextlib.contextmanager
def lock(path: Path, wait: bool = False) -> Iterator[None]:
    """Holds a lock that ends with the process, however that ends.

    Args:
        path: the folder that is locked. The lock file lies beside it, so
            that the folder can be moved; it stays, and means nothing by
            itself.
        wait: for another process to release it, instead of raising.

    Raises:
        UserError: if another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    locked, path = path, path.with_name(f".{path.name}.lock")
    with open(path, "a+") as handle:
        try:
            _lock(handle, wait)
        except OSError:
            raise UserError(
                f"another process is at work on {locked}: wait for it to end"
            ) from None
        yield


def _lock(handle: Any, wait: bool) -> None:
    if os.name == "nt":
        import msvcrt

        mode = msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK
        msvcrt.locking(handle.fileno(), mode, 1)
    else:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
