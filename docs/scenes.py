"""Trains the encoder of the drawn sample -> scenes.weights.h5.

    python docs/scenes.py

The network learns to tell, for each region of its map, which kind of object has
its middle there, in which colour and size, on which ground, and in which row
and column of the image the region is. It sees other scenes than the sample has,
and no captions.
"""

import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import keras
import numpy as np
from keras import ops
from publish import halve

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from captioning.data import sample  # noqa: E402
from captioning.features import networks  # noqa: E402
from captioning.features.encoder_weights import SCENES_FILE  # noqa: E402
from captioning.files import atomic_path  # noqa: E402
from config import SCENES  # noqa: E402

SEED = sample.SEED + 1  # of the scenes
NUMBER, EPOCHS, BATCH, RATE = 8000, 5, 32, 2e-3
REGION = 32  # side in pixels of a region of the map
SIDE = sample.SIDE // REGION  # of the map, in regions
NAMES = (sample.KINDS, sample.COLOURS, sample.SIZES)
# Answers for a region: kind, colour and size (0: no object), ground, row and
# column.
ANSWERS = (
    *(len(names) + 1 for names in NAMES),
    len(sample.GROUNDS),
    SIDE,
    SIDE,
)
# There are many more regions without an object than with one, and every region
# has a ground and a place.
EMPTY_WEIGHT, PLACE_WEIGHT = 0.1, 0.3
BESIDE = 20  # pixels around an object in which a region is not empty either


def example(number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draws a scene and says what is where.

    Args:
        number: of the scene.

    Returns:
        The image, uint8 RGB (224, 224, 3); the answers, int (7, 7, 6); and
        how much they count, float32 (7, 7, 6). Regions beside the middle of
        an object count neither as it nor as empty.
    """
    random = np.random.default_rng([SEED, number])
    scene = sample.scene(random)
    image = sample.draw(scene, random)[..., ::-1]
    labels = np.zeros((SIDE, SIDE, len(ANSWERS)), int)
    labels[..., 3] = [*sample.GROUNDS].index(scene.ground)
    labels[..., 4:] = np.moveaxis(np.indices((SIDE, SIDE)), 0, -1)
    weights = np.full(labels.shape, PLACE_WEIGHT, np.float32)
    weights[..., :3] = EMPTY_WEIGHT
    middles = REGION * (labels[..., :3:-1] + 0.5)  # x and y (7, 7, 2)
    objects = [
        (group, centre) for group in scene.groups for centre in group.centres
    ]
    for group, centre in objects:
        distance = np.linalg.norm(middles - centre, axis=-1)  # (7, 7)
        weights[distance < group.radius + BESIDE, :3] = 0
    for group, centre in objects:
        column, row = np.clip(centre // REGION, 0, SIDE - 1).astype(int)
        words = group.kind, group.colour, group.size
        labels[row, column, :3] = [
            1 + [*names].index(w) for names, w in zip(NAMES, words, strict=True)
        ]
        weights[row, column, :3] = 1
    return np.ascontiguousarray(image), labels, weights


def build() -> tuple[keras.Model, keras.Model]:
    """The network, and what is trained: images -> logits of each answer."""
    network = networks.build(SCENES, (sample.SIDE, sample.SIDE, 3))
    images = keras.Input((sample.SIDE, sample.SIDE, 3), dtype="uint8")
    pixels = ops.cast(images, "float32")
    pixels = keras.applications.mobilenet_v2.preprocess_input(pixels)
    feature_map = network(pixels)  # (batch, 7, 7, channels)
    logits = [keras.layers.Dense(each)(feature_map) for each in ANSWERS]
    return network, keras.Model(images, logits)


def main() -> None:
    """Trains the network and writes its weights in half precision."""
    keras.utils.set_random_seed(sample.SEED)
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        drawn = [*pool.map(example, range(NUMBER), chunksize=100)]
    images, labels, weights = map(np.stack, zip(*drawn, strict=True))
    network, model = build()
    training, rest = slice(NUMBER * 19 // 20), slice(NUMBER * 19 // 20, None)

    def part(which: slice) -> tuple:
        answers = np.moveaxis(labels[which], -1, 0)  # (6, images, 7, 7)
        counts = np.moveaxis(weights[which], -1, 0)
        return images[which], [*answers], [*counts]

    steps = EPOCHS * -(-training.stop // BATCH)
    rate = keras.optimizers.schedules.CosineDecay(
        1e-5, steps, warmup_target=RATE, warmup_steps=steps // 10
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(
        keras.optimizers.AdamW(rate, weight_decay=0.01),
        [loss] * len(ANSWERS),
        weighted_metrics=[["accuracy"]] * len(ANSWERS),
    )
    seen, answers, counts = part(training)
    model.fit(
        seen,
        answers,
        BATCH,
        EPOCHS,
        sample_weight=counts,
        validation_data=part(rest),
        verbose=2,
    )
    place = Path(SCENES_FILE)
    with atomic_path(place) as part_file:
        full = part_file.with_suffix(".full.weights.h5")
        network.save_weights(full)
        halve(full, part_file)
        full.unlink()
    print(f"Wrote {place}, {place.stat().st_size / 1e6:.1f} MB.")


if __name__ == "__main__":
    main()
