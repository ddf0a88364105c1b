"""Your own photographs -> captions.

    python caption.py holiday.jpg
    python caption.py --dataset flickr30k --attention maps photographs/
    python caption.py --serve

Captions photographs, or all that are in a folder, with a trained run, and
prints a line `photo<TAB>caption` for each. A `-` takes the list of photographs
from standard input, one a line. With --serve it opens a page on this machine
where photographs are dropped instead.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from captioning import command
from config import Config, UserError

ACTIONS = [
    command.Action(
        "photos",
        {
            "nargs": "*",
            "default": [],
            "metavar": "PHOTO_OR_FOLDER",
            "help": "photographs, folders of them, or - for a list",
        },
    ),
    command.Action(
        "--json",
        {
            "action": "store_true",
            "default": False,
            "help": "print a JSON object a line: photo, caption, its "
            "log-probability, n_best (the whole beam, what it agrees with "
            "most first) and words with their attention",
        },
    ),
    command.Action(
        "--attention",
        {
            "metavar": "DIR",
            "default": "",
            "help": "write there what each word looked at, a figure a photo",
        },
    ),
    command.Action(
        "--serve",
        {
            "nargs": "?",
            "type": int,
            "const": 8000,
            "default": None,
            "metavar": "PORT",
            "help": "open a page on this machine (default: port 8000)",
        },
    ),
]
ENDINGS = {
    *(".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff"),
    ".avif",
}
PHOTO_SIDE = 448  # pixels, of the photograph in an attention figure


def main(arguments: command.Arguments) -> int:
    """Captions photographs; returns 1 if some could not be read."""
    from tqdm import tqdm

    from captioning import runs
    from captioning.features import extraction

    actions = arguments.actions
    if actions.serve is not None:
        return serve(arguments)
    if not actions.photos:
        print(
            "caption.py: give photographs, folders of them, - or --serve",
            file=sys.stderr,
        )
        return command.WRONG_USAGE
    photos, failed = find_photos(actions.photos)
    config, run = runs.decoding_config(arguments)
    captioner = load_captioner(config, run)
    reads = extraction.read_ahead(Path(), photos, config.input_size)
    done, taken = 0, set()
    # The bar is on standard error and only for a person who waits.
    quiet = not sys.stderr.isatty() or sys.stdout.isatty()
    for batch in tqdm(reads, unit="batch", disable=quiet):
        for each in batch:
            if each.pixels is None:
                complain(each.name, each.reason)
                failed += 1
        good = [each for each in batch if each.pixels is not None]
        for each, found in zip(good, captioner(good), strict=True):
            print(line(each.name, found, actions.json), flush=True)
            if actions.attention:
                name = figure_name(each.name, taken)
                draw(Path(actions.attention) / name, each.name, found)
            done += 1
    where = f"; figures in {actions.attention}" if actions.attention else ""
    print(
        f"{done:,} captions by {run}, {failed:,} photographs left out{where}. "
        "Next: python evaluate.py scores the run",
        file=sys.stderr,
    )
    return command.FAILED if failed else command.DONE


def serve(arguments: command.Arguments) -> int:
    """Captions the photographs that are dropped on a local page."""
    from captioning import runs

    config, run = runs.decoding_config(arguments)
    captioner = load_captioner(config, run)
    # It imports Keras, which has been imported quietly by now.
    from captioning.decoding import serve as page

    app = page.application(
        captioner, f"Captions by {run.name}", config.input_size
    )
    page.serve(app, arguments.actions.serve)
    return command.DONE


def find_photos(named: list[str]) -> tuple[list[str], int]:
    """The photographs that arguments name, and how many are not there."""
    photos, failed = [], 0
    for name in listed(named):
        path = Path(name)
        if path.is_dir():
            photos += sorted(
                str(each)
                for each in path.rglob("*")
                if each.suffix.lower() in ENDINGS and each.is_file()
            )
        elif path.exists():
            photos.append(name)
        else:
            complain(name, "there is no such file")
            failed += 1
    if not photos:
        raise UserError(
            "no photographs found: give files, folders that hold "
            "photographs, or - and a list of them on standard input"
        )
    return photos, failed


def listed(named: list[str]) -> Iterator[str]:
    """The names themselves; for `-`, those on standard input."""
    for name in named:
        if name == "-":
            yield from filter(None, (each.strip("\r\n") for each in sys.stdin))
        else:
            yield name


def complain(photo: str, reason: str) -> None:
    """Says on standard error why a photograph is left out."""
    print(f"caption.py: {photo}: {reason}", file=sys.stderr)


def load_captioner(config: Config, run: Path) -> Any:
    """A function from read photographs to what the search found for each."""
    command.import_keras()
    import numpy as np

    import model as captioning_model
    from captioning import backend, runs
    from captioning.decoding import search
    from captioning.features import extraction

    backend.set_precision(config)
    description, _ = runs.load_features(run)
    weights = captioning_model.check_weights(config, description)
    decoder, words = captioning_model.load_decoder(config, run)
    encoder = captioning_model.build_encoder(config, weights)
    searcher = search.build(decoder, config)

    def caption(photos: list[extraction.Read]) -> list[Any]:
        if not photos:
            return []
        pixels = [each.pixels for each in photos]
        features = extraction.encode(pixels, encoder.predict_on_batch)
        rows = np.arange(len(features))
        return search.caption_rows(searcher, features, rows, words)

    return caption


def line(photo: str, found: Any, as_json: bool) -> str:
    """What is printed for a photograph."""
    if not as_json:
        return f"{photo}\t{found.caption}"
    attention = [
        {"word": word, "attention": [round(float(x), 5) for x in weights]}
        for word, weights in zip(found.words, found.attention, strict=True)
    ]
    entry = {
        "photo": photo,
        "caption": found.caption,
        "score": round(found.n_best[0].score, 5),
        "log_probability": round(found.n_best[0].log_probability, 5),
        "n_best": [
            {
                "caption": each.caption,
                "score": round(each.score, 5),
                "log_probability": round(each.log_probability, 5),
            }
            for each in found.n_best
        ],
        "words": attention,
    }
    return json.dumps(entry, ensure_ascii=False)


def figure_name(photo: str, taken: set[str]) -> str:
    """A file name for the attention figure of a photograph.

    Args:
        photo: its path; the folders it is in are part of the name.
        taken: the names that there are, without their ending; gets this one.
    """
    path = Path(photo).with_suffix("")
    parts = path.relative_to(path.anchor).parts[-3:]
    name = free = "_".join(parts).lstrip("._")
    number = 1
    while free in taken:
        number += 1
        free = f"{name}-{number}"
    taken.add(free)
    return f"{free}.png"


def draw(path: Path, photo: str, found: Any) -> None:
    """Writes the attention figure of a photograph."""
    from captioning.data import images
    from captioning.decoding import search
    from captioning.scoring import report

    pixels, _ = images.read_image(Path(photo), PHOTO_SIDE)
    maps = search.square(found.attention)
    report.write_attention_figure(path, pixels, found.words, maps)


if __name__ == "__main__":
    command.run(main, __doc__, ACTIONS, end_with_reader=True)
