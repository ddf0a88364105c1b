"""Features in, captions out: what a search finds, as words and attention."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import keras
import numpy as np
from tqdm import tqdm

from captioning.backend import use_xla
from captioning.data.vocabulary import Vocabulary
from captioning.decoding.search import IMPOSSIBLE, BeamSearch, Sample
from captioning.features.cache import read_rows
from config import Config

BATCH = 50  # images searched at a time


class Hypothesis(NamedTuple):
    """One of the captions that a search found for an image."""

    words: list[str]
    score: float  # normalised log-probability
    log_probability: float

    @property
    def caption(self) -> str:
        """The words as one string."""
        return " ".join(self.words)


class Captioned(NamedTuple):
    """What a search gave for an image."""

    n_best: list[Hypothesis]  # the best first
    attention: np.ndarray  # of the best, float32 (words, regions)

    @property
    def words(self) -> list[str]:
        """The words of the best caption."""
        return self.n_best[0].words

    @property
    def caption(self) -> str:
        """The best caption as one string."""
        return self.n_best[0].caption


def build(
    decoders: keras.Model | Sequence[keras.Model], config: Config
) -> BeamSearch:
    """Makes the search that the decoding fields of a config describe."""
    search = BeamSearch(
        decoders,
        config.beam_size,
        config.length_exponent,
        config.min_caption_length,
        config.max_caption_length,
        config.no_repeat_ngram,
        config.consensus_temperature,
    )
    search.compile(jit_compile=use_xla())
    return search


def caption_rows(
    search: BeamSearch,
    features: Sequence[np.ndarray],
    rows: Sequence[np.ndarray],
    vocabulary: Vocabulary,
    progress: bool = False,
) -> list[Captioned]:
    """Captions images whose features are cached, batch by batch.

    Args:
        search: from `build`.
        features: for each decoder, float16 (all rows, regions, channels).
        rows: for each decoder, the rows of the images in its features.
        vocabulary: the words.
        progress: whether to show a bar.

    Returns:
        The captions of each image.
    """
    captioned: list[Captioned] = []
    with tqdm(total=len(rows[0]), unit="image", disable=not progress) as bar:
        for count, batch in _batches(features, rows):
            found = search.predict_on_batch(batch)
            found = {name: np.asarray(each) for name, each in found.items()}
            captioned += [
                _captioned(found, place, vocabulary) for place in range(count)
            ]
            bar.update(count)
    return captioned


def sample_rows(
    sampler: Sample, features: np.ndarray, rows: np.ndarray
) -> np.ndarray:
    """Samples captions for images whose features are cached.

    Args:
        sampler: the search.
        features: float16 (all rows, regions, channels).
        rows: of the images, int (images,).

    Returns:
        Words, int32 (images, samples, steps).
    """
    return np.concatenate(
        [
            np.asarray(sampler.predict_on_batch(batch[0]))[:count]
            for count, batch in _batches([features], [rows])
        ]
    )


def _batches(
    features: Sequence[np.ndarray], rows: Sequence[np.ndarray]
) -> Iterator[tuple[int, list[np.ndarray]]]:
    """How many images of a batch count, and the features of each decoder.

    All batches have one size, so that a search is compiled once.
    """
    images = len(rows[0])
    for start in range(0, images, BATCH):
        batch = [
            read_rows(each, np.resize(row[start : start + BATCH], BATCH))
            for each, row in zip(features, rows, strict=True)
        ]
        yield min(BATCH, images - start), batch


def _captioned(
    found: dict[str, np.ndarray], place: int, vocabulary: Vocabulary
) -> Captioned:
    """What a search gave for one image of a batch."""
    n_best = [
        Hypothesis(vocabulary.decode(words), float(score), float(log))
        for words, score, log in zip(
            found["words"][place],
            found["scores"][place],
            found["log_probabilities"][place],
            strict=True,
        )
        if score > IMPOSSIBLE / 2
    ]
    return Captioned(n_best, found["attention"][place, : len(n_best[0].words)])


def square(attention: np.ndarray) -> np.ndarray:
    """Attention (words, regions) as maps (words, side, side)."""
    side = round(attention.shape[1] ** 0.5)
    return attention.reshape(-1, side, side)
