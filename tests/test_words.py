"""What preprocess.py says about the words and files of a dataset."""

import re
from pathlib import Path

import pytest

from tests.processes import make_photos, run

CHINESE = "一位穿红色外套的老人在{}号桥上唱歌。"


def preprocess(folder: Path, captions: str, *flags: str) -> tuple:
    """Runs on photographs with these captions; gives code, output, errors."""
    make_photos(folder, 20)
    path = folder / "data" / "photos" / "captions.csv"
    lines = ["image,caption,split"]
    for number in range(20):
        split = "val" if number % 5 == 0 else "train"
        lines.append(f"{number:03d}.png,{captions.format(number)},{split}")
    path.write_text("\n".join(lines), encoding="utf-16")
    return run(folder, *flags)


@pytest.mark.parametrize("captions", ["word{}", CHINESE])
def test_no_frequent_word_stops_before_anything_is_encoded(tmp_path, captions):
    code, out, err = preprocess(tmp_path, captions)
    assert code == 1 and err.count("\n") == 1
    assert "no word occurs 4 times" in err and "--min-word-count" in err
    assert ("no spaces between words" in err) == (captions == CHINESE)
    assert not (tmp_path / "data" / "cache").exists() and "Wrote" not in out


def test_the_share_of_unknown_words_is_told_of_each_split(tmp_path):
    """Every caption has its number, which is not in the vocabulary."""
    code, out, _ = preprocess(tmp_path, "a dog on hill {}")
    assert code == 0
    for split, images in (("train", 16), ("val", 4)):
        line = rf"{split} +{images} images +{images} captions +20.0% of words"
        assert re.search(line, out)
    assert "20.0% in train, 20.0% in val" in out
    assert "lower --min-word-count (now 4)" in out
    assert "read as UTF-16" in out


def test_few_unknown_words_are_no_reason_to_warn(tmp_path):
    _, out, _ = preprocess(tmp_path, "a dog on a big hill in the green sun {}")
    assert "9.1% of words" in out and "Warning: many words" not in out
