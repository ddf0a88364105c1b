"""The feature cache: filled, killed, resumed, lengthened, refused."""

import errno
import io
import json
import mmap
import os
import shutil
import types
import zlib
from pathlib import Path
from unittest.mock import Mock

import cv2
import numpy as np
import pytest

from captioning.data.images import read_image
from captioning.features import cache as features
from captioning.features import extraction
from captioning.features.joined import channel_statistics
from tests.helpers import files_in, refusal

SIZE = 8
SHAPE = (4, 3)  # (regions, channels)
DESCRIPTION = features.describe("resnet50", "conv5", "random-0", SIZE)
GREY, BROKEN, MISSING = "c grey.png", "f broken.png", "h missing.png"
NAMES = ["a.png", "b.png", GREY, "d.png", "e.png", BROKEN, "g.png", MISSING]
NAMES += ["i.png", "j.png"]
GOOD = [name for name in NAMES if name not in (BROKEN, MISSING)]


class Encoder:
    """Averages the quarters of each image, and counts its work."""

    def __init__(self) -> None:
        self.calls = self.images = 0

    def __call__(self, batch: np.ndarray) -> np.ndarray:
        assert batch.shape == (extraction.BATCH, SIZE, SIZE, 3)
        assert batch.dtype == np.uint8
        self.calls += 1
        # No image is all black; what fills up a batch is.
        self.images += int(batch.any(axis=(1, 2, 3)).sum())
        quarters = batch.reshape(-1, 2, 4, 2, 4, 3).mean(axis=(2, 4))
        return quarters.reshape(-1, *SHAPE).astype(np.float16)


def draw(folder: Path, names: list[str]) -> None:
    """Writes an image for each name that promises one."""
    for name in names:
        generator = np.random.default_rng(zlib.crc32(name.encode()))
        shape = (SIZE, SIZE) if name == GREY else (SIZE, SIZE, 3)
        pixels = generator.integers(1, 256, shape, np.uint8)
        if name != MISSING:
            cv2.imwrite(str(folder / name), pixels)
        if name == BROKEN:
            (folder / name).write_bytes(b"no image")


def create(
    folder: Path, names=NAMES, shape=SHAPE, images=Path("images")
) -> features.Cache:
    versions = {"keras": "3"}
    return features.create(folder, DESCRIPTION, versions, images, names, shape)


def load(folder: Path, description=DESCRIPTION) -> features.Cache:
    return features.load(folder, description)


def fill(folder: Path, images: Path, encoder, names=NAMES) -> extraction.Notes:
    """What preprocess.py does with the images of a dataset."""
    cache = create(folder, names, images=images)
    return extraction.fill(cache, images, names, SIZE, lambda: encoder)


def expected(images: Path, name: str) -> np.ndarray:
    batch = np.zeros((extraction.BATCH, SIZE, SIZE, 3), np.uint8)
    batch[0] = read_image(images / name, SIZE)[0]
    return Encoder()(batch)[0]  # (regions, channels)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(extraction, "BATCH", 2)


@pytest.fixture
def images(tmp_path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    draw(folder, NAMES)
    return folder


@pytest.fixture
def undisturbed(tmp_path, images) -> Path:
    """A cache that was filled in one run."""
    fill(tmp_path / "undisturbed", images, Encoder())
    return tmp_path / "undisturbed"


# --- filling --------------------------------------------------------------


def test_what_was_skipped_and_repaired_is_told_in_every_run(tmp_path, images):
    first = fill(tmp_path / "cache", images, Encoder())
    assert first.skipped == [(BROKEN, "not an image"), (MISSING, "missing")]
    assert first.repaired == [(GREY, "grey")]
    assert fill(tmp_path / "cache", images, Encoder()) == first
    backwards = fill(tmp_path / "other", images, Encoder(), NAMES[::-1])
    assert backwards == first


def test_images_are_read_in_order_and_only_some_batches_ahead(monkeypatch):
    asked = []

    def read(folder, name, size):
        asked.append(name)
        return extraction.Read(name, None, "")

    monkeypatch.setattr(extraction, "read", read)
    names = [str(number) for number in range(51)]
    batches = extraction.read_ahead(Path(), extraction.in_batches(names), SIZE)
    found = [each.name for each in next(batches)]
    assert len(asked) <= extraction.AHEAD * extraction.BATCH
    found += [each.name for batch in batches for each in batch]
    assert found == names and sorted(asked) == sorted(names)


# --- interrupted ----------------------------------------------------------


@pytest.mark.parametrize("begun", [[], NAMES[:4]], ids=["new", "longer"])
def test_a_cache_that_was_half_made_is_made_the_rest_of_the_way(
    tmp_path, images, monkeypatch, begun
):
    def interrupted_create(folder: Path, last: int) -> bool:
        """Stops where something is about to be safe on disk."""
        stop = [None] * last + [KeyboardInterrupt] * 99
        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", Mock(side_effect=stop))
            try:
                create(folder)
            except KeyboardInterrupt:
                return True
        return False

    results, last = [], 0
    while True:
        folder = tmp_path / f"cache {last}"
        if begun:
            fill(folder, images, Encoder(), begun)
        stopped = interrupted_create(folder, last)
        if begun:  # and what was there can be read all the while
            cache = load(folder)
            for name in set(begun) & set(GOOD):
                found = cache.features[cache.row[name]]
                np.testing.assert_array_equal(found, expected(images, name))
        fill(folder, images, Encoder())
        results.append(files_in(folder))
        last += 1
        if not stopped:
            break
    assert len(results) > 2
    assert all(each == results[-1] for each in results)


def test_a_full_disk_ends_the_run_and_leaves_what_is_done(
    tmp_path, images, undisturbed
):
    encoder, full = Encoder(), OSError(errno.ENOSPC, "disk full")

    def fail(batch: np.ndarray) -> np.ndarray:
        if encoder.calls == 2:
            raise full
        return encoder(batch)

    with pytest.raises(OSError, match="disk full"):
        fill(tmp_path / "cache", images, fail)
    encoder = Encoder()
    fill(tmp_path / "cache", images, encoder)
    assert encoder.images == len(GOOD) - 4
    assert files_in(tmp_path / "cache") == files_in(undisturbed)


class Disk:
    """What a disk holds for certain after a power cut: what was synced.

    At each fsync it checks that nothing in finished.bin, which may have come
    to the disk by itself, counts on bytes that would be lost.
    """

    def __init__(self, folder: Path, monkeypatch) -> None:
        self.folder, self.safe, self.renamed = folder, {}, {}
        self.fsync, self.replace = os.fsync, os.replace
        monkeypatch.setattr(os, "fsync", self.watch_fsync)
        monkeypatch.setattr(os, "replace", self.watch_replace)

    def watch_fsync(self, handle: int) -> None:
        self.fsync(handle)
        status = os.fstat(handle)
        for path in self.folder.iterdir():
            if os.path.samestat(path.stat(), status):
                self.safe[path.name] = path.read_bytes()
        if os.path.samestat(self.folder.stat(), status):
            # The new names, and with them what was synced under the old ones.
            for name, old in self.renamed.items():
                self.safe[name] = self.safe.get(old, b"")
        self.check()

    def watch_replace(self, old, new) -> None:
        self.replace(old, new)
        if Path(new).parent == self.folder:
            self.renamed[Path(new).name] = Path(old).name

    def check(self) -> None:
        path = self.folder / "finished.bin"
        marks = path.read_bytes() if path.exists() else b""
        lines = self.safe.get("images.csv", b"").splitlines()[1:]
        assert len(lines) >= len(marks), "names are lost"
        if marks:
            stored = io.BytesIO(self.safe["features.npy"])
            np.lib.format.read_magic(stored)
            shape, *_ = np.lib.format.read_array_header_1_0(stored)
            assert shape[0] >= len(marks), "the header is lost"
            assert len(stored.read()) >= 2 * np.prod(shape), "rows are lost"
            assert len(self.safe["digests.bin"]) >= 16 * len(marks)
        for row, mark in enumerate(marks):
            if mark:
                assert self.row("features.npy", row) == self.now[row]
                assert self.row("digests.bin", row) == self.digests[row]

    def row(self, name: str, row: int) -> bytes:
        data, width = self.safe[name], features.DIGEST_BYTES
        start = 0
        if name == "features.npy":
            width = 2 * SHAPE[0] * SHAPE[1]
            start = 10 + int.from_bytes(data[8:10], "little")
        return data[start + row * width :][:width]


@pytest.mark.skipif(os.name == "nt", reason="Windows syncs no folders")
@pytest.mark.parametrize("begun", [[], NAMES[:4]], ids=["new", "longer"])
def test_a_row_is_marked_only_after_its_bytes_are_on_disk(
    tmp_path, images, undisturbed, monkeypatch, begun
):
    wanted = files_in(undisturbed)
    folder = tmp_path / "watched"
    folder.mkdir()
    monkeypatch.setattr(extraction, "COMMIT_SECONDS", 0)
    disk = Disk(folder, monkeypatch)
    disk.safe = wanted
    disk.now = [disk.row("features.npy", row) for row in range(len(NAMES))]
    disk.digests = [disk.row("digests.bin", row) for row in range(len(NAMES))]
    disk.safe = {}
    if begun:
        fill(folder, images, Encoder(), begun)
    fill(folder, images, Encoder())
    assert disk.safe.keys() >= files_in(folder).keys()
    for name, data in files_in(folder).items():
        assert disk.safe[name] == data, f"{name} is not on disk"


def test_a_row_is_taken_back_on_disk_before_its_file_is_recorded(
    tmp_path, images, undisturbed, monkeypatch
):
    """Else old features would count as those of the new file."""
    draw(images, ["new.png"])
    os.replace(images / "new.png", images / "a.png")
    finished = undisturbed / "finished.bin"
    seen = []

    def watch(*_) -> None:
        seen.append(finished.read_bytes()[0])
        raise KeyboardInterrupt

    monkeypatch.setattr(features, "write_csv", watch)
    with pytest.raises(KeyboardInterrupt):
        fill(undisturbed, images, Encoder())
    assert seen == [0]


# --- other images, other settings -----------------------------------------


def test_odd_names_keep_their_rows(tmp_path):
    names = ["null", "NA", "007", "a,b", '"', "caf\u00e9 \u72ac", "nan"]
    create(tmp_path, names[:3])
    create(tmp_path, names)
    assert list(load(tmp_path).row) == names


def test_images_that_are_not_wanted_any_more_keep_their_rows(
    images, undisturbed
):
    before = files_in(undisturbed)
    fill(undisturbed, images, Encoder(), NAMES[:2])
    assert files_in(undisturbed) == before


def test_whatever_features_depend_on_changes_the_folder(monkeypatch):
    changes = {
        "encoder": "vgg16",
        "layer": "conv4",
        "weights": "random-1",
        "image_size": 16,
        "preprocessing": "other",
    }
    assert changes.keys() == DESCRIPTION.keys()
    others = [{**DESCRIPTION, name: x} for name, x in changes.items()]
    keys = {features.key(each) for each in [*others, DESCRIPTION]}
    assert len(keys) == len(changes) + 1
    backwards = dict(reversed(DESCRIPTION.items()))
    assert features.key(backwards) == features.key(DESCRIPTION)
    assert features.key(DESCRIPTION).startswith("resnet50-8-")
    monkeypatch.setattr(features, "PREPROCESSING", "other")
    assert features.describe("resnet50", "conv5", "random-0", SIZE) in others


# --- disk -----------------------------------------------------------------


def leave_free(monkeypatch, free: int) -> None:
    usage = types.SimpleNamespace(free=free)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(
    tmp_path, monkeypatch
):
    size = len(NAMES) * SHAPE[0] * SHAPE[1] * 2
    leave_free(monkeypatch, size - 1)
    assert "free some space" in refusal(create, tmp_path / "new" / "cache")
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert all(path.suffix == ".lock" for path in written)
    leave_free(monkeypatch, size)
    create(tmp_path / "new" / "cache")


def test_a_disk_that_is_too_small_for_new_images_keeps_the_old(
    images, undisturbed, monkeypatch
):
    before = files_in(undisturbed)
    leave_free(monkeypatch, 0)
    create(undisturbed, images=images)  # what is there needs no more
    more = [*NAMES, *map(str, range(1000))]
    told = refusal(create, undisturbed, more, images=images)
    assert "free some space" in told
    assert files_in(undisturbed) == before


@pytest.mark.skipif(
    not hasattr(os, "posix_fallocate"), reason="nothing to reserve with"
)
def test_room_that_could_not_be_had_is_reserved_in_the_next_run(
    undisturbed, monkeypatch
):
    def refuse(handle: int, start: int, length: int) -> None:
        os.truncate(handle, start + length)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    names = [*NAMES, *map(str, range(2000))]
    with monkeypatch.context() as patched:
        patched.setattr(os, "posix_fallocate", refuse)
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
            create(undisturbed, names)
    create(undisturbed, names)
    # A hole in a file would be a full disk in the middle of the work.
    for name in ("features.npy", "digests.bin", "finished.bin"):
        status = (undisturbed / name).stat()
        assert status.st_blocks * 512 >= status.st_size


def test_where_the_disk_cannot_reserve_glibc_can(undisturbed, monkeypatch):
    """It writes zeros instead, but not to a file opened for appending."""
    fcntl = pytest.importorskip("fcntl")
    reserve = os.posix_fallocate

    def write_zeros(handle: int, *where: int) -> None:
        if fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_APPEND:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        reserve(handle, *where)

    monkeypatch.setattr(os, "posix_fallocate", write_zeros)
    create(undisturbed, [*NAMES, "another"])


# --- caches that do not fit -----------------------------------------------


def edit_meta(folder: Path, **changes) -> None:
    path = folder / "meta.json"
    meta = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**meta, **changes}), encoding="utf-8")


def resize(path: Path, length: int) -> None:
    """Cuts a file, or fills it up with zeros; negative: that much off."""
    data = path.read_bytes()
    length = length if length >= 0 else len(data) + length
    path.write_bytes(data[:length].ljust(length, b"\0"))


def overwrite(path: Path, place: int, data: bytes) -> None:
    whole = bytearray(path.read_bytes())
    whole[place : place + len(data)] = data
    path.write_bytes(whole)


def list_images(folder: Path, *lines: str) -> None:
    text = "\n".join(["image,size,modified", *lines]) + "\n"
    (folder / "images.csv").write_text(text, encoding="utf-8")


def save_array(folder: Path, rows: int, kind: str) -> None:
    np.save(folder / "features.npy", np.ones((rows, *SHAPE), kind))


# What happened to a cache -> how, and what the user is told.
ROWS, ARRAY, DIGESTS = len(NAMES), "features.npy", "digests.bin"
MISFITS = {
    "other weights": (
        lambda f: edit_meta(f, weights="imagenet"),
        "weights is 'imagenet', not 'random-0'",
    ),
    "meta cut": (lambda f: resize(f / "meta.json", 9), "meta.json"),
    "meta a list": (lambda f: overwrite(f / "meta.json", 0, b"["), "meta.json"),
    "array cut": (lambda f: resize(f / ARRAY, 200), ARRAY),
    "array empty": (lambda f: resize(f / ARRAY, 0), ARRAY),
    "array gone": (lambda f: (f / ARRAY).unlink(), ARRAY),
    "array short": (lambda f: save_array(f, 3, "f2"), ARRAY),
    "array of float32": (lambda f: save_array(f, ROWS, "f4"), ARRAY),
    "array long": (lambda f: resize(f / ARRAY, 999), "bytes instead of"),
    "array an archive": (lambda f: overwrite(f / ARRAY, 0, b"PK\3\4"), ARRAY),
    "odd header": (lambda f: overwrite(f / ARRAY, 10, b"{{('???"), ARRAY),
    "digests cut": (lambda f: resize(f / DIGESTS, -5), "bytes instead of"),
    "digests lost": (lambda f: resize(f / DIGESTS, -16), "bytes instead of"),
    "digests long": (
        lambda f: resize(f / DIGESTS, 16 * ROWS + 3),
        "bytes instead of",
    ),
    "table short": (lambda f: list_images(f, "a.png,1,1"), "names 1 images"),
    "table torn": (lambda f: list_images(f, "a.png", "b,c"), "images.csv"),
    "table gone": (lambda f: (f / "images.csv").unlink(), "images.csv"),
}


@pytest.mark.parametrize(("damage", "told"), MISFITS.values(), ids=MISFITS)
@pytest.mark.parametrize("opens", [load, create])
def test_a_cache_that_does_not_fit_is_refused_in_one_line(
    undisturbed, opens, damage, told
):
    damage(undisturbed)
    before = files_in(undisturbed)
    message = refusal(opens, undisturbed)
    assert told in message and str(undisturbed) in message
    assert "preprocess.py" in message
    assert files_in(undisturbed) == before


def test_rows_that_are_being_added_are_left_out(undisturbed):
    list_images(undisturbed, *[f"{name},1,1" for name in [*NAMES, "new.png"]])
    assert list(load(undisturbed).row) == NAMES


@pytest.mark.parametrize("length", [0, 3])
def test_rows_without_a_mark_do_not_count(images, undisturbed, length):
    before = files_in(undisturbed)
    resize(undisturbed / "finished.bin", length)
    if length:
        assert len(load(undisturbed).row) == length
    else:
        assert "no finished features" in refusal(load, undisturbed)
    encoder = Encoder()
    fill(undisturbed, images, encoder)
    assert encoder.images == len(GOOD) - length
    assert files_in(undisturbed) == before


def test_features_of_another_shape_are_refused(undisturbed):
    before = files_in(undisturbed)
    assert "shape" in refusal(create, undisturbed, shape=(2, 3))
    assert files_in(undisturbed) == before


def test_the_flags_of_features_that_exist_are_named(undisturbed):
    none = undisturbed.parent / "none"
    wanted = features.describe("vgg16", "conv5", "half-12ab", SIZE, 2)
    told = "with --encoder resnet50 --magnification 1 --encoder-weights random"
    assert refusal(load, none, wanted).endswith(told)
    edit_meta(undisturbed, weights="half-34cd")
    assert refusal(load, none).endswith("FILE (the one of half-34cd)")
    edit_meta(undisturbed, encoder="scenes")
    assert refusal(load, none).endswith("--encoder-weights scenes")
    told = "run preprocess.py first, with the same flags"
    for damaged in ("", '{"encoder": "resnet50"}', '{"encoder": "other"}'):
        (undisturbed / "meta.json").write_text(damaged)
        assert refusal(load, none).endswith(told)


def test_other_versions_are_recorded_and_not_compared(undisturbed):
    edit_meta(undisturbed, versions={"keras": "2"})
    load(undisturbed)


# --- statistics -----------------------------------------------------------


def test_the_statistics_are_those_of_numpy():
    random = np.random.default_rng(0)
    scale = np.array([1, 10, 0.1])
    array = random.normal(5 * scale, scale, (150, *SHAPE)).astype(np.float16)
    rows = random.permutation(150)[:131]
    mean, deviation = channel_statistics(array[rows])
    chosen = array[rows].astype(np.float64).reshape(-1, SHAPE[1])
    assert mean.dtype == deviation.dtype == np.float32
    np.testing.assert_allclose(mean, chosen.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(deviation, chosen.std(axis=0), rtol=1e-5)
    # They do not overflow float16.
    array = np.full((200, *SHAPE), 60_000, np.float16)
    mean, _ = channel_statistics(array)
    np.testing.assert_allclose(mean, array[0, 0], rtol=1e-6)


def test_some_rows_stand_for_all_when_there_are_many():
    squares = np.square(np.arange(11))[:, None, None]
    array = squares * np.ones((11, *SHAPE), np.float16)
    mean, _ = channel_statistics(array, most=3)
    np.testing.assert_allclose(mean, (0 + 25 + 100) / 3, rtol=1e-6)


def test_a_channel_that_never_fires_is_not_blown_up():
    alternating = np.tile([[0, 2, 0], [0, 4, 8]], (10, 2, 1))
    _, deviation = channel_statistics(alternating)
    np.testing.assert_allclose(deviation, [0.01 * (0 + 1 + 4) / 3, 1, 4])
    _, deviation = channel_statistics(np.zeros((10, *SHAPE)))
    np.testing.assert_allclose(deviation, 1e-6)


# --- reading --------------------------------------------------------------


@pytest.mark.skipif(
    not hasattr(mmap, "MADV_WILLNEED"), reason="the system takes no advice"
)
def test_the_disk_is_asked_for_all_rows_before_one_is_read(
    tmp_path, monkeypatch
):
    asked = []

    class Watched(mmap.mmap):
        def madvise(self, option, start, length):
            assert option == mmap.MADV_WILLNEED
            asked.append((start, start + length))
            super().madvise(option, start, length)

    values = np.arange(20 * 49 * 64).reshape(20, 49, 64).astype(np.float16)
    np.save(tmp_path / "features.npy", values)
    monkeypatch.setattr(mmap, "mmap", Watched)
    mapped = np.load(tmp_path / "features.npy", mmap_mode="r")
    rows = np.array([17, 3, 3])
    for each in (mapped, values):  # a plain array has no disk to ask
        found = features.read_rows(each, rows)
        np.testing.assert_array_equal(found, values[rows])
    width = values[0].nbytes
    for row, (start, end) in zip(rows, asked, strict=True):
        first = mapped.offset + row * width
        assert first - mmap.PAGESIZE < start <= first
        assert end == first + width
