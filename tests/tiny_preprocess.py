"""preprocess.py with a tiny encoder in place of a network, as a process.

It starts without Keras, in a second; everything else is the script itself.
PAUSE is how many seconds the encoder takes for a batch.
"""

import os
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

import preprocess
from captioning import command
from captioning.features import cache as features
from captioning.features import extraction


def encode(images: np.ndarray) -> np.ndarray:
    """Means of the four quarters: (batch, size, size, 3) -> (batch, 4, 3)."""
    time.sleep(float(os.environ.get("PAUSE", 0)))
    batch, size = images.shape[:2]
    quarters = images.reshape(batch, 2, size // 2, 2, size // 2, 3)
    return quarters.mean((2, 4)).reshape(batch, 4, 3).astype(np.float16)


def main() -> None:
    """Runs the script."""
    model: Any = ModuleType("model")
    model.describe_features = lambda config, weights: features.describe(
        config.encoder, "quarters", "tiny", config.image_size
    )
    model.feature_shape = lambda config: (4, 3)
    model.build_encoder = lambda config, weights: SimpleNamespace(
        predict_on_batch=encode
    )
    keras: Any = ModuleType("keras")
    keras.version = lambda: "none"
    keras.backend = SimpleNamespace(backend=lambda: "none")
    keras.config = SimpleNamespace(
        set_dtype_policy=lambda policy: None,
        dtype_policy=lambda: SimpleNamespace(name="float32"),
    )
    sys.modules |= {"model": model, "keras": keras}
    command.import_keras = lambda: None
    extraction.BATCH, extraction.COMMIT_SECONDS = 4, 0.0
    sys.argv += ["--precision", "float32", "--image-size", "32"]
    sys.argv += ["--magnification", "1"]
    command.run(preprocess.main, preprocess.__doc__, preprocess.ACTIONS)


if __name__ == "__main__":
    main()
