"""Every layout people have, and every state its files come in."""

import itertools
import json
import os
import shutil
import sys
from pathlib import Path
from unicodedata import normalize

import numpy as np
import pandas as pd
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from captioning import runs
from captioning.data import vocabulary
from captioning.data.datasets import (
    Dataset,
    equal_pixels_across_splits,
    find_dataset,
)
from config import LAYOUTS, SPLITS, UserError
from tests.helpers import refusal


def write(folder: Path, files: dict, *images: str) -> Path:
    """Writes files, and images that nobody opens."""
    for name, content in {**files, **dict.fromkeys(images, b"x")}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):
            content = content.encode("utf-8")
        (folder / name).write_bytes(content)
    return folder


def find(folder: Path, layout: str = "auto") -> Dataset:
    return find_dataset(folder, layout, 0.1, 0.1)


def plain(folder: Path, captions: str | bytes, *images: str) -> Dataset:
    """A dataset of one captions.csv with its images beside it."""
    images = images or ("a.jpg", "b.jpg")
    return find(write(folder, {"captions.csv": captions}, *images), "plain")


def of_dogs(folder: Path, images: list[str]) -> Dataset:
    """A plain dataset in which every image has the same caption."""
    rows = "".join(f"{name},a dog\n" for name in images)
    return plain(folder, "image,caption\n" + rows, *images)


def captions_of(dataset: Dataset) -> dict[str, list[str]]:
    return dataset.table.groupby("image")["caption"].apply(list).to_dict()


def splits_of(dataset: Dataset) -> dict[str, str]:
    return dict(dataset.table[["image", "split"]].values)


# --- layouts --------------------------------------------------------------

SPLIT_OF = {"a": "train", "b": "train", "c": "val", "d": "test"}
IMAGES = [f"{name}.jpg" for name in SPLIT_OF]
PAIRS = [(name, word) for name in SPLIT_OF for word in ("one", "two")]
KARPATHY = {
    "images": [
        {
            "filename": f"{name}.jpg",
            "split": "restval" if name == "b" else split,
            "sentences": [{"raw": f"{name} one"}, {"raw": f"{name} two"}],
        }
        for name, split in SPLIT_OF.items()
    ]
}
HUGGINGFACE = "raw,sentids,split,filename,img_id\n" + "".join(
    f'"[""{name} one"", ""{name} two""]","[0, 1]",{split},{name}.jpg,7\n'
    for name, split in SPLIT_OF.items()
)


def lines(line: str) -> str:
    """One line per caption, from its pattern."""
    return "".join(
        line.format(n=name, w=word, i=int(word == "two"), s=SPLIT_OF[name])
        for name, word in PAIRS
    )


PLAIN = "image,caption,split\n" + lines("{n}.jpg,{n} {w},{s}\n")
PLAIN = PLAIN.replace(",val", ",dev")
KAGGLE30K = "image_name| comment_number| comment\n"
KAGGLE30K += lines("{n}.jpg| {i}| {n} {w}\n")
KAGGLE8K = "image,caption\n" + lines("{n}.jpg,{n} {w}\n")
TOKEN = lines("{n}.jpg#{i}\t{n} {w}\n")
TOKEN_CN = lines("{n}.jpg#zhc#{i} {n} {w}\n")
OFFICIAL_LISTS = {
    "Flickr8k_text/Flickr_8k.trainImages.txt": "a.jpg\nb.jpg\n",
    "Flickr8k_text/Flickr_8k.devImages.txt": "c.jpg\n",
    "Flickr8k_text/Flickr_8k.testImages.txt": "d.jpg\n",
}
KARPATHY_LISTS = {
    "karpathy_splits/train.txt": "a.jpg\nb.jpg\n",
    "karpathy_splits/val.txt": "c.jpg\n",
    "karpathy_splits/test.txt": "d.jpg\n",
}
# What people have in their folder, and where the images are; all say the same.
FOLDERS = {
    "karpathy": (
        {"dataset_flickr30k.json": json.dumps(KARPATHY)},
        "flickr30k-images",
    ),
    "huggingface": (
        {"flickr_annotations_30k.csv": HUGGINGFACE},
        "flickr30k-images",
    ),
    "plain": ({"captions.csv": PLAIN}, "."),
    "kaggle30k": (
        {"flickr30k_images/results.csv": KAGGLE30K, **KARPATHY_LISTS},
        "flickr30k_images/flickr30k_images",
    ),
    "kaggle8k": ({"captions.txt": KAGGLE8K, **OFFICIAL_LISTS}, "Images"),
    "token": (
        {
            "Flickr8k_text/Flickr8k.token.txt": TOKEN,
            "Flickr8k_text/Flickr8k.lemma.token.txt": TOKEN.replace(" one", ""),
            **OFFICIAL_LISTS,
        },
        "Flicker8k_Dataset",
    ),
    "imagefolder": (
        {"metadata.csv": PLAIN.replace("image,caption", "file_name,text")},
        ".",
    ),
    "sidecar": (
        {
            **{f"Images/{n}.txt": f"{n} one\n{n} two\n" for n in "abc"},
            "Images/d.json": '{"caption": ["d one", "d two"], "url": "x"}',
            **KARPATHY_LISTS,
        },
        "Images",
    ),
}


@pytest.mark.parametrize("layout", FOLDERS)
def test_every_flickr_layout_gives_the_same_table(tmp_path, layout):
    files, folder = FOLDERS[layout]
    write(tmp_path, files, *(f"{folder}/{name}" for name in IMAGES))
    dataset = find(tmp_path)
    assert dataset.layout == layout
    assert dataset.images_dir == tmp_path / folder
    assert dataset.skipped == dataset.repaired == []
    wanted = pd.DataFrame(
        [
            (f"{n}.jpg", SPLIT_OF[n], *[f"{n} {w}"] * 2, f"{n}.jpg")
            for n, w in PAIRS
        ],
        columns=["image", "split", "caption", "tokens", "image_id"],
    )
    pd.testing.assert_frame_equal(dataset.table, wanted)
    assert "4 images, 8 captions" in dataset.summary
    assert dataset.summary.endswith(": train 2, val 1, test 1")


TWICE = "flickr30k_images/flickr30k_images"


@pytest.mark.parametrize(
    ("file", "text", "folder"),
    [
        ("results.csv", KAGGLE30K, "flickr30k_images"),
        (f"{TWICE}/results.csv", KAGGLE30K, TWICE),
        ("x/flickr30k_images/results.csv", KAGGLE30K, f"x/{TWICE}"),
        ("flickr30k/results_20130124.token", TOKEN, "flickr30k-images"),
        ("data/flickr8kzhc.caption.txt", TOKEN_CN, "Images"),
        ("dataset_flickr8k.json", json.dumps(KARPATHY), "Images"),
        ("dataset_rsicd.json", json.dumps(KARPATHY), "."),
    ],
)
def test_archives_are_read_as_they_unpack(tmp_path, file, text, folder):
    images = [f"{folder}/{name}" for name in IMAGES]
    write(tmp_path, {file: text, "dataset_info.json": "{}"}, *images)
    dataset = find(tmp_path)
    assert dataset.images_dir == tmp_path / folder
    assert captions_of(dataset) == {
        f"{n}.jpg": [f"{n} one", f"{n} two"] for n in SPLIT_OF
    }
    assert dataset.skipped == dataset.repaired == []


IMAGEFOLDER = {
    "data/train/metadata.csv": "file_name,text\na.jpg,one\nb.jpg,two\n",
    "data/validation/metadata.csv": "file_name,text\na.jpg,three\n",
    "data/test/metadata.jsonl": '{"file_name": "c.jpg", "text": "four"}',
    "data/train/a.jpg": b"x",
    "data/train/b.jpg": b"x",
    "data/validation/a.jpg": b"x",
    "data/test/c.jpg": b"x",
}


def test_the_folders_of_an_image_folder_are_its_splits(tmp_path):
    """And images of one name in two of them are two images."""
    dataset = find(write(tmp_path, IMAGEFOLDER))
    assert dataset.images_dir == tmp_path / "data"
    assert dataset.table[["image", "split", "caption"]].values.tolist() == [
        ["test/c.jpg", "test", "four"],
        ["train/a.jpg", "train", "one"],
        ["train/b.jpg", "train", "two"],
        ["validation/a.jpg", "val", "three"],
    ]
    assert dataset.skipped == dataset.messages == []


def test_a_folder_for_train_alone_is_no_split(tmp_path):
    files = {name: x for name, x in IMAGEFOLDER.items() if "train" in name}
    assert "split by a hash" in find(write(tmp_path, files)).summary


def test_captions_in_folders_of_splits_share_the_images_of_one(tmp_path):
    text = "image,caption\n"
    files = {"train/captions.csv": f"{text}a.jpg,one\n"}
    files["test/captions.csv"] = f"{text}b.jpg,two\n"
    write(tmp_path, files, "Images/a.jpg", "Images/b.jpg")
    assert splits_of(find(tmp_path)) == {"a.jpg": "train", "b.jpg": "test"}


@pytest.mark.parametrize("held_out", ["val", "test"])
def test_images_in_folders_called_as_splits_are_split_by_them(
    tmp_path, held_out
):
    names = [f"train/{n}.jpg" for n in range(60)]
    dataset = of_dogs(tmp_path, [*names, f"{held_out}/x.jpg"])
    splits = splits_of(dataset)
    assert splits.pop(f"{held_out}/x.jpg") == held_out
    assert "split by folder" in dataset.summary
    # Only where there is no val, some of train becomes it.
    wanted = {"train"} if held_out == "val" else {"train", "val"}
    assert {*splits.values()} == wanted


def coco(names: dict[int, str]) -> str:
    return json.dumps(
        {
            "images": [{"id": i, "file_name": n} for i, n in names.items()],
            "annotations": [{"image_id": i, "caption": "cat"} for i in names],
        }
    )


@pytest.mark.parametrize("folders", [("train2017/", "val2017/"), ("", "")])
def test_coco_takes_its_split_and_folder_from_the_file_name(tmp_path, folders):
    files = {
        "annotations/captions_train2017.json": coco({7: "7.jpg"}),
        "annotations/captions_val2017.json": coco({0: "0.jpg"}),
        "annotations/captions_train2014.json": coco({9: "9.jpg"}),
        "annotations/instances_train2017.json": "{}",
    }
    names = [f"{folders[0]}7.jpg", f"{folders[1]}0.jpg"]
    dataset = find(write(tmp_path, files, *(f"images/{n}" for n in names)))
    assert dataset.images_dir == tmp_path / "images"
    table = dataset.table.set_index("image_id")
    assert table["split"].to_dict() == {7: "train", 0: "val"}
    assert table["image"].to_dict() == dict(zip([7, 0], names, strict=True))
    assert dataset.summary.endswith("train 1, val 1, no test")
    assert dataset.skipped == []  # the files of 2014 are another dataset


def test_karpathys_coco_file_uses_filepath_and_cocoid(tmp_path):
    image = {**KARPATHY["images"][1], "filepath": "val2014", "cocoid": 42}
    document = json.dumps({"images": [image]})
    write(tmp_path, {"dataset_coco.json": document}, "images/val2014/b.jpg")
    dataset = find(tmp_path)
    assert dataset.images_dir == tmp_path / "images"
    row = ["val2014/b.jpg", "train", "b one", "b one", 42]
    assert dataset.table.values.tolist()[0] == row


@pytest.mark.parametrize("number", [None, "7", 7, 10**30, [1]])
def test_numbers_that_some_images_lack_or_share_are_not_used(tmp_path, number):
    first, second, *_ = KARPATHY["images"]
    images = [{**first, "cocoid": 7}, {**second, "cocoid": number}]
    document = json.dumps({"images": images})
    write(tmp_path, {"dataset_coco.json": document}, "a.jpg", "b.jpg")
    table = find(tmp_path).table
    assert (table["image_id"] == table["image"]).all()


def test_the_documented_order_of_layouts_holds(tmp_path):
    everything = {"captions_train2017.json": coco({7: "a.jpg"})}
    for files, _ in FOLDERS.values():
        everything.update(files)
    write(tmp_path, everything, "Images/a.jpg")
    for layout in LAYOUTS[1:]:
        assert find(tmp_path).layout == layout
        assert find(tmp_path, layout).layout == layout
        for name in FOLDERS.get(layout, [["captions_train2017.json"]])[0]:
            (tmp_path / name).unlink(missing_ok=True)
    page = Path(__file__).parent.parent / "data" / "README.md"
    page = page.read_text(encoding="utf-8")
    places = [page.index(f"### `{layout}`") for layout in LAYOUTS[1:]]
    assert places == sorted(places)


def test_a_table_pasted_together_is_read(tmp_path):
    """As data/README.md does it for Multi30k; nobody quoted the captions."""
    captions = ["Ein Mann.", '"Stopp" ist rot.', "Zwei Hunde.", 'Ein "Hund']
    rows = zip(IMAGES, captions, SPLIT_OF.values(), strict=True)
    text = "image\tcaption\tsplit\n" + "".join(
        "\t".join(row) + "\n" for row in rows
    )
    lists = {"image_splits/train.txt": "a.jpg\nb.jpg\n"}
    images = [f"flickr30k-images/{name}" for name in IMAGES]
    dataset = find(write(tmp_path, {"captions.tsv": text, **lists}, *images))
    assert [*splits_of(dataset).values()] == [*SPLIT_OF.values()]
    captions[1] = "Stopp ist rot."
    assert [*captions_of(dataset).values()] == [[each] for each in captions]


def test_what_lies_deeper_gives_way_to_what_lies_above(tmp_path):
    deep = {"backup/old/dataset.json": json.dumps(KARPATHY)}
    write(tmp_path, {"captions.txt": KAGGLE8K, **deep}, "Images/a.jpg")
    assert find(tmp_path).layout == "kaggle8k"


def test_of_several_files_the_one_these_images_belong_to_is_taken(tmp_path):
    files = {"y.lemma.token": "b.jpg#0\tdog\n", "z.token": "\t"}
    write(tmp_path, {"x.token": "a.jpg#0\tdog\n", **files}, "a.jpg")
    dataset = find(tmp_path)
    assert captions_of(dataset) == {"a.jpg": ["dog"]}
    wanted = ["Captions not used: z.token, y.lemma.token."]
    assert dataset.messages == wanted


def test_the_folder_that_holds_the_images_is_found(tmp_path):
    write(tmp_path, {}, "Images/a.jpg", "__MACOSX/archive/pictures/._a.jpg")
    names = ["archive/pictures/a.jpg", "archive/pictures/b.jpg"]
    write(tmp_path, {"captions.csv": "image,caption\na.jpg,dog\nb.jpg,cat\n"})
    assert find(write(tmp_path, {}, *names)).images_dir == (
        tmp_path / "archive" / "pictures"
    )
    # Of equals the one with a usual name.
    write(tmp_path, {}, "Crops/a.jpg", "Crops/b.jpg", "Images/b.jpg")
    assert find(tmp_path).images_dir == tmp_path / "Images"


def test_links_are_followed_and_circles_end(tmp_path):
    write(tmp_path, {}, "elsewhere/a.jpg")
    text = "image,caption\na.jpg,dog\n"
    folder = write(tmp_path / "set", {"captions.csv": text})
    (folder / "Images").symlink_to(tmp_path / "elsewhere")
    (folder / "circle").symlink_to(folder)
    (folder / "itself").symlink_to("itself")
    assert find(folder).images_dir == folder / "Images"


@pytest.mark.parametrize(
    "written",
    [
        "x\\a.jpg",
        "./y//b.jpg",
        "a b.jpg",
        "größe 犬.jpg",
        "a,b;'c'.jpg",
        "#1.JPG",
    ],
)
def test_any_image_name_is_found(tmp_path, written):
    name = {"x\\a.jpg": "x/a.jpg", "./y//b.jpg": "y/b.jpg"}.get(
        written, written
    )
    other = "other.jpg"
    text = f'image,caption\n"{written}",dog\n{other},cat\n'
    assert set(captions_of(plain(tmp_path, text, name, other))) == {name, other}
    write(tmp_path, {"x.token": f"{written}#0\tdog\n{other}#0\tcat\n"})
    assert set(captions_of(find(tmp_path, "token"))) == {name, other}


# --- files as people have them --------------------------------------------

# Every way to write that a.jpg has the captions "one" and "two".
NUMBERED = "image_name,comment_number,comment\na.jpg,0,one\na.jpg,1,two\n"
SAME = [
    ("captions.csv", "image,caption_0,caption_1\na.jpg,one,two\n"),
    ("captions.csv", "image,Caption 1,Caption 2\na.jpg,one,two\n"),
    ("captions.csv", "image,caption,caption,caption\na.jpg,one,two,\n"),
    ("captions.csv", "sep=;\nimage;caption\na.jpg;one\na.jpg;two\n"),
    ("captions.csv", "sep=\t\nimage\tcaption\na.jpg\tone\na.jpg\ttwo\n"),
    ("captions.csv", ",image,caption\n0,a.jpg,one\n1,a.jpg,two\n"),
    ("captions.csv", "image,caption\na.jpg#0,one\na.jpg#1,two\n"),
    ("captions.csv", "\ufeffimage,caption\r\na.jpg,one\r\na.jpg,two\r\n"),
    ("captions.csv", "\rimage,caption\ra.jpg,one\ra.jpg,two"),
    ("Captions.CSV", "File Name|Text\na.jpg|one\na.jpg|two\n"),
    ("captions.txt", NUMBERED),
    ("captions.txt", "a.jpg#0\tone\na.jpg#1\ttwo\n"),
    ("results.csv", NUMBERED),
    ("results.csv", NUMBERED.replace(",", ";")),
]


@pytest.mark.parametrize(("name", "text"), SAME)
def test_tables_that_people_have_are_understood(tmp_path, name, text):
    dataset = find(write(tmp_path, {name: text}, "a.jpg"))
    assert captions_of(dataset) == {"a.jpg": ["one", "two"]}
    assert dataset.skipped == dataset.repaired == []


@pytest.mark.parametrize(
    "text",
    [
        "image,caption,split\na.jpg,red, white, blue,val\n",
        'image,caption,split\na.jpg,"red, white, blue",val,,\n',
        "image;caption;split\na.jpg;red, white, blue;val\n",
        "Caption\tImage_Name \tSplit\nred, white, blue\ta.jpg\tval\n",
        'split, image, caption\nval, a.jpg, "red, white, blue"\n',
    ],
)
def test_commas_and_columns_in_any_order_are_understood(tmp_path, text):
    table = plain(tmp_path, text).table.drop(columns="tokens")
    row = ["a.jpg", "val", "red, white, blue", "a.jpg"]
    assert table.values.tolist() == [row]


# What a file has below its header, the captions of a.jpg and b.jpg that are
# read, what is repaired and what is skipped.
DAMAGED = {
    "quotes and commas": (
        'a.jpg,"A "" big "" dog , running ."\nb.jpg,"a, b"\n',
        {"a.jpg": ['A " big " dog , running .'], "b.jpg": ["a, b"]},
        [],
        [],
    ),
    "a quote that does not close": (
        'a.jpg,"a dog\nb.jpg,"a cat, sitting"\n',
        {"a.jpg": ["a dog"], "b.jpg": ["a cat, sitting"]},
        [("captions.csv", "quotes that do not match: read line by line")],
        [],
    ),
    "a field above Python's limit": (
        f"a.jpg,{'x' * 200_000}\nb.jpg,cat\n",
        {"b.jpg": ["cat"]},
        [("captions.csv", "quotes that do not match: read line by line")],
        [(f"a.jpg,{'x' * 74}", "row that is not valid CSV")],
    ),
    "what captions must not hold": (
        "a.jpg,  salt &amp; &quot;pepper&quot; \n"
        'b.jpg,"two\nlines\x07 and\u2028more"\n',
        {"a.jpg": ['salt & "pepper"'], "b.jpg": ["two lines  and more"]},
        [
            ("a.jpg", "HTML in a caption"),
            ("b.jpg", "control characters in a caption"),
        ],
        [],
    ),
    "captions without words": (
        "a.jpg,\na.jpg,NaN\na.jpg, ... !\na.jpg\nb.jpg,a dog\n",
        {"b.jpg": ["a dog"]},
        [],
        [
            ("a.jpg", "row without a caption"),
            ("a.jpg", "caption is empty"),
            ("a.jpg", "caption without a word"),
        ],
    ),
    "commas without quotes": (
        "a.jpg,two | three\nb.jpg,four, five\n",
        {"a.jpg": ["two | three"], "b.jpg": ["four, five"]},
        [("b.jpg", "caption with ',' but no quotes")],
        [],
    ),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damage_costs_no_other_row_and_is_told(tmp_path, damage):
    text, captions, repaired, skipped = DAMAGED[damage]
    dataset = plain(tmp_path, "image,caption\n" + text)
    assert captions_of(dataset) == captions
    assert dataset.repaired == repaired
    assert dataset.skipped == skipped


def test_a_wide_row_with_too_many_fields_is_skipped(tmp_path):
    text = "image,caption_0,caption_1\na.jpg,one,two,three\nb.jpg,one,two\n"
    dataset = plain(tmp_path, text)
    assert captions_of(dataset) == {"b.jpg": ["one", "two"]}
    assert dataset.skipped == [("a.jpg", "row of 4 fields under 3 columns")]


def test_the_row_of_flickr30k_without_a_separator_is_repaired(tmp_path):
    text = (
        "image_name| comment_number| comment\n"
        'a.jpg| 3| A "dog | runs .\n'
        "a.jpg| 4   A dog runs across the grass .\n"
        "no row\n"
    )
    dataset = find(write(tmp_path, {"results.csv": text}, "a.jpg"))
    assert captions_of(dataset) == {
        "a.jpg": ['A "dog | runs .', "A dog runs across the grass ."]
    }
    assert dataset.repaired == [
        ("a.jpg", "caption with '|' but no quotes"),
        ("a.jpg", "no separator before the caption"),
    ]
    assert dataset.skipped == [("no row", "row without a caption")]


def test_windows_1252_and_nul_bytes_are_repaired_once_a_file(tmp_path):
    text = "image,caption\na.jpg,größe\n".encode()
    text += "b.jpg,caf\0é €\n".encode("cp1252")
    dataset = plain(tmp_path, text)
    assert captions_of(dataset) == {"a.jpg": ["größe"], "b.jpg": ["café €"]}
    assert dataset.repaired == [
        ("captions.csv", "not UTF-8: read as Windows-1252"),
        ("captions.csv", "NUL bytes removed"),
    ]
    line, _ = dataset.messages
    assert "read as Windows-1252, first in line 3 (b.jpg,café €)" in line


WIDE = ("utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be")


@pytest.mark.parametrize("encoding", ["utf-8", *WIDE])
@pytest.mark.parametrize("mark", ["\ufeff", ""])
def test_an_encoding_is_known_by_its_mark_or_its_zeros(
    tmp_path, mark, encoding
):
    write(tmp_path, {"train.txt": f"{mark}a.jpg\r\n".encode(encoding)})
    text = mark + "image\tcaption\r\na.jpg\tHügel 犬\r\n"
    dataset = plain(tmp_path, text.encode(encoding))
    assert captions_of(dataset) == {"a.jpg": ["Hügel 犬"]}
    assert dataset.summary.endswith("train 1, no val, no test")
    told = [encoding[:6].upper() in each for each in dataset.messages]
    assert told == [True] * (2 * (encoding in WIDE))
    assert not dataset.repaired


@pytest.mark.parametrize(
    "name, reason",
    [
        ("../secret.jpg", "'..' in the image name"),
        ("x/../../secret.jpg", "'..' in the image name"),
        ("..\\secret.jpg", "'..' in the image name"),
        ("{outside}/secret.jpg", "absolute path instead of an image name"),
        ("\\\\server\\x.jpg", "absolute path instead of an image name"),
        ("C:\\secret.jpg", "absolute path instead of an image name"),
        ("c:secret.jpg", "absolute path instead of an image name"),
        ("a\0.jpg", "NUL in the image name"),
        (" ", "no image name"),
        ("\ud800.jpg", "missing"),
    ],
)
def test_names_that_lead_outside_are_skipped(tmp_path, name, reason):
    name = name.format(outside=tmp_path)
    write(tmp_path, {}, "secret.jpg")
    images = [
        {"filename": n, "split": "train", "sentences": [{"raw": "a dog"}]}
        for n in (name, "a.jpg")
    ]
    document = json.dumps({"images": images})
    dataset = find(write(tmp_path / "set", {"dataset.json": document}, "a.jpg"))
    assert list(dataset.table["image"]) == ["a.jpg"]
    assert [why for _, why in dataset.skipped] == [reason]
    dataset.skipped[0][0].encode("utf-8")  # can be written to a file


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_names_in_another_unicode_form_are_those_of_the_files(tmp_path, forms):
    written, there = (normalize(form, "Hügel/grün.jpg") for form in forms)
    write(tmp_path, {"karpathy_splits/train.txt": normalize("NFD", "grün")})
    dataset = plain(tmp_path, f"image,caption\n{written},dog\n", there)
    assert list(dataset.table["image"]) == [there]
    assert dataset.images_dir.joinpath(there).exists()
    assert dataset.summary.endswith("train 1, no val, no test")
    assert dataset.skipped == []


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("hügel.jpg", "there is Hügel.JPG; names are case-sensitive"),
        ("Hügel", "there is Hügel.JPG"),
        ("x/Hügel.JPG", "there is Bilder/Hügel.JPG"),
    ],
)
def test_a_missing_image_that_is_nearly_there_is_named(tmp_path, name, hint):
    text = f"image,caption\n{name},dog\ny/b.jpg,cat\n"
    names = normalize("NFD", "Bilder/Hügel.JPG"), "y/b.jpg"
    ((image, reason),) = plain(tmp_path, text, *names).skipped
    assert (image, normalize("NFC", reason)) == (name, f"missing, but {hint}")


# --- cells with several captions ------------------------------------------

FIVE = ["A dog .", 'it\'s "big" , [old]', "犬\u3000が", "a\\b c", "two\nlines"]
FIVE_READ = [text.replace("\n", " ") for text in FIVE]


WRITERS = [
    json.dumps,
    str,  # as pandas does
    lambda texts: str(tuple(texts)),
    lambda texts: str(np.array(texts)),
    lambda texts: str(np.array(texts, dtype=object)),
    lambda texts: repr(np.array(texts, dtype=object)),
    lambda texts: f"array({texts}, dtype='<U18')",
    lambda texts: str(list(np.array(texts))),  # np.str_('A dog .')
    lambda texts: str([np.array(texts, dtype=object)]),
    lambda texts: str([[text, None] for text in texts]),
    lambda texts: json.dumps([[text, None] for text in texts]),
    lambda texts: str([text.encode() for text in texts]),
    lambda texts: f"{{{json.dumps(texts, ensure_ascii=False)[1:-1]}}}",
]


@pytest.mark.parametrize(
    ("write_list", "ending"),
    zip(WRITERS, itertools.cycle(["csv", "tsv", "json", "jsonl"])),
)
def test_a_list_in_a_cell_is_several_captions(tmp_path, write_list, ending):
    table = pd.DataFrame(
        {
            # What Dataset.to_csv makes of the image itself.
            "image": "{'bytes': b'', 'path': None}",
            "caption": [write_list(FIVE)] * 4,
            "sentids": "[0 1 2 3 4]",
            "filename": IMAGES,
        }
    )
    path = write(tmp_path, {}, *IMAGES) / f"captions.{ending}"
    if ending.startswith("json"):
        options = {"lines": True} if ending == "jsonl" else {}
        table.to_json(path, orient="records", **options)
    else:
        table.to_csv(path, sep="\t" if ending == "tsv" else ",")
    assert captions_of(find(tmp_path)) == dict.fromkeys(IMAGES, FIVE_READ)


@pytest.mark.parametrize(
    "document",
    [
        dict.fromkeys(IMAGES, FIVE),
        [{"image": name, "captions": FIVE} for name in IMAGES],
        [{"file_name": n, "text": text} for n in IMAGES for text in FIVE],
    ],
)
def test_json_of_captions_is_a_table(tmp_path, document):
    write(tmp_path, {"captions.json": json.dumps(document)}, *IMAGES)
    assert captions_of(find(tmp_path)) == dict.fromkeys(IMAGES, FIVE_READ)


@pytest.mark.parametrize(
    "cell",
    [
        "['a dog', 'a c",
        "['it's a dog']",
        r"['\x']",
        "[['a dog'], a]",
        "[{'raw': 'a dog'}]",
        "{'raw': 'a dog'}",
        '[{""raw"": ""a dog""}]',
    ],
)
def test_a_list_that_cannot_be_read_is_not_taken_for_a_caption(tmp_path, cell):
    text = f'image,caption\na.jpg,"{cell}"\nb.jpg,[two] (dogs)\n'
    dataset = plain(tmp_path, text)
    assert captions_of(dataset) == {"b.jpg": ["[two] (dogs)"]}
    reason = "list of captions that cannot be read"
    assert dataset.skipped == [("a.jpg", reason)]


def test_where_no_list_can_be_read_the_first_is_named(tmp_path):
    text = "image,caption\na.jpg,['a dog' ... 'a cat']\n"
    told = "a.jpg: list of captions that cannot be read"
    assert told in refusal(plain, tmp_path, text)


# --- splits ---------------------------------------------------------------


def test_without_lists_the_split_depends_on_the_name_alone(tmp_path):
    names = [f"{number}.jpg" for number in range(2000)]
    whole = of_dogs(tmp_path / "1", names)
    assert "split by a hash of the image names" in whole.summary
    counts = whole.table["split"].value_counts()
    assert abs(counts["val"] - 200) < 50 and abs(counts["test"] - 200) < 50
    part = splits_of(of_dogs(tmp_path / "2", names[500::-1]))
    assert part == {name: splits_of(whole)[name] for name in names[:501]}
    # Written down, so that no change of the hash moves anyone's images.
    known = {"0.jpg": "train", "19.jpg": "val", "26.jpg": "test"}
    assert known.items() <= part.items()


def test_an_image_in_two_lists_stays_held_out(tmp_path):
    files = FOLDERS["kaggle8k"][0] | {
        "Flickr8k_text/Flickr_8k.trainImages.txt": "a.jpg\nb.jpg\nd.jpg\n",
        "Flickr8k_text/Flickr_8k.devImages.txt": "c.jpg\nb.jpg\n",
    }
    dataset = find(write(tmp_path, files, *IMAGES))
    splits = ["train", "val", "val", "test"]
    assert splits_of(dataset) == dict(zip(IMAGES, splits, strict=True))
    assert set(dataset.repaired) == {
        ("b.jpg", "in train and in val: kept in val"),
        ("d.jpg", "in train and in test: kept in test"),
    }


LISTED = [f"{number}.jpg" for number in range(7000, 7060, 3)]


def listed(folder: Path, lists: dict[str, list[str]]) -> Dataset:
    """A dataset of LISTED with split lists."""
    write(folder, {name: "\n".join(names) for name, names in lists.items()})
    return of_dogs(folder, LISTED)


SPELLINGS = [
    lambda name: name[:-4],
    lambda name: f"Images/{name}",
    lambda name: f"C:\\data\\{name}",
    lambda name: f"{name}#0",
    lambda name: name.upper(),
    lambda name: name.replace("jpg", "png"),
    lambda name: f'"{name}"\r',
    lambda name: f"{name} 1",
    lambda name: f"17,{name},a dog with, a ball",
]
LISTS = [
    ("Train.txt", "VAL.TXT"),
    ("lists/of/karpathy_train.csv", "lists/of/karpathy_dev.csv"),
    ("FLICKR_8K.trainimages.txt", "FLICKR_8K.devimages.txt"),
    ("train.tsv", "val.TSV"),
    ("train.lst", "val.lst"),
]


@pytest.mark.parametrize(
    ("spell", "names"), zip(SPELLINGS, itertools.cycle(LISTS))
)
def test_split_lists_are_found_and_understood(tmp_path, spell, names):
    train, val = ([*map(spell, each)] for each in (LISTED[:15], LISTED[15:]))
    dataset = listed(tmp_path, dict(zip(names, (train, val), strict=True)))
    assert dataset.summary.endswith("train 15, val 5, no test")
    assert dataset.skipped == dataset.repaired == dataset.messages == []


def test_a_list_is_read_by_the_names_of_its_columns(tmp_path):
    images = [f"{number}.jpg" for number in range(20)]
    rows = [f"{19 - n},{name[:-4]}" for n, name in enumerate(images[:15])]
    lists = {
        "train.csv": "\n".join([",image", *rows]),
        "val.csv": "\n".join(["id,filename", "3,18", "4,19.jpg"]),
    }
    dataset = of_dogs(write(tmp_path, lists), images)
    assert dataset.summary.endswith("train 15, val 2, no test")
    (message,) = dataset.messages
    assert message.startswith("3 of 20 images are left out (in no split list)")


def test_a_run_in_the_dataset_folder_has_no_list(tmp_path):
    table = runs.digest_images(LISTED, np.ones((len(LISTED), 16), np.uint8))
    text = table.to_csv(index=False)
    write(tmp_path, {f"checkpoints/run/{runs.IMAGES}": text})
    dataset = listed(tmp_path, {})
    assert "split by a hash" in dataset.summary
    assert dataset.messages == []


def test_captions_beside_images_are_no_lists_of_theirs(tmp_path):
    """Not even that of a train, which has a word that is another image."""
    files = {"train.txt": "a train\n", "dog.txt": "a dog beside a train\n"}
    write(tmp_path, files, "train.jpg", "dog.jpg")
    dataset = find(tmp_path)
    assert captions_of(dataset) == {
        "dog.jpg": ["a dog beside a train"],
        "train.jpg": ["a train"],
    }
    assert "lists" not in "".join(dataset.messages)


def test_a_file_beside_an_image_without_a_caption_is_reported(tmp_path):
    files = {"a.txt": "a dog\n", "b.json": '{"labels": ["dog"]}'}
    dataset = find(write(tmp_path, files, "a.jpg", "b.jpg"))
    assert dataset.skipped == [("b.jpg", "no caption in b.json")]


@pytest.mark.skipif(sys.platform != "linux", reason="names are Unicode there")
def test_nor_does_a_name_that_is_no_utf_8_stop_that(tmp_path):
    write(tmp_path, {"a.txt": "a dog\n"}, "a.jpg")
    for ending, content in ((".jpg", "x"), (".json", '{"labels": []}')):
        path = os.path.join(os.fsencode(tmp_path), b"\xff" + ending.encode())
        Path(os.fsdecode(path)).write_text(content)
    assert find(tmp_path).skipped == [("?.jpg", "no caption in ?.json")]


@pytest.mark.parametrize(
    "table",
    [
        "caption,image,image_number\na dog,a.jpg,1\n\na cat,b.jpg,2\n",
        "number,caption,image\n1,a dog,a.jpg\n4 dogs run\n2,a cat,b.jpg\n",
    ],
)
def test_a_row_that_ends_before_its_image_stops_nothing(tmp_path, table):
    found = captions_of(plain(tmp_path, table))
    assert found == {"a.jpg": ["a dog"], "b.jpg": ["a cat"]}


def test_lists_in_json_are_said_not_to_be_read(tmp_path):
    lists = {"train.json": LISTED[:15], "val.JSON": LISTED[15:]}
    dataset = listed(tmp_path, lists)
    assert "split by a hash" in dataset.summary
    (message,) = dataset.messages
    assert message.startswith("Not used as split lists: train.json, val.JSON")


@pytest.mark.parametrize("hits", [0, 1])
def test_lists_of_another_dataset_stop_in_one_line(tmp_path, hits):
    others = [f"other{number}.jpg" for number in range(20)]
    lists = {"splits/train.txt": LISTED[:hits] + others, "splits/val.txt": []}
    message = refusal(listed, tmp_path, lists)
    assert str(Path("splits", "train.txt")) in message
    assert f"name {hits} of the 20 images" in message
    assert "other0.jpg" in message and "7000.jpg" in message


def test_names_in_a_list_that_match_no_image_are_told(tmp_path):
    lists = {"train.txt": [*LISTED, "gone.jpg"], "val.txt": ["far/away.jpg"]}
    assert listed(tmp_path, lists).messages == [
        "train.txt: 1 of 21 names match no image, such as gone.jpg (images are "
        "named like 7000.jpg).",
        "val.txt: 1 of 1 names match no image, such as far/away.jpg (images "
        "are named like 7000.jpg).",
    ]


def test_of_several_kinds_of_lists_the_one_with_most_images_is_used(tmp_path):
    lists = {"notes_test.txt": ["what I tried"]}
    dataset = listed(tmp_path / "one", lists)
    assert "split by a hash" in dataset.summary
    assert dataset.messages == ["Not used as split lists: notes_test.txt."]
    lists["train.txt"] = LISTED[:2]
    lists["deep/er/Flickr_8k.trainImages.txt"] = LISTED[:9]
    dataset = listed(tmp_path / "two", lists)
    assert "split by deep/er/Flickr_8k.*Images.txt" in dataset.summary
    unused = "Not used as split lists: notes_test.txt, train.txt."
    assert unused in dataset.messages


def test_a_name_that_fits_two_images_is_matched_with_neither(tmp_path):
    names = ["x/1.jpg", "y/1.jpg", "y/2.jpg", "3.jpg", "z/3.jpg"]
    write(tmp_path, {"train.txt": "1.jpg\n2.jpg\n3.jpg\n"})
    dataset = of_dogs(tmp_path, names)
    assert list(dataset.table["image"]) == ["3.jpg", "y/2.jpg"]
    assert "such as 1.jpg" in dataset.messages[0]


def test_a_missing_image_is_not_replaced_by_one_of_another_ending(tmp_path):
    write(tmp_path, {"train.txt": "b.jpg\n", "val.txt": "a.png\n"})
    rows = "a.png,dog\na.jpg,dog\nb.jpg,dog\n"
    dataset = plain(tmp_path, "image,caption\n" + rows)
    assert list(dataset.table["image"]) == ["b.jpg"]


def test_rows_with_another_split_or_none_are_told(tmp_path):
    text = (
        "image,caption,split\na.jpg,dog,Validation\na.jpg,dog two,train\n"
        "b.jpg,cat,holdout\nc.jpg,cow,\n"
    )
    dataset = plain(tmp_path, text, *IMAGES)
    assert list(dataset.table["split"]) == ["val", "val"]
    assert dataset.repaired == [("a.jpg", "in train and in val: kept in val")]
    reason = "no known split"
    assert dataset.skipped == [("b.jpg", reason), ("c.jpg", reason)]


@pytest.mark.parametrize("column", ["subset", "Set", "fold", "partition"])
def test_a_column_of_nothing_but_splits_is_the_split(tmp_path, column):
    rows = [["a.jpg", "train"], ["b.jpg", "dev"], ["c.jpg", "Validation"]]
    objects = [{"image": i, "text": "dog", column: s} for i, s in rows]
    splits = {"a.jpg": "train", "b.jpg": "val", "c.jpg": "val"}
    for file, text in {
        "captions.csv": pd.DataFrame(objects).to_csv(),
        "captions.json": json.dumps(objects),
    }.items():
        write(tmp_path / file, {file: text}, *IMAGES)
        assert splits_of(find(tmp_path / file)) == splits
    text = f"image,caption,{column}\na.jpg,dog,train\nb.jpg,dog,Flickr\n"
    assert "split by a hash" in plain(tmp_path / "a", text, *IMAGES).summary
    text = f"image,caption,{column},split\na.jpg,dog,train,test\n"
    assert splits_of(plain(tmp_path / "b", text, *IMAGES)) == {"a.jpg": "test"}


def test_equal_pixels_in_two_splits_are_found():
    splits = {"a": "train", "b": "test", "c": "train", "d": "val", "e": "test"}
    table = pd.DataFrame({"image": [*splits], "split": splits.values()})
    same = {"a": "1", "b": "1", "c": "1", "d": "2", "e": "3", "gone": "2"}
    pairs = equal_pixels_across_splits(same, table)
    assert pairs == [("a", "b"), ("b", "c")]
    assert equal_pixels_across_splits({"a": "1", "c": "1"}, table) == []


# --- errors ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jpg", "", ": expected one of dataset_"),
        ("captions.csv", "a,b\n", "must name the columns"),
        ("captions.csv", "", "must name the columns"),
        ("captions.txt", "image,caption\n", "no captions in it"),
        (
            "captions.csv",
            'image,caption\n"x\ny.jpg",dog\n',
            "none of its images can be used; the first is x y.jpg (missing)",
        ),
        ("dataset.json", "{", "not valid JSON"),
        ("dataset.json", "[" * 100_000, "not valid JSON"),
        ("dataset.json", "[1]", "has no list 'images'"),
        ("captions_x.json", '{"images": []}', "no list 'annotations'"),
    ],
)
def test_what_is_no_dataset_is_one_line(tmp_path, name, text, message):
    line = refusal(find, write(tmp_path, {name: text}))
    assert message in line
    assert "data/README.md" in line or "download it again" in line


def test_a_missing_folder_is_named(tmp_path):
    place = tmp_path / "nowhere"
    assert f"no folder {place}" in refusal(find, place)


# --- any bytes ------------------------------------------------------------

_FILES = {
    "karpathy": ("dataset.json", json.dumps(KARPATHY)),
    "huggingface": ("flickr_annotations_30k.csv", HUGGINGFACE),
    "coco": ("captions_train2017.json", coco({7: "a.jpg", 8: "a.jpg"})),
    "plain": ("captions.csv", PLAIN),
    "kaggle30k": ("results.csv", KAGGLE30K),
    "kaggle8k": ("captions.txt", KAGGLE8K),
    "token": ("x.token", TOKEN),
    "imagefolder": (
        "metadata.jsonl",
        '{"file_name": "a.jpg", "text": ["one", "two"]}\n' * 3,
    ),
}
# fmt: off
_PIECES = st.sampled_from([
    b"a.jpg", b"../a", b"#0\t", b"| 0| ", b"| 4 ", b",", b'"', b'""', b"\n",
    b"\r", b"\r\n", b"\0", b"\xff", b"\xef\xbb\xbf", b"dog", b"[", b"]",
    b"train", b"&amp;", b"&#0;", b"\\ud800", b";", b"\xc2\x85",
])
_KEYS = st.sampled_from([
    "images", "annotations", "filename", "filepath", "file_name", "split",
    "sentences", "raw", "id", "image_id", "cocoid", "caption",
])
# fmt: on
_PIECE = st.one_of(_PIECES, st.binary(max_size=8))
_TEXT = st.lists(_PIECE).map(b"".join)
_WORDS = st.sampled_from(
    ["a.jpg", "", "../a", "train", "\ud800", "\0", "a dog"]
)
_SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | _WORDS
_JSON = st.recursive(
    _SCALARS,
    lambda inner: st.lists(inner) | st.dictionaries(_KEYS, inner),
    max_leaves=20,
)
_IDS = st.integers(0, 3)
# Fields of an image, and those of an annotation.
_ITEMS = st.fixed_dictionaries(
    {
        "filename": _SCALARS,
        "file_name": _SCALARS,
        "caption": _SCALARS,
        "split": st.sampled_from(["train", "restval", "dev"]) | _SCALARS,
        "id": _IDS,
        "image_id": _IDS | _JSON,
        "sentences": st.lists(st.fixed_dictionaries({"raw": _SCALARS})),
    },
    optional={"cocoid": _SCALARS, "filepath": _SCALARS},
)
_LISTS = st.lists(_ITEMS | st.dictionaries(_KEYS, _JSON))
_DOCUMENTS = st.fixed_dictionaries({"images": _LISTS, "annotations": _LISTS})


def damaged(whole: bytes) -> st.SearchStrategy[bytes]:
    """A sound file with pieces put in or in place of others, or cut off."""
    places = st.integers(0, len(whole))
    changes = st.lists(st.tuples(places, st.integers(0, 9), _PIECE), max_size=5)

    def change(changes: list, length: int) -> bytes:
        data = whole
        for place, gone, piece in changes:
            data = data[:place] + piece + data[place + gone :]
        return data[:length]

    return st.builds(change, changes, st.just(len(whole) + 40) | places)


def check(folder: Path, layout: str, data: bytes) -> str:
    """Holds what any caption file must give: a table or one line."""
    shutil.rmtree(folder, ignore_errors=True)
    write(folder, {_FILES[layout][0]: data}, "a.jpg")
    try:
        dataset = find(folder)
    except UserError as error:
        assert "\n" not in str(error)
        return "one line"
    table = dataset.table
    assert len(table) and set(table["image"]) == {"a.jpg"}
    assert set(table["split"]) <= set(SPLITS)
    assert table.groupby("image")["split"].nunique().max() == 1
    assert table["caption"].str.strip().str.len().min() > 0
    assert {*map(type, table["image_id"])} in ({int}, {str})
    # Whatever is told can be written and read again.
    table.to_csv(folder / "table.csv", encoding="utf-8")
    for name, reason in dataset.skipped + dataset.repaired:
        assert f"{name} {reason}".encode()
    return "a table"


@pytest.mark.parametrize("layout", _FILES)
def test_any_bytes_give_a_table_or_one_line(tmp_path, layout):
    found = set()

    @settings(max_examples=80, deadline=None)
    @given(damaged(_FILES[layout][1].encode()) | _TEXT)
    @example(b"")
    @example(_FILES[layout][1].encode())
    def fuzz(data: bytes) -> None:
        found.add(check(tmp_path, layout, data))

    fuzz()
    assert found == {"a table", "one line"}


@pytest.mark.parametrize("layout", ["karpathy", "coco"])
def test_any_json_gives_a_table_or_one_line(tmp_path, layout):
    found = set()

    @settings(max_examples=80, deadline=None)
    @given(_DOCUMENTS | _JSON)
    @example(json.loads(_FILES[layout][1]))
    def fuzz(document: object) -> None:
        found.add(check(tmp_path, layout, json.dumps(document).encode()))

    fuzz()
    assert found == {"a table", "one line"}


# --- real data ------------------------------------------------------------


@pytest.fixture
def quickly_tokenised(monkeypatch):
    """Most of the time a real dataset takes goes into its captions' words."""
    monkeypatch.setattr(vocabulary, "tokenise", str.split)


@pytest.mark.real_data
@pytest.mark.usefixtures("quickly_tokenised")
def test_both_layouts_of_flickr8k_give_the_same_table(real_data):
    folder = real_data / "data" / "flickr8k"
    kaggle, token = find(folder), find(folder, "token")
    assert kaggle.layout == "kaggle8k"
    pd.testing.assert_frame_equal(kaggle.table, token.table)
    assert kaggle.skipped == kaggle.repaired == token.repaired == []
    assert token.skipped == [("2258277193_586949ec62.jpg.1", "missing")]
    assert kaggle.summary.endswith(
        "captions.txt: 7,000 images, 35,000 captions; split by "
        "splits/Flickr_8k.*Images.txt: train 6,000, val 1,000, no test"
    )


@pytest.mark.real_data
@pytest.mark.usefixtures("quickly_tokenised")
def test_flickr30k_as_kaggle_has_it_is_read(real_data, tmp_path):
    source = real_data / "data" / "flickr30k_subset"
    shutil.copy(source / "results.csv", tmp_path)
    shutil.copytree(source / "karpathy_splits", tmp_path / "karpathy_splits")
    lines = (source / "results.csv").read_text(encoding="utf-8").splitlines()
    names = {line.split("|")[0] for line in lines[1:]}
    write(tmp_path, {}, *(f"flickr30k_images/{name}" for name in names))
    dataset = find(tmp_path)
    assert dataset.layout == "kaggle30k"
    assert len(dataset.table) == len(lines) - 1
    assert [image for image, _ in dataset.repaired] == ["2199200615.jpg"]
    assert dataset.skipped == []
    assert dataset.summary.endswith(
        "split by karpathy_splits/*.txt: train 6,043, val 210, test 209"
    )
