"""What captions get wrong: words said and missed, confusions, lengths."""

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import pandas as pd

from captioning.data.vocabulary import tokenise
from config import WORDS

_WORDS = {
    "Colours": "black blue brown gray green grey orange pink purple red silver "
    "tan white yellow",
    "Numbers": "one two three four five six seven eight nine ten couple pair "
    "few several many group crowd",
    # English words that name nothing in a picture.
    "": "a about above across after against along an and another are around "
    "as at away back be beside between by down for from front has have he her "
    "him his in inside into is it its near next of off on onto or other out "
    "outside over past she side some something that the their them there they "
    "through to top toward towards under up very we which while who with",
}
_KINDS = {word: kind for kind, text in _WORDS.items() for word in text.split()}
MOST = {"Colours": 12, "Numbers": 12, "Things and actions": 24}
LEAST = 3  # images in which a confusion occurs, or a length
CONFUSIONS = 12


class Word(NamedTuple):
    """How often a word is said and meant."""

    word: str
    said: int  # captions with it
    right: float | None  # share of these with a reference that has it too
    meant: int  # images of which two references have it, or their only one
    found: float | None  # share of these with a caption that has it


class Errors(NamedTuple):
    """What `find` gives."""

    words: dict[str, list[Word]]  # by kind
    confusions: list[tuple[str, str, int]]  # said, meant, images
    lengths: list[tuple[int, int, float]]  # words, captions, mean CIDEr


def find(examples: pd.DataFrame, tokeniser: str = WORDS) -> Errors:
    """Finds the errors of an evaluation.

    Args:
        examples: `caption`, `references` and `cider` of each image.
        tokeniser: `words` or `characters`, which are then its words.
    """
    captions = [tokenise(each, tokeniser) for each in examples["caption"]]
    references = [
        [tokenise(text, tokeniser) for text in each]
        for each in examples["references"]
    ]
    said = [{*caption} for caption in captions]
    # Of each image, how many references have a word.
    meant = [_count_references(each) for each in references]
    lengths = examples.groupby([len(words) for words in captions])
    return Errors(
        _words(said, meant),
        _confusions(captions, references, meant),
        [
            (int(str(length)), len(each), float(each["cider"].mean()))
            for length, each in lengths
            if len(each) >= LEAST
        ],
    )


def _count_references(references: Sequence[Sequence[str]]) -> Counter[str]:
    """How many of an image's references have each word.

    A single reference counts twice: there is no second to agree with it.
    """
    counts = Counter(word for each in references for word in {*each})
    return counts + counts if len(references) == 1 else counts


def _confusions(
    captions: list[list[str]],
    references: list[list[list[str]]],
    meant: list[Counter[str]],
) -> list[tuple[str, str, int]]:
    """The most frequent confusions: words that nobody says, for those missed.

    "running" is no mistake for "dog", though one is said where the other is
    missed. So the missed word must fit in the place of the other: people have
    written it between the same two words, of whatever image.
    """
    written = {
        each for x in references for words in x for each in _in_context(words)
    }
    confused: Counter[tuple[str, str]] = Counter()
    for words, counts in zip(captions, meant, strict=True):
        most = max(counts.values(), default=0)
        missed = [
            word
            for word, count in counts.items()
            if count >= max(2, most / 2) and word not in words and _kind(word)
        ]
        wrong = [x for x in _in_context(words) if x[1] not in counts]
        pairs = {
            (word, other)
            for (before, word, after), other in itertools.product(wrong, missed)
            if _kind(word) == _kind(other) and (before, other, after) in written
        }
        confused.update(sorted(pairs))
    return [
        (*pair, images)
        for pair, images in confused.most_common(CONFUSIONS)
        if images >= LEAST
    ]


def _in_context(words: Sequence[str]) -> list[tuple[str, str, str]]:
    """Each word, between those before and after it; empty at the ends."""
    padded = ["", *words, ""]
    return [*zip(padded, padded[1:], padded[2:], strict=False)]


def _words(
    said: list[set[str]], meant: list[Counter[str]]
) -> dict[str, list[Word]]:
    """The most frequent words of each kind, the most frequent first."""
    images: Counter[str] = Counter()
    images.update(w for x in meant for w, count in x.items() if count > 1)
    found: dict[str, list[Word]] = {kind: [] for kind in MOST}
    for word, _ in images.most_common():
        kind = _kind(word)
        if kind and len(found[kind]) < MOST[kind]:
            found[kind].append(_count(word, said, meant))
    return {kind: words for kind, words in found.items() if words}


def _count(word: str, said: list[set[str]], meant: list[Counter[str]]) -> Word:
    pairs = [(word in s, m[word]) for s, m in zip(said, meant, strict=True)]
    captions = [count for has, count in pairs if has]
    images = [has for has, count in pairs if count > 1]
    return Word(
        word,
        len(captions),
        _share(count > 0 for count in captions),
        len(images),
        _share(images),
    )


def _share(values: Any) -> float | None:
    values = [*values]
    return sum(values) / len(values) if values else None


def _kind(word: str) -> str:
    """The kind of a word; empty for one that names nothing."""
    return _KINDS.get(word, "Things and actions")
