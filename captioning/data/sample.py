"""The built-in sample dataset: drawn scenes, each with five true captions.

A scene is one to three objects on a ground, in groups along an axis. Ground,
kinds, colours, sizes, counts and places are sampled independently, so that no
part of a caption can be guessed from the rest.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import cv2
import numpy as np
from tqdm import tqdm

from captioning.files import lock, read_json, write_csv, write_json
from config import SPLITS, UserError

SEED = 0  # of everything random
SIDE = 224  # of the square images, in pixels
MARGIN = 48  # pixels that objects may extend beyond the edge
DRAWING = 1  # increment it when what is drawn or written changes


class Group(NamedTuple):
    """Objects that look the same."""

    kind: str
    colour: str
    size: str
    radius: int  # of each object, in pixels
    centres: np.ndarray  # (objects, 2): x and y in pixels


class Scene(NamedTuple):
    """What is in an image."""

    ground: str
    axis: str  # of the groups, or of the objects of a single group
    place: str  # of the object, if there is only one
    groups: list[Group]  # from left to right, or from top to bottom


# --- what there is to draw; colours are (blue, green, red) -----------------
COLOURS = {
    "red": (40, 35, 215),
    "yellow": (45, 215, 250),
    "green": (60, 165, 35),
    "blue": (225, 105, 25),
    "pink": (190, 120, 250),
    "black": (38, 34, 34),
}
INKS = {
    "white": (250, 250, 250, 255),
    "black": (35, 30, 30, 255),
    "brown": (38, 66, 110, 255),
    "lamp": (140, 235, 255, 255),
    "hole": (0, 0, 0, 0),
}
SIZES = {"big": (28, 32), "small": (16, 20)}  # radius in pixels
# Kind -> its parts from back to front: an ink ("own" and "shade" come from the
# object's colour) and the x,y corners of a polygon, or the x,y,radius of a
# disc, on a square of side 100.
KINDS = {
    "ball": "own 50,50,49 | white 34,31,10",
    "ring": "own 50,50,49 | hole 50,50,29",
    "star": "own 50,0 64,34 100,36 72,59 81,95 50,75 19,95 28,59 0,36 36,34",
    "box": "own 4,4 96,4 96,96 4,96 | white 4,18 96,18 96,27 4,27"
    "| white 4,46 96,46 96,55 4,55 | white 4,74 96,74 96,83 4,83",
    "house": "own 14,42 86,42 86,98 14,98 | brown 0,46 50,2 100,46"
    "| lamp 24,56 46,56 46,76 24,76 | black 58,58 76,58 76,98 58,98",
    "tree": "brown 42,70 58,70 58,100 42,100 | own 14,80 50,34 86,80"
    "| shade 20,55 50,16 80,55 | own 27,31 50,0 73,31",
    "car": "own 0,50 20,48 32,24 70,24 84,48 100,52 100,74 0,74"
    "| white 30,48 37,31 49,31 49,48 | white 54,48 54,31 66,31 75,48"
    "| black 23,74,14 | black 77,74,14 | white 23,74,5 | white 77,74,5",
    "boat": "brown 47,0 52,0 52,72 47,72 | own 54,4 96,60 54,60"
    "| white 45,14 45,60 10,60 | own 0,68 100,68 80,96 20,96",
}


class Ground(NamedTuple):
    """A rough surface with short strokes on it; lengths are in pixels."""

    colour: tuple[int, int, int]
    grain: int  # standard deviation of the brightness of a pixel
    strokes: int
    reach: tuple[int, int]  # of the longest stroke, in x and y
    brightness: tuple[int, int]  # of the strokes, against the ground's
    width: int  # of the strokes


GROUNDS = {
    "grass": Ground((72, 150, 104), 3, 420, (4, 13), (-40, 40), 1),
    "sand": Ground((150, 200, 228), 8, 30, (30, 3), (-28, -12), 2),
    "water": Ground((190, 160, 72), 3, 45, (34, 2), (20, 60), 2),
    "snow": Ground((244, 238, 230), 3, 26, (40, 6), (-26, -8), 3),
    "sky": Ground((74, 36, 22), 3, 70, (1, 1), (90, 210), 1),
    "road": Ground((122, 118, 116), 8, 0, (0, 0), (0, 1), 1),
}


def _ground(ground: Ground, random: np.random.Generator) -> np.ndarray:
    """Draws a ground with patches of light, uint8 BGR (SIDE, SIDE, 3)."""
    base = ground.colour + random.integers(-12, 13, 3)
    patches = cv2.resize(
        random.normal(0, 9, (5, 5)), (SIDE, SIDE), interpolation=cv2.INTER_CUBIC
    )
    slope = np.linspace(-10, 10, SIDE)[:, None]
    light = patches + slope + random.normal(0, ground.grain, (SIDE, SIDE))
    image = np.clip(base + light[..., None], 0, 255).astype(np.uint8)
    starts = random.integers(0, SIDE, (ground.strokes, 2))
    ends = starts + random.uniform(-1, 1, starts.shape) * ground.reach
    change = random.integers(*ground.brightness, (ground.strokes, 1))
    colours = np.clip(base + change, 0, 255).tolist()
    lines = zip(starts, ends.astype(int), colours, strict=True)
    for start, end, colour in lines:
        cv2.line(image, start, end, colour, ground.width, cv2.LINE_AA)
    if ground is GROUNDS["road"]:
        top = int(random.integers(30, SIDE - 30))
        for left in range(int(random.integers(-40, 0)), SIDE, 56):
            image[top : top + 6, max(left, 0) : left + 30] = 225
    return image


def _object(group: Group, random: np.random.Generator) -> np.ndarray:
    """Draws a paper cut-out with a white rim, uint8 BGRA (side, side, 4)."""
    own = np.clip(COLOURS[group.colour] + random.integers(-14, 15, 3), 0, 255)
    inks = INKS | {"own": (*own.tolist(), 255)}
    inks["shade"] = (*(own * 0.7).tolist(), 255)
    # Drawn large and shrunk, so that edges are smooth at any size.
    canvas = np.zeros((240, 240, 4), np.uint8)
    for part in KINDS[group.kind].split("|"):
        ink, *corners = part.split()
        numbers = np.array([c.split(",") for c in corners], np.int32) * 2
        if len(corners) == 1:
            x, y, radius = numbers[0].tolist()
            cv2.circle(canvas, (x + 20, y + 20), radius, inks[ink], -1)
        else:
            cv2.fillPoly(canvas, [numbers + 20], inks[ink])
    inside = canvas[..., 3]
    rim = cv2.dilate(inside, np.ones((17, 17), np.uint8))
    canvas[rim > inside] = INKS["white"]
    canvas = canvas[:, :: random.choice((-1, 1))]
    turn = cv2.getRotationMatrix2D((120, 120), random.uniform(-8, 8), 1)
    side = round(2.4 * group.radius)
    turned = cv2.warpAffine(canvas, turn, (240, 240))
    return cv2.resize(turned, (side, side), interpolation=cv2.INTER_AREA)


def draw(scene: Scene, random: np.random.Generator) -> np.ndarray:
    """Draws a ground and objects on it, uint8 BGR (SIDE, SIDE, 3)."""
    ground = _ground(GROUNDS[scene.ground], random).astype(np.float32)
    image = np.pad(ground, ((MARGIN, MARGIN), (MARGIN, MARGIN), (0, 0)))
    for group in scene.groups:
        for centre in group.centres:
            cutout = _object(group, random)
            side = len(cutout)
            opacity = cutout[..., 3:] / np.float32(255)
            x, y = (centre - side / 2 + MARGIN).astype(int)
            shadow = image[y + 4 : y + 4 + side, x + 2 : x + 2 + side]
            shadow *= 1 - 0.45 * cv2.GaussianBlur(opacity, (9, 9), 0)[..., None]
            under = image[y : y + side, x : x + side]
            under += opacity * (cutout[..., :3] - under)
    return image[MARGIN:-MARGIN, MARGIN:-MARGIN].round().astype(np.uint8)


# --- scenes ----------------------------------------------------------------
PLACES = {
    "on the left": (54, 112),
    "on the right": (170, 112),
    "at the top": (112, 54),
    "at the bottom": (112, 170),
    "in the middle": (112, 112),
}
# Positions in pixels: of the groups along the axis, by their number, and of
# the objects of a group across it.
ALONG = {1: (112,), 2: (60, 164), 3: (38, 112, 186)}
ACROSS = {1: (112,), 2: (70, 154)}
# The objects in each group -> the share of such scenes, and how far, in
# pixels, the whole may be moved across the axis and each object anywhere.
LAYOUTS = {
    (1,): (0.2, 0, 14),
    (2,): (0.12, 42, 10),
    (3,): (0.12, 42, 3),
    (1, 1): (0.22, 42, 10),
    (1, 2): (0.08, 12, 4),
    (2, 1): (0.08, 12, 4),
    (1, 1, 1): (0.18, 42, 3),
}


def scene(random: np.random.Generator) -> Scene:
    """Samples a scene."""
    shares = [share for share, _, _ in LAYOUTS.values()]
    counts = list(LAYOUTS)[random.choice(len(LAYOUTS), p=shares)]
    ground = random.choice(list(GROUNDS))
    axis = random.choice(list(AXES))
    place = random.choice(list(PLACES))
    if counts == (1,):
        spots = [[PLACES[place]]]
    elif len(counts) == 1:
        spots = [[(along, 112) for along in ALONG[counts[0]]]]
    else:
        spots = [
            [(along, across) for across in ACROSS[count]]
            for along, count in zip(ALONG[len(counts)], counts, strict=True)
        ]
    _, drift, wobble = LAYOUTS[counts]
    shift = (0, random.uniform(-drift, drift))
    groups = []
    # No two groups share a kind or a colour: "the red ball" is one thing.
    kinds = random.choice(list(KINDS), len(counts), replace=False)
    colours = random.choice(list(COLOURS), len(counts), replace=False)
    for kind, colour, spot in zip(kinds, colours, spots, strict=True):
        size = random.choice(list(SIZES))
        radius = int(random.integers(*SIZES[size], endpoint=True))
        centres = spot + random.uniform(-wobble, wobble, (len(spot), 2)) + shift
        if axis == "down" and counts != (1,):
            centres = centres[:, ::-1]
        groups.append(Group(kind, colour, size, radius, centres))
    return Scene(ground, axis, place, groups)


# --- captions --------------------------------------------------------------
# The more frequent wording first.
SYNONYMS = {
    "big": ("big", "large"),
    "small": ("small", "little"),
    "grass": ("on the grass", "on the lawn"),
    "sand": ("on the sand", "on the beach"),
    "water": ("on the water", "on the sea"),
    "snow": ("in the snow", "on the snow"),
    "sky": ("in the sky", "in the dark"),
    "road": ("on the road", "on the street"),
}
# What things do on a ground, or on any ground; all others stand.
VERBS = {"sky": "hang", "water": "float"}
VERBS |= {"ball": "lie", "ring": "lie", "boat": "lie", "star": "shine"}
AXES: dict[str, dict[str, Any]] = {
    "across": {
        "before": "left of",
        "after": "to the right of",
        "first": "left",
        "last": "right",
        "prior": "on its left",
        "later": "on its right",
        "rows": {2: "side by side", 3: "in a row"},
    },
    "down": {
        "before": "above",
        "after": "below",
        "first": "top",
        "last": "bottom",
        "prior": "above it",
        "later": "below it",
        "rows": {2: "one above the other", 3: "in a column"},
    },
}
# By the number of groups (0: a single object); each mentions other parts.
TEMPLATES = {
    0: (
        "{a.full} {a.verb} {ground}",
        "there is {a.full} {place} of the picture",
        "{ground} {a.verb} {a.short}",
        "the only thing {ground} is {a.short}",
        "the {a.kind} {place} is {a.size} and {a.colour}",
        "a single {a.noun} {a.verb} {place}",
    ),
    1: (
        "{a.full} {a.verb} {ground}",
        "{a.short} {a.verb} {row} {ground}",
        "{all} {a.kind} {ground} are {a.size} and {a.colour}",
        "there are {a.full} {row}",
        "there are {a.number} {a.kind} and {all} of them are {a.colour}",
        "{ground} there are {a.number} {a.size} {a.kind}",
    ),
    2: (
        "{a.full} {a.verb} {before} {b.full} {ground}",
        "the {b.noun} {b.be} {after} {a.full}",
        "{a.short} and {b.short} {ground}",
        "{ground} {a.short} {a.be} {before} {b.short}",
        "the {first} {a.kind} {a.be} {a.size} "
        "and the {last} {b.kind} {b.be} {b.size}",
        "we see {b.full} {after} {a.short}",
    ),
    3: (
        "{b.full} {b.verb} between {a.short} and {c.short}",
        "{a.short}, {b.short} and {c.short} {ground}",
        "the {b.kind} has a {a.kind} {prior} and a {c.kind} {later}",
        "{ground} a {b.kind} {b.verb} between a {a.kind} and a {c.kind}",
        "a {a.size} {a.kind}, a {b.size} {b.kind} and a {c.size} {c.kind}",
        "three things {ground} with {b.full} in the middle",
    ),
}


def _say(word: str, random: np.random.Generator) -> str:
    return SYNONYMS[word][int(random.random() < 0.25)]


def _words(
    group: Group, ground: str, random: np.random.Generator
) -> SimpleNamespace:
    """The words for a group in the templates, in singular or plural."""
    count = len(group.centres)
    many = count > 1
    kind = group.kind + many * ("es" if group.kind == "box" else "s")
    number = ("a", "two", "three")[count - 1]
    verb = VERBS.get(ground) or VERBS.get(group.kind, "stand")
    size = _say(group.size, random)
    return SimpleNamespace(
        kind=kind,
        colour=group.colour,
        size=size,
        number=number,
        noun=f"{group.colour} {kind}",
        short=f"{number} {group.colour} {kind}",
        full=f"{number} {size} {group.colour} {kind}",
        verb=verb if many else verb + "s",
        be="are" if many else "is",
    )


def _captions(scene: Scene, random: np.random.Generator) -> list[str]:
    """Describes a scene in five ways."""
    count = len(scene.groups[0].centres)
    alone = len(scene.groups) == count == 1
    templates = TEMPLATES[0 if alone else len(scene.groups)]
    captions = []
    for template in random.choice(templates, 5, replace=False):
        words = [_words(g, scene.ground, random) for g in scene.groups]
        text = str(template).format(
            ground=_say(scene.ground, random),
            place=scene.place,
            all="both" if count == 2 else "all three",
            row=AXES[scene.axis]["rows"].get(count),
            **dict(zip("abc", words, strict=False)),
            **AXES[scene.axis],
        )
        captions.append(text[0].upper() + text[1:] + ".")
    return captions


# --- on disk ---------------------------------------------------------------


def write_sample(folder: Path, images: int = 2400) -> None:
    """Draws the sample dataset, unless the folder already has it.

    The images are JPEG, like photographs: a fifth of the size of PNG, and the
    same bytes every time. Each has its own random numbers, so that it
    does not depend on how many there are. `captions.csv` is written last: a
    folder without it is drawn again.

    Args:
        folder: gets `images/`, `captions.csv` (image, caption, split) and
            `sample.json`, which says what was drawn.
        images: how many to draw, at least 3. One in twelve is for validation,
            as many are for the test, the others for training.

    Raises:
        UserError: if the folder contains another dataset.
    """
    table, note = folder / "captions.csv", folder / "sample.json"
    drawn = {"drawing": DRAWING, "seed": SEED, "images": images}
    names = [f"scene_{number:05d}.jpg" for number in range(images)]
    with lock(folder, wait=True):
        if any(folder.glob("[!.]*")) and not note.exists():
            raise UserError(
                f"{folder} contains a dataset that is not the drawn sample: "
                "rename it and name it with --dataset, or give --data-dir to "
                "draw the sample elsewhere"
            )
        there = {path.name for path in folder.glob("images/scene_*.jpg")}
        if table.exists() and read_json(note) == drawn and there == {*names}:
            return
        table.unlink(missing_ok=True)
        # The note comes first: its folder is the sample's, finished or not.
        write_json(note, drawn)
        captions = _draw_all([folder / "images" / name for name in names])
        for name in there - {*names}:
            (folder / "images" / name).unlink()
        held_out = max(1, round(images / 12))
        splits = np.repeat(SPLITS, (images - 2 * held_out, held_out, held_out))
        rows = [
            (name, caption, split)
            for name, split, some in zip(names, splits, captions, strict=True)
            for caption in some
        ]
        # The images must be on the disk before the table, which counts.
        if hasattr(os, "sync"):
            os.sync()
        write_csv(table, rows, ["image", "caption", "split"])


def _draw_all(paths: list[Path]) -> list[list[str]]:
    """Draws one scene per path; returns the captions of each."""
    paths[0].parent.mkdir(exist_ok=True)
    # OpenCV and NumPy release the interpreter while they draw.
    pool = ThreadPoolExecutor(min(os.cpu_count() or 1, 8))
    try:
        drawings = pool.map(_draw_to, paths, range(len(paths)))
        bar = tqdm(
            drawings, "drawing the sample", len(paths), unit="image", delay=15
        )
        return list(bar)
    finally:
        pool.shutdown(cancel_futures=True)


def _draw_to(path: Path, number: int) -> list[str]:
    """Draws a scene of its own random numbers; returns its captions."""
    random = np.random.default_rng([SEED, number])
    found = scene(random)
    quality = [cv2.IMWRITE_JPEG_QUALITY, 92]
    content = cv2.imencode(".jpg", draw(found, random), quality)[1]
    # Not atomically: without the table, all are drawn again.
    path.write_bytes(content.tobytes())
    return _captions(found, random)
