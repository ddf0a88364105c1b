"""The built-in sample: repeatable, true to its captions, safe to interrupt."""

import re
from collections import Counter
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pandas as pd
import pytest

from captioning.data import sample
from tests.helpers import files_in, refusal


@pytest.fixture(scope="module")
def drawn() -> list[tuple[sample.Scene, np.ndarray, list[str]]]:
    """Scenes with their images and captions."""
    made = []
    for number in range(200):
        random = np.random.default_rng([7, number])
        scene = sample.scene(random)
        image = sample.draw(scene, random)
        made.append((scene, image, sample._captions(scene, random)))
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sample of 60 images; not to be changed."""
    path = tmp_path_factory.mktemp("sample")
    sample.write_sample(path, images=60)
    return path


def test_the_sample_is_the_same_bytes_every_time(folder: Path, tmp_path: Path):
    sample.write_sample(tmp_path, images=60)
    assert files_in(tmp_path) == files_in(folder)


def test_table_names_every_image_with_five_different_captions(folder: Path):
    table = pd.read_csv(folder / "captions.csv")
    assert list(table.columns) == ["image", "caption", "split"]
    images = {p.name: p.read_bytes() for p in (folder / "images").iterdir()}
    assert set(table["image"]) == images.keys()
    assert len(set(images.values())) == 60
    assert set(table.groupby("image")["caption"].nunique()) == {5}
    assert set(table.groupby("image")["split"].nunique()) == {1}


@pytest.mark.parametrize(
    ("images", "sizes"),
    [(2400, (2000, 200, 200)), (60, (50, 5, 5)), (3, (1, 1, 1))],
)
def test_splits_have_their_shares(images, sizes, tmp_path, monkeypatch):
    dot = np.zeros((1, 1, 3), np.uint8)
    monkeypatch.setattr(sample, "draw", lambda scene, random: dot)
    sample.write_sample(tmp_path, images=images)
    table = pd.read_csv(tmp_path / "captions.csv")
    splits = table.drop_duplicates("image")["split"].value_counts()
    assert tuple(splits[["train", "val", "test"]]) == sizes


def test_captions_are_short_sentences_of_a_small_vocabulary(drawn):
    captions = [text for _, _, texts in drawn for text in texts]
    words = [re.findall("[a-z]+", text.lower()) for text in captions]
    assert all(6 <= len(each) <= 14 for each in words)
    assert 60 <= len({word for each in words for word in each}) <= 100
    assert all(t[0].isupper() and t.endswith(".") for t in captions)
    assert not any("{" in text or "  " in text for text in captions)


def test_objects_have_the_colour_that_the_scene_says(drawn):
    palette = np.array(list(sample.COLOURS.values()))  # (colours, 3)
    for scene, image, _ in drawn:
        if scene.ground == "sky":  # as dark as a black object
            continue
        for group in scene.groups:
            for x, y in group.centres.astype(int):
                r = group.radius
                patch = image[max(y - r, 0) : y + r, max(x - r, 0) : x + r]
                away = np.linalg.norm(
                    patch.reshape(-1, 1, 3).astype(int) - palette, axis=2
                )  # (pixels, colours)
                votes = (away < 45).sum(0)
                assert votes.max() > 0.1 * len(away), scene
                assert list(sample.COLOURS)[votes.argmax()] == group.colour


def test_big_objects_are_bigger_and_nothing_overlaps_or_is_cut_off(drawn):
    radii = {"big": set(), "small": set()}
    for scene, _, _ in drawn:
        objects = [(c, g.radius) for g in scene.groups for c in g.centres]
        for group in scene.groups:
            radii[group.size].add(group.radius)
        for number, (centre, radius) in enumerate(objects):
            assert np.all(centre >= radius)
            assert np.all(centre <= sample.SIDE - radius)
            for other, its_radius in objects[:number]:
                assert np.linalg.norm(centre - other) > radius + its_radius
    assert min(radii["big"]) > 1.3 * max(radii["small"])


def test_what_captions_say_of_a_group_is_true(drawn):
    said = re.compile(
        r"\b(a|two|three)((?: \w+){0,2}) "
        rf"({'|'.join(sample.KINDS)})(?:es|s)?\b"
    )
    for scene, _, captions in drawn:
        by_kind = {group.kind: group for group in scene.groups}
        for text in captions:
            for number, adjectives, kind in said.findall(text.lower()):
                group = by_kind[kind]
                count = {"a": 1, "two": 2, "three": 3}[number]
                assert len(group.centres) == count, text
                true = {group.colour, *sample.SYNONYMS[group.size], "single"}
                assert set(adjectives.split()) <= true, text


def test_captions_name_no_colour_size_or_ground_that_is_not_there(drawn):
    for scene, _, captions in drawn:
        there = {scene.ground, *(g.colour for g in scene.groups)}
        there |= {group.size for group in scene.groups}
        for text in captions:
            for colour in sample.COLOURS:
                assert colour in there or f" {colour}" not in text, text
            for name, wordings in sample.SYNONYMS.items():
                absent = name not in there
                for wording in wordings:
                    assert not (absent and wording in text.lower()), text


def test_relations_in_captions_hold_between_the_centres(drawn):
    seen = Counter()
    kinds = "|".join(sample.KINDS)
    pair = re.compile(
        rf"({kinds})\w*(?: \w+)?(?: to the)? (left of|right of|above|below)"
        rf"(?: \w+)*? ({kinds})"
    )
    middle = re.compile(rf"({kinds}) \w+ between .*?({kinds}).*?({kinds})")
    for scene, _, captions in drawn:
        centre = {g.kind: g.centres.mean(0) for g in scene.groups}
        for text in captions:
            if found := pair.search(text):
                first, relation, second = found.groups()
                x, y = centre[second] - centre[first]
                seen[relation] += 1
                assert {
                    "left of": x > abs(y),
                    "right of": -x > abs(y),
                    "above": y > abs(x),
                    "below": -y > abs(x),
                }[relation], text
            if found := middle.search(text):
                it, one, other = (centre[kind] for kind in found.groups())
                seen["between"] += 1
                assert np.allclose(it, (one + other) / 2, atol=10), text
    assert min(seen[r] for r in ("left of", "right of", "above")) > 10
    assert min(seen[r] for r in ("below", "between")) > 10


def test_a_single_object_is_where_the_captions_say(drawn):
    for scene, _, captions in drawn:
        if len(scene.groups) > 1 or len(scene.groups[0].centres) > 1:
            continue
        x, y = scene.groups[0].centres[0] - sample.SIDE / 2
        true = {
            "on the left": x < -abs(y),
            "on the right": x > abs(y),
            "at the top": y < -abs(x),
            "at the bottom": y > abs(x),
            "in the middle": max(abs(x), abs(y)) < 20,
        }
        said = [p for p in true for text in captions if p in text]
        assert said
        assert all(true[place] for place in said)


def test_a_complete_sample_is_left_alone(tmp_path: Path):
    sample.write_sample(tmp_path, images=4)
    photograph = tmp_path / "images" / "scene_00001.jpg"
    photograph.write_bytes(b"touched")
    sample.write_sample(tmp_path, images=4)
    assert photograph.read_bytes() == b"touched"


@pytest.mark.parametrize("lost", ["captions.csv", "images/scene_00001.jpg"])
def test_an_incomplete_sample_is_drawn_again(lost: str, tmp_path: Path):
    sample.write_sample(tmp_path, images=4)
    before = files_in(tmp_path)
    (tmp_path / lost).unlink()
    sample.write_sample(tmp_path, images=4)
    assert files_in(tmp_path) == before


def test_an_interrupted_change_of_size_ends_as_an_undisturbed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    sample.write_sample(tmp_path / "one", images=6)
    sample.write_sample(tmp_path / "two", images=9)
    with monkeypatch.context() as patch:
        stop = Mock(side_effect=KeyboardInterrupt)
        patch.setattr(sample, "_captions", stop)
        with pytest.raises(KeyboardInterrupt):
            sample.write_sample(tmp_path / "two", images=6)
    assert not (tmp_path / "two" / "captions.csv").exists()
    sample.write_sample(tmp_path / "two", images=6)
    assert files_in(tmp_path / "two") == files_in(tmp_path / "one")


@pytest.mark.parametrize("table", ["captions.csv", "captions.txt"])
def test_another_dataset_in_the_folder_is_not_touched(table, tmp_path: Path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "scene_00001.jpg").write_bytes(b"a photograph")
    (tmp_path / table).write_text("image,caption\n", encoding="utf-8")
    before = files_in(tmp_path)
    told = refusal(sample.write_sample, tmp_path, images=4)
    assert "not the drawn sample" in told
    assert files_in(tmp_path) == before
