"""How fast a training step is, input included, beside the usual ways.

    python tests/benchmarks/training.py [--precision float32]
    python tests/benchmarks/training.py --dataset-dir DIR

Needs the captions of a dataset, by default REAL_DATA_DIR/data/flickr8k, for
their lengths; words and features are random: 49x2048 features, 8,000 words.
Prints captions a second of `train.py` and of two decoders written as they are
in many repositories, in turns; the share that our step reaches of the
processor's matrix-product peak; the share of it that loading takes; when the
first step ends, which includes compiling; and the memory that training has for
itself with the features of 31,783 images. The yardsticks compute in float32,
ours in what `--precision` says. PyTorch's needs torch (`pip install torch`) and
is left out without it. Nothing here gates: the figures depend on the machine.
"""

import importlib.util
import itertools
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from captioning import command  # noqa: E402
from captioning.data import datasets, vocabulary  # noqa: E402
from config import Config, UserError, resolve  # noqa: E402
from tests.benchmarks import floors, yardsticks  # noqa: E402
from tests.benchmarks.yardsticks import (  # noqa: E402
    CHANNELS,
    REGIONS,
    THREADS,
    WORDS,
    Epoch,
)

IMAGES = 480
SAMPLE = 640  # captions that the yardsticks take of them; they need longer
ROUNDS = 3
SIDE = 2048  # of the matrices that the peak is measured with
MANY_ROWS, MEMORY_STEPS = 31_783, 20


def draw_captions(config: Config) -> list[np.ndarray]:
    """Random words in captions of the lengths of real ones.

    Returns:
        For each image int32 (its captions, steps + 1).
    """
    place = config.dataset_dir
    if not place:
        if "REAL_DATA_DIR" not in os.environ:
            raise UserError(
                "no captions to take the lengths of: give --dataset-dir, or "
                "set REAL_DATA_DIR to the folder of data/flickr8k"
            )
        place = Path(os.environ["REAL_DATA_DIR"]) / "data" / "flickr8k"
    table = datasets.find_dataset(
        Path(place), config.layout, config.val_share, config.test_share
    ).table
    table = table[table["split"] == "train"]
    special = vocabulary.SPECIAL_WORDS
    names = np.array([str(n) for n in range(WORDS - len(special))])
    words = vocabulary.Vocabulary((*special, *names.tolist()))
    random = np.random.default_rng(0)
    drawn = []
    groups = table.groupby("image", sort=False)["caption"]
    for _, captions in itertools.islice(groups, IMAGES):
        lengths = [len(vocabulary.tokenise(each)) for each in captions]
        tokens = [random.choice(names, length) for length in lengths]
        drawn.append(
            vocabulary.encode(tokens, words, config.max_caption_length)
        )
    return drawn


def write_features(folder: Path, images: int) -> None:
    """Random features: in one file as our cache is, and in one an image."""
    shape = (images, REGIONS, CHANNELS)
    features = np.lib.format.open_memmap(
        folder / "features.npy", "w+", np.float16, shape
    )
    random = np.random.default_rng(0)
    for image in range(images):
        features[image] = random.standard_normal(shape[1:], np.float32)
        np.save(folder / f"{image}.npy", features[image].astype(np.float32))
    features.flush()


def make_batches(
    config: Config, features: np.ndarray, rows: np.ndarray, captions: Any
) -> Any:
    """Training batches as train.py makes them, with all captions."""
    from captioning.features.joined import Features
    from captioning.training.batches import CaptionBatches

    joined = Features([features], [rows])
    return CaptionBatches(
        joined, captions, config.batch_images, seed=config.seed
    )


def ours(decoder: Any, batches: Any) -> Epoch:
    """What train.py does in an epoch; the decoder is warm already."""
    numbers = itertools.count()

    def epoch() -> int:
        batches.begin(next(numbers))
        decoder.fit(batches, shuffle=False, verbose=0)
        return sum(map(len, batches.captions))

    return epoch


def own_memory() -> float:
    """Megabytes that the process has for itself, without files it maps."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1024
    return float("nan")


def measure_memory(
    config: Config, decoder: Any, folder: Path, captions: list[np.ndarray]
) -> None:
    """Prints the first step's time and the memory of some steps.

    Their features are in a large file. The decoder is warm afterwards.
    """
    import keras

    shape = (MANY_ROWS, REGIONS, CHANNELS)
    np.lib.format.open_memmap(folder / "many.npy", "w+", np.float16, shape)
    features = np.load(folder / "many.npy", mmap_mode="r")
    images = MEMORY_STEPS * config.batch_images
    rows = np.random.default_rng(0).choice(MANY_ROWS, images, replace=False)
    some = list(itertools.islice(itertools.cycle(captions), images))
    batches = make_batches(config, features, rows, some)
    used, ends = [own_memory()], [time.perf_counter()]

    def after_step(batch: int, logs: Any) -> None:
        used.append(own_memory())
        ends.append(time.perf_counter())

    watch = keras.callbacks.LambdaCallback(on_train_batch_end=after_step)
    decoder.fit(batches, shuffle=False, verbose=0, callbacks=[watch])
    print(f"first step: ends {ends[1] - ends[0]:.1f} s after `fit` begins")
    print(
        f"memory: {used[0]:,.0f} MB before training, {max(used):,.0f} MB at "
        f"most and {used[-1]:,.0f} MB after {len(batches)} steps on random "
        f"rows of {features.nbytes / 2**20:,.0f} MB of features"
    )


def load(batches: Any) -> int:
    """Reads the batches of an epoch and does nothing with them."""
    for place in range(len(batches)):
        batches[place]
    return sum(map(len, batches.captions))


def rate(epoch: Epoch) -> float:
    """Captions a second."""
    start = time.perf_counter()
    return epoch() / (time.perf_counter() - start)


def measure_in_turns(epochs: dict[str, Epoch], dtypes: set[str]) -> Any:
    """The rates of each round, so that noise on the machine bears on all.

    Returns:
        Captions a second of each epoch, and operations a second of a matrix
        product in each dtype, of every round.
    """
    rates = {name: [] for name in epochs}
    peaks = {dtype: [] for dtype in dtypes}
    for _ in range(ROUNDS):
        for name, epoch in epochs.items():
            rates[name].append(rate(epoch))
        for dtype in dtypes:
            peaks[dtype].append(floors.measure_peaks(dtype, SIDE, 1).operations)
    return rates, peaks


def show(
    rates: Any, peaks: Any, dtype: str, operations: float, captions: float
) -> None:
    """Prints the figures.

    Args:
        rates: from `measure_in_turns`.
        peaks: from `measure_in_turns`.
        dtype: in which our matrix products are.
        operations: of one of our steps.
        captions: of one of our steps.
    """
    best = {name: max(each) for name, each in rates.items()}
    loading = best["ours"] / best.pop("loading")
    print(f"captions a second, the fastest of {ROUNDS} rounds (median):")
    for name, fastest in best.items():
        print(
            f"{name:12}{fastest:8.1f} ({np.median(rates[name]):.1f})"
            f"   ours is {best['ours'] / fastest:.2f} times as fast"
        )
    for name, each in sorted(peaks.items()):
        print(f"peak {name}: {max(each) / 1e9:.0f} GFLOP/s")
    seconds = captions / best["ours"]
    reached = operations / seconds
    print(
        f"our step: {captions:.0f} captions, {operations / 1e9:.1f} useful "
        f"GFLOP, {1000 * seconds:.0f} ms, {reached / 1e9:.0f} GFLOP/s, "
        f"{reached / max(peaks[dtype]):.1%} of the peak in {dtype}"
    )
    print(f"loading: {loading:.1%} of our step, if nothing ran beside it")


def main(arguments: command.Arguments) -> None:
    """Measures."""
    command.import_keras()
    import keras

    import model
    from captioning import backend
    from captioning.training import loop

    # The decoder of photographs, and not the small one of the drawn sample.
    fields = {**arguments.given, "dataset": "flickr8k"}
    config = resolve(Config(**fields), fields)
    captions = draw_captions(config)
    owners = np.repeat(np.arange(len(captions)), [*map(len, captions)])
    rows = np.concatenate(captions)  # (captions, steps + 1)
    if backend.TENSORFLOW:
        import tensorflow as tf

        tf.config.threading.set_intra_op_parallelism_threads(THREADS)
    keras.utils.set_random_seed(config.seed)
    precision = backend.set_precision(config)
    dtype = keras.config.dtype_policy().compute_dtype
    tokens = np.count_nonzero(rows[:, 1:])
    operations = floors.operations_of_training(
        config, len(captions), tokens, WORDS
    )
    print(
        f"{len(captions)} images, {len(rows):,} captions, {tokens:,} words "
        f"with <end>; ours in {precision}; {THREADS} threads",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_features(folder, len(captions))
        features = np.load(folder / "features.npy", mmap_mode="r")
        everything = np.arange(len(captions))
        batches = make_batches(config, features, everything, captions)
        decoder = model.build_model(config, WORDS, CHANNELS)
        loop.compile_decoder(
            decoder, config, config.learning_rate, len(batches)
        )
        measure_memory(config, decoder, folder, captions)
        epochs = {"ours": ours(decoder, batches)}
        epochs["loading"] = lambda: load(batches)
        sample = np.random.default_rng(0).permutation(len(rows))[:SAMPLE]
        given = (folder, owners[sample], rows[sample])
        if backend.TENSORFLOW:
            epochs["TensorFlow"] = yardsticks.with_tensorflow(*given)
        if importlib.util.find_spec("torch"):
            epochs["PyTorch"] = yardsticks.with_pytorch(*given)
        else:
            print("no figure of PyTorch: `pip install torch==2.13.0`")
        rates, peaks = measure_in_turns(epochs, {"float32", dtype})
        steps = len(batches)
        show(rates, peaks, dtype, operations / steps, len(rows) / steps)


if __name__ == "__main__":
    command.run(main, __doc__, {})
