"""The least that work can take: what it computes, what it moves, how fast.

Operations are those of matrix products and convolutions, of real words and
images alone; what is spent on padding shows as distance from the floor. Bytes
are those that no cache of a processor holds from one use to the next.
"""

import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from config import Config
from tests.benchmarks.yardsticks import CHANNELS, REGIONS

FLOAT32 = 4  # bytes
FLOAT16 = 2
Product = tuple[int, int, int]  # (rows, inner) times (inner, out)


class Work(NamedTuple):
    """What something computes and moves."""

    operations: float  # multiplications and additions
    bytes: float  # read and written


class Peaks(NamedTuple):
    """What a device reaches at most."""

    operations: float  # a second, of a large matrix product
    bytes: float  # a second, of a large copy


def operations_of_training(
    config: Config, images: int, tokens: int, vocabulary: int
) -> int:
    """Of training on so many images and words.

    Args:
        config: its model fields.
        images: how many.
        tokens: real words, `<end>` counted.
        vocabulary: how many words there are.
    """
    products = _once_an_image(config, images)
    products += _once_a_word(config, tokens, vocabulary)
    # Backward takes two products more for each: the gradients of the weights
    # and of the input. The features need no gradient: one product less.
    return 3 * _operations(products) + 2 * _operations(
        _annotations(config, images)
    )


def training(
    config: Config,
    images: int,
    tokens: int,
    vocabulary: int,
    weights: int,
    width: int,
) -> Work:
    """Training steps as `train.py` does them.

    Args:
        config: its model fields.
        images: of all steps.
        tokens: real words, `<end>` counted.
        vocabulary: how many words there are.
        weights: how many numbers are updated, in all steps together.
        width: bytes of a number in the layers' arithmetic.
    """
    moved = (
        # AdamW reads weight, gradient, two moments and average, and writes all
        # of them, the gradient before.
        10 * FLOAT32 * weights
        + FLOAT16 * images * REGIONS * CHANNELS
        # Logits are written and read, and so are their gradients.
        + 4 * width * tokens * vocabulary
    )
    operations = operations_of_training(config, images, tokens, vocabulary)
    return Work(operations, moved)


def searching(config: Config, images: int, steps: int, vocabulary: int) -> Work:
    """A beam search, and its samples, of so many steps."""
    captions = config.beam_size + config.consensus_samples
    tokens = images * captions * steps
    products = _annotations(config, images) + _once_an_image(config, images)
    products += _once_a_word(config, tokens, vocabulary)
    features = FLOAT16 * images * REGIONS * CHANNELS
    # Scores of the next words are written and read, in float32.
    return Work(
        _operations(products), features + 2 * FLOAT32 * tokens * vocabulary
    )


def encoding(encoder: Any, images: int, batches: int, width: int) -> Work:
    """A frozen encoder's forward pass.

    Every convolution reads its input and its weights and writes its output;
    normalisation, activation and addition take no bytes of their own.

    Args:
        encoder: from `model.build_encoder`.
        images: of all batches.
        batches: how many there are.
        width: bytes of a number in the layers' arithmetic.
    """
    operations = moved = 0
    for layer in _layers(encoder):
        if not hasattr(layer, "kernel"):
            continue
        _, height, across, out = layer.output.shape
        entering = math.prod(layer.input.shape[1:])
        kernel = math.prod(layer.kernel.shape)
        operations += images * 2 * height * across * kernel
        moved += images * width * (entering + height * across * out)
        moved += batches * width * kernel
    return Work(operations, moved)


def _annotations(config: Config, images: int) -> list[Product]:
    return [(images * REGIONS, CHANNELS, config.decoder_units)]


def _once_an_image(config: Config, images: int) -> list[Product]:
    units, keys = config.decoder_units, config.attention_units
    return [
        (images * REGIONS, units, keys),  # keys
        (images, units, 2 * units),  # first state
    ]


def _once_a_word(config: Config, tokens: int, vocabulary: int) -> list[Product]:
    units, keys = config.decoder_units, config.attention_units
    words = config.embedding_units
    return [
        (tokens, words, 4 * units),  # the word's part of the gates
        (tokens, units, keys),  # query
        (tokens * REGIONS, keys, 1),  # scores
        (tokens, REGIONS, units),  # context
        (tokens, units, units),  # gate of the context
        (tokens, units, 4 * units),  # the state's part of the gates
        (tokens, units, 4 * units),  # the context's part of the gates
        (tokens, units, words),  # deep output, from the state
        (tokens, units, words),  # deep output, from the context
        (tokens, words, vocabulary),  # logits
    ]


def _operations(products: list[Product]) -> int:
    return sum(2 * rows * inner * out for rows, inner, out in products)


def _layers(network: Any) -> Iterator[Any]:
    """All layers, also those of networks within the network."""
    for layer in getattr(network, "layers", ()):
        yield layer
        yield from _layers(layer)


def measure_peaks(dtype: str, side: int, rounds: int) -> Peaks:
    """Measures both on the device that Keras computes on.

    Args:
        dtype: of the matrices.
        side: of the matrices; what is copied is eight times as large.
        rounds: how often each is done; the fastest counts.
    """
    from keras import ops

    matrix = ops.cast(ops.full((side, side), 0.5), dtype)
    large = ops.cast(ops.full((8 * side, side), 0.5), dtype)
    product = _fastest(lambda: ops.matmul(matrix, matrix), rounds)
    copy = _fastest(lambda: ops.negative(large), rounds)
    moved = (
        2
        * math.prod(large.shape)
        * (FLOAT32 if dtype == "float32" else FLOAT16)
    )
    return Peaks(2 * side**3 / product, moved / copy)


def _fastest(work: Callable[[], Any], rounds: int) -> float:
    """Seconds of one piece of work; several are sent off at a time.

    GPUs do what they are sent in that order and later: a number of the last
    result is there when all of them are.
    """
    together, fastest = 10, float("inf")
    for _ in range(rounds + 1):  # the first is there to warm up
        begun = time.perf_counter()
        for _ in range(together):
            result = work()
        float(result[0, 0])
        took = (time.perf_counter() - begun) / together
        fastest = min(fastest, took)
    return fastest
