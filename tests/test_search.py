"""Beam search against exhaustive search, greedy search and itself."""

import itertools

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from captioning.search import BeamSearch, caption_rows
from captioning.vocabulary import (
    END,
    PAD,
    SPECIAL_WORDS,
    START,
    UNKNOWN,
    Vocabulary,
)
from model import CaptioningModel

REGIONS, CHANNELS = 4, 3


@pytest.fixture(autouse=True)
def float32():
    keras.config.set_dtype_policy("float32")


def tiny(seed: int, words: int, scale: float = 3.0) -> CaptioningModel:
    """A random model whose probabilities are far from even."""
    keras.utils.set_random_seed(seed)
    decoder = CaptioningModel(
        len(SPECIAL_WORDS) + words,
        9,
        decoder_units=5,
        attention_units=4,
        embedding_units=4,
    )
    decoder.build({"features": (None, None, CHANNELS)})
    decoder.set_weights([scale * each for each in decoder.get_weights()])
    decoder.standardisation.deviation.assign(np.ones(CHANNELS))
    return decoder


def search(decoder, features, beam, exponent=0.7, least=1, most=3):
    searcher = BeamSearch(decoder, beam, exponent, least, most)
    searcher.compile(jit_compile=False)
    found = searcher.predict_on_batch(features)
    return {name: np.asarray(each) for name, each in found.items()}


def some_features(seed: int, images: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    return random.normal(size=(images, REGIONS, CHANNELS)).astype("float32")


def log_probability(decoder, features, words) -> float:
    """Of a sequence of words for one image, step by step."""
    annotations, keys, hidden, cell = decoder.start(features)
    total, last = 0.0, START
    for word in words:
        found, hidden, cell, _ = decoder.step(
            np.array([last]), hidden, cell, keys, annotations
        )
        total += float(found[0][word])
        last = word
    return total


def exhaustive(decoder, features, exponent, least, most):
    """The best of all captions there are, and its normalised score."""
    size = decoder.settings["vocabulary_size"]
    content = range(len(SPECIAL_WORDS), size)
    best = (-np.inf, ())
    for length in range(least, most + 1):
        for words in itertools.product(content, repeat=length):
            words = (*words, END)
            score = log_probability(decoder, features, words)
            score /= ((5 + len(words)) / 6) ** exponent
            best = max(best, (score, words))
    return best


@settings(max_examples=6, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    exponent=st.sampled_from([0.0, 0.7, 2.0]),
    least=st.integers(1, 2),
)
def test_a_wide_beam_finds_what_exhaustive_search_finds(seed, exponent, least):
    decoder, features = tiny(seed, 3), some_features(seed, 1)
    score, words = exhaustive(decoder, features, exponent, least, 3)
    found = search(decoder, features, 27, exponent, least)
    assert tuple(found["words"][0, 0][: len(words)]) == words
    assert found["scores"][0, 0] == pytest.approx(score, abs=1e-4)


@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_a_beam_of_one_is_greedy(seed):
    decoder, features = tiny(seed, 6), some_features(seed, 1)
    annotations, keys, hidden, cell = decoder.start(features)
    last, words = START, []
    for step in range(4):
        found, hidden, cell, _ = decoder.step(
            np.array([last]), hidden, cell, keys, annotations
        )
        allowed = np.array(found[0])
        allowed[[PAD, START, UNKNOWN]] = -np.inf
        if step == 0:
            allowed[END] = -np.inf
        last = int(allowed.argmax())
        if step == 3 or last == END:
            break
        words.append(last)
    found = search(decoder, features, 1)["words"][0, 0]
    assert [w for w in found if w not in (END, PAD)] == words


@pytest.mark.parametrize("beam", [1, 4])
def test_a_batch_gives_what_its_images_give_alone(beam):
    decoder, features = tiny(7, 8), some_features(7, 32)
    together = search(decoder, features, beam, most=6)
    for image in range(0, 32, 5):
        alone = search(decoder, features[image : image + 1], beam, most=6)
        for name, each in alone.items():
            np.testing.assert_allclose(
                each[0], together[name][image], atol=1e-4
            )


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10_000), least=st.integers(1, 4))
def test_captions_have_their_least_length_and_no_special_word(seed, least):
    decoder, features = tiny(seed, 5), some_features(seed, 4)
    found = search(decoder, features, 3, least=least, most=5)
    for words in found["words"].reshape(-1, 6):
        content = list(itertools.takewhile(lambda w: w != END, words))
        content = [word for word in content if word != PAD]
        if content:
            assert least <= len(content) <= 5
        assert not {START, UNKNOWN} & set(words.tolist())
    assert (found["words"][:, 0, 0] > UNKNOWN).all()


def test_an_image_gets_a_caption_even_when_no_beam_ends():
    decoder = tiny(3, 5)
    bias = np.zeros(9, "float32")
    bias[END] = -1e6
    decoder.deep_output.logits.bias.assign(bias)
    found = search(decoder, some_features(3, 2), 3, most=4)
    assert (found["words"][:, 0, :4] > UNKNOWN).all()
    assert np.isfinite(found["scores"][:, 0]).all()


def test_captions_are_sorted_by_score_and_differ():
    found = search(tiny(5, 6), some_features(5, 3), 4, most=5)
    assert (np.diff(found["scores"], axis=1) <= 0).all()
    for words in found["words"]:
        assert len({tuple(each) for each in words}) == 4


def test_the_attention_is_that_of_the_best_caption():
    decoder, features = tiny(11, 6), some_features(11, 1)
    found = search(decoder, features, 4, most=5)
    annotations, keys, hidden, cell = decoder.start(features)
    last = START
    for step, word in enumerate(found["words"][0, 0]):
        if word == PAD:
            break
        _, hidden, cell, alpha = decoder.step(
            np.array([last]), hidden, cell, keys, annotations
        )
        np.testing.assert_allclose(
            found["attention"][0, step], alpha[0], atol=1e-5
        )
        last = word


def test_rows_are_captioned_in_their_order():
    decoder = tiny(13, 6)
    features = some_features(13, 60)
    vocabulary = Vocabulary((*SPECIAL_WORDS, *"abcdef"))
    searcher = BeamSearch(decoder, 2, 0.7, 1, 4)
    searcher.compile(jit_compile=False)
    forward = caption_rows(searcher, features, np.arange(60), vocabulary)
    backward = caption_rows(searcher, features, np.arange(60)[::-1], vocabulary)
    assert [e.words for e in forward] == [e.words for e in backward[::-1]]
    assert len({each.caption for each in forward}) > 1
    for each in forward:
        assert each.words and len(each.words) == len(each.attention)
