"""The scores: how well captions describe the images they were made for.

BLEU, METEOR, ROUGE-L, CIDEr and SPICE are pycocoevalcap's, so that they can be
held against papers. Its Python scorers are called as they are. Of its three
Java programs, the tokenizer and SPICE are started here and not by its own
wrappers: those neither notice a process that died nor end one that hangs, they
write into the installed package, and SPICE's starts a large download unasked.
"""

import contextlib
import json
import re
import shutil
import subprocess
import tempfile
import textwrap
import threading
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pandas as pd
import pycocoevalcap
from pycocoevalcap.bleu.bleu_scorer import BleuScorer
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor.meteor import Meteor
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer.ptbtokenizer import (
    STANFORD_CORENLP_3_4_1_JAR,
)

from captioning.data import vocabulary
from config import UserError

Key = TypeVar("Key", bound=Hashable)

PTB = "PTB (Stanford CoreNLP 3.4.1, Java)"
RESAMPLES = 1000
# When a Java program is stopped, besides some time for each caption. METEOR
# reads tables for 6 seconds first, SPICE loads a parser.
PTB_SECONDS, METEOR_SECONDS, SPICE_SECONDS = 60, 120, 600
_PACKAGE = Path(pycocoevalcap.__path__[0])
# What it writes for brackets.
_BRACKETS = {f"-{side}{kind}b-" for side in "lr" for kind in "rsc"}
# A tokenizer that turns the first of these into the second is at work.
_KNOWN = (
    "Two dogs, one brown, aren't asleep.",
    "two dogs one brown are n't asleep",
)


class Scores(NamedTuple):
    """What `score` found."""

    metrics: dict[str, Any]  # as in metrics.json
    per_image: pd.DataFrame  # index image; bleu4, rouge_l, cider
    notices: list[str]  # lines to tell the user


# --- tokens ------------------------------------------------------------------


def tokenise(
    captions: Mapping[Key, Sequence[str]],
) -> tuple[dict[Key, list[str]], str]:
    """Splits captions into lower-case words without punctuation.

    With Java this is the tokenizer that papers use. Without, or when its
    process dies, hangs or answers anything odd, all captions go through
    nltk's, so that captions and references are always cut alike. A caption
    without a letter or digit has no words.

    Args:
        captions: any key -> captions as written.

    Returns:
        The same keys -> words joined by single spaces, as many as there were
        captions; and the tokenizer's name, with the reason if it is nltk's.
    """
    texts = [_clean(text) for group in captions.values() for text in group]
    try:
        lines, tokenizer = _ptb(texts), PTB
    except ChildProcessError as error:
        lines = [" ".join(vocabulary.tokenise(text)) for text in texts]
        tokenizer = f"nltk Treebank ({error})"
    line = iter(lines)
    return {
        key: [next(line) for _ in group] for key, group in captions.items()
    }, tokenizer


def _clean(text: str) -> str:
    """One line of valid Unicode; empty if it has no letter and no digit."""
    text = vocabulary.straight(text).encode("utf-8", "replace").decode("utf-8")
    text = " ".join(text.split())
    return text if any(map(str.isalnum, text)) else ""


def _ptb(texts: list[str]) -> list[str]:
    """Tokenises one line each as pycocoevalcap does.

    Raises:
        ChildProcessError: if not every line came back, with the reason.
    """
    jar = _PACKAGE / "tokenizer" / STANFORD_CORENLP_3_4_1_JAR
    command = ["-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer"]
    # The known sentence at both ends tells a process that died half-way.
    sent = "\n".join([_KNOWN[0], *texts, _KNOWN[0]])
    output = _java(
        [*command, "-preserveLines", "-lowerCase"],
        sent,
        PTB_SECONDS + len(texts) / 100,
    )
    # More than pycocoevalcap's PUNCTUATIONS, which are English only, and its
    # brackets, which it misses in lower case: the decoder has no punctuation in
    # its vocabulary, and references that kept theirs could not be matched.
    lines = [
        " ".join(
            vocabulary.only_words(w for w in line.split() if w not in _BRACKETS)
        )
        for line in output.replace("\r", "").removesuffix("\n").split("\n")
    ]
    if len(lines) != len(texts) + 2 or {lines[0], lines[-1]} != {_KNOWN[1]}:
        raise ChildProcessError("Java's tokenizer gave a wrong answer")
    return lines[1:-1]


def _java(arguments: list[str], sent: str, seconds: float) -> str:
    """Runs a Java program to its end.

    Args:
        arguments: of `java`.
        sent: what it reads on standard input.
        seconds: when it is stopped.

    Returns:
        What it wrote on standard output.

    Raises:
        ChildProcessError: if it did not end well, with the reason in one line.
    """
    _need_java()
    try:
        process = subprocess.run(
            ["java", *arguments],
            input=sent.encode("utf-8"),
            capture_output=True,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        raise ChildProcessError(
            f"Java was stopped after {seconds:.0f} seconds"
        ) from None
    except OSError as error:
        raise ChildProcessError(f"Java does not start: {error}") from None
    if process.returncode:
        lines = process.stderr.decode("utf-8", "replace").split("\n")
        told = [x for x in lines if re.search("Error|Exception|Unable", x)]
        why = f": {told[0].strip()[:150]}" if told else ""
        raise ChildProcessError(f"Java failed, code {process.returncode}{why}")
    return process.stdout.decode("utf-8", "replace")


def _need_java() -> None:
    if shutil.which("java") is None:
        raise ChildProcessError("no Java")


# --- scores ------------------------------------------------------------------


def score(
    captions: Mapping[str, str | None],
    references: Mapping[str, Sequence[str]],
    training_captions: Iterable[str] | None = None,
) -> Scores:
    """Scores captions against references.

    Every image with references counts: one whose caption is missing or has no
    words scores zero. References without a word are dropped; an image that
    has no other is left out.

    Args:
        captions: image -> the caption made for it.
        references: image -> what people wrote, as written.
        training_captions: the captions of the training split, as written;
            None if they are not at hand.

    Returns:
        The metrics that metrics.json has, but for those that need the model;
        scores of each image; lines that the user should be told.

    Raises:
        UserError: if a caption is for an image without references, or no
            reference has a word.
    """
    training = ("training", "")
    tokens, tokenizer = tokenise(
        {("caption", image): [text or ""] for image, text in captions.items()}
        | {("reference", image): list(x) for image, x in references.items()}
        | {training: list(set(training_captions or []))}
    )
    made, judged = _pair(
        {image: tokens["caption", image][0] for image in captions},
        {image: tokens["reference", image] for image in references},
    )
    overlap, per_image = _overlap(made, judged)
    known = None if training_captions is None else {*tokens[training], ""}
    metrics: dict[str, Any] = {"images": len(judged), "tokenizer": tokenizer}
    metrics |= overlap
    metrics |= _diversity([made[image][0] for image in judged], known)
    unavailable = {}
    if known is None:
        why = "the training captions are not at hand"
        unavailable["novel_captions"] = why
    for name, compute in (("meteor", _meteor), ("spice", _spice)):
        try:
            metrics[name] = compute(made, judged)
        except ChildProcessError as error:
            metrics[name] = None
            unavailable[name] = str(error)
    metrics["unavailable"] = unavailable
    return Scores(metrics, per_image, _notices(made, judged, references))


def _overlap(
    made: dict[str, list[str]], judged: dict[str, list[str]]
) -> tuple[dict[str, Any], pd.DataFrame]:
    """BLEU, ROUGE-L and CIDEr, with intervals, and those of each image."""
    scorer = BleuScorer(n=4)
    for image in judged:
        scorer += (made[image][0], judged[image])
    bleu, bleu_per_image = scorer.compute_score(option="closest")
    rouge_l, rouge_l_per_image = Rouge().compute_score(judged, made)
    cider_mean, cider_per_image = Cider().compute_score(judged, made)
    metrics: dict[str, Any] = {f"bleu{n}": bleu[n - 1] for n in (1, 2, 3, 4)}
    metrics |= {"rouge_l": float(rouge_l), "cider": float(cider_mean)}
    metrics["intervals"] = _intervals(_bleu_counts(scorer), cider_per_image)
    per_image = pd.DataFrame(
        {
            "bleu4": bleu_per_image[3],
            "rouge_l": rouge_l_per_image,
            "cider": cider_per_image,
        },
        index=pd.Index(list(judged), name="image"),
    )
    return metrics, per_image


def cider(
    captions: Mapping[str, str], references: Mapping[str, Sequence[str]]
) -> float:
    """CIDEr of captions that are tokenised already: quick, and without Java.

    Source: Vedantam et al. 2015, as CIDEr-D in pycocoevalcap.

    Args:
        captions: image -> words joined by spaces.
        references: image -> the same of each reference.

    Returns:
        The mean over all images with a reference; no caption counts zero.

    Raises:
        UserError: as `score` does.
    """
    made, judged = _pair(captions, references)
    return float(Cider().compute_score(judged, made)[0])


def _pair(
    captions: Mapping[str, str], references: Mapping[str, Sequence[str]]
) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Captions and references of the images that can be judged.

    Both have the same keys in the same order, as pycocoevalcap wants them.
    No reference is empty: two empty strings would be a perfect ROUGE-L.
    """
    unknown = [image for image in captions if image not in references]
    if unknown:
        raise UserError(
            f"{len(unknown)} captions are of images that the split does not "
            f"have, such as {unknown[0]}: check --dataset and --split"
        )
    judged = {
        image: [text for text in texts if text]
        for image, texts in references.items()
        if any(texts)
    }
    if not judged:
        raise UserError(
            "no image has a reference with a word in it: nothing to score by"
        )
    return {image: [captions.get(image) or ""] for image in judged}, judged


def _notices(
    made: Mapping[str, list[str]],
    judged: Mapping[str, list[str]],
    references: Mapping[str, Sequence[str]],
) -> list[str]:
    notices = []
    empty = [image for image, texts in made.items() if not texts[0]]
    if empty:
        notices.append(
            f"{len(empty)} of {len(judged)} images have no caption, such as "
            f"{empty[0]}: they score zero"
        )
    left_out = [image for image in references if image not in judged]
    if left_out:
        notices.append(
            f"{len(left_out)} images have no reference with a word in it, "
            f"such as {left_out[0]}: left out"
        )
    if len(judged) == 1:
        notices.append(
            "CIDEr of a single image is always 0: it weighs words by how few "
            "images they occur for"
        )
    return notices


def _diversity(captions: list[str], known: set[str] | None) -> dict[str, Any]:
    """How different the captions are; an empty one is none.

    Args:
        captions: one an image.
        known: the training captions and the empty one, if at hand.
    """
    words = [word for caption in captions for word in caption.split()]
    novel = None
    if known is not None:
        novel = sum(x not in known for x in captions) / len(captions)
    return {
        "distinct_captions": len({*captions} - {""}) / len(captions),
        "novel_captions": novel,
        "vocabulary_used": len(set(words)),
        "mean_length": len(words) / len(captions),
    }


def _meteor(made: dict[str, list[str]], judged: dict[str, list[str]]) -> float:
    """METEOR 1.5 (Denkowski and Lavie 2014).

    Raises:
        ChildProcessError: if its process died or was stopped.
    """
    _need_java()
    # Its protocol separates by "|||".
    made, judged = (
        {
            key: [" ".join(x.replace("|", "").split()) for x in texts]
            for key, texts in a.items()
        }
        for a in (made, judged)
    )
    try:
        meteor = Meteor()
    except OSError as error:
        raise ChildProcessError(f"Java does not start: {error}") from None
    seconds = METEOR_SECONDS + len(made) / 10
    watchdog = threading.Timer(seconds, meteor.meteor_p.kill)
    watchdog.start()
    try:
        value = meteor.compute_score(judged, made)[0]
        if not 0 <= value <= 1:
            raise ValueError(value)
    except (OSError, ValueError):
        raise ChildProcessError(
            f"METEOR's process died, or was stopped after {seconds:.0f} seconds"
        ) from None
    finally:
        watchdog.cancel()
        with contextlib.suppress(OSError):
            meteor.meteor_p.stdin.close()
        # It leaves its lock taken after an error, and then waits for it for
        # ever when it is deleted.
        if meteor.lock.locked():
            meteor.lock.release()
    return value


def _spice(made: dict[str, list[str]], judged: dict[str, list[str]]) -> float:
    """SPICE 1.0 (Anderson et al. 2016).

    Raises:
        ChildProcessError: if its models are not there or its process failed.
    """
    _need_java()
    library = _PACKAGE / "spice" / "lib"
    for jar in ("stanford-corenlp-3.6.0", "stanford-corenlp-3.6.0-models"):
        if not (library / f"{jar}.jar").exists():
            raise ChildProcessError(
                "needs Stanford CoreNLP 3.6.0, which `python -m "
                "pycocoevalcap.spice.get_stanford_models` downloads, and a "
                "Java from 8 to 14"
            )
    items = [
        {"image_id": row, "test": made[image][0], "refs": judged[image]}
        for row, image in enumerate(judged)
        if made[image][0]
    ]
    if not items:
        return 0.0
    with tempfile.TemporaryDirectory() as folder:
        asked, answer = Path(folder, "captions.json"), Path(folder, "out.json")
        asked.write_text(json.dumps(items), encoding="utf-8")
        command = ["-Xmx8G", "-jar", str(_PACKAGE / "spice" / "spice-1.0.jar")]
        command += [str(asked), "-out", str(answer), "-silent"]
        _java(command, "", SPICE_SECONDS + 2 * len(items))
        try:
            found = json.loads(answer.read_text(encoding="utf-8"))
            values = [float(x["scores"]["All"]["f"]) for x in found]
        except (OSError, ValueError, TypeError, LookupError):
            values = []
    if len(values) != len(items):
        raise ChildProcessError("SPICE's answer could not be read")
    return sum(values) / len(judged)  # no caption: zero


# --- intervals ---------------------------------------------------------------


def _bleu_counts(scorer: BleuScorer) -> np.ndarray:
    """What corpus BLEU is made of, for each image.

    Returns:
        (images, 10): matched 1- to 4-grams, 1- to 4-grams, words, and words of
        the reference nearest in length.
    """
    return np.array(
        [
            [
                *each["correct"],
                *each["guess"],
                each["testlen"],
                min((abs(n - each["testlen"]), n) for n in each["reflen"])[1],
            ]
            for each in scorer.ctest
        ],
        float,
    )


def _corpus_bleu4(totals: np.ndarray) -> np.ndarray:
    """BLEU-4 (Papineni et al. 2002), with pycocoevalcap's tiny constants.

    Args:
        totals: (..., 10), sums of rows of `_bleu_counts`.

    Returns:
        (...): BLEU-4.
    """
    precisions = (totals[..., :4] + 1e-15) / (totals[..., 4:8] + 1e-9)
    ratio = (totals[..., 8] + 1e-15) / (totals[..., 9] + 1e-9)
    brevity = np.exp(np.minimum(0, 1 - 1 / ratio))
    return np.exp(np.log(precisions).mean(axis=-1)) * brevity


def _intervals(
    bleu_counts: np.ndarray, cider_per_image: np.ndarray
) -> dict[str, list[float]]:
    """95% bootstrap intervals: percentiles over resamples of the images.

    The document frequencies of CIDEr stay those of the whole split: the
    interval is that of a mean of scores of images.

    Args:
        bleu_counts: (images, 10) of `_bleu_counts`.
        cider_per_image: (images,).

    Returns:
        metric -> lower and upper end.
    """
    generator = np.random.default_rng(0)
    images = len(cider_per_image)
    rows = np.column_stack([bleu_counts, cider_per_image])  # (images, 11)
    # (resamples, 11)
    totals = np.stack(
        [
            np.bincount(generator.integers(images, size=images), None, images)
            @ rows
            for _ in range(RESAMPLES)
        ]
    )
    samples = {"bleu4": _corpus_bleu4(totals), "cider": totals[:, 10] / images}
    return {
        name: np.percentile(values, [2.5, 97.5]).tolist()
        for name, values in samples.items()
    }


# --- the table that a person reads -------------------------------------------

_WIDTH = 100
# metric, name, format, what it is
FIGURES = (
    (
        "token_accuracy",
        "token accuracy",
        "{:.1%}",
        "true next words that the model ranks first",
    ),
    (
        "token_accuracy_top5",
        "  top 5",
        "{:.1%}",
        "... among the first five",
    ),
    (
        "perplexity",
        "perplexity",
        "{:.2f}",
        "as unsure as between so many words; 1 is certain",
    ),
    ("bleu1", "BLEU-1", "{:.1%}", "words of the captions that references have"),
    ("bleu2", "BLEU-2", "{:.1%}", "... and pairs of words"),
    ("bleu3", "BLEU-3", "{:.1%}", "... and runs of three words"),
    ("bleu4", "BLEU-4", "{:.1%}", "... and runs of four words"),
    ("meteor", "METEOR", "{:.1%}", "words matched, also by stem and synonym"),
    ("rouge_l", "ROUGE-L", "{:.1%}", "longest common run of words, with gaps"),
    (
        "cider",
        "CIDEr",
        "{:.3f}",
        "runs of words shared, rare ones count more; 0 to 10",
    ),
    ("spice", "SPICE", "{:.1%}", "objects, attributes and relations shared"),
    (
        "distinct_captions",
        "distinct",
        "{:.1%}",
        "different captions, as a share of the images",
    ),
    (
        "novel_captions",
        "novel",
        "{:.1%}",
        "captions that are no training caption, word for word",
    ),
    (
        "vocabulary_used",
        "vocabulary",
        "{:,}",
        "different words in the captions",
    ),
    ("mean_length", "length", "{:.1f}", "words of a caption, on average"),
    (
        "images_per_second",
        "images/second",
        "{:.1f}",
        "captioned, from cached features",
    ),
)
_COMPARED = {
    "bleu1": "BLEU-1",
    "bleu2": "BLEU-2",
    "bleu3": "BLEU-3",
    "bleu4": "BLEU-4",
    "meteor": "METEOR",
    "cider": "CIDEr",
}
# Test split, 1,000 images each; the columns are those of _COMPARED.
_PUBLISHED = {
    "Flickr8k": (
        ("Soft attention, VGG (Xu 2015)", 67.0, 44.8, 29.9, 19.5, 18.9, None),
        ("Hard attention, VGG (Xu 2015)", 67.0, 45.7, 31.4, 21.3, 20.3, None),
        (
            "Spatial attention, VGG, beam 5 (sulabhkatiyar)",
            *(62.2, 43.3, 29.3, 19.7, 19.6, 0.497),
        ),
        (
            "Adaptive attention, VGG, beam 3 (sulabhkatiyar)",
            *(62.4, 44.0, 30.3, 20.5, 19.9, 0.524),
        ),
        (
            "Adaptive, ResNet152 fine-tuned, beam 5 (same)",
            *(65.9, 48.0, 33.9, 23.5, 20.7, 0.589),
        ),
    ),
    "Flickr30k": (
        ("Soft attention, VGG (Xu 2015)", 66.7, 43.4, 28.8, 19.1, 18.5, None),
        ("Hard attention, VGG (Xu 2015)", 66.9, 43.9, 29.6, 19.9, 18.5, None),
        (
            "Spatial attention, VGG, beam 5 (sulabhkatiyar)",
            *(63.1, 43.8, 30.3, 20.7, 17.4, 0.403),
        ),
        (
            "Adaptive attention, fine-tuned (Lu 2017)",
            *(67.7, 49.4, 35.4, 25.1, 20.4, 0.531),
        ),
    ),
}


def table(metrics: Mapping[str, Any], dataset: str) -> str:
    """The metrics as a person reads them in a terminal.

    Args:
        metrics: what metrics.json has.
        dataset: its name; a known one brings the published rows along.

    Returns:
        Lines of at most 100 columns of plain text.
    """
    consensus = " by consensus" if metrics.get("consensus_temperature") else ""
    heading = (
        f"{dataset}, {metrics.get('split')} split: {metrics['images']:,} "
        f"images, beam size {metrics.get('beam_size')}{consensus}; words cut "
        f"by {metrics['tokenizer']}"
    )
    lines = textwrap.wrap(heading, _WIDTH)
    for name, title, form, meaning in FIGURES:
        if name == "token_accuracy":
            lines += ["", "Teacher-forced: given the true words before"]
        if name == "bleu1":
            lines += ["", f"{'Free-running captions':27}95% interval"]
        lines += _row(metrics, name, title, form, meaning)
    notes, rows = comparison(metrics, dataset)
    lines += ["", *textwrap.wrap(notes, _WIDTH, break_on_hyphens=False), ""]
    for name, *figures in rows:
        lines.append(f"  {name:48}" + "".join(f"{x:>8}" for x in figures))
    return "\n".join(lines).rstrip()


def _row(
    metrics: Mapping[str, Any], name: str, title: str, form: str, meaning: str
) -> list[str]:
    value = metrics.get(name)
    shown, interval = "-", ""
    if value is None:
        reason = metrics.get("unavailable", {}).get(name, "not measured")
        meaning = f"not computed: {reason}"
    else:
        shown = form.format(value)
        ends = metrics.get("intervals", {}).get(name, [])
        interval = " to ".join(form.format(x).rstrip("%") for x in ends)
    return textwrap.wrap(
        meaning,
        _WIDTH,
        initial_indent=f"  {title:15}{shown:>8}  {interval:16}",
        subsequent_indent=" " * 43,
    )


def comparison(
    metrics: Mapping[str, Any], dataset: str
) -> tuple[str, list[list[str]]]:
    """The published rows that the run can be held against, and how far.

    Args:
        metrics: what metrics.json has.
        dataset: its name.

    Returns:
        What to know of the rows; and the rows as text: a heading, this run,
        and the published ones. There are none where nothing is comparable.
    """
    split, images = metrics.get("split"), metrics["images"]
    plain = re.sub("[^a-z0-9]", "", dataset.lower())
    known = next((name for name in _PUBLISHED if name.lower() in plain), None)
    if known is None or split != "test":
        return f"No published row is for the {split} split of {dataset}.", []
    notes = (
        f"Published for {known}'s usual test split of 1,000 images, with a "
        "frozen encoder unless it says fine-tuned; BLEU and METEOR in percent. "
        "None gives ROUGE-L or SPICE."
    )
    if known == "Flickr30k":
        notes += " Token accuracy: 42% is quoted, not saying how it counts."
    # A few photographs may be missing or broken.
    if not 950 <= images <= 1000:
        notes += (
            f" Your {images:,} images are not that split: no comparison, the "
            "rows are for orientation only."
        )
    if metrics["tokenizer"] != PTB:
        notes += (
            " The rows were scored with the PTB tokenizer, yours was not: the "
            "scores are not quite comparable."
        )
    *fractions, cider = (metrics.get(name) for name in _COMPARED)
    percent = (None if x is None else 100 * x for x in fractions)
    rows = [("this run", *percent, cider), *_PUBLISHED[known]]
    return notes, [["", *_COMPARED.values()], *(_as_text(*x) for x in rows)]


def _as_text(name: str, *values: float | None) -> list[str]:
    forms = ["{:.1f}"] * 5 + ["{:.3f}"]
    return [
        name,
        *(
            "-" if value is None else form.format(value)
            for form, value in zip(forms, values, strict=True)
        ),
    ]
