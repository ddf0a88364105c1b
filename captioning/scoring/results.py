"""The files of an evaluation: one set, written and replaced together."""

import contextlib
import hashlib
import json
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from captioning import runs
from captioning.data import images as photographs
from captioning.data import prepared
from captioning.data.caption_files import as_text
from captioning.features import cache as features
from captioning.features import store
from captioning.files import write_csv, write_json, write_text
from captioning.scoring import errors, figures, report, table
from captioning.scoring.metrics import Scores
from config import Config, UserError, defaults, group

FIGURES = 12  # attention figures per evaluation
FILES = {
    "captions.json",
    "captions.csv",
    "metrics.json",
    "report.html",
    "attention",
}
# Columns of captions.csv that the report shows.
SHOWN = ["image", "caption", "references", "bleu4", "rouge_l", "cider"]
MODEL_METRICS = (
    "token_accuracy",
    "token_accuracy_top5",
    "perplexity",
    "images_per_second",
)
# What other values of these fields are called in the name of a folder.
SEARCH = {
    "beam_size": "beam",
    "length_exponent": "length",
    "consensus_temperature": "consensus",
    "consensus_samples": "samples",
    "min_caption_length": "min",
    "no_repeat_ngram": "norepeat",
}
DATA = {
    "dataset": "on-",
    "layout": "",
    "val_share": "val",
    "test_share": "test",
}


def folder_name(
    config: Config, trained: Config, limit_images: int, captions: str | None
) -> str:
    """Names the folder of an evaluation by its split and what differs.

    The plain name of the split is that of all images, searched by the
    defaults of the run's dataset, in the precision of the run.

    Args:
        config: what is evaluated, with its precision resolved.
        trained: the config that trained the run.
        limit_images: how many images are evaluated; 0 for all.
        captions: the file whose captions are scored; None for the run's own.
    """
    parts = [config.split]
    for name, called in DATA.items():
        if getattr(config, name) != getattr(trained, name):
            parts.append(f"{called}{getattr(config, name)}")
    if captions:
        stem = re.sub(r"[^\w-]+", "_", Path(captions).stem)[:40]
        digest = hashlib.sha256(Path(captions).read_bytes()).hexdigest()[:8]
        parts.append(f"captions-{stem}-{digest}")
    else:
        usual = defaults(trained.dataset)
        for name, called in SEARCH.items():
            if getattr(config, name) != getattr(usual, name):
                parts.append(f"{called}{getattr(config, name):g}")
        if config.precision != trained.precision:
            parts.append(config.precision)
    if limit_images:
        parts.append(f"limit{limit_images}")
    return "-".join(parts)


@contextlib.contextmanager
def replaced(folder: Path) -> Iterator[Path]:
    """Yields a new folder to write to, which then replaces another.

    A process that ends early leaves the old files as they were. What it has
    written stays in `<folder>-unfinished` until the next evaluation: captions
    take hours to make and can be scored again.

    Args:
        folder: what to replace. Files in it that are not evaluate.py's are
            kept.

    Yields:
        The path of the new folder, which does not exist yet.
    """
    part = folder.with_name(f"{folder.name}-unfinished")
    old = folder.with_name(f".old-{folder.name}")
    if old.exists() and not folder.exists():
        old.rename(folder)  # a process ended between the two renames below
    _discard(old, folder)
    shutil.rmtree(part, ignore_errors=True)
    try:
        yield part
    except UserError as error:
        if (part / "captions.json").exists():
            raise UserError(
                f"{error}; the captions are kept in {part}"
            ) from None
        raise
    if folder.exists():
        folder.rename(old)
    part.rename(folder)
    _discard(old, folder)


def _discard(old: Path, folder: Path) -> None:
    """Deletes a replaced folder, after moving foreign files to the new one."""
    if not old.exists():
        return
    for each in old.iterdir():
        if each.name not in FILES and not (folder / each.name).exists():
            os.replace(each, folder / each.name)
    shutil.rmtree(old)


def read_captions(path: Path, split: prepared.Split) -> dict[str, str]:
    """Reads captions in COCO's results format.

    Returns:
        image -> caption.

    Raises:
        UserError: if the file is not in this format, or a name belongs to no
            image of the split.
    """
    image_of = dict(zip(map(str, split.image_ids), split.images, strict=True))
    try:
        entries = json.loads(path.read_bytes())  # UTF-8, 16 or 32
        pairs = [(str(e["image_id"]), e["caption"] or "") for e in entries]
        found = {image_of.get(name, name): text for name, text in pairs}
        if not all(isinstance(text, str) for text in found.values()):
            raise ValueError("a caption is not a string")
        # Half of an emoji, "\\ud83d" in JSON, cannot be written to a file.
        found = {image: as_text(text) for image, text in found.items()}
        if len(found) < len(pairs):
            raise ValueError("an image occurs twice")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is not a file of captions ({error}): it has to be a JSON "
            'list of {"image_id": ..., "caption": ...}'
        ) from None
    unknown = found.keys() - {*split.images}
    if unknown:
        raise UserError(
            f"{len(unknown)} captions in {path} belong to images that are not "
            f"in the split, such as {min(unknown)}: check --dataset and --split"
        )
    return found


def write_captions(
    path: Path, split: prepared.Split, captions: Mapping[str, str]
) -> None:
    """Writes captions in COCO's results format."""
    entries = [
        {"image_id": number, "caption": captions[image]}
        for image, number in zip(split.images, split.image_ids, strict=True)
        if image in captions
    ]
    write_json(path, entries, indent=0, ensure_ascii=False)


def all_metrics(
    config: Config,
    run: Mapping[str, Any],
    measured: Mapping[str, Any],
    scores: Scores,
) -> dict[str, Any]:
    """Joins the figures of a model with the scores of its captions.

    Args:
        config: its decoding fields.
        run: from `describe_run`.
        measured: teacher-forced metrics, their intervals and the speed; empty
            where the captions were read from a file.
        scores: of the captions.
    """
    unavailable = dict(scores.metrics["unavailable"])
    if not measured:
        why = "the captions were read from a file"
        unavailable |= dict.fromkeys(MODEL_METRICS, why)
    beam_size = config.beam_size if measured else None
    # A single hypothesis has no others to agree with.
    consensus = config.consensus_temperature if (beam_size or 1) > 1 else None
    samples = config.consensus_samples if consensus else None
    return {
        "split": config.split,
        "run": dict(run),
        "beam_size": beam_size,
        "consensus_temperature": consensus,
        "consensus_samples": samples,
        **dict.fromkeys(unavailable),
        **measured,
        **scores.metrics,
        "intervals": {
            **measured.get("intervals", {}),
            **scores.metrics["intervals"],
        },
        "unavailable": unavailable,
    }


def describe_run(
    members: Sequence[tuple[Config, Path]], images: Sequence[str], own: bool
) -> dict[str, Any]:
    """What produced the metrics, as metrics.json has it under `run`.

    Args:
        members: config and folder of each run; if several were averaged,
            encoder, epoch, seed and started_from are lists.
        images: what was evaluated.
        own: whether the captions are the run's own, and not from a file.
    """
    of_each: dict[str, list[Any]] = {
        "encoder": [config.encoder for config, _ in members],
        "epoch": [runs.best_epoch(place) for _, place in members],
        "seed": [config.seed for config, _ in members],
        "started_from": [
            runs.load_description(place).started_from for _, place in members
        ],
    }
    several = len(members) > 1
    # Whichever of them were used.
    packages = [sys.modules.get(x) for x in ("keras", "tensorflow", "jax")]
    return {
        "run": "+".join(place.name for _, place in members),
        "dataset": members[0][0].dataset,
        **{k: v if several else v[0] for k, v in of_each.items()},
        "precision": members[0][0].precision if own else None,
        "images_trained_on": count_trained_on(members, images),
        "versions": {
            "python": platform.python_version(),
            **{x.__name__: x.__version__ for x in packages if x},
        },
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def count_trained_on(
    members: Sequence[tuple[Config, Path]], images: Sequence[str]
) -> int | None:
    """How many images any of the runs was trained on; None if not known."""
    seen = np.zeros(len(images), bool)
    for config, place in members:
        encoders = runs.load_description(place).encoders
        try:
            pixels = store.pixel_digests(config, encoders, images)
        except UserError:  # captions from a file can be scored without them
            pixels = np.zeros((len(images), features.DIGEST_BYTES), np.uint8)
        same_dataset = config.dataset == runs.load_config(place).dataset
        found = runs.trained_on(place, images, pixels, same_dataset)
        if found is None:
            return None
        seen |= found
    return int(seen.sum())


def write_examples(
    path: Path,
    captions: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    scores: Scores,
    counts: pd.DataFrame | None,
) -> pd.DataFrame:
    """Writes captions.csv; returns it, with references as lists of texts.

    Args:
        path: of the file.
        captions: image -> its caption.
        references: image -> its references.
        scores: of the captions.
        counts: from `teacher_forced.count`, if the model was measured.
    """
    examples = scores.per_image
    if counts is not None:
        examples = examples.join(counts)
    examples = examples.rename_axis("image").reset_index()
    images = examples["image"]
    examples.insert(1, "caption", [captions.get(each, "") for each in images])
    examples.insert(2, "references", [references[each] for each in images])
    as_json = [json.dumps(references[x], ensure_ascii=False) for x in images]
    write_csv(path, examples.assign(references=as_json))
    return examples


def write_report(
    place: Path,
    title: str,
    config: Config,
    metrics: Mapping[str, Any],
    examples: pd.DataFrame,
    captioned: Mapping[str, Any],
    images_dir: Path,
    history: Path,
) -> None:
    """Writes report.html, which needs no network, and some attention figures.

    Args:
        place: the folder of the evaluation.
        title: of the report.
        config: its dataset; for a known one, published results are shown.
        metrics: as in metrics.json.
        examples: from `write_examples`.
        captioned: image -> its `captioner.Captioned`.
        images_dir: where the photographs are; those that cannot be read are
            left out.
        history: the run's history.csv, which need not exist.
    """
    epochs = pd.read_csv(history) if history.exists() else pd.DataFrame()
    best_epoch = metrics["run"]["epoch"] or 0
    notes, published = table.comparison(metrics, config.dataset)
    page = report.template("scoring/report.html.jinja").render(
        title=title,
        metrics=metrics,
        heading=table.heading(metrics),
        figures=table.rows(metrics),
        notes=notes,
        published=published,
        # Images without a usable reference have no score and no place here.
        examples=[
            report.example(row, captioned[row["image"]], images_dir)
            for row in examples[SHOWN].to_dict("records")
        ],
        errors=errors.find(examples, config.tokeniser),
        settings={
            name: {field: getattr(config, field) for field in group(name)}
            for name in ("data", "encoder", "model", "training", "decoding")
        },
        history=epochs,
        curves=[
            figures.curve(epochs, best_epoch, panel)
            for panel in figures.PANELS
            if len(epochs)
        ],
    )
    write_text(place / "report.html", page)
    for row in examples.head(FIGURES).itertuples():
        try:
            photo, _ = photographs.read_image(
                images_dir / row.image, figures.PHOTO_SIDE, square=False
            )
        except photographs.UnusableImage:
            continue
        path = place / "attention" / figures.figure_name(row.image)
        found = captioned[row.image]
        figures.write_attention_figure(
            path, photo, found.words, found.attention
        )
