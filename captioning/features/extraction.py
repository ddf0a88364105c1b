"""Runs images through the frozen encoder into the feature cache."""

import functools
import hashlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from captioning.data.images import UnusableImage, read_image
from captioning.features import cache as features

BATCH = 32  # images a forward pass
# Threads; OpenCV and Pillow decode outside of Python's lock. The largest images
# take 1.8 GB while they are decoded, so there are few.
READERS = min(os.cpu_count() or 2, 8)
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
    digest: bytes = b""  # of the pixels, features.DIGEST_BYTES


def read(images_dir: Path, name: str, size: int) -> Read:
    """Reads an image, or says why it cannot be used.

    Args:
        images_dir: where the images are.
        name: of the image, below `images_dir`.
        size: the side to resize it to, in pixels.
    """
    try:
        pixels, repairs = read_image(images_dir / name, size)
    except UnusableImage as error:
        return Read(name, None, str(error))
    digest = hashlib.blake2b(pixels, digest_size=features.DIGEST_BYTES)
    return Read(name, pixels, repairs, digest.digest())


def share(names: Sequence[str], number: int, of: int) -> list[str]:
    """The part of the rows that is up to one of several workers.

    Whole batches, so that a worker writes rows that follow each other.

    Args:
        names: of all rows.
        number: of the worker, from 0.
        of: how many workers there are.
    """
    return [
        name
        for place, name in enumerate(names)
        if place // BATCH % of == number
    ]


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
        names: of the images that are wanted.
        size: the side to resize them to, in pixels.
        build: makes the encoder; called only if there is work for it.

    Returns:
        What was skipped and what was repaired, in this run or before, sorted.
    """
    todo = [name for name in names if not cache.finished[cache.row[name]]]
    notes = _look_again(cache, images_dir, names, size)
    encoder = functools.cache(build)
    marks: dict[int, int] = {}
    last = time.monotonic()
    bar = tqdm(
        total=len(names),
        initial=len(names) - len(todo),
        unit="image",
        delay=0.1,  # after what `build` has to say
        disable=not todo,
    )
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
    return Notes(sorted(set(notes.skipped)), sorted(set(notes.repaired)))


def _look_again(
    cache: features.Cache, images_dir: Path, names: Sequence[str], size: int
) -> Notes:
    """Reads finished images of which something is to be told again.

    What was put right in a run before is told in every run; only the reason
    is wanted, and few images need it.
    """
    notes = Notes([], [])
    again = [
        name for name in names if cache.finished[cache.row[name]] == REPAIRED
    ]
    for batch in read_ahead(images_dir, again, size):
        # Of a file that has gone since, the features are there all the same.
        good = [each for each in batch if each.pixels is not None]
        notes.repaired.extend((e.name, e.reason) for e in good if e.reason)
    return notes


def _encode_batch(
    cache: features.Cache,
    batch: list[Read],
    encoder: Callable[[], Callable[[np.ndarray], np.ndarray]],
    notes: Notes,
) -> dict[int, int]:
    """Encodes and writes a batch; returns the marks of its rows."""
    good = [each for each in batch if each.pixels is not None]
    for each in batch:
        if each.pixels is None:
            notes.skipped.append((each.name, each.reason))
        elif each.reason:
            notes.repaired.append((each.name, each.reason))
    if not good:
        return {}
    rows = [cache.row[each.name] for each in good]
    values = encode([each.pixels for each in good], encoder())
    features.write(cache, rows, values, [each.digest for each in good])
    marks = [REPAIRED if each.reason else 1 for each in good]
    return dict(zip(rows, marks, strict=True))


def digests(cache: features.Cache, images: Sequence[str]) -> dict[str, str]:
    """Image -> digest of its pixels, of all images that are finished."""
    table = features.load_digests(cache)
    return {
        image: table[cache.row[image]].tobytes().hex()
        for image in images
        if table[cache.row[image]].any()
    }
