"""The scores: how well captions describe their images.

BLEU, METEOR, ROUGE-L, CIDEr and SPICE are pycocoevalcap's, so that they can be
compared with papers.
"""

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pandas as pd
from pycocoevalcap.bleu.bleu_scorer import BleuScorer
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

from captioning.data import vocabulary
from captioning.data.caption_files import as_text
from captioning.scoring import java
from config import CHARACTERS, WORDS, UserError

Key = TypeVar("Key", bound=Hashable)

PTB = "PTB (Stanford CoreNLP 3.4.1, Java)"
RESAMPLES = 1000
# Fewer images than this cannot tell two epochs apart by CIDEr. It weights words
# by how few images they occur in: of a single image it is always 0, and of a
# handful it is decided by chance (its standard error is about 0.6 divided by
# the square root of the number of images: 0.13 for twenty).
CIDER_IMAGES = 20
FEW_IMAGES = 100  # whoever scores fewer is warned


class Scores(NamedTuple):
    """What `score` found."""

    metrics: dict[str, Any]  # as in metrics.json
    # Index image; bleu4, rouge_l, cider; novel if the training captions are
    # known, and meteor and spice where there is Java.
    per_image: pd.DataFrame
    notices: list[str]  # lines to tell the user


# --- tokens ------------------------------------------------------------------


def tokenise(
    captions: Mapping[Key, Sequence[str]], tokeniser: str = WORDS
) -> tuple[dict[Key, list[str]], str]:
    """Splits captions into lower-case tokens without punctuation.

    Characters are those of the vocabulary. For words, where Java works, this
    is the tokenizer that papers use. Where it does not, all captions go
    through nltk's, so that captions and references are always tokenised alike.
    A caption without a letter or digit has no words.

    Args:
        captions: any key -> captions as written.
        tokeniser: `words` or `characters`.

    Returns:
        The same keys -> tokenised captions, tokens separated by single spaces;
        and the tokenizer's name: `characters`, or a program's, with the reason
        where it is nltk's.
    """
    texts = [_clean(text) for group in captions.values() for text in group]
    tokenizer = CHARACTERS
    if tokeniser == WORDS:
        try:
            lines, tokenizer = java.ptb(texts), PTB
        except ChildProcessError as error:
            tokenizer = f"nltk Treebank ({error})"
    if tokenizer != PTB:
        lines = [" ".join(vocabulary.tokenise(x, tokeniser)) for x in texts]
    line = iter(lines)
    return {
        key: [next(line) for _ in group] for key, group in captions.items()
    }, tokenizer


def _clean(text: str) -> str:
    """One line of valid Unicode; empty if it has no letter and no digit."""
    text = " ".join(as_text(vocabulary.straight(text)).split())
    return text if any(map(str.isalnum, text)) else ""


# --- scores ------------------------------------------------------------------


def score(
    captions: Mapping[str, str | None],
    references: Mapping[str, Sequence[str]],
    training_captions: Iterable[str] | None,
    tokeniser: str = WORDS,
) -> Scores:
    """Scores captions against references.

    Every image with references counts: a missing or empty caption scores zero.
    References without a word are dropped, and images left without a reference
    are left out.

    Args:
        captions: image -> its caption.
        references: image -> its references, as written.
        training_captions: what the run was trained on, as written; None if
            that is not known.
        tokeniser: `words` or `characters`.

    Returns:
        The metrics of metrics.json, except those that need the model; the
        scores per image; lines to print.

    Raises:
        UserError: if no reference has a word.
    """
    training = ("training", "")
    tokens, tokenizer = tokenise(
        {("caption", image): [text or ""] for image, text in captions.items()}
        | {("reference", image): list(x) for image, x in references.items()}
        | {training: list(set(training_captions or ()))},
        tokeniser,
    )
    made, judged = _pair(
        {image: tokens["caption", image][0] for image in captions},
        {image: tokens["reference", image] for image in references},
    )
    overlap, per_image = _overlap(made, judged)
    said, known = [x for (x,) in made.values()], {*tokens[training], ""}
    metrics = {
        "images": len(judged),
        "tokenizer": tokenizer,
        **overlap,
        **_diversity(said),
        "novel_captions": None,
    }
    unavailable = {}
    if training_captions is None:
        unavailable["novel_captions"] = "trained on another dataset"
    else:
        per_image["novel"] = [caption not in known for caption in said]
        metrics["novel_captions"] = float(per_image["novel"].mean())
    for name, compute in (("meteor", java.meteor), ("spice", java.spice)):
        metrics[name] = None
        if tokeniser == CHARACTERS:
            unavailable[name] = "knows English words, not characters"
            continue
        try:
            metrics[name], per_image[name] = compute(made, judged)
        except ChildProcessError as error:
            unavailable[name] = str(error)
    metrics["unavailable"] = unavailable
    return Scores(metrics, per_image, _notices(made, judged, references))


def _overlap(
    made: dict[str, list[str]], judged: dict[str, list[str]]
) -> tuple[dict[str, Any], pd.DataFrame]:
    """BLEU, ROUGE-L and CIDEr, with intervals, and those of each image."""
    scorer = _count_ngrams([x for (x,) in made.values()], judged.values())
    bleu, bleu_per_image = scorer.compute_score(option="closest")
    rouge_l, rouge_l_per_image = Rouge().compute_score(judged, made)
    cider_mean, cider_per_image = Cider().compute_score(judged, made)
    counts = np.column_stack([cider_per_image, np.ones(len(judged))])
    metrics = {
        **{f"bleu{n}": value for n, value in enumerate(bleu, 1)},
        "rouge_l": float(rouge_l),
        "cider": float(cider_mean),
        "intervals": {
            "bleu4": interval(_bleu_counts(scorer), corpus_bleu(4)),
            # The document frequencies stay those of the whole split.
            "cider": interval(counts, ratio),
        },
    }
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
    """CIDEr of tokenised captions: quick, and without Java.

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
    judged = {
        image: [text for text in texts if text]
        for image, texts in references.items()
        if any(texts)
    }
    if not judged:
        raise UserError(
            "no image has a reference with a word in it: there is nothing to "
            "score against"
        )
    return {image: [captions.get(image) or ""] for image in judged}, judged


def _notices(
    made: Mapping[str, list[str]],
    judged: Mapping[str, list[str]],
    references: Mapping[str, Sequence[str]],
) -> list[str]:
    notices = []
    if 1 < len(judged) < FEW_IMAGES:
        notices.append(
            f"{len(judged)} images is a small sample: trust the intervals, not "
            "the scores"
        )
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
            f"such as {left_out[0]}: they are left out"
        )
    if len(judged) == 1:
        notices.append(
            "CIDEr of a single image is always 0: it weights words by how few "
            "images they occur in"
        )
    return notices


def _diversity(captions: list[str]) -> dict[str, Any]:
    """How different the captions are from each other, and how long."""
    words = [word for caption in captions for word in caption.split()]
    return {
        "distinct_captions": len({*captions} - {""}) / len(captions),
        "vocabulary_used": len(set(words)),
        "mean_length": len(words) / len(captions),
    }


# --- intervals ---------------------------------------------------------------


def bleu_counts(
    captions: Iterable[str],
    references: Iterable[Sequence[str]],
    tokeniser: str = WORDS,
) -> np.ndarray:
    """What corpus BLEU is made of, for each image.

    Args:
        captions: of each image, as written.
        references: of each image, as written.
        tokeniser: `words` or `characters`.

    Returns:
        As `_bleu_counts`.
    """
    made, judged = _tokens(captions, references, tokeniser)
    return _bleu_counts(_count_ngrams(made, judged))


def cider_per_image(
    captions: Iterable[str],
    references: Iterable[Sequence[str]],
    tokeniser: str = WORDS,
) -> np.ndarray:
    """CIDEr of each image, by how rare words are among these images alone.

    Args:
        captions: of each image, as written.
        references: of each image, as written.
        tokeniser: `words` or `characters`.

    Returns:
        Float (images,).
    """
    made, judged = _tokens(captions, references, tokeniser)
    said = {n: [caption] for n, caption in enumerate(made)}
    return Cider().compute_score(dict(enumerate(judged)), said)[1]


def _tokens(
    captions: Iterable[str],
    references: Iterable[Sequence[str]],
    tokeniser: str,
) -> tuple[list[str], list[list[str]]]:
    """Captions, and references with a word in them, with spaces at tokens."""
    pairs = zip(captions, references, strict=True)
    grouped = {n: [said, *texts] for n, (said, texts) in enumerate(pairs)}
    tokens, _ = tokenise(grouped, tokeniser)
    made = [said for said, *_ in tokens.values()]
    return made, [[*filter(None, texts)] for _, *texts in tokens.values()]


def _count_ngrams(
    made: Iterable[str], judged: Iterable[Sequence[str]]
) -> BleuScorer:
    scorer = BleuScorer(n=4)
    for caption, references in zip(made, judged, strict=True):
        scorer += (caption, references)
    return scorer


def _bleu_counts(scorer: BleuScorer) -> np.ndarray:
    """What corpus BLEU is made of, for each image.

    Returns:
        (images, 10): matched 1- to 4-grams, 1- to 4-grams, words, and words of
        the reference nearest in length.
    """
    rows = []
    for each in scorer.ctest:
        length = each["testlen"]
        nearest = min(each["reflen"], key=lambda n: (abs(n - length), n))
        rows.append([*each["correct"], *each["guess"], length, nearest])
    return np.array(rows, float)


def corpus_bleu(order: int) -> Callable[[np.ndarray], np.ndarray]:
    """BLEU (Papineni et al. 2002), with pycocoevalcap's tiny constants.

    Args:
        order: of the longest n-grams, up to 4.

    Returns:
        A function from sums of rows of `bleu_counts`, (..., 10), to BLEU,
        (...).
    """

    def bleu(totals: np.ndarray) -> np.ndarray:
        right, all_of_them = totals[..., :order], totals[..., 4 : 4 + order]
        precisions = (right + 1e-15) / (all_of_them + 1e-9)
        lengths = (totals[..., 8] + 1e-15) / (totals[..., 9] + 1e-9)
        brevity = np.exp(np.minimum(0, 1 - 1 / lengths))
        return np.exp(np.log(precisions).mean(axis=-1)) * brevity

    return bleu


def ratio(totals: np.ndarray) -> np.ndarray:
    """The first column over the second, (..., 2) -> (...)."""
    return totals[..., 0] / totals[..., 1]


def interval(
    counts: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray]
) -> list[float]:
    """95% bootstrap interval: percentiles over resamples of the images.

    Args:
        counts: what the statistic is computed from, (images, columns).
        statistic: from sums over images, (resamples, columns), to values,
            (resamples,).

    Returns:
        Its lower and its upper end.
    """
    generator = np.random.default_rng(0)
    images = len(counts)
    totals = np.empty((RESAMPLES, counts.shape[1]))
    for each in totals:
        counts[generator.integers(images, size=images)].sum(axis=0, out=each)
    return np.percentile(statistic(totals), [2.5, 97.5]).tolist()
