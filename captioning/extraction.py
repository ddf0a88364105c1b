"""Runs images through the frozen encoder into the feature cache."""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from captioning import features
from captioning.images import UnusableImage, read_image

BATCH = 32  # images a forward pass
READERS = 2  # threads; OpenCV and Pillow decode outside of Python's lock
AHEAD = 3  # batches read while the encoder works
COMMIT_SECONDS = 10.0  # between two marks on disk of what is finished

REPAIRED = 2  # in finished.bin: a row that counts, of an image put right


class Notes(NamedTuple):
    """Image and reason, for skipped.csv and repaired.csv."""

    skipped: list[tuple[str, str]]
    repaired: list[tuple[str, str]]


class Read(NamedTuple):
    """One image that was looked at."""

    name: str
    pixels: np.ndarray | None  # uint8 RGB (size, size, 3)
    reason: str  # why it is skipped, or what was repaired


def read(images_dir: Path, name: str, size: int) -> Read:
    """Reads one image, or says why it cannot be used."""
    try:
        return Read(name, *read_image(images_dir / name, size))
    except UnusableImage as error:
        return Read(name, None, str(error))


def read_ahead(
    images_dir: Path, names: Sequence[str], size: int
) -> Iterator[list[Read]]:
    """Reads images in batches, some batches ahead of who takes them."""
    starts = iter(range(0, len(names), BATCH))
    with ThreadPoolExecutor(READERS) as pool:

        def submit(start: int) -> list[Future]:
            batch = names[start : start + BATCH]
            return [pool.submit(read, images_dir, n, size) for n in batch]

        waiting = [submit(start) for start in islice(starts, AHEAD)]
        try:
            while waiting:
                yield [future.result() for future in waiting.pop(0)]
                waiting.extend(submit(start) for start in islice(starts, 1))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def encode(
    images: Sequence[np.ndarray], encoder: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """Runs up to BATCH images through the encoder.

    The batch is filled up to one size, so that the encoder is compiled once
    and an image's features do not depend on how many come with it.

    Args:
        images: uint8 RGB (size, size, 3) each.
        encoder: uint8 (BATCH, size, size, 3) -> float16 (BATCH, regions,
            channels).

    Returns:
        float16 (images, regions, channels).
    """
    batch = np.zeros((BATCH, *images[0].shape), np.uint8)
    batch[: len(images)] = images
    return np.asarray(encoder(batch))[: len(images)]


def fill(
    cache: features.Cache,
    images_dir: Path,
    names: Sequence[str],
    size: int,
    build: Callable[[], Callable[[np.ndarray], np.ndarray]],
) -> Notes:
    """Computes the features that the cache lacks.

    Args:
        cache: from `features.create`.
        images_dir: where the images are.
        names: the images that are wanted.
        size: the side to resize them to, in pixels.
        build: makes the encoder; called only if there is work for it.

    Returns:
        What was skipped and what was repaired, in this run or before.
    """
    state = {name: cache.finished[cache.row[name]] for name in names}
    todo = [name for name in names if not state[name]]
    notes = Notes([], [])
    # What was put right in a run before is told again; only the reason is
    # wanted, and few images need it.
    for name in names:
        if state[name] == REPAIRED:
            found = read(images_dir, name, size)
            notes.repaired.append((name, found.reason))
    if not todo:
        return notes
    encoder = build()
    marks: dict[int, int] = {}
    last = time.monotonic()
    bar = tqdm(total=len(names), initial=len(names) - len(todo), unit="image")
    try:
        with bar:
            for batch in read_ahead(images_dir, todo, size):
                marks |= _encode_batch(cache, batch, encoder, notes)
                bar.update(len(batch))
                if time.monotonic() - last > COMMIT_SECONDS:
                    features.commit(cache, marks)
                    marks, last = {}, time.monotonic()
    finally:
        features.commit(cache, marks)
    return notes


def _encode_batch(
    cache: features.Cache,
    batch: list[Read],
    encoder: Callable[[np.ndarray], np.ndarray],
    notes: Notes,
) -> dict[int, int]:
    """Encodes and writes a batch; returns the marks of its rows."""
    notes.skipped.extend((r.name, r.reason) for r in batch if r.pixels is None)
    good = [each for each in batch if each.pixels is not None]
    if not good:
        return {}
    notes.repaired.extend((r.name, r.reason) for r in good if r.reason)
    rows = [cache.row[each.name] for each in good]
    cache.features[rows] = encode([each.pixels for each in good], encoder)
    marks = [REPAIRED if each.reason else 1 for each in good]
    return dict(zip(rows, marks, strict=True))
