"""Captions as words, and words as numbers."""

import functools
import json
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from captioning.files import write_text
from config import UserError

PAD, START, END, UNKNOWN = range(4)
SPECIAL_WORDS = ("<pad>", "<start>", "<end>", "<unk>")


@functools.cache
def _treebank():
    # Imported late because nltk takes a second, and most callers of this
    # module never tokenise.
    from nltk.tokenize import TreebankWordTokenizer

    return TreebankWordTokenizer()


def tokenise(caption: str) -> list[str]:
    """Splits a caption into lower-case words, without punctuation.

    Args:
        caption: the text as written.

    Returns:
        Its words in the manner of the Penn Treebank; a word has at least one
        letter or digit, of any script.
    """
    caption = caption.lower().replace("\u2019", "'")  # a curly apostrophe
    words = map(_bare, _treebank().tokenize(caption))
    return [word for word in words if any(map(str.isalnum, word))]


def _bare(word: str) -> str:
    """A word without punctuation and symbols at its ends, in any script.

    Apostrophes stay: Treebank splits "dog's" into "dog" and "'s".
    """
    marks = {c for c in word if unicodedata.category(c)[0] in "PS"}
    return word.strip("".join(marks - {"'"}))


@dataclass(frozen=True)
class Vocabulary:
    """The words that the decoder knows; a word's place is its number."""

    words: tuple[str, ...]

    def __len__(self) -> int:
        """How many words, special ones included."""
        return len(self.words)

    @functools.cached_property
    def numbers(self) -> dict[str, int]:
        """Word -> number; made once, as images are encoded one by one."""
        return {word: number for number, word in enumerate(self.words)}

    def decode(self, numbers: Iterable[int]) -> list[str]:
        """The words of a caption, up to its first `<end>` or padding."""
        words = []
        for number in numbers:
            if number in (END, PAD):
                break
            words.append(self.words[number])
        return words


def build(captions: Iterable[Sequence[str]], min_count: int) -> Vocabulary:
    """Collects the words of the training captions.

    Args:
        captions: tokenised captions of the training split, and of no other.
        min_count: rarer words become `<unk>`.

    Returns:
        The special words, then the others, the most frequent first and
        equally frequent ones in alphabetical order.
    """
    counts = Counter(word for caption in captions for word in caption)
    kept = [word for word, count in counts.items() if count >= min_count]
    kept.sort(key=lambda word: (-counts[word], word))
    return Vocabulary((*SPECIAL_WORDS, *kept))


def encode(
    captions: Sequence[Sequence[str]],
    vocabulary: Vocabulary,
    max_length: int,
) -> np.ndarray:
    """Turns captions into rows of word numbers.

    A caption longer than `max_length` is cut there and gets no `<end>`: the
    decoder shall not learn to stop in the middle of a sentence.

    Args:
        captions: tokenised captions.
        vocabulary: the words that are known.
        max_length: in words.

    Returns:
        int32 (captions, max_length + 2): `<start>`, the words, `<end>`,
        padding.
    """
    numbers = vocabulary.numbers
    # (captions, max_length + 2)
    rows = np.full((len(captions), max_length + 2), PAD, np.int32)
    rows[:, 0] = START
    for row, caption in zip(rows, captions, strict=True):
        known = [numbers.get(word, UNKNOWN) for word in caption[:max_length]]
        if len(caption) <= max_length:
            known.append(END)
        row[1 : 1 + len(known)] = known
    return rows


def save(vocabulary: Vocabulary, path: Path) -> None:
    """Writes a vocabulary as JSON."""
    text = json.dumps({"words": vocabulary.words}, ensure_ascii=False)
    write_text(path, text)


def load(path: Path) -> Vocabulary:
    """Reads a vocabulary.

    Raises:
        UserError: if the file is not one that `save` wrote.
    """
    try:
        words = tuple(json.loads(path.read_text(encoding="utf-8"))["words"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is not a vocabulary ({error}): run preprocess.py again"
        ) from None
    if words[: len(SPECIAL_WORDS)] != SPECIAL_WORDS:
        raise UserError(
            f"{path} lacks the special words: run preprocess.py again"
        )
    return Vocabulary(words)
