"""Several processes or machines share the work on one feature folder.

A worker holds its own lock; a process that works alone holds the folder's.
Neither begins while the other is at work, nor while workers are busy with other
images. All locks are taken behind one more, the door, so that nobody slips in
between the check and the lock. A worker that has finished its part leaves a
mark; the one that leaves the last mark continues alone and completes the cache.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from captioning.files import lock, write_text


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Holds a feature folder for this process and no other.

    Raises:
        UserError: if another process is using it, alone or as a worker.
    """
    with contextlib.ExitStack() as held:
        with _door(folder):
            held.enter_context(lock(folder))
            _refuse_workers(folder)
        yield


def do_part(
    folder: Path, text: str, number: int, of: int, work: Callable[[], Any]
) -> list[int]:
    """Does the part of one worker.

    Args:
        folder: of the features.
        text: the name of the text folder, whose images are the work.
        number: of the worker.
        of: how many workers there are.
        work: does the part.

    Returns:
        The workers that are not done; empty for exactly one worker, even if
        several finish at once.

    Raises:
        UserError: if another process has this part, works alone, or is a
            worker on other images.
    """
    mark = _mark(folder, text, number, of)
    with contextlib.ExitStack() as held:
        with _door(folder):
            with lock(folder):
                _refuse_workers(folder, but=f"-of-{of}-{text}")
            name = f"{folder.name}.{mark.stem}"
            held.enter_context(lock(folder.with_name(name)))
            mark.unlink(missing_ok=True)
        work()
        with _door(folder):
            # Whoever sees the mark finds the lock free.
            held.close()
            write_text(mark, "done\n")
            marks = [_mark(folder, text, n, of) for n in range(of)]
            return [n for n, each in enumerate(marks) if not each.exists()]


def clear(folder: Path, text: str) -> None:
    """Removes the marks of all workers on the images of a text folder."""
    for path in folder.glob(f"worker-*-of-*-{text}.txt"):
        path.unlink()


def _refuse_workers(folder: Path, but: str = "") -> None:
    """Raises a UserError if there is a worker, but for those of one job."""
    for path in sorted(folder.parent.glob(f".{folder.name}.worker-*lock")):
        name = path.name[1:].rpartition(".")[0]
        if not but or not name.endswith(but):
            with lock(path.with_name(name)):
                pass


def _door(folder: Path) -> contextlib.AbstractContextManager[None]:
    return lock(folder.with_name(f"{folder.name}.door"), wait=True)


def _mark(folder: Path, text: str, number: int, of: int) -> Path:
    return folder / f"worker-{number}-of-{of}-{text}.txt"
