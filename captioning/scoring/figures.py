"""Training curves, and photographs lit where a model looked."""

import hashlib
import io
import math
import os
import re
import unicodedata
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator
from PIL import Image

from captioning.files import atomic_path
from captioning.scoring import fonts

# title, column of the training split, column of the validation split
PANELS = (
    ("Loss", "loss", "val_loss"),
    ("Token accuracy", "token_accuracy", "val_token_accuracy"),
    ("CIDEr", None, "val_cider"),
)
_TRAINING, _VALIDATION = "#8f8b84", "#d9730d"  # on white and on black
_STYLE: dict[Any, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "svg.fonttype": "none",
    # Without it the ids inside an SVG are random.
    "svg.hashsalt": "curves",
}
PHOTO_SIDE = 448  # pixels, that a photograph is read to for a figure
# Of an attention figure: panels per row, the longer side of one, and pixels
# in all, about a byte each, so that a long caption makes no large file.
_COLUMNS, _PANEL_SIDE, _PIXELS = 6, 160, 300_000
_TITLE, _GAP = 24, 8  # pixels above and between the panels
# The brightness of the grey where there is no attention; the same as on the
# report's page.
_UNLIT = 0.6
_LEGEND = "in colour: more than an even share of attention"


class Epoch(NamedTuple):
    """What a curve has at an epoch, in units of its drawing."""

    number: int
    x: float
    # The name of a line, its value and its y, the highest in the drawing first.
    values: list[tuple[str, str, float]]


class Curve(NamedTuple):
    """A panel of the training curves for a page that shows their values."""

    title: str
    drawing: str  # an SVG element
    width: float
    height: float
    bottom: float  # y of the axis
    epochs: list[Epoch]  # those with a value
    spacing: float  # between two epochs


def write_curves(path: Path, history: pd.DataFrame, best_epoch: int) -> None:
    """Plots the course of training as a PNG.

    Args:
        path: the file.
        history: as in history.csv, one row per epoch; NaN where not measured.
        best_epoch: the epoch whose weights were kept; 0 if none was yet.
    """
    with matplotlib.rc_context(_STYLE):
        layout = ConstrainedLayoutEngine(w_pad=0.15)
        figure = Figure((11, 3), 150, layout=layout)
        for axes, panel in zip(figure.subplots(1, 3), PANELS, strict=True):
            _draw_panel(axes, history, best_epoch, *panel)
        with atomic_path(path) as part:
            figure.savefig(part, format="png")


def curve(
    history: pd.DataFrame, best_epoch: int, panel: tuple[str, str | None, str]
) -> Curve:
    """A panel as an SVG element in the text colour of the page."""
    buffer = io.StringIO()
    with matplotlib.rc_context(_STYLE):
        # A pixel is a unit of the SVG.
        figure = Figure((4.4, 3), 72, layout="constrained")
        axes = figure.subplots()
        _draw_panel(axes, history, best_epoch, *panel)
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    svg = buffer.getvalue().replace("#000000", "currentColor")
    # Inside HTML, an SVG needs neither prologue nor namespace.
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg[svg.index("<svg") :])
    height = figure.bbox.height
    (left, _), (right, _) = axes.transData.transform([(0, 0), (1, 0)])
    return Curve(
        title=panel[0],
        drawing=svg.replace("<svg", '<svg aria-hidden="true"', 1),
        width=figure.bbox.width,
        height=height,
        bottom=round(height - axes.bbox.y0, 1),
        epochs=_epochs(axes, height, history, *panel[1:]),
        spacing=round(float(right - left), 1),
    )


def _epochs(
    axes: Axes,
    height: float,
    history: pd.DataFrame,
    training: str | None,
    validation: str,
) -> list[Epoch]:
    """Where the points of a panel are once it has been drawn."""
    found = []
    for row in history.to_dict("records"):
        values = []
        for column, name, _ in _lines(training, validation):
            if not math.isnan(row[column]):
                point = (row["epoch"], row[column])
                x, y = axes.transData.transform(point)
                y = round(float(height - y), 1)
                values.append((name, f"{row[column]:#.4g}", y))
        if values:
            values.sort(key=lambda each: each[2])
            found.append(Epoch(int(row["epoch"]), round(float(x), 1), values))
    return found


def _lines(training: str | None, validation: str) -> list[tuple[str, str, str]]:
    """The lines of a panel: column, name, colour."""
    lines = [(validation, "validation", _VALIDATION)]
    if training:
        lines.insert(0, (training, "training", _TRAINING))
    return lines


def _draw_panel(
    axes: Axes,
    history: pd.DataFrame,
    best_epoch: int,
    title: str,
    training: str | None,
    validation: str,
) -> None:
    """Plots two columns over the epochs, and marks the best epoch."""
    for column, name, colour in _lines(training, validation):
        line = history[["epoch", column]].dropna()
        axes.plot(*line.values.T, ".-", color=colour, label=name)
    for _, best in history[history["epoch"] == best_epoch].iterrows():
        axes.axvline(best_epoch, color="black", linewidth=0.8, linestyle=":")
        axes.plot(
            *best[["epoch", validation]],
            "o",
            fillstyle="none",
            color=_VALIDATION,
            label=f"best epoch, {best_epoch}",
        )
    epochs = history["epoch"]
    axes.set_xlim(epochs.min() - 0.5, epochs.max() + 0.5)
    axes.set(title=title, xlabel="epoch")
    whole = MaxNLocator(
        "auto", steps=[1, 2, 5, 10], integer=True, min_n_ticks=1
    )
    axes.xaxis.set_major_locator(whole)
    axes.grid(axis="y", color=_TRAINING, alpha=0.25)
    axes.legend()


def write_attention_figure(
    path: Path, photo: np.ndarray, words: Sequence[str], attention: np.ndarray
) -> None:
    """Writes what `draw_attention` draws as a PNG of few colours."""
    figure = Image.fromarray(draw_attention(photo, words, attention))
    with atomic_path(path) as part:
        figure.quantize(256).save(part, "PNG", optimize=True)


def draw_attention(
    photo: np.ndarray, words: Sequence[str], attention: np.ndarray
) -> np.ndarray:
    """Draws where a model looked, word by word.

    Source: the figures of Xu et al. 2015.

    Args:
        photo: uint8 RGB (height, width, 3).
        words: the caption.
        attention: weights (words, regions).

    Returns:
        uint8 RGB (height, width, 3).
    """
    side = min(_PANEL_SIDE, math.isqrt(_PIXELS // (len(words) + 1)))
    scale = side / max(photo.shape[:2])
    size = [max(1, round(each * scale)) for each in photo.shape[1::-1]]
    photo = cv2.resize(photo, size, interpolation=cv2.INTER_AREA)
    photos = [photo, *(lit(photo, each) for each in as_maps(attention))]
    panels = list(zip(["", *words], photos, strict=True))
    columns = min(len(panels), _COLUMNS)
    rows = math.ceil(len(panels) / columns)
    width, height = size
    down, across = height + _TITLE, width + _GAP
    height_of_all = rows * down + _TITLE  # with the legend
    sheet = np.full((height_of_all, columns * across, 3), 255, np.uint8)
    # Written on the sheet itself: axes would take a second per figure.
    figure = Figure((sheet.shape[1] / 100, sheet.shape[0] / 100), dpi=100)
    font = {"family": fonts.families("".join(words)), "size": 9}
    mirrored = _is_right_to_left(" ".join(words))
    for place, (word, pixels) in enumerate(panels):
        row, column = divmod(place, columns)
        if mirrored:
            column = columns - 1 - column
        top, left = row * down, column * across + _GAP // 2
        sheet[top + _TITLE : top + down, left : left + width] = pixels
        x, y = (left + width / 2) / sheet.shape[1], (top + 17) / sheet.shape[0]
        figure.text(x, 1 - y, word, ha="center", font=font, parse_math=False)
    y = 8 / sheet.shape[0]
    figure.text(0.01, y, _LEGEND, font={"size": 7}, color="#66625b")
    figure.figimage(sheet)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # Of characters without a font, which have been reported.
        warnings.filterwarnings("ignore", message="Glyph")
        figure.savefig(buffer, format="png", dpi=100)
    with Image.open(buffer) as image:
        return np.asarray(image.convert("RGB"))


def figure_name(photo: str) -> str:
    """The file name of an attention figure: another one for each path.

    A digest of the path tells apart photographs of one name in two folders, on
    disks that ignore case too.
    """
    digest = hashlib.blake2b(os.fsencode(photo), digest_size=4).hexdigest()
    return f"{Path(photo).stem[:50].lstrip('.')}-{digest}.png"


def _is_right_to_left(text: str) -> bool:
    """Whether the first letter of a text is of a script like Arabic."""
    for character in text:
        direction = unicodedata.bidirectional(character)
        if direction in ("L", "R", "AL"):
            return direction != "L"
    return False


def as_maps(attention: np.ndarray) -> np.ndarray:
    """Attention (words, regions) as maps (words, side, side)."""
    side = round(attention.shape[1] ** 0.5)
    return attention.reshape(-1, side, side)


def lit(photo: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Greys a photograph except where attention exceeds an even share.

    Args:
        photo: uint8 RGB (height, width, 3).
        weights: (side, side).

    Returns:
        uint8 RGB (height, width, 3), as the report draws it in the browser.
    """
    height, width = photo.shape[:2]
    share = scaled(weights[None])[0] / 255
    down, across = (_spline(len(share), size) for size in (height, width))
    share = down @ share @ across.T  # (height, width)
    share = (share / max(share.max(), 1e-6))[..., None]
    grey = photo.mean(axis=2, keepdims=True) * _UNLIT
    return (share * photo + (1 - share) * grey).round().astype(np.uint8)


def _spline(side: int, size: int) -> np.ndarray:
    """Cubic B-splines that make a curve of `size` pixels from `side` regions.

    Returns:
        The weight of each region in each pixel (size, side).
    """
    x = (np.arange(size) + 0.5) * side / size - 0.5
    place = np.floor(x).astype(int)
    f = x - place
    weights = np.zeros((size, side))
    for offset, weight in (
        (-1, (1 - f) ** 3),
        (0, 3 * f**3 - 6 * f**2 + 4),
        (1, -3 * f**3 + 3 * f**2 + 3 * f + 1),
        (2, f**3),
    ):
        region = np.clip(place + offset, 0, side - 1)
        np.add.at(weights, (np.arange(size), region), weight / 6)
    return weights


def scaled(attention: np.ndarray) -> np.ndarray:
    """The part of attention above an even share.

    Attention is nearly even: of 49 regions the strongest has two even shares.
    What all regions have in common would hide where attention is.

    Args:
        attention: weights (words, side, side).

    Returns:
        uint8 (words, side, side), 255 where a word's attention is highest and
        0 where it is no more than even.
    """
    above = attention - attention.mean(axis=(1, 2), keepdims=True)
    highest = above.max(axis=(1, 2), keepdims=True, initial=1e-6)
    return (above / highest * 255).clip(0, 255).round().astype(np.uint8)
