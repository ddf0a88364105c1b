"""checkpoints/<run>/ -> captions, metrics, report.

    python evaluate.py
    python evaluate.py --dataset flickr8k --split val --beam-size 3
    python evaluate.py --captions captions.json
    python evaluate.py --runs first second
    python evaluate.py --export program

Captions a split with beam search, scores the captions and leaves both in
checkpoints/<run>/evaluation/<split>/. With --captions it only scores a file
of captions (COCO's results format) against the split. With --runs it averages
the probabilities of several runs at every word, and leaves what they are
together worth in checkpoints/<run>+<run>/evaluation/<split>/. With --export it
scores nothing, and writes the run as one program, from pixels to words.
"""

import json
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from captioning import command
from config import Config, UserError

ACTIONS = [
    command.Action(
        "--captions",
        {
            "metavar": "FILE",
            "default": "",
            "help": "score these captions instead of making some",
        },
    ),
    command.Action(
        "--runs",
        {
            "nargs": "+",
            "metavar": "RUN",
            "default": [],
            "help": "average these runs, folders in checkpoints/, of one "
            "vocabulary",
        },
    ),
    command.Action(
        "--export",
        {
            "metavar": "DIR",
            "default": "",
            "help": "write encoder, decoder and search there as one "
            "TensorFlow SavedModel",
        },
    ),
]
SHOWN = 5  # captions printed
DRAWN = 12  # attention figures written
PHOTO_SIDE = 448  # pixels, of the photograph in such a figure


def main(arguments: command.Arguments) -> None:
    """Evaluates a run on a split."""
    from captioning import runs
    from captioning.data import prepared
    from captioning.files import lock
    from captioning.scoring import metrics

    members = runs.members(arguments, arguments.actions.runs)
    config, run = members[0][0], runs.together(members)
    if arguments.actions.export:
        export_run(members, Path(arguments.actions.export))
        return
    split = prepared.load_split(config, config.split)
    split = limit(split, arguments.given.get("limit_images", 0))
    place = run / "evaluation" / config.split
    with lock(place):
        if arguments.actions.captions:
            captions = read_captions(Path(arguments.actions.captions), split)
            figures, attention = {}, None
        else:
            command.import_keras()
            from captioning.decoding import search

            found, figures = caption_split(members, split)
            captions = {
                image: each.caption
                for image, each in zip(split.images, found, strict=True)
            }
            attention = {
                image: search.square(each.attention)
                for image, each in zip(split.images, found, strict=True)
            }
            # Before anything is scored: hours of work end up on disk first.
            write_captions(place / "captions.json", split, captions)
        references = dict(zip(split.images, split.captions, strict=True))
        scores = metrics.score(captions, references, training_captions(config))
        figures = all_metrics(config, figures, scores)
        write_metrics(place / "metrics.json", figures)
        examples = write_examples(
            place / "captions.csv", captions, references, scores
        )
        if attention is not None:
            write_report(config, run, place, figures, examples, attention)
    for line in scores.notices:
        print(line)
    print(metrics.table(figures, config.dataset))
    show(examples)
    look = "" if attention is None else " (report.html to look at)"
    next_line = command.next_line("caption.py", arguments)
    if arguments.actions.runs:  # of which caption.py takes one
        next_line += f" --run-name {members[0][1].name}"
    print(f"Wrote {place}{look}. Next: {next_line} PHOTO_OR_FOLDER...")


def export_run(members: list[tuple[Config, Path]], folder: Path) -> None:
    """Writes a run as one program."""
    if len(members) > 1:
        raise UserError("--export takes one run: give --run-name, not --runs")
    command.import_keras()
    import model as captioning_model
    from captioning import backend, runs
    from captioning.decoding import export, search

    config, run = members[0]
    backend.set_precision(config)
    description, _ = runs.load_features(run)
    weights = captioning_model.check_weights(config, description)
    encoder = captioning_model.build_encoder(config, weights)
    decoder, words = captioning_model.load_decoder(config, run)
    searcher = search.build(decoder, config)
    export.save(encoder, searcher, words, config.input_size, folder)
    print(
        f"Wrote {folder}: uint8 RGB images (batch, {config.input_size}, "
        f"{config.input_size}, 3) -> word_ids, words, scores. "
        f"Next: program = tf.saved_model.load({str(folder)!r}); "
        "program.serve(images)"
    )


def limit(split: Any, images: int) -> Any:
    """The first images of a split; all of them for 0."""
    if not images:
        return split
    return type(split)(*(column[:images] for column in split))


def training_captions(config: Config) -> list[str]:
    """What people wrote of the training images."""
    from captioning.data import prepared

    captions = prepared.load_split(config, "train").captions
    return [caption for each in captions for caption in each]


def caption_split(
    members: list[tuple[Config, Path]], split: Any
) -> tuple[list[Any], dict[str, float]]:
    """Captions the images of a split.

    Args:
        members: the config and folder of each run that is averaged.
        split: from `prepared.load_split`.

    Returns:
        What the search found for each image, and the figures that need the
        model: teacher-forced ones and the speed.
    """
    from captioning import backend
    from captioning.decoding import search

    config = members[0][0]
    backend.set_precision(config)
    opened = [open_run(*each, split.images) for each in members]
    decoders, vocabularies, features, rows = zip(*opened, strict=True)
    words, images = vocabularies[0], len(split.images)
    averaged = f", {len(members)} runs averaged" if len(members) > 1 else ""
    print(
        f"Captioning {images:,} images, beam size {config.beam_size}{averaged}"
    )
    searcher = search.build(decoders, config)
    # The first batch compiles the search, which is no part of its speed.
    first = [each[:1] for each in rows]
    search.caption_together(searcher, features, first, words)
    begun = time.monotonic()
    found = search.caption_together(
        searcher, features, rows, words, progress=True
    )
    speed = images / (time.monotonic() - begun)
    figures = teacher_forced(config, decoders, features, rows, split, words)
    return found, {**figures, "images_per_second": speed}


def open_run(
    config: Config, run: Path, images: list[str]
) -> tuple[Any, Any, Any, Any]:
    """Opens a run: decoder, vocabulary, features and the images' rows."""
    import model as captioning_model
    from captioning import runs
    from captioning.data import prepared

    description, _ = runs.load_features(run)
    # The features are cached: weights that are not at hand are not needed.
    if Path(captioning_model.encoder_weights(config)).exists():
        captioning_model.check_weights(config, description)
    cache, rows = prepared.load_features(config, description, images)
    decoder, words = captioning_model.load_decoder(config, run)
    return decoder, words, cache.features, rows


def teacher_forced(
    config: Config,
    decoders: Sequence[Any],
    features: Sequence[Any],
    rows: Sequence[Any],
    split: Any,
    words: Any,
) -> dict[str, float]:
    """Token accuracy and perplexity, given the true words before."""
    import numpy as np

    import model as captioning_model
    from captioning import backend
    from captioning.data.vocabulary import encode
    from captioning.training.batches import CaptionBatches, JointBatches

    captions = [
        encode(tokens, words, config.max_caption_length)
        for tokens in split.tokens
    ]
    batches = [
        CaptionBatches(*each, captions, config.step_images)
        for each in zip(features, rows, strict=True)
    ]
    scored, batches = (
        (decoders[0], batches[0])
        if len(decoders) == 1
        else (captioning_model.Ensemble(decoders), JointBatches(batches))
    )
    scored.compile(
        loss=captioning_model.SmoothedCrossEntropy(),
        weighted_metrics=[
            captioning_model.TokenAccuracy(),
            captioning_model.TokenAccuracy(5, "token_accuracy_top5"),
        ],
        jit_compile=backend.use_xla(),
    )
    figures = scored.evaluate(batches, return_dict=True, verbose=0)
    return {
        "token_accuracy": float(figures["token_accuracy"]),
        "token_accuracy_top5": float(figures["token_accuracy_top5"]),
        "perplexity": float(np.exp(figures["loss"])),
    }


def read_captions(path: Path, split: Any) -> dict[str, str]:
    """Reads captions in COCO's results format: image -> caption.

    Raises:
        UserError: if the file is not one.
    """
    image_of = dict(zip(map(str, split.image_ids), split.images, strict=True))
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        pairs = [(str(e["image_id"]), e["caption"] or "") for e in entries]
        # Names that are of no image of the split are told of by the scorer.
        found = {image_of.get(name, name): text for name, text in pairs}
        if not all(isinstance(text, str) for text in found.values()):
            raise ValueError("a caption is no text")
        if len(found) < len(pairs):
            raise ValueError("an image comes twice")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is no file of captions ({error}): it has to be a JSON "
            'list of {"image_id": ..., "caption": ...}'
        ) from None
    return found


def write_captions(path: Path, split: Any, captions: dict[str, str]) -> None:
    """Writes captions in COCO's results format."""
    from captioning.files import write_text

    entries = [
        {"image_id": number, "caption": captions[image]}
        for image, number in zip(split.images, split.image_ids, strict=True)
    ]
    write_text(path, json.dumps(entries, ensure_ascii=False, indent=0) + "\n")


def all_metrics(
    config: Config, figures: dict[str, float], scores: Any
) -> dict[str, Any]:
    """Joins the figures of the model with the scores of its captions."""
    unavailable = dict(scores.metrics["unavailable"])
    for name in (
        "token_accuracy",
        "token_accuracy_top5",
        "perplexity",
        "images_per_second",
    ):
        if name not in figures:
            unavailable[name] = "captions were read from a file"
    return {
        "split": config.split,
        "beam_size": config.beam_size if figures else None,
        # A single hypothesis has no others to agree with.
        "consensus_temperature": (
            config.consensus_temperature
            if figures and config.beam_size > 1
            else None
        ),
        **dict.fromkeys(unavailable),
        **figures,
        **scores.metrics,
        "unavailable": unavailable,
    }


def write_metrics(path: Path, figures: dict[str, Any]) -> None:
    """Writes metrics.json."""
    from captioning.files import write_text

    text = json.dumps(figures, indent=2, ensure_ascii=False, allow_nan=False)
    write_text(path, text + "\n")


def write_examples(
    path: Path,
    captions: dict[str, str],
    references: dict[str, list[str]],
    scores: Any,
) -> Any:
    """Writes captions.csv: each image's caption, references and scores."""
    from captioning.files import write_csv

    table = scores.per_image.reset_index()
    table.insert(1, "caption", [captions.get(i, "") for i in table["image"]])
    table.insert(2, "references", [references[i] for i in table["image"]])
    as_json = table["references"].map(
        lambda each: json.dumps(each, ensure_ascii=False)
    )
    write_csv(path, table.assign(references=as_json))
    return table


def write_report(
    config: Config,
    run: Path,
    place: Path,
    figures: dict[str, Any],
    examples: Any,
    attention: dict[str, Any],
) -> None:
    """Writes report.html and some attention figures."""
    import pandas as pd

    from captioning.data import images, prepared
    from captioning.scoring import report
    from captioning.scoring.figures import write_attention_figure

    directory = prepared.images_dir(config)
    # Images without a usable reference have no score and no place here.
    maps = [attention[image] for image in examples["image"]]
    history = run / "history.csv"
    report.write_report(
        place / "report.html",
        f"{run.name} on {config.split}",
        config.dataset,
        figures,
        examples,
        maps,
        directory,
        pd.read_csv(history) if history.exists() else None,
    )
    pairs = zip(examples.itertuples(), maps, strict=True)
    for row, each in islice(pairs, DRAWN):
        try:
            photo, _ = images.read_image(
                directory / row.image, PHOTO_SIDE, square=False
            )
        except images.UnusableImage:
            continue
        write_attention_figure(
            place / "attention" / (Path(row.image).stem + ".png"),
            photo,
            row.caption.split(),
            each,
        )


def show(examples: Any) -> None:
    """Prints a few captions beside what people wrote."""
    for row in examples.head(SHOWN).itertuples():
        print(f"  {row.image}: {row.caption}")
        print(f"      a reference: {row.references[0]}")


if __name__ == "__main__":
    command.run(main, __doc__, ACTIONS)
