"""Beam search for a batch of images as one compiled program."""

from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops
from tqdm import tqdm

from captioning.backend import use_xla
from captioning.vocabulary import END, PAD, START, UNKNOWN, Vocabulary
from config import Config

BATCH = 50  # images searched at a time

# Far below any log-probability, and still finite: infinities become NaN when
# they are multiplied by zero.
IMPOSSIBLE = -1e9


class BeamSearch(keras.Model):
    """Captions features with a trained decoder; greedy is a beam of 1.

    Args:
        decoder: a `model.CaptioningModel`.
        beam_size: hypotheses kept at each step.
        length_exponent: of the length normalisation; 0 is none.
        min_length: the shortest caption, in words.
        max_length: the longest caption, in words.
    """

    def __init__(
        self,
        decoder: keras.Model,
        beam_size: int,
        length_exponent: float,
        min_length: int,
        max_length: int,
    ) -> None:
        super().__init__()
        self.decoder = decoder
        self.beam_size = beam_size
        self.length_exponent = length_exponent
        self.min_length = min_length
        self.max_length = max_length
        size = decoder.settings["vocabulary_size"]
        never = np.zeros(size, np.float32)
        never[[PAD, START, UNKNOWN]] = IMPOSSIBLE
        self.never = never  # (vocabulary,)
        ends = np.zeros(size, np.float32)
        ends[END] = IMPOSSIBLE
        self.ends = ends  # (vocabulary,)

    def build(self, shape: Any) -> None:
        """Nothing to make: the decoder has its weights."""
        self.built = True

    def call(self, features: Any, training: bool = False) -> dict[str, Any]:
        """Captions a batch of images.

        Args:
            features: (images, regions, channels).
            training: has no effect.

        Returns:
            The beam's captions, the best first: `words`, int32 (images, beam,
            max_length + 1), ended by `<end>` and padded; `scores`, float32
            (images, beam), the normalised log-probabilities; and of the best
            `attention`, float32 (images, max_length + 1, regions).
        """
        beam, steps = self.beam_size, self.max_length + 1
        annotations, keys, hidden, cell = self.decoder.start(features)
        images, regions = ops.shape(features)[0], features.shape[1]
        annotations, keys, hidden, cell = (
            ops.repeat(each, beam, axis=0)  # (images * beam, ...)
            for each in (annotations, keys, hidden, cell)
        )
        # At first all hypotheses of an image are the same one.
        scores = ops.broadcast_to(
            ops.convert_to_tensor([0.0] + [IMPOSSIBLE] * (beam - 1)),
            (images, beam),
        )
        words = ops.full((images, beam, steps), PAD, "int32")
        attention = ops.zeros((images, beam, steps, regions), "float32")
        nothing = ops.full((images, beam), IMPOSSIBLE, "float32")
        state = (
            ops.convert_to_tensor(0, "int32"),
            *(words, attention, scores, hidden, cell),
            *(words, attention, nothing),
        )

        def unfinished(step: Any, *state: Any) -> Any:
            _, _, scores, _, _, _, _, ended = state
            # Scores only fall, and the divisor only grows, so that no
            # hypothesis gets better than its score over the last divisor.
            bound = ops.max(scores, axis=1) / self._divisor(float(steps))
            open_ = ops.any(bound > ops.min(ended, axis=1))
            return ops.logical_and(step < steps, open_)

        def advance(step: Any, *state: Any) -> Any:
            return self._advance(step, state, keys, annotations)

        state = ops.while_loop(unfinished, advance, state)
        _, words, attention, scores, _, _, final, shown, ended = state
        # Only where no hypothesis has ended do the others count.
        none = ops.max(ended, axis=1, keepdims=True) <= IMPOSSIBLE / 2
        length = self._divisor(float(self.max_length))
        scores = ops.where(none, scores / length, ended)
        words = ops.where(ops.expand_dims(none, 2), words, final)
        none = ops.expand_dims(none, 2)[:, 0]
        best = ops.where(ops.expand_dims(none, 2), attention[:, 0], shown[:, 0])
        return {"words": words, "scores": scores, "attention": best}

    def _divisor(self, length: Any) -> Any:
        """GNMT's length penalty (Wu et al. 2016, equation 14)."""
        return ((5.0 + length) / 6.0) ** self.length_exponent

    def _advance(
        self, step: Any, state: tuple[Any, ...], keys: Any, annotations: Any
    ) -> tuple[Any, ...]:
        """Makes every hypothesis one word longer, and keeps the best."""
        words, attention, scores, hidden, cell, final, shown, ended = state
        beam = self.beam_size
        images = ops.shape(scores)[0]
        last = ops.take(words, ops.maximum(step - 1, 0), axis=2)
        last = ops.where(step == 0, ops.full_like(last, START), last)
        log_probabilities, hidden, cell, alpha = self.decoder.step(
            ops.reshape(last, (-1,)), hidden, cell, keys, annotations
        )
        size = log_probabilities.shape[-1]
        early = ops.cast(step < self.min_length, "float32")
        log_probabilities = log_probabilities + self.never + early * self.ends
        candidates = ops.expand_dims(scores, 2) + ops.reshape(
            log_probabilities, (images, beam, size)
        )
        # Twice the beam, because at most one candidate a hypothesis ends it:
        # a whole beam of unended ones is among them.
        number = min(2 * beam, beam * size)
        best, place = ops.top_k(
            ops.reshape(candidates, (images, beam * size)), number
        )
        parent, word = place // size, ops.cast(place % size, "int32")
        alpha = ops.reshape(alpha, (images, beam, -1))
        here = ops.arange(self.max_length + 1) == step  # (steps,)

        words = _gather(words, parent)  # (images, number, steps)
        words = ops.where(here, ops.expand_dims(word, 2), words)
        attention = _gather(attention, parent)  # (images, number, steps, r)
        alpha = ops.expand_dims(_gather(alpha, parent), 2)
        attention = ops.where(here[:, None], alpha, attention)

        ends = word == END
        # The divisor counts `<end>`, as the model pays for it.
        length = ops.cast(step, "float32") + 1
        complete = ops.where(ends, best / self._divisor(length), IMPOSSIBLE)
        complete = ops.where(best <= IMPOSSIBLE / 2, IMPOSSIBLE, complete)
        ended, chosen = ops.top_k(ops.concatenate([ended, complete], 1), beam)
        final = _gather(ops.concatenate([final, words], 1), chosen)
        shown = _gather(ops.concatenate([shown, attention], 1), chosen)

        # In the last step only `<end>` was of interest.
        open_ = ops.where(ends, IMPOSSIBLE, best)
        scores_next, chosen = ops.top_k(open_, beam)
        parent = ops.take_along_axis(parent, chosen, axis=1)
        flat = parent + ops.expand_dims(ops.arange(images) * beam, 1)
        flat = ops.reshape(flat, (-1,))
        going = step < self.max_length
        return (
            step + 1,
            ops.where(going, _gather(words, chosen), state[0]),
            ops.where(going, _gather(attention, chosen), state[1]),
            ops.where(going, scores_next, scores),
            ops.take(hidden, flat, axis=0),
            ops.take(cell, flat, axis=0),
            *(final, shown, ended),
        )


def _gather(tensor: Any, place: Any) -> Any:
    """Takes (images, n, ...) at place (images, m): (images, m, ...)."""
    shape = (*place.shape, *[1] * (len(tensor.shape) - 2))
    shape = (-1, *shape[1:])
    return ops.take_along_axis(tensor, ops.reshape(place, shape), axis=1)


class Captioned(NamedTuple):
    """A caption as the search gave it."""

    words: list[str]
    score: float  # normalised log-probability
    attention: np.ndarray  # float32 (words, regions)

    @property
    def caption(self) -> str:
        """The words as one string."""
        return " ".join(self.words)


def build(decoder: keras.Model, config: Config) -> BeamSearch:
    """Makes the search that the decoding fields of a config describe."""
    search = BeamSearch(
        decoder,
        config.beam_size,
        config.length_exponent,
        config.min_caption_length,
        config.max_caption_length,
    )
    search.compile(jit_compile=use_xla())
    return search


def caption_rows(
    search: BeamSearch,
    features: np.ndarray,
    rows: np.ndarray,
    vocabulary: Vocabulary,
    progress: bool = False,
) -> list[Captioned]:
    """Captions rows of features, batch by batch.

    Args:
        search: from `build`.
        features: float16 (all rows, regions, channels).
        rows: which of them.
        vocabulary: the words.
        progress: whether to show a bar.

    Returns:
        The best caption of each row.
    """
    captioned = []
    with tqdm(total=len(rows), unit="image", disable=not progress) as bar:
        for start in range(0, len(rows), BATCH):
            chosen = rows[start : start + BATCH]
            # All batches have one size, so that the search is compiled once.
            filled = np.resize(chosen, BATCH)
            found = search.predict_on_batch(features[filled])
            found = {name: np.asarray(each) for name, each in found.items()}
            for place in range(len(chosen)):
                words = vocabulary.decode(found["words"][place, 0])
                captioned.append(
                    Captioned(
                        words,
                        float(found["scores"][place, 0]),
                        found["attention"][place, : len(words)],
                    )
                )
            bar.update(len(chosen))
    return captioned


def square(attention: np.ndarray) -> np.ndarray:
    """Attention (words, regions) as maps (words, side, side)."""
    side = round(attention.shape[1] ** 0.5)
    return attention.reshape(-1, side, side)
