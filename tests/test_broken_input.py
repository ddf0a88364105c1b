"""One dataset with everything that can be wrong, preprocessed in one run."""

import io
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from tests.processes import end, start
from tests.test_images import png


def encode(image: Image.Image, format: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def photograph(seed: int, mode: str = "RGB") -> Image.Image:
    generator = np.random.default_rng(seed)
    pixels = generator.integers(0, 256, (48, 64, 3), np.uint8)
    return Image.fromarray(pixels).convert(mode)


TURNED = Image.Exif()
TURNED[0x0112] = 6
FRAMES = [photograph(n) for n in (20, 21)]
DEEP = Image.fromarray(np.arange(0, 65536, 32, np.uint16).reshape(32, 64))
JPEG = encode(photograph(1), "JPEG")
PROGRESSIVE = encode(photograph(1), "JPEG", progressive=True)
# Name -> the file, and what repaired.csv says of it.
USED = {
    "sound.jpg": (encode(photograph(2), "JPEG"), ""),
    "alpha.png": (
        encode(photograph(3, "RGBA"), "PNG"),
        "alpha composited on white",
    ),
    "16 bit.png": (encode(DEEP, "PNG"), "16 bits reduced to 8; grey"),
    "grey.jpg": (encode(photograph(5, "L"), "JPEG"), "grey"),
    "cmyk.jpg": (encode(photograph(6, "CMYK"), "JPEG"), "CMYK"),
    "turned.jpg": (
        encode(photograph(7), "JPEG", exif=TURNED),
        "turned upright",
    ),
    "animated.gif": (
        encode(FRAMES[0], "GIF", save_all=True, append_images=FRAMES[1:]),
        "first frame of an animation",
    ),
    "photo.webp": (encode(photograph(9), "WEBP"), ""),
    "one pixel.png": (encode(Image.new("RGB", (1, 1), "red"), "PNG"), ""),
    "größe 犬, a b.JPG": (encode(photograph(11), "JPEG"), ""),
}
# Name -> what lies there, and what skipped.csv says of it.
SKIPPED = {
    "half.jpg": (JPEG[: len(JPEG) // 2], "truncated"),
    "most.jpg": (JPEG[:-2], "truncated"),
    "half progressive.jpg": (PROGRESSIVE[: len(PROGRESSIVE) // 2], "truncated"),
    "empty.jpg": (b"", "empty file"),
    "text.jpg": (b"a dog runs", "not an image"),
    "huge.png": (png(20_000, 20_000), "above 100,000,000 pixels"),
    "folder.jpg": (Path.mkdir, "is a folder"),
    "dangling.jpg": (lambda path: path.symlink_to("gone"), "dangling link"),
    "missing.jpg": (lambda path: None, "missing"),
    "../outside.jpg": (JPEG, "'..' in the image name"),
    "{here}/outside.jpg": (
        lambda path: None,
        "absolute path instead of an image name",
    ),
}
# Of sound.jpg: as written, as used, what is told.
CAPTIONS = [
    (b"a dog runs", "a dog runs", ""),
    (b"salt &amp; pepper", "salt & pepper", "HTML in a caption"),
    (b"a\x07 bell", "a  bell", "control characters in a caption"),
    ("犬が走る".encode(), "犬が走る", ""),
    ("ein größerer Hund".encode("latin-1"), "ein größerer Hund", ""),
    (b"word " * 500, ("word " * 500).strip(), "caption of 500 words is cut"),
    (b"", None, "caption is empty"),
    (b"NaN", None, "caption is empty"),
    (b'"?!, ..."', None, "caption without a word"),
]


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> tuple[Path, str]:
    """The cache folder, and what the run printed."""
    here = tmp_path_factory.mktemp("broken")
    folder = here / "data" / "photos" / "Images"
    folder.mkdir(parents=True)
    rows = [b"sound.jpg," + written for written, _, _ in CAPTIONS]
    for name, (content, _) in (USED | SKIPPED).items():
        name = name.format(here=here)
        path = folder / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            content(path)
        rows.append(f'"{name}",a picture'.encode())
    # A sound one for the val split; lists say where the others go.
    names = [name.format(here=here) for name in USED | SKIPPED]
    (folder / "val.jpg").write_bytes(encode(photograph(12), "JPEG"))
    rows.append(b"val.jpg,a picture")
    lists = folder.parent / "karpathy_splits"
    lists.mkdir()
    (lists / "train.txt").write_text("\n".join(names), encoding="utf-8")
    (lists / "val.txt").write_text("val.jpg\n")
    (folder.parent / "captions.csv").write_bytes(
        b"\xef\xbb\xbf" + b"\r\n".join([b"image,caption", *rows])
    )
    code, out, err = end(start(here, "--max-skipped-share", "0.6"))
    assert code == 0, err
    (cache,) = here.glob("data/cache/photos/text-*")
    return cache, out


def told(cache: Path, name: str) -> set[tuple[str, str]]:
    table = pd.read_csv(cache / name, dtype=str, keep_default_na=False)
    return {*table.itertuples(index=False, name=None)}


def test_the_summary_counts_what_was_skipped_and_what_was_repaired(done):
    cache, out = done
    skipped, repaired = (
        len((cache / name).read_text("utf-8").splitlines()) - 1
        for name in ("skipped.csv", "repaired.csv")
    )
    assert f"{skipped} entries skipped, {repaired} repaired" in out
    assert re.search(rf"train +{len(USED)} images", out)


def test_everything_that_can_be_used_is_used_and_told_of_if_changed(done):
    cache, _ = done
    table = pd.read_csv(cache / "captions.csv", keep_default_na=False)
    assert {*table["image"]} == {*USED, "val.jpg"}
    captions = table["caption"][table["image"] == "sound.jpg"].tolist()
    kept = [used for _, used, _ in CAPTIONS if used is not None]
    assert captions == [*kept, "a picture"]
    wanted = {(name, reason) for name, (_, reason) in USED.items() if reason}
    wanted |= {
        ("sound.jpg", reason) for _, used, reason in CAPTIONS if used and reason
    }
    wanted |= {("captions.csv", "not UTF-8: read as Windows-1252")}
    assert told(cache, "repaired.csv") == wanted


def test_everything_that_cannot_be_used_is_skipped_with_its_reason(done):
    cache, _ = done
    here = cache.parents[3]
    wanted = {
        (name.format(here=here), reason)
        for name, (_, reason) in SKIPPED.items()
    }
    wanted |= {
        ("sound.jpg", reason) for _, used, reason in CAPTIONS if used is None
    }
    assert told(cache, "skipped.csv") == wanted


def test_what_was_skipped_has_no_finished_row(done):
    cache, _ = done
    (finished,) = cache.parent.glob("features/*/finished.bin")
    names = pd.read_csv(finished.parent / "images.csv")["image"]
    marks = np.fromfile(finished, np.uint8)
    assert {*names[marks > 0]} == {*USED, "val.jpg"}
