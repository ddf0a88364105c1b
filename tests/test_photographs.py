"""Which files caption.py takes for photographs, and what it says of others."""

import os
import sys
from pathlib import Path
from unicodedata import normalize

import pytest

import caption
from captioning.data import photographs
from config import UserError


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make(*paths: str) -> None:
    for path in paths:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(b"")


def found(*names: str, listed=()) -> list[str]:
    """The photographs, where nothing is missing."""
    result = photographs.find(names, listed)
    assert not result.missing
    return [each.replace(os.sep, "/") for each in result.photographs]


def test_a_folder_is_searched_for_every_image_format():
    endings = "JPG jpeg jpe jfif mpo png apng webp avif bmp dib tif TIFF gif"
    endings += " jp2 ppm pgm tga ico psd qoi HEIC heif hif jxl"
    names = sorted(f"roll/{n}.{e}" for n, e in enumerate(endings.split()))
    make(*names, "roll/deeper/x.jpg")
    assert found("roll") == sorted([*names, "roll/deeper/x.jpg"])


def test_hidden_files_and_what_macos_packs_are_passed_over():
    make("roll/a.jpg", "roll/._a.jpg", "roll/.hidden.jpg", "roll/.x/b.jpg")
    make("roll/__MACOSX/._a.jpg", "roll/__MACOSX/c.jpg")
    result = photographs.find(["roll"], [])
    assert result == ([os.path.join("roll", "a.jpg")], [], [])
    assert found("roll/.hidden.jpg") == ["roll/.hidden.jpg"]


def test_what_is_no_photograph_is_counted_by_kind():
    make("roll/a.jpg", "roll/b.MOV", "roll/c.mov", "roll/d", "roll/e.CR2")
    make("roll/f.eps", "roll/g.h5", "roll/sub/notes.txt")
    _, _, [(folder, told)] = photographs.find(["roll"], [])
    assert folder == "roll" and told.startswith("not photographs: 2 .mov, ")
    assert sorted(told.removeprefix("not photographs: ").split(", ")) == sorted(
        ["2 .mov", "1 without extension", "1 .cr2", "1 .eps", "1 .h5", "1 .txt"]
    )


def test_a_file_that_is_named_is_taken_whatever_it_is_called():
    make("a", "b.xyz", "c[1].jpg", "c1.jpg")
    assert found("a", "b.xyz", "c[1].jpg") == ["a", "b.xyz", "c[1].jpg"]


def test_patterns_are_expanded_where_the_shell_did_not():
    make("a/2.jpg", "a/1.jpg", "a/deep/3.jpg", "a/x.txt", "1.jpg", "x[1].jpg")
    assert found("a/*.jpg") == ["a/1.jpg", "a/2.jpg"]
    assert found("a/**/*.jpg") == ["a/1.jpg", "a/2.jpg", "a/deep/3.jpg"]
    assert found("?.jpg") == ["1.jpg"]
    assert photographs.find(["*.gif"], []).missing == [
        ("*.gif", "no file matches")
    ]
    # A list has names, and a name may have brackets.
    (missing,) = photographs.find(["-"], ["[1].jpg\n"]).missing
    assert missing[0] == "[1].jpg"


def test_a_list_on_standard_input_has_files_and_folders():
    make("a b.jpg", "folder/c.jpg", "größe 犬.jpg")
    lines = ["a b.jpg\r\n", "\n", "folder\n", "größe 犬.jpg"]
    wanted = ["a b.jpg", "folder/c.jpg", "größe 犬.jpg"]
    assert found("-", listed=lines) == wanted


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_a_name_in_another_unicode_form_is_that_of_the_file(forms):
    there, named = (normalize(form, "Hügel.jpg") for form in forms)
    make(there)
    assert found(named) == found("-", listed=[named]) == found(there)


def test_a_photograph_that_is_named_twice_is_taken_once(here):
    make("a/1.jpg", "a/2.jpg")
    again = str(here / "a" / "1.jpg")
    names = ["a/2.jpg", "a", again, "./a/1.jpg", "a/../a/2.jpg"]
    assert found(*names) == ["a/2.jpg", "a/1.jpg"]


@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
def test_links_are_followed_and_end(here):
    make("a/1.jpg", "b/2.jpg")
    Path("a/round").symlink_to(here / "a")
    Path("a/b").symlink_to(here / "b")
    Path("a/gone.jpg").symlink_to("nothing")
    assert found("a") == ["a/1.jpg", "a/b/2.jpg", "a/gone.jpg"]


def test_what_is_not_there_is_named_and_the_rest_is_found(capsys, monkeypatch):
    make("a.jpg")
    monkeypatch.setattr(sys, "argv", ["caption.py"])
    photos, failed = caption.find_photos(["a.jpg", "b.jpg", "\0"])
    assert (photos, failed) == (["a.jpg"], 2)
    assert "caption.py: b.jpg: no such file\n" in capsys.readouterr().err
    with pytest.raises(UserError, match="no photographs found"):
        caption.find_photos(["b.jpg"])


def test_a_photograph_that_vanishes_before_its_figure_is_named(here):
    assert caption.draw(here / "maps", "gone.jpg", None) == "missing"


def test_a_name_cannot_break_the_line_of_its_photograph():
    class Found:
        caption = "a dog"

    assert (
        caption.line("a\tb\nc.jpg", Found, False) == r"a\tb\nc.jpg" + "\ta dog"
    )
