"""The features of a preprocessed dataset: where they are, and how to open them.

Each encoder has a folder of its own, data/cache/<dataset>/features/<key>/,
which all text folders of the dataset share.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from captioning.data import prepared
from captioning.features import cache
from captioning.features.joined import Features
from config import Config, UserError


def folder(config: Config, description: dict[str, Any]) -> Path:
    """The folder of the features that `cache.describe` describes."""
    return prepared.root(config) / "features" / cache.key(description)


def open_features(
    config: Config,
    descriptions: Sequence[dict[str, Any]],
    images: Sequence[str],
) -> Features:
    """Opens the features of some images.

    Args:
        config: its data fields.
        descriptions: of each encoder, from `encoder_weights`.
        images: their names.

    Raises:
        UserError: if features are missing, incomplete, or of images in
            another folder.
    """
    found = [_open_cache(config, each, images) for each in descriptions]
    return Features([each.features for each, _ in found], [r for _, r in found])


def pixel_digests(
    config: Config,
    descriptions: Sequence[dict[str, Any]],
    images: Sequence[str],
) -> np.ndarray:
    """Digests of the pixels of some images, uint8 (images, bytes).

    Raises:
        UserError: as `open_features`.
    """
    # All encoders were given the same pixels.
    found, rows = _open_cache(config, descriptions[0], images)
    return cache.load_digests(found)[rows]


def _open_cache(
    config: Config, description: dict[str, Any], images: Sequence[str]
) -> tuple[cache.Cache, np.ndarray]:
    """Opens the cache of an encoder, and finds the row of each image."""
    place = folder(config, description)
    found = cache.load(place, description)
    _check_images_dir(config, place)
    rows = np.array([found.row.get(image, -1) for image in images], int)
    missing = int(np.sum((rows < 0) | (found.finished[rows] == 0)))
    if missing:
        raise UserError(
            f"{place} lacks the features of {missing:,} images: run "
            "preprocess.py again with the same flags; it resumes where it "
            "stopped"
        )
    return found, rows


def _check_images_dir(config: Config, place: Path) -> None:
    """Refuses features that have since been computed from another folder."""
    was, now = prepared.images_dir(config), cache.images_dir(place)
    if str(was) != now and was.is_dir():
        raise UserError(
            f"the images of {prepared.folder(config)} were in {was}, but the "
            f"features in {place} are now for those in {now}: run "
            "preprocess.py again with the same flags"
        )
