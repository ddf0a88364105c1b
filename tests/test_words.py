"""What preprocess.py says about the words and files of a dataset."""

import json
import re
from pathlib import Path

import pytest

from tests.processes import bad, good, make_photos

GERMAN = "Ein Mädchen mit Regenschirm an der Straßenbahnhaltestelle {}"
CHINESE = "一位穿红色外套的老人在{}号桥上唱歌。"


def describe(folder: Path, captions: str) -> Path:
    """Makes photographs with these captions."""
    make_photos(folder, 20)
    path = folder / "data" / "photos" / "captions.csv"
    lines = ["image,caption,split"]
    for number in range(20):
        split = "val" if number % 5 == 0 else "train"
        lines.append(f"{number:03d}.png,{captions.format(number)},{split}")
    path.write_text("\n".join(lines), encoding="utf-16")
    return folder


@pytest.mark.parametrize(
    ("captions", "flags", "tokeniser"),
    [
        (CHINESE, [], "characters"),
        (CHINESE, ["--tokeniser", "characters"], "characters"),
        (CHINESE, ["--tokeniser", "words", "--min-word-count", "1"], "words"),
        ("一位 老人 在 {} 号 桥 上 唱歌", [], "words"),
        (GERMAN, [], "words"),
    ],
)
def test_captions_without_spaces_are_split_into_characters(
    tmp_path, captions, flags, tokeniser
):
    """Unless told otherwise; one line says so, and all that is left does."""
    out = good(describe(tmp_path, captions), *flags)
    chosen = tokeniser == "characters" and not flags
    assert ("each character is a token" in out) == chosen
    assert re.search(rf"vocabulary of \d+ {tokeniser}; ", out)
    (text,) = tmp_path.glob("data/cache/photos/text-*")
    for name in ("dataset.json", "vocabulary.json"):
        found = json.loads((text / name).read_text(encoding="utf-8"))
        assert found["tokeniser"] == tokeniser
    table = (text / "captions.csv").read_text(encoding="utf-8")
    split = "一 位 穿 红 色 外 套 的 老 人 在 1 号 桥 上 唱 歌"
    assert (split in table) == (tokeniser == "characters")


def test_many_captions_that_are_cut_are_a_reason_to_warn(tmp_path):
    """Whatever they are cut into."""
    out = good(describe(tmp_path, CHINESE), "--max-caption-length", "16")
    assert "100.0% of the captions are longer than 16 characters" in out
    assert "nine in ten have at most 17" in out
    (text,) = tmp_path.glob("data/cache/photos/text-*")
    told = (text / "repaired.csv").read_text(encoding="utf-8")
    assert told.count("caption of 17 characters is cut") == 20


@pytest.mark.parametrize("captions", ["word{}", CHINESE])
def test_no_frequent_word_stops_before_anything_is_encoded(tmp_path, captions):
    line = bad(describe(tmp_path, captions), "--tokeniser", "words")
    assert "no word occurs 4 times" in line and "--min-word-count" in line
    assert ("no spaces between words" in line) == (captions == CHINESE)
    assert not (tmp_path / "data" / "cache").exists()


def test_the_share_of_unknown_words_is_told_of_each_split(tmp_path):
    """Every caption has its number, which is not in the vocabulary."""
    out = good(describe(tmp_path, "a dog on hill {}"))
    for split, images in (("train", 16), ("val", 4)):
        line = rf"{split} +{images} images +{images} captions +20.0% of words"
        assert re.search(line, out)
    assert "20.0% in train, 20.0% in val" in out
    assert "lower --min-word-count (now 4)" in out
    assert "read as UTF-16" in out


def test_few_unknown_words_are_no_reason_to_warn(tmp_path):
    captions = "a dog on a big hill in the green sun {}"
    out = good(describe(tmp_path, captions))
    assert "9.1% of words" in out and "Warning: many" not in out
    assert "are cut" not in out
