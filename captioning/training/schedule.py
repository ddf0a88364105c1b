"""The learning rate: linear warm-up, cosine decay, then a low constant."""

import math
from typing import Any

import keras
from keras import ops

# Flickr8k's 6,000 images take 1,500 steps in EPOCHS epochs. A dataset of fewer
# images gets as many steps, but no image is seen more than MOST_EPOCHS times.
EPOCHS, STEPS, MOST_EPOCHS = 8, 1500, 30


def choose_epochs(images: int, batch_images: int) -> int:
    """Chooses the number of epochs for a dataset of this size."""
    steps = math.ceil(images / batch_images)
    return min(max(EPOCHS, math.ceil(STEPS / steps)), MOST_EPOCHS)


class Schedule(keras.optimizers.schedules.CosineDecay):
    """Warms up, decays to 0, and stays low for whatever comes after.

    A run that is resumed with more epochs than it was scheduled for trains
    them at the average rate of its last scheduled epoch: the last rate itself
    is 0, and a longer cosine would raise the rate of a model that has settled.

    Args:
        rate: the highest, after the warm-up.
        steps: per epoch.
        epochs: over which the rate decays.
        warmup_share: share of these steps that warm up.
    """

    def __init__(
        self, rate: float, steps: int, epochs: int, warmup_share: float
    ) -> None:
        self.end = steps * epochs
        warmup = max(1, round(self.end * warmup_share))
        decay = max(1, self.end - warmup)
        super().__init__(
            rate / warmup, decay, warmup_target=rate, warmup_steps=warmup
        )
        # The mean of (1 + cos) / 2 over the last of the decay.
        last = math.pi * min(1, steps / decay)
        self.afterwards = rate * (1 - math.sin(last) / last) / 2

    def __call__(self, step: Any) -> Any:
        """The learning rate of a step, counted from 0."""
        scheduled = super().__call__(step)
        # The rate of step `end` is what history.csv has of the last scheduled
        # epoch: it is that of the schedule, 0.
        return ops.where(step <= self.end, scheduled, self.afterwards)
