"""Search against exhaustive search, itself, and what chance allows."""

import itertools

import keras
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from captioning.backend import TENSORFLOW, use_xla
from captioning.data.vocabulary import (
    END,
    PAD,
    SPECIAL_WORDS,
    START,
    UNKNOWN,
    Vocabulary,
)
from captioning.decoding import consensus
from captioning.decoding.search import (
    IMPOSSIBLE,
    BeamSearch,
    Sample,
    average,
    caption_rows,
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


def search(
    decoder,
    features,
    beam,
    exponent=0.7,
    least=1,
    most=3,
    ngram=0,
    temperature=0.0,
):
    searcher = BeamSearch(
        decoder, beam, exponent, least, most, ngram, temperature
    )
    return predict(compiled(searcher, once=True), features)


def compiled(searcher, once=False):
    """Compiled; TensorFlow runs what it runs once sooner without that."""
    searcher.compile(jit_compile=use_xla(), run_eagerly=once and TENSORFLOW)
    return searcher


def predict(searcher, features):
    found = searcher.predict_on_batch(features)
    return {name: np.asarray(each) for name, each in found.items()}


def sample(decoder, features, temperature=1.0, top_k=0, top_p=1.0, **others):
    others = {"max_length": 4, "seed": 1, **others}
    sampler = Sample(decoder, temperature, top_k, top_p, **others)
    return predict(compiled(sampler, once=True), features)


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


def ngrams(words, n: int) -> list[tuple[int, ...]]:
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def repeats(words, n: int) -> bool:
    """Whether n words in a row come twice; never for n = 0."""
    found = ngrams(words, n)
    return n > 0 and len(set(found)) < len(found)


def exhaustive(decoder, features, exponent, least, most, ngram=0):
    """The best of all captions there are, and its normalised score.

    Every caption of a length stands beside every other: nothing is pruned.
    """
    size = decoder.settings["vocabulary_size"]
    content = np.arange(len(SPECIAL_WORDS), size)
    annotations, keys, hidden, cell = decoder.start(features)
    captions, totals, best = [()], np.zeros(1), (-np.inf, ())
    for length in range(most + 1):
        last = np.array([words[-1] if words else START for words in captions])
        found, hidden, cell, _ = decoder.step(
            last, hidden, cell, keys, annotations
        )
        found = np.array(found, np.float64)  # (captions, vocabulary)
        for words, score in zip(captions, totals + found[:, END], strict=True):
            if length >= least and not repeats(words, ngram):
                score /= ((6 + length) / 6) ** exponent
                best = max(best, (score, (*words, END)))
        captions = [(*words, w) for words in captions for w in content.tolist()]
        totals = (totals[:, None] + found[:, content]).ravel()
        hidden, cell = (
            np.repeat(each, len(content), axis=0) for each in (hidden, cell)
        )
    return best


@settings(max_examples=6, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    exponent=st.sampled_from([0.0, 0.7, 2.0]),
    least=st.integers(1, 2),
    ngram=st.integers(0, 2),
)
# Here no word is as unlikely after three others as `<end>`.
@example(seed=170, exponent=2.0, least=1, ngram=0)
def test_a_wide_beam_finds_what_exhaustive_search_finds(
    seed, exponent, least, ngram
):
    decoder, features = tiny(seed, 3), some_features(seed, 1)
    score, words = exhaustive(decoder, features, exponent, least, 3, ngram)
    # As many as there are captions of three words.
    found = search(decoder, features, 27, exponent, least, ngram=ngram)
    assert tuple(found["words"][0, 0][: len(words)]) == words
    assert found["scores"][0, 0] == pytest.approx(score, abs=1e-4)
    assert found["log_probabilities"][0, 0] == pytest.approx(
        log_probability(decoder, features, words), abs=1e-4
    )


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


@pytest.mark.parametrize(("beam", "temperature"), [(1, 0), (4, 0), (4, 5)])
def test_a_batch_gives_what_its_images_give_alone(beam, temperature):
    decoder, features = tiny(7, 8), some_features(7, 32)
    searcher = compiled(BeamSearch(decoder, beam, 0.7, 1, 6, 0, temperature))
    together = predict(searcher, features)
    for image in range(32):
        alone = predict(searcher, features[image : image + 1])
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


@pytest.mark.parametrize("beam", [1, 3])
def test_a_caption_ends_however_unlikely_its_end_is(beam):
    decoder = tiny(3, 5)
    bias = np.zeros(9, "float32")
    bias[END] = -1e6
    decoder.deep_output.logits.bias.assign(bias)
    found = search(decoder, some_features(3, 2), beam, most=4)
    assert (found["words"][:, :, :4] > UNKNOWN).all()
    assert (found["words"][:, :, 4] == END).all()
    assert (found["scores"] > IMPOSSIBLE / 2).all()


@pytest.mark.parametrize("beam", [1, 3])
def test_a_caption_that_would_have_to_repeat_itself_ends_early(beam):
    """Three words, and none may come twice in at least five."""
    decoder, features = tiny(3, 3), some_features(3, 8)
    found = search(decoder, features, beam, least=5, most=6, ngram=1)
    for words in found["words"][:, 0]:
        assert sorted(words[:4]) == [END, 4, 5, 6]
    assert (found["scores"][:, 0] > IMPOSSIBLE / 2).all()


def test_captions_are_sorted_by_score_and_differ():
    found = search(tiny(5, 6), some_features(5, 3), 4, most=5)
    assert (np.diff(found["scores"], axis=1) <= 0).all()
    for words in found["words"]:
        assert len({tuple(each) for each in words}) == 4


def test_consensus_changes_the_order_of_the_beam_and_nothing_else():
    decoder, features = tiny(5, 6), some_features(5, 24)
    likeliest = search(decoder, features, 6, most=5)
    agreed = search(decoder, features, 6, most=5, temperature=5.0)
    cold = search(decoder, features, 6, 0.0, most=5, temperature=1e-3)
    first = search(decoder, features, 6, 0.0, most=5)
    for image in range(24):
        captions = [
            {
                tuple(words): (score, log)
                for words, score, log in zip(
                    found["words"][image],
                    found["scores"][image],
                    found["log_probabilities"][image],
                    strict=True,
                )
                if score > IMPOSSIBLE / 2
            }
            for found in (likeliest, agreed)
        ]
        assert captions[0] == captions[1]
        number = len(captions[0])
        assert (agreed["scores"][image, :number] > IMPOSSIBLE / 2).all()
        # Where the likeliest alone counts, it is most like itself.
        np.testing.assert_array_equal(
            cold["words"][image, 0], first["words"][image, 0]
        )
        if number > 1:
            expected = consensus.agreement(
                agreed["words"][image : image + 1, :number],
                agreed["log_probabilities"][image : image + 1, :number],
                5.0,
            )
            assert (np.diff(np.array(expected)) <= 1e-6).all()
    moved = likeliest["words"][:, 0] != agreed["words"][:, 0]
    assert 0 < moved.any(axis=1).sum() < 24


def test_consensus_leaves_last_what_a_beam_has_no_captions_for():
    decoder, features = tiny(5, 1), some_features(5, 4)
    found = search(decoder, features, 6, most=2, temperature=5.0)
    there = found["scores"] > IMPOSSIBLE / 2
    np.testing.assert_array_equal(there, [[True] * 2 + [False] * 4] * 4)


@pytest.mark.parametrize("temperature", [0.0, 5.0])
def test_the_attention_is_that_of_the_best_caption(temperature):
    decoder, features = tiny(11, 6), some_features(11, 1)
    found = search(decoder, features, 4, most=5, temperature=temperature)
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
    searcher = compiled(BeamSearch(decoder, 2, 0.7, 1, 4))
    forward = caption_rows(searcher, features, np.arange(60), vocabulary)
    backward = caption_rows(searcher, features, np.arange(60)[::-1], vocabulary)
    assert [e.words for e in forward] == [e.words for e in backward[::-1]]
    assert len({each.caption for each in forward}) > 1
    assert max(len(each.n_best) for each in forward) == 2
    for each in forward:
        assert each.words and len(each.words) == len(each.attention)
        assert [one.score for one in each.n_best] == sorted(
            (one.score for one in each.n_best), reverse=True
        )
        assert len({one.caption for one in each.n_best}) == len(each.n_best)
        assert each.caption == each.n_best[0].caption


@pytest.mark.parametrize("n", [1, 2, 3])
def test_no_ngram_comes_twice_where_that_is_asked_for(n):
    decoder, features = tiny(17, 8), some_features(17, 8)
    seen = {}
    for ngram in (0, n):
        found = search(decoder, features, 3, least=6, most=7, ngram=ngram)
        seen[ngram] = [
            repeats([w for w in words if w > UNKNOWN], n)
            for words in found["words"].reshape(-1, 8)
        ]
    assert any(seen[0]) and not any(seen[n])


# --- sampling --------------------------------------------------------------


def test_sampling_is_reproducible_by_its_seed():
    decoder, features = tiny(19, 8), some_features(19, 16)
    one, same, other = (
        sample(decoder, features, seed=seed)["words"] for seed in (4, 4, 5)
    )
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()
    sampler = Sample(decoder, 1.0, 0, 1.0, 4, 4)
    drawn = [np.asarray(sampler(features)["words"]) for _ in range(2)]
    np.testing.assert_array_equal(drawn[0], one)
    assert (drawn[0] != drawn[1]).any()


@pytest.mark.parametrize("settings_", [{"top_k": 1}, {"top_p": 1e-6}])
def test_sampling_from_the_likeliest_word_alone_is_greedy(settings_):
    """With the log-probability of greedy search and its attention, too."""
    decoder, features = tiny(23, 8), some_features(23, 16)
    found = sample(decoder, features, **settings_)
    greedy = search(decoder, features, 1, exponent=0.0, most=4)
    for image in range(16):
        words = greedy["words"][image, 0]
        if END not in words:  # it had to be cut
            words = np.append(words[:4], END)
        else:
            for name in ("scores", "log_probabilities", "attention"):
                np.testing.assert_allclose(
                    found[name][image], greedy[name][image], atol=1e-4
                )
        np.testing.assert_array_equal(found["words"][image, 0], words)


def first_words(decoder, features) -> np.ndarray:
    """The probability of each first word, as sampling allows them."""
    annotations, keys, hidden, cell = decoder.start(features)
    found, *_ = decoder.step(np.array([START]), hidden, cell, keys, annotations)
    likely = np.exp(np.array(found[0], np.float64))
    likely[[PAD, START, END, UNKNOWN]] = 0
    return likely / likely.sum()


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (2.0, 0, 1.0), (1.0, 3, 1.0), (1.5, 0, 0.8), (1.0, 4, 0.7)],
)
def test_words_are_drawn_as_often_as_they_are_likely(temperature, top_k, top_p):
    decoder, features = tiny(29, 8, scale=1.5), some_features(29, 1)
    likely = first_words(decoder, features) ** (1 / temperature)
    likely /= likely.sum()
    order = np.argsort(-likely)
    kept = order[: top_k or len(order)]
    share = likely[kept] / likely[kept].sum()
    kept = kept[np.cumsum(share) - share < top_p]
    expected = np.zeros_like(likely)
    expected[kept] = likely[kept] / likely[kept].sum()
    number = 20_000
    words = sample(
        *(decoder, features, temperature, top_k, top_p),
        samples=number,
        max_length=1,
    )["words"][0, :, 0]
    found = np.bincount(words, minlength=len(likely)) / number
    assert (found[expected == 0] == 0).all()
    # Five standard deviations: by chance once in a million.
    bound = 5 * np.sqrt(expected * (1 - expected) / number) + 1e-9
    assert (np.abs(found - expected) <= bound).all()


@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 10_000), least=st.integers(1, 4))
def test_samples_have_their_least_length_and_no_special_word(seed, least):
    decoder, features = tiny(seed, 5, scale=0.5), some_features(seed, 2)
    found = sample(
        *(decoder, features, 3.0),
        max_length=5,
        seed=seed,
        samples=8,
        min_length=least,
    )
    for image, captions in enumerate(found["words"]):
        for words in captions:
            length = words.tolist().index(END)
            assert least <= length <= 5
            assert (words[:length] > UNKNOWN).all()
            assert (words[length + 1 :] == PAD).all()
        first = captions[0].tolist()
        first = first[: first.index(END) + 1]
        assert found["scores"][image, 0] == pytest.approx(
            log_probability(decoder, features[[image]], first), abs=1e-3
        )


# --- ensembles -------------------------------------------------------------


def test_a_model_with_itself_captions_as_it_does_alone():
    decoder, features = tiny(31, 8), some_features(31, 6)
    alone = search(decoder, features, 3)
    twice = search([decoder, decoder], [features, features], 3)
    for name, each in alone.items():
        np.testing.assert_allclose(twice[name], each, atol=1e-5)


def test_two_models_are_averaged_in_probability_at_every_step():
    """They may differ in their features; each has a state of its own."""
    decoders = [tiny(37, 3), tiny(38, 3)]
    features = [some_features(37, 1), some_features(38, 1)[:, :2]]
    best = (-np.inf, ())
    for length in (1, 2, 3):
        for words in itertools.product(range(4, 7), repeat=length):
            words, total = (*words, END), 0.0
            starts = [
                d.start(f) for d, f in zip(decoders, features, strict=True)
            ]
            states = [each[2:] for each in starts]
            last = START
            for word in words:
                likely = []
                for n, decoder in enumerate(decoders):
                    annotations, keys = starts[n][:2]
                    found, *state, _ = decoder.step(
                        np.array([last]), *states[n], keys, annotations
                    )
                    states[n] = state
                    likely.append(np.exp(float(found[0][word])))
                total += np.log(np.mean(likely))
                last = word
            best = max(best, (total / ((6 + length) / 6) ** 0.7, words))
    found = search(decoders, features, 27)
    assert tuple(found["words"][0, 0][: len(best[1])]) == best[1]
    assert found["scores"][0, 0] == pytest.approx(best[0], abs=1e-4)
    for decoder, each in zip(decoders, features, strict=True):
        alone = search(decoder, each, 27)
        assert alone["scores"][0, 0] != pytest.approx(best[0], abs=1e-3)


def test_the_average_is_of_probabilities():
    one, other = np.log([[0.1, 0.9]]), np.log([[0.5, 0.5]])
    np.testing.assert_allclose(
        np.exp(average([one, other])), [[0.3, 0.7]], rtol=1e-6
    )
