"""Packed captions, and the order of training batches."""

from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from captioning.data.vocabulary import END, PAD, START
from captioning.training.batches import CaptionBatches, pack

STEPS = 5  # captions of up to four words
A, B, C, D = 4, 5, 6, 7


def row(*words: int) -> list[int]:
    """A caption; one of five words is cut, and has no <end>."""
    made = [START, *words, END][: STEPS + 1]
    return made + [PAD] * (STEPS + 1 - len(made))


def array(rows: list) -> np.ndarray:
    return np.array(rows, np.int32).reshape(-1, STEPS + 1)


captions_of_images = st.lists(
    st.lists(
        st.lists(st.integers(4, 9), max_size=5).map(lambda c: row(*c)),
        min_size=1,
        max_size=4,
    ),
    min_size=1,
    max_size=9,
)


def make(captions: list, batch_images: int = 2, **options) -> CaptionBatches:
    """Batches whose images are known by their features."""
    number = len(captions)
    features = np.arange(10 * number).reshape(-1, 1, 1).astype(np.float16)
    features = np.broadcast_to(features, (10 * number, 3, 2))
    rows = np.arange(number)[::-1] * 10  # of image 0 the last
    options = {"padded": False, **options}
    return CaptionBatches(
        features, rows, [array(c) for c in captions], batch_images, **options
    )


def many(number: int, captions: int = 1) -> list:
    """Captions that tell their image, of different lengths."""
    return [
        [row(*[10 + 10 * image + c] * (image % 4)) for c in range(captions)]
        for image in range(number)
    ]


def unpack(packed: dict, targets: np.ndarray) -> tuple:
    """Images (captions,), words and targets (captions, steps)."""
    step = np.repeat(np.arange(STEPS), packed["counts"])  # (tokens,)
    places = (packed["caption"], step)
    shape = (packed["counts"][0], STEPS)
    words, wanted = np.full(shape, PAD), np.full(shape, PAD)
    image = np.full(shape, -1)
    words[places], wanted[places] = packed["words"], targets
    image[places] = packed["image"]
    # All tokens of a caption are of one image; every caption has one.
    owners = image.max(axis=1)
    assert ((image == owners[:, None]) | (image == -1)).all()
    return owners, words, wanted


def images_of(data: CaptionBatches, epoch: int, skip: int = 0) -> list:
    """The images of each batch of an epoch, by their features."""
    data.begin(epoch, skip)
    last = len(data.rows) - 1
    return [
        [last - int(value) // 10 for value in data[n][0]["features"][:, 0, 0]]
        for n in range(len(data))
    ]


# --- packing --------------------------------------------------------------


def test_captions_are_packed_step_by_step_the_longest_first():
    rows = array([row(A), row(B, C, D), row(), row(C, D)])
    packed = pack(rows, np.array([0, 1, 1, 2]))
    assert packed.counts.tolist() == [4, 3, 2, 1, 0]
    assert packed.words.tolist() == [
        *(START, START, START, START),
        *(B, C, A),
        *(C, D),
        D,
    ]
    assert packed.targets.tolist() == [
        *(B, C, A, END),
        *(C, D, END),
        *(D, END),
        END,
    ]
    assert packed.caption.tolist() == [0, 1, 2, 3, 0, 1, 2, 0, 1, 0]
    assert packed.image.tolist() == [1, 2, 0, 1, 1, 2, 0, 1, 2, 1]


def test_captions_of_one_length_keep_their_order():
    packed = pack(array([row(A), row(B), row(C)]), np.array([5, 6, 7]))
    assert packed.targets.tolist()[:3] == [A, B, C]
    assert packed.image.tolist()[:3] == [5, 6, 7]


def test_a_cut_caption_does_not_learn_to_end():
    packed = pack(array([row(A, B, C, D, A)]), np.array([0]))
    assert packed.targets.tolist() == [A, B, C, D, A]
    assert packed.words.tolist() == [START, A, B, C, D]


@given(captions_of_images)
def test_unpacking_gives_the_captions_back(captions):
    rows = array([each for image in captions for each in image])
    numbers = [len(image) for image in captions]
    image = np.repeat(np.arange(len(captions), dtype=np.int32), numbers)
    packed = pack(rows, image)
    assert all(each.dtype == np.int32 for each in packed)
    owners, words, targets = unpack(packed._asdict(), packed.targets)
    lengths = np.count_nonzero(targets, axis=1)
    assert (np.diff(lengths) <= 0).all()
    assert len(packed.words) == lengths.sum()
    seen = np.where(rows[:, 1:] != PAD, rows[:, :-1], PAD)
    wanted = np.column_stack([image, seen, rows[:, 1:]])
    found = np.column_stack([owners, words, targets])
    assert sorted(found.tolist()) == sorted(wanted.tolist())


# --- a batch --------------------------------------------------------------

SOME = [[row(A)], [row(B), row(C, D)], [row(D)]]


def check_features(features: np.ndarray) -> None:
    """Of the first two images of SOME."""
    assert features.dtype == np.float16
    assert features.shape == (2, 3, 2)
    assert features[:, 0, 0].tolist() == [20, 10]


def test_a_batch_has_each_image_with_its_captions():
    inputs, targets, weights = make(SOME, 2)[0]
    check_features(inputs["features"])
    owners, _, wanted = unpack(inputs, targets)
    found = {
        (int(owner), *each[each != PAD])
        for owner, each in zip(owners, wanted, strict=True)
    }
    assert found == {(0, A, END), (1, B, END), (1, C, D, END)}
    np.testing.assert_array_equal(weights, targets != PAD)
    assert weights.dtype == np.float32


def test_a_padded_batch_has_the_captions_of_an_image_in_its_row():
    inputs, targets, weights = make(SOME, 2, padded=True)[0]
    check_features(inputs["features"])
    words = array([row(), row(A), row(B), row(C, D)])[:, :-1]
    words[words == END] = PAD  # it is no word that another one follows
    nothing, a, b, cd = words
    nothing[:] = PAD
    assert (inputs["words"] == [[a, nothing], [b, cd]]).all()
    assert set(inputs) == {"features", "words"}
    assert targets[0, 0].tolist() == [A, END, 0, 0, 0]
    assert targets[1, 1].tolist() == [C, D, END, 0, 0]
    np.testing.assert_array_equal(weights, targets != PAD)
    assert weights.dtype == np.float32


def test_the_weights_count_each_word_and_each_end_once():
    data = make([[row(A), row(B, C)], [row(*[D] * 5)]], 2)
    assert sum(data[0][2]) == 2 + 3 + 5


def test_padded_batches_are_all_of_one_size():
    captions = [each[: 1 + n % 3] for n, each in enumerate(many(7, 3))]
    for number in (0, 2):
        data = make(captions, 3, captions_per_image=number, seed=0, padded=True)
        assert len(data) == 3
        words = 0
        for inputs, targets, weights in (data[n] for n in range(3)):
            assert inputs["features"].shape == (3, 3, 2)
            shape = (3, number or 3, STEPS)
            assert inputs["words"].shape == targets.shape == shape
            assert weights.sum() == np.count_nonzero(targets)
            words += int(weights.sum())
        packed = make(captions, 3, captions_per_image=number, seed=0)
        assert words == sum(int(packed[n][2].sum()) for n in range(3))


# --- the order ------------------------------------------------------------


@pytest.mark.parametrize("seed", [None, 0, 7])
@pytest.mark.parametrize("number", [1, 6, 70])
def test_every_image_comes_exactly_once_an_epoch(seed, number):
    data = make(many(number), 2, seed=seed)
    for epoch in (0, 1):
        found = images_of(data, epoch)
        assert sorted(chain(*found)) == list(range(number))
        assert len(found) == len(data) == -(-number // 2)


def test_without_a_seed_the_images_keep_their_order():
    data = make(many(5), 2)
    assert images_of(data, 0) == images_of(data, 3) == [[0, 1], [2, 3], [4]]


def test_the_order_depends_on_seed_and_epoch_alone():
    first, again = (make(many(70), 2, seed=1) for _ in range(2))
    orders = [images_of(first, epoch) for epoch in range(3)]
    # Not on the epochs that went before.
    assert images_of(again, 2) == orders[2]
    assert images_of(again, 0) == orders[0]
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert images_of(make(many(70), 2, seed=2), 0) != orders[0]


def test_the_order_does_not_depend_on_the_random_state_of_numpy():
    data = make(many(20), 2, seed=1)
    np.random.seed(0)
    before = images_of(data, 1)
    np.random.seed(1)
    assert images_of(data, 1) == before


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 3), st.integers(0, 9))
def test_an_epoch_that_goes_on_gives_the_rest_of_it(epoch, skip):
    data = make(many(18, 7), 2, captions_per_image=5, seed=3)
    data.begin(epoch)
    whole = [data[place] for place in range(len(data))]
    data.begin(epoch, skip)
    rest = [data[place] for place in range(len(data))]
    assert len(rest) == 9 - skip
    for found, wanted in zip(rest, whole[skip:], strict=True):
        for name, array in wanted[0].items():
            np.testing.assert_array_equal(found[0][name], array)
        np.testing.assert_array_equal(found[1], wanted[1])


def test_captions_of_like_length_come_together():
    lengths = np.arange(64) % 5
    captions = [[row(*[A] * length)] for length in lengths]
    data = make(captions, 4, seed=0)
    spread = [np.ptp(lengths[batch]) for batch in images_of(data, 0)]
    assert max(spread) <= 1
    # The batches themselves are in no order of length.
    means = [lengths[batch].mean() for batch in images_of(data, 0)]
    assert means != sorted(means) and means != sorted(means)[::-1]


# --- captions in turn -----------------------------------------------------


def captions_seen(data: CaptionBatches, epoch: int) -> list[int]:
    """The first words of the captions of an epoch."""
    data.begin(epoch)
    targets = data[0][1]
    return sorted(targets[: data[0][0]["counts"][0]].tolist())


def test_images_show_their_captions_in_turn():
    seven = [[row(10 + caption) for caption in range(7)]]
    data = make(seven, 1, captions_per_image=3, seed=0)
    found = [captions_seen(data, epoch) for epoch in range(7)]
    assert found[:3] == [[10, 11, 12], [13, 14, 15], [10, 11, 16]]
    assert sorted(chain(*found)) == sorted(3 * list(range(10, 17)))


@pytest.mark.parametrize("number", [0, 7, 9])
def test_images_with_few_captions_show_all_of_them(number):
    seven = [[row(10 + caption) for caption in range(7)]]
    data = make(seven, 1, captions_per_image=number, seed=0)
    assert captions_seen(data, 3) == list(range(10, 17))
