"""The report and its figures, as files and in a browser."""

import base64
import io
import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from captioning.data.vocabulary import tokenise
from captioning.scoring import errors, figures, results, table
from config import Config
from tests.browser import chromium, find, phone, point_at, press, wait

SIDE = 7
TRAP = 'a <script>alert("x")</script> & <b>dog</b> runs </script>'
METRICS = {
    "run": {"run": "x", "epoch": 1, "images_trained_on": 0},
    "split": "test",
    "images": 60,
    "beam_size": 5,
    "consensus_temperature": 5.0,
    "consensus_samples": 100,
    "tokenizer": "PTB",
    "token_accuracy": 0.4312,
    "token_accuracy_top5": 0.7,
    "perplexity": 14.2,
    **{f"bleu{n}": 0.7 / n for n in (1, 2, 3, 4)},
    "meteor": None,
    "rouge_l": 0.46,
    "cider": 0.5812,
    "spice": None,
    "distinct_captions": 0.8,
    "novel_captions": 0.7,
    "vocabulary_used": 1812,
    "mean_length": 9.7,
    "images_per_second": 131.2,
    "intervals": {"bleu4": [0.161, 0.189], "cider": [0.55, 0.613]},
    "unavailable": {"meteor": "no Java", "spice": "needs <models>"},
}


def history(epochs: int) -> pd.DataFrame:
    """As in history.csv: CIDEr is measured every other epoch."""
    epoch = np.arange(1, epochs + 1)
    rising = 1 - np.exp(-epoch / 3)
    table = {"epoch": epoch, "val_cider": np.where(epoch % 2, np.nan, rising)}
    for name in ("loss", "token_accuracy", "val_loss", "val_token_accuracy"):
        table[name] = rising
    return pd.DataFrame(table)


def photograph(seed: int, width: int = 320, height: int = 240) -> Image.Image:
    """Blurred noise: it compresses about as well as a photograph."""
    noise = np.random.default_rng(seed).integers(0, 256, (60, 80, 3), np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.BICUBIC)


def attend(words: int, side: int = SIDE) -> np.ndarray:
    """Word number n looks at region number n: (words, regions)."""
    attention = np.full((words, side * side), 0.01)
    attention[range(words), range(words)] = 0.5
    return attention


def examples_in(folder, captions, references=("a man walks .", "people")):
    """Photographs 000.jpg, ... and a table with falling CIDEr."""
    for number in range(len(captions)):
        photograph(number).save(folder / f"{number:03}.jpg", quality=90)
    return pd.DataFrame(
        {
            "image": [f"{n:03}.jpg" for n in range(len(captions))],
            "caption": captions,
            "references": [list(references)] * len(captions),
            "bleu4": 0.25,
            "rouge_l": 0.5,
            "cider": np.linspace(3, 0, len(captions)),
        }
    )


def write(
    folder,
    examples,
    title="run on test",
    dataset="flickr8k",
    metrics=METRICS,
    side=SIDE,
    epochs=None,
    tokeniser="words",
):
    """Writes report.html; returns its path."""
    history = folder / "history.csv"
    if epochs is not None:
        epochs.to_csv(history, index=False)
    captioned = {}
    for row in examples.itertuples():
        words = tokenise(row.caption, tokeniser)
        if tokeniser == "words":
            words = row.caption.split()
        n_best = [
            SimpleNamespace(caption=f"{row.caption} {n}") for n in range(9)
        ]
        captioned[row.image] = SimpleNamespace(
            n_best=n_best,
            words=words,
            attention=attend(len(words), side),
            probabilities=np.linspace(0.9, 0.5, len(words)),
        )
    config = Config(dataset=dataset, tokeniser=tokeniser)
    place = folder / "out"
    results.write_report(
        place, title, config, metrics, examples, captioned, folder, history
    )
    return place / "report.html"


class Page(HTMLParser):
    """What an HTML parser makes of the page."""

    def __init__(self, path) -> None:
        super().__init__()
        self.tags, self.addresses, self.texts = [], [], []
        self.text = path.read_text(encoding="utf-8")
        self.feed(self.text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        names = ("src", "href", "srcset", "action", "data", "xlink:href")
        self.addresses += [value for name, value in attributes if name in names]

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def data(self):
        return json.loads(*[x for x in self.texts if x.startswith('[{"')])


# --- figures -----------------------------------------------------------------


@pytest.mark.parametrize("epochs", [1, 2, 30])
def test_curves_are_a_png_whatever_the_number_of_epochs(tmp_path, epochs):
    figures.write_curves(tmp_path / "curves.png", history(epochs), 1)
    with Image.open(tmp_path / "curves.png") as image:
        assert (image.format, image.size) == ("PNG", (1650, 450))
        assert len(image.convert("RGB").getcolors(1 << 20)) > 20


def test_curves_mark_the_epoch_that_was_kept(tmp_path):
    """Of equal CIDEr, the one with the lower loss: history does not say."""
    table = history(6)
    table["val_cider"] = [np.nan, 0.0, np.nan, 0.0, np.nan, 0.0]
    metrics = {**METRICS, "run": {**METRICS["run"], "epoch": 4}}
    examples = examples_in(tmp_path, ["a"])
    path = write(tmp_path, examples, metrics=metrics, epochs=table)
    assert Page(path).text.count("best epoch, 4") == 3


def test_values_stand_at_the_points_that_are_drawn():
    """CIDEr is known of every other epoch alone."""
    curve = figures.curve(history(6), 4, figures.PANELS[2])
    assert [each.number for each in curve.epochs] == [2, 4, 6]
    drawn = re.findall(r'<use[^>]* x="([\d.]+)" y="([\d.]+)"', curve.drawing)
    drawn = np.array(drawn, float)
    for number, x, values in curve.epochs:
        ((name, value, y),) = values
        assert name == "validation"
        assert float(value) == pytest.approx(1 - np.exp(-number / 3), abs=1e-4)
        assert np.abs(drawn - (x, y)).max(axis=1).min() < 0.1


@pytest.mark.parametrize("words", [[], ["$x^", "犬", "<unk>"], ["word"] * 20])
def test_an_attention_figure_takes_any_word_and_is_small(
    tmp_path, words, recwarn
):
    photo = np.asarray(photograph(0, 448, 30 if words else 448))
    path = tmp_path / "figure.png"
    figures.write_attention_figure(path, photo, words, attend(len(words)))
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.width > 120 * min(1 + len(words), 6)
    assert path.stat().st_size < 300_000
    assert not recwarn.list


def test_attention_figures_have_plain_names_of_their_own():
    photos = ["1.jpg", "1.png", "a/1.jpg", "a_1.jpg", "b/1.jpg", "A/1.jpg"]
    odd = ["../x.jpg", "/x.jpg", "..", ".x", "\udcff", "犬" * 80]
    names = [figures.figure_name(each) for each in photos + odd]
    assert len({each.lower() for each in names}) == len(names)
    for name in names:
        assert Path(name).name == name and not name.startswith(".")
        assert len(os.fsencode(name)) < 240
    plain = names[: len(photos)]
    assert all(re.fullmatch(r"(a_)?1-[0-9a-f]{8}\.png", x) for x in plain)


def test_light_is_where_the_attention_is(recwarn):
    photo = np.full((70, 140, 3), 128, np.uint8)
    weights = np.zeros((7, 7))
    grey = round(0.6 * 128)
    assert np.unique(figures.lit(photo, weights)).tolist() == [grey]
    weights[1, 5] = 1
    photo[..., 0] = 200
    lit = figures.lit(photo, weights).astype(int)
    row, column = np.unravel_index(lit[..., 0].argmax(), lit.shape[:2])
    assert abs(row - 15) <= 2 and abs(column - 110) <= 3
    assert lit[row, column].tolist() == [200, 128, 128]  # its true colour
    assert np.ptp(lit[60, 10]) <= 1 and lit[60, 10].max() < 100
    # What all regions have shows nothing, wherever a little more is.
    nearly_even = np.full((7, 7), 1 / 49)
    assert np.ptp(figures.lit(photo, nearly_even), axis=2).max() <= 1
    nearly_even[1, 5] *= 1.1
    nearly_even /= nearly_even.sum()
    again = figures.lit(photo, nearly_even).astype(int)
    assert np.abs(again - lit).max() <= 1
    assert not recwarn.list


# --- errors ------------------------------------------------------------------


def test_errors_are_counted_by_word_and_kind():
    captions = ["a red dog runs", "two cats", "a red cat"]
    references = [
        ["A red dog runs.", "The dog is red!"],
        ["Two dogs sit.", "two dogs"],
        ["a red car", "a blue car", "a car"],
    ]
    found = errors.find(
        pd.DataFrame(
            {
                "caption": captions,
                "references": references,
                "cider": [1.0, 0.0, 0.5],
            }
        )
    )
    words = {w.word: w for kind in found.words.values() for w in kind}
    assert words["red"] == errors.Word("red", 2, 1.0, 1, 1.0)
    assert words["dogs"] == errors.Word("dogs", 0, None, 1, 0.0)
    assert [w.word for w in found.words["Colours"]] == ["red"]
    assert [w.word for w in found.words["Numbers"]] == ["two"]
    assert "the" not in words and "a" not in words
    assert found.confusions == []  # each occurs in one image


def test_what_is_often_taken_for_something_else_is_told():
    table = pd.DataFrame({"caption": ["a cat"] * 3 + ["a dog"], "cider": 0.5})
    table["references"] = [["a dog", "the dog"]] * 4
    found = errors.find(table)
    assert found.confusions == [("cat", "dog", 3)]
    assert found.lengths == [(2, 4, 0.5)]


def test_only_words_that_could_replace_each_other_are_confused():
    """A "running" said where "dog" is missed is not one for the other."""
    table = pd.DataFrame({"caption": ["a cat is running"] * 3, "cider": 0.5})
    table["references"] = [["a dog sleeps", "the dog is lazy"]] * 3
    # Nobody writes "a dog is", nor "is dog" or "is sleeps" at an end.
    assert errors.find(table).confusions == []
    table.at[2, "references"] = ["a dog sleeps", "a dog is lazy"]
    assert errors.find(table).confusions == [("cat", "dog", 3)]


# --- the page without a browser ----------------------------------------------


def test_the_page_loads_nothing_from_anywhere(tmp_path):
    examples = examples_in(tmp_path, ["a dog runs"] * 3)
    page = Page(write(tmp_path, examples, epochs=history(6)))
    assert not re.search(r"https?:|//\w+\.|@import|url\((?!#)", page.text)
    assert all(each.startswith(("data:", "#")) for each in page.addresses)


def test_captions_names_and_titles_are_text(tmp_path):
    examples = examples_in(tmp_path, [TRAP], references=[TRAP, "\u2028"])
    plain = Page(write(tmp_path, examples.assign(caption="a"), title="t"))
    page = Page(write(tmp_path, examples, title=TRAP))
    assert page.tags == plain.tags
    assert page.texts.count(TRAP) == 2  # <title> and <h1>
    assert page.data[0]["caption"] == TRAP
    assert page.data[0]["references"] == [TRAP, "\u2028"]


def test_metrics_have_intervals_meanings_and_reasons(tmp_path):
    page = Page(write(tmp_path, examples_in(tmp_path, ["a"])))
    for text in (
        "43.1%",
        "16.1 to 18.9",
        "0.550 to 0.613",
        "1,812",
        "words per caption",
        "Not computed: needs <models>",
    ):
        assert text in page.texts
    assert "matching words, stems and synonyms too" not in page.texts
    assert "svg" not in page.tags  # there is no history


def test_published_rows_stand_beside_the_run(tmp_path):
    examples = examples_in(tmp_path, ["a"])
    known, other = (
        Page(write(tmp_path, examples, dataset=name)).texts
        for name in ("flickr30k", "holidays")
    )
    notes, rows = table.comparison(METRICS, "flickr30k")
    assert notes in known and len(rows) > 4
    for name, *values in rows[1:]:
        shown = [x for x in known[known.index(name) + 1 :] if x.strip()]
        assert shown[:6] == values
        assert name not in other
    nothing = "There are no published rows for the test split of holidays."
    assert nothing in other


def test_characters_are_called_characters(tmp_path):
    """And are what is counted among the errors, and lit one by one."""
    captions = ["一只狗在跑", "一只猫在跑", "一只狗在跑"]
    examples = examples_in(tmp_path, captions, ["一只猫在跑。", "猫跑"])
    metrics = {**METRICS, "tokenizer": "characters"}
    path = write(tmp_path, examples, metrics=metrics, tokeniser="characters")
    page = Page(path)
    assert "character BLEU-4" in page.texts and "Characters" in page.texts
    assert "BLEU-4" not in page.texts and '["character BLEU-4 "' in page.text
    assert '"character ROUGE-L "' in page.text
    assert not [x for x in page.texts if "words" in x and "{" not in x]
    (first, *_), text = page.data, captions[0]
    assert first["caption"] == text and first["words"] == [*text]
    found = errors.find(examples, "characters")
    words = {w.word: w for kind in found.words.values() for w in kind}
    assert words["猫"] == errors.Word("猫", 1, 1.0, 3, 1 / 3)
    assert found.lengths == [(5, 3, 1.5)]


def test_the_same_input_gives_the_same_bytes(tmp_path):
    examples = examples_in(tmp_path, ["a dog", ""])
    pages = [
        write(tmp_path, examples, epochs=history(6)).read_bytes()
        for _ in range(2)
    ]
    assert pages[0] == pages[1]


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_thumbnails_are_upright_or_left_out(tmp_path):
    """In their proportions, whatever is wrong with the file."""
    examples = examples_in(tmp_path, ["a dog"] * 4)
    (tmp_path / "000.jpg").unlink()
    (tmp_path / "001.jpg").write_bytes(b"\xff\xd8\xff broken")
    exif = b"Exif\0\0II*\0\xff\xff\xff\xff broken"
    photograph(0).save(tmp_path / "002.jpg", exif=exif)
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = Image.new("RGB", (400, 200), "blue")
    picture.paste("red", (0, 0, 200, 200))  # the left becomes the top
    picture.save(tmp_path / "003.jpg", exif=exif)
    photos = [x["photo"] for x in Page(write(tmp_path, examples)).data]
    assert [bool(each) for each in photos] == [False, False, True, True]
    with Image.open(io.BytesIO(base64.b64decode(photos[3]))) as image:
        assert image.size == (112, 224)
        assert image.getpixel((56, 20))[0] > 200
        assert image.getpixel((56, 200))[2] > 200


def test_attention_is_kept_as_what_is_above_an_even_share(tmp_path):
    examples = examples_in(tmp_path, ["a dog"])
    (data,) = Page(write(tmp_path, examples)).data
    maps = np.frombuffer(base64.b64decode(data["maps"]), np.uint8)
    maps = maps.reshape(2, SIDE * SIDE)
    assert maps.argmax(axis=1).tolist() == [0, 1]
    assert maps.max() == 255 and np.count_nonzero(maps, axis=1).max() == 1
    assert data["peaks"] == [0.5, 0.5]


def test_a_thousand_images_stay_below_30_megabytes(tmp_path):
    captions = ["a group of people stand on a balcony near a building"] * 40
    reference = "People are standing on the balcony of a colourful building ."
    examples = examples_in(tmp_path, captions, [reference] * 5)
    path = write(tmp_path, examples, side=14)
    assert 5_000_000 < 25 * path.stat().st_size < 30_000_000


# --- the page in a browser ---------------------------------------------------

DOGS = 7  # of 60 captions


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Headless Chromium with the page of 60 images open."""
    folder = tmp_path_factory.mktemp("page")
    captions = [f"a dog number {n} runs" for n in range(DOGS)]
    captions += ["a hotdog runs out", TRAP, ""]
    captions += ["two people walk along a street"] * 50
    references = ["a man walks .", "people", "the man walks"]
    examples = examples_in(folder, captions, references)
    examples = examples.sample(frac=1, random_state=0)
    (folder / "002.jpg").unlink()
    with chromium(tmp_path_factory.mktemp("profile")) as driver:
        driver.get(write(folder, examples, epochs=history(6)).as_uri())
        yield driver


@pytest.fixture
def page(browser):
    """The page as after loading; afterwards, nothing may have gone wrong."""
    browser.execute_script("history.replaceState(null, '', location.pathname)")
    browser.refresh()
    yield browser
    assert browser.get_log("browser") == []
    loaded = "return performance.getEntriesByType('resource').map(e => e.name)"
    assert all(x.startswith("data:") for x in browser.execute_script(loaded))


def ciders(page):
    script = "return [...document.querySelectorAll('#gallery b')]"
    texts = page.execute_script(script + ".map(each => each.textContent)")
    return [float(text.removeprefix("CIDEr ")) for text in texts]


def picture(page):
    """The pixels of the canvas, once a heat map has settled there."""
    wait(page, "pixels && heat")
    wait(page, "heat.every((x, i) => x === maps[word][i])")
    script = "return canvas.toDataURL().split(',')[1]"
    data = base64.b64decode(page.execute_script(script))
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


def test_images_sort_by_cider_and_shuffle(page):
    assert ciders(page) == sorted(ciders(page), reverse=True)
    best, worst, longest, rarest, random = find(page, "[data-order]")
    worst.click()
    assert ciders(page) == sorted(ciders(page))
    assert ciders(page)[0] == 0
    assert worst.get_attribute("aria-pressed") == "true"
    assert best.get_attribute("aria-pressed") == "false"
    longest.click()
    captions = [each.text for each in find(page, "#gallery .caption")]
    lengths = [len(each.split()) for each in captions]
    assert lengths == sorted(lengths, reverse=True)
    random.click()
    first = ciders(page)
    assert first not in (sorted(first), sorted(first, reverse=True))
    random.click()
    assert ciders(page) != first
    rarest.click()
    # Every other caption has words in common with many. Its markup is text.
    (trap,) = find(page, "#gallery li:first-child .caption")
    assert trap.text == TRAP
    assert not find(page, "#gallery .caption b")
    trap.click()
    words = [each.text for each in find(page, "#words button")]
    assert words == ["photograph", *TRAP.split()]


def test_search_finds_words_and_tells_how_many(page):
    count = find(page, "#count")[0]
    assert count.text == "60 images"
    find(page, "#search")[0].send_keys("Dog, run")
    # TRAP has both words too; "hotdog" is another word.
    assert count.text == f"{DOGS + 1} of 60 images"
    assert len(find(page, "#gallery > li")) == DOGS + 1
    assert {each.text for each in find(page, "mark")} == {"dog", "runs"}
    find(page, "#search")[0].send_keys(" zebra")
    assert count.text == "0 of 60 images"
    assert not find(page, "#gallery > li")
    assert find(page, "#none")[0].is_displayed()
    find(page, "#clear")[0].click()
    assert count.text == "60 images"
    assert not find(page, "#none")[0].is_displayed()
    find(page, "#search")[0].clear()
    find(page, "#search")[0].send_keys("walks")  # of the references
    assert count.text == "60 images"


def test_more_images_come_as_the_reader_scrolls(page):
    assert len(find(page, "#gallery > li")) == 48
    page.execute_script("scrollTo(0, document.body.scrollHeight)")
    wait(page, "document.querySelectorAll('#gallery > li').length === 60")
    assert not find(page, "#more")[0].is_displayed()


def test_a_click_lights_the_photograph_where_the_first_word_looked(page):
    find(page, "#gallery .open")[0].click()
    page.execute_script("stop(); show(1)")
    lit = picture(page)
    assert lit.shape == (336, 448, 3)
    page.execute_script("show(0)")
    photo = picture(page)
    assert np.ptp(photo) > 150
    colour = np.ptp(lit.astype(int), axis=2)
    assert np.ptp(photo.astype(int), axis=2).mean() > 20
    assert colour[150:, 200:].max() <= 2 < np.median(colour[:48, :64])


def test_the_keyboard_opens_steps_and_closes(page):
    focused = "document.activeElement.textContent"
    page.execute_script("document.querySelector('#gallery .open').focus()")
    press(page, "ENTER")
    wait(page, f"$('dialog').open && {focused} === 'photograph'")
    press(page, "ARROW_RIGHT")
    wait(page, f"{focused} === 'a'")
    first = picture(page)
    press(page, "ARROW_RIGHT")
    wait(page, f"{focused} === 'dog'")
    assert "word 2 of 5" in find(page, "#where")[0].text
    assert "upper left" in find(page, "#where")[0].text
    assert "50%" in find(page, "#where")[0].text
    assert "probability 80%" in find(page, "#where")[0].text
    second = picture(page)
    assert np.abs(second - first).max() > 20
    press(page, "END", "ARROW_RIGHT")
    wait(page, f"{focused} === 'runs'")
    press(page, "HOME")
    wait(page, f"{focused} === 'photograph'")
    press(page, "ESCAPE")
    wait(page, "!$('dialog').open")


def test_mouse_and_touch_step_through_the_words(page):
    find(page, "#gallery .open")[0].click()
    picture(page)
    point_at(page, find(page, "#words button")[3])
    wait(page, "word === 3")
    find(page, "#canvas")[0].click()
    wait(page, "word === 4")
    swipe = (
        "for (const [kind, x] of [['down', 100], ['up', 200]]) "
        "canvas.dispatchEvent(new PointerEvent('pointer' + kind, "
        "{clientX: x, pointerType: 'touch'}))"
    )
    page.execute_script(swipe)
    wait(page, "word === 3")
    find(page, "#next")[0].click()
    wait(page, "$('place').textContent === '2 of 60'")
    find(page, "#close")[0].click()
    wait(page, "!$('dialog').open")


def test_the_words_are_played_once(page):
    page.execute_script("open(0)")
    wait(page, "word === 2")
    wait(page, "word === maps.length - 1")
    others = [each.text for each in find(page, ".others li")]
    assert others == [f"a dog number 0 runs {n}" for n in range(1, 5)]


def test_an_image_has_a_link(page):
    page.execute_script("open(3)")
    name = page.execute_script("return shown[3].image")
    address = page.current_url
    assert address.endswith("#" + name)
    page.get("about:blank")
    page.get(address)
    wait(page, "$('dialog').open && $('name').textContent === '" + name + "'")
    press(page, "ESCAPE")
    wait(page, "!$('dialog').open && !location.hash")


def test_some_images_stand_under_the_figures(page):
    strip = find(page, "#strip .open")
    assert len(strip) == 8
    find(page, "#search")[0].send_keys("zebra")
    strip[0].click()  # also one that the search leaves out
    wait(page, "$('dialog').open && shown.length === 60")


def test_curves_tell_their_values(page):
    """To a mouse, a finger and the arrow keys."""
    epochs = find(page, ".curve:first-child .epoch")
    assert len(epochs) == 6 and len(find(page, ".epoch")) == 15
    texts = "[...document.querySelectorAll('.epoch text')]"
    seen = f"{texts}.filter(x => getComputedStyle(x).visibility === 'visible')"
    seen += ".map(x => x.textContent).join()"
    assert page.execute_script(f"return {seen}") == ""
    point_at(page, epochs[2])
    wait(page, f"{seen} === '0.6321,0.6321,3'")
    epochs[1].click()
    wait(page, "document.activeElement.matches('.epoch')")
    press(page, "ARROW_RIGHT", "ARROW_RIGHT", "ARROW_LEFT")
    label = "Epoch 3: training 0.6321, validation 0.6321"
    wait(page, f"document.activeElement.ariaLabel === '{label}'")
    wait(page, "document.activeElement.tabIndex === 0")


def test_a_word_of_the_errors_shows_its_images(page):
    words = find(page, ".errors .word")
    assert {each.text for each in words} == {"man", "walks"}
    words[0].click()
    assert (
        find(page, "#search")[0].get_attribute("value") == f"{words[0].text} "
    )
    assert find(page, "#count")[0].text == "60 images"  # all references
    # The word as a whole, and without the space whatever begins with it.
    for typed, count in (("ma ", "0 of 60 images"), ("ma", "60 images")):
        find(page, "#search")[0].clear()
        find(page, "#search")[0].send_keys(typed)
        assert find(page, "#count")[0].text == count


def test_a_right_to_left_caption_runs_from_right_to_left(browser, tmp_path):
    """Words, buttons, keys and what people wrote; English stays as it is."""
    captions = ["رجل يركب دراجة في الشارع .", "a man rides a bike ."]
    references = ["رجل على دراجة .", "A man on a bike ."]
    examples = examples_in(tmp_path, captions, references)
    page, before = browser, browser.current_url
    page.get(write(tmp_path, examples).as_uri())
    direction = "return getComputedStyle(arguments[0]).direction"
    shown = find(page, "#gallery .caption")
    shown += find(page, "#gallery li:first-child .references li")
    found = [page.execute_script(direction, each) for each in shown]
    assert found == ["rtl", "ltr"] * 2
    shown[0].click()
    for order, forwards, back in (
        (-1, "ARROW_LEFT", "ARROW_RIGHT"),
        (1, "ARROW_RIGHT", "ARROW_LEFT"),
    ):
        words = find(page, "#words button")[1:5]
        places = [each.rect["x"] for each in words]
        assert places == sorted(places)[::order]
        press(page, forwards, forwards)
        wait(page, f"document.activeElement.textContent === '{words[1].text}'")
        where = f"“\u2068{words[1].text}\u2069”, word 2 of 6"
        assert where in find(page, "#where")[0].text
        press(page, back, back)
        wait(page, "word === 0")
        press(page, "ARROW_DOWN")
        wait(page, "$('place').textContent.startsWith('2 of')")
    page.get(before)


def test_characters_are_searched_for_wherever_they_stand(browser, tmp_path):
    examples = examples_in(tmp_path, ["一只白狗在跑", "一只猫"], ["狗。", "猫"])
    metrics = {**METRICS, "tokenizer": "characters"}
    page, before = browser, browser.current_url
    path = write(tmp_path, examples, metrics=metrics, tokeniser="characters")
    page.get(path.as_uri())
    find(page, "#search")[0].send_keys("白狗")
    assert find(page, "#count")[0].text == "1 of 2 images"
    assert [each.text for each in find(page, "mark")] == ["白狗"]
    find(page, "#gallery .open")[0].click()
    wait(page, "$('words').children.length === 7")
    page.get(before)


def test_an_image_without_photograph_or_caption_opens(page):
    find(page, "#search")[0].send_keys("number 2")
    (button,) = find(page, "#gallery .open")
    assert "could not be read" in button.text
    button.click()
    page.execute_script("stop(); show(1)")
    # As the attention figures are drawn, on the grey that stands for it.
    grey = np.full((448, 448, 3), 0xAA, np.uint8)
    lit = figures.lit(grey, attend(1).reshape(SIDE, SIDE))
    np.testing.assert_allclose(picture(page), lit, atol=1)
    page.execute_script("$('dialog').close()")
    without = "shown = examples.filter(each => !each.caption)"
    page.execute_script(f"{without}; open(0)")
    wait(page, "word === 0")
    assert np.ptp(picture(page)) > 150


def test_a_phone_does_not_scroll_sideways(page):
    with phone(page):
        wait(page, "document.documentElement.scrollWidth <= 390")
        find(page, "#gallery .open")[0].click()
        picture(page)
        wait(page, "$('dialog').scrollWidth <= 390")
        wait(page, "canvas.getBoundingClientRect().width > 300")


def test_the_dialog_ends_at_the_image_where_it_stood(page):
    """Also where the arrow keys went beyond the images that were drawn."""
    page.execute_script("open(47)")
    wait(page, "$('dialog').open")
    press(page, "ARROW_DOWN")
    wait(page, "$('place').textContent === '49 of 60'")
    press(page, "ESCAPE")
    focused = "document.activeElement.closest('#gallery > li')"
    wait(page, f"[...$('gallery').children].indexOf({focused}) === 48")


def test_the_keyboard_and_a_screen_reader_find_their_way(page):
    """What can be focused, in order, and what each is called."""
    told = "(document.activeElement.ariaLabel"
    told += " || document.activeElement.textContent).trim()"
    page.execute_script(
        "document.querySelector('.settings').closest('details').firstChild.focus()"
    )
    for name in (
        "Search captions and references",
        "Best",
        "Worst",
        "Longest",
        "Rarest",
        "Random",
        "a dog number 0 runs",
    ):
        press(page, "TAB")
        wait(page, f"{told} === '{name}'")
    press(page, "ENTER")
    wait(page, "$('dialog').open")
    page.execute_script("stop(); show(1)")
    nodes = page.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    seen = {
        (node["role"]["value"], node["name"]["value"])
        for node in nodes
        if not node["ignored"] and "name" in node
    }
    assert seen >= {
        ("dialog", "Attention of each word"),
        ("image", "The photograph, lit where the model looked"),
        ("button", "Next image"),
        ("button", "Close"),
        ("button", "dog"),
        ("heading", "References"),
    }
    # What is behind the dialog is not there.
    assert ("button", "Best") not in seen
