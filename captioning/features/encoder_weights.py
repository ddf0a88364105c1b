"""Loads the weights of an encoder from a file, of this encoder and no other."""

import functools
from collections import Counter
from typing import Any

import h5py
import keras

from config import ENCODERS, UserError

# How often each shape of a weight occurs. It identifies a network, whichever
# format the file has: Keras 3 does not store the names of layers.
Shapes = Counter[tuple[int, ...]]


def load(network: keras.Model, path: str, encoder: str) -> None:
    """Loads a weights file, `.weights.h5` or `.h5`, into a network.

    Args:
        network: an encoder without its top.
        path: the file.
        encoder: the name of the network, a key of `ENCODERS`.

    Raises:
        UserError: if the file does not hold the weights of the network.
    """
    found, wanted = _shapes_in_file(path), _shapes_of(network)
    if found != wanted:
        raise UserError(
            f"{path} does not hold the weights of {encoder}"
            + _what_it_holds(found, encoder)
        )
    try:
        network.load_weights(path)
    except Exception as error:  # whatever a damaged file makes Keras raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{path} could not be loaded into {encoder} ({reason}): Keras "
            "expects its own files to end in .weights.h5, those from before "
            "Keras 3 in .h5"
        ) from None


def _shapes_of(network: keras.Model) -> Shapes:
    return Counter(tuple(weight.shape) for weight in network.weights)


def _shapes_in_file(path: str) -> Shapes:
    """The shapes of a model's weights, without those of its optimizer."""
    shapes: Shapes = Counter()

    def count(name: str, entry: Any) -> None:
        if isinstance(entry, h5py.Dataset) and "optimizer" not in name:
            shapes[entry.shape] += 1

    try:
        with h5py.File(path) as file:
            file.visititems(count)
    except (OSError, RuntimeError, KeyError, ValueError):
        raise UserError(
            f"{path} is not a weights file, or is incomplete: "
            "--encoder-weights takes imagenet, random or an HDF5 file written "
            "by Keras"
        ) from None
    return shapes


@functools.cache
def _networks() -> dict[str, Shapes]:
    """The shapes of every encoder."""
    shapes = {}
    for name, entry in ENCODERS.items():
        application = getattr(keras.applications, entry.application)
        shapes[name] = _shapes_of(application(include_top=False, weights=None))
    return shapes


def _what_it_holds(found: Shapes, encoder: str) -> str:
    """The end of an error about a file whose weights have other shapes."""
    if not found:
        return ": it is empty"
    networks = _networks()
    for name, shapes in networks.items():
        if shapes == found:
            return f" but those of {name}: give --encoder {name}, or its file"
    # The largest, as VGG19 has all the shapes of VGG16.
    within = [name for name, shapes in networks.items() if shapes <= found]
    if not within:
        return (
            f", nor those of {', '.join(n for n in networks if n != encoder)}"
        )
    name = max(within, key=lambda name: networks[name].total())
    return (
        f" without its classifier: it has all layers of {name} and more; give "
        "the file whose name says notop"
    )
