"""Draws the pictures of README.md into docs/pictures/.

    python docs/pictures.py

Needs the evaluated run of README's commands for the sample, and for the picture
of the report a Chromium on the path. All photographs in them are drawn scenes.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.patches import FancyBboxPatch
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from captioning import command, runs  # noqa: E402
from captioning.scoring import figures  # noqa: E402

PLACE = Path(__file__).parent / "pictures"
SCENES = 4
INK, ACCENT, PAPER = "#1d1c1a", "#b3540a", "#faf9f6"
# Of the diagram: centre, width and text of each box. Units are tenths of an
# inch; a box is 8 high.
BOXES = (
    (7, 30, 11, "image"),
    (25, 30, 18, "frozen encoder\nVGG16, ResNet, ..."),
    (47, 30, 20, "annotation vectors\n$a_1$ to $a_{49}$"),
    (47, 14, 20, "attention\n$v\\cdot\\tanh(W_h h + W_a a_i)$"),
    (69, 14, 14, "context $z_t$\ngated by $\\beta$"),
    (69, 30, 14, "LSTM\nstate $h_t$"),
    (89, 30, 15, "deep output\nnext word"),
    (89, 14, 15, "last word $y_{t-1}$"),
)
# The corners of each arrow.
ARROWS = (
    ((12.5, 30), (16, 30)),
    ((34, 30), (37, 30)),
    ((47, 26), (47, 18)),
    ((57, 13), (62, 13)),
    ((69, 18), (69, 26)),
    ((76, 31), (81.5, 31)),
    ((89, 26), (89, 18)),
    ((81.5, 14), (78.75, 14), (78.75, 28.5), (76, 28.5)),
    ((62, 28.5), (59.5, 28.5), (59.5, 15.5), (57, 15.5)),
)


def draw_model(path: Path) -> None:
    """A diagram of the model."""
    figure, axes = plt.subplots(figsize=(9.6, 2.5))
    axes.set(xlim=(0, 98), ylim=(9, 35))
    axes.axis("off")
    for x, y, width, text in BOXES:
        axes.add_patch(
            FancyBboxPatch(
                (x - width / 2, y - 4),
                width,
                8,
                boxstyle="round,pad=0,rounding_size=1.2",
                facecolor=PAPER,
                edgecolor=INK,
            )
        )
        axes.text(x, y, text, ha="center", va="center", fontsize=9, color=INK)
    style = {"arrowstyle": "-|>", "color": ACCENT, "shrinkA": 0, "shrinkB": 0}
    for *corners, end in ARROWS:
        axes.plot(*zip(*corners, strict=True), color=ACCENT, linewidth=1)
        axes.annotate("", end, corners[-1], arrowprops=style)
    figure.savefig(path, bbox_inches="tight", dpi=150, facecolor="white")
    plt.close(figure)


def draw_scenes(path: Path, examples: pd.DataFrame, images: Path) -> None:
    """Some scenes with their captions."""
    figure, all_axes = plt.subplots(1, SCENES, figsize=(9.6, 2.9))
    for axes, row in zip(all_axes, examples.itertuples(), strict=False):
        with Image.open(images / str(row.image)) as scene:
            axes.imshow(scene)
        axes.axis("off")
        words = str(row.caption).split()
        half = (len(words) + 1) // 2
        text = "\n".join([" ".join(words[:half]), " ".join(words[half:])])
        axes.set_title(text, y=-0.24, fontsize=9, color=INK)
    figure.savefig(path, bbox_inches="tight", dpi=150, facecolor="white")
    plt.close(figure)


def photograph_report(path: Path, report: Path) -> None:
    """A picture of the top of the report."""
    with tempfile.TemporaryDirectory() as profile:
        subprocess.run(
            [
                "chromium",
                "--headless",
                "--no-sandbox",
                "--hide-scrollbars",
                "--window-size=1280,1100",
                f"--user-data-dir={profile}",
                f"--screenshot={path}",
                report.resolve().as_uri(),
            ],
            check=True,
            capture_output=True,
        )
    with Image.open(path) as picture:
        picture.quantize(256).save(path, optimize=True)


def main(arguments: command.Arguments) -> None:
    """Draws all pictures."""
    run = runs.folder(arguments.config)
    place = run / "evaluation" / arguments.config.split
    examples = pd.read_csv(place / "captions.csv")
    examples = examples.sort_values("cider", ascending=False)
    # Of each quarter, from the best to the worst, the one in its middle.
    middles = (np.arange(SCENES) + 0.5) / SCENES * len(examples)
    PLACE.mkdir(exist_ok=True)
    draw_model(PLACE / "model.png")
    images = Path(arguments.config.data_dir) / "sample" / "images"
    draw_scenes(
        PLACE / "scenes.png", examples.iloc[middles.astype(int)], images
    )
    names = map(figures.figure_name, examples["image"])
    drawn = (place / "attention" / name for name in names)
    shutil.copy(next(filter(Path.exists, drawn)), PLACE / "attention.png")
    shutil.copy(run / "curves.png", PLACE / "curves.png")
    if shutil.which("chromium"):
        photograph_report(PLACE / "report.png", place / "report.html")
    print(f"Wrote {PLACE}: {', '.join(x.name for x in PLACE.iterdir())}")


if __name__ == "__main__":
    command.run(main, __doc__, {})
