"""Weights of a trained run for a decoder with other words."""

import numpy as np
import pytest

from captioning import runs
from captioning.data.vocabulary import SPECIAL_WORDS, Vocabulary
from captioning.training import warm_start
from config import Config, UserError
from model import build_model

CHANNELS = 6
CONFIG = Config(decoder_units=3, attention_units=3, embedding_units=3)


def test_a_run_without_weights_is_refused_before_anything_is_written(tmp_path):
    place = tmp_path / "begun"
    nothing = runs.digest_images([], np.zeros((0, 16), np.uint8))
    words = Vocabulary(SPECIAL_WORDS)
    runs.begin(CONFIG, place, words, [], (4, CHANNELS), nothing)
    with pytest.raises(UserError, match=r"weights\.h5 does not exist yet"):
        warm_start.check(CONFIG, place, [], (4, CHANNELS))


def test_words_that_both_know_keep_their_weights(tmp_path):
    old_words = Vocabulary((*SPECIAL_WORDS, "dog", "cat", "red"))
    new_words = Vocabulary((*SPECIAL_WORDS, "new", "red", "dog"))
    old = build_model(CONFIG, len(old_words), CHANNELS)
    old.standardisation.mean.assign(np.arange(CHANNELS))
    nothing = runs.digest_images([], np.zeros((0, 16), np.uint8))
    runs.begin(CONFIG, tmp_path, old_words, [], (4, CHANNELS), nothing)
    runs.save_weights(old, tmp_path, 1)
    new = build_model(CONFIG, len(new_words), CHANNELS)
    fresh = np.array(new.embedding.embeddings)
    warm_start.start_from(new, new_words, tmp_path)
    rows = [np.array(each.embedding.embeddings) for each in (new, old)]
    columns = [np.array(each.logits.kernel) for each in (new, old)]
    for mine, its in ((5, 6), (6, 4), (0, 0), (3, 3)):
        np.testing.assert_array_equal(rows[0][mine], rows[1][its])
        np.testing.assert_array_equal(columns[0][:, mine], columns[1][:, its])
    np.testing.assert_array_equal(rows[0][4], fresh[4])  # a new word
    for layer in ("standardisation", "annotation", "step", "word_gates"):
        mine, its = (getattr(each, layer).get_weights() for each in (new, old))
        for one, other in zip(mine, its, strict=True):
            np.testing.assert_array_equal(one, other)
