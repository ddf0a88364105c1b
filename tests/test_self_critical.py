"""The reward, the baseline, and that rewarded captions become likelier."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocoevalcap.cider.cider import Cider

from captioning.data.vocabulary import (
    END,
    PAD,
    SPECIAL_WORDS,
    START,
    UNKNOWN,
    Vocabulary,
    encode,
)
from captioning.decoding import captioner
from captioning.features.joined import Features
from captioning.training import self_critical
from captioning.training.batches import CaptionBatches
from config import Config
from model import build_model

pytestmark = pytest.mark.usefixtures("float32")
WORDS = Vocabulary((*SPECIAL_WORDS, *"abcdefgh"))
CONFIG = Config(
    max_caption_length=4,
    batch_images=2,
    captions_per_image=8,
    decoder_units=8,
    attention_units=8,
    embedding_units=8,
    scst_learning_rate=0.01,
)


captions = st.lists(st.sampled_from("abc"), max_size=6)


@given(
    st.lists(
        st.tuples(captions, st.lists(captions, min_size=1, max_size=3)),
        min_size=2,
        max_size=5,
    )
)
@settings(max_examples=60, deadline=None)
def test_the_reward_is_cider_d_of_the_fields_scorer(images):
    """With the document frequencies of all images, and `<end>` as a word."""
    references = [each for _, each in images]
    reward = self_critical.CiderD(references)
    found = [reward(place, made) for place, (made, _) in enumerate(images)]
    judged = {
        place: [" ".join([*each, "<end>"]) for each in texts]
        for place, texts in enumerate(references)
    }
    made = {
        place: [" ".join([*each, "<end>"])]
        for place, (each, _) in enumerate(images)
    }
    _, wanted = Cider().compute_score(judged, made)
    np.testing.assert_allclose(found, wanted, atol=1e-9)


def test_a_sample_is_measured_by_the_others_of_its_image():
    rewards = np.array([[1.0, 2.0, 6.0], [4.0, 4.0, 4.0]])
    found = self_critical.advantages(rewards)
    np.testing.assert_allclose(found, [[-3, -1.5, 4.5], [0, 0, 0]])


def make_rounds(images: int = 3):
    """Rounds over random features; every image is called `a b`."""
    shape = (images, 4, 6)  # (images, regions, channels)
    features = np.random.default_rng(0).normal(size=shape).astype("float16")
    decoder = build_model(CONFIG, len(WORDS), 6)
    everything = Features([features], [np.arange(images)])
    references = [[["a", "b"]], [["a", "b"]], [["c"]]][:images]
    return decoder, self_critical.Rounds(
        CONFIG, decoder, everything, references, WORDS
    )


def test_what_is_sampled_depends_on_weights_epoch_and_round_alone():
    (decoder, rounds), (copy, again) = make_rounds(), make_rounds()
    copy.set_weights(decoder.get_weights())
    rounds.sample(0, 0)
    one, two, other = (
        rounds.sample(1, 0),
        again.sample(1, 0),
        rounds.sample(2, 0),
    )
    assert one[1] == two[1]
    for first, second in zip(one[0].captions, two[0].captions, strict=True):
        np.testing.assert_array_equal(first, second)
    assert any(
        not np.array_equal(first, second)
        for first, second in zip(
            one[0].captions, other[0].captions, strict=True
        )
    )


def test_what_is_rewarded_becomes_likelier(monkeypatch):
    monkeypatch.setattr(captioner, "BATCH", 3)
    decoder, rounds = make_rounds()
    self_critical.compile_decoder(CONFIG, decoder)
    rewards = []
    for epoch in range(60):
        batches, reward = rounds.sample(epoch, 0)
        decoder.fit(batches, shuffle=False, verbose=0)
        rewards.append(reward)
    # What is never sampled takes nothing of what the bad captions lose.
    features = rounds.features[:1]
    annotations, keys, *state = decoder.start(features)
    found, *_ = decoder.next_word(
        np.array([[START]]),
        *(each[:, None] for each in state),
        decoder.step.cast_weights(),
        keys,
        annotations,
    )
    assert np.exp(found)[0, 0, [PAD, START, UNKNOWN]].sum() < 0.4
    assert np.mean(rewards[-5:]) > 2 * np.mean(rewards[:5])


def test_the_end_of_the_longest_caption_is_neither_rewarded_nor_punished():
    """It had no choice; words, and an `<end>` before, have their reward."""
    decoder, rounds = make_rounds()
    decoder.logits.bias.assign(-1e6 * np.eye(len(WORDS))[END])
    batches, _ = rounds.sample(0, 0)
    ends, rewarded = 0, 0
    for place in range(len(batches)):
        _, targets, weights = batches[place]
        ends += np.count_nonzero(weights[targets == END])
        rewarded += np.count_nonzero(weights)
    assert ends == 0 < rewarded
    decoder.logits.bias.assign(np.zeros(len(WORDS)))
    batches, _ = rounds.sample(0, 0)
    assert any(
        weights[targets == END].any()
        for _, targets, weights in (batches[n] for n in range(len(batches)))
    )


@pytest.mark.parametrize("static", [False, True])
def test_weights_of_captions_reach_their_words(static):
    """Whatever order the batch has: long captions come first in it."""
    caption = [["a"], ["b", "c", "d"], ["e", "f"]]
    importance = [np.array([1.0, -2.0, 3.0])]
    batches = CaptionBatches(
        np.zeros((1, 4, 6), np.float16),
        [encode(caption, WORDS, 4)],
        1,
        importance=importance,
        static=static,
    )
    _, targets, weights = batches[0]
    real = weights != 0
    assert real.sum() == 2 + 4 + 3
    numbers = WORDS.numbers
    for words, weight in zip(caption, importance[0], strict=True):
        for word in words:
            found = weights[targets == numbers[word]]
            np.testing.assert_array_equal(found, weight)
