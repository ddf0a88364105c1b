"""Training batches: cached features, and captions in terraces.

Captions have from three to twenty words, so padding all of them to the longest
would waste two fifths of every step. The captions of a batch are sorted, the
longest first, and cut into terraces: a few steps each, in which only captions
that are long enough take part.

    two dogs run through the snow <end>       three terraces of
    a dog runs <end>                          3, 1 and 3 steps
    dogs play <end>                           with 3, 2 and 1 captions
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np

from captioning.backend import ALONE, TENSORFLOW, Devices, use_xla
from captioning.data.vocabulary import PAD
from captioning.features.joined import Features

# A terrace ends where fewer than this share of its captions go on.
SHARE = 0.9
# The most terraces where sizes are static: XLA compiles each of them, which
# soon costs more than the padding that one more would save.
STATIC_TERRACES = 3
# Standard deviations by which a terrace is wider than expected, where the
# sizes are static: one batch in three hundred of Flickr8k does not fit then.
MARGIN = 4
# Threads that read ahead. On TensorFlow, with a single one, Keras leaves it to
# tf.data, and the end of an epoch waits for its autotuning thread to wake:
# after 10 ms, 20 ms, and so on up to a minute. On JAX, Keras's threads start on
# an epoch before its order is set.
WORKERS = 2 if TENSORFLOW else 1


class Terrace(NamedTuple):
    """Some steps of a batch."""

    first: int  # step
    last: int  # the step after the last one
    captions: int  # that a batch has room for


def choose_terraces(
    lengths: np.ndarray, captions: int, static: bool
) -> list[Terrace]:
    """Chooses terraces for batches of captions.

    Args:
        lengths: of all captions, in words with `<end>`, int (captions,).
        captions: of a batch.
        static: whether all batches have these sizes.

    Returns:
        Terraces from the first step to the longest caption.
    """
    room = []  # for the captions that take part in each step
    for step in range(int(lengths.max())):
        share = float(np.mean(lengths > step))
        spread = math.sqrt(captions * share * (1 - share))
        room.append(
            min(captions, math.ceil(captions * share + MARGIN * spread))
        )
    steps = range(1, len(room))
    if static:
        cuts = itertools.combinations(
            steps, min(STATIC_TERRACES, len(room)) - 1
        )
        return min((_cut(room, each) for each in cuts), key=_tokens)
    first = [0]
    for step in steps:
        if room[step] < SHARE * room[first[-1]]:
            first.append(step)
    return _cut(room, first[1:])


def _cut(room: list[int], cuts: Sequence[int]) -> list[Terrace]:
    """Terraces that end before some steps, and after the last one."""
    bounds = itertools.pairwise([0, *cuts, len(room)])
    return [Terrace(first, last, room[first]) for first, last in bounds]


def _tokens(terraces: list[Terrace]) -> int:
    """Words that terraces have room for."""
    return sum((each.last - each.first) * each.captions for each in terraces)


class CaptionBatches(keras.utils.PyDataset):
    """Batches of images, each with several of its captions.

    The order of an epoch depends on the seed and the number of the epoch
    alone, so that a run that is resumed in the middle of one sees what it
    would have seen.

    Args:
        features: of the images, float16 (images, regions, channels); an array
            or `captioning.features.joined.Features`.
        captions: of each image, int32 (its captions, steps + 1), from
            `vocabulary.encode`.
        batch_images: images per batch.
        captions_per_image: captions of each image per epoch; 0 takes all.
        seed: of the order; None keeps the order of the images.
        importance: weights of the captions of each image, float (its
            captions,); None weighs all of them 1.
        static: whether all batches have one size (but for the rare one that
            does not fit), so that XLA compiles once; None: where it compiles.
        devices: that share a batch. Several get every caption padded to the
            longest, and a process gets its own images alone.
        terraces: None: chosen by the lengths of the captions.
    """

    def __init__(
        self,
        features: Features | np.ndarray,
        captions: Sequence[np.ndarray],
        batch_images: int,
        captions_per_image: int = 0,
        seed: int | None = None,
        importance: Sequence[np.ndarray] | None = None,
        static: bool | None = None,
        devices: Devices = ALONE,
        terraces: list[Terrace] | None = None,
    ) -> None:
        super().__init__(workers=WORKERS)
        self.features, self.captions = features, captions
        self.batch_images = batch_images
        self.captions_per_image = captions_per_image
        self.seed, self.importance = seed, importance
        self.static = use_xla() if static is None else static
        self.devices = devices
        # Images of this process: as many on each of its devices.
        share = -(-batch_images // devices.number) * devices.number
        self.share = share // devices.processes
        most = captions_per_image or max(map(len, captions))
        self.room = self.share * most  # captions
        self.longest = captions[0].shape[1] - 1
        lengths = [np.count_nonzero(each, axis=1) - 1 for each in captions]
        self.terraces = terraces or choose_terraces(
            np.concatenate(lengths), self.room, self.static
        )
        self.begin(0)

    def begin(self, epoch: int, skip: int = 0) -> None:
        """Sets the order of an epoch, and how many batches of it to skip."""
        self.epoch, self.skip = epoch, skip
        images = np.arange(len(self.captions))
        if self.seed is not None:
            generator = np.random.default_rng((self.seed, epoch))
            images = generator.permutation(images)
        starts = range(0, len(images), self.batch_images)
        self.order = [images[s : s + self.batch_images] for s in starts]

    def __len__(self) -> int:
        """Batches left in the epoch."""
        return len(self.order) - self.skip

    def __getitem__(self, place: int) -> tuple[dict[str, Any], Any, Any]:
        """A batch.

        Returns:
            Inputs: `features`, float16 (images, regions, channels); `image`,
            the image of each caption, int32 (captions,); `words`, the words
            that the decoder is given, int32 (captions, steps) of each terrace.
            Targets, the words that follow these, int32 (tokens,), terrace
            after terrace. Their weights, float32 (tokens,), 0 for padding.
        """
        images = self.order[place + self.skip]
        first = self.devices.process * self.share
        images = images[first : first + self.share]
        rows, image, weights = self._captions_of(images)
        words, targets, spread = [], [], []
        for first, last, captions in self._sizes(rows):
            shown = rows[:captions, first : last + 1]  # (captions, steps + 1)
            real = shown[:, 1:] != PAD  # (captions, steps)
            words.append(np.where(real, shown[:, :-1], PAD))
            targets.append(shown[:, 1:].ravel())
            spread.append((real * weights[:captions, None]).ravel())
        features = self.features[images]
        if self.static:
            missing = self.share - len(images)
            features = np.pad(features, ((0, missing), (0, 0), (0, 0)))
        inputs = {"features": features, "image": image, "words": tuple(words)}
        return inputs, np.concatenate(targets), np.concatenate(spread)

    def _captions_of(
        self, images: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The captions of a batch, the longest first.

        Args:
            images: of the batch, int (images,).

        Returns:
            Words, int32 (captions, steps + 1); the place of the image of each
            caption, int32 (captions,); the weight of each, float32 (captions,).
        """
        chosen = [self._in_turn(image) for image in images]
        pairs = [*zip(images, chosen, strict=True)]
        # Of the last batch, a process may get no image.
        rows = _chosen(self.captions, pairs)
        weights: np.ndarray = np.ones(len(rows), np.float32)
        if self.importance is not None:
            weights = _chosen(self.importance, pairs)
        numbers = np.array([len(each) for each in chosen], int)
        image: np.ndarray = np.repeat(np.arange(len(images)), numbers)
        if self.static:
            missing = self.room - len(rows)
            rows = np.pad(rows, ((0, missing), (0, 0)))
            image, weights = (np.pad(e, (0, missing)) for e in (image, weights))
        if self.devices.number == 1:
            lengths = np.count_nonzero(rows, axis=1)
            order = np.argsort(-lengths, kind="stable")
            rows, image, weights = rows[order], image[order], weights[order]
        image = image + self.devices.process * self.share
        return rows, image.astype(np.int32), weights.astype(np.float32)

    def _sizes(self, rows: np.ndarray) -> list[Terrace]:
        """The terraces of a batch of captions (captions, steps + 1)."""
        if self.devices.number > 1:
            return [Terrace(0, self.longest, len(rows))]
        exact = [
            each._replace(
                captions=max(1, int(np.count_nonzero(rows[:, each.first + 1])))
            )
            for each in self.terraces
        ]
        if not self.static:
            return exact
        fits = all(
            mine.captions <= room.captions
            for mine, room in zip(exact, self.terraces, strict=True)
        )
        last = self.terraces[-1].last
        return self.terraces if fits else [Terrace(0, last, len(rows))]

    def _in_turn(self, image: int) -> np.ndarray:
        """Which captions of an image have their turn in this epoch."""
        captions, number = len(self.captions[image]), self.captions_per_image
        if not number or captions <= number:
            return np.arange(captions)
        return (self.epoch * number + np.arange(number)) % captions


def _chosen(
    arrays: Sequence[np.ndarray], pairs: Iterable[tuple[int, np.ndarray]]
) -> np.ndarray:
    """Rows of arrays, one after another.

    Args:
        arrays: of each image (its captions, ...).
        pairs: images, and which of their captions; there may be none.
    """
    return np.concatenate([arrays[0][:0], *(arrays[i][c] for i, c in pairs)])
