"""Trains the encoder of the drawn sample -> scenes.weights.h5.

    python docs/scenes.py

The first layers of ResNet50 learn to tell, of a square of an image, which kind
of object has its middle there, in which colour and size, and on which ground.
They see other scenes than the sample has, and no captions.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import cv2
import keras
import numpy as np
from keras import ops
from publish import halve
from tqdm import tqdm

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from captioning.data import sample  # noqa: E402
from captioning.features.encoder_weights import scenes_file  # noqa: E402
from captioning.files import atomic_path  # noqa: E402
from config import ENCODERS  # noqa: E402

SEED = sample.SEED + 1  # of the scenes
NUMBER, EPOCHS, BATCH, RATE = 3000, 2, 64, 2e-3
REGION = 32  # side in pixels of a region of the feature map
# Black after Keras's preprocessing for ResNet50: it subtracts these means.
BORDER = (124, 117, 104)
NAMES = (sample.KINDS, sample.COLOURS, sample.SIZES)


def regions(number: int) -> Iterator[tuple[np.ndarray, tuple[int, ...]]]:
    """Some regions of a scene: those with an object, and two others.

    Args:
        number: of the scene.

    Yields:
        A region amid its eight neighbours, uint8 RGB (96, 96, 3); and the
        numbers of kind, colour, size (0: no object) and ground.
    """
    random = np.random.default_rng([SEED, number])
    scene = sample.scene(random)
    image = sample.draw(scene, random)[..., ::-1]
    edges = [REGION] * 4
    image = cv2.copyMakeBorder(
        np.ascontiguousarray(image), *edges, cv2.BORDER_CONSTANT, value=BORDER
    )
    last = sample.SIDE // REGION - 1
    found: dict[tuple[int, ...], tuple[int, ...]] = {}
    for group in scene.groups:
        words = group.kind, group.colour, group.size
        label = [
            1 + [*names].index(w) for names, w in zip(NAMES, words, strict=True)
        ]
        for centre in group.centres:
            column, row = (
                np.clip(centre // REGION, 0, last).astype(int).tolist()
            )
            found[row, column] = tuple(label)
    for _ in range(2):
        row, column = random.integers(0, last + 1, 2).tolist()
        found.setdefault((row, column), (0, 0, 0))
    ground = [*sample.GROUNDS].index(scene.ground)
    for (row, column), label in found.items():
        top, left = row * REGION, column * REGION
        part = image[top : top + 3 * REGION, left : left + 3 * REGION]
        yield part, (*label, ground)


def build() -> tuple[keras.Model, keras.Model]:
    """The first layers of ResNet50, and what is trained with them."""
    side = 3 * REGION
    network = keras.applications.ResNet50(
        include_top=False, weights=None, input_shape=(side, side, 3)
    )
    layer = network.get_layer(ENCODERS["resnet50"].early_layer)
    encoder = keras.Model(network.input, layer.output)
    images = keras.Input((side, side, 3), dtype="uint8")
    pixels = ops.cast(images, "float32")
    pixels = keras.applications.resnet50.preprocess_input(pixels)
    feature_map = encoder(pixels)  # (batch, 12, 12, channels)
    own = feature_map.shape[1] // 3
    inner = feature_map[:, own:-own, own:-own]  # (batch, 4, 4, channels)
    region = ops.max(inner, axis=(1, 2))  # (batch, channels)
    answers = [len(names) + 1 for names in NAMES] + [len(sample.GROUNDS)]
    logits = [keras.layers.Dense(each)(region) for each in answers]
    return encoder, keras.Model(images, logits)


def main() -> None:
    """Trains the encoder and writes its weights in half precision."""
    keras.utils.set_random_seed(sample.SEED)
    found = [each for n in tqdm(range(NUMBER)) for each in regions(n)]
    images = np.stack([image for image, _ in found])
    labels = np.array([label for _, label in found])  # (regions, 4)
    encoder, model = build()
    steps = EPOCHS * len(images) // BATCH
    rate = keras.optimizers.schedules.CosineDecay(
        1e-5, steps, warmup_target=RATE, warmup_steps=steps // 10
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(
        keras.optimizers.AdamW(rate, weight_decay=0.01),
        [loss] * 4,
        metrics=[["accuracy"]] * 4,
    )
    training = slice(len(images) * 19 // 20)
    rest = slice(training.stop, None)
    model.fit(
        images[training],
        [*labels[training].T],
        BATCH,
        EPOCHS,
        validation_data=(images[rest], [*labels[rest].T]),
        verbose=2,
    )
    place = Path(scenes_file("resnet50"))
    with atomic_path(place) as part:
        full = part.with_suffix(".full.weights.h5")
        encoder.save_weights(full)
        halve(full, part)
        full.unlink()
    print(f"Wrote {place}, {place.stat().st_size / 1e6:.1f} MB.")


if __name__ == "__main__":
    main()
