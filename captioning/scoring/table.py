"""The metrics as people read them, beside the published ones."""

import re
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from captioning.scoring.metrics import PTB

_WIDTH = 100  # columns


class Figure(NamedTuple):
    """One row of the table."""

    metric: str  # its key in metrics.json
    name: str
    form: str  # format of the value
    meaning: str


FIGURES = (
    Figure(
        "token_accuracy",
        "token accuracy",
        "{:.1%}",
        "next words ranked first, given the true words so far",
    ),
    Figure(
        "token_accuracy_top5", "  top 5", "{:.1%}", "... or in its first five"
    ),
    Figure(
        "perplexity",
        "perplexity",
        "{:.2f}",
        "equally likely words it hesitates between; 1 is certainty",
    ),
    Figure("bleu1", "BLEU-1", "{:.1%}", "words that also occur in a reference"),
    Figure("bleu2", "BLEU-2", "{:.1%}", "... and pairs of words"),
    Figure("bleu3", "BLEU-3", "{:.1%}", "... and runs of three words"),
    Figure("bleu4", "BLEU-4", "{:.1%}", "... and runs of four words"),
    Figure(
        "meteor", "METEOR", "{:.1%}", "matching words, stems and synonyms too"
    ),
    Figure(
        "rouge_l",
        "ROUGE-L",
        "{:.1%}",
        "longest run of words in common, gaps allowed",
    ),
    Figure(
        "cider",
        "CIDEr",
        "{:.3f}",
        "runs of words in common, rare ones count more; 0 to 10",
    ),
    Figure(
        "spice",
        "SPICE",
        "{:.1%}",
        "objects, attributes and relations in common",
    ),
    Figure(
        "distinct_captions",
        "distinct",
        "{:.1%}",
        "different captions, as a share of the images",
    ),
    Figure(
        "novel_captions",
        "novel",
        "{:.1%}",
        "captions that do not occur in the training split",
    ),
    Figure(
        "vocabulary_used", "vocabulary", "{:,}", "different words in captions"
    ),
    Figure("mean_length", "length", "{:.1f}", "words per caption"),
    Figure(
        "images_per_second",
        "images/second",
        "{:.1f}",
        "captioned from cached features",
    ),
)
# Above these rows there is a title.
_TITLES = {"token_accuracy": "Teacher-forced", "bleu1": "Free-running captions"}
_COMPARED = {
    "bleu1": "BLEU-1",
    "bleu2": "BLEU-2",
    "bleu3": "BLEU-3",
    "bleu4": "BLEU-4",
    "meteor": "METEOR",
    "cider": "CIDEr",
}


def table(metrics: Mapping[str, Any], dataset: str) -> str:
    """The metrics as text for a terminal.

    Args:
        metrics: as in metrics.json.
        dataset: its name; for a well-known one, published rows are included.

    Returns:
        Plain text, at most 100 columns wide.
    """
    consensus = " by consensus" if metrics.get("consensus_temperature") else ""
    beam = metrics.get("beam_size")
    search = f", beam size {beam}{consensus}" if beam else ""
    heading = (
        f"{dataset}, {metrics.get('split')} split: {metrics['images']:,} "
        f"images{search}; tokenised by {metrics['tokenizer']}"
    )
    lines = textwrap.wrap(heading, _WIDTH)
    for figure in FIGURES:
        if title := _TITLES.get(figure.metric):
            lines += ["", f"{title:27}95% interval"]
        lines += _row(metrics, figure)
    notes, rows = comparison(metrics, dataset)
    lines += ["", *textwrap.wrap(notes, _WIDTH, break_on_hyphens=False), ""]
    for name, *figures in rows:
        lines.append(f"  {name:48}" + "".join(f"{x:>8}" for x in figures))
    return "\n".join(lines).rstrip()


def _row(metrics: Mapping[str, Any], figure: Figure) -> list[str]:
    value = metrics.get(figure.metric)
    shown, interval, meaning = "-", "", figure.meaning
    if value is None:
        reason = metrics.get("unavailable", {}).get(
            figure.metric, "not measured"
        )
        meaning = f"not computed: {reason}"
    else:
        shown = figure.form.format(value)
        ends = metrics.get("intervals", {}).get(figure.metric, [])
        interval = " to ".join(figure.form.format(x).rstrip("%") for x in ends)
    return textwrap.wrap(
        meaning,
        _WIDTH,
        initial_indent=f"  {figure.name:15}{shown:>8}  {interval:16}",
        subsequent_indent=" " * 43,
    )


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
    split, images = metrics.get("split"), metrics["images"]
    published = pd.read_csv(Path(__file__).with_name("published.csv"))
    plain = re.sub("[^a-z0-9]", "", dataset.lower())
    known = [x for x in published["dataset"].unique() if x.lower() in plain]
    if not known or split != "test":
        nothing = f"There are no published rows for the {split} split of"
        return " ".join([*notes, f"{nothing} {dataset}."]), []
    notes.append(
        f"Published for {known[0]}'s usual test split of 1,000 images, with a "
        "frozen encoder unless it says fine-tuned; BLEU and METEOR in percent. "
        "None of them gives ROUGE-L or SPICE."
    )
    if known[0] == "Flickr30k":
        notes.append(
            "For token accuracy, 42% is quoted without saying how it counts."
        )
    # A few photographs may be missing or broken.
    if not 950 <= images <= 1000:
        notes.append(
            f"Your {images:,} images are not that split: the rows are for "
            "orientation only, not for comparison."
        )
    if metrics["tokenizer"] != PTB:
        notes.append(
            "These rows were scored with the PTB tokenizer, yours was not: the "
            "scores are not quite comparable."
        )
    rows = published[published["dataset"] == known[0]]
    *fractions, cider = (metrics.get(name) for name in _COMPARED)
    percent = [None if x is None else 100 * x for x in fractions]
    return " ".join(notes), [
        ["", *_COMPARED.values()],
        _as_text("this run", *percent, cider),
        *(
            _as_text(*row)
            for row in rows[["model", *_COMPARED]].itertuples(index=False)
        ),
    ]


def _seen(metrics: Mapping[str, Any]) -> list[str]:
    """A warning where a run is scored on images it was trained on."""
    run = metrics.get("run")
    if not run or run["images_trained_on"] == 0:
        return []
    if run["images_trained_on"] is None:
        return [
            f"Note: {run['run']} does not say what it was trained on; these "
            "images may be among it."
        ]
    return [
        f"WARNING: {run['run']} was trained on {run['images_trained_on']:,} of "
        f"these {metrics['images']:,} images; the scores do not show what it "
        "is worth on new ones."
    ]


def _as_text(name: str, *values: float | None) -> list[str]:
    forms = ["{:.1f}"] * 5 + ["{:.3f}"]
    return [
        name,
        *(
            "-" if pd.isna(value) else form.format(value)
            for form, value in zip(forms, values, strict=True)
        ),
    ]
