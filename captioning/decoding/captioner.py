"""Features in, captions out: what a search finds, as words and attention."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops
from tqdm import tqdm

from captioning import backend, runs
from captioning.backend import use_xla
from captioning.data import vocabulary
from captioning.data.vocabulary import Vocabulary
from captioning.decoding.search import IMPOSSIBLE, BeamSearch, Sample, average
from captioning.features import encoder_weights, extraction
from captioning.features.joined import Features
from captioning.training.batches import CaptionBatches
from config import Config
from model import CaptioningModel, build_encoder, build_model

BATCH = 50  # images searched at a time


class Hypothesis(NamedTuple):
    """One of the captions that a search found for an image."""

    words: list[str]
    caption: str  # the words as one string
    score: float  # normalised log-probability
    log_probability: float
    # By which consensus orders the beam; 0 without it.
    agreement: float


class Captioned(NamedTuple):
    """What a search gave for an image."""

    n_best: list[Hypothesis]  # the best first
    attention: np.ndarray  # of the best, float32 (words, regions)
    # Of each word of the best, given those before it, float32 (words,).
    probabilities: np.ndarray

    @property
    def words(self) -> list[str]:
        """The words of the best caption."""
        return self.n_best[0].words

    @property
    def caption(self) -> str:
        """The best caption as one string."""
        return self.n_best[0].caption


def load(
    config: Config, run: Path
) -> tuple[keras.Model, BeamSearch, Vocabulary]:
    """Loads everything in a trained run that captioning photographs needs.

    Args:
        config: from `run_configs.decoding_config`.
        run: the run folder.

    Returns:
        Its encoder, the search over its decoder, and its vocabulary.

    Raises:
        UserError: if the encoder has other weights than those of the run.
    """
    backend.set_precision(config)
    encoder_weights.check(config, runs.load_description(run).encoders)
    decoder, words = load_decoder(config, run)
    return build_encoder(config), build(decoder, config), words


def of_photographs(
    config: Config, run: Path, batch: int
) -> Callable[[Sequence[np.ndarray]], list[Captioned]]:
    """A function from the pixels of photographs to the captions of each.

    Args:
        config: from `run_configs.decoding_config`.
        run: the run folder.
        batch: photographs that are encoded and searched at a time.
    """
    encoder, search, words = load(config, run)

    def caption(pixels: Sequence[np.ndarray]) -> list[Captioned]:
        found = []
        for start in range(0, len(pixels), batch):
            some = pixels[start : start + batch]
            features = extraction.encode(
                some, encoder.predict_on_batch, batch=batch
            )
            images = np.arange(len(some))
            found += caption_images(
                search, [features], images, words, batch=batch
            )
        return found

    return caption


def load_decoder(
    config: Config, run: Path
) -> tuple[CaptioningModel, Vocabulary]:
    """Builds the decoder of a trained run, with its best weights.

    Args:
        config: from `run_configs.decoding_config`.
        run: the run folder.

    Returns:
        The decoder and its vocabulary.
    """
    words = runs.load_vocabulary(run)
    _, channels = runs.load_description(run).shape
    decoder = build_model(config, len(words), channels)
    runs.load_weights(decoder, run)
    return decoder, words


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
        config.consensus_samples,
    )
    search.compile(jit_compile=use_xla())
    return search


def caption_images(
    search: BeamSearch,
    features: Sequence[Features | np.ndarray],
    images: np.ndarray,
    words: Vocabulary,
    progress: bool = False,
    batch: int = BATCH,
) -> list[Captioned]:
    """Captions images batch by batch.

    Args:
        search: from `build`.
        features: for each decoder those of the same images, float16 (images,
            regions, channels).
        images: indices of the images to caption, int (n,).
        words: the vocabulary.
        progress: whether to show a bar.
        batch: images to search at a time; for each number, a search is
            compiled.

    Returns:
        The captions of each image.
    """
    captioned: list[Captioned] = []
    with tqdm(total=len(images), unit="image", disable=not progress) as bar:
        for count, some in _batches(features, images, batch):
            found = search.predict_on_batch(some)
            found = {name: np.asarray(each) for name, each in found.items()}
            captioned += [
                _captioned(found, place, words) for place in range(count)
            ]
            bar.update(count)
    return captioned


def sample_images(
    sampler: Sample, features: Features | np.ndarray, images: np.ndarray
) -> np.ndarray:
    """Samples captions of images.

    Args:
        sampler: the search.
        features: float16 (images, regions, channels).
        images: indices of the images to sample for, int (n,).

    Returns:
        Words, int32 (n, samples, steps).
    """
    return np.concatenate(
        [
            np.asarray(sampler.predict_on_batch(batch[0]))[:count]
            for count, batch in _batches([features], images, BATCH)
        ]
    )


def teacher_force(
    decoders: Sequence[CaptioningModel],
    features: Sequence[Features | np.ndarray],
    captions: Sequence[np.ndarray],
    batch_images: int,
) -> Iterator[tuple[dict[str, Any], np.ndarray, np.ndarray, np.ndarray]]:
    """Scores the words of captions, each given the true words before it.

    Args:
        decoders: of one vocabulary.
        features: for each decoder those of the same images, float16 (images,
            regions, channels).
        captions: of each image, int32 (its captions, steps + 1), from
            `vocabulary.encode`.
        batch_images: images per batch.

    Yields:
        Inputs, targets and weights of each batch, and the logits of the one
        decoder or the logarithm of the mean probability of several, float32
        (tokens, vocabulary).
    """
    for decoder in decoders:
        decoder.compile(jit_compile=use_xla())
    batches = [CaptionBatches(x, captions, batch_images) for x in features]
    for place in range(len(batches[0])):
        found = []
        for decoder, each in zip(decoders, batches, strict=True):
            inputs, targets, weights = each[place]
            found.append(decoder.predict_on_batch(inputs))
        if len(found) > 1:
            found = [average([ops.log_softmax(each) for each in found])]
        yield inputs, targets, weights, np.asarray(found[0], np.float32)


def _batches(
    features: Sequence[Features | np.ndarray], images: np.ndarray, size: int
) -> Iterator[tuple[int, list[np.ndarray]]]:
    """How many images of a batch count, and the features of each decoder.

    All batches have one size, so that a search is compiled once.
    """
    for start in range(0, len(images), size):
        some = images[start : start + size]
        yield len(some), [each[np.resize(some, size)] for each in features]


def _captioned(
    found: dict[str, np.ndarray], place: int, words: Vocabulary
) -> Captioned:
    """What a search gave for one image of a batch."""
    n_best = [
        Hypothesis(
            decoded := words.decode(each),
            vocabulary.join(decoded, words.tokeniser),
            *map(float, figures),
        )
        for each, *figures in zip(
            found["words"][place],
            found["scores"][place],
            found["log_probabilities"][place],
            found["agreement"][place],
            strict=True,
        )
        if figures[0] > IMPOSSIBLE / 2
    ]
    length = len(n_best[0].words)
    return Captioned(
        n_best,
        found["attention"][place, :length],
        np.exp(found["word_log_probabilities"][place, :length]),
    )
