"""Training batches: cached features and packed captions."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
import numpy as np

from captioning.backend import ALONE, TENSORFLOW, Devices, use_xla
from captioning.data.vocabulary import PAD
from captioning.features.cache import read_rows

# Batches of images with captions of like length have fewer steps. So many
# batches are sorted by length at a time: enough to be alike, few enough to
# leave the order random.
SORTED_BATCHES = 16
# Threads that read ahead. On TensorFlow, with a single one, Keras leaves it to
# tf.data, whose autotuning thread, when an epoch ends, is waited for until it
# wakes: after 10 ms, 20 ms, and so on up to a minute. On JAX Keras's threads
# begin with an epoch before it has its order.
WORKERS = 2 if TENSORFLOW else 1


class Packed(NamedTuple):
    """The captions of a batch, one step after the other.

    The captions are sorted, the longest first; then come the first words of
    all captions, the second words of those that have two, and so on. It is
    the order in which the decoder's loop works, and holds no padding.
    """

    words: np.ndarray  # the words that the decoder sees, int32 (tokens,)
    targets: np.ndarray  # the words that it shall say, int32 (tokens,)
    image: np.ndarray  # the place of the image in the batch, int32 (tokens,)
    caption: np.ndarray  # the place of the caption, sorted, int32 (tokens,)
    counts: np.ndarray  # tokens of each step, int32 (steps,)
    order: np.ndarray  # where each caption stood before, int32 (captions,)


def pack(rows: np.ndarray, image: np.ndarray) -> Packed:
    """Packs captions.

    Args:
        rows: int32 (captions, steps + 1), from `vocabulary.encode`.
        image: the image of each caption, int32 (captions,).
    """
    lengths = np.count_nonzero(rows[:, 1:] != PAD, axis=1)  # (captions,)
    order = np.argsort(-lengths, kind="stable")
    rows, image, lengths = rows[order], image[order], lengths[order]
    steps = rows.shape[1] - 1
    there = np.arange(steps)[:, None] < lengths  # (steps, captions)
    step, caption = np.nonzero(there)
    return Packed(
        rows[:, :-1].T[there],
        rows[:, 1:].T[there],
        image[caption].astype(np.int32),
        caption.astype(np.int32),
        np.bincount(step, minlength=steps).astype(np.int32),
        order.astype(np.int32),
    )


def pad(
    captions: Sequence[np.ndarray], shape: tuple[int, int, int]
) -> np.ndarray:
    """Pads captions with empty ones.

    Args:
        captions: for each image int32 (its captions, steps + 1).
        shape: how many images, captions of each and words there shall be.

    Returns:
        int32 (images, captions, steps + 1).
    """
    padded = np.full(shape, PAD, np.int32)
    for image, each in enumerate(captions):
        padded[image, : len(each)] = each
    return padded


class CaptionBatches(keras.utils.PyDataset):
    """Batches of images, each with several of its captions.

    The order of an epoch depends only on the seed and the number of the epoch,
    so that a run resumed in the middle sees what it would have seen.

    Args:
        features: float16 (rows, regions, channels), memory-mapped.
        rows: the row of each image, int (images,).
        captions: for each image int32 (its captions, steps + 1).
        batch_images: images a batch.
        captions_per_image: captions of each image a batch; 0 takes all.
        seed: of the order; None keeps the order of the images.
        importance: what the tokens of a caption weigh, for each image float
            (its captions,); None gives every token the weight 1.
        padded: pad the captions instead of packing them, so that all batches
            are of one size; None does so where XLA would compile for each.
        devices: what a batch is for. Several of them want it padded, and so
            many images that each has as many; of these a process gets its
            own alone.
    """

    def __init__(
        self,
        features: np.ndarray,
        rows: np.ndarray,
        captions: Sequence[np.ndarray],
        batch_images: int,
        captions_per_image: int = 0,
        seed: int | None = None,
        importance: Sequence[np.ndarray] | None = None,
        padded: bool | None = None,
        devices: Devices = ALONE,
    ) -> None:
        super().__init__(workers=WORKERS)
        self.features, self.rows, self.captions = features, rows, captions
        self.batch_images = batch_images
        self.captions_per_image = captions_per_image
        self.seed = seed
        self.importance = importance
        padded = use_xla() if padded is None else padded
        self.padded = padded or devices.number > 1
        share = -(-batch_images // devices.number) * devices.number
        self.share = share // devices.processes  # images of this process
        self.first = devices.process * self.share
        self.lengths = np.array(
            [np.count_nonzero(each, axis=1).max() for each in captions]
        )
        self.most = max(map(len, captions))
        self.begin(0)

    def begin(self, epoch: int, skip: int = 0) -> None:
        """Sets the order of an epoch, and how many batches of it to skip."""
        self.epoch, self.skip = epoch, skip
        self.order = [
            np.arange(start, min(start + self.batch_images, len(self.rows)))
            for start in range(0, len(self.rows), self.batch_images)
        ]
        if self.seed is not None:
            self.order = self._shuffled()

    def _shuffled(self) -> list[np.ndarray]:
        generator = np.random.default_rng((self.seed, self.epoch))
        images = generator.permutation(len(self.rows))
        reach = SORTED_BATCHES * self.batch_images
        order = []
        for start in range(0, len(images), reach):
            some = images[start : start + reach]
            some = some[np.argsort(self.lengths[some], kind="stable")]
            for first in range(0, len(some), self.batch_images):
                order.append(some[first : first + self.batch_images])
        return [order[place] for place in generator.permutation(len(order))]

    def __len__(self) -> int:
        """How many batches are left in the epoch."""
        return len(self.order) - self.skip

    def __getitem__(self, place: int) -> tuple[dict[str, Any], Any, Any]:
        """A batch: inputs, targets, weights.

        The captions are packed, and targets and weights (tokens,); or all is
        padded, and they are (images, captions, steps).
        """
        images = self.order[place + self.skip]
        images = images[self.first : self.first + self.share]
        captions = [self.captions[image][self._up(image)] for image in images]
        features = read_rows(self.features, self.rows[images])
        weighs = [np.ones(len(each), np.float32) for each in captions]
        if self.importance is not None:
            weighs = [self.importance[n][self._up(n)] for n in images]
        arrange = self._padded if self.padded else _packed
        inputs, targets, weighs = arrange(captions, weighs)
        if self.padded:
            missing = self.share - len(features)
            features = np.pad(features, ((0, missing), (0, 0), (0, 0)))
        inputs["features"] = features  # (images, regions, channels)
        real = (targets != PAD).astype(np.float32)
        return inputs, targets, real * weighs.astype(np.float32)

    def _up(self, image: int) -> np.ndarray:
        """Which captions of an image are up in this epoch."""
        captions, number = len(self.captions[image]), self.captions_per_image
        if not number or captions <= number:
            return np.arange(captions)
        first = self.epoch * number
        return (first + np.arange(number)) % captions

    def _padded(
        self, captions: list[np.ndarray], weighs: list[np.ndarray]
    ) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
        """Like `_packed`, filled up to the size that all batches have."""
        number = self.captions_per_image or self.most
        steps = self.captions[0].shape[1]
        # (images, captions, steps + 1)
        rows = pad(captions, (self.share, number, steps))
        targets = rows[..., 1:]
        words = np.where(targets != PAD, rows[..., :-1], PAD)
        spread = np.zeros((self.share, number, 1), np.float32)
        for image, each in enumerate(weighs):
            spread[image, : len(each), 0] = each
        return {"words": words}, targets, spread


def _packed(
    captions: list[np.ndarray], weighs: list[np.ndarray]
) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
    """Inputs but for features, targets, and what each of these weighs.

    Args:
        captions: for each image int32 (its captions, steps + 1).
        weighs: for each image float (its captions,).
    """
    numbers = [len(each) for each in captions]
    owners = np.repeat(np.arange(len(captions), dtype=np.int32), numbers)
    packed = pack(np.concatenate(captions), owners)._asdict()
    targets, order = packed.pop("targets"), packed.pop("order")
    return packed, targets, np.concatenate(weighs)[order][packed["caption"]]


class JointBatches(keras.utils.PyDataset):
    """The same captions with the features of several encoders.

    Args:
        batches: for each encoder, in one order.
    """

    def __init__(self, batches: Sequence[CaptionBatches]) -> None:
        super().__init__(workers=WORKERS)
        self.batches = batches

    def __len__(self) -> int:
        """How many batches there are."""
        return len(self.batches[0])

    def __getitem__(self, place: int) -> tuple[dict[str, Any], Any, Any]:
        """A batch as of the first, but `features` are a tuple."""
        found = [each[place] for each in self.batches]
        inputs, targets, weights = found[0]
        features = tuple(each["features"] for each, _, _ in found)
        return {**inputs, "features": features}, targets, weights
