"""Figures in scripts that matplotlib's own font does not have."""

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager
from PIL import Image

from captioning.scoring import figures, fonts


def make_font(path, family: str, characters: str) -> str:
    """A font whose characters are all a black square."""
    pen = TTGlyphPen(None)
    corners = [(0, 0), (0, 1000), (1000, 1000), (1000, 0)]
    pen.moveTo(corners[0])
    for corner in corners[1:]:
        pen.lineTo(corner)
    pen.closePath()
    square = pen.glyph()
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", "square"])
    builder.setupCharacterMap({ord(c): "square" for c in characters})
    builder.setupGlyf({".notdef": TTGlyphPen(None).glyph(), "square": square})
    builder.setupHorizontalMetrics({".notdef": (1000, 0), "square": (1000, 0)})
    builder.setupHorizontalHeader(ascent=1000, descent=0)
    builder.setupNameTable({"familyName": family, "styleName": "Regular"})
    builder.setupOS2(sTypoAscender=1000, usWinAscent=1000)
    builder.setupPost()
    builder.save(path)
    return str(path)


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Installs fonts in place of those of this machine."""
    paths: list[str] = [str(tmp_path / "damaged.ttf")]
    (tmp_path / "damaged.ttf").write_bytes(b"no font")
    monkeypatch.setattr(fonts, "_chosen", fonts._chosen[:1])
    monkeypatch.setattr(fonts, "_absent", set())
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: paths)

    def install(family: str, characters: str) -> None:
        name = f"{family.replace(' ', '')}.ttf"
        paths.append(make_font(tmp_path / name, family, characters))

    yield install
    manager = font_manager.fontManager
    manager.ttflist = [f for f in manager.ttflist if f.fname not in paths]


def draw(path, words: list[str]) -> np.ndarray:
    """The titles of the panels of an attention figure, greyscale."""
    photo = np.full((60, 80, 3), 255, np.uint8)
    maps = np.ones((len(words), 49))
    figures.write_attention_figure(path, photo, words, maps)
    with Image.open(path) as image:
        return np.asarray(image.convert("L"))[: figures._TITLE]


def test_latin_arabic_and_punctuation_need_no_other_font(installed, capsys):
    installed("Other", "aرא$.")
    text = "größe ёлка رجل איש $x^ <unk> \u200c\ufe0f\n"
    assert fonts.families(text) == ["DejaVu Sans"]
    assert capsys.readouterr().err == ""


def test_installed_fonts_show_what_is_missing(installed, tmp_path, capsys):
    installed("Some", "犬")
    installed("Last Resort", "犬走ครก")
    installed("More Sans", "犬走")
    installed("Thai", "ค")
    # As few as possible.
    assert fonts.families("犬 走") == ["DejaVu Sans", "More Sans"]
    assert fonts.families("犬 ค")[1:] == ["More Sans", "Thai"]
    assert capsys.readouterr().err == ""
    titles = draw(tmp_path / "x.png", ["犬", "走"])
    black = (titles < 60).sum()
    assert black > 100  # squares, no boxes
    assert len(fonts.families("a")) == 3


def test_a_script_without_a_font_is_told_of_once(installed, tmp_path, capfd):
    for words in (["犬"], ["走"], ["a"], ["犬", "ค"]):
        draw(tmp_path / "x.png", words)
    first, second = capfd.readouterr().err.splitlines()
    assert first.startswith("Note: no installed font has 犬 (CJK), so figures")
    assert "ค (THAI)" in second and "Noto" in second


@pytest.mark.parametrize(
    ("words", "order"),
    [(["a", "mmmm"], [0, 1, 2]), (["א", "ششششش"], [2, 1, 0])],
)
def test_panels_run_in_the_direction_of_the_script(tmp_path, words, order):
    titles = draw(tmp_path / "x.png", words)
    ink = [int((t < 128).sum()) for t in np.array_split(titles, 3, axis=1)]
    # None above the photograph, a little and then more above the words.
    assert list(np.argsort(ink)) == order and min(ink) == 0
