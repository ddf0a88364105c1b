"""A warm start: a decoder begins with the weights of a trained run.

Words that both vocabularies have keep what the run knows of them; the others
start from random weights.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from captioning import runs
from captioning.data.vocabulary import Vocabulary
from captioning.decoding import captioner
from config import Config, UserError, flag, group
from model import CaptioningModel


def check(
    config: Config,
    run: Path,
    descriptions: Sequence[dict[str, Any]],
    shape: tuple[int, ...],
) -> None:
    """Checks that a decoder can start from a run.

    Args:
        config: its model fields shape the decoder.
        run: the run folder.
        descriptions: of the features of each encoder.
        shape: of an image's features, (regions, channels).

    Raises:
        UserError: if there is no such run, or it has no weights yet, another
            decoder or other features.
    """
    trained = runs.load_config(run)
    named = ["encoder", "image_size", "magnification", *group("model")]
    flags = [
        f"{flag(name)} {getattr(trained, name)}"
        for name in named
        if getattr(config, name) != getattr(trained, name)
    ]
    runs.weights(run)
    its_descriptions, its_shape, _ = runs.load_description(run)
    weights = [each["weights"] for each in its_descriptions]
    if not flags and weights != [each["weights"] for each in descriptions]:
        flags = [f"--encoder-weights of {' and '.join(weights)}"]
    if flags or (its_descriptions, its_shape) != ([*descriptions], shape):
        raise UserError(
            f"this run cannot start from {run}, whose model is different: give "
            f"{' '.join(flags) or 'the same encoder'} to preprocess.py and "
            "train.py"
        )


def start_from(decoder: CaptioningModel, words: Vocabulary, run: Path) -> None:
    """Gives a decoder the weights of a run, and tells how many words it knows.

    Args:
        decoder: built, with random weights.
        words: its vocabulary.
        run: the run folder; `check` has passed it.
    """
    trained, known = captioner.load_decoder(runs.load_config(run), run)
    both = [word for word in words.words if word in known.numbers]
    mine = [words.numbers[word] for word in both]
    theirs = [known.numbers[word] for word in both]
    # The axis of the vocabulary in the weights that have one.
    axes = {
        decoder.embedding.embeddings.path: 0,
        decoder.logits.kernel.path: 1,
        decoder.logits.bias.path: 0,
    }
    for weight, source in zip(decoder.weights, trained.weights, strict=True):
        value = source.numpy()
        if weight.path in axes:
            axis = axes[weight.path]
            rows = np.moveaxis(weight.numpy().copy(), axis, 0)
            rows[mine] = np.moveaxis(value, axis, 0)[theirs]
            value = np.moveaxis(rows, 0, axis)
        weight.assign(value)
    print(
        f"Starting from {run}, which knows {len(both):,} of {len(words):,} "
        f"{words.tokeniser}"
    )
