"""The scores, and all the ways in which a scorer can lie."""

import gc
import json
import math
import os
import shutil
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nltk.translate.bleu_score import corpus_bleu
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor.meteor import Meteor
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

from captioning.data import vocabulary
from captioning.scoring import java, metrics, results, table
from config import Config, UserError

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
corpora = st.lists(
    st.tuples(
        st.lists(st.sampled_from("abcd"), max_size=9),
        st.lists(
            st.lists(st.sampled_from("abcd"), min_size=1, max_size=9),
            min_size=1,
            max_size=3,
        ),
    ),
    min_size=1,
    max_size=6,
)


@pytest.fixture
def no_java(monkeypatch):
    monkeypatch.setenv("PATH", "")


@pytest.fixture
def fake_java(tmp_path, monkeypatch):
    """Puts a Python script in the place of java."""

    def write(script):
        java = tmp_path / "bin" / "java"
        java.parent.mkdir()
        java.write_text(f"#!{sys.executable}\n{script}\n", encoding="utf-8")
        java.chmod(0o755)
        monkeypatch.setenv("PATH", str(java.parent))

    return write


@pytest.fixture(scope="module")
def with_java():
    """Scores with the real Java: METEOR takes seconds to start.

    In the language of someone who writes "0,5".
    """
    # METEOR's protocol separates by three bars.
    references = {**REFERENCES, "1.jpg": ["A dog ||| runs", "The ||| dog"]}
    with pytest.MonkeyPatch.context() as patch:
        for name in java.OPTIONS:
            patch.setenv(name, "-Duser.language=de -Duser.country=DE")
        return metrics.score({**CAPTIONS, "2.jpg": ""}, references, [])


def strings(corpus):
    """A corpus of hypothesis as two dictionaries of joined words."""
    return (
        {str(n): [" ".join(words)] for n, (words, _) in enumerate(corpus)},
        {
            str(n): [" ".join(words) for words in references]
            for n, (_, references) in enumerate(corpus)
        },
    )


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


@pytest.mark.parametrize("text", ["", " ", "...", "?!", "( )", "***", "-", "…"])
@needs_java
def test_punctuation_is_no_word(text, monkeypatch):
    assert metrics.tokenise({0: [text]})[0] == {0: [""]}
    monkeypatch.setenv("PATH", "")
    assert metrics.tokenise({0: [text]})[0] == {0: [""]}


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


@pytest.mark.parametrize("java", [True, False])
def test_a_perfect_caption_scores_full_marks_in_any_language(java, monkeypatch):
    if not java:
        monkeypatch.setenv("PATH", "")
    # The decoder writes the words of its vocabulary.
    made = [" ".join(vocabulary.tokenise(text)) for text in PERFECT]
    tokens, _ = metrics.tokenise({"made": made, "written": PERFECT})
    assert tokens["made"] == tokens["written"]
    assert not set("।،؟。、\u0589«»¿¡…()#$%&") & {*"".join(tokens["written"])}


@needs_scripts
@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("raise SystemExit(1)", "failed, code 1"),
        (
            "raise SystemExit('Picked up x\\n  OutOfMemoryError: heap')",
            "failed, code 1: OutOfMemoryError: heap",
        ),
        ("print('garbage')", "wrong answer"),
        ("import sys; [print('x') for _ in sys.stdin]", "wrong answer"),
        ("import sys; print(sys.stdin.readline())", "wrong answer"),
        ("import os; os.write(1, b'\\xff\\xfe')", "wrong answer"),
        ("import os; os.abort()", "failed, code"),
        ("import time; time.sleep(600)", "was stopped after"),
    ],
)
def test_a_tokenizer_that_dies_is_replaced_for_all_captions(
    fake_java, monkeypatch, script, reason
):
    monkeypatch.setattr(java, "PTB_SECONDS", 1)
    fake_java(script)
    tokens, name = metrics.tokenise({"x": ["A dog."], "y": ["Two dogs."]})
    assert tokens == {"x": ["a dog"], "y": ["two dogs"]}
    assert name.startswith("nltk Treebank (Java")
    assert reason in name and "\n" not in name


@needs_scripts
@pytest.mark.parametrize(
    "answer", ["known, 'a dog', ''", "known, known", "known, '', '', known"]
)
def test_a_tokenizer_that_loses_or_adds_lines_is_noticed(fake_java, answer):
    fake_java(
        'known = "two dogs one brown are n\'t asleep"\n'
        f"print({answer}, sep=chr(10))"
    )
    tokens, name = metrics.tokenise({"x": ["A dog."]})
    assert tokens == {"x": ["a dog"]} and "wrong answer" in name


# --- scores ----------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(corpora)
def test_the_scores_are_those_of_pycocoevalcap_on_the_same_tokens(corpus):
    made, judged = strings(corpus)
    found, per_image = metrics._overlap(made, judged)
    bleu, bleu_per_image = Bleu(4).compute_score(judged, made, verbose=0)
    rouge_l, rouge_l_per_image = Rouge().compute_score(judged, made)
    cider, cider_per_image = Cider().compute_score(judged, made)
    expected = [*bleu, rouge_l, cider]
    np.testing.assert_allclose([found[x] for x in FREE], expected, atol=1e-12)
    np.testing.assert_allclose(per_image["bleu4"], bleu_per_image[3])
    np.testing.assert_allclose(per_image["rouge_l"], rouge_l_per_image)
    np.testing.assert_allclose(per_image["cider"], cider_per_image)
    light = metrics.cider({x: made[x][0] for x in made}, judged)
    assert light == pytest.approx(cider, abs=1e-12)


@settings(max_examples=100, deadline=None)
@given(corpora)
def test_bleu_agrees_with_nltk_where_every_order_has_a_match(corpus):
    # A sentence in common gives every order a match. Of a caption with fewer
    # than n words nltk counts one n-gram that is not there.
    corpus = [(words + list("xyz"), texts) for words, texts in corpus if words]
    corpus.append((list("abcda"), [list("abcda")]))
    found, _ = metrics._overlap(*strings(corpus))
    references = [references for _, references in corpus]
    for n in (1, 2, 3, 4):
        theirs = corpus_bleu(
            references, [words for words, _ in corpus], weights=[1 / n] * n
        )
        assert found[f"bleu{n}"] == pytest.approx(theirs, abs=1e-9)


def test_the_interval_of_a_share_resamples_images_and_not_tokens():
    """Images that are wholly right or wholly wrong make it wide."""
    hits = np.repeat([10.0, 0.0], 50)
    counts = np.column_stack([hits, np.full(100, 10.0)])
    low, high = metrics.interval(counts, metrics.ratio)
    assert low == pytest.approx(0.4, abs=0.02)
    assert high == pytest.approx(0.6, abs=0.02)


@settings(max_examples=100, deadline=None)
@given(corpora)
def test_the_bootstrap_resamples_the_bleu_of_pycocoevalcap(corpus):
    made, judged = strings(corpus)
    scorer = metrics.BleuScorer(n=4)
    for image in judged:
        scorer += (made[image][0], judged[image])
    mine = metrics._corpus_bleu4(metrics._bleu_counts(scorer).sum(axis=0))
    assert mine == pytest.approx(
        scorer.compute_score(option="closest")[0][3], abs=1e-9
    )


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


def test_the_intervals_contain_the_scores_and_repeat(no_java, many):
    found = metrics.score(*many).metrics
    for name in ("bleu4", "cider"):
        low, high = found["intervals"][name]
        assert low < found[name] < high
    assert metrics.score(*many).metrics == found


def test_the_interval_of_cider_is_that_of_a_mean():
    values = np.random.default_rng(0).normal(1.0, 0.5, 2000)
    counts = np.column_stack([values, np.ones(2000)])
    low, high = metrics.interval(counts, metrics.ratio)
    half = 1.96 * values.std() / math.sqrt(2000)
    assert low == pytest.approx(values.mean() - half, abs=0.003)
    assert high == pytest.approx(values.mean() + half, abs=0.003)


@pytest.mark.parametrize(
    "empty", ["missing", None, "", "  ", "...", "!?", "\n"]
)
def test_an_image_without_a_caption_scores_zero_and_counts(no_java, empty):
    captions = {**CAPTIONS, "2.jpg": empty}
    if empty == "missing":
        del captions["2.jpg"]
    whole = metrics.score(CAPTIONS, REFERENCES)
    scores = metrics.score(captions, REFERENCES, [])
    assert list(scores.per_image.index) == list(REFERENCES)
    assert (scores.per_image.loc["2.jpg"] == 0).all()
    assert all(scores.metrics[x] < whole.metrics[x] for x in FREE)
    mean = scores.per_image[["rouge_l", "cider"]].mean()
    assert scores.metrics["rouge_l"] == pytest.approx(mean["rouge_l"])
    assert scores.metrics["cider"] == pytest.approx(mean["cider"])
    assert scores.metrics["images"] == 3
    assert scores.metrics["novel_captions"] == pytest.approx(2 / 3)
    assert scores.metrics["distinct_captions"] == pytest.approx(2 / 3)
    [notice] = scores.notices
    assert "1 of 3 images" in notice and "2.jpg" in notice


def test_no_caption_at_all_scores_zero(no_java):
    found = metrics.score({}, REFERENCES, []).metrics
    assert [found[x] for x in FREE] == [0] * 6
    assert found["intervals"] == {"bleu4": [0, 0], "cider": [0, 0]}
    assert found["mean_length"] == found["distinct_captions"] == 0
    assert found["novel_captions"] == 0


def test_a_reference_of_punctuation_changes_nothing(no_java):
    references = {**REFERENCES, "1.jpg": [*REFERENCES["1.jpg"], "...", ""]}
    captions = {**CAPTIONS, "1.jpg": "..."}
    dotted = metrics.score(captions, references)
    plain = metrics.score(captions, REFERENCES)
    assert dotted.metrics == plain.metrics
    assert dotted.per_image.loc["1.jpg", "rouge_l"] == 0


def test_an_image_with_no_worded_reference_is_left_out_and_told(no_java):
    references = {**REFERENCES, "4.jpg": ["...", " "], "5.jpg": []}
    captions = {**CAPTIONS, "4.jpg": "...", "5.jpg": "a dog"}
    scores = metrics.score(captions, references)
    expected = metrics.score(CAPTIONS, REFERENCES)
    assert scores.metrics == expected.metrics
    assert scores.metrics["images"] == 3
    [notice] = scores.notices
    assert notice.startswith("2 images") and "4.jpg" in notice


def test_no_reference_with_a_word_is_one_line(no_java):
    with pytest.raises(UserError, match="no image has a reference"):
        metrics.score({"1.jpg": "a dog"}, {"1.jpg": ["?"]})
    with pytest.raises(UserError, match="no image has a reference"):
        metrics.cider({}, {})


def test_a_caption_of_an_unknown_image_is_one_line(no_java):
    captions = {**CAPTIONS, "other.jpg": "a dog"}
    with pytest.raises(UserError, match=r"^1 .*other\.jpg.*--split") as error:
        metrics.score(captions, REFERENCES)
    assert "\n" not in str(error.value)


def test_a_single_image_has_scores_and_a_cider_of_zero(no_java):
    scores = metrics.score({"1.jpg": "A dog runs."}, {"1.jpg": ["a dog runs"]})
    found = scores.metrics
    assert found["bleu1"] == pytest.approx(1) and found["rouge_l"] == 1
    assert found["cider"] == 0 and "single image" in scores.notices[0]
    np.testing.assert_allclose(found["intervals"]["bleu4"], found["bleu4"])


def test_the_diversity_of_captions(no_java):
    captions = {**CAPTIONS, "1.jpg": "Two men play.", "2.jpg": "two men play"}
    found = metrics.score(captions, REFERENCES, ["TWO men play!", "x"]).metrics
    assert found["distinct_captions"] == pytest.approx(2 / 3)
    assert found["novel_captions"] == pytest.approx(1 / 3)
    assert found["vocabulary_used"] == 3 + 7
    assert found["mean_length"] == pytest.approx((3 + 3 + 7) / 3)


def test_novelty_is_unavailable_without_training_captions(no_java):
    found = metrics.score(CAPTIONS, REFERENCES).metrics
    assert found["novel_captions"] is None
    assert "not at hand" in found["unavailable"]["novel_captions"]


def test_nothing_is_printed_and_json_takes_it(no_java, capfd):
    found = metrics.score(CAPTIONS, REFERENCES, []).metrics
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert capfd.readouterr() == ("", "")


# --- METEOR and SPICE ------------------------------------------------------


def test_without_java_meteor_and_spice_are_null_with_the_reason(no_java):
    found = metrics.score(CAPTIONS, REFERENCES, []).metrics
    assert found["meteor"] is None and found["spice"] is None
    assert found["unavailable"] == {"meteor": "no Java", "spice": "no Java"}


@needs_java
def test_meteor_is_that_of_pycocoevalcap(with_java, monkeypatch):
    judged, _ = metrics.tokenise(
        {**REFERENCES, "1.jpg": ["A dog runs", "The dog"]}
    )
    made = {image: [text] for image, text in CAPTIONS.items()}
    meteor = Meteor()
    expected, _ = meteor.compute_score(judged, {**made, "2.jpg": [""]})
    assert with_java.metrics["meteor"] == pytest.approx(expected, abs=1e-9)
    assert 0 < expected < meteor.compute_score(judged, made)[0] < 1
    assert with_java.metrics["tokenizer"] == metrics.PTB
    # The process that is running saves the seconds that another would take.
    monkeypatch.setattr(java, "Meteor", lambda: meteor)
    assert java.meteor({"1.jpg": [""]}, {"1.jpg": ["a dog"]}) == 0


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
    for name in ("PTB_SECONDS", "METEOR_SECONDS", "SPICE_SECONDS"):
        monkeypatch.setattr(java, name, 1)
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
def test_spice_never_downloads_and_says_what_it_needs(
    fake_java, monkeypatch, tmp_path
):
    monkeypatch.setattr(java, "_PACKAGE", tmp_path)
    fake_java("raise SystemExit(1)")
    with pytest.raises(ChildProcessError, match=r"CoreNLP 3\.6\.0"):
        java.spice({"1.jpg": ["a"]}, {"1.jpg": ["a"]})


@needs_scripts
@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("[{'image_id': n, 'scores': {'All': {'f': 0.5}}} for n in (0, 2)]", 1),
        ("[{'image_id': 0, 'scores': {'All': {'f': 0.5}}}]", None),
        ("[{'scores': {'All': {'f': None}}}] * 2", None),
        ("'nonsense'", None),
    ],
)
def test_spice_counts_an_empty_caption_as_zero_and_checks_its_answer(
    fake_java, monkeypatch, tmp_path, answer, expected
):
    monkeypatch.setattr(java, "_PACKAGE", tmp_path)
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
    if expected is None:
        with pytest.raises(ChildProcessError, match="could not be read"):
            java.spice(made, judged)
    else:
        assert java.spice(made, judged) == pytest.approx(1 / 3)


# --- the table -------------------------------------------------------------


@pytest.fixture
def full(no_java, many):
    """Everything that metrics.json has."""
    return metrics.score(*many, []).metrics | {
        "split": "test",
        "images": 1000,
        "beam_size": 5,
        "token_accuracy": 0.4123,
        "token_accuracy_top5": 0.68,
        "perplexity": 14.2,
        "images_per_second": 120.5,
    }


def test_the_table_fits_and_names_value_interval_and_reason(full):
    full["bleu4"], full["intervals"]["bleu4"] = 0.213, [0.201, 0.224]
    full["cider"], full["intervals"]["cider"] = 0.512, [0.47, 0.55]
    full["unavailable"]["spice"] = "a long reason " * 20
    text = table.table(full, "flickr8k")
    assert max(len(line) for line in text.split("\n")) <= 100
    assert text.index("token accuracy") < text.index("BLEU-1")
    assert "41.2%" in text and "21.3%  20.1 to 22.4" in text
    assert "0.512  0.470 to 0.550" in text
    assert "not computed: no Java" in text and "nltk Treebank" in text


def test_the_table_compares_with_rows_of_the_same_data_alone(full):
    text = table.table(full, "Flickr_8k")
    assert "Adaptive attention, VGG, beam 3" in text and "Lu 2017" not in text
    assert "Lu 2017" in table.table(full, "flickr30k-hf")
    assert "Xu 2015" not in table.table(full, "sample")
    assert "Xu 2015" not in table.table({**full, "split": "val"}, "flickr8k")


def test_the_table_claims_no_comparison_with_other_images_or_words(full):
    full["tokenizer"] = metrics.PTB
    usual = table.table(full, "flickr8k")
    assert "orientation" not in usual and "not quite" not in usual
    few = table.table({**full, "images": 50}, "flickr8k")
    assert "orientation" in few
    other = table.table({**full, "tokenizer": "nltk Treebank"}, "flickr8k")
    assert "not quite" in " ".join(other.split())


def test_the_table_stands_without_what_needs_the_model(no_java):
    found = metrics.score(CAPTIONS, REFERENCES).metrics
    text = table.table({**found, "split": "test"}, "flickr30k")
    assert "not computed: not measured" in text


@pytest.mark.parametrize("beam, told", [(1, False), (5, True)])
def test_a_single_hypothesis_is_no_consensus(no_java, beam, told):
    scores = metrics.score(CAPTIONS, REFERENCES)
    config = Config(beam_size=beam)
    found = results.all_metrics(config, {}, {"perplexity": 14.2}, scores)
    assert ("by consensus" in table.table(found, "flickr8k")) == told


@pytest.mark.parametrize(
    ("seen", "told"),
    [(0, ""), (7, "trained on 7 of these 1,000 images"), (None, "may be")],
)
def test_the_table_says_what_the_run_was_trained_on(full, seen, told):
    full["run"] = {"run": "mine", "images_trained_on": seen}
    for dataset in ("flickr8k", "holidays"):
        text = " ".join(table.table(full, dataset).split())
        assert told in text
        assert ("trained on" in text) == (seen != 0)
