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
# Of the diagram: name -> centre, width and text. Units are tenths of an inch.
BOXES = {
    "image": (8, 30, 13, "image"),
    "encoder": (26, 30, 16, "frozen encoder\nVGG16, ResNet, ..."),
    "regions": (46, 30, 17, "annotation vectors\n$a_1$ to $a_{49}$"),
    "attention": (46, 14, 17, "attention\n$v\\cdot\\tanh(W_h h + W_a a_i)$"),
    "context": (66, 14, 14, "context $z_t$\ngated by $\\beta$"),
    "lstm": (66, 30, 14, "LSTM\nstate $h_t$"),
    "output": (86, 30, 16, "deep output\nnext word"),
    "word": (86, 14, 16, "last word $y_{t-1}$"),
}
ARROWS = (
    ("image", "encoder"),
    ("encoder", "regions"),
    ("regions", "attention"),
    ("attention", "context"),
    ("context", "lstm"),
    ("lstm", "output"),
    ("output", "word"),
    ("word", "lstm"),
    ("lstm", "attention"),
)


def draw_model(path: Path) -> None:
    """A diagram of the model."""
    figure, axes = plt.subplots(figsize=(9.6, 4))
    axes.set(xlim=(0, 96), ylim=(6, 38))
    axes.axis("off")
    for x, y, width, text in BOXES.values():
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
    for start, end in ARROWS:
        (x, y, width, _), (to_x, to_y, to_width, _) = BOXES[start], BOXES[end]
        if abs(to_x - x) < 1:  # straight up or down
            side = 4 if to_y > y else -4
            points = (x, y + side), (to_x, to_y - side)
        else:
            side = 1 if to_x > x else -1
            points = (
                (x + side * width / 2, y),
                (to_x - side * to_width / 2, to_y),
            )
        axes.annotate(
            "",
            points[1],
            points[0],
            arrowprops={"arrowstyle": "-|>", "color": ACCENT},
        )
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
    command.run(main, __doc__)
