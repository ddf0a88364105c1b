"""The HTML report of a run, and photographs for the local page."""

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
from PIL import Image

from captioning.data import images
from captioning.files import write_text
from captioning.scoring import figures, table

# That is about 14 KB per photograph.
_THUMBNAIL_SIDE, _THUMBNAIL_QUALITY = 224, 70
_LIT_SIDE = 448  # of the photographs on the page that captions them


def write_report(
    path: Path,
    title: str,
    dataset: str,
    metrics: Mapping[str, Any],
    examples: pd.DataFrame,
    attention: Sequence[np.ndarray],
    images_dir: Path,
    history: pd.DataFrame | None,
) -> None:
    """Writes the report of a run: one HTML file that needs no network.

    A photograph that cannot be read becomes a placeholder.

    Args:
        path: the HTML file.
        title: its heading.
        dataset: its name; for a known one, published results are shown.
        metrics: what metrics.json has.
        examples: image (relative to `images_dir`), caption, references
            (list of texts), bleu4, rouge_l, cider; one row per image.
        attention: for each row, weights (words, side, side), one map per word
            of `caption.split()`.
        images_dir: the folder with the photographs.
        history: as in history.csv; None if there is none.
    """
    rows = examples.to_dict("records")
    has_history = history is not None and len(history) > 0
    notes, published = table.comparison(metrics, dataset)
    best_epoch = (metrics.get("run") or {}).get("epoch") or 0
    text = template("scoring/report.html.jinja").render(
        title=title,
        metrics=metrics,
        figures=table.rows(metrics),
        notes=notes,
        published=published,
        examples=[
            _example(row, maps, images_dir)
            for row, maps in zip(rows, attention, strict=True)
        ],
        history=history,
        curves=[
            figures.curve(history, best_epoch, each)
            for each in figures.PANELS
            if has_history
        ],
    )
    write_text(path, text)


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


def _example(
    row: Mapping[str, Any], maps: np.ndarray, images_dir: Path
) -> dict[str, Any]:
    """One image and its attention maps, as the page's script expects them."""
    return {
        **row,
        "photo": _thumbnail(images_dir / row["image"]),
        "side": maps.shape[1],
        "peaks": [round(float(each.max()), 4) for each in maps],
        "maps": _base64(figures.scaled(maps).tobytes()),
    }


def _thumbnail(path: Path) -> str | None:
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
        attention: weights (words, side, side).

    Returns:
        JPEGs as addresses (data:), 1 + words of them.
    """
    photo, _ = images.decode_image(data, _LIT_SIDE, square=False)
    pictures = [photo, *(figures.lit(photo, weights) for weights in attention)]
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
