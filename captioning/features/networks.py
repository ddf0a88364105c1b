"""The networks behind the names of encoders, without trained weights."""

import keras

from config import ENCODERS, SCENES

# Of the network for drawn scenes: the filters of each convolution, the side of
# a filter and the stride. A region of the last map is 32 pixels wide.
CONVOLUTIONS = (
    (24, 5, 2),
    (48, 3, 2),
    (96, 3, 2),
    (96, 3, 1),
    (192, 3, 2),
    (192, 3, 1),
    (256, 3, 2),
)


def build(name: str, shape: tuple[int, int, int] | None = None) -> keras.Model:
    """Builds a network without its classifier.

    Args:
        name: a key of `ENCODERS`.
        shape: of an image (height, width, 3); None: any.

    Raises:
        ValueError: if the network does not take images as small as these.
    """
    if name == SCENES:
        return _scenes(shape or (None, None, 3))
    application = getattr(keras.applications, ENCODERS[name].application)
    return application(include_top=False, weights=None, input_shape=shape)


def _scenes(shape: tuple[int | None, int | None, int]) -> keras.Model:
    """A small network: drawn scenes need no more, and it takes seconds."""
    pixels = x = keras.Input(shape)
    for filters, side, stride in CONVOLUTIONS:
        convolution = keras.layers.Conv2D(
            filters, side, stride, padding="same", activation="relu"
        )
        x = convolution(x)
    return keras.Model(pixels, x)  # (batch, height / 32, width / 32, 256)
