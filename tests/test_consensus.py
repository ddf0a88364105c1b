"""Consensus against CIDEr-D, counted n-gram by n-gram."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from captioning.data.vocabulary import END, PAD, SPECIAL_WORDS, UNKNOWN
from captioning.decoding import consensus
from captioning.training.self_critical import CiderD

STEPS = 9
LOG_IMAGES = 50.0


def padded(captions) -> np.ndarray:
    """Captions, lists of word numbers, as a search gives them."""
    words = np.full((len(captions), STEPS), PAD, np.int32)
    for row, caption in zip(words, captions, strict=True):
        row[: len(caption) + 1] = [*caption, END]
    return words


class Ranks(dict):
    """Document frequencies by which a word weighs the logarithm of its rank."""

    def __missing__(self, ngram) -> float:
        words = [int(word) for word in ngram if word != SPECIAL_WORDS[END]]
        return float(
            np.exp(LOG_IMAGES - sum(np.log(w - UNKNOWN) for w in words))
        )


class ByRank(CiderD):
    """CIDEr-D with such frequencies."""

    def __init__(self, captions) -> None:
        self.references = [[each] for each in captions]
        self.frequency, self.log_images = Ranks(), LOG_IMAGES


# Few words, so that many n-grams are shared and some come twice.
CAPTIONS = st.lists(
    st.lists(st.integers(4, 7), min_size=1, max_size=STEPS - 1),
    min_size=2,
    max_size=5,
)


@settings(max_examples=25, deadline=None)
@given(captions=CAPTIONS, other=CAPTIONS)
def test_similarity_is_cider_d_with_ranks_for_frequencies(captions, other):
    texts, references = (
        [[str(word) for word in each] for each in some]
        for some in (captions, other)
    )
    judge = ByRank(references)
    expected = [
        [judge(image, each) / 10 for image in range(len(references))]
        for each in texts
    ]
    found = np.array(consensus.similarity(padded(captions), padded(other)))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_caption_that_the_others_agree_with_is_not_the_likeliest():
    lonely, common = [30, 31, 32, 33], [10, 11, 12, 13]
    words = padded([lonely, common, [*common[:3], 14], [15, *common[1:]]])
    likely = np.log(np.array([[0.3, 0.25, 0.25, 0.2]], np.float32))
    found = np.array(consensus.agreement(words[None], likely, 1.0))
    assert found.argmax() == 1
    # Next to a caption that is all but certain, the others do not count.
    found = np.array(consensus.agreement(words[None], 100 * likely, 1.0))
    assert found.argmax() == 0 and found[0, 0] == pytest.approx(1)
