"""Captions as tokens, words or characters, and tokens as numbers."""

import functools
import itertools
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from captioning.files import reading, write_json
from config import CHARACTERS, WORDS

PAD, START, END, UNKNOWN = range(4)
SPECIAL_WORDS = ("<pad>", "<start>", "<end>", "<unk>")

# What Treebank cuts off with its apostrophe.
_CLITICS = frozenset(["'s", "'m", "'d", "'ll", "'re", "'ve", "'t"])
# Scripts that are written without spaces between words: Thai to Burmese,
# Khmer, Japanese and Chinese.
_SCRIPTS = (
    "\u0e00-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u3400-\u9fff"
    "\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
)
# Punctuation as wide as their letters, which has no spaces around it either.
_WIDE = "\u3001-\u3004\u3008-\u303f\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40"
# Their vowel signs and tones, which belong to the letter before them.
_SIGNS = "".join(
    each
    for each in map(chr, range(0x0E00, 0x30FF))
    if unicodedata.category(each)[0] == "M"
)
_UNSPACED = re.compile(f"[{_SCRIPTS}]")
_PIECE = re.compile(f"[{_SCRIPTS}][{_SIGNS}]*|[^{_SCRIPTS}{_WIDE}]+")
# Letters without signs; words of these scripts are shorter on average.
_LONG_TOKEN = 5


@functools.cache
def _treebank():
    # Imported late because nltk takes a second, and most callers of this
    # module never tokenise.
    from nltk.tokenize import TreebankWordTokenizer

    return TreebankWordTokenizer()


def tokenise(caption: str, tokeniser: str = WORDS) -> list[str]:
    """Splits a caption into lower-case tokens, without punctuation.

    Args:
        caption: the text as written.
        tokeniser: `words` or `characters`.

    Returns:
        Its words in the manner of the Penn Treebank, or what `characters`
        makes of these; a token has at least one letter or digit, of any
        script.
    """
    words = _words(caption)
    return characters(words) if tokeniser == CHARACTERS else words


def characters(words: Iterable[str]) -> list[str]:
    """Splits words of scripts without spaces into their characters.

    Args:
        words: from `tokenise`.

    Returns:
        Each character of such a script, and what is between them as it is: a
        run of Latin letters or digits stays one word.
    """
    return only_words(piece for word in words for piece in _PIECE.findall(word))


def join(tokens: Iterable[str], tokeniser: str) -> str:
    """The text of a caption, which `tokenise` splits into the same tokens.

    Args:
        tokens: of the caption.
        tokeniser: `words` or `characters`. A character of a script without
            spaces gets none around it.
    """
    if tokeniser == WORDS:
        return " ".join(tokens)
    text, spaced = "", False
    for token in tokens:
        unspaced = bool(_UNSPACED.match(token))
        text += f" {token}" if spaced and not unspaced else token
        spaced = not unspaced
    return text


def _words(caption: str) -> list[str]:
    """Splits a caption into words."""
    chunks = straight(caption).lower().split()
    # Treebank only knows ASCII, and does not split an "it's" in other quotes.
    chunks = [c if c.isascii() else c.strip(_marks(c)) for c in chunks]
    text = " ".join(chunk.rstrip("'") for chunk in chunks)
    return only_words(_treebank().tokenize(text))


def straight(text: str) -> str:
    """A text with straight apostrophes instead of curly ones."""
    return text.replace("\u2019", "'")


def only_words(tokens: Iterable[str]) -> list[str]:
    """Removes punctuation and symbols of any script from tokens.

    Args:
        tokens: from a tokeniser.

    Returns:
        The tokens that have a letter or digit, without what is around it.
    """
    words = (token if token.isalnum() else _bare(token) for token in tokens)
    return [word for word in words if any(map(str.isalnum, word))]


def _bare(word: str) -> str:
    """A word without punctuation and symbols at its ends, in any script.

    Treebank splits "dog's" into "dog" and "'s", whose apostrophe stays.
    """
    return word if word in _CLITICS else word.strip(_marks(word) + "'")


def _marks(text: str) -> str:
    """The punctuation and symbols in a text, but for apostrophes."""
    marks = {c for c in text if unicodedata.category(c)[0] in "PS"}
    return "".join(marks - {"'"})


@dataclass(frozen=True)
class Vocabulary:
    """The tokens that the decoder knows; a token's place is its number."""

    words: tuple[str, ...]
    tokeniser: str = WORDS

    def __len__(self) -> int:
        """How many words, special ones included."""
        return len(self.words)

    @functools.cached_property
    def numbers(self) -> dict[str, int]:
        """Word -> number; made once, as images are encoded one by one."""
        return {word: number for number, word in enumerate(self.words)}

    def decode(self, numbers: Iterable[int]) -> list[str]:
        """The words of a caption, up to its first `<end>` or padding."""
        caption = itertools.takewhile(lambda n: n not in (END, PAD), numbers)
        return [self.words[number] for number in caption]


def build(
    captions: Iterable[Sequence[str]], min_count: int, tokeniser: str = WORDS
) -> Vocabulary:
    """Collects the words of the training captions.

    Args:
        captions: tokenised captions of the training split, and of no other.
        min_count: rarer words become `<unk>`.
        tokeniser: that split the captions.

    Returns:
        The special words, then the others, the most frequent first and
        equally frequent ones in alphabetical order.
    """
    counts = Counter(word for caption in captions for word in caption)
    kept = [word for word, count in counts.items() if count >= min_count]
    kept.sort(key=lambda word: (-counts[word], word))
    return Vocabulary((*SPECIAL_WORDS, *kept), tokeniser)


def encode(
    captions: Sequence[Sequence[str]],
    vocabulary: Vocabulary,
    max_length: int,
) -> np.ndarray:
    """Turns captions into rows of word numbers.

    A caption longer than `max_length` is cut there and gets no `<end>`: the
    decoder must not learn to stop in the middle of a sentence.

    Args:
        captions: tokenised captions.
        vocabulary: the words that are known.
        max_length: in tokens.

    Returns:
        int32 (captions, max_length + 2): `<start>`, the words, `<end>`,
        padding.
    """
    numbers = vocabulary.numbers
    rows = np.full((len(captions), max_length + 2), PAD, np.int32)
    rows[:, 0] = START
    for row, caption in zip(rows, captions, strict=True):
        known = [numbers.get(word, UNKNOWN) for word in caption[:max_length]]
        if len(caption) <= max_length:
            known.append(END)
        row[1 : 1 + len(known)] = known
    return rows


def lacks_spaces(captions: Iterable[Sequence[str]]) -> bool:
    """Whether captions are in a script without spaces between words.

    Chinese, Japanese or Thai that has been segmented into words is not.

    Args:
        captions: tokenised captions, by words.
    """
    tokens = length = letters = unspaced = 0
    for caption in captions:
        text = "".join(caption)
        tokens += len(caption)
        length += len(text)
        letters += sum(map(str.isalnum, text))
        unspaced += len(_UNSPACED.findall(text))
    return letters > _LONG_TOKEN * tokens and unspaced > length / 2


def save(vocabulary: Vocabulary, path: Path) -> None:
    """Writes a vocabulary as JSON."""
    fields = {"tokeniser": vocabulary.tokeniser, "words": vocabulary.words}
    write_json(path, fields, indent=None, ensure_ascii=False)


def load(path: Path, advice: str = "run preprocess.py again") -> Vocabulary:
    """Reads a vocabulary.

    Args:
        path: of the file.
        advice: what to do if it cannot be read.

    Raises:
        UserError: if the file is not one that `save` wrote.
    """
    with reading(path, advice):
        fields = json.loads(path.read_text(encoding="utf-8"))
        words = tuple(fields["words"])
        if words[: len(SPECIAL_WORDS)] != SPECIAL_WORDS:
            raise ValueError("it lacks the special words")
        return Vocabulary(words, fields["tokeniser"])
