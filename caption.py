"""Your own photographs -> captions.

    python caption.py holiday.jpg
    python caption.py --dataset flickr30k --attention maps photographs/
    python caption.py --serve

Captions photographs, and all those in folders, with a trained run: your newest
one trained on photographs, or else the pretrained one. Prints a line
`photo<TAB>caption` for each. A `-` reads a list of photographs from standard
input, one per line. With --serve, it opens a page on this machine instead, to
drop photographs on.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from captioning import command
from config import SAMPLE, Config, UserError

ACTIONS: command.Actions = {
    "photos": {
        "nargs": "*",
        "metavar": "PHOTO_OR_FOLDER",
        "help": "photographs, folders of them, or - for a list of both "
        "on standard input",
    },
    "--json": {
        "action": "store_true",
        "help": "print one JSON object per line: photo, caption and its "
        "scores; n_best, the beam ordered by agreement (by score with "
        "--consensus-temperature 0); words, each with its probability and "
        "its attention weights, row by row of attention_grid",
    },
    "--attention": {
        "metavar": "DIR",
        "help": "write to this folder a figure for each photograph, "
        "showing where the model looked as it wrote each word",
    },
    "--serve": {
        "nargs": "?",
        "type": int,
        "const": 8000,
        "metavar": "PORT",
        "help": "open a page on this machine (default port: 8000)",
    },
}
# Up to this many photographs are captioned one at a time: a full batch costs
# the same however few photographs it holds.
FEW = 24
# Characters in a file's name that would break a line `photo<TAB>caption`.
ESCAPES = str.maketrans({"\t": r"\t", "\n": r"\n", "\r": r"\r"})


def main(arguments: command.Arguments) -> int:
    """Captions photographs; returns 1 if some could not be read."""
    actions = arguments.actions
    if bool(actions.photos) == (actions.serve is not None):
        command.tell(
            "give photographs, folders or - (a list on standard input), or "
            "else --serve"
        )
        return command.WRONG_USAGE
    if actions.serve is not None:
        return serve(arguments)
    photos, failed = find_photos(actions.photos)
    if actions.attention:
        Path(actions.attention).mkdir(parents=True, exist_ok=True)
    config, run = open_run(arguments)
    captioner = load_captioner(config, run, one_by_one=len(photos) <= FEW)
    captioned = 0
    for photo, found, reason in caption(photos, captioner, config.input_size):
        if found:
            print(line(photo, found, actions.json))
        if found and actions.attention:
            reason = draw(Path(actions.attention), photo, found)
        if reason:
            command.tell(f"{photo}: {reason}")
            failed += 1
        else:
            captioned += 1
    after = ""
    if captioned and actions.attention:
        after = f"; figures in {actions.attention}"
    elif captioned:
        after = ". Next: --attention maps shows where it looked"
    print(
        f"Captioned {captioned:,} of {captioned + failed:,} photographs with "
        f"{run}{after}",
        file=sys.stderr,
    )
    return command.FAILED if failed else command.DONE


def choose_run(arguments: command.Arguments) -> Config:
    """The config, with a run trained on photographs if it names no run."""
    from captioning import runs

    config = arguments.config
    named = {"run_name", "dataset", "dataset_dir"} & arguments.given.keys()
    if named or Config.run_name or config.dataset != SAMPLE:
        return config
    name = runs.newest_of_photographs(config.checkpoints_dir)
    print(
        f"Captioning with the run {name}; choose another with --run-name.",
        file=sys.stderr,
    )
    return dataclasses.replace(config, run_name=name)


def open_run(arguments: command.Arguments) -> tuple[Config, Path]:
    """The config and the folder of the run that captions.

    Warns if it has never seen a photograph.
    """
    from captioning import run_configs

    wanted = choose_run(arguments)
    config, run = run_configs.decoding_config(wanted, arguments.given)
    if config.dataset == SAMPLE:
        print(
            f"Note: {run} was trained only on the sample's drawn scenes; its "
            "captions of photographs are meaningless.",
            file=sys.stderr,
        )
    return config, run


def serve(arguments: command.Arguments) -> int:
    """Captions the photographs that are dropped on a local page."""
    config, run = open_run(arguments)
    captioner = load_captioner(config, run, one_by_one=True)
    # It imports Keras, which has been imported quietly by now.
    from captioning.decoding import serve as page

    title = f"Captions by {run.name}"
    app = page.application(captioner, title, config.input_size)
    page.serve(app, arguments.actions.serve)
    return command.DONE


def find_photos(named: list[str]) -> tuple[list[str], int]:
    """The photographs that arguments name, and how many names are wrong."""
    from captioning.data import photographs

    found = photographs.find(named, sys.stdin or [])
    for name, told in [*found.missing, *found.others]:
        command.tell(f"{name}: {told}")
    if not found.photographs:
        raise UserError(
            "no photographs found: give files, folders that contain "
            "photographs, or - and a list of them on standard input"
        )
    return found.photographs, len(found.missing)


def load_captioner(config: Config, run: Path, one_by_one: bool) -> Any:
    """A function from the pixels of photographs to the captions of each.

    Args:
        config: from `run_configs.decoding_config`.
        run: the run folder.
        one_by_one: whether each photograph is a batch of its own.
    """
    command.import_keras()
    from captioning.decoding import captioner
    from captioning.features import extraction

    batch = 1 if one_by_one else extraction.BATCH
    return captioner.of_photographs(config, run, batch)


def caption(
    photos: list[str], captioner: Any, size: int
) -> Iterator[tuple[str, Any, str]]:
    """Captions photographs, batch by batch.

    Args:
        photos: their paths.
        captioner: from `load_captioner`.
        size: of the images that it takes, in pixels.

    Yields:
        The path of a photograph, its captions (`captioner.Captioned`, None if
        it cannot be used), and the reason why it cannot be used.
    """
    from tqdm import tqdm

    from captioning.features import extraction

    batches = extraction.read_ahead(Path(), extraction.in_batches(photos), size)
    # The bar is on standard error, and only for a person who waits.
    quiet = not sys.stderr.isatty() or sys.stdout.isatty()
    for batch in tqdm(batches, unit="batch", disable=quiet):
        pixels = [each.pixels for each in batch if each.pixels is not None]
        captions = iter(captioner(pixels))
        for each in batch:
            if each.pixels is None:
                yield each.name, None, each.reason
            else:  # the reason says what was repaired
                yield each.name, next(captions), ""


def line(photo: str, found: Any, as_json: bool) -> str:
    """What is printed for a photograph."""
    if not as_json:
        return f"{photo.translate(ESCAPES)}\t{found.caption}"
    n_best = [
        {
            "caption": each.caption,
            "agreement": round(each.agreement, 5),
            "score": round(each.score, 5),
            "log_probability": round(each.log_probability, 5),
        }
        for each in found.n_best
    ]
    words = [
        {
            "word": word,
            "probability": round(float(probability), 5),
            "attention": [round(float(x), 5) for x in weights],
        }
        for word, probability, weights in zip(
            found.words, found.probabilities, found.attention, strict=True
        )
    ]
    side = round(found.attention.shape[1] ** 0.5)
    entry = {"photo": photo, **n_best[0], "n_best": n_best}
    entry |= {"attention_grid": [side, side], "words": words}
    return json.dumps(entry, ensure_ascii=False)


def draw(folder: Path, photo: str, found: Any) -> str:
    """Writes the attention figure of a photograph.

    Returns:
        Why it could not; empty if it could.
    """
    from captioning.data import images
    from captioning.scoring import figures

    try:
        pixels, _ = images.read_image(
            Path(photo), figures.PHOTO_SIDE, square=False
        )
    except images.UnusableImage as error:  # it was still there a moment ago
        return str(error)
    path = folder / figures.figure_name(os.path.abspath(photo))
    figures.write_attention_figure(path, pixels, found.words, found.attention)
    return ""


if __name__ == "__main__":
    command.run(main, __doc__, ACTIONS, end_with_reader=True)
