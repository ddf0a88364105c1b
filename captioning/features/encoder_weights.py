"""The weights of an encoder: their identity, and how they are loaded."""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np

from captioning.features import cache
from captioning.files import reason
from config import ENCODERS, SCENES, Config, UserError, each_encoder

# A seed of its own: --seed changes the training, and neither the encoder nor,
# with it, the feature cache.
RANDOM_SEED = 0

# The end of an error about a file.
ONE_EACH = " (with several encoders, one each, separated by commas)"

# Trained on drawn scenes by docs/scenes.py.
SCENES_FILE = str(Path(__file__).with_name("scenes.weights.h5"))


def describe_features(config: Config) -> list[dict[str, Any]]:
    """What the features of each encoder depend on.

    Args:
        config: its encoder fields.

    Returns:
        For each encoder what `cache.describe` returns.

    Raises:
        UserError: if a weights file is missing.
    """
    return [
        cache.describe(
            name,
            ENCODERS[name].layer,
            fingerprint(name, weights),
            config.image_size,
            config.magnification,
        )
        for name, weights in each_encoder(config)
    ]


def fingerprint(encoder: str, weights: str) -> str:
    """A short name that identifies encoder weights.

    Args:
        encoder: a key of `ENCODERS`.
        weights: `imagenet`, `scenes`, `random`, or the path of a weights file.

    Raises:
        UserError: if there is no such file, or it holds no weights, or the
            encoder has none of that name.
    """
    if weights == SCENES != encoder:
        raise UserError(
            f"{encoder} has no weights that were trained on drawn scenes: give "
            f"--encoder {SCENES}, or other --encoder-weights"
        )
    if encoder == SCENES and weights == "imagenet":
        raise UserError(
            f"the encoder {SCENES} has no ImageNet weights: leave "
            "--encoder-weights out"
        )
    if weights == "random":
        return f"random-{RANDOM_SEED}"
    if weights == "imagenet":
        return ENCODERS[encoder].imagenet
    return digest(_of_weights_in(_path(weights), lambda each: each[()]))


def _path(weights: str) -> str:
    return SCENES_FILE if weights == SCENES else weights


def digest(weights: Iterable[np.ndarray]) -> str:
    """A digest of weights by their values in half precision.

    The same weights have the same digest in any precision, order and format
    of file.
    """
    with np.errstate(over="ignore"):
        halves = [np.asarray(each, np.float16) for each in weights]
    digests = [
        hashlib.sha256(f"{each.shape}".encode() + each.tobytes()).digest()
        for each in halves
    ]
    return f"half-{hashlib.sha256(b''.join(sorted(digests))).hexdigest()[:16]}"


def check(
    config: Config, descriptions: Sequence[dict[str, Any]], needed: bool = True
) -> None:
    """Compares encoder weights with those that a run was trained with.

    Args:
        config: its encoder fields.
        descriptions: from `runs.load_description`.
        needed: whether a missing file is an error; it is not where the
            features are cached.

    Raises:
        UserError: if they differ, or another layer was cached.
    """
    pairs = zip(each_encoder(config), descriptions, strict=True)
    for (name, weights), description in pairs:
        layer = ENCODERS[name].layer
        if layer != description["layer"]:
            raise UserError(
                f"the run was trained on {name}'s layer "
                f"{description['layer']}, and this version caches {layer}: "
                "train it again with train.py --fresh"
            )
        names = ("imagenet", "random", SCENES)
        if not (needed or weights in names or os.path.exists(weights)):
            continue
        found, wanted = fingerprint(name, weights), description["weights"]
        if found != wanted:
            remedy = f"give the same file as --encoder-weights{ONE_EACH}"
            if weights in (SCENES, "random"):
                remedy = "train it again with train.py --fresh"
            raise UserError(
                f"the run was trained with the {name} weights {wanted}, and "
                f"{weights} is {found}: {remedy}"
            )


def load(network: keras.Model, weights: str, encoder: str) -> None:
    """Gives a network its weights.

    Args:
        network: an encoder without its top.
        weights: `imagenet`, `scenes`, `random`, or the path of a weights file,
            `.weights.h5` or `.h5`.
        encoder: the name of the network, a key of `ENCODERS`.

    Raises:
        UserError: if they cannot be downloaded, or the file does not hold the
            weights of the network.
    """
    if weights == "random":
        network.set_weights(_random_weights(network))
    elif weights == "imagenet":
        network.set_weights(_imagenet_weights(network, encoder))
    else:
        _load_file(network, _path(weights), encoder)


def _random_weights(network: keras.Model) -> list[np.ndarray]:
    """Glorot-normal kernels from NumPy, the same on every backend.

    With these the shortcuts of residual networks outweigh the filters beside
    them, so that more of the image is left in the last layer.
    """
    generator = np.random.default_rng(RANDOM_SEED)
    weights = []
    for variable in network.weights:
        shape = variable.shape
        if len(shape) > 1:
            area = np.prod(shape[:-2])  # of the filter, in pixels
            # A depthwise filter has one input per output.
            ends = 2 if 1 in shape[-2:] else shape[-2] + shape[-1]
            scale = np.sqrt(2 / (area * ends))
            weights.append(generator.normal(0, scale, shape))
        else:
            zeros = variable.name in ("bias", "beta", "moving_mean")
            weights.append(np.full(shape, float(not zeros)))
    return weights


def _imagenet_weights(network: keras.Model, encoder: str) -> list[np.ndarray]:
    application = getattr(keras.applications, ENCODERS[encoder].application)
    shape = network.input_shape[1:]
    try:
        trained = application(include_top=False, input_shape=shape)
    except Exception as error:
        raise UserError(
            f"the ImageNet weights of {encoder} could not be downloaded "
            f"({reason(error)}): download the file elsewhere and give its path "
            f"as --encoder-weights{ONE_EACH}"
        ) from None
    weights, known = trained.get_weights(), ENCODERS[encoder].imagenet
    if known not in ("imagenet", found := digest(weights)):
        raise UserError(
            f"Keras downloaded ImageNet weights of {encoder} with the digest "
            f"{found}, not {known}: give a file with the latter as "
            "--encoder-weights"
        )
    return weights


def _load_file(network: keras.Model, path: str, encoder: str) -> None:
    # Not the values, which may be half a gigabyte. How often each shape occurs
    # identifies a network, whichever format the file has: Keras 3 does not
    # store the names of layers.
    found = Counter(_of_weights_in(path, lambda each: each.shape))
    if found != Counter(tuple(weight.shape) for weight in network.weights):
        raise UserError(
            f"{path} does not hold the weights of {encoder} without its "
            "classifier: give the --encoder that they belong to, or the file "
            f"whose name says notop{ONE_EACH}"
        )
    try:
        network.load_weights(path)
    except Exception as error:  # whatever a damaged file makes Keras raise
        raise UserError(
            f"{path} could not be loaded into {encoder} ({reason(error)}): "
            "Keras expects its own files to end in .weights.h5, those from "
            "before Keras 3 in .h5"
        ) from None


def _of_weights_in(path: str, take: Callable[[h5py.Dataset], Any]) -> list[Any]:
    """What `take` returns for a file's weights, except the optimizer's."""
    found = []

    def enter(name: str, entry: Any) -> None:
        if isinstance(entry, h5py.Dataset) and "optimizer" not in name:
            if entry.dtype.kind not in "fiu":
                raise ValueError(f"{name} is not a weight")
            found.append(take(entry))

    try:
        with open(path, "rb"):  # h5py's errors say less
            pass
    except OSError as error:
        raise UserError(
            f"encoder weights {path}: {error.strerror}; --encoder-weights "
            "takes imagenet, scenes, random or the path of a weights file"
        ) from None
    try:
        with h5py.File(path) as file:
            file.visititems(enter)
    except (OSError, RuntimeError, KeyError, ValueError):
        raise UserError(
            f"{path} is not a weights file, or is incomplete: "
            "--encoder-weights takes imagenet, scenes, random or an HDF5 file "
            "written by Keras"
        ) from None
    return found
