"""preprocess.py with a tiny encoder in place of a network, as a process.

It starts without Keras, in a second; everything else is the script itself.
PAUSE is how many seconds the encoder takes for each batch after the first.
Batches are small and committed at once, so that there is much to interrupt;
with AS_IT_IS set they are those of preprocess.py.
"""

import os
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))

import preprocess
from captioning import command
from captioning.features import cache as features
from captioning.features import extraction

BATCHES: list[int] = []  # that were encoded


def encode(images: np.ndarray) -> np.ndarray:
    """Means of the four quarters: (batch, size, size, 3) -> (batch, 4, 3)."""
    if BATCHES:
        time.sleep(float(os.environ.get("PAUSE", 0)))
    BATCHES.append(len(images))
    batch, size = images.shape[:2]
    quarters = images.reshape(batch, 2, size // 2, 2, size // 2, 3)
    return quarters.mean((2, 4)).reshape(batch, 4, 3).astype(np.float16)


def use_tiny_encoder(patch: pytest.MonkeyPatch) -> None:
    """Puts the encoder in the place of the network, and of Keras."""
    model: Any = ModuleType("model")
    model.feature_shape = lambda config: (4, 3)
    model.build_encoder = lambda config: SimpleNamespace(
        predict_on_batch=encode
    )
    keras: Any = ModuleType("keras")
    keras.version = lambda: "none"
    keras.backend = SimpleNamespace(backend=lambda: "none")
    keras.config = SimpleNamespace(
        dtype_policy=lambda: SimpleNamespace(name="float32")
    )
    patch.setitem(sys.modules, "model", model)
    patch.setitem(sys.modules, "keras", keras)
    patch.setattr(
        preprocess,
        "describe_features",
        lambda config: [
            features.describe(
                config.encoder, "quarters", "tiny", config.image_size
            )
        ],
    )
    if "AS_IT_IS" not in os.environ:
        patch.setattr(extraction, "BATCH", 4)
        patch.setattr(extraction, "COMMIT_SECONDS", 0.0)
    flags = ["--encoder", "resnet50", "--image-size", "32"]
    flags += ["--magnification", "1"]
    patch.setattr(sys, "argv", [*sys.argv, *flags])


if __name__ == "__main__":
    use_tiny_encoder(pytest.MonkeyPatch())
    command.run(preprocess.main, preprocess.__doc__, preprocess.ACTIONS)
