"""Captions as words, and words as numbers."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from captioning.data import vocabulary
from captioning.data.vocabulary import (
    END,
    PAD,
    SPECIAL_WORDS,
    START,
    UNKNOWN,
    Vocabulary,
    build,
    encode,
    tokenise,
)
from tests.helpers import refusal

WORDS = Vocabulary((*SPECIAL_WORDS, "a", "dog", "runs", "'s"))
A, DOG, RUNS, S = range(4, 8)

# --- tokens ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ("A dog runs .", "a dog runs"),
        ("A dog. A cat.", "a dog a cat"),
        ("A dog...a cat", "a dog a cat"),
        ("Stop, dog; sit: now!?", "stop dog sit now"),
        ('A "dog" (brown) & [a] {cat}', "a dog brown a cat"),
        ("The dog's ball", "the dog 's ball"),
        ("The dogs' ball", "the dogs ball"),
        ("They're here, it isn't", "they 're here it is n't"),
        ("A t-shirt -- well-worn -", "a t-shirt well-worn"),
        ("a 'dog' 'runs, they'll", "a dog runs they 'll"),
        ("at 5 o'clock, rock 'n' roll", "at 5 o'clock rock n roll"),
        (
            "\u201cit\u2019s\u201d \u2018the dog\u2019s\u2019",
            "it 's the dog 's",
        ),
        ("3 dogs and 2,000 cats run 3.5 m", "3 dogs and 2,000 cats run 3.5 m"),
        ("a 3-year-old's toy", "a 3-year-old 's toy"),
        ("#1 for $5, 50% off", "1 for 5 50 off"),
        ("Ein M\u00c4DCHEN l\u00e4uft", "ein m\u00e4dchen l\u00e4uft"),
        ("na\u00efve caf\u00e9", "na\u00efve caf\u00e9"),
        ("\u72ac\u304c \u8d70\u308b", "\u72ac\u304c \u8d70\u308b"),
        ("\u0643\u0644\u0628 \u064a\u062c\u0631\u064a",) * 2,
        ("\u201cA dog\u201d \u2014 runs\u2026", "a dog runs"),
        ("<start> <end> <unk>", "start end unk"),
        ("tab\tand\u00a0space", "tab and space"),
        ("a \u2018dog\u2019 runs", "a dog runs"),
        ("\u72ac\u304c\u8d70\u308b\u3002", "\u72ac\u304c\u8d70\u308b"),
        ("\u00bfun perro?", "un perro"),
        ("\u00abun chien\u00bb", "un chien"),
        ("कुत्ता है।", "कुत्ता है"),
        ("كلب، قطة؟", "كلب قطة"),
        ("... ! ' - \u2014", ""),
        ("", ""),
    ],
)
def test_a_caption_is_split_into_words_without_punctuation(caption, words):
    assert tokenise(caption) == words.split()


@pytest.mark.parametrize(
    ("caption", "tokens"),
    [
        ("一只狗\uff0c在跑。", "一 只 狗 在 跑"),
        ("一只 狗 在 跑", "一 只 狗 在 跑"),
        (
            "穿T恤的人用iPhone 15拍3.5米的狗",
            "穿 t 恤 的 人 用 iphone 15 拍 3.5 米 的 狗",
        ),
        ("犬が、DVD\uff0cCDを見る", "犬 が dvd cd を 見 る"),
        ("สุนัขวิ่ง", "สุ นั ข วิ่ ง"),  # signs stay with their letters
        ("The dog's ball, well-worn", "the dog 's ball well-worn"),
        ("Ein MÄDCHEN läuft", "ein mädchen läuft"),
        ("한 마리 개가", "한 마리 개가"),  # Korean has spaces
        ("。\uff01", ""),
    ],
)
def test_each_character_of_a_script_without_spaces_is_a_token(caption, tokens):
    found = tokenise(caption, "characters")
    assert found == tokens.split()
    joined = vocabulary.join(found, "characters")
    assert tokenise(joined, "characters") == found


@pytest.mark.parametrize(
    ("tokens", "text"),
    [
        ("一 只 狗 在 跑", "一只狗在跑"),
        ("穿 t 恤 的 iphone 15 和 狗", "穿t恤的iphone 15和狗"),
        ("a dog 's ball", "a dog 's ball"),
        ("", ""),
    ],
)
def test_characters_are_joined_as_their_script_is_written(tokens, text):
    assert vocabulary.join(tokens.split(), "characters") == text
    assert vocabulary.join(tokens.split(), "words") == tokens


@given(st.text())
def test_words_of_any_text_can_be_joined_by_spaces_and_split_again(text):
    words = tokenise(text)
    assert " ".join(words).split() == words
    assert not set(words) & set(SPECIAL_WORDS)
    assert all(any(map(str.isalnum, word)) for word in words)
    assert all(word == word.lower() for word in words)


# --- vocabulary -----------------------------------------------------------


def test_the_most_frequent_words_come_first_then_the_alphabet():
    captions = [[*"cbad"], [*"bdc"], [*"de"]]
    assert build(captions, 1).words == (*SPECIAL_WORDS, *"dbcae")
    # Rare ones are left out.
    assert build(captions, 2).words == (*SPECIAL_WORDS, *"dbc")
    assert build(captions, 4).words == SPECIAL_WORDS


def test_the_special_words_have_their_numbers():
    assert (PAD, START, END, UNKNOWN) == (0, 1, 2, 3)
    assert SPECIAL_WORDS == ("<pad>", "<start>", "<end>", "<unk>")
    words = build([["a"]], 1)
    assert len(words) == 5 and words.numbers["<unk>"] == UNKNOWN
    assert words.numbers["a"] == 4


@pytest.mark.parametrize(
    ("caption", "lacks"),
    [
        ("一位穿红色外套的老人在唱歌。", True),
        ("一位 穿 红色 外套 的 老人 在 唱歌 。", False),
        ("两只狗在草地上跑", True),
        ("山羊が丘の上に立っている。", True),
        ("แพะยืนอยู่บนเนินเขา", True),
        ("ผู้ชาย กำลัง เล่น กับ สุนัข", False),
        ("Donaudampfschifffahrtsgesellschaft", False),
        ("", False),
    ],
)
def test_captions_without_spaces_between_words_are_recognised(caption, lacks):
    assert vocabulary.lacks_spaces([tokenise(caption)]) == lacks


# --- numbers --------------------------------------------------------------


def test_captions_become_rows_of_numbers():
    captions = [["a", "dog"], ["a", "cat", "runs"], [], ["dog"] * 4]
    rows = encode(captions, WORDS, 3)
    assert rows.dtype == np.int32
    assert rows.tolist() == [
        [START, A, DOG, END, PAD],
        [START, A, UNKNOWN, RUNS, END],
        [START, END, PAD, PAD, PAD],
        [START, DOG, DOG, DOG, PAD],  # cut: no <end>
    ]
    assert encode([], WORDS, 3).shape == (0, 5)


def test_decoding_ends_at_the_first_end_or_padding():
    assert WORDS.decode([A, DOG, END, RUNS, END]) == ["a", "dog"]
    assert WORDS.decode([A, PAD, DOG]) == ["a"]
    assert WORDS.decode([A, UNKNOWN, S]) == ["a", "<unk>", "'s"]
    assert WORDS.decode(np.array([END])) == []


@given(st.lists(st.lists(st.sampled_from(WORDS.words[4:]), max_size=9)))
def test_decoding_gives_back_what_was_encoded(captions):
    rows = encode(captions, WORDS, 6)
    found = [WORDS.decode(row[1:]) for row in rows]
    assert found == [caption[:6] for caption in captions]
    ended = [END in row for row in rows]
    assert ended == [len(caption) <= 6 for caption in captions]


# --- on disk --------------------------------------------------------------


def test_a_vocabulary_comes_back_as_it_was_saved(tmp_path):
    path, odd = tmp_path / "vocabulary.json", ["\u72ac", '"', "null", "\\"]
    for words in (build([odd], 1), build([odd], 1, "characters")):
        vocabulary.save(words, path)
        assert vocabulary.load(path) == words
        assert "\u72ac" in path.read_text("utf-8")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "\xff",
        "5",
        "[]",
        "{}",
        '{"words": 3}',
        '{"words": ["a", "dog"]}',
    ],
)
def test_what_is_no_vocabulary_is_refused_in_one_line(tmp_path, text):
    path = tmp_path / "vocabulary.json"
    path.write_text(text, encoding="latin-1")
    message = refusal(vocabulary.load, path)
    assert str(path) in message and "preprocess.py" in message
