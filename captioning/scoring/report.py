"""What the HTML pages are made of: templates, photographs, attention."""

import base64
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from PIL import Image

from captioning.data import images
from captioning.scoring import figures

# That is about 14 KB per photograph.
_THUMBNAIL_SIDE, _THUMBNAIL_QUALITY = 224, 70
OTHERS = 5  # captions of the beam, the best included
_LIT_SIDE = 448  # of the photographs on the page that captions them


def template(name: str) -> jinja2.Template:
    """The template of a page; values put into it are escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("captioning", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def example(
    row: Mapping[str, Any], found: Any, images_dir: Path
) -> dict[str, Any]:
    """One image as the script of the report expects it.

    Args:
        row: of captions.csv; `image` is relative to `images_dir`.
        found: the `captioner.Captioned` of the image.
        images_dir: the folder with the photographs.

    Returns:
        The row, with a thumbnail (None if the photograph cannot be read), the
        probability and the attention of each word, and other captions.
    """
    maps = figures.as_maps(found.attention)
    return {
        **row,
        "words": found.words,
        "others": [each.caption for each in found.n_best[1:OTHERS]],
        "probabilities": [
            round(float(each), 3) for each in found.probabilities
        ],
        "photo": thumbnail(images_dir / row["image"]),
        "side": maps.shape[1],
        "peaks": [round(float(each.max()), 4) for each in maps],
        "maps": _base64(figures.scaled(maps).tobytes()),
    }


def thumbnail(path: Path) -> str | None:
    """A small JPEG in base64; None if the photograph cannot be read."""
    try:
        pixels, _ = images.read_image(path, _THUMBNAIL_SIDE, square=False)
    except images.UnusableImage:
        return None
    return _jpeg(pixels)


def lit_photographs(data: bytes, attention: np.ndarray) -> list[str]:
    """A photograph, and for each word the same, lit where the model looked.

    Args:
        data: the photograph's file, one that `images.decode_image` can read.
        attention: weights (words, regions).

    Returns:
        JPEGs as addresses (data:), 1 + words of them.
    """
    photo, _ = images.decode_image(data, _LIT_SIDE, square=False)
    maps = figures.as_maps(attention)
    pictures = [photo, *(figures.lit(photo, each) for each in maps)]
    return [f"data:image/jpeg;base64,{_jpeg(each)}" for each in pictures]


def _jpeg(pixels: np.ndarray) -> str:
    """A JPEG of uint8 RGB (height, width, 3), in base64."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(
        buffer, "JPEG", quality=_THUMBNAIL_QUALITY, optimize=True
    )
    return _base64(buffer.getvalue())


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
