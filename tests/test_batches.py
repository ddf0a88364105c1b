"""Batches: their order, their terraces, and that no word is lost."""

from collections import Counter
from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from captioning.backend import ALONE, Devices
from captioning.data.vocabulary import END, PAD, START
from captioning.training.batches import CaptionBatches

STEPS = 5  # captions of up to four words
A, B, C, D = 4, 5, 6, 7


def row(*words: int) -> list[int]:
    """A caption; one of five words is cut, and has no <end>."""
    made = [START, *words, END][: STEPS + 1]
    return made + [PAD] * (STEPS + 1 - len(made))


def make(captions: list, batch_images: int = 2, **options) -> CaptionBatches:
    """Batches whose images are known by their features."""
    number = len(captions)
    features = np.arange(10 * number).reshape(-1, 1, 1).astype(np.float16)
    features = np.broadcast_to(features, (10 * number, 3, 2))
    features = features[np.arange(number)[::-1] * 10]  # of image 0 the last
    captions = [np.array(each, np.int32) for each in captions]
    options = {"static": False, **options}
    return CaptionBatches(features, captions, batch_images, **options)


def many(number: int, captions: int = 1) -> list:
    """Captions that tell their image, of different lengths."""
    return [
        [row(*[10 + 10 * image + c] * (image % 4)) for c in range(captions)]
        for image in range(number)
    ]


def batches_of(data: CaptionBatches, epoch: int = 0, skip: int = 0) -> list:
    data.begin(epoch, skip)
    return [data[place] for place in range(len(data))]


def images_of(data: CaptionBatches, epoch: int = 0, skip: int = 0) -> list:
    """The images of each batch, by their features."""
    last = len(data.features) - 1
    return [
        [last - int(value) // 10 for value in inputs["features"][:, 0, 0]]
        for inputs, *_ in batches_of(data, epoch, skip)
    ]


def captions_of(batch: tuple, last: int, first: int = 0) -> list:
    """Reads a batch back, terrace by terrace.

    Args:
        batch: inputs, targets, weights.
        last: number of the image whose features are 0.
        first: the `image` that the first features belong to.

    Returns:
        Of each caption its image and its words.
    """
    inputs, targets, weights = batch
    assert inputs["features"].dtype == np.float16
    assert inputs["image"].dtype == targets.dtype == np.int32
    assert weights.dtype == np.float32
    captions = [[] for _ in inputs["image"]]
    done = 0
    for words in inputs["words"]:
        assert words.dtype == np.int32
        here = slice(done, done + words.size)
        done += words.size
        wanted = targets[here].reshape(words.shape)
        weight = weights[here].reshape(words.shape)
        for place, (seen, next_, counts) in enumerate(
            zip(words, wanted, weight, strict=True)
        ):
            # The caption begins, or goes on where its last terrace ended.
            before = [START, *captions[place]]
            captions[place] += next_[next_ != PAD].tolist()
            before += captions[place][len(before) - 1 : -1]
            if next_[0] != PAD:
                real = np.count_nonzero(next_)
                assert seen[:real].tolist() == before[-real:]
            np.testing.assert_array_equal(seen == PAD, next_ == PAD)
            np.testing.assert_array_equal(counts, next_ != PAD)
    assert done == len(targets) == len(weights)
    place = inputs["image"] - first
    assert (place >= 0).all()
    owners = inputs["features"][place, 0, 0]
    return [
        (last - int(owner) // 10, *words)
        for owner, words in zip(owners, captions, strict=True)
        if words
    ]


captions_of_images = st.lists(
    st.lists(
        st.lists(st.integers(4, 9), max_size=5).map(lambda c: row(*c)),
        min_size=1,
        max_size=4,
    ),
    min_size=1,
    max_size=9,
)
JOBS = [[ALONE], [Devices(3)], [Devices(2, n, 2) for n in range(2)]]


@settings(deadline=None, max_examples=60)
@given(
    captions=captions_of_images,
    static=st.booleans(),
    devices=st.sampled_from(JOBS),
    epoch=st.integers(0, 3),
)
def test_every_word_is_predicted_once_from_the_words_before_it(
    captions, static, devices, epoch
):
    """By some process, and from the features of its image."""
    static = static or devices != [ALONE]
    found, last, sizes = [], len(captions) - 1, set()
    for each in devices:
        data = make(captions, 2, seed=1, static=static, devices=each)
        for batch in batches_of(data, epoch):
            first = each.process * len(batch[0]["features"])
            found += captions_of(batch, last, first)
            sizes.add(len(batch[1]))
    wanted = [
        (image, *(word for word in caption[1:] if word != PAD))
        for image, each in enumerate(captions)
        for caption in each
    ]
    assert Counter(found) == Counter(wanted)
    assert len(sizes) == 1 or devices == [ALONE]


def test_terraces_leave_out_most_of_the_padding():
    lengths = np.random.default_rng(0).binomial(4, 0.5, (40, 5))
    captions = [[row(*[A] * n) for n in image] for image in lengths]
    exact, static = (make(captions, 8, static=s) for s in (False, True))
    words = (lengths + 1).sum() / 5  # of a batch
    for data, most in ((exact, 1.35), (static, 1.6)):
        sizes = [len(targets) for _, targets, _ in batches_of(data)]
        assert words <= np.mean(sizes) < most * words
    assert 1.6 * words < 8 * 5 * STEPS


def test_static_batches_are_of_one_size_but_for_those_that_do_not_fit():
    """A batch of long captions alone is padded to a rectangle."""
    generator = np.random.default_rng(0)
    lengths = generator.choice([0, 1, 4], p=[0.5, 0.45, 0.05], size=(400, 3))
    lengths[9:12] = 4
    captions = [[row(*[A] * n) for n in image] for image in lengths]
    captions[-1] = captions[-1][:1]
    data = make(captions[:-1], 3, static=True)  # the last batch has an image
    shapes = Counter(
        (
            inputs["features"].shape,
            inputs["image"].shape,
            *(each.shape for each in inputs["words"]),
        )
        for inputs, *_ in batches_of(data)
    )
    (usual, often), (rectangle, rarely) = shapes.most_common()
    assert len(usual) > 3 and often > 10 * rarely
    assert rectangle == ((3, 3, 2), (9,), (9, STEPS))
    assert len(data[3][0]["words"]) == 1


# --- the order ------------------------------------------------------------


def test_without_a_seed_the_images_keep_their_order():
    data = make(many(5), 2)
    assert images_of(data, 0) == images_of(data, 3) == [[0, 1], [2, 3], [4]]


def test_the_order_depends_on_seed_and_epoch_alone():
    first, again = (make(many(70), 2, seed=1) for _ in range(2))
    np.random.seed(0)
    orders = [images_of(first, epoch) for epoch in range(3)]
    np.random.seed(1)
    # Not on the epochs that went before.
    assert images_of(again, 2) == orders[2]
    assert images_of(again, 0) == orders[0]
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert images_of(make(many(70), 2, seed=2), 0) != orders[0]


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 3), st.integers(0, 9), st.booleans())
def test_a_resumed_epoch_gives_the_rest_of_it(epoch, skip, static):
    data = make(many(18, 7), 2, captions_per_image=5, seed=3, static=static)
    whole = batches_of(data, epoch)
    rest = batches_of(data, epoch, skip)
    assert len(rest) == len(data) == 9 - skip
    for found, wanted in zip(rest, whole[skip:], strict=True):
        for one, other in zip(
            [*flat(found[0]), *found[1:]],
            [*flat(wanted[0]), *wanted[1:]],
            strict=True,
        ):
            np.testing.assert_array_equal(one, other)


def flat(inputs: dict) -> list:
    return [inputs["features"], inputs["image"], *inputs["words"]]


# --- captions in turn -----------------------------------------------------


def captions_seen(data: CaptionBatches, epoch: int) -> list[int]:
    """The first words of the captions of an epoch."""
    found = captions_of(batches_of(data, epoch)[0], 0)
    return sorted(word for _, word, *_ in found)


def test_images_show_their_captions_in_turn():
    seven = [[row(10 + caption) for caption in range(7)]]
    data = make(seven, 1, captions_per_image=3, seed=0)
    found = [captions_seen(data, epoch) for epoch in range(7)]
    assert found[:3] == [[10, 11, 12], [13, 14, 15], [10, 11, 16]]
    assert Counter(chain(*found)) == dict.fromkeys(range(10, 17), 3)


@pytest.mark.parametrize("number", [0, 7, 9])
def test_images_with_few_captions_show_all_of_them(number):
    seven = [[row(10 + caption) for caption in range(7)]]
    data = make(seven, 1, captions_per_image=number, seed=0)
    assert captions_seen(data, 3) == list(range(10, 17))
