"""How busy preprocessing keeps the encoder, and how much memory it takes.

    python tests/benchmarks/extraction.py
    python tests/benchmarks/extraction.py --encoders resnet50 --images 512

Needs photographs in REAL_DATA_DIR/data/flickr8k/Images. Prints images a second
of the whole extraction, from the JPEG files to the bytes on the disk, beside
those of the encoder's forward pass alone on the same batches, in turns, and
their ratio; speed and likeness of the features in bfloat16 beside float32; and
the peak memory of the process at 1,000 and 100,000 rows. Nothing here gates:
the figures depend on the machine. The photographs have just been written, so
that they come from the system's cache and not from the disk.

What bfloat16 does to captions is seen by one run on two caches; the last two
lines of these print CIDEr:

    FLAGS="--dataset-dir data/flickr8k --encoder resnet50"
    python preprocess.py $FLAGS --data-dir a --precision float32
    python preprocess.py $FLAGS --data-dir b --precision mixed_bfloat16
    python train.py $FLAGS --data-dir a
    python evaluate.py $FLAGS --data-dir a --split val
    python evaluate.py $FLAGS --data-dir b --split val
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

from captioning import command  # noqa: E402
from captioning.features import cache as features  # noqa: E402
from captioning.features import extraction  # noqa: E402
from config import Config  # noqa: E402

SIZES = {"224x224": (224, 224), "500x375": (500, 375)}  # width, height
ROWS = (1_000, 100_000)

Encode = Callable[[np.ndarray], np.ndarray]


def make_photographs(source: Path, folder: Path, number: int) -> None:
    """Writes photographs in the sizes of SIZES as JPEG files."""
    paths = sorted(source.glob("*.jpg"))[:number]
    for name, side in SIZES.items():
        (folder / name).mkdir()
        for path in paths:
            photograph = cv2.imread(str(path))
            resized = cv2.resize(
                photograph, side, interpolation=cv2.INTER_CUBIC
            )
            cv2.imwrite(str(folder / name / path.name), resized)


def build(encoder: str, precision: str, weights: Path) -> Encode:
    """The encoder, with trained weights where there are any, warmed up."""
    import keras

    import model

    policy = {"float32": "float32", "bfloat16": "mixed_bfloat16"}[precision]
    keras.config.set_dtype_policy(policy)
    path = weights / f"{encoder}_notop.weights.h5"
    known = str(path) if path.exists() else "random"
    built = model.build_encoder(
        Config(encoder=encoder, encoder_weights=known, magnification=1)
    )
    encode = built.predict_on_batch
    for _ in range(2):
        encode(np.zeros((extraction.BATCH, 224, 224, 3), np.uint8))
    return encode


def extract(folder: Path, encode: Encode) -> tuple[float, np.ndarray]:
    """Fills a cache; gives images a second and the features."""
    names = sorted(path.name for path in folder.iterdir())
    shape = encode(np.zeros((extraction.BATCH, 224, 224, 3), np.uint8)).shape
    with tempfile.TemporaryDirectory(dir=folder.parent) as place:
        description = features.describe("bench", "", "", 224)
        start = time.perf_counter()
        cache = features.create(
            Path(place) / "cache", description, {}, folder, names, shape[1:]
        )
        extraction.fill(cache, folder, names, 224, lambda: encode)
        seconds = time.perf_counter() - start
        return len(names) / seconds, np.array(cache.features)


def forward(folder: Path, encode: Encode) -> float:
    """Images a second of the encoder alone, on the same batches."""
    names = sorted(path.name for path in folder.iterdir())
    reads = extraction.read_ahead(folder, extraction.in_batches(names), 224)
    batches = [np.stack([r.pixels for r in b]) for b in reads]
    start = time.perf_counter()
    for batch in batches:
        encode(batch)
    return len(names) / (time.perf_counter() - start)


def keep_busy(folder: Path, encode: Encode, rounds: int) -> tuple[float, ...]:
    """Medians of extraction, of the encoder alone and of their ratio."""
    pairs = []
    for _ in range(rounds):
        before = forward(folder, encode)
        end_to_end, _ = extract(folder, encode)
        # The encoder is measured before and after: other work on the machine
        # then bears on both.
        bare = 2 / (1 / before + 1 / forward(folder, encode))
        pairs.append((end_to_end, bare, end_to_end / bare))
    return tuple(np.median(pairs, axis=0))


def likeness(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Cosine similarity of the features of each image, (images,)."""
    one, other = (
        each.reshape(len(each), -1).astype(np.float32) for each in (one, other)
    )
    norms = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    return (one * other).sum(1) / norms


def measure_encoder(
    encoder: str, folder: Path, weights: Path, rounds: int
) -> None:
    """Prints the figures of one encoder."""
    found, speed = {}, {}
    for precision in ("float32", "bfloat16"):
        encode = build(encoder, precision, weights)
        for name in SIZES:
            rate, bare, ratio = keep_busy(folder / name, encode, rounds)
            print(
                f"{encoder:<12}{precision:<10}{name:<9}{rate:>7.1f} images/s"
                f"{bare:>8.1f} bare{ratio:>7.2f}",
                flush=True,
            )
            speed[precision] = bare
        _, found[precision] = extract(folder / "224x224", encode)
    alike = likeness(found["float32"], found["bfloat16"])
    print(
        f"{encoder:<12}bfloat16 beside float32: "
        f"{speed['bfloat16'] / speed['float32']:.2f} times as fast, cosine "
        f"similarity {alike.mean():.5f} (least {alike.min():.5f})",
        flush=True,
    )


def peak_memory() -> float:
    """The most megabytes that the process has had in memory so far."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    return float("nan")


def measure_rows(rows: int, folder: Path) -> None:
    """Prints the peak memory of an extraction with a tiny encoder.

    Args:
        rows: how many images there seem to be.
        folder: of the photographs that are read again and again in their
            place, because 100,000 files take long to write.
    """
    # As preprocess.py does: it also says how memory is given back.
    command.import_keras()
    photographs = sorted(folder.glob("*/*.jpg"))
    read = extraction.read_image
    extraction.read_image = lambda path, size: read(
        photographs[int(path.stem) % len(photographs)], size
    )

    def encode(images: np.ndarray) -> np.ndarray:
        return np.zeros((len(images), 49, 64), np.float16)

    names = [f"{number:010d}.jpg" for number in range(rows)]
    with tempfile.TemporaryDirectory(dir=folder) as place:
        description = features.describe("tiny", "", "", 32)
        before = peak_memory()
        cache = features.create(
            Path(place) / "cache", description, {}, Path(place), names, (49, 64)
        )
        extraction.fill(cache, Path(place), names, 32, lambda: encode)
        after = peak_memory()
    size = rows * 49 * 64 * 2 / 2**20
    print(
        f"{rows:>8,} rows, {size:,.0f} MB of features: peak memory "
        f"{before:.0f} MB before, {after:.0f} MB after",
        flush=True,
    )


def main() -> None:
    """Runs what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--encoders", nargs="*", default=["resnet50", "vgg16"])
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rows:
        measure_rows(arguments.rows, arguments.folder)
        return
    real_data = os.environ.get("REAL_DATA_DIR")
    if not real_data:
        raise SystemExit("REAL_DATA_DIR names no folder with photographs")
    print("batches of", extraction.BATCH, "images", flush=True)
    source = Path(real_data) / "data" / "flickr8k" / "Images"
    with tempfile.TemporaryDirectory() as folder:
        make_photographs(source, Path(folder), arguments.images)
        for rows in ROWS:
            # A process each: memory is not given back.
            flags = ["--rows", str(rows), "--folder", folder]
            subprocess.run([sys.executable, __file__, *flags], check=True)
        command.import_keras()
        for encoder in arguments.encoders:
            measure_encoder(
                encoder,
                Path(folder),
                Path(real_data) / "weights",
                arguments.rounds,
            )


if __name__ == "__main__":
    main()
