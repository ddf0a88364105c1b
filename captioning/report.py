"""What a person looks at: curves, attention figures and the HTML page."""

import base64
import io
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import jinja2
import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from captioning import metrics as scores
from captioning.files import atomic_path, write_text
from captioning.images import UnusableImage, read_image

# title, column of the training split, column of the validation split
_PANELS = (
    ("Loss", "loss", "val_loss"),
    ("Token accuracy", "token_accuracy", "val_token_accuracy"),
    ("CIDEr", None, "val_cider"),
)
# On white paper; the page puts its own ink in the place of _INK.
_INK, _TRAINING, _VALIDATION = "#2b2a28", "#8f8b84", "#d9730d"
_STYLE = {
    "font.size": 9.0,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10.0,
    "axes.titlecolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "text.color": _INK,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 3.5,
    "svg.fonttype": "none",
    # Without it the names inside an SVG are drawn by chance.
    "svg.hashsalt": "curves",
}
_EXIF_ORIENTATION = 0x0112

# 1,000 images stay below 30 MB: base64 makes 24 KB of this.
_THUMBNAIL_SIDE, _THUMBNAIL_BYTES = 224, 18_000
_FIGURE_COLUMNS, _PANEL_SIDE = 6, 150  # of an attention figure; pixels
_UNATTENDED = 0.3  # what is left of the light where there is no attention


def write_curves(path: Path, history: pd.DataFrame) -> None:
    """Draws how the training went as a PNG.

    Args:
        path: the file.
        history: as in history.csv, one row an epoch; NaN is not measured.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure((11, 3), 150, layout="constrained")
        for axes, panel in zip(figure.subplots(1, 3), _PANELS, strict=True):
            _draw_panel(axes, history, *panel)
        with atomic_path(path) as part:
            figure.savefig(part, format="png")


def _draw_panel(
    axes: Axes,
    history: pd.DataFrame,
    title: str,
    training: str | None,
    validation: str,
) -> None:
    for column, name, colour in (
        (training, "training", _TRAINING),
        (validation, "validation", _VALIDATION),
    ):
        if column:
            line = history[["epoch", column]].dropna()
            axes.plot(
                line["epoch"], line[column], "o-", color=colour, label=name
            )
    best = _best(history)
    if best is not None:
        axes.axvline(
            best["epoch"], color=_INK, linewidth=0.8, linestyle=(0, (2, 3))
        )
        axes.plot(
            best["epoch"],
            best[validation],
            "o",
            markersize=7,
            markerfacecolor="none",
            markeredgecolor=_VALIDATION,
            label=f"best epoch, {best['epoch']:.0f}",
        )
    axes.set(title=title, xlabel="epoch")
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axes.grid(axis="y", color=_TRAINING, alpha=0.25, linewidth=0.6)
    axes.margins(y=0.12)
    axes.legend()


def _best(history: pd.DataFrame) -> pd.Series | None:
    """The epoch with the highest CIDEr, if it was measured."""
    measured = history.dropna(subset=["val_cider"])
    return (
        None if measured.empty else measured.loc[measured["val_cider"].idxmax()]
    )


def _curves(history: pd.DataFrame) -> list[str]:
    """The panels as SVG elements for the page, in its own ink."""
    found = []
    with matplotlib.rc_context(_STYLE):
        for panel in _PANELS:
            figure = Figure((4.4, 3), layout="constrained")
            _draw_panel(figure.subplots(), history, *panel)
            buffer = io.StringIO()
            nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
            figure.savefig(
                buffer, format="svg", transparent=True, metadata=nothing
            )
            svg = buffer.getvalue()
            svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
            # Inside HTML an SVG needs no name space.
            svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
            label = f'<svg role="img" aria-label="{panel[0]} by epoch"'
            found.append(svg.replace("<svg", label, 1))
    return found


def write_attention_figure(
    path: Path, photo: np.ndarray, words: Sequence[str], attention: np.ndarray
) -> None:
    """Draws where a model looked, word by word, as a PNG.

    Source: the figures of Xu et al. 2015.

    Args:
        path: the file.
        photo: uint8 RGB (height, width, 3).
        words: the caption.
        attention: weights (words, side, side).
    """
    height, width = photo.shape[:2]
    scale = _PANEL_SIDE / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    photo = cv2.resize(photo, size, interpolation=cv2.INTER_AREA)
    panels = [("", photo)]
    for word, weights in zip(words, attention, strict=True):
        panels.append((word, _lit(photo, weights)))
    columns = min(len(panels), _FIGURE_COLUMNS)
    rows = math.ceil(len(panels) / columns)
    figure = Figure(
        (columns * size[0] / 100 + 0.1, rows * (size[1] / 100 + 0.24)), 100
    )
    figure.subplots_adjust(0.01, 0.01, 0.99, 0.95, 0.04, 0.2)
    for place, (word, pixels) in enumerate(panels):
        axes = figure.add_subplot(rows, columns, place + 1)
        axes.imshow(pixels)
        axes.axis("off")
        axes.set_title(word, fontsize=9, pad=3, parse_math=False)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # A script that the font does not have is drawn as boxes.
        warnings.filterwarnings("ignore", message="Glyph")
        figure.savefig(buffer, format="png")
    with atomic_path(path) as part, Image.open(buffer) as image:
        image.convert("RGB").quantize(128).save(part, "PNG", optimize=True)


def _lit(photo: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Leaves colour and light where the attention is.

    Args:
        photo: uint8 RGB (height, width, 3).
        weights: (side, side).

    Returns:
        uint8 RGB (height, width, 3).
    """
    height, width = photo.shape[:2]
    share = _scaled(weights[None])[0].astype(np.float32) / 255
    share = cv2.resize(share, (width, height), interpolation=cv2.INTER_CUBIC)
    sigma = max(height, width) / len(weights) / 2
    share = cv2.GaussianBlur(share, (0, 0), sigma, borderType=cv2.BORDER_REFLECT)
    share = share.clip(0, 1)[..., None]  # (height, width, 1)
    grey = photo.mean(axis=2, keepdims=True) * _UNATTENDED
    return (share * photo + (1 - share) * grey).round().astype(np.uint8)


def _scaled(attention: np.ndarray) -> np.ndarray:
    """(words, side, side) -> uint8, 255 where a word's attention is highest.

    The lowest is not stretched to 0, so that an attention that hardly
    prefers any region looks like it.
    """
    highest = attention.max(axis=(1, 2), keepdims=True, initial=1e-9)
    return (attention / highest * 255).clip(0, 255).round().astype(np.uint8)


def write_report(
    path: Path,
    title: str,
    metrics: Mapping[str, Any],
    examples: pd.DataFrame,
    attention: Sequence[np.ndarray],
    images_dir: Path,
    history: pd.DataFrame | None,
) -> None:
    """Writes the page that shows what a run is worth.

    It is one file that needs no network. A photograph that cannot be read
    is a placeholder.

    Args:
        path: the HTML file.
        title: its heading.
        metrics: what metrics.json has.
        examples: image (relative to `images_dir`), caption, references
            (list of texts), bleu4, rouge_l, cider; one row an image.
        attention: for each row, weights (words, side, side), one map for each
            of `caption.split()`.
        images_dir: the folder with the photographs.
        history: as in history.csv; None if it is not at hand.
    """
    rows = examples.to_dict("records")
    data = [
        _example(row, maps, images_dir)
        for row, maps in zip(rows, attention, strict=True)
    ]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    text = environment.get_template("report.html.jinja").render(
        title=title,
        metrics=metrics,
        figures=list(_figures(metrics)),
        examples=data,
        history=history,
        curves=[] if history is None else _curves(history),
    )
    write_text(path, text)


def _figures(metrics: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    """What a person reads of each metric."""
    for name, title, form, meaning in scores._FIGURES:
        value = metrics.get(name)
        reason = metrics.get("unavailable", {}).get(name, "not measured")
        ends = metrics.get("intervals", {}).get(name) or []
        yield {
            "name": name,
            "title": title.strip(),
            "shown": "" if value is None else form.format(value),
            "interval": " to ".join(form.format(x).rstrip("%") for x in ends),
            "meaning": meaning,
            "reason": reason if value is None else "",
        }


def _example(
    row: Mapping[str, Any], maps: np.ndarray, images_dir: Path
) -> dict[str, Any]:
    """One image as the script of the page wants it.

    Args:
        row: of the examples.
        maps: weights (words, side, side).
        images_dir: the folder with the photographs.
    """
    maps = np.nan_to_num(np.asarray(maps, np.float32))
    return {
        **{name: row[name] for name in ("image", "caption", "references")},
        **{
            name: float(np.nan_to_num(row[name]))
            for name in ("cider", "bleu4", "rouge_l")
        },
        "photo": _thumbnail(images_dir / row["image"]),
        "side": maps.shape[1],
        "peaks": [round(float(each.max()), 4) for each in maps],
        "maps": _base64(_scaled(maps).tobytes()),
    }


def _thumbnail(path: Path) -> str | None:
    """A small JPEG in base64; None if the photograph cannot be read."""
    try:
        pixels, _ = read_image(path, _THUMBNAIL_SIDE)
    except UnusableImage:
        return None
    with Image.open(path) as image:
        width, height = image.size
        if image.getexif().get(_EXIF_ORIENTATION, 1) >= 5:
            width, height = height, width
    scale = _THUMBNAIL_SIDE / max(width, height)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    for quality in (75, 60, 45, 30):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(
            buffer, "JPEG", quality=quality, optimize=True
        )
        if buffer.tell() <= _THUMBNAIL_BYTES:
            break
    return _base64(buffer.getvalue())


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
