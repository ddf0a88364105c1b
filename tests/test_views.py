"""Mirrored views: cached beside the plain ones, shown in training only."""

import cv2
import numpy as np
import pandas as pd
import pytest

from captioning.data import vocabulary
from captioning.features.cache import MIRRORED
from tests.processes import end, make_photos, start


def cache_folder(folder):
    (path,) = folder.glob("data/cache/photos*/*/features.npy")
    return path.parent


@pytest.mark.parametrize(
    "caption",
    [
        *("a man on the left", "The LEFT one", "his right-hand glove"),
        *("the rightmost dog", "leftwards", "a left/right sign", "lefties"),
        *("it turns counter-clockwise", "a right-handed pitcher", "righty"),
    ],
)
def test_captions_that_name_a_side_are_known(caption):
    assert vocabulary.names_a_side(vocabulary.tokenise(caption))


@pytest.mark.parametrize(
    "caption",
    [
        *("a bright kite", "standing upright", "leftover pizza", "a cleft"),
        *("copyright", "righteous", "a dog", "a fright"),
    ],
)
def test_other_captions_name_no_side(caption):
    assert not vocabulary.names_a_side(vocabulary.tokenise(caption))


def test_a_cache_of_one_view_is_extended_by_the_mirrored_rows(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        make_photos(folder)
    assert end(start(one))[0] == 0
    before = (cache_folder(one) / "features.npy").read_bytes()[128:]
    captions = next(one.glob("data/cache/*/captions.csv"))
    plain_captions = captions.read_bytes()
    # Where the images are gone, only what is missing may be looked at.
    val = [f"{place:03d}.png" for place in range(5, 120, 5)]
    for name in set(val) - {"100.png"}:
        path = one / "data" / "photos" / "images" / name
        path.write_bytes(b"gone")
    code, out, err = end(start(one, "--feature-views", "2"))
    assert code == 0, err
    assert "--feature-views 2" in out.splitlines()[-1]
    assert end(start(two, "--feature-views", "2"))[0] == 0
    for name in ("features.npy", "images.csv", "finished.bin", "digests.bin"):
        first = (cache_folder(one) / name).read_bytes()
        assert first == (cache_folder(two) / name).read_bytes(), name
    after = (cache_folder(one) / "features.npy").read_bytes()[128:]
    assert after.startswith(before) and len(after) > len(before)
    assert captions.read_bytes() == plain_captions


def test_the_mirrored_rows_are_those_of_mirrored_training_images(tmp_path):
    make_photos(tmp_path)
    assert end(start(tmp_path, "--feature-views", "2"))[0] == 0
    folder = cache_folder(tmp_path)
    names = pd.read_csv(folder / "images.csv")["image"].tolist()
    table = pd.read_csv(tmp_path / "data" / "photos" / "captions.csv")
    training = set(table["image"][table["split"] == "train"])
    mirrored = [name for name in names if name.endswith(MIRRORED)]
    assert {name.removesuffix(MIRRORED) for name in mirrored} == training
    array = np.load(folder / "features.npy").reshape(-1, 2, 2, 3)
    for name in ("001.png", "007.png", "119.png"):
        plain, other = names.index(name), names.index(name + MIRRORED)
        assert not np.array_equal(array[plain], array[other])
        np.testing.assert_array_equal(array[plain][:, ::-1], array[other])
    (path,) = folder.parent.glob("skipped.csv")
    assert path.read_text() == "image,reason\n041.png,not an image\n"


def test_workers_share_the_mirrored_rows_too(tmp_path):
    for name in ("alone", "shared"):
        make_photos(tmp_path / name, 40)
    views = ("--feature-views", "2")
    assert end(start(tmp_path / "alone", *views))[0] == 0
    parts = [
        start(tmp_path / "shared", *views, "--worker", f"{n}/2")
        for n in range(2)
    ]
    assert [end(part)[0] for part in parts] == [0, 0]
    for name in ("features.npy", "digests.bin", "finished.bin"):
        alone = (cache_folder(tmp_path / "alone") / name).read_bytes()
        shared = (cache_folder(tmp_path / "shared") / name).read_bytes()
        assert alone == shared


@pytest.fixture
def make_batches():
    """A maker of batches of 64 images; image n has the feature n, -n mirrored.

    Image n has three captions; the second one of every fourth names a side.
    """
    from captioning.training.batches import CaptionBatches

    plain = np.arange(1, 65)
    array = np.concatenate([plain, -plain]).astype(np.float16)[:, None, None]
    captions = [
        np.array([[1, 10, 2], [1, 20 + 10 * (n % 4 == 0), 2], [1, 11, 2]])
        for n in range(64)
    ]
    sided = [each[:, 1] == 30 for each in captions]

    def make(number: int, seed: int | None = 5, views: int = 2):
        mirrored = np.arange(64, 128) if views == 2 else None
        return CaptionBatches(
            *(array, np.arange(64), captions, 8, number, seed),
            *(mirrored, sided),
            padded=False,
        )

    return make


def shown(batches) -> list[tuple[float, int]]:
    """(feature, first word) of every caption of what is left of an epoch."""
    pairs = []
    for place in range(len(batches)):
        inputs, targets, weights = batches[place]
        words = inputs["words"] == 1  # <start>: the target is the first word
        kept = words & (weights > 0)
        values = inputs["features"][inputs["image"][kept], 0, 0]
        pairs += zip(values.tolist(), targets[kept].tolist(), strict=True)
    return pairs


def test_half_of_the_images_are_mirrored_and_others_in_every_epoch(
    make_batches,
):
    batches = make_batches(number=0)
    seen = []
    for epoch in range(6):
        batches.begin(epoch)
        seen.append({value for value, _ in shown(batches)})
        assert {abs(value) for value in seen[-1]} == set(range(1, 65))
        assert 12 <= sum(value < 0 for value in seen[-1]) <= 36
    assert len({frozenset(each) for each in seen}) == 6


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_caption_that_names_a_side_is_never_shown_mirrored(
    make_batches, number
):
    batches = make_batches(number)
    pairs = []
    for epoch in range(12):
        batches.begin(epoch)
        pairs += shown(batches)
    assert all(value > 0 for value, word in pairs if word == 30)
    assert sum(word == 30 for _, word in pairs) == 16 * (
        12 * (number or 3) // 3
    )
    if number:
        fourth = {v for v, _ in pairs if v < 0 and (-v - 1) % 4 == 0}
        assert fourth, "an image is mirrored while no such caption is up"


def test_views_depend_on_seed_and_epoch_alone(make_batches):
    whole, again = make_batches(2), make_batches(2)
    whole.begin(0)
    shown(whole)
    whole.begin(3)
    again.begin(3, skip=3)
    assert shown(again) == shown(whole)[-len(shown(again)) :]
    other = make_batches(2, seed=6)
    other.begin(3)
    assert shown(other) != shown(whole)


def test_the_order_of_the_images_is_that_of_one_view(make_batches):
    one, two = make_batches(2, views=1), make_batches(2)
    for batches in (one, two):
        batches.begin(2)
    pairs = [(abs(value), word) for value, word in shown(two)]
    assert pairs == shown(one)


def test_without_mirrored_rows_every_image_is_shown_as_it_is(make_batches):
    batches = make_batches(0, seed=None, views=1)
    values = [value for value, _ in shown(batches)]
    assert sorted(set(values)) == list(range(1, 65))


def test_no_image_can_have_the_name_of_a_mirrored_view(tmp_path):
    from captioning.data import datasets

    pixels = cv2.imencode(".png", np.zeros((4, 4, 3), np.uint8))[1].tobytes()
    (tmp_path / "b.png").write_bytes(pixels)
    text = f"image,caption\nb.png{MIRRORED},a dog\nb.png,a dog\n"
    (tmp_path / "captions.csv").write_text(text)
    dataset = datasets.find_dataset(tmp_path, "auto", 0.05, 0.05)
    assert not any(MIRRORED in image for image in dataset.table["image"])
