"""The features of some images, of one encoder or of several joined.

Each encoder has its own cache. Their annotation vectors are joined by channel
when an image is read, so a step of the decoder costs hardly more than with a
single encoder. A finer feature map is averaged over the regions of the coarsest
one.
"""

import math
from collections.abc import Sequence

import numpy as np

from captioning.features.cache import read_rows


class Features:
    """The features of some images.

    Args:
        arrays: of each encoder float16 (rows, regions, channels), usually
            memory-mapped.
        rows: in each of them the row of every image, int (images,).
    """

    def __init__(
        self, arrays: Sequence[np.ndarray], rows: Sequence[np.ndarray]
    ) -> None:
        self.arrays, self.rows = arrays, rows
        regions = [each.shape[1] for each in arrays]
        self.averages = [averages(each, min(regions)) for each in regions]
        channels = sum(each.shape[2] for each in arrays)
        self.shape = len(rows[0]), min(regions), channels

    def __len__(self) -> int:
        """How many images there are."""
        return self.shape[0]

    def __getitem__(self, images: np.ndarray) -> np.ndarray:
        """Reads some images, int (n,): float16 (n, regions, channels)."""
        maps = []
        for array, rows, average in zip(
            self.arrays, self.rows, self.averages, strict=True
        ):
            found = read_rows(array, rows[images])
            if average is not None:
                found = np.matmul(average, found.astype(np.float32))
                found = found.astype(np.float16)
            maps.append(found)
        return np.concatenate(maps, axis=2) if len(maps) > 1 else maps[0]

    def select(self, images: np.ndarray) -> "Features":
        """The features of some of the images, int (n,)."""
        return Features(self.arrays, [rows[images] for rows in self.rows])


def averages(regions: int, fewer: int) -> np.ndarray | None:
    """A matrix that averages a square grid of regions to a coarser one.

    Args:
        regions: of the grid.
        fewer: of the coarser one.

    Returns:
        Float32 (fewer, regions): of each region of the coarser grid, the share
        that each one of the finer grid covers. None where both are the same.
    """
    if regions == fewer:
        return None
    fine, coarse = math.isqrt(regions), math.isqrt(fewer)
    starts = np.arange(coarse)[:, None] * fine / coarse  # in fine regions
    ends = starts + fine / coarse
    here = np.arange(fine)
    covered = np.minimum(ends, here + 1) - np.maximum(starts, here)
    along = np.maximum(covered, 0) * coarse / fine  # (coarse, fine)
    return np.kron(along, along).astype(np.float32)


def channel_statistics(
    features: Features | np.ndarray, most: int = 1024
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation of each channel.

    Args:
        features: (images, regions, channels).
        most: how many images, evenly spread, to look at; 1,024 of 49 regions
            give a mean to 1/200 of its deviation.

    Returns:
        Mean and standard deviation, float32 (channels,). So that channels
        that hardly ever fire are not blown up, no deviation is below a
        hundredth of the mean deviation.
    """
    images = np.linspace(0, len(features) - 1, min(most, len(features)))
    total = squares = 0.0
    for start in range(0, len(images), 64):
        some = features[images[start : start + 64].astype(int)]
        some = some.astype(np.float64)  # (64, regions, channels)
        total = total + some.sum((0, 1))
        squares = squares + np.square(some).sum((0, 1))
    number = len(images) * features.shape[1]
    mean = total / number
    deviation = np.sqrt(np.maximum(squares / number - mean**2, 0))
    deviation = np.maximum(deviation, max(0.01 * deviation.mean(), 1e-6))
    return mean.astype(np.float32), deviation.astype(np.float32)
