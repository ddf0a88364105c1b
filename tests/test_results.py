"""The files of an evaluation: named apart, and replaced as one set."""

import dataclasses

import numpy as np
import pytest

from captioning.data.vocabulary import PAD, UNKNOWN
from captioning.scoring import results, teacher_forced
from config import SAMPLE, Config, group, resolve
from tests.helpers import files_in

TRAINED = Config(dataset="photos", precision="float32")


def name(limit_images: int = 0, captions: str = "", **fields) -> str:
    config = dataclasses.replace(TRAINED, **fields)
    return results.folder_name(config, TRAINED, limit_images, captions)


def test_only_the_defaults_have_the_plain_name_of_the_split(tmp_path):
    assert name() == "test" and name(split="val") == "val"
    one, other = tmp_path / "a b.json", tmp_path / "other" / "a b.json"
    other.parent.mkdir()
    one.write_text("[]")
    other.write_text("[ ]")
    names = [name(captions=str(each)) for each in (one, other)]
    assert names[0].startswith("test-captions-a_b-")
    names += [name(limit_images=each) for each in (0, 10, 100)]
    for field, values in {
        "precision": ["mixed_bfloat16"],
        "dataset": ["mine"],
        "layout": ["coco"],
        "val_share": [0.1],
        "test_share": [0.1],
        **{
            field: [getattr(Config(), field) + more for more in (1, 2)]
            for field in results.SEARCH
        },
    }.items():
        names += [name(**{field: value}) for value in values]
    assert len({each.lower() for each in names}) == len(names)
    assert name(100, beam_size=5) == "test-beam5-limit100"
    assert {*results.SEARCH, "split"} == {*group("decoding")}


def test_the_sample_has_defaults_of_its_own():
    trained = resolve(Config(dataset=SAMPLE))
    assert results.folder_name(trained, trained, 0, "") == "test"
    usual = Config.consensus_temperature
    other = dataclasses.replace(trained, consensus_temperature=usual)
    assert results.folder_name(other, trained, 0, "") == "test-consensus5"


def write_set(place, text: str) -> None:
    for each in ("captions.json", "metrics.json", "attention/1.png"):
        (place / each).parent.mkdir(parents=True, exist_ok=True)
        (place / each).write_text(text)


@pytest.fixture
def place(tmp_path):
    """The folder of an evaluation, with a file of the user's own."""
    write_set(tmp_path / "test", "old")
    (tmp_path / "test" / "notes.txt").write_text("the user's own")
    return tmp_path / "test"


def test_a_set_of_files_is_replaced_as_a_whole(tmp_path, place):
    (place / "report.html").write_text("old")
    write_set(tmp_path / "test-unfinished" / "stale", "of a set that failed")
    with results.replaced(place) as part:
        write_set(part, "new")
        assert files_in(place)["metrics.json"] == b"old"
    assert files_in(place) == {
        "captions.json": b"new",
        "metrics.json": b"new",
        "attention/1.png": b"new",
        "notes.txt": b"the user's own",
    }
    assert [each.name for each in tmp_path.iterdir()] == ["test"]


@pytest.mark.parametrize("renamed", ["old", "both"])
def test_an_end_between_two_renames_loses_nothing(place, monkeypatch, renamed):
    """The next evaluation finds what the one that was killed left."""

    def end(*_):
        raise KeyboardInterrupt

    with (
        monkeypatch.context() as patch,
        pytest.raises(KeyboardInterrupt),
        results.replaced(place) as part,
    ):
        write_set(part, "new")
        if renamed == "old":
            place.rename(place.with_name(".old-test"))
            end()
        patch.setattr(results, "_discard", end)
    if renamed == "both":
        assert files_in(place)["metrics.json"] == b"new"
    with pytest.raises(KeyboardInterrupt), results.replaced(place):
        found = files_in(place)
        assert found["notes.txt"] == b"the user's own"
        assert found["metrics.json"] == {"old": b"old", "both": b"new"}[renamed]
        end()


# --- teacher-forced ----------------------------------------------------------


def test_tokens_are_counted_for_each_image():
    """By hand: ties, words outside the vocabulary, padding."""
    words = 9
    targets = np.array([5, 6, UNKNOWN, 7, 8, 5])
    images = np.array([0, 0, 0, 1, 1, 0], np.int32)
    logits = np.zeros((6, words), np.float32)
    logits[0, 5] = 2  # right
    logits[1] = np.arange(words)[::-1]  # 6 of 9: among the first seven
    logits[2, UNKNOWN] = 2  # never right
    logits[3] = 0  # all alike: 7 stands behind seven others
    logits[4, [4, 8]] = 3  # a tie, which the first wins
    logits[5, [5, 8]] = 3  # a tie, which the first wins
    # One terrace of one step: a caption per token.
    inputs = {
        "features": np.zeros((3, 1, 1)),  # the third fills the batch up
        "image": images,
        "words": (np.ones((6, 1), np.int32),),
    }
    batch = (inputs, targets, np.ones(6, np.float32), logits)
    counts = teacher_forced.count([batch], ["a.png", "b.png"])
    assert [*counts.index] == ["a.png", "b.png"]
    assert counts.tokens.tolist() == [4, 2]
    assert counts.right.tolist() == [2, 0]
    assert counts.right_top5.tolist() == [2, 1]
    own = np.take_along_axis(logits, targets[:, None], 1)[:, 0]
    loss = np.log(np.exp(logits.astype(float)).sum(1)) - own
    expected = [loss[images == image].sum() for image in (0, 1)]
    np.testing.assert_allclose(counts.loss, expected, rtol=1e-5)
    found = teacher_forced.figures(counts)
    assert found["token_accuracy"] == 2 / 6
    assert found["token_accuracy_top5"] == 3 / 6
    assert found["perplexity"] == pytest.approx(np.exp(loss.mean()))
    low, high = found["intervals"]["token_accuracy"]
    assert low == 0 and high == 0.5  # of one image or the other


def test_padding_does_not_count_and_terraces_keep_their_images():
    """The same captions as one rectangle, and cut into two terraces."""
    random = np.random.default_rng(0)
    image = np.array([1, 0, 1, 0], np.int32)  # of each caption
    targets = random.integers(UNKNOWN, 9, (4, 4))
    targets[2:, 2:] = PAD
    logits = random.normal(size=(4, 4, 9)).astype(np.float32)

    def count(*cuts):
        """Of terraces: (first step, last step, captions)."""
        parts = [(slice(0, c), slice(a, b)) for a, b, c in cuts]
        inputs = {
            "features": np.zeros((2, 1, 1)),
            "image": image,
            "words": tuple(targets[each] for each in parts),
        }
        flat = np.concatenate([targets[each].ravel() for each in parts])
        scores = [logits[each].reshape(-1, 9) for each in parts]
        weights = (flat != PAD).astype(np.float32)
        batch = (inputs, flat, weights, np.concatenate(scores))
        return teacher_forced.count([batch], ["a.png", "b.png"])

    one, other = count((0, 4, 4)), count((0, 2, 4), (2, 4, 2))
    assert one.tokens.tolist() == [6, 6]
    np.testing.assert_allclose(one, other)
