"""Runs images through the frozen encoder into the feature cache."""

import contextlib
import hashlib
import itertools
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
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
COMMIT_SECONDS = 10.0  # between two commits of what is finished

DONE, REPAIRED = 1, 2  # in finished.bin: a row that counts


class Notes(NamedTuple):
    """What `fill` has to say, for skipped.csv and repaired.csv."""

    skipped: list[tuple[str, str]]  # image and reason
    repaired: list[tuple[str, str]]
    changed: int  # images that changed after they had been encoded
    gone: int  # images that are not there now, and whose features are kept


class Read(NamedTuple):
    """One image that was read."""

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
    digest = hashlib.blake2b(pixels.data, digest_size=features.DIGEST_BYTES)
    return Read(name, pixels, repairs, digest.digest())


def share(names: Sequence[str], number: int, of: int) -> list[str]:
    """The part of the rows that one of several workers encodes.

    Whole batches, so that a worker writes rows that follow each other.

    Args:
        names: of all rows.
        number: of the worker, from 0.
        of: how many workers there are.
    """
    places = range(len(names))
    return [names[place] for place in places if place // BATCH % of == number]


def in_batches(names: Sequence[str]) -> list[Sequence[str]]:
    """Cuts names into batches in their order."""
    starts = range(0, len(names), BATCH)
    return [names[start : start + BATCH] for start in starts]


def by_slot(names: Sequence[str], rows: Mapping[str, int]) -> list[list[str]]:
    """Cuts names into batches in which each has the slot of its row.

    The last bit of an image's features may depend on its place in the batch,
    where a processor's vectors end within it. With a place of its own for each
    row, a cache that was filled in several runs equals one of a single run.

    Args:
        names: of the images.
        rows: the row of each.
    """
    batches: list[list[str]] = []
    taken: Counter[int] = Counter()
    for name in names:
        slot = rows[name] % BATCH
        if taken[slot] == len(batches):
            batches.append([])
        batches[taken[slot]].append(name)
        taken[slot] += 1
    return batches


def read_ahead(
    images_dir: Path, batches: Sequence[Sequence[str]], size: int
) -> Iterator[list[Read]]:
    """Reads batches of images, some batches ahead of the consumer."""
    coming = iter(batches)
    with ThreadPoolExecutor(READERS) as pool:

        def submit(batch: Sequence[str]) -> list[Future]:
            return [pool.submit(read, images_dir, n, size) for n in batch]

        waiting = [*map(submit, itertools.islice(coming, AHEAD))]
        try:
            while waiting:
                yield [future.result() for future in waiting.pop(0)]
                waiting.extend(map(submit, itertools.islice(coming, 1)))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def encode(
    images: Sequence[np.ndarray],
    encoder: Callable[[np.ndarray], np.ndarray],
    slots: Sequence[int] | None = None,
    batch: int | None = None,
) -> np.ndarray:
    """Runs up to a batch of images through the encoder.

    The batch is padded to one size, so that the encoder is compiled once and
    an image's features do not depend on how many come with it.

    Args:
        images: uint8 RGB (size, size, 3) each.
        encoder: uint8 (batch, size, size, 3) -> float16 (batch, regions,
            channels).
        slots: the place of each image in the batch; None: one after another.
        batch: images that the encoder takes; None: BATCH.

    Returns:
        float16 (images, regions, channels).
    """
    batch = batch or BATCH
    padded = np.zeros((batch, *images[0].shape), np.uint8)
    chosen = [*(slots or range(batch))[: len(images)]]
    padded[chosen] = images
    return np.asarray(encoder(padded))[chosen]


def fill(
    cache: features.Cache,
    images_dir: Path,
    names: Sequence[str],
    size: int,
    build: Callable[[], Callable[[np.ndarray], np.ndarray]],
) -> Notes:
    """Computes the features that the cache lacks, or has of older files.

    Args:
        cache: from `features.create`.
        images_dir: where the images are.
        names: of the images that are wanted.
        size: the side to resize them to, in pixels.
        build: gives the encoder, the same at each call; called only if there
            is work for it.

    Returns:
        What was skipped and repaired, in this run or before, sorted; how many
        images changed after they had been encoded; and how many are gone.
    """
    repaired, changed, gone = _check_again(cache, images_dir, names, size)
    skipped: list[tuple[str, str]] = []
    unfinished = [name for name in names if not cache.finished[cache.row[name]]]
    batches = by_slot(unfinished, cache.row)
    marks: dict[int, int] = {}
    last = time.monotonic()
    bar = tqdm(
        total=len(names),
        initial=len(names) - len(unfinished),
        unit="image",
        delay=0.1,  # after what `build` has to say
        disable=not unfinished,
    )
    try:
        with bar:
            for batch in read_ahead(images_dir, batches, size):
                good = [each for each in batch if each.pixels is not None]
                bad = [each for each in batch if each.pixels is None]
                skipped += [(each.name, each.reason) for each in bad]
                repaired += [(e.name, e.reason) for e in good if e.reason]
                marks |= _encode_batch(cache, good, build)
                bar.update(len(batch))
                if time.monotonic() - last > COMMIT_SECONDS:
                    features.commit(cache, marks)
                    marks, last = {}, time.monotonic()
    finally:
        features.commit(cache, marks)
    return Notes(sorted(skipped), sorted(repaired), changed, gone)


def _check_again(
    cache: features.Cache, images_dir: Path, names: Sequence[str], size: int
) -> tuple[list[tuple[str, str]], int, int]:
    """Takes back finished rows whose image has changed since.

    Files whose size and time are unchanged are not opened, except those that
    were repaired: the reason is reported in every run that finds them. What
    cannot be found, because a link leads to a drive that is not there, has not
    changed.

    Returns:
        Image and reason of those that were repaired and are unchanged; how
        many rows were taken back; how many are of files that are not there.
    """
    rows = np.array([cache.row[name] for name in names], int)
    files = file_states(images_dir, names)  # (names, 2)
    there = files.any(axis=1)  # (names,)
    moved = there & (files != cache.files[rows]).any(axis=1)  # (names,)
    marks = cache.finished[rows]
    suspect = there & (moved | (marks == REPAIRED))
    again = np.flatnonzero((marks != 0) & suspect)
    table = features.load_digests(cache)
    repaired, found = [], {}
    suspects = in_batches([names[int(place)] for place in again])
    batches = read_ahead(images_dir, suspects, size)
    bar = tqdm(batches, "Checking files", len(suspects), unit="batch", delay=2)
    for each in itertools.chain.from_iterable(bar):
        row = cache.row[each.name]
        if each.digest != table[row].tobytes():
            found[row] = 0
        else:
            found[row] = REPAIRED if each.reason else DONE
            if each.reason:
                repaired.append((each.name, each.reason))
    # The marks go first, so that no row counts for a file it is not of.
    changed = {r: m for r, m in found.items() if m != cache.finished[r]}
    features.commit(cache, changed)
    features.record_files(cache, rows[moved], files[moved])
    changed_rows = sum(not mark for mark in found.values())
    return repaired, changed_rows, int(np.sum((marks != 0) & ~there))


def file_states(images_dir: Path, names: Sequence[str]) -> np.ndarray:
    """Size and modification time of files.

    Returns:
        Bytes and nanoseconds, int64 (names, 2); zeros for a missing file.
    """
    states = np.zeros((len(names), 2), np.int64)
    for place, name in enumerate(names):
        with contextlib.suppress(OSError, ValueError):
            status = os.stat(images_dir / name)
            states[place] = status.st_size, status.st_mtime_ns
    return states


def _encode_batch(
    cache: features.Cache,
    batch: list[Read],
    encoder: Callable[[], Callable[[np.ndarray], np.ndarray]],
) -> dict[int, int]:
    """Encodes and writes images; returns the marks of their rows."""
    if not batch:
        return {}
    rows = [cache.row[each.name] for each in batch]
    pixels = [each.pixels for each in batch if each.pixels is not None]
    slots = [row % BATCH for row in rows]
    values = encode(pixels, encoder(), slots)
    features.write(cache, rows, values, [each.digest for each in batch])
    marks = [REPAIRED if each.reason else DONE for each in batch]
    return dict(zip(rows, marks, strict=True))


def digests(cache: features.Cache, images: Sequence[str]) -> dict[str, str]:
    """Image -> digest of its pixels, of all images that are finished."""
    rows = [cache.row[image] for image in images]
    found = zip(images, features.load_digests(cache)[rows], strict=True)
    return {image: each.tobytes().hex() for image, each in found if each.any()}
