"""The metrics as people read them, beside the published ones."""

import re
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from captioning.scoring.metrics import PTB
from config import CHARACTERS

_WIDTH = 100  # columns
# What each metric is called, how its value is written, and what it means.
_METRICS = pd.read_csv(Path(__file__).with_name("metrics.csv"))
_PUBLISHED = pd.read_csv(Path(__file__).with_name("published.csv"))
# What characters and words score differently.
_BY_TOKENS = ["bleu1", "bleu2", "bleu3", "bleu4", "rouge_l", "cider"]
# Above these rows there is a title.
_TITLES = {"token_accuracy": "Teacher-forced", "bleu1": "Free-running captions"}


class Row(NamedTuple):
    """A metric in words."""

    name: str  # its key in metrics.json
    title: str
    shown: str  # its value; empty where it could not be computed
    interval: str
    meaning: str
    reason: str  # why it could not be computed


def titles(tokenizer: str) -> list[tuple[str, str, str]]:
    """The key, the title and the format of each metric, in order.

    Args:
        tokenizer: as in metrics.json.
    """
    named = _named(tokenizer)
    return [row[:3] for row in named.itertuples(index=False, name=None)]


def _named(tokenizer: str) -> pd.DataFrame:
    """The table of the metrics, which says what they count."""
    if tokenizer != CHARACTERS:
        return _METRICS
    named = _METRICS.copy()
    named["meaning"] = named["meaning"].str.replace("words", CHARACTERS)
    named.loc[named["name"].isin(_BY_TOKENS), "title"] = (
        "character " + named["title"]
    )
    return named


def rows(metrics: Mapping[str, Any]) -> list[Row]:
    """All metrics in words, in order.

    Args:
        metrics: as in metrics.json.
    """
    found = []
    named = _named(metrics["tokenizer"])
    for name, title, form, meaning in named.itertuples(index=False):
        value, shown, reason = metrics.get(name), "", ""
        if value is None:
            reason = metrics["unavailable"].get(name, "not measured")
        else:
            shown = form.format(value)
        ends = metrics["intervals"].get(name, [])
        interval = " to ".join(form.format(x).rstrip("%") for x in ends)
        found.append(Row(name, title, shown, interval, meaning, reason))
    return found


def heading(metrics: Mapping[str, Any]) -> str:
    """What was captioned and how, for the terminal and the report."""
    search = ""
    if beam := metrics["beam_size"]:
        search = f", beam size {beam}"
    if metrics["consensus_temperature"]:
        search += " by consensus"
        if samples := metrics["consensus_samples"]:
            search += f" with {samples} sample{'s' * (samples > 1)}"
    return (
        f"{metrics['split']} split: {metrics['images']:,} images{search}; "
        f"tokenised by {metrics['tokenizer']}"
    )


def table(metrics: Mapping[str, Any], dataset: str) -> str:
    """The metrics as text for a terminal.

    Args:
        metrics: as in metrics.json.
        dataset: its name; for a well-known one, published rows are included.

    Returns:
        Plain text, at most 100 columns wide.
    """
    lines = textwrap.wrap(f"{dataset}, {heading(metrics)}", _WIDTH)
    found = rows(metrics)
    wide = max(len(row.title) for row in found) + 1
    for row in found:
        if row.name in _TITLES:
            lines += ["", f"{_TITLES[row.name]:{wide + 12}}95% interval"]
        start = f"  {row.title:{wide}}{row.shown or '-':>8}  {row.interval:17}"
        lines += textwrap.wrap(
            f"not computed: {row.reason}" if row.reason else row.meaning,
            _WIDTH,
            initial_indent=start,
            subsequent_indent=" " * len(start),
        )
    notes, published = comparison(metrics, dataset)
    lines += ["", *textwrap.wrap(notes, _WIDTH, break_on_hyphens=False), ""]
    for name, *values in published:
        lines.append(f"  {name:48}" + "".join(f"{x:>8}" for x in values))
    return "\n".join(lines).rstrip()


def comparison(
    metrics: Mapping[str, Any], dataset: str
) -> tuple[str, list[list[str]]]:
    """Published rows to compare with, and how far they are comparable.

    Args:
        metrics: as in metrics.json.
        dataset: its name.

    Returns:
        What a reader has to know; and the rows as text: a heading, this run,
        and the published ones. There are no rows where nothing is comparable.
    """
    notes = _seen(metrics)
    split, images = metrics["split"], metrics["images"]
    plain = re.sub("[^a-z0-9]", "", dataset.lower())
    known = [x for x in _PUBLISHED["dataset"].unique() if x.lower() in plain]
    if metrics["tokenizer"] == CHARACTERS:
        nothing = (
            "No published scores are by character, so there is nothing to "
            "compare with on"
        )
        return " ".join([*notes, f"{nothing} {dataset}."]), []
    if not known or split != "test":
        nothing = f"There are no published rows for the {split} split of"
        return " ".join([*notes, f"{nothing} {dataset}."]), []
    notes.append(
        f"Published scores are for {known[0]}'s usual test split of 1,000 "
        "images, with a frozen encoder unless marked fine-tuned; BLEU and "
        "METEOR in percent. None reports ROUGE-L or SPICE."
    )
    if known[0] == "Flickr30k":
        notes.append(
            "A token accuracy of 42% is quoted without saying how it was "
            "counted."
        )
    # A few photographs may be missing or broken.
    if not 950 <= images <= 1000:
        notes.append(
            f"Your {images:,} images are not that split: the rows are only a "
            "rough guide."
        )
    if metrics["tokenizer"] != PTB:
        notes.append(
            "These rows were scored with the PTB tokeniser, yours were not: "
            "they are not strictly comparable."
        )
    published = _PUBLISHED[_PUBLISHED["dataset"] == known[0]]
    names = list(_PUBLISHED.columns[2:])
    *fractions, cider = (metrics.get(name) for name in names)
    percent = [None if x is None else 100 * x for x in fractions]
    titles = _METRICS.set_index("name")["title"]
    return " ".join(notes), [
        ["", *titles[names]],
        _as_text("this run", *percent, cider),
        *(_as_text(*row[1:]) for row in published.itertuples(index=False)),
    ]


def _seen(metrics: Mapping[str, Any]) -> list[str]:
    """A warning where a run is scored on images it was trained on."""
    run, seen = metrics["run"]["run"], metrics["run"]["images_trained_on"]
    if seen is None:
        return [
            f"Note: {run} does not record its training images; these may be "
            "among them."
        ]
    if seen:
        return [
            f"WARNING: {run} was trained on {seen:,} of these "
            f"{metrics['images']:,} images; the scores do not show how well "
            "it captions new ones."
        ]
    return []


def _as_text(name: str, *values: float | None) -> list[str]:
    digits = [1] * (len(values) - 1) + [3]  # CIDEr, the last, has three
    return [
        name,
        *(
            "-" if pd.isna(value) else f"{value:.{n}f}"
            for value, n in zip(values, digits, strict=True)
        ),
    ]
