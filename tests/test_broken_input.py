"""One dataset with everything that can be wrong, preprocessed in one run.

What becomes of each kind of image and caption is tested with their readers.
"""

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from tests.processes import good
from tests.test_images import encode, png, turned


def photograph(seed: int, mode: str = "RGB") -> Image.Image:
    generator = np.random.default_rng(seed)
    pixels = generator.integers(0, 256, (48, 64, 3), np.uint8)
    return Image.fromarray(pixels).convert(mode)


# Name -> the file, and what repaired.csv says of it.
USED = {
    "val.jpg": (encode(photograph(1), "JPEG"), ""),
    "alpha.png": (
        encode(photograph(2, "RGBA"), "PNG"),
        "alpha composited on white",
    ),
    "grey.jpg": (encode(photograph(3, "L"), "JPEG"), "grey"),
    "turned.jpg": (
        encode(photograph(4), "JPEG", exif=turned(6)),
        "turned upright",
    ),
    "größe 犬, a b.JPG": (encode(photograph(5), "JPEG"), ""),
}
# Name -> what lies there, and what skipped.csv says of it.
SKIPPED = {
    "half.jpg": (encode(photograph(6), "JPEG")[:999], "truncated"),
    "text.jpg": (b"a dog runs", "not an image"),
    "huge.png": (png(20_000, 20_000), "above 100,000,000 pixels"),
    "missing.jpg": (None, "missing"),
    "../outside.jpg": (None, "'..' in the image name"),
}
# Of alpha.png: as written, as used, what is told.
CAPTIONS = [
    (b"salt &amp; pepper", "salt & pepper", "HTML in a caption"),
    (b"a\x07 bell", "a  bell", "control characters in a caption"),
    ("ein größerer Hund".encode("latin-1"), "ein größerer Hund", ""),
    (b"word " * 500, ("word " * 500).strip(), "caption of 500 words is cut"),
    (b"NaN", None, "caption is empty"),
    (b'"?!, ..."', None, "caption without a word"),
]


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> tuple[Path, str]:
    """The cache folder, and what the run printed."""
    here = tmp_path_factory.mktemp("broken")
    folder = here / "data" / "photos"
    (folder / "Images").mkdir(parents=True)
    rows = [
        b"image,caption",
        *(b"alpha.png," + each for each, _, _ in CAPTIONS),
    ]
    for name, (data, _) in (USED | SKIPPED).items():
        if data is not None:
            (folder / "Images" / name).write_bytes(data)
        rows.append(f'"{name}",a picture'.encode())
    (folder / "captions.csv").write_bytes(b"\r\n".join(rows))
    names = "\n".join(name for name in USED | SKIPPED if name != "val.jpg")
    (folder / "train.txt").write_text(names, encoding="utf-8")
    (folder / "val.txt").write_text("val.jpg\n")
    out = good(here, "--max-skipped-share", "0.6")
    (cache,) = here.glob("data/cache/photos/text-*")
    return cache, out


def told(cache: Path, name: str) -> set[tuple[str, str]]:
    table = pd.read_csv(cache / name, dtype=str, keep_default_na=False)
    return {*table.itertuples(index=False, name=None)}


def test_everything_that_can_be_used_is_used_and_told_of_if_changed(done):
    cache, _ = done
    table = pd.read_csv(cache / "captions.csv", keep_default_na=False)
    assert {*table["image"]} == {*USED}
    captions = table["caption"][table["image"] == "alpha.png"].tolist()
    kept = [used for _, used, _ in CAPTIONS if used is not None]
    assert captions == [*kept, "a picture"]
    wanted = {(name, reason) for name, (_, reason) in USED.items() if reason}
    wanted |= {("alpha.png", why) for _, used, why in CAPTIONS if used and why}
    wanted |= {("captions.csv", "not UTF-8: read as Windows-1252")}
    assert told(cache, "repaired.csv") == wanted


def test_everything_that_cannot_be_used_is_skipped_with_its_reason(done):
    cache, _ = done
    wanted = {(name, reason) for name, (_, reason) in SKIPPED.items()}
    wanted |= {("alpha.png", why) for _, used, why in CAPTIONS if used is None}
    assert told(cache, "skipped.csv") == wanted
    # And has no finished row.
    (finished,) = cache.parent.glob("features/*/finished.bin")
    names = pd.read_csv(finished.parent / "images.csv")["image"]
    assert {*names[np.fromfile(finished, np.uint8) > 0]} == {*USED}


def test_the_summary_counts_what_was_skipped_and_what_was_repaired(done):
    cache, out = done
    skipped, repaired = (
        len(pd.read_csv(cache / name))
        for name in ("skipped.csv", "repaired.csv")
    )
    assert f"{skipped} entries skipped, {repaired} repaired" in out
    assert re.search(rf"train +{len(USED) - 1} images", out)
