"""Beam search and sampling, for a batch of images as one compiled program.

Both take one decoder or several; of several, the probabilities of the next
word are averaged at every step.
"""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from captioning.data.vocabulary import END, PAD, START, UNKNOWN
from captioning.decoding import consensus

# Far below any log-probability, and still finite: infinities become NaN when
# they are multiplied by zero.
IMPOSSIBLE = -1e9
# Sharpens the samples for the consensus: label smoothing gives each unlikely
# word a little probability, and all of them together too much. At 1, CIDEr on
# Flickr8k's validation split is 0.006 lower (2026-11-30).
SAMPLE_TEMPERATURE = 0.85


class _Search(keras.Model):
    """What beam search and sampling have in common.

    Args:
        decoders: a `model.CaptioningModel`, or several of one vocabulary.
        hypotheses: how many captions of an image are written at a time.
        min_length: the shortest caption, in words.
        max_length: the longest caption, in words.
    """

    def __init__(
        self,
        decoders: keras.Model | Sequence[keras.Model],
        hypotheses: int,
        min_length: int,
        max_length: int,
    ) -> None:
        super().__init__()
        self.decoders = keras.tree.flatten(decoders)
        self.hypotheses = hypotheses
        self.min_length = min_length
        self.max_length = max_length
        self.size = self.decoders[0].vocabulary_size
        self.never = never(self.size)
        ends = np.zeros(self.size, np.float32)
        ends[END] = IMPOSSIBLE
        self.ends = ends  # (vocabulary,)
        # The decoders have their weights. JAX would compile the loop a second
        # time, to build what is not built.
        self.built = True

    def start(self, features: Any) -> tuple[list[Any], list[Any]]:
        """What decoding starts from.

        Args:
            features: (images, regions, channels) for each decoder.

        Returns:
            For each decoder, what stays: the weights of a step, keys and
            annotation vectors (images, regions, units); and what each step
            changes: h and c (images, hypotheses, units).
        """
        fixed, states = [], []
        for decoder, each in zip(self.decoders, features, strict=True):
            annotations, keys, *state = decoder.start(each)
            fixed.append((decoder.step.cast_weights(), keys, annotations))
            states.append(
                [
                    ops.repeat(ops.expand_dims(one, 1), self.hypotheses, axis=1)
                    for one in state
                ]
            )
        return fixed, states

    def step(
        self, last: Any, states: list[Any], fixed: list[Any]
    ) -> tuple[Any, list[Any], Any]:
        """Scores the next word of each hypothesis.

        Args:
            last: the word before, int32 (images, hypotheses).
            states: from `start` or the step before.
            fixed: from `start`.

        Returns:
            Log-probabilities of the decoders' average, float32 (images,
            hypotheses, vocabulary); the next states; attention of the first
            decoder (images, hypotheses, regions).
        """
        found, states_next, attention = [], [], []
        for decoder, state, shown in zip(
            self.decoders, states, fixed, strict=True
        ):
            log_probabilities, *state, alpha = decoder.next_word(
                last, *state, *shown
            )
            found.append(log_probabilities)
            states_next.append(state)
            attention.append(alpha)
        return average(found), states_next, attention[0]

    def sample(
        self,
        states: list[Any],
        fixed: list[Any],
        chance: Any,
        temperature: float = 1.0,
    ) -> Any:
        """Samples captions.

        Args:
            states: from `start`.
            fixed: from `start`.
            chance: uniform in [0, 1), (steps, images, hypotheses); with one
                image, all images share it.
            temperature: below 1, likely words get likelier.

        Returns:
            Words, int32 (images, hypotheses, steps), ended by `<end>` and
            padded.
        """
        steps, shape = self.max_length + 1, ops.shape(states[0][1])[:2]
        state = (
            ops.convert_to_tensor(0, "int32"),
            ops.full((steps, *shape), PAD, "int32"),
            ops.full(shape, START, "int32"),
            states,
        )

        def unfinished(step: Any, words: Any, last: Any, states: Any) -> Any:
            return ops.logical_and(step < steps, ops.any(_is_open(last)))

        def advance(step: Any, words: Any, last: Any, states: Any) -> Any:
            found, states, _ = self.step(last, states, fixed)
            found = found / temperature + self.mask(step)
            word = _draw(found, chance[step])
            word = ops.where(_is_open(last), word, PAD)
            at = ops.reshape(step, (1, 1))
            words = ops.scatter_update(words, at, word[None])
            return step + 1, words, word, states

        _, words, _, _ = ops.while_loop(unfinished, advance, state)
        return ops.transpose(words, (1, 2, 0))

    def mask(self, step: Any) -> Any:
        """What is added to log-probabilities: which words may not come.

        After the longest caption only `<end>` may.
        """
        early = ops.cast(step < self.min_length, "float32")
        late = ops.cast(step == self.max_length, "float32")
        late = late * (IMPOSSIBLE - self.ends)
        return self.never + early * self.ends + late  # (vocabulary,)


class BeamSearch(_Search):
    """Captions features with trained decoders; greedy is a beam of 1.

    Args:
        decoders: a `model.CaptioningModel`, or several of one vocabulary.
        beam_size: hypotheses kept at each step.
        length_exponent: of the length normalisation; 0 is none.
        min_length: the shortest caption, in words.
        max_length: the longest caption, in words.
        no_repeat_ngram: no n-gram of this many words occurs twice in a
            caption; 0 allows any.
        consensus_temperature: of the hypotheses' weights in choosing the one
            they agree with most; 0 chooses the one with the highest score.
        samples: captions to sample and compare the beam with; 0 compares the
            beam with itself.
    """

    def __init__(
        self,
        decoders: keras.Model | Sequence[keras.Model],
        beam_size: int,
        length_exponent: float,
        min_length: int,
        max_length: int,
        no_repeat_ngram: int = 0,
        consensus_temperature: float = 0.0,
        samples: int = 0,
    ) -> None:
        super().__init__(decoders, beam_size, min_length, max_length)
        self.length_exponent = length_exponent
        self.no_repeat_ngram = no_repeat_ngram
        self.consensus_temperature = consensus_temperature
        self.samples = samples
        # A round samples as many captions as the beam has, and takes as much
        # memory. The chance is the same for all images, so that a caption
        # depends on its image alone.
        rounds = -(-samples // beam_size)
        shape = rounds, max_length + 1, 1, beam_size
        chance = np.random.default_rng(0).random(shape, np.float32)
        self.chance = chance  # (rounds, steps, 1, hypotheses)

    def call(self, features: Any) -> dict[str, Any]:
        """Captions a batch of images.

        Args:
            features: (images, regions, channels), or a list of such, one
                for each decoder.

        Returns:
            The beam's captions, the best first (see `_best_first`): `words`,
            int32 (images, beam, max_length + 1), ended by `<end>` and padded;
            `scores`, float32 (images, beam), normalised log-probabilities;
            `log_probabilities`, the same before; `agreement`, float32 (images,
            beam), by which consensus orders them; and of the best, for each
            word, `attention`, float32 (images, max_length + 1, regions), and
            `word_log_probabilities`, float32 (images, max_length + 1).
        """
        features = keras.tree.flatten(features)
        beam, steps = self.hypotheses, self.max_length + 1
        images, regions = ops.shape(features[0])[0], features[0].shape[1]
        fixed, started = self.start(features)
        # At first all hypotheses of an image are the same one.
        scores = ops.broadcast_to(
            ops.convert_to_tensor([0.0] + [IMPOSSIBLE] * (beam - 1)),
            (images, beam),
        )
        # Where each word of a hypothesis stood among the candidates of its
        # step: hypothesis * vocabulary + word. The hypothesis says at the end
        # which attention was the word's; attention itself never moves.
        places = ops.full((images, beam, steps), PAD, "int32")
        attention = ops.zeros((steps, images, beam, regions), "float32")
        totals = ops.zeros((steps, images, beam), "float32")  # before a word
        nothing = ops.full((images, beam), IMPOSSIBLE, "float32")
        state = (
            ops.convert_to_tensor(0, "int32"),
            places,
            scores,
            started,
            attention,
            totals,
            places,
            nothing,
        )

        def unfinished(step: Any, *state: Any) -> Any:
            _, scores, *_, ended = state
            # Scores only fall, and the divisor only grows, so that no
            # hypothesis gets better than its score over the last divisor.
            bound = ops.max(scores, axis=1) / self._divisor(float(steps))
            open_ = ops.any(bound > ops.min(ended, axis=1))
            return ops.logical_and(step < steps, open_)

        def advance(step: Any, *state: Any) -> Any:
            return self._advance(step, state, fixed)

        state = ops.while_loop(unfinished, advance, state)
        *_, attention, totals, final, ended = state
        samples = None
        if self.samples and self.consensus_temperature and beam > 1:
            samples = self._samples(started, fixed)
        scores, places, agreement = self._best_first(ended, final, samples)
        words = places % self.size
        log_probabilities = self._log_probabilities(scores, words)
        best = ops.transpose(places[:, 0] // self.size)  # (steps, images)
        totals = ops.take_along_axis(totals, best[:, :, None], axis=2)
        best = ops.take_along_axis(attention, best[:, :, None, None], axis=2)
        best = ops.transpose(best[:, :, 0], (1, 0, 2))
        there = words[:, 0] != PAD  # (images, steps)
        return {
            "words": words,
            "scores": scores,
            "log_probabilities": log_probabilities,
            "agreement": agreement,
            "attention": ops.where(there[:, :, None], best, 0.0),
            "word_log_probabilities": _steps_of(
                ops.transpose(totals[:, :, 0]), log_probabilities[:, :1], there
            ),
        }

    def _samples(self, started: list[Any], fixed: list[Any]) -> Any:
        """Samples captions for the consensus.

        Args:
            started: from `start`.
            fixed: from `start`.

        Returns:
            Words, int32 (images, samples, steps).
        """
        rounds, steps, _, beam = self.chance.shape
        images = ops.shape(started[0][0])[0]
        chance = ops.convert_to_tensor(self.chance)

        def advance(step: Any, words: Any) -> Any:
            found = self.sample(
                started, fixed, chance[step], SAMPLE_TEMPERATURE
            )
            at = ops.reshape(step, (1, 1))
            return step + 1, ops.scatter_update(words, at, found[None])

        # Not `ops.map`, which runs the first round twice on TensorFlow.
        state = (
            ops.convert_to_tensor(0, "int32"),
            ops.full((rounds, images, beam, steps), PAD, "int32"),
        )
        _, words = ops.while_loop(lambda step, _: step < rounds, advance, state)
        words = ops.transpose(words, (1, 0, 2, 3))
        words = ops.reshape(words, (-1, rounds * beam, steps))
        return words[:, : self.samples]

    def _best_first(
        self, scores: Any, places: Any, samples: Any
    ) -> tuple[Any, Any, Any]:
        """Puts first the caption with the highest agreement, if asked to.

        Args:
            scores: float32 (images, beam), the highest first.
            places: int32 (images, beam, steps), see `call`.
            samples: from `_samples`; None to ask the beam alone.

        Returns:
            Both in their order, and the agreement, float32 (images, beam); 0
            where it is not asked for.
        """
        if not self.consensus_temperature or self.hypotheses == 1:
            return scores, places, ops.zeros_like(scores)
        words = places % self.size
        agreement = consensus.agreement(
            words,
            self._log_probabilities(scores, words),
            self.consensus_temperature,
            samples,
        )
        # Last where the beam found fewer captions than it is wide.
        agreement = ops.where(scores <= IMPOSSIBLE / 2, -1.0, agreement)
        agreement, order = ops.top_k(agreement, self.hypotheses)
        order = ops.cast(order, "int32")
        scores = ops.take_along_axis(scores, order, axis=1)
        return scores, _gather(places, order), agreement

    def _log_probabilities(self, scores: Any, words: Any) -> Any:
        """Scores (images, beam) of words (images, beam, steps) as they were."""
        length = ops.sum(ops.cast(words != PAD, "float32"), axis=2)
        return scores * self._divisor(length)

    def _divisor(self, length: Any) -> Any:
        """GNMT's length penalty (Wu et al. 2016, equation 14)."""
        return ((5.0 + length) / 6.0) ** self.length_exponent

    def _advance(
        self, step: Any, state: tuple[Any, ...], fixed: list[Any]
    ) -> tuple[Any, ...]:
        """Makes every hypothesis one word longer, and keeps the best."""
        places, scores, states, attention, totals, final, ended = state
        beam, size = self.hypotheses, self.size
        images = ops.shape(scores)[0]
        words = places % size  # (images, beam, steps)
        last = ops.take(words, ops.maximum(step - 1, 0), axis=2)
        last = ops.where(step == 0, ops.full_like(last, START), last)
        log_probabilities, states, alpha = self.step(last, states, fixed)
        at = ops.reshape(step, (1, 1))
        attention = ops.scatter_update(attention, at, alpha[None])
        totals = ops.scatter_update(totals, at, scores[None])
        candidates = log_probabilities + self.mask(step)
        if self.no_repeat_ngram:
            candidates = candidates + self._repeated(step, words)
            # Where every word would repeat something, a caption may end
            # before its least length.
            stuck = ops.max(candidates, axis=2, keepdims=True)
            stuck = ops.logical_and(stuck <= IMPOSSIBLE / 2, self.ends < 0)
            candidates = ops.where(stuck, log_probabilities, candidates)
        candidates = ops.expand_dims(scores, 2) + candidates
        # Twice the beam, because at most one candidate a hypothesis ends it:
        # a whole beam of unended ones is among them. A beam of one is greedy:
        # the best candidate counts, whatever it is.
        number = min(2 * beam, beam * size) if beam > 1 else 1
        best, place = ops.top_k(
            ops.reshape(candidates, (images, beam * size)), number
        )
        place = ops.cast(place, "int32")  # (images, number)
        here = ops.arange(self.max_length + 1) == step  # (steps,)
        longer = _gather(places, place // size)  # (images, number, steps)
        longer = ops.where(here, ops.expand_dims(place, 2), longer)

        ends = place % size == END
        # The divisor counts `<end>`, as the model pays for it.
        length = ops.cast(step, "float32") + 1
        complete = ops.where(ends, best / self._divisor(length), IMPOSSIBLE)
        complete = ops.where(best <= IMPOSSIBLE / 2, IMPOSSIBLE, complete)
        ended, chosen = ops.top_k(ops.concatenate([ended, complete], 1), beam)
        final = _gather(ops.concatenate([final, longer], 1), chosen)

        open_ = ops.where(ends, IMPOSSIBLE, best)
        scores_next, chosen = ops.top_k(open_, beam)
        parent = ops.take_along_axis(place // size, chosen, axis=1)
        return (
            step + 1,
            _gather(longer, chosen),
            scores_next,
            keras.tree.map_structure(
                lambda each: _gather(each, parent), states
            ),
            attention,
            totals,
            final,
            ended,
        )

    def _repeated(self, step: Any, words: Any) -> Any:
        """What is added so that no n-gram comes twice.

        Args:
            step: how many words the hypotheses have.
            words: theirs, int32 (images, beam, steps).

        Returns:
            Float32 (images, beam, vocabulary): far below 0 for a word that
            followed the last n - 1 words before.
        """
        before = self.no_repeat_ngram - 1
        shape = ops.shape(words)
        # The words that follow `before` others, and whether these are the
        # last ones of the hypothesis.
        follow = words[:, :, before:]  # (images, beam, starts)
        starts = ops.arange(follow.shape[2])
        same = starts + before < step
        for place in range(before):
            last = ops.maximum(step - before + place, 0)
            last = ops.expand_dims(ops.take(words, last, axis=2), 2)
            each = words[:, :, place : place + follow.shape[2]]
            same = ops.logical_and(same, each == last)
        same = ops.broadcast_to(same, ops.shape(follow))
        row = ops.reshape(ops.arange(shape[0] * shape[1]), (*shape[:2], 1))
        index = ops.reshape(row * self.size + follow, (-1, 1))
        found = ops.scatter(
            index,
            ops.reshape(ops.where(same, IMPOSSIBLE, 0.0), (-1,)),
            (shape[0] * shape[1] * self.size,),
        )
        return ops.reshape(found, (*shape[:2], self.size))


class Sample(_Search):
    """Samples captions from a decoder.

    Args:
        decoder: a `model.CaptioningModel`.
        samples: captions per image.
        max_length: the longest caption, in words.
        seed: of the random numbers.
    """

    def __init__(
        self,
        decoder: keras.Model,
        samples: int,
        max_length: int,
        seed: int,
    ) -> None:
        # No least length: what may not be sampled is never punished by
        # self-critical training, and would get likelier.
        super().__init__(decoder, samples, 0, max_length)
        self.seed = keras.random.SeedGenerator(seed)

    def call(self, features: Any) -> Any:
        """Samples captions for a batch of images.

        Args:
            features: (images, regions, channels).

        Returns:
            Words, int32 (images, samples, max_length + 1), ended by `<end>`
            and padded.
        """
        fixed, states = self.start([features])
        shape = self.max_length + 1, ops.shape(features)[0], self.hypotheses
        # All random numbers are drawn before the loop: a random state cannot
        # change inside of it on every backend.
        chance = keras.random.uniform(shape, seed=self.seed)
        return self.sample(states, fixed, chance)


def _steps_of(totals: Any, last: Any, there: Any) -> Any:
    """The difference that each word of a caption makes to a running total.

    Args:
        totals: before each word, (images, steps).
        last: after the last word, (images, 1).
        there: bool (images, steps), where there is a word.

    Returns:
        (images, steps), 0 where there is no word.
    """
    after = ops.pad(totals[:, 1:], ((0, 0), (0, 1)))
    follows = ops.pad(there[:, 1:], ((0, 0), (0, 1)))
    return ops.where(there, ops.where(follows, after, last) - totals, 0.0)


def _is_open(last: Any) -> Any:
    """Whether a caption goes on after its last word."""
    return ops.logical_and(last != END, last != PAD)


def _draw(log_probabilities: Any, chance: Any) -> Any:
    """Samples a word for each caption.

    Args:
        log_probabilities: (images, samples, vocabulary).
        chance: uniform in [0, 1), (images, samples).

    Returns:
        int32 (images, samples).
    """
    total = ops.cumsum(ops.softmax(log_probabilities), axis=-1)
    # The first word whose running total exceeds the chance; a word without
    # probability never does. Rounding must not reach the end.
    chance = ops.minimum(ops.expand_dims(chance, -1), 1 - 1e-6)
    below = total <= chance * total[:, :, -1:]
    return ops.cast(ops.sum(ops.cast(below, "int32"), axis=-1), "int32")


def never(size: int) -> np.ndarray:
    """What is added to log-probabilities so that no special word is chosen.

    Args:
        size: of the vocabulary.

    Returns:
        Float32 (size,).
    """
    added = np.zeros(size, np.float32)
    added[[PAD, START, UNKNOWN]] = IMPOSSIBLE
    return added


def average(log_probabilities: Sequence[Any]) -> Any:
    """The logarithm of the mean probability; all have one shape."""
    if len(log_probabilities) == 1:
        return log_probabilities[0]
    together = ops.logsumexp(ops.stack(log_probabilities), axis=0)
    return together - float(np.log(len(log_probabilities)))


def _gather(tensor: Any, place: Any) -> Any:
    """Takes (images, n, k) at place (images, m): (images, m, k)."""
    images, number, width = ops.shape(tensor)
    flat = ops.reshape(tensor, (images * number, width))
    first = ops.expand_dims(ops.arange(images) * number, 1)  # (images, 1)
    return ops.take(flat, first + place, axis=0)
