"""Two evaluations of the same images."""

import json

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from captioning.scoring import compare
from captioning.scoring.metrics import score
from tests.helpers import refusal

IMAGES = [f"{number}.jpg" for number in range(60)]
REFERENCES = {
    image: [f"a dog runs by tree {n % 7}", f"the dog sees house {n % 5}"]
    for n, image in enumerate(IMAGES)
}


@pytest.fixture
def evaluation(tmp_path, no_java):
    """Makes an evaluation; gives the name to load it by."""

    def make(
        run: str,
        captions: dict,
        right: int,
        references=REFERENCES,
        tokeniser="words",
    ):
        place = tmp_path / run / "evaluation" / "val"
        place.mkdir(parents=True)
        judged = {x: references[x] for x in captions}
        scores = score(captions, judged, [], tokeniser)
        tokens = np.arange(5, 5 + len(captions)) % 9 + 6
        table = scores.per_image.assign(
            caption=captions,
            references=[json.dumps(references[x]) for x in captions],
            tokens=tokens,
            right=np.minimum(tokens, right),
            right_top5=tokens,
            loss=tokens * (4.0 - right / 4),
        )
        table.to_csv(place / "captions.csv")
        found = {
            **scores.metrics,
            "token_accuracy": table["right"].sum() / tokens.sum(),
            "token_accuracy_top5": 1.0,
            "perplexity": np.exp(4.0 - right / 4),
            "images_per_second": 3.0,
            "run": {"run": run},
        }
        (place / "metrics.json").write_text(json.dumps(found, default=float))
        return compare.load(run, str(tmp_path), "val")

    return make


def captions(right: float) -> dict[str, str]:
    """Captions of which a share is a reference, and the others are not."""
    return {
        image: REFERENCES[image][0] if n < right * 60 else "a dog"
        for n, image in enumerate(IMAGES)
    }


def by_title(first, second) -> dict[str, compare.Difference]:
    return {each.title: each for each in compare.compare(first, second)}


def test_an_evaluation_is_not_better_than_itself(evaluation):
    one = evaluation("one", captions(0.5), 4)
    found = by_title(*compare.pair(one, one))
    assert {each.verdict for each in found.values()} <= {
        "not significant",
        compare.NO_INTERVAL,
    }
    assert found["CIDEr"].interval == "+0.000 to +0.000"
    assert found["CIDEr"].first == found["CIDEr"].second
    # Nor is it worse by minus nothing.
    less = {name: one.metrics[name] - 1e-9 for name in ("cider", "bleu4")}
    other = one._replace(metrics=one.metrics | less)
    found = by_title(*compare.pair(one, other))
    assert found["CIDEr"].difference == "+0.000"
    assert found["BLEU-4"].difference == "+0.0"


def test_what_is_better_is_told_from_chance(evaluation):
    poor = evaluation("poor", captions(0.2), 3)
    good = evaluation("good", captions(0.8), 5)
    found = by_title(*compare.pair(poor, good))
    better = ("CIDEr", "BLEU-4", "ROUGE-L", "token accuracy", "perplexity")
    assert {found[title].verdict for title in better} == {"B is better"}
    assert found["length"].verdict == "different"
    assert found["novel"].interval
    assert found["distinct"].interval == ""
    assert found["distinct"].verdict == compare.NO_INTERVAL
    assert not any("METEOR" in title for title in found)  # without Java
    assert "images/second" not in found
    back = by_title(*compare.pair(good, poor))
    assert {back[title].verdict for title in better} == {"B is worse"}
    # A single image is not enough.
    slightly = {**captions(0.2), IMAGES[-1]: REFERENCES[IMAGES[-1]][0]}
    found = by_title(*compare.pair(poor, evaluation("new", slightly, 3)))
    assert found["CIDEr"].verdict == "not significant"
    assert found["CIDEr"].difference.startswith("+0.0")


def test_differences_are_those_of_the_metrics(evaluation):
    poor, good = (
        evaluation("a", captions(0.2), 3),
        evaluation("b", captions(0.7), 5),
    )
    found = by_title(*compare.pair(poor, good))
    for name, title in (("bleu1", "BLEU-1"), ("bleu4", "BLEU-4")):
        difference = good.metrics[name] - poor.metrics[name]
        assert found[title].difference == f"{100 * difference:+.1f}"
    difference = good.metrics["cider"] - poor.metrics["cider"]
    assert found["CIDEr"].difference == f"{difference:+.3f}"
    difference = good.metrics["perplexity"] - poor.metrics["perplexity"]
    assert found["perplexity"].difference == f"{difference:+.2f}"


def test_images_are_resampled_in_pairs():
    """An image that is hard for one is hard for the other."""
    rng = np.random.default_rng(0)
    hard = rng.normal(0, 1, 400)
    pairs = [
        np.column_stack([hard + shift, np.ones(400)]) for shift in (0, 0.1)
    ]

    def mean(totals):
        return totals[..., 0] / totals[..., 1]

    low, high = compare._interval(*pairs, mean)
    assert low == pytest.approx(0.1) and high == pytest.approx(0.1)
    shuffled = [pairs[0], rng.permutation(pairs[1])]
    low, high = compare._interval(*shuffled, mean)
    assert low < 0 < high


def test_the_page_shows_where_they_differ_most(evaluation, tmp_path):
    first = evaluation("one", captions(0.5), 4)
    changed = {
        **captions(0.5),
        "40.jpg": REFERENCES["40.jpg"][0],
        "3.jpg": "<b>",
    }
    second = evaluation("two", changed, 4)
    pair = compare.pair(first, second)
    path = compare.write_page(*pair, compare.compare(*pair), None)
    assert path == second.place / "compared-with-one-val.html"
    page = path.read_text()
    better, worse = page.split("describes these better")[1:]
    assert REFERENCES["40.jpg"][1] in better
    # What both describe alike is not shown, nor a title without images.
    assert page.count('<span class="none">') == 2
    tie = compare.write_page(*compare.pair(first, first), [], None).read_text()
    assert "describes these better" not in tie
    assert "&lt;b&gt;" in worse and "<b>" not in page
    assert "data:image" not in page  # the photographs are gone
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(tmp_path / "40.jpg")
    page = compare.write_page(*pair, [], tmp_path).read_text()
    assert page.count("data:image/jpeg;base64,") == 1
    assert "http" not in page.replace("http-equiv", "")


def test_what_cannot_be_compared_is_told_in_one_line(evaluation, tmp_path):
    one, runs = evaluation("one", captions(0.5), 4), str(tmp_path)
    told = refusal(compare.load, "none", runs, "val")
    assert "no evaluation in " in told
    assert "--run-name none --split val first" in told
    rewritten = {**REFERENCES, "1.jpg": ["another"]}
    other = evaluation("other", captions(0.5), 4, rewritten)
    assert "different references" in refusal(compare.pair, one, other)
    alone = other._replace(
        examples=other.examples.rename(index=lambda x: x + "!")
    )
    assert "no image in common" in refusal(compare.pair, one, alone)
    java = one._replace(metrics={**one.metrics, "tokenizer": "PTB"})
    told = refusal(compare.pair, one, java)
    assert "both with Java or both without" in told
    other = one._replace(metrics={**one.metrics, "tokenizer": "characters"})
    told = refusal(compare.pair, one, other)
    assert "characters cannot be compared" in told
    (one.place / "captions.csv").write_text("nothing")
    assert "evaluate again" in refusal(compare.load, "one", runs, "val")
    # As one of another version is.
    (one.place / "metrics.json").write_text('{"cider": 1}')
    assert "no evaluation in " in refusal(compare.load, "one", runs, "val")


def test_characters_are_compared_as_such(evaluation):
    """Counted again from captions without spaces."""
    references = {x: ["一只狗在跑", "狗跑"] for x in IMAGES}
    made = {
        x: "一只狗在跑" if n % 2 else "一只猫" for n, x in enumerate(IMAGES)
    }
    one, other = (
        evaluation(name, made, 4, references, "characters")
        for name in ("one", "other")
    )
    found = compare.compare(*compare.pair(one, other))
    titles = {each.title: each for each in found}
    score = one.metrics["bleu4"]
    assert titles["character BLEU-4"].first == f"{score:.1%}" != "0.0%"
    assert titles["character BLEU-4"].interval == "+0.0 to +0.0"
    assert titles["length"].first == "4.0" and "METEOR" not in titles
    part = dict(list(made.items())[:30])
    part = evaluation("part", part, 4, references, "characters")
    found = compare.compare(*compare.pair(one, part))
    assert {x.first for x in found if x.title == "length"} == {"4.0"}
    assert "  character BLEU-4 " in compare.as_text(one, part, found)


def test_a_part_of_the_images_is_compared_on_what_is_shared(evaluation):
    whole = evaluation("whole", captions(0.5), 4)
    part = dict(list(captions(0.5).items())[:20])
    first, second = compare.pair(whole, evaluation("part", part, 4))
    assert [*first.examples.index] == [*second.examples.index] == [*part]
    found = by_title(first, second)
    for metric in ("BLEU-4", "CIDEr"):
        assert found[metric].first == found[metric].second
    assert not {"distinct", "vocabulary"} & found.keys()  # of all images
    assert isinstance(first.examples, pd.DataFrame)


def test_a_caption_that_reads_like_nothing_is_one(evaluation):
    made = {**captions(0.5), "1.jpg": "None", "2.jpg": "nan", "3.jpg": ""}
    found = evaluation("odd", made, 4).examples["caption"]
    assert found.to_dict() == made


def test_captions_are_counted_as_they_were_or_not_at_all(evaluation):
    """Whatever the reason was for another tokeniser."""
    made = {
        name: evaluation(name, captions(share), 4)
        for name, share in (("one", 0.5), ("two", 0.7))
    }
    made["one"].metrics["tokenizer"] = "nltk Treebank (Java was stopped)"
    assert compare.pair(*made.values())
    for each in made.values():
        each.metrics["tokenizer"] = "PTB (Stanford CoreNLP 3.4.1, Java)"
    told = refusal(compare.pair, *made.values())
    assert "or compare them with Java" in told
