"""How preprocess.py grows with a dataset: speed, memory, disk; and kills.

    python tests/benchmarks/growth.py --images 2000 10000

Makes tiny JPEG files in tars of 10,000, as img2dataset writes them, and runs
preprocess.py over them with a tiny encoder in place of a network: once in one
process, once in two workers at the same time, and once in a process that is
killed (SIGKILL) in the middle of unpacking and again in the middle of encoding.
All three have to leave the same, bit for bit. The tars have just been written,
so that they come from the system's cache and not from the disk. The start of
Python counts as unpacking, and that of nltk as reading captions. Nothing here
gates: speed depends on the machine.
"""

import argparse
import io
import os
import resource
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pandas as pd

SCRIPT = Path(__file__).parents[1] / "tiny_preprocess.py"
SHARD = 10_000  # images per tar
WORDS = [f"word{number}" for number in range(1_000)]
# What a run writes last in each of its stages.
STAGES = {
    "unpacking": "unpacked/.notes/complete.json",
    "reading captions": "features/*/meta.json",
    "encoding": "features/*/finished.bin",
    "saving": "text-*/dataset.json",
}
# These know the folder, or when the images were unpacked.
OF_A_PLACE = ("dataset.json", "meta.json", "images.csv")


def key(number: int) -> str:
    """The name of an image, without its ending."""
    return f"{number // SHARD:05d}{number % SHARD:04d}"


def make_shards(folder: Path, images: int) -> None:
    """Writes KEY.jpg and KEY.txt, a blur and ten words, into tars."""
    generator = np.random.default_rng(0)
    folder.mkdir()
    for first in range(0, images, SHARD):
        with tarfile.open(folder / f"{first // SHARD:05d}.tar", "w") as archive:
            for number in range(first, min(first + SHARD, images)):
                blur = generator.integers(0, 256, (4, 4, 3), np.uint8)
                jpeg = cv2.imencode(".jpg", cv2.resize(blur, (32, 32)))[1]
                words = generator.integers(0, len(WORDS), 10)
                text = " ".join(WORDS[word] for word in words)
                files = {".jpg": jpeg.tobytes(), ".txt": text.encode()}
                for ending, data in files.items():
                    member = tarfile.TarInfo(key(number) + ending)
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))


def start(tars: Path, place: Path, *flags: str) -> subprocess.Popen:
    """Starts preprocess.py on the tars, with its cache in `place`."""
    folders = ["--dataset-dir", str(tars), "--data-dir", str(place)]
    with open(log(place), "a") as told:
        return subprocess.Popen(
            [sys.executable, str(SCRIPT), *folders, *flags],
            env={**os.environ, "AS_IT_IS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=told,
        )


def log(place: Path) -> Path:
    """Where the errors of the runs go; a pipe that nobody reads would fill."""
    return place.with_suffix(".log")


def finish(place: Path, *processes: subprocess.Popen) -> None:
    """Waits for runs that have to succeed."""
    for each in processes:
        assert each.wait() == 0, log(place).read_text()[-3000:]


def written(place: Path) -> list[float]:
    """When the stages of a run ended, in seconds since the epoch."""
    found = [next(place.glob(f"cache/*/{each}")) for each in STAGES.values()]
    return [path.stat().st_mtime for path in found]


def size(place: Path) -> float:
    """What a folder takes on the disk, in MB."""
    files = (path for path in place.rglob("*") if path.is_file())
    return sum(path.stat().st_blocks for path in files) * 512 / 1e6


def is_unpacked(place: Path, number: int) -> bool:
    """Whether an image is out of its tar."""
    return any(place.glob(f"cache/*/unpacked/{key(number)}.jpg"))


def is_encoded(place: Path, row: int) -> bool:
    """Whether the bytes of a row are written, if not yet marked."""
    paths = place.glob("cache/*/features/*/digests.bin")
    found = [np.fromfile(path, np.uint8, 16, offset=16 * row) for path in paths]
    return any(each.any() for each in found)


def measure_one(tars: Path, place: Path, images: int) -> list[float]:
    """Prints the figures of one process; gives seconds to each stage's end."""
    begun, before = time.time(), resource.getrusage(resource.RUSAGE_CHILDREN)
    finish(place, start(tars, place))
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime
    # Of the largest child so far: this one, where they come in order of size.
    peak = used.ru_maxrss / 1024
    ends = [end - begun for end in written(place)]
    for name, first, last in zip(STAGES, [0, *ends], ends, strict=False):
        rate = images / (last - first)
        print(f"  {name:<18}{last - first:>7.1f} s{rate:>9,.0f} images/s")
    parts = [*place.glob("cache/*/[!.]*")]
    disk = ", ".join(f"{size(each):,.1f} MB in {each.name}" for each in parts)
    print(
        f"  {cpu:,.0f} s of CPU; peak memory {peak:,.0f} MB; {disk}", flush=True
    )
    return ends


def kill_when(
    process: subprocess.Popen, there: Callable[..., bool], *what: object
) -> None:
    """Kills a run as soon as something is there, before it ends."""
    while not there(*what):
        assert process.poll() is None, "it ended before"
        time.sleep(0.01)
    process.kill()
    process.wait()


def contents(place: Path) -> dict[str, bytes]:
    """The bytes of everything that a run leaves, but for OF_A_PLACE."""
    found = {}
    for path in place.glob("cache/*/*/**/*"):
        name = path.relative_to(place).as_posix()
        known = path.name not in OF_A_PLACE and "/.notes/" not in name
        if path.is_file() and path.suffix != ".lock" and known:
            found[name] = path.read_bytes()
    (table,) = place.glob("cache/*/features/*/images.csv")
    found["images"] = pd.read_csv(table)[["image", "size"]].to_json().encode()
    return found


def measure(folder: Path, images: int) -> None:
    """Prints the figures of a number of images."""
    tars, places = folder / "growth", [folder / name for name in "abc"]
    make_shards(tars, images)
    print(f"{images:,} images, {size(tars):,.0f} MB of tars", flush=True)
    ends = measure_one(tars, places[0], images)
    wanted = contents(places[0])
    begun = time.time()
    workers = [start(tars, places[1], f"--worker={n}/2") for n in (0, 1)]
    finish(places[1], *workers)
    assert contents(places[1]) == wanted
    print(f"  two workers: {time.time() - begun:.1f} s, one: {ends[-1]:.1f} s")
    for there in (is_unpacked, is_encoded):
        kill_when(start(tars, places[2]), there, places[2], images // 2)
    finish(places[2], start(tars, places[2]))
    assert contents(places[2]) == wanted
    print("  workers and killed runs: equal bit for bit", flush=True)
    for each in (tars, *places):
        shutil.rmtree(each)


def main() -> None:
    """Measures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, nargs="+", default=[2000, 10000])
    parser.add_argument("--folder", type=Path, help="instead of the system's")
    arguments = parser.parse_args()
    for images in sorted(arguments.images):
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            measure(Path(folder), images)


if __name__ == "__main__":
    main()
