"""Two evaluations of the same images: what differs by more than chance.

Both are resampled together, image by image (paired bootstrap; Koehn 2004,
section 4): an image that is hard for one is hard for the other, so a difference
shows long before the intervals of the two scores part.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from captioning.files import read_json, reading, write_text
from captioning.scoring import metrics, report, table
from config import CHARACTERS, WORDS, UserError

SHOWN = 24  # images on the page for each side
# Where less is better, and where neither is.
LESS_IS_BETTER, NEUTRAL = "perplexity", ("mean_length", "novel_captions")
NO_INTERVAL = "not tested"
# Metric -> its column in captions.csv, and the column that it is a share of; an
# empty one stands for the number of images.
SHARES = {
    "meteor": ("meteor", ""),
    "rouge_l": ("rouge_l", ""),
    "cider": ("cider", ""),
    "spice": ("spice", ""),
    "novel_captions": ("novel", ""),
    "token_accuracy": ("right", "tokens"),
    "token_accuracy_top5": ("right_top5", "tokens"),
    "perplexity": ("loss", "tokens"),
}


class Evaluation(NamedTuple):
    """An evaluation on disk."""

    name: str  # run and folder
    place: Path
    metrics: dict[str, Any]  # as in metrics.json
    examples: pd.DataFrame  # as in captions.csv; index image


class Difference(NamedTuple):
    """How a metric differs, as text."""

    title: str
    first: str
    second: str
    difference: str
    interval: str
    verdict: str


def load(name: str, checkpoints_dir: str, split: str) -> Evaluation:
    """Loads an evaluation.

    Args:
        name: of a run, or the path of a folder below `evaluation/`.
        checkpoints_dir: where the runs are.
        split: of which the evaluation of a run is.

    Raises:
        UserError: if there is none, or it is damaged.
    """
    place = Path(name)
    if not (place / "metrics.json").exists():
        place = Path(checkpoints_dir) / name / "evaluation" / split
    figures = read_json(place / "metrics.json")
    if not {"run", "images", "tokenizer"} <= figures.keys():
        raise UserError(
            f"there is no evaluation in {place}: run python evaluate.py "
            f"--run-name {name} --split {split} first, or give the path of a "
            "folder that has metrics.json"
        )
    path = place / "captions.csv"
    with reading(path, "evaluate again"):
        examples = pd.read_csv(
            path,
            dtype={"image": str, "caption": str},
            keep_default_na=False,  # a caption may read "None"
            na_values=[""],
        )
        examples["caption"] = examples["caption"].fillna("")
        examples["references"] = examples["references"].map(json.loads)
        label = f"{figures['run']['run']}, {place.name}"
        return Evaluation(label, place, figures, examples.set_index("image"))


def pair(first: Evaluation, second: Evaluation) -> list[Evaluation]:
    """Both evaluations on the images that they share, in one order.

    Raises:
        UserError: if they share none, or cannot be compared.
    """
    shared = first.examples.index.intersection(second.examples.index)
    if not len(shared):
        raise UserError(
            f"{first.place} and {second.place} have no image in common: "
            "compare evaluations of the same split"
        )
    ours = [each.examples.loc[shared] for each in (first, second)]
    if not ours[0]["references"].equals(ours[1]["references"]):
        raise UserError(
            f"{first.place} and {second.place} have different references "
            "for the same images: evaluate one of them again"
        )
    names = [_kind(each.metrics["tokenizer"]) for each in (first, second)]
    if names[0] != names[1]:
        remedy = "evaluate one of them again, both with Java or both without"
        if CHARACTERS in names:
            remedy = (
                "scores of characters cannot be compared with those of words; "
                "compare two runs with the same --tokeniser"
            )
        raise UserError(
            f"{first.place} was tokenised by {names[0]} and {second.place} by "
            f"{names[1]}: {remedy}"
        )
    unit = CHARACTERS if CHARACTERS in names else WORDS
    _, here = metrics.tokenise({0: ["a dog"]}, unit)
    if _kind(here) != names[0]:
        how = "without" if here == metrics.PTB else "with"
        raise UserError(
            f"{first.place} and {second.place} were tokenised by {names[0]}, "
            f"and here by {here}: evaluate both again here, or compare them "
            f"{how} Java"
        )
    for each, examples in zip((first, second), ours, strict=True):
        if len(shared) < each.metrics["images"]:
            # CIDEr depends on how rare words are among all images.
            examples["cider"] = metrics.cider_per_image(
                examples["caption"], examples["references"], unit
            )
    return [
        each._replace(examples=examples)
        for each, examples in zip((first, second), ours, strict=True)
    ]


def _kind(tokenizer: str) -> str:
    """The name of a tokenizer without its version, or why it was taken."""
    return tokenizer.partition(" (")[0]


def compare(first: Evaluation, second: Evaluation) -> list[Difference]:
    """Compares every metric of two evaluations from `pair`."""
    pairs = (first, second)
    tokenizer = first.metrics["tokenizer"]
    unit = CHARACTERS if tokenizer == CHARACTERS else WORDS
    sums, others = (_sums(each.examples, unit) for each in pairs)
    whole = all(len(x.examples) == x.metrics["images"] for x in pairs)
    found = []
    for name, title, form in table.titles(tokenizer):
        a, b = (each.metrics.get(name) for each in pairs)
        if a is None or b is None or name == "images_per_second":
            continue
        if not whole and name not in sums:
            continue  # it is of other images, too
        ends: list[float] = []
        if name in sums and name in others:
            (counts, statistic), (other, _) = sums[name], others[name]
            ends = _interval(counts, other, statistic)
            # METEOR over a corpus is not the mean over its images.
            if name == "meteor":
                title = "METEOR (mean)"
            if name == "meteor" or not whole:
                a, b = (
                    float(statistic(x.sum(axis=0))) for x in (counts, other)
                )
        found.append(
            Difference(
                title=title.strip(),
                first=form.format(a),
                second=form.format(b),
                difference=_signed(b - a, form),
                interval=" to ".join(_signed(each, form) for each in ends),
                verdict=_verdict(name, ends),
            )
        )
    return found


Statistic = Callable[[np.ndarray], np.ndarray]


def _sums(
    examples: pd.DataFrame, tokeniser: str
) -> dict[str, tuple[np.ndarray, Statistic]]:
    """What a metric is computed from, summed over images, and how.

    Metrics that an evaluation does not have per image are left out: the number
    of different captions or words is not that of its images added up.

    Args:
        examples: of one evaluation, from `pair`.
        tokeniser: `words` or `characters`.

    Returns:
        Metric -> (images, columns), and the statistic of sums of its rows.
    """
    ones = np.ones(len(examples))
    sums: dict[str, tuple[np.ndarray, Statistic]] = {}
    for name, (part, whole) in SHARES.items():
        if part in examples:
            all_of_them = examples[whole] if whole else ones
            columns = np.column_stack([examples[part], all_of_them])
            how = _perplexity if name == "perplexity" else metrics.ratio
            sums[name] = (columns, how)
    counts = metrics.bleu_counts(
        examples["caption"], examples["references"], tokeniser
    )
    lengths = np.column_stack([counts[:, 8], ones])
    sums["mean_length"] = (lengths, metrics.ratio)
    for order in range(1, 5):
        sums[f"bleu{order}"] = (counts, metrics.corpus_bleu(order))
    return sums


def _perplexity(totals: np.ndarray) -> np.ndarray:
    return np.exp(metrics.ratio(totals))


def _interval(
    first: np.ndarray, second: np.ndarray, statistic: Statistic
) -> list[float]:
    """The 95% interval of a difference, by paired bootstrap.

    Args:
        first: of an evaluation, (images, columns).
        second: of the other one.
        statistic: from sums of rows (..., columns) to values (...).
    """
    width = first.shape[1]

    def difference(totals: np.ndarray) -> np.ndarray:
        return statistic(totals[..., width:]) - statistic(totals[..., :width])

    return metrics.interval(np.hstack([first, second]), difference)


def _signed(value: float, form: str) -> str:
    """A difference with its sign; of percentages in percentage points.

    Zero has a plus, whichever side it was rounded from.
    """
    if form.endswith("%}"):
        return f"{100 * value:+z.1f}"
    return form.replace("{:", "{:+z").format(value)


def _verdict(name: str, ends: list[float]) -> str:
    if not ends:
        return NO_INTERVAL
    if ends[0] <= 0 <= ends[1]:
        return "not significant"
    if name in NEUTRAL:
        return "different"
    better = (ends[0] > 0) != (name == LESS_IS_BETTER)
    return "B is better" if better else "B is worse"


def as_text(
    first: Evaluation, second: Evaluation, differences: list[Difference]
) -> str:
    """The comparison for a terminal."""
    wide = max([15, *(len(each.title) + 1 for each in differences)])
    lines = [
        f"A: {first.name}",
        f"B: {second.name}",
        f"{len(first.examples):,} images; differences are B minus A, "
        "in percentage points for percentages",
        "",
        f"  {'':{wide}}{'A':>8}{'B':>9}{'B - A':>9}  95% interval",
    ]
    for each in differences:
        lines.append(
            f"  {each.title:{wide}}{each.first:>8}{each.second:>9}"
            f"{each.difference:>9}  {each.interval:20}{each.verdict}".rstrip()
        )
    return "\n".join(lines)


def write_page(
    first: Evaluation,
    second: Evaluation,
    differences: list[Difference],
    images_dir: Path | None,
) -> Path:
    """Writes the page with the images where two evaluations differ most.

    Args:
        first: from `pair`.
        second: from `pair`; the page is written into its folder.
        differences: from `compare`.
        images_dir: where the photographs are, if they still are.

    Returns:
        Its path.
    """
    gain = second.examples["cider"] - first.examples["cider"]
    sections = {
        "B describes these better": gain[gain > 0].nlargest(SHOWN).index,
        "A describes these better": gain[gain < 0].nsmallest(SHOWN).index,
    }
    page = report.template("scoring/compare.html.jinja").render(
        first=first.name,
        second=second.name,
        images=len(gain),
        differences=differences,
        sections={
            title: [_shown(image, first, second, images_dir) for image in some]
            for title, some in sections.items()
        },
    )
    label = f"{first.metrics['run']['run']}-{first.place.name}"
    path = second.place / f"compared-with-{label}.html"
    write_text(path, page)
    return path


def _shown(
    image: str,
    first: Evaluation,
    second: Evaluation,
    images_dir: Path | None,
) -> Mapping[str, Any]:
    """An image as the page shows it."""
    return {
        "image": image,
        "photo": images_dir and report.thumbnail(images_dir / image),
        "references": first.examples.at[image, "references"],
        "captions": [
            (
                letter,
                each.examples.at[image, "caption"],
                float(each.examples.at[image, "cider"]),
            )
            for letter, each in (("A", first), ("B", second))
        ],
    }
