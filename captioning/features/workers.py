"""Several processes or machines share the work on one cache folder.

A worker holds a lock of its own, a process that works alone the lock of the
folder; neither begins while the other is there. All locks are taken behind
one more, the door, so that nobody slips in between looking and taking. A
worker that has done its part leaves a mark; who leaves the last one goes on
alone and completes the cache.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from captioning.files import lock, write_text


@contextlib.contextmanager
def alone(place: Path) -> Iterator[None]:
    """Holds a cache folder for this process and no other.

    Raises:
        UserError: if another process is at work on it, alone or as a worker.
    """
    with contextlib.ExitStack() as held:
        with _door(place):
            held.enter_context(lock(place))
            for path in sorted(place.glob(".worker-*.lock")):
                name = path.name.removeprefix(".").removesuffix(".lock")
                with lock(place / name):
                    pass
        yield


@contextlib.contextmanager
def worker(place: Path, number: int) -> Iterator[None]:
    """Holds the part of one worker.

    Raises:
        UserError: if another process has this part, or works alone.
    """
    with contextlib.ExitStack() as held:
        with _door(place):
            with lock(place):
                pass
            held.enter_context(lock(place / f"worker-{number}"))
        yield


def begin_part(folder: Path, number: int, of: int) -> None:
    """Takes back the mark that a worker may have left before."""
    _mark(folder, number, of).unlink(missing_ok=True)


def end_part(place: Path, folder: Path, number: int, of: int) -> list[int]:
    """Marks the part of a worker as done.

    Args:
        place: the cache folder.
        folder: where the marks are: that of the features, below `place`.
        number: of the worker.
        of: how many workers there are.

    Returns:
        The workers that are not done. To one worker only it is empty, even if
        several end at once.
    """
    with _door(place):
        write_text(_mark(folder, number, of), "done\n")
        each = range(of)
        return [n for n in each if not _mark(folder, n, of).exists()]


def clear(folder: Path) -> None:
    """Removes all marks, of a cache that is complete."""
    for path in folder.glob("worker-*-of-*.txt"):
        path.unlink()


def _door(place: Path) -> contextlib.AbstractContextManager[None]:
    return lock(place / "door", wait=True)


def _mark(folder: Path, number: int, of: int) -> Path:
    return folder / f"worker-{number}-of-{of}.txt"
