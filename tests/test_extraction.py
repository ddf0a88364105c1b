"""Filling the cache: full disks, equal photographs, images left out."""

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from captioning.data import prepared
from captioning.features import cache as features
from captioning.features import extraction
from tests.processes import bad, good, make_photos

DESCRIPTION = features.describe("tiny", "pixels", "none", 32)
SHAPE = (32 * 32, 3)


def encode(images: np.ndarray) -> np.ndarray:
    """The pixels themselves: (batch, 32, 32, 3) -> (batch, 1024, 3)."""
    return images.reshape(len(images), -1, 3).astype(np.float16)


def fill(place: Path, folder: Path, encoder=encode) -> extraction.Notes:
    images = folder / "data" / "photos" / "images"
    names = sorted(path.name for path in images.iterdir())
    cache = features.create(place, DESCRIPTION, {}, images, names, SHAPE)
    return extraction.fill(cache, images, names, 32, lambda: encoder)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(extraction, "BATCH", 8)
    monkeypatch.setattr(extraction, "COMMIT_SECONDS", 0.0)


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 2 MB, mounted."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(place)]
    if not shutil.which("mount") or subprocess.run(command).returncode:
        pytest.skip("a small disk can be mounted by root on Linux only")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.fixture
def whole(tmp_path) -> Path:
    """A cache of photographs on a disk with room."""
    make_photos(tmp_path)
    fill(tmp_path / "whole", tmp_path)
    return tmp_path / "whole"


def assert_same(place: Path, whole: Path) -> None:
    for name in ("features.npy", "finished.bin", "digests.bin"):
        assert (place / name).read_bytes() == (whole / name).read_bytes()


def fill_up(disk: Path, leave: int = 0) -> Path:
    """Takes what is left of a disk, but for `leave` bytes."""
    path = disk / "ballast"
    free = shutil.disk_usage(disk).free - leave
    path.write_bytes(bytes(max(free, 0) // 4096 * 4096))
    return path


# --- full disks -----------------------------------------------------------


def test_a_disk_that_fills_up_later_does_not_stop_what_was_reserved(
    small_disk, tmp_path, whole
):
    def encode_on_a_full_disk(images: np.ndarray) -> np.ndarray:
        if not (small_disk / "ballast").exists():
            fill_up(small_disk)
        return encode(images)

    fill(small_disk / "cache", tmp_path, encode_on_a_full_disk)
    assert shutil.disk_usage(small_disk).free == 0
    assert_same(small_disk / "cache", whole)


def test_where_nothing_is_reserved_a_full_disk_loses_nothing(
    small_disk, tmp_path, whole, monkeypatch
):
    monkeypatch.delattr(os, "posix_fallocate")
    batches = []

    def encode_until_full(images: np.ndarray) -> np.ndarray:
        batches.append(len(images))
        if len(batches) == 5:
            fill_up(small_disk, leave=8192)
        return encode(images)

    place = small_disk / "cache"
    with pytest.raises(OSError, match="No space left") as raised:
        fill(place, tmp_path, encode_until_full)
    assert raised.value.filename == str(place / "features.npy")
    done = np.count_nonzero(np.fromfile(place / "finished.bin", np.uint8))
    assert done == 32, "the four batches before count"
    (small_disk / "ballast").unlink()
    batches.clear()
    fill(place, tmp_path, lambda i: batches.append(len(i)) or encode(i))
    assert len(batches) == 11, "of 15 batches, four were done"
    assert_same(place, whole)


def test_a_full_disk_when_the_tables_are_written_is_one_line(
    small_disk, tmp_path, monkeypatch
):
    make_photos(tmp_path)
    flags = ("--data-dir", str(small_disk), "--dataset-dir", "data/photos")
    save = prepared.save

    def save_on_a_full_disk(*arguments):
        fill_up(small_disk)
        return save(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(prepared, "save", save_on_a_full_disk)
        line = bad(tmp_path, *flags)
    assert "No space left on device: free some space" in line
    assert not list(small_disk.rglob("*captions.csv"))
    (small_disk / "ballast").unlink()
    assert "Encoding" not in good(tmp_path, *flags)
    (written,) = small_disk.rglob("captions.csv")
    good(tmp_path)
    (whole,) = tmp_path.glob("data/cache/*/*/captions.csv")
    assert written.read_bytes() == whole.read_bytes()


# --- equal photographs ----------------------------------------------------


def test_photographs_in_two_splits_are_told_by_a_resumed_run_alike(tmp_path):
    make_photos(tmp_path)
    told = "1 pairs of identical images are in different splits"
    assert told in good(tmp_path)
    (path,) = tmp_path.glob("data/cache/*/*/duplicates.csv")
    wanted = "image,split,other_image,other_split\n003.png,train,100.png,val\n"
    assert path.read_text() == wanted
    path.unlink()
    # The digests come from the cache: files that look the same stay closed.
    for name in ("003.png", "100.png"):
        image = tmp_path / "data" / "photos" / "images" / name
        status = image.stat()
        image.write_bytes(bytes(status.st_size))
        os.utime(image, ns=(status.st_atime_ns, status.st_mtime_ns))
    good(tmp_path)
    assert path.read_text() == wanted


# --- what is left out -----------------------------------------------------


def test_images_in_no_split_do_not_count_as_broken(tmp_path):
    make_photos(tmp_path)
    folder = tmp_path / "data" / "photos"
    table = pd.read_csv(folder / "captions.csv")
    # A dataset whose list of the test images is missing.
    for split, file in (("train", "train"), ("val", "dev")):
        names = table["image"][table["split"] == split][:20]
        path = folder / f"Flickr_8k.{file}Images.txt"
        path.write_text("\n".join(names) + "\n")
    table.drop(columns="split").to_csv(folder / "captions.csv", index=False)
    assert "40 images" in good(tmp_path)
    (path,) = tmp_path.glob("data/cache/*/*/skipped.csv")
    assert path.read_text().count("in no split list") == 80


def test_broken_images_still_stop_the_run(tmp_path):
    make_photos(tmp_path)
    for number in range(10):
        name = f"{number:03d}.png"
        (tmp_path / "data" / "photos" / "images" / name).write_bytes(b"no")
    assert "11 of 120 images are unusable" in bad(tmp_path)
    good(tmp_path, "--max-skipped-share", "0.1")


def test_of_a_few_images_only_these_count_as_broken(tmp_path):
    make_photos(tmp_path)
    folder = tmp_path / "data" / "photos"
    with open(folder / "captions.csv", "a", encoding="utf-8") as handle:
        handle.write("gone.png,a picture,train\n")
    (folder / "images" / "001.png").write_bytes(b"no")
    flags = ("--limit-images", "4", "--max-skipped-share")
    assert "1 of 8 images are unusable" in bad(tmp_path, *flags, "0.12")
    good(tmp_path, *flags, "0.13")
    (skipped,) = tmp_path.glob("data/cache/*/*/skipped.csv")
    wanted = "image,reason\ngone.png,missing\n001.png,not an image\n"
    assert skipped.read_text() == wanted
