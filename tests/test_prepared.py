"""What preprocess.py leaves for the other scripts."""

import dataclasses
import json
import os
import re
from pathlib import Path
from unittest.mock import Mock

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from captioning.data import prepared, vocabulary
from captioning.data.datasets import Dataset
from captioning.data.vocabulary import SPECIAL_WORDS, tokenise
from captioning.features import cache as features
from captioning.features import store
from config import Config, group
from tests.helpers import refusal

DESCRIPTION = features.describe("resnet50", "conv5", "random-0", 8)
PLAIN = [
    ("z.png", "train", "A dog runs."),
    ("a.png", "train", "Two dogs, and a cat!"),
    ("z.png", "train", "The dog's ball"),
    ("m.png", "val", "A zebra runs."),
]
# What CSV readers like to misunderstand.
ODD = [
    ("null", "train", "null"),
    ("NA", "train", "NA nan None"),
    ("a,b.png", "train", 'He said "sit, dog", twice'),
    ("caf\u00e9 \u72ac.png", "train", "Ein M\u00e4dchen; \u72ac\u304c"),
    ("1.0", "val", "007"),
    ("true", "val", " '' \"\" , "),
    ("#5.png", "val", "#5\\n is \u2028 not\ta line\u00a0"),
]


def dataset(captions, image_ids=None, skipped=(), repaired=()) -> Dataset:
    table = pd.DataFrame(captions, columns=["image", "split", "caption"])
    table["tokens"] = [" ".join(tokenise(each)) for each in table["caption"]]
    table["image_id"] = table["image"] if image_ids is None else image_ids
    return Dataset(
        table, Path("images"), "plain", "", list(skipped), list(repaired)
    )


@pytest.fixture
def config(tmp_path) -> Config:
    return Config(data_dir=str(tmp_path), min_word_count=1, tokeniser="words")


# --- the folder -----------------------------------------------------------


OTHERS = {"layout": "coco", "tokeniser": "characters"}


def another_value(name: str):
    default = getattr(Config(), name)
    if name in OTHERS:
        return OTHERS[name]
    return default / 2 if isinstance(default, float) else default + 1


def test_each_change_of_a_data_field_has_a_folder_of_its_own():
    names = [name for name in group("data") if name != "dataset"]
    changes = [{name: another_value(name)} for name in names]
    changes += [{}, {"limit_images": 2}, {**changes[0], **changes[1]}]
    folders = [prepared.folder(Config(**each)) for each in changes]
    assert len(set(folders)) == len(folders)
    parent = Path("data") / "cache" / "sample"
    assert all(each.parent == parent for each in folders)
    assert all(re.fullmatch("text-[0-9a-f]{8}", f.name) for f in folders)


def test_the_other_fields_leave_the_folder_as_it_is():
    other = Config(encoder="vgg16", epochs=3, beam_size=2, run_name="x")
    assert prepared.folder(other) == prepared.folder(Config())
    # A whole number is the same value as the number.
    one, other = (Config(val_share=0.1, test_share=x) for x in (0, 0.0))
    assert prepared.folder(one) == prepared.folder(other)


def test_an_open_tokeniser_is_what_was_made_last(config):
    choice = dataclasses.replace(config, tokeniser="auto")
    assert prepared.settle_tokeniser(choice) == config  # nothing is there
    by_characters = dataclasses.replace(config, tokeniser="characters")
    for made, second in ((by_characters, 1), (config, 2), (by_characters, 3)):
        prepared.save(made, dataset(PLAIN))
        path = prepared.folder(made) / "dataset.json"
        os.utime(path, (second, second))
        assert prepared.settle_tokeniser(choice) == made
        assert prepared.settle_tokeniser(config) == config


def test_captions_that_were_tokenised_otherwise_are_told(config):
    prepared.save(config, dataset(PLAIN))
    other = dataclasses.replace(config, tokeniser="characters")
    told = refusal(prepared.load_split, other, "val")
    assert "--tokeniser characters (now it has words)" in told


# --- captions -------------------------------------------------------------


def test_captions_come_back_by_image_in_the_order_of_the_dataset(config):
    prepared.save(config, dataset(PLAIN))
    split = prepared.load_split(config, "train")
    assert split.images == split.image_ids == ["z.png", "a.png"]
    assert split.captions == [
        ["A dog runs.", "The dog's ball"],
        ["Two dogs, and a cat!"],
    ]
    assert split.tokens == [
        [["a", "dog", "runs"], ["the", "dog", "'s", "ball"]],
        [["two", "dogs", "and", "a", "cat"]],
    ]
    assert prepared.load_split(config, "val").images == ["m.png"]
    # All occurrences of a word are one string.
    (first, second), _ = split.tokens
    assert first[1] is second[1]


def check_round_trip(config: Config, captions: list) -> None:
    prepared.save(config, dataset(captions))
    for name in {split for _, split, _ in captions}:
        split = prepared.load_split(config, name)
        wanted: dict[str, list[str]] = {}
        for image, other, caption in captions:
            if other == name:
                wanted.setdefault(image, []).append(caption)
        assert split.images == list(wanted)
        assert split.captions == list(wanted.values())
        assert split.tokens == [
            [tokenise(caption) for caption in each] for each in wanted.values()
        ]


def test_odd_names_and_captions_come_back_as_they_were(config):
    check_round_trip(config, ODD)
    split = prepared.load_split(config, "train")
    assert split.tokens[:2] == [[["null"]], [["na", "nan", "none"]]]


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1),
        min_size=1,
    )
)
def test_any_captions_come_back_as_they_were(tmp_path_factory, captions):
    config = Config(data_dir=str(tmp_path_factory.mktemp("data")))
    check_round_trip(config, [("x.png", "train", each) for each in captions])


def test_the_numbers_that_coco_gives_its_images_come_back(config):
    prepared.save(config, dataset(PLAIN, [7, 40, 7, 10**12]))
    assert prepared.load_split(config, "train").image_ids == [7, 40]
    assert prepared.load_split(config, "val").image_ids == [10**12]
    path = prepared.folder(config) / "captions.csv"
    path.write_text(path.read_text().replace(",40\n", ",40.5\n"))
    told = refusal(prepared.load_split, config, "train")
    assert "captions.csv cannot be read (" in told


def test_the_tables_have_the_columns_of_the_contract(config):
    made = dataset(
        PLAIN, skipped=[("b,c.png", "missing")], repaired=[("a", "x")]
    )
    prepared.save(config, made)
    place = prepared.folder(config)
    table = pd.read_csv(place / "captions.csv")
    assert list(table) == ["image", "split", "caption", "tokens"]
    assert table["tokens"][2] == "the dog 's ball"
    skipped = (place / "skipped.csv").read_text(encoding="utf-8")
    assert skipped == 'image,reason\n"b,c.png",missing\n'
    repaired = (place / "repaired.csv").read_text(encoding="utf-8")
    assert repaired == "image,reason\na,x\n"
    assert prepared.images_dir(config) == Path("images").resolve()


def test_a_caption_that_will_be_cut_is_listed_as_repaired(config):
    config = dataclasses.replace(config, max_caption_length=4)
    prepared.save(config, dataset(PLAIN))
    path = prepared.folder(config) / "repaired.csv"
    assert path.read_text(encoding="utf-8") == (
        "image,reason\na.png,caption of 5 words is cut\n"
    )
    tokens = prepared.load_split(config, "train").tokens
    assert tokens[1] == [["two", "dogs", "and", "a", "cat"]]


# --- vocabulary -----------------------------------------------------------


def test_the_vocabulary_sees_the_training_captions_only(config):
    config = dataclasses.replace(config, min_word_count=2)
    captions = [
        ("a.png", "train", "dog dog cat"),
        ("b.png", "val", "cat zebra"),
        ("c.png", "test", "zebra cat"),
    ]
    words, _ = prepared.save(config, dataset(captions))
    assert words.words == (*SPECIAL_WORDS, "dog")
    assert prepared.load_captions(config).words == words


# --- refused --------------------------------------------------------------


def test_other_data_fields_in_the_folder_are_named(config):
    prepared.save(config, dataset(PLAIN))
    path = prepared.folder(config) / "dataset.json"
    fields = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**fields, "limit_images": 9}), "utf-8")
    message = refusal(prepared.load_split, config, "train")
    assert "limit_images is 9, not 0" in message


def test_what_is_half_written_over_does_not_count(config, monkeypatch):
    prepared.save(config, dataset(PLAIN))
    monkeypatch.setattr(vocabulary, "save", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        prepared.save(config, dataset([*PLAIN, ("n.png", "train", "A bee.")]))
    message = refusal(prepared.load_captions, config)
    assert "run preprocess.py first" in message


# --- features -------------------------------------------------------------


@pytest.mark.parametrize("names", [["z.png", "m.png"], ["z.png", "new.png"]])
def test_features_that_are_not_finished_are_refused(config, names):
    prepared.save(config, dataset(PLAIN))
    place, images = store.folder(config, DESCRIPTION), Path("images")
    known = ["a.png", "m.png", "z.png"]
    cache = features.create(place, DESCRIPTION, {}, images, known, (4, 3))
    features.commit(cache, {0: 1, 2: 2})
    message = refusal(store.open_features, config, [DESCRIPTION], names)
    assert "lacks the features of 1 images" in message
    assert "run preprocess.py again" in message
