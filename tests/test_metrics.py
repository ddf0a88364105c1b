"""The scores, and all the ways in which a scorer can lie."""

import gc
import json
import math
import os
import shutil
import sys

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor.meteor import Meteor
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

from captioning.data import vocabulary
from captioning.scoring import java, metrics, results, table
from config import Config
from tests.helpers import refusal

FREE = ["bleu1", "bleu2", "bleu3", "bleu4", "rouge_l", "cider"]
REFERENCES = {
    "1.jpg": [
        "A brown dog runs across the green grass.",
        "The dog is running on grass , fast !",
    ],
    "2.jpg": ["Two men in red shirts play football on a field."],
    "3.jpg": [
        "A woman's hat is blown off by the wind.",
        "A woman holds on to her hat.",
        "The wind blows.",
    ],
}
CAPTIONS = {
    "1.jpg": "a brown dog runs on the green grass",
    "2.jpg": "two men in red shirts play a game",
    "3.jpg": "a woman holds on to the dog",
}

needs_java = pytest.mark.skipif(
    shutil.which("java") is None, reason="there is no Java here"
)
needs_scripts = pytest.mark.skipif(
    os.name == "nt", reason="a stand-in for java cannot be a script here"
)


@pytest.fixture
def fake_java(tmp_path, monkeypatch):
    """Puts a Python script in the place of java, with a second to run."""

    def write(script):
        place = tmp_path / "bin" / "java"
        place.parent.mkdir()
        place.write_text(f"#!{sys.executable}\n{script}\n", encoding="utf-8")
        place.chmod(0o755)
        monkeypatch.setenv("PATH", str(place.parent))
        for name in ("PTB_SECONDS", "METEOR_SECONDS", "SPICE_SECONDS"):
            monkeypatch.setattr(java, name, 1)

    return write


# --- tokens ----------------------------------------------------------------


def test_without_java_nltk_tokenises_and_says_so(no_java):
    tokens, name = metrics.tokenise({"x": ["A dog, RUNNING!", "It's"], "y": []})
    assert tokens == {"x": ["a dog running", "it 's"], "y": []}
    assert name == "nltk Treebank (no Java)"


@needs_java
def test_the_ptb_tokenizer_is_that_of_pycocoevalcap(capfd):
    texts = [text for group in REFERENCES.values() for text in group]
    texts += ['Über 2 cafés; "x" - y', "last ... one"]
    [theirs] = (
        PTBTokenizer().tokenize({0: [{"caption": x} for x in texts]}).values()
    )
    capfd.readouterr()
    assert metrics.tokenise({0: texts}) == ({0: theirs}, metrics.PTB)
    assert capfd.readouterr() == ("", "")


@needs_java
def test_no_character_shifts_captions_to_their_neighbours():
    odd = [f"a{chr(code)}b" for code in range(0x3000)]
    odd += ["", "\n", "...", "\ud800", "*NL*", "a\r\nb", "\U0001f600", "<br/>"]
    tokens, name = metrics.tokenise({n: [x, "mark"] for n, x in enumerate(odd)})
    assert name == metrics.PTB
    assert all(pair[1] == "mark" for pair in tokens.values())


PERFECT = [
    "A goat (left) & 50% of Mr. Fox's 'dog' at 5 o'clock, it's #1 for $5!",
    "Eine Ziege wartet am Hügel; sie schläft.",
    "¿una cabra en la colina? ¡dos hombres empujan!",
    "« l\u2019homme » pousse la charrette bleue…",
    "एक बकरी पहाड़ी पर खड़ी है।",
    "كلب يجري في الحقل، وقطة؟",
    "一只 山羊 站 在 山坡 上 。",
    "一位老人\uff0c在 桥上 唱歌 、 看书。",
    "山羊 が 丘 に 立って いる 。",
    "Այծը սպասում է բլրի վրա\u0589",
]
NO_WORDS = ["", " ", "...", "?!", "( )", "***", "-", "…"]


@pytest.mark.parametrize("java", [pytest.param(True, marks=needs_java), False])
def test_a_perfect_caption_scores_full_marks_in_any_language(java, monkeypatch):
    """And punctuation is no word of it."""
    if not java:
        monkeypatch.setenv("PATH", "")
    # The decoder writes the words of its vocabulary.
    made = [" ".join(vocabulary.tokenise(text)) for text in PERFECT]
    tokens, _ = metrics.tokenise(
        {"made": made, "written": PERFECT, "nothing": NO_WORDS}
    )
    assert tokens["made"] == tokens["written"]
    assert not set("।،؟。、\u0589«»¿¡…()#$%&") & {*"".join(tokens["written"])}
    assert tokens["nothing"] == [""] * len(NO_WORDS)


@needs_scripts
@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("raise SystemExit(1)", "failed, code 1"),
        (
            "raise SystemExit('Picked up x\\n  OutOfMemoryError: heap')",
            "failed, code 1: OutOfMemoryError: heap",
        ),
        ("import sys; [print('x') for _ in sys.stdin]", "wrong answer"),
        ("import sys; print(sys.stdin.readline())", "wrong answer"),
        ("import os; os.write(1, b'\\xff\\xfe')", "wrong answer"),
        ("print('KNOWN\\nKNOWN')", "wrong answer"),  # a line is lost
        ("print('KNOWN\\n\\n\\n\\nKNOWN')", "wrong answer"),  # or added
        ("import os; os.abort()", "failed, code"),
        ("import time; time.sleep(600)", "was stopped after"),
    ],
)
def test_a_tokenizer_that_fails_is_replaced_for_all_captions(
    fake_java, script, reason
):
    known = "two dogs one brown are n\\'t asleep"
    fake_java(script.replace("KNOWN", known))
    tokens, name = metrics.tokenise({"x": ["A dog."], "y": ["Two dogs."]})
    assert tokens == {"x": ["a dog"], "y": ["two dogs"]}
    assert name.startswith("nltk Treebank (Java")
    assert reason in name and "\n" not in name


# --- scores ----------------------------------------------------------------

SENTENCE = st.lists(st.sampled_from("abcd"), min_size=1, max_size=9)
CORPORA = st.lists(
    st.tuples(
        st.lists(st.sampled_from("abcd"), max_size=9),
        st.lists(SENTENCE, min_size=1, max_size=3),
    ),
    min_size=1,
    max_size=6,
)


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(corpus=CORPORA)
def test_the_scores_are_those_of_pycocoevalcap_on_the_same_tokens(
    no_java, corpus
):
    made = {str(n): " ".join(words) for n, (words, _) in enumerate(corpus)}
    judged = {
        str(n): [" ".join(words) for words in references]
        for n, (_, references) in enumerate(corpus)
    }
    theirs = {image: [text] for image, text in made.items()}
    bleu, bleu_per_image = Bleu(4).compute_score(judged, theirs, verbose=0)
    rouge_l, rouge_l_per_image = Rouge().compute_score(judged, theirs)
    cider, cider_per_image = Cider().compute_score(judged, theirs)
    found, per_image, _ = metrics.score(made, judged, [])
    expected = [*bleu, rouge_l, cider]
    np.testing.assert_allclose([found[x] for x in FREE], expected, atol=1e-12)
    np.testing.assert_allclose(per_image["bleu4"], bleu_per_image[3])
    np.testing.assert_allclose(per_image["rouge_l"], rouge_l_per_image)
    np.testing.assert_allclose(per_image["cider"], cider_per_image)
    assert metrics.cider(made, judged) == pytest.approx(cider, abs=1e-12)
    # Resampling images that are all alike gives the score itself.
    if all(each == corpus[0] for each in corpus):
        assert found["intervals"]["bleu4"] == pytest.approx([bleu[3]] * 2)


def test_characters_are_scored_as_such_and_without_a_program(monkeypatch):
    """The same, however their words are separated."""

    def no_program(*_):
        raise AssertionError("Java knows no characters")

    for name in ("ptb", "meteor", "spice"):
        monkeypatch.setattr(java, name, no_program)
    made = {"1": "一只狗在跑", "2": "红色T恤的人"}
    judged = {"1": ["一只 白狗 在跑。", "狗跑"], "2": ["穿红色 T恤 的人\uff01"]}
    theirs = {"1": ["一 只 狗 在 跑"], "2": ["红 色 t 恤 的 人"]}
    spaced = {
        "1": ["一 只 白 狗 在 跑", "狗 跑"],
        "2": ["穿 红 色 t 恤 的 人"],
    }
    found, per_image, _ = metrics.score(
        made, judged, ["一只狗在跑。"], "characters"
    )
    bleu, _ = Bleu(4).compute_score(spaced, theirs, verbose=0)
    rouge_l, _ = Rouge().compute_score(spaced, theirs)
    cider, _ = Cider().compute_score(spaced, theirs)
    expected = [*bleu, rouge_l, cider]
    np.testing.assert_allclose([found[x] for x in FREE], expected, atol=1e-12)
    assert found["tokenizer"] == "characters" and "meteor" not in per_image
    assert found["meteor"] is found["spice"] is None
    assert "not characters" in found["unavailable"]["meteor"]
    assert found["mean_length"] == 5.5 and found["novel_captions"] == 0.5
    counts = metrics.bleu_counts(made.values(), judged.values(), "characters")
    assert metrics.corpus_bleu(4)(counts.sum(0)) == pytest.approx(bleu[3])


def test_the_interval_resamples_images_and_not_tokens():
    """Images that are wholly right or wholly wrong make it wide."""
    hits = np.repeat([10.0, 0.0], 50)
    counts = np.column_stack([hits, np.full(100, 10.0)])
    half = 1.96 * 0.5 / math.sqrt(100)  # the standard error of a share
    ends = metrics.interval(counts, metrics.ratio)
    assert ends == pytest.approx([0.5 - half, 0.5 + half], abs=0.02)


@pytest.fixture
def many():
    """60 images whose captions have their references' words in part."""
    generator = np.random.default_rng(1)
    captions, references = {}, {}
    for n in range(60):
        words = generator.choice([*"abcdefghijkl"], 12)
        references[f"{n}.jpg"] = [" ".join(words)]
        words[generator.integers(12)] = "z"
        captions[f"{n}.jpg"] = " ".join(words)
    return captions, references


def test_the_intervals_contain_the_scores_and_repeat(no_java, many, capfd):
    found = metrics.score(*many, []).metrics
    for name in ("bleu4", "cider"):
        low, high = found["intervals"][name]
        assert low < found[name] < high
    assert metrics.score(*many, []).metrics == found
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("empty", ["missing", None, "  ", "!?", "\n"])
def test_an_image_without_a_caption_scores_zero_and_counts(no_java, empty):
    captions = {**CAPTIONS, "2.jpg": empty}
    if empty == "missing":
        del captions["2.jpg"]
    whole = metrics.score(CAPTIONS, REFERENCES, [])
    found, per_image, notices = metrics.score(captions, REFERENCES, [])
    assert list(per_image.index) == list(REFERENCES)
    assert (per_image.loc["2.jpg"] == 0).all()
    assert all(found[x] < whole.metrics[x] for x in FREE)
    for name in ("rouge_l", "cider"):
        assert found[name] == pytest.approx(per_image[name].mean())
    assert found["images"] == 3
    assert found["novel_captions"] == pytest.approx(2 / 3)
    assert found["distinct_captions"] == pytest.approx(2 / 3)
    assert "1 of 3 images" in notices[-1] and "2.jpg" in notices[-1]


def test_novelty_needs_the_captions_of_the_training(no_java):
    found, per_image, _ = metrics.score(CAPTIONS, REFERENCES, None)
    assert found["novel_captions"] is None and "novel" not in per_image
    assert "dataset" in found["unavailable"]["novel_captions"]


def test_no_caption_at_all_scores_zero(no_java):
    found = metrics.score({}, REFERENCES, []).metrics
    assert [found[x] for x in FREE] == [0] * 6
    assert found["intervals"] == {"bleu4": [0, 0], "cider": [0, 0]}
    assert found["mean_length"] == found["distinct_captions"] == 0
    assert found["novel_captions"] == 0


def test_references_without_a_word_do_not_count(no_java):
    captions = {**CAPTIONS, "1.jpg": "..."}
    plain = metrics.score(captions, REFERENCES, [])
    references = {**REFERENCES, "1.jpg": [*REFERENCES["1.jpg"], "...", ""]}
    references |= {"4.jpg": ["...", " "], "5.jpg": []}
    captions |= {"4.jpg": "...", "5.jpg": "a dog"}
    found = metrics.score(captions, references, [])
    assert found.metrics == plain.metrics and found.metrics["images"] == 3
    assert found.per_image.loc["1.jpg", "rouge_l"] == 0
    assert "small sample" in found.notices[0]
    assert found.notices[-1].startswith("2 images")
    assert "4.jpg" in found.notices[-1]


def test_what_cannot_be_scored_is_told_in_one_line(no_java):
    captions, references = {"1.jpg": "a dog"}, {"1.jpg": ["?"]}
    told = refusal(metrics.score, captions, references, [])
    assert "no image has a reference" in told


def test_a_single_image_has_scores_and_a_cider_of_zero(no_java):
    captions, references = {"1.jpg": "A dog runs."}, {"1.jpg": ["a dog runs"]}
    scores = metrics.score(captions, references, [])
    found = scores.metrics
    assert found["bleu1"] == pytest.approx(1) and found["rouge_l"] == 1
    assert found["cider"] == 0 and "single image" in scores.notices[0]


def test_the_diversity_of_captions(no_java):
    captions = {**CAPTIONS, "1.jpg": "Two men play.", "2.jpg": "two men play"}
    found = metrics.score(captions, REFERENCES, ["TWO men play!", "x"]).metrics
    assert found["distinct_captions"] == pytest.approx(2 / 3)
    assert found["novel_captions"] == pytest.approx(1 / 3)
    assert found["vocabulary_used"] == 3 + 7
    assert found["mean_length"] == pytest.approx((3 + 3 + 7) / 3)


# --- METEOR and SPICE ------------------------------------------------------


@needs_java
def test_meteor_is_that_of_pycocoevalcap(monkeypatch):
    """In the language of someone who writes "0,5", too."""
    captions = {**CAPTIONS, "2.jpg": ""}
    # METEOR's protocol separates by three bars.
    references = {**REFERENCES, "1.jpg": ["A dog ||| runs", "The ||| dog"]}
    meteor = Meteor()  # whose process starts beside the project's
    with monkeypatch.context() as patch:
        for name in java.OPTIONS:
            patch.setenv(name, "-Duser.language=de -Duser.country=DE")
        found = metrics.score(captions, references, []).metrics
    judged, _ = metrics.tokenise(
        {**REFERENCES, "1.jpg": ["A dog runs", "The dog"]}
    )
    made = {image: [text] for image, text in CAPTIONS.items()}
    expected, _ = meteor.compute_score(judged, {**made, "2.jpg": [""]})
    assert found["meteor"] == pytest.approx(expected, abs=1e-9)
    assert 0 < expected < meteor.compute_score(judged, made)[0] < 1
    assert found["tokenizer"] == metrics.PTB
    # The process that is running saves the seconds that another would take.
    monkeypatch.setattr(java, "Meteor", lambda: meteor)
    assert java.meteor({"1.jpg": [""]}, {"1.jpg": ["a dog"]}) == (0, [0])


@needs_scripts
@pytest.mark.parametrize(
    "script",
    [
        "raise SystemExit(1)",
        "import sys; sys.stdin.readline(); print('garbage')",
        "import sys; [print('garbage', flush=True) for _ in sys.stdin]",
        "import sys; [print('NaN\\n' * 9, flush=True) for _ in sys.stdin]",
        "import time; time.sleep(600)",
    ],
)
def test_a_java_that_dies_costs_meteor_and_no_other_score(
    fake_java, monkeypatch, no_java, script
):
    without = metrics.score(CAPTIONS, REFERENCES, []).metrics
    fake_java(script)
    # Where errors go that come up when METEOR's process is put away.
    late = []
    monkeypatch.setattr(sys, "unraisablehook", late.append)
    found = metrics.score(CAPTIONS, REFERENCES, []).metrics
    gc.collect()
    assert late == []
    assert found["meteor"] is None
    assert "METEOR's process died" in found["unavailable"]["meteor"]
    assert found["tokenizer"].startswith("nltk")
    assert {x: found[x] for x in FREE} == {x: without[x] for x in FREE}


@needs_scripts
@pytest.mark.parametrize(
    ("answer", "told"),
    [
        ("[{'scores': {'All': {'f': 0.5}}} for _ in 'ac']", ""),
        ("[{'scores': {'All': {'f': 0.5}}}]", "could not be read"),
        ("[{'scores': {'All': {'f': None}}}] * 2", "could not be read"),
        ("'nonsense'", "could not be read"),
        (None, r"needs Stanford CoreNLP 3\.6\.0"),  # and downloads nothing
    ],
)
def test_spice_counts_an_empty_caption_as_zero_and_checks_its_answer(
    fake_java, monkeypatch, tmp_path, answer, told
):
    monkeypatch.setattr(java, "_PACKAGE", tmp_path)
    if answer:
        library = tmp_path / "spice" / "lib"
        library.mkdir(parents=True)
        (library / "stanford-corenlp-3.6.0.jar").touch()
        (library / "stanford-corenlp-3.6.0-models.jar").touch()
    fake_java(
        "import json, sys\n"
        "items = json.load(open(sys.argv[4]))\n"
        "assert [x['test'] for x in items] == ['a', 'c']\n"
        f"json.dump({answer}, open(sys.argv[6], 'w'))"
    )
    made = {"1": ["a"], "2": [""], "3": ["c"]}
    judged = {"1": ["a"], "2": ["b"], "3": ["c"]}
    if told:
        with pytest.raises(ChildProcessError, match=told):
            java.spice(made, judged)
    else:
        value, values = java.spice(made, judged)
        assert value == pytest.approx(1 / 3)
        assert values[1] == 0 and sum(values) == pytest.approx(1)


# --- the table -------------------------------------------------------------


@pytest.fixture
def full(no_java, many):
    """Everything that metrics.json has."""
    return metrics.score(*many, []).metrics | {
        "run": {"run": "x", "images_trained_on": 0},
        "split": "test",
        "images": 1000,
        "beam_size": 5,
        "consensus_temperature": None,
        "consensus_samples": None,
        "tokenizer": metrics.PTB,
        "token_accuracy": 0.4123,
        "token_accuracy_top5": 0.68,
        "perplexity": 14.2,
    }


def test_the_table_fits_and_names_value_interval_and_reason(full):
    assert full["meteor"] is full["spice"] is None
    assert full["unavailable"] == {"meteor": "no Java", "spice": "no Java"}
    full["bleu4"], full["intervals"]["bleu4"] = 0.213, [0.201, 0.224]
    full["cider"], full["intervals"]["cider"] = 10.0, [10.0, 10.0]
    full["unavailable"]["spice"] = "a long reason " * 20
    text = table.table(full, "flickr8k")
    assert max(len(line) for line in text.split("\n")) <= 100
    assert text.index("token accuracy") < text.index("BLEU-1")
    assert "41.2%" in text and "21.3%  20.1 to 22.4" in text
    assert "10.000  10.000 to 10.000 runs of words" in text
    assert "not computed: no Java" in text and metrics.PTB in text
    assert "not computed: not measured" in text  # the speed


@pytest.mark.parametrize(
    ("dataset", "changes", "row"),
    [
        ("Flickr_8k", {}, "Adaptive attention, VGG, beam 3"),
        ("flickr30k-hf", {}, "Adaptive attention, fine-tuned (Lu 2017)"),
        ("sample", {}, ""),
        ("flickr8k", {"split": "val"}, ""),
    ],
)
def test_the_table_compares_with_rows_of_the_same_data_alone(
    full, dataset, changes, row
):
    text = table.table(full | changes, dataset)
    assert row in text and ("Xu 2015" in text) == bool(row)
    assert ("Lu 2017" in text) == (dataset == "flickr30k-hf")


def test_the_table_calls_scores_of_characters_by_their_name(full):
    """No published row counts them, not even of a dataset of this name."""
    text = table.table(full | {"tokenizer": "characters"}, "flickr8k-cn")
    for name in ("BLEU-1", "BLEU-4", "ROUGE-L", "CIDEr"):
        assert f"  character {name}" in text
    assert "... and runs of four characters" in text and "words" not in text
    assert "Xu 2015" not in text and "scores are by character" in text
    assert max(len(line) for line in text.split("\n")) <= 100
    assert "character" not in table.table(full, "flickr8k")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, ""),
        ({"images": 50}, "only a rough guide"),
        ({"tokenizer": "nltk Treebank"}, "not strictly comparable"),
        (
            {"run": {"run": "x", "images_trained_on": 7}},
            "x was trained on 7 of these 1,000 images",
        ),
        (
            {"run": {"run": "x", "images_trained_on": None}},
            "x does not record its training images",
        ),
    ],
)
def test_the_table_says_what_makes_scores_incomparable(full, changes, told):
    text = " ".join(table.table(full | changes, "flickr8k").split())
    assert told in text
    for each in ("rough guide", "not strictly", "trained on"):
        assert (each in text) == (each in told)


@pytest.mark.parametrize(
    "decoding, told",
    [
        ({"beam_size": 1}, "beam size 1;"),
        ({"beam_size": 5, "consensus_temperature": 0}, "beam size 5;"),
        ({"beam_size": 5, "consensus_samples": 0}, "5 by consensus;"),
        ({"beam_size": 5}, "5 by consensus with 100 samples;"),
    ],
)
def test_the_heading_says_how_captions_were_found(no_java, decoding, told):
    """A single hypothesis has none to agree with."""
    scores = metrics.score(CAPTIONS, REFERENCES, [])
    run = {"run": "x", "images_trained_on": 0}
    found = results.all_metrics(
        Config(**decoding), run, {"perplexity": 14.2}, scores
    )
    assert told in table.table(found, "flickr8k")
