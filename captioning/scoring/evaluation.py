"""What the decoder of a run, or of several, makes of a split."""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from captioning import backend, runs
from captioning.data.prepared import Split
from captioning.data.vocabulary import Vocabulary, encode
from captioning.decoding import captioner
from captioning.features import encoder_weights, store
from captioning.features.joined import Features
from captioning.scoring import teacher_forced
from config import Config
from model import CaptioningModel

Member = tuple[Config, Path]  # of the runs that are averaged


def in_one_precision(members: Sequence[Member]) -> list[Member]:
    """Sets the precision: that of the first run, unless a flag says another.

    Returns:
        The runs with the precision that `auto` stands for on this machine.
    """
    precisions = {config.precision for config, _ in members}
    precision = backend.set_precision(members[0][0])
    if len(precisions) > 1:
        print(
            f"The runs were trained in {' and '.join(sorted(precisions))}; all "
            f"are evaluated in {precision}."
        )
    return [
        (dataclasses.replace(config, precision=precision), place)
        for config, place in members
    ]


def caption_split(
    members: Sequence[Member], split: Split
) -> tuple[dict[str, captioner.Captioned], dict[str, Any], pd.DataFrame]:
    """Captions the images of a split.

    Args:
        members: the config and folder of each run that is averaged.
        split: from `prepared.load_split`.

    Returns:
        What the search found for each image; the figures that need the model,
        which are the teacher-forced ones and the speed; and the counts per
        image that the former are made of.
    """
    config, images = members[0][0], len(split.images)
    opened = [open_run(*each, split.images) for each in members]
    decoders, vocabularies, features = zip(*opened, strict=True)
    words = vocabularies[0]
    averaged = f", {len(members)} runs averaged" if len(members) > 1 else ""
    print(
        f"Captioning {images:,} images, beam size {config.beam_size}{averaged}"
    )
    searcher = captioner.build(decoders, config)
    # The first batch compiles the search, which is no part of its speed.
    everything = np.arange(images)
    captioner.caption_images(searcher, features, everything[:1], words)
    begun = time.monotonic()
    found = captioner.caption_images(
        searcher, features, everything, words, progress=True
    )
    speed = images / (time.monotonic() - begun)
    longest = config.max_caption_length
    captions = [encode(tokens, words, longest) for tokens in split.tokens]
    scored = captioner.teacher_force(
        decoders, features, captions, config.batch_images
    )
    counts = teacher_forced.count(scored, split.images)
    figures = {**teacher_forced.figures(counts), "images_per_second": speed}
    return dict(zip(split.images, found, strict=True)), figures, counts


def open_run(
    config: Config, run: Path, images: Sequence[str]
) -> tuple[CaptioningModel, Vocabulary, Features]:
    """Opens a run: its decoder, vocabulary, and the images' features."""
    descriptions = runs.load_description(run).encoders
    encoder_weights.check(config, descriptions, needed=False)
    features = store.open_features(config, descriptions, images)
    decoder, words = captioner.load_decoder(config, run)
    return decoder, words, features
