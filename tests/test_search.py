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
from captioning.decoding import captioner, consensus
from captioning.decoding.search import IMPOSSIBLE, BeamSearch, Sample
from model import CaptioningModel

pytestmark = pytest.mark.usefixtures("float32")
REGIONS, CHANNELS = 4, 3


def tiny(seed: int, words: int, scale: float = 3.0) -> CaptioningModel:
    """A random model whose probabilities are far from even."""
    keras.utils.set_random_seed(seed)
    decoder = CaptioningModel(
        len(SPECIAL_WORDS) + words,
        decoder_units=5,
        attention_units=4,
        embedding_units=4,
    )
    decoder.build((None, None, CHANNELS))
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


def sample(decoder, features, samples=1, max_length=4, seed=1):
    sampler = Sample(decoder, samples, max_length, seed)
    return np.asarray(compiled(sampler, once=True).predict_on_batch(features))


def some_features(seed: int, images: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    return random.normal(size=(images, REGIONS, CHANNELS)).astype("float32")


class Steps:
    """The decoder, step by step, for hypotheses of one image.

    Args:
        decoder: the model.
        features: of the image (1, regions, channels).
    """

    def __init__(self, decoder, features) -> None:
        self.decoder = decoder
        annotations, keys, *state = decoder.start(features)
        self.shown = decoder.step.cast_weights(), keys, annotations
        self.state = [each[:, None] for each in state]

    def __call__(self, *words: int) -> tuple[np.ndarray, np.ndarray]:
        """Takes the last word of each hypothesis.

        Returns:
            Log-probabilities, float64 (hypotheses, vocabulary), and attention
            (hypotheses, regions).
        """
        found, *self.state, alpha = self.decoder.next_word(
            np.array([words], np.int32), *self.state, *self.shown
        )
        return np.array(found[0], np.float64), np.array(alpha[0])

    def split(self, number: int) -> None:
        """Makes so many of each hypothesis."""
        self.state = [np.repeat(each, number, axis=1) for each in self.state]


def log_probability(decoder, features, words) -> float:
    """Of a sequence of words for one image, step by step."""
    steps = Steps(decoder, features)
    before = [START, *words[:-1]]
    return sum(
        steps(last)[0][0, word]
        for last, word in zip(before, words, strict=True)
    )


def ngrams(words, n: int) -> list[tuple[int, ...]]:
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def repeats(words, n: int) -> bool:
    """Whether n words in a row come twice; never for n = 0."""
    found = ngrams(words, n)
    return n > 0 and len(set(found)) < len(found)


def exhaustive(decoders, features, exponent, least, most, ngram=0):
    """The best of all captions there are, and its normalised score.

    Every caption of a length stands beside every other: nothing is pruned. Of
    several decoders, the probabilities are averaged at every word.
    """
    content = np.arange(len(SPECIAL_WORDS), decoders[0].vocabulary_size)
    steps = [Steps(d, f) for d, f in zip(decoders, features, strict=True)]
    captions, totals, best = [()], np.zeros(1), (-np.inf, ())
    for length in range(most + 1):
        last = [words[-1] if words else START for words in captions]
        likely = [np.exp(each(*last)[0]) for each in steps]
        found = np.log(np.mean(likely, axis=0))  # (captions, vocabulary)
        for words, score in zip(captions, totals + found[:, END], strict=True):
            if length >= least and not repeats(words, ngram):
                score /= ((6 + length) / 6) ** exponent
                best = max(best, (score, (*words, END)))
        captions = [(*words, w) for words in captions for w in content.tolist()]
        totals = (totals[:, None] + found[:, content]).ravel()
        for each in steps:
            each.split(len(content))
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
    score, words = exhaustive([decoder], [features], exponent, least, 3, ngram)
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
    steps, last, words = Steps(decoder, features), START, []
    for step in range(4):
        (allowed,), _ = steps(last)
        allowed[[PAD, START, UNKNOWN]] = -np.inf
        if step == 0:
            allowed[END] = -np.inf
        last = int(allowed.argmax())
        if step == 3 or last == END:
            break
        words.append(last)
    found = search(decoder, features, 1)["words"][0, 0]
    assert [w for w in found if w not in (END, PAD)] == words


@pytest.mark.parametrize(
    ("beam", "temperature", "samples"),
    [(1, 0, 0), (4, 0, 0), (4, 5, 0), (4, 5, 3), (4, 5, 10)],
)
def test_a_batch_gives_what_its_images_give_alone(beam, temperature, samples):
    decoder, features = tiny(7, 8), some_features(7, 32)
    searcher = compiled(
        BeamSearch(decoder, beam, 0.7, 1, 6, 0, temperature, samples)
    )
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
    decoder.logits.bias.assign(bias)
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


def test_agreement_with_samples_is_the_expected_similarity():
    """Three words, and captions of one or two of them."""
    decoder, features = tiny(5, 3), some_features(5, 1)
    searcher = BeamSearch(decoder, 12, 0.7, 1, 2, 0, 5.0, samples=12_000)
    found = predict(compiled(searcher), features)
    captions, likely = [], []
    for first in (4, 5, 6):
        steps = Steps(decoder, features)
        begun = sharpened(steps(START)[0][0, 4:])[first - 4]
        (after,), _ = steps(first)
        after = sharpened(after[[END, 4, 5, 6]])
        captions += [(first, END, PAD), *((first, w, END) for w in (4, 5, 6))]
        likely += (begun * after).tolist()
    words, log = found["words"], found["log_probabilities"]
    similar = consensus.similarity(words[0], np.array(captions))
    beam = np.array(consensus.agreement(words, log, 5.0))[0]
    expected = 0.9 * np.array(similar) @ likely + 0.1 * beam
    np.testing.assert_allclose(found["agreement"][0], expected, atol=0.01)
    assert (np.diff(expected) < 0.01).all()


@pytest.mark.parametrize("samples", [1, 4, 10])
def test_as_many_captions_are_sampled_as_asked(monkeypatch, samples):
    """Whatever multiple of the beam they are."""
    decoder, features = tiny(5, 3), some_features(5, 2)
    compared = []

    def agreement(words, log_probabilities, temperature, samples):
        compared.append(samples.shape)
        return log_probabilities

    monkeypatch.setattr(consensus, "agreement", agreement)
    BeamSearch(decoder, 4, 0.7, 1, 6, 0, 5.0, samples)(features)
    assert compared == [(2, samples, 7)]


def sharpened(log_probabilities) -> np.ndarray:
    """Probabilities at the temperature of the samples."""
    likely = np.exp(log_probabilities / 0.85)
    return likely / likely.sum()


def test_consensus_leaves_last_what_a_beam_has_no_captions_for():
    decoder, features = tiny(5, 1), some_features(5, 4)
    found = search(decoder, features, 6, most=2, temperature=5.0)
    there = found["scores"] > IMPOSSIBLE / 2
    np.testing.assert_array_equal(there, [[True] * 2 + [False] * 4] * 4)


@pytest.mark.parametrize("temperature", [0.0, 5.0])
def test_attention_and_probabilities_are_those_of_the_best(temperature):
    decoder, features = tiny(11, 6), some_features(11, 1)
    found = search(decoder, features, 4, most=5, temperature=temperature)
    steps, last = Steps(decoder, features), START
    for word, attention, probability in zip(
        found["words"][0, 0],
        found["attention"][0],
        found["word_log_probabilities"][0],
        strict=True,
    ):
        alpha, wanted = np.zeros((1, REGIONS)), 0
        if word != PAD:
            scored, alpha = steps(last)
            wanted = scored[0, word]
        np.testing.assert_allclose(attention, alpha[0], atol=1e-5)
        assert probability == pytest.approx(wanted, abs=1e-4)
        last = word
    assert (np.diff(found["agreement"]) <= 0).all()
    assert bool(found["agreement"].any()) == bool(temperature)


def test_images_are_captioned_in_their_order():
    """Batch by batch; the last batch has fewer."""
    decoder, features = tiny(13, 6), some_features(13, 60)
    assert len(features) % captioner.BATCH
    vocabulary = Vocabulary((*SPECIAL_WORDS, *"abcdef"))
    searcher = compiled(BeamSearch(decoder, 2, 0.7, 1, 4))
    forward, backward = (
        captioner.caption_images(searcher, [features], places, vocabulary)
        for places in (np.arange(60), np.arange(60)[::-1])
    )
    assert [e.words for e in forward] == [e.words for e in backward[::-1]]
    whole = predict(searcher, features)["words"]
    assert [[one.words for one in each.n_best] for each in forward] == [
        [vocabulary.decode(words) for words in each if words[0] != PAD]
        for each in whole
    ]
    assert len({each.caption for each in forward}) > 1
    for each in forward:
        assert each.words and len(each.words) == len(each.attention)
        assert each.caption == each.n_best[0].caption == " ".join(each.words)


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
        sample(decoder, features, seed=seed) for seed in (4, 4, 5)
    )
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()
    sampler = Sample(decoder, 1, 4, 4)
    sampled = [np.asarray(sampler(features)) for _ in range(2)]
    np.testing.assert_array_equal(sampled[0], one)
    assert (sampled[0] != sampled[1]).any()


def test_words_are_sampled_as_often_as_they_are_likely():
    """The second word, too, and after the first word that was sampled."""
    decoder, features = tiny(29, 5, scale=1.5), some_features(29, 1)
    content = np.arange(len(SPECIAL_WORDS), decoder.vocabulary_size)
    steps = Steps(decoder, features)
    (first,), _ = steps(START)
    steps.split(len(content))
    second, _ = steps(*content)  # (words, vocabulary)
    possible = [END, *content]
    first, second = np.exp(first), np.exp(second[:, possible])
    expected = first[content][:, None] * second
    expected /= first[possible].sum() * second.sum(1, keepdims=True)
    expected = np.append(expected, 1 - expected.sum())  # for no word at all
    number = 20_000
    words = sample(decoder, features, number, max_length=2)[0]
    pairs = np.zeros((decoder.vocabulary_size,) * 2)
    np.add.at(pairs, (words[:, 0], words[:, 1]), 1 / number)
    found = np.append(pairs[content][:, possible], pairs[END, PAD])
    assert found.sum() == pytest.approx(1)
    # Five standard deviations: by chance once in a million.
    bound = 5 * np.sqrt(expected * (1 - expected) / number)
    assert (np.abs(found - expected) <= bound).all()


@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_samples_have_at_most_their_length_and_no_special_word(seed):
    decoder, features = tiny(seed, 5, scale=0.5), some_features(seed, 2)
    found = sample(decoder, features, 8, 5, seed)
    assert found.shape == (2, 8, 6)
    for words in found.reshape(-1, 6):
        length = words.tolist().index(END)
        assert length <= 5
        assert (words[:length] > UNKNOWN).all()
        assert (words[length + 1 :] == PAD).all()


def test_images_are_sampled_in_their_order():
    """Where only one word is likely after each image, it is sampled."""
    decoder, features = tiny(13, 6, scale=30.0), some_features(13, 60)
    sampler = compiled(Sample(decoder, 2, 4, 1))
    forward, backward = (
        captioner.sample_images(sampler, features, places)
        for places in (np.arange(60), np.arange(60)[::-1])
    )
    assert forward.shape == (60, 2, 5)
    same = (forward == backward[::-1]).all(axis=(1, 2))
    assert same.mean() > 0.9 and len(np.unique(forward, axis=0)) > 3


# --- ensembles -------------------------------------------------------------


def test_two_models_are_averaged_in_probability_at_every_step():
    """They may differ in their features; each has a state of its own."""
    decoders = [tiny(37, 3), tiny(38, 3)]
    features = [some_features(37, 1), some_features(38, 1)[:, :2]]
    score, words = exhaustive(decoders, features, 0.7, 1, 3)
    found = search(decoders, features, 27)
    assert tuple(found["words"][0, 0][: len(words)]) == words
    assert found["scores"][0, 0] == pytest.approx(score, abs=1e-4)
    for decoder, each in zip(decoders, features, strict=True):
        alone = search(decoder, each, 27)
        assert alone["scores"][0, 0] != pytest.approx(score, abs=1e-3)
