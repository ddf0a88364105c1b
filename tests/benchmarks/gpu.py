r"""Extraction, training and search on one device, beside the least they take.

    KERAS_BACKEND=jax python tests/benchmarks/gpu.py
    KERAS_BACKEND=tensorflow python tests/benchmarks/gpu.py --batches 16 512
    python tests/benchmarks/gpu.py --rows 99 --images 9 --steps 2 --words 99 \
        --batches 4 --side 256 --max-caption-length 6 --image-size 32

The last one is a try on a CPU. Without these flags all is of Flickr30k's size:
31,783 rows of features, 8,000 words. All flags of the scripts count. Nothing is
downloaded: weights, photographs and captions are random, and the features lie
in a file with holes. Of several GPUs one is measured: CUDA_VISIBLE_DEVICES=0.

The floor is the larger of operations / peak and bytes / bandwidth, both
measured here: `floors.py` says what is counted. Times are from NumPy arrays or
files to NumPy arrays, as the scripts see them; what is done once, compilation
above all, stands in a column of its own. Nothing here gates.
"""

import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from captioning import command  # noqa: E402
from config import Config, resolve  # noqa: E402
from tests.benchmarks import floors  # noqa: E402
from tests.benchmarks.yardsticks import CHANNELS, REGIONS  # noqa: E402

FAR = 3.0  # times the floor


def _number(default: Any, text: str) -> dict[str, Any]:
    return {"type": int, "default": default, "metavar": "INT", "help": text}


ACTIONS: command.Actions = {
    "--rows": _number(31_783, "images whose features there are"),
    "--images": _number(2_000, "photographs encoded, and images captioned"),
    "--steps": _number(100, "training steps"),
    "--words": _number(8_000, "size of the vocabulary"),
    "--side": _number(8_192, "of the matrices that the peak is measured with"),
    "--batches": {
        "nargs": "+",
        **_number([16, 128, 512], "images a training step; each is measured"),
    },
}


class Measured(NamedTuple):
    """A line of the table."""

    name: str
    once: float  # seconds more of the first time, with compilation
    took: float  # seconds
    work: floors.Work
    images: int


def timed(work: Callable[[], Any]) -> float:
    """Seconds of something that ends with NumPy arrays."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def write_photographs(folder: Path, number: int) -> list[str]:
    """Writes JPEG files of Flickr's size; gives their names."""
    import cv2

    random = np.random.default_rng(0)
    names = [f"{place:06d}.jpg" for place in range(number)]
    for name in names:
        small = random.integers(0, 256, (47, 63, 3), np.uint8)
        photograph = cv2.resize(
            small, (500, 375), interpolation=cv2.INTER_CUBIC
        )
        cv2.imwrite(str(folder / name), photograph)
    return names


def measure_extraction(
    config: Config, folder: Path, images: int, width: int
) -> list[Measured]:
    """The encoder alone, on the same batch again and again, and the whole."""
    import model
    from captioning.features import cache as features
    from captioning.features import extraction

    encoder = model.build_encoder(config)
    encode = encoder.predict_on_batch
    size, batches = config.input_size, -(-images // extraction.BATCH)
    shape = (extraction.BATCH, size, size, 3)
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    once = timed(lambda: encode(pixels))
    alone = timed(lambda: [encode(pixels) for _ in range(batches)])
    encoded = batches * extraction.BATCH
    work = floors.encoding(encoder, encoded, batches, width)
    measured = [Measured("encoder", once, alone, work, encoded)]

    names = write_photographs(folder, images)
    shape = encode(pixels).shape[1:]
    description = features.describe("gpu", "", "", size)
    cache = features.create(
        folder / "cache", description, {}, folder, names, shape
    )
    took = timed(
        lambda: extraction.fill(cache, folder, names, size, lambda: encode)
    )
    work = floors.encoding(encoder, images, batches, width)
    return [*measured, Measured("from files", 0.0, took, work, images)]


def draw_captions(config: Config, images: int, words: int) -> list[np.ndarray]:
    """Random words, about as many as Flickr30k's captions have.

    Returns:
        For each image int32 (captions, max_caption_length + 2).
    """
    from captioning.data.vocabulary import END, PAD, SPECIAL_WORDS, START

    random = np.random.default_rng(0)
    longest = config.max_caption_length
    shape = (images, config.captions_per_image, longest + 2)
    rows = random.integers(len(SPECIAL_WORDS), words, shape, np.int32)
    lengths = random.normal(12, 5, shape[:2]).round()
    lengths = np.clip(lengths, 3, longest).astype(int)[..., None]
    place = np.arange(longest + 2)
    rows[..., 0] = START
    rows = np.where(place == lengths + 1, END, rows)
    rows = np.where(place > lengths + 1, PAD, rows)
    return list(rows.astype(np.int32))


def measure_training(
    config: Config, features: np.ndarray, batch: int, actions: Any, width: int
) -> Measured:
    """Steps as `train.py` does them, reading included."""
    import keras

    import model
    from captioning.features.joined import Features
    from captioning.training import loop
    from captioning.training.batches import CaptionBatches

    images = batch * actions.steps
    random = np.random.default_rng(0)
    rows = random.choice(len(features), images, images > len(features))
    captions = draw_captions(config, images, actions.words)
    batches = CaptionBatches(
        Features([features], [rows]),
        captions,
        batch,
        config.captions_per_image,
        seed=0,
    )
    decoder = model.build_model(config, actions.words, CHANNELS)
    loop.compile_decoder(decoder, config, config.learning_rate, len(batches))
    clock: list[float] = []
    watch = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda epoch, logs: clock.append(time.perf_counter()),
        # train.py looks at the loss after each step, and waits for it.
        on_train_batch_end=lambda batch, logs: np.isfinite(logs["loss"]),
        on_epoch_end=lambda epoch, logs: clock.append(time.perf_counter()),
    )
    # The first epoch compiles.
    decoder.fit(batches, shuffle=False, verbose=0, epochs=2, callbacks=[watch])
    once, took = clock[1] - clock[0], clock[3] - clock[2]
    tokens = sum(np.count_nonzero(each[:, 1:]) for each in captions)
    updated = actions.steps * sum(
        math.prod(each.shape) for each in decoder.trainable_variables
    )
    work = floors.training(
        config, images, tokens, actions.words, updated, width
    )
    return Measured(
        f"training {batch}", max(0, once - took), took, work, images
    )


def measure_search(
    config: Config, features: np.ndarray, actions: Any
) -> Measured:
    """Captions as `evaluate.py` makes them, all of the longest length."""
    import model
    from captioning.data.vocabulary import END, SPECIAL_WORDS, Vocabulary
    from captioning.decoding import captioner

    words = map(str, range(actions.words - len(SPECIAL_WORDS)))
    vocabulary = Vocabulary((*SPECIAL_WORDS, *words))
    decoder = model.build_model(config, actions.words, CHANNELS)
    bias = np.zeros(actions.words, np.float32)
    bias[END] = -1e6
    decoder.logits.bias.assign(bias)
    searcher = captioner.build(decoder, config)
    rows = np.resize(np.arange(len(features)), actions.images)

    def caption(some: np.ndarray) -> None:
        captioner.caption_images(searcher, [features], some, vocabulary)

    once = timed(lambda: caption(rows[:1]))
    took = timed(lambda: caption(rows))
    steps = config.max_caption_length + 1
    work = floors.searching(config, len(rows), steps, actions.words)
    return Measured(f"beam {config.beam_size}", once, took, work, len(rows))


def measure(
    config: Config, folder: Path, features: np.ndarray, actions: Any, width: int
) -> Iterator[Measured]:
    """Measures one thing after the other."""
    yield from measure_extraction(config, folder, actions.images, width)
    for batch in actions.batches:
        yield measure_training(config, features, batch, actions, width)
    yield measure_search(config, features, actions)


def show(measured: Iterable[Measured], peaks: floors.Peaks) -> None:
    """Prints the table as it is measured, and what is far from its floor."""
    print(
        f"{'':14}{'once':>9}{'took':>9}{'floor':>9}{'of compute':>12}"
        f"{'of memory':>11}{'ratio':>8}{'images/s':>10}",
        flush=True,
    )
    far = []
    for each in measured:
        compute = each.work.operations / peaks.operations
        memory = each.work.bytes / peaks.bytes
        floor = max(compute, memory)
        ratio = each.took / floor
        if ratio > FAR:
            far.append(f"{each.name} ({ratio:.1f})")
        print(
            f"{each.name:14}{each.once:8.1f}s{each.took:8.2f}s{floor:8.3f}s"
            f"{compute:11.3f}s{memory:10.3f}s{ratio:8.1f}"
            f"{each.images / each.took:10.1f}",
            flush=True,
        )
    print(f"over {FAR:.0f} times the floor: {', '.join(far) or 'none'}")


def main(arguments: command.Arguments) -> None:
    """Measures."""
    command.import_keras()
    import keras

    from captioning import backend

    # As photographs are encoded, and not the drawn sample.
    fields = {"encoder": "resnet50", "encoder_weights": "random"}
    fields |= arguments.given
    fields["dataset"] = "flickr30k"
    config = resolve(Config(**fields), fields)
    actions = arguments.actions
    backend.set_seed(config.seed)
    precision = backend.set_precision(config)
    dtype = keras.config.dtype_policy().compute_dtype
    width = floors.FLOAT32 if dtype == "float32" else floors.FLOAT16
    devices = ", ".join(map(str, backend.accelerators())) or "processor"
    print(f"{keras.backend.backend()} on {devices}, {precision}", flush=True)
    peaks = floors.measure_peaks(dtype, actions.side, 5)
    print(
        f"peak: {peaks.operations / 1e12:.2f} TFLOP/s in {dtype}, "
        f"{peaks.bytes / 1e9:.0f} GB/s",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        features = np.lib.format.open_memmap(
            folder / "features.npy",
            "w+",
            np.float16,
            (actions.rows, REGIONS, CHANNELS),
        )
        show(measure(config, folder, features, actions, width), peaks)


if __name__ == "__main__":
    command.run(main, __doc__, ACTIONS)
