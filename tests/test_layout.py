"""The layout of data/cache: text folders that share the features."""

import functools
import json
import os
import random
import shutil
import time
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest

from captioning.data import prepared
from captioning.data.checks import warn_of_few
from captioning.data.images import read_image
from captioning.features import cache as features
from captioning.features import store
from config import Config, resolve
from tests import processes
from tests.helpers import files_in, refusal

LAX = ("--max-skipped-share", "0.5")
bad = functools.partial(processes.bad, Path())
good = functools.partial(processes.good, Path(), *LAX)
DESCRIPTION = features.describe("resnet50", "quarters", "tiny", 32)
CACHE = Path("data") / "cache" / "photos"
IMAGES = Path("data") / "photos" / "images"


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """A folder with data/photos, and what is made of it."""
    processes.make_photos(tmp_path, 40)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def config(**fields) -> Config:
    fields = {"encoder": "resnet50", "tokeniser": "words", **fields}
    return Config(dataset="photos", **fields)


def features_of(wanted: Config, split: str) -> dict[str, np.ndarray]:
    """Image -> its features, as train.py gets them."""
    images = prepared.load_split(wanted, split).images
    opened = store.open_features(wanted, [DESCRIPTION], images)
    found = opened[np.arange(len(images))]
    return dict(zip(images, found, strict=True))


def finished() -> int:
    """How many rows count."""
    (marks,) = CACHE.glob("features/*/finished.bin")
    return np.count_nonzero(np.fromfile(marks, np.uint8))


def expected(image: Path) -> np.ndarray:
    """What the tiny encoder makes of a photograph."""
    pixels = read_image(image, 32)[0].reshape(2, 16, 2, 16, 3)
    return pixels.mean((1, 3)).reshape(4, 3).astype(np.float16)


def assert_true(wanted: Config, folder: str = "data/photos") -> None:
    """Every image has the features of its file."""
    for split in ("train", "val"):
        for name, found in features_of(wanted, split).items():
            image = Path(folder) / "images" / name
            np.testing.assert_array_equal(found, expected(image), name)


# --- text folders ---------------------------------------------------------


def test_another_vocabulary_overwrites_and_encodes_nothing(home, monkeypatch):
    assert "Encoding" in good()
    before = files_in(CACHE)
    for flag in ("--min-word-count", "--max-caption-length"):
        told = good(flag, "3")
        assert "Encoding" not in told and "older" not in told
    after = files_in(CACHE)
    assert {name: after[name] for name in before} == before
    assert len(list(CACHE.glob("text-*"))) == 3
    assert all("text-" in name for name in {*after} - {*before})
    # The folder of 4 stays that of 4, whatever the default is.
    default = prepared.folder(config())
    monkeypatch.setattr(Config, "min_word_count", 7)
    field = Config.__dataclass_fields__["min_word_count"]
    monkeypatch.setattr(field, "default", 7)
    assert prepared.folder(config(min_word_count=4)) == default


def test_more_images_extend_the_features_and_leave_the_rest(home):
    good("--limit-images", "5")
    few = config(limit_images=5)
    (array,) = CACHE.glob("features/*/features.npy")
    rows = np.load(array)
    text = files_in(prepared.folder(few))
    told = good()
    assert "Encoding" in told and "changed" not in told
    np.testing.assert_array_equal(np.load(array)[: len(rows)], rows)
    assert len(np.load(array)) == 40
    assert files_in(prepared.folder(few)) == text
    for each in (few, config()):
        assert_true(each)
    assert "Encoding" not in good("--limit-images", "7")
    assert_true(config(limit_images=7))


def test_a_text_folder_lists_what_is_wrong_with_its_own_images(home):
    good("--limit-images", "5")
    (IMAGES / "037.png").write_bytes(b"no picture")
    good()
    good("--limit-images", "4")
    for wanted, skipped, repaired in (
        (config(), ["037.png"], ["007.png"]),
        (config(limit_images=4), [], []),
    ):
        folder = prepared.folder(wanted)
        assert [*pd.read_csv(folder / "skipped.csv")["image"]] == skipped
        assert [*pd.read_csv(folder / "repaired.csv")["image"]] == repaired


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_features_that_grow_can_be_killed_at_any_moment(home):
    """What was there is readable all the while, and the end is the same."""
    few = config(limit_images=5)
    good("--limit-images", "5")
    shutil.copytree("data", "undisturbed/data")
    good("--data-dir", "undisturbed/data")
    (table,) = CACHE.glob("features/*/images.csv")
    moments = random.Random(0)
    for looks_at in (lambda: table.stat().st_size, finished):
        process = processes.start(Path(), *LAX, pause=0.2)
        before = looks_at()
        while looks_at() == before:
            assert process.poll() is None
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.3))
        process.kill()
        process.communicate()
        assert_true(few)
    assert finished() < 39
    good()
    assert_true(few)
    assert_true(config())
    for name in ("features.npy", "finished.bin", "digests.bin"):
        (one,) = CACHE.glob(f"features/*/{name}")
        assert one.read_bytes() == ("undisturbed" / one).read_bytes()


# --- other files under the same name --------------------------------------


def rewrite(image: Path, seed: int = 1) -> None:
    """Puts another photograph into a file."""
    pixels = np.random.default_rng(seed).integers(0, 256, (32, 32, 3), np.uint8)
    image.write_bytes(cv2.imencode(".png", pixels)[1].tobytes())


def test_photographs_that_changed_are_encoded_again(home):
    """The lists of what was skipped and repaired change with them."""
    good()
    place = prepared.folder(config())
    assert "007.png" in (place / "repaired.csv").read_text()
    for name in ("001.png", "002.png", "007.png"):
        rewrite(IMAGES / name)
    assert "3 images changed after they had been encoded" in good()
    assert_true(config())
    assert "007.png" not in (place / "repaired.csv").read_text()
    assert "changed" not in good()
    (IMAGES / "001.png").write_bytes(b"broken")
    good()
    assert "001.png" not in features_of(config(), "train")
    assert "001.png,not an image" in (place / "skipped.csv").read_text()


def test_files_that_were_only_touched_are_not(home):
    good()
    image = IMAGES / "001.png"
    os.utime(image, ns=(0, 10**18 + 1))
    (table,) = CACHE.glob("features/*/images.csv")
    told = good()
    assert "Encoding" not in told and "changed" not in told
    size, modified = pd.read_csv(table, index_col="image").loc["001.png"]
    assert (size, modified) == (image.stat().st_size, 10**18 + 1)
    # And from then on not even opened.
    image.write_bytes(b"x" * int(size))
    os.utime(image, ns=(0, modified))
    assert "changed" not in good()


@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
def test_images_on_a_drive_that_is_not_there_keep_their_features(home):
    drive, images = home / "drive", home / IMAGES
    images.rename(drive)
    images.mkdir()
    for each in drive.iterdir():
        (images / each.name).symlink_to(each)
    good()
    drive.rename(home / "unplugged")
    told = good()
    assert "40 images cannot be found now" in told and "Encoding" not in told
    (home / "unplugged").rename(drive)
    told = good()
    assert "Encoding" not in told and finished() == 40


def exchange(home: Path) -> Path:
    """Another folder with photographs of the same names, sizes and times."""
    folder = home / "other" / "photos"
    shutil.copytree(home / "data" / "photos", folder)
    for seed, image in enumerate(sorted((folder / "images").iterdir()), 1):
        rewrite(image, seed)
        original = home / IMAGES / image.name
        size = max(image.stat().st_size, original.stat().st_size)
        for each in (image, original):
            each.write_bytes(each.read_bytes().ljust(size, b"\0"))
            os.utime(each, ns=(0, 10**18))
    return folder


def test_another_folder_for_a_dataset_is_another_set_of_photographs(home):
    folder = exchange(home)
    good()
    good("--limit-images", "5")
    told = good("--dataset-dir", "other/photos")
    assert "40 images changed" in told
    assert_true(config(), folder)
    # Captions of the old ones are not trained on with features of the new.
    few = config(limit_images=5)
    assert "were in" in refusal(features_of, few, "train")
    assert "40 images changed" in good()
    assert_true(config())
    assert_true(few)


def test_a_dataset_that_was_moved_is_not_encoded_again(home):
    good()
    (home / "data" / "photos").rename(home / "photos")
    told = good("--dataset-dir", "photos")
    assert "Encoding" not in told and "changed" not in told
    assert_true(config(), "photos")


# --- names ----------------------------------------------------------------


def test_a_dataset_is_called_as_its_folder_is(home):
    told = good("--dataset-dir", "data/photos/images/..", dataset="")
    assert "train.py --dataset-dir data/photos/images/.. " in told
    assert_true(config())
    for path in [*CACHE.glob("text-*/dataset.json"), *CACHE.rglob("meta.json")]:
        images = json.loads(path.read_text())["images_dir"]
        assert images == str(home / IMAGES)


def test_two_datasets_of_one_name_do_not_share_a_cache(home):
    exchange(home)
    good("--dataset-dir", "data/photos", dataset="")
    before = files_in(CACHE)
    line = bad("--dataset-dir", "other/photos", dataset="")
    assert "--dataset NAME" in line and "--dataset-dir" in line
    assert str(home / "data" / "photos") in line
    assert files_in(CACHE) == before
    good("--dataset-dir", "other/photos", dataset="second")
    assert files_in(CACHE) == before
    assert_true(Config(dataset="second", tokeniser="words"), "other/photos")


@pytest.mark.parametrize("dataset", ["", "photos"])
def test_training_wants_the_dataset_that_was_preprocessed(home, dataset):
    """And not another one of its name."""
    exchange(home)
    good("--dataset-dir", "data/photos", dataset="")
    named = ["dataset"] if dataset else []
    for folder in ("data/photos", "other/photos"):
        fields = Config(
            dataset_dir=folder, dataset=dataset or "sample", tokeniser="words"
        )
        wanted = resolve(fields, [*named, "dataset_dir"])
        if folder == "data/photos":
            assert_true(wanted)
        else:
            told = refusal(prepared.load_split, wanted, "train")
            assert "was made from the dataset in" in told


def test_captions_of_another_layout_are_of_the_same_dataset(home):
    """Which may have its images in another folder below."""
    good("--dataset-dir", "data/photos", dataset="")
    place = home / "data" / "photos"
    shutil.copytree(place / "images", place / "images2")
    text = (place / "captions.csv").read_text()
    (place / "results.csv").write_text(
        "image_name| comment_number| comment\n"
        + "\n".join(
            f"{line.split(',')[0]}| 0| {line.split(',')[1]}"
            for line in text.splitlines()[1:]
        )
    )
    (place / "images" / "039.png").unlink()
    flags = ("--dataset-dir", "data/photos", "--layout", "kaggle30k")
    good(*flags, dataset="")


# --- few images -------------------------------------------------------------


def test_too_few_held_out_images_are_told(capsys):
    splits = {"train": 5, "val": 99, "test": 100}
    rows = [(f"{s}{n}", s) for s, many in splits.items() for n in range(many)]
    warn_of_few(pd.DataFrame(rows * 2, columns=["image", "split"]))
    assert "(99 in val)" in capsys.readouterr().out
    warn_of_few(pd.DataFrame(rows[104:], columns=["image", "split"]))
    assert capsys.readouterr().out == ""
