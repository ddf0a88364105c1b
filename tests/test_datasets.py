"""Every layout people have, and every state its files come in."""

import json
import shutil
from pathlib import Path
from unicodedata import normalize

import numpy as np
import pandas as pd
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from captioning.data.datasets import (
    Dataset,
    equal_pixels_across_splits,
    find_dataset,
)
from config import LAYOUTS, SPLITS, UserError


def write(folder: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):
            content = content.encode("utf-8")
        (folder / name).write_bytes(content)
    return folder


def find(folder: Path, layout: str = "auto") -> Dataset:
    return find_dataset(folder, layout, 0.1, 0.1)


def plain(folder: Path, captions: str | bytes, *images: str) -> Dataset:
    """A dataset of one captions.csv with its images beside it."""
    names = images or ("a.jpg", "b.jpg")
    write(folder, {"captions.csv": captions, **dict.fromkeys(names, b"x")})
    return find(folder, "plain")


def captions_of(dataset: Dataset) -> dict[str, list[str]]:
    return dataset.table.groupby("image")["caption"].apply(list).to_dict()


# --- layouts --------------------------------------------------------------

KARPATHY = {
    "images": [
        {
            "filename": name,
            "split": split,
            "sentences": [{"raw": f"{name} one"}, {"raw": f"{name} two"}],
        }
        for name, split in [
            ("a.jpg", "train"),
            ("b.jpg", "restval"),
            ("c.jpg", "val"),
            ("d.jpg", "test"),
        ]
    ]
}
HUGGINGFACE = "raw,sentids,split,filename,img_id\n" + "".join(
    f'"[""{name} one"", ""{name} two""]","[0, 1]",{split},{name},{number}\n'
    for number, (name, split) in enumerate(
        [
            ("a.jpg", "train"),
            ("b.jpg", "train"),
            ("c.jpg", "val"),
            ("d.jpg", "test"),
        ]
    )
)
SPLIT_OF = {"a": "train", "b": "train", "c": "val", "d": "test"}
PAIRS = [(n, w) for n in ("a", "b", "c", "d") for w in ("one", "two")]
PLAIN = "image,caption,split\n" + "".join(
    f"{n}.jpg,{n}.jpg {w},{split}\n"
    for n, w in PAIRS
    for split in [{**SPLIT_OF, "c": "dev"}[n]]
)
KAGGLE30K = "image_name| comment_number| comment\n" + "".join(
    f"{n}.jpg| {['one', 'two'].index(w)}| {n}.jpg {w}\n" for n, w in PAIRS
)
KAGGLE8K = "image,caption\n" + "".join(
    f"{n}.jpg,{n}.jpg {w}\n" for n, w in PAIRS
)
TOKEN = "".join(
    f"{n}.jpg#{['one', 'two'].index(w)}\t{n}.jpg {w}\n" for n, w in PAIRS
)
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
# What people have in their folder; all say the same.
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
}


@pytest.mark.parametrize("layout", FOLDERS)
@pytest.mark.parametrize("asked", ["auto", "the layout"])
def test_every_flickr_layout_gives_the_same_table(tmp_path, layout, asked):
    files, folder = FOLDERS[layout]
    images = [f"{folder}/{name}.jpg" for name in "abcd"]
    write(tmp_path, {**files, **dict.fromkeys(images, b"x")})
    dataset = find(tmp_path, "auto" if asked == "auto" else layout)
    assert dataset.layout == layout
    assert dataset.images_dir == tmp_path / folder
    assert dataset.skipped == dataset.repaired == []
    wanted = pd.DataFrame(
        [
            (f"{n}.jpg", split, f"{n}.jpg {w}", f"{n}.jpg {w}", f"{n}.jpg")
            for n, w in PAIRS
            for split in [SPLIT_OF[n]]
        ],
        columns=["image", "split", "caption", "tokens", "image_id"],
    )
    pd.testing.assert_frame_equal(dataset.table, wanted)
    assert "4 images, 8 captions" in dataset.summary
    assert dataset.summary.endswith(": train 2, val 1, test 1")


TWICE = "flickr30k_images/flickr30k_images"


@pytest.mark.parametrize(
    "files, folder",
    [
        ({"results.csv": KAGGLE30K}, "flickr30k_images"),
        ({f"{TWICE}/results.csv": KAGGLE30K}, TWICE),
        (
            {"archive/flickr30k_images/results.csv": KAGGLE30K},
            f"archive/{TWICE}",
        ),
        ({"results_20130124.token": TOKEN}, "flickr30k-images"),
        ({"flickr30k/results_20130124.token": TOKEN}, "flickr30k-images"),
        ({"dataset_flickr30k.json": json.dumps(KARPATHY)}, "."),
        ({"dataset_flickr8k.json": json.dumps(KARPATHY)}, "Images"),
        ({"flickr_annotations_30k.csv": HUGGINGFACE}, "."),
    ],
)
def test_archives_are_read_as_they_unpack(tmp_path, files, folder):
    images = [f"{folder}/{name}.jpg" for name in "abcd"]
    write(tmp_path, {**files, **dict.fromkeys(images, b"x")})
    dataset = find(tmp_path)
    assert dataset.images_dir == tmp_path / folder
    wanted = {f"{n}.jpg": [f"{n}.jpg one", f"{n}.jpg two"] for n in "abcd"}
    assert captions_of(dataset) == wanted
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


def test_captions_in_folders_of_splits_share_the_images_of_one(tmp_path):
    write(
        tmp_path,
        {
            "train/captions.csv": "image,caption\na.jpg,one\n",
            "test/captions.csv": "image,caption\nb.jpg,two\n",
        },
    )
    write(tmp_path, {"Images/a.jpg": b"x", "Images/b.jpg": b"x"})
    dataset = find(tmp_path)
    splits = dict(dataset.table[["image", "split"]].values)
    assert splits == {"a.jpg": "train", "b.jpg": "test"}


def test_a_folder_for_train_alone_is_no_split(tmp_path):
    files = {name: x for name, x in IMAGEFOLDER.items() if "train" in name}
    assert "split by a hash" in find(write(tmp_path, files)).summary


@pytest.mark.parametrize("held_out", ["val", "test"])
def test_images_in_folders_called_as_splits_are_split_by_them(
    tmp_path, held_out
):
    names = [f"train/{n}.jpg" for n in range(60)] + [f"{held_out}/x.jpg"]
    rows = "".join(f"{name},a dog\n" for name in names)
    dataset = plain(tmp_path, "image,caption\n" + rows, *names)
    splits = dict(dataset.table[["image", "split"]].values)
    assert splits.pop(f"{held_out}/x.jpg") == held_out
    assert "split by folder" in dataset.summary
    # Only where there is no val, some of train becomes it.
    wanted = {"train"} if held_out == "val" else {"train", "val"}
    assert {*splits.values()} == wanted


def test_what_lies_deeper_gives_way_to_what_lies_above(tmp_path):
    write(
        tmp_path,
        {
            "captions.txt": KAGGLE8K,
            "backup/old/dataset.json": json.dumps(KARPATHY),
            "Images/a.jpg": b"x",
        },
    )
    assert find(tmp_path).layout == "kaggle8k"


def coco(names: dict[int, str]) -> str:
    return json.dumps(
        {
            "images": [{"id": i, "file_name": n} for i, n in names.items()],
            "annotations": [{"image_id": i, "caption": "cat"} for i in names],
        }
    )


@pytest.mark.parametrize("flat", [False, True])
def test_coco_takes_its_split_and_folder_from_the_file_name(tmp_path, flat):
    folders = ("images", "images") if flat else ("train2017", "val2017")
    write(
        tmp_path,
        {
            "annotations/captions_train2017.json": coco({7: "7.jpg"}),
            "annotations/captions_val2017.json": coco({0: "0.jpg"}),
            "annotations/captions_train2014.json": coco({9: "9.jpg"}),
            "annotations/instances_train2017.json": "{}",
            f"{folders[0]}/7.jpg": b"x",
            f"{folders[1]}/0.jpg": b"x",
        },
    )
    dataset = find(tmp_path)
    table = dataset.table.set_index("image_id")
    assert table["split"].to_dict() == {7: "train", 0: "val"}
    names = {"7.jpg", "0.jpg"} if flat else {"train2017/7.jpg", "val2017/0.jpg"}
    assert set(table["image"]) == names
    assert all((dataset.images_dir / name).exists() for name in names)
    assert dataset.summary.endswith("train 1, val 1, no test")
    assert dataset.skipped == []  # the files of 2014 are another dataset


def test_karpathys_coco_file_uses_filepath_and_cocoid(tmp_path):
    image = {
        "filepath": "val2014",
        "filename": "x.jpg",
        "cocoid": 42,
        "split": "restval",
        "sentences": [{"raw": "a cat"}],
    }
    document = json.dumps({"images": [image]})
    write(
        tmp_path, {"dataset_coco.json": document, "images/val2014/x.jpg": b""}
    )
    dataset = find(tmp_path)
    assert dataset.images_dir == tmp_path / "images"
    row = ["val2014/x.jpg", "train", "a cat", "a cat", 42]
    assert dataset.table.values.tolist() == [row]


@pytest.mark.parametrize("number", [None, "7", 7, 10**30, [1]])
def test_numbers_that_some_images_lack_or_share_are_not_used(tmp_path, number):
    images = [
        {**image, "cocoid": value}
        for image, value in zip(KARPATHY["images"], [7, number], strict=False)
    ]
    document = json.dumps({"images": images})
    dataset = find(
        write(
            tmp_path,
            {"dataset_coco.json": document, "a.jpg": b"x", "b.jpg": b"x"},
        )
    )
    assert (dataset.table["image_id"] == dataset.table["image"]).all()


def test_of_several_files_the_one_these_images_belong_to_is_taken(tmp_path):
    other = json.dumps(KARPATHY).replace(".jpg", "_8k.jpg")
    write(
        tmp_path,
        {
            "dataset_flickr30k.json": json.dumps(KARPATHY),
            "dataset_flickr8k.json": other,
            "Images/a_8k.jpg": b"x",
        },
    )
    assert set(find(tmp_path).table["image"]) == {"a_8k.jpg"}


def test_the_documented_order_of_layouts_holds(tmp_path):
    everything = {"captions_train2017.json": coco({7: "a.jpg"})}
    for files, _ in FOLDERS.values():
        everything.update(files)
    write(tmp_path, {**everything, "Images/a.jpg": b"x"})
    for layout in LAYOUTS[1:]:
        assert find(tmp_path).layout == layout
        assert find(tmp_path, layout).layout == layout
        names = [*FOLDERS.get(layout, [["captions_train2017.json"]])[0]]
        for name in names:
            (tmp_path / name).unlink(missing_ok=True)
    page = Path(__file__).parent.parent / "data" / "README.md"
    page = page.read_text(encoding="utf-8")
    places = [page.index(f"### `{layout}`") for layout in LAYOUTS[1:]]
    assert places == sorted(places)


def test_the_folder_that_holds_the_images_is_found(tmp_path):
    write(
        tmp_path,
        {
            "captions.csv": "image,caption\na.jpg,dog\nb.jpg,cat\n",
            "Images/a.jpg": b"x",
            "archive/pictures/a.jpg": b"x",
            "archive/pictures/b.jpg": b"x",
            "__MACOSX/archive/pictures/._a.jpg": b"x",
        },
    )
    assert find(tmp_path).images_dir == tmp_path / "archive" / "pictures"


def test_the_usual_folder_wins_over_a_copy_of_it(tmp_path):
    write(
        tmp_path,
        {
            "captions.csv": "image,caption\na.jpg,dog\n",
            "Crops/a.jpg": b"x",
            "Images/a.jpg": b"x",
        },
    )
    assert find(tmp_path).images_dir == tmp_path / "Images"


def test_links_are_followed_and_circles_end(tmp_path):
    write(tmp_path, {"elsewhere/a.jpg": b"x"})
    folder = write(
        tmp_path / "set", {"captions.csv": "image,caption\na.jpg,dog\n"}
    )
    (folder / "Images").symlink_to(tmp_path / "elsewhere")
    (folder / "circle").symlink_to(folder)
    (folder / "itself").symlink_to("itself")
    assert find(folder).images_dir == folder / "Images"


def test_names_with_folders_are_kept_with_forward_slashes(tmp_path):
    dataset = plain(
        tmp_path, "image,caption\nx\\a.jpg,dog\n./y//b.jpg,cat\n", "x/a.jpg",
        "y/b.jpg",
    )  # fmt: skip
    assert captions_of(dataset) == {"x/a.jpg": ["dog"], "y/b.jpg": ["cat"]}


@pytest.mark.parametrize(
    "name", ["a b.jpg", "größe 犬.jpg", "a,b;'c'.jpg", "A.JPG", "#1.jpg"]
)
def test_any_image_name_is_found(tmp_path, name):
    dataset = plain(tmp_path, f'image,caption\n"{name}",dog\n', name)
    assert list(dataset.table["image"]) == [name]
    write(tmp_path, {"x.token": f"{name}#0\tdog\n"})
    assert list(find(tmp_path, "token").table["image"]) == [name]


# --- damage ---------------------------------------------------------------


def test_commas_and_quotes_in_kaggles_captions_are_kept(tmp_path):
    text = 'image,caption\na.jpg,"A "" big "" dog , running ."\nb.jpg,"a, b"\n'
    write(tmp_path, {"captions.txt": text, "a.jpg": b"x", "b.jpg": b"x"})
    dataset = find(tmp_path)
    assert captions_of(dataset) == {
        "a.jpg": ['A " big " dog , running .'],
        "b.jpg": ["a, b"],
    }
    assert dataset.repaired == []


def test_the_row_of_flickr30k_without_a_separator_is_repaired(tmp_path):
    text = (
        "image_name| comment_number| comment\n"
        '2199200615.jpg| 3| A "dog | runs .\n'
        "2199200615.jpg| 4   A dog runs across the grass .\n"
        "no row\n"
    )
    write(tmp_path, {"results.csv": text, "2199200615.jpg": b"x"})
    dataset = find(tmp_path)
    assert list(dataset.table["caption"]) == [
        'A "dog | runs .',
        "A dog runs across the grass .",
    ]
    assert dataset.repaired == [
        ("2199200615.jpg", "caption with '|' but no quotes"),
        ("2199200615.jpg", "no separator before the caption"),
    ]
    assert dataset.skipped == [("no row", "row without a caption")]


def test_a_quote_that_does_not_close_costs_no_other_row(tmp_path):
    text = 'image,caption\na.jpg,"a dog\nb.jpg,"a cat, sitting"\n'
    dataset = plain(tmp_path, text)
    assert captions_of(dataset) == {
        "a.jpg": ["a dog"],
        "b.jpg": ["a cat, sitting"],
    }
    reason = "quotes that do not match: read line by line"
    assert dataset.repaired == [("captions.csv", reason)]


def test_a_field_above_pythons_limit_costs_only_its_row(tmp_path):
    text = f"image,caption\na.jpg,{'x' * 200_000}\nb.jpg,cat\n"
    dataset = plain(tmp_path, text)
    assert captions_of(dataset) == {"b.jpg": ["cat"]}
    assert dataset.skipped[0][1] == "row that is not valid CSV"


@pytest.mark.parametrize(
    "text",
    [
        "image,caption,split\na.jpg,red, white, blue,val\n",
        'image,caption,split\na.jpg,"red, white, blue",val,,\n',
        "image;caption;split\na.jpg;red, white, blue;val\n",
        "Caption\tImage_Name \tSplit\nred, white, blue\ta.jpg\tval\n",
        'split, image, caption\nval, a.jpg, "red, white, blue"\n',
        '\ufeffimage,caption,split\r\na.jpg,"red, white, blue",val\r\n',
        'image,caption,split\ra.jpg,"red, white, blue",val\r',
        '\n\nimage,caption,split\na.jpg,"red, white, blue",val'.lstrip(),
    ],
)
def test_csv_as_people_write_it_is_understood(tmp_path, text):
    table = plain(tmp_path, text).table.drop(columns="tokens")
    row = ["a.jpg", "val", "red, white, blue", "a.jpg"]
    assert table.values.tolist() == [row]


def test_windows_1252_and_nul_bytes_are_repaired_once_a_file(tmp_path):
    text = "image,caption\na.jpg,größe\n".encode()
    text += "b.jpg,caf\0é €\n".encode("cp1252")
    dataset = plain(tmp_path, text)
    assert captions_of(dataset) == {"a.jpg": ["größe"], "b.jpg": ["café €"]}
    assert dataset.repaired == [
        ("captions.csv", "not UTF-8: read as Windows-1252"),
        ("captions.csv", "NUL bytes removed"),
    ]


@pytest.mark.parametrize(
    "encoding", ["utf-16", "utf-16-be", "utf-16-le", "utf-32", "utf-8-sig"]
)
def test_an_encoding_with_a_byte_order_mark_is_read_by_it(tmp_path, encoding):
    mark = "\ufeff" if encoding[-2:] in ("be", "le") else ""
    text = mark + "image\tcaption\r\na.jpg\tHügel 犬\r\n"
    dataset = plain(tmp_path, text.encode(encoding))
    assert captions_of(dataset) == {"a.jpg": ["Hügel 犬"]}
    family = encoding[:6].upper()
    assert [family in each for each in dataset.messages] == [True] * (
        encoding != "utf-8-sig"
    )


@pytest.mark.parametrize("layout", FOLDERS)
def test_every_layout_says_if_a_file_is_not_utf_8(tmp_path, layout):
    files, folder = FOLDERS[layout]
    images = [f"{folder}/{name}.jpg" for name in "abcd"]
    damaged = {
        n: x.replace("one", "café").encode("cp1252") for n, x in files.items()
    }
    write(tmp_path, {**damaged, **dict.fromkeys(images, b"x")})
    if layout == "karpathy":  # JSON is ASCII as a rule
        text = json.dumps(KARPATHY, ensure_ascii=False).replace("one", "café")
        write(tmp_path, {next(iter(files)): text.encode("cp1252")})
    dataset = find(tmp_path, layout)
    assert captions_of(dataset)["a.jpg"][0] == "a.jpg café"
    assert "is not UTF-8: read as Windows-1252" in dataset.messages[0]
    assert "café" in dataset.messages[0]


def test_captions_are_cleaned_and_told_of(tmp_path):
    text = (
        "image,caption\n"
        "a.jpg,  salt &amp; &quot;pepper&quot; \n"
        'b.jpg,"two\nlines\x07 and\u2028more"\n'
    )
    dataset = plain(tmp_path, text)
    assert captions_of(dataset) == {
        "a.jpg": ['salt & "pepper"'],
        "b.jpg": ["two lines  and more"],
    }
    assert dataset.repaired == [
        ("a.jpg", "HTML in a caption"),
        ("b.jpg", "control characters in a caption"),
    ]


def test_long_and_foreign_captions_are_kept(tmp_path):
    text = f"image,caption\na.jpg,{'word ' * 500}\nb.jpg,犬が走る\n"
    dataset = plain(tmp_path, text)
    assert len(captions_of(dataset)["a.jpg"][0].split()) == 500
    assert captions_of(dataset)["b.jpg"] == ["犬が走る"]
    assert dataset.repaired == dataset.skipped == []


def test_captions_without_words_are_skipped(tmp_path):
    text = (
        "image,caption\na.jpg,\na.jpg,NaN\na.jpg, ... !\na.jpg\nb.jpg,a dog\n"
        "a.jpg,&nbsp;\n"
    )
    dataset = plain(tmp_path, text)
    assert captions_of(dataset) == {"b.jpg": ["a dog"]}
    assert set(dataset.skipped) == {
        ("a.jpg", "caption is empty"),
        ("a.jpg", "caption without a word"),
        ("a.jpg", "row without a caption"),
    }


def test_missing_images_are_skipped_once(tmp_path):
    text = "image,caption\nnone.jpg,one\nnone.jpg,two\na.jpg,dog\nA.jpg,cat\n"
    dataset = plain(tmp_path, text)
    assert captions_of(dataset) == {"a.jpg": ["dog"]}
    hint = "missing: there is a.jpg; upper and lower case count"
    assert dataset.skipped == [("none.jpg", "missing"), ("A.jpg", hint)]


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
    write(tmp_path, {"secret.jpg": b"x"})
    images = [
        {"filename": n, "split": "train", "sentences": [{"raw": "a dog"}]}
        for n in (name, "a.jpg")
    ]
    folder = write(
        tmp_path / "set",
        {"dataset.json": json.dumps({"images": images}), "a.jpg": b"x"},
    )
    dataset = find(folder)
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
        ("hügel.jpg", "there is Hügel.JPG; upper and lower case count"),
        ("Hügel", "there is Hügel.JPG"),
        ("x/Hügel.JPG", "there is Bilder/Hügel.JPG"),
    ],
)
def test_a_missing_image_that_is_nearly_there_is_named(tmp_path, name, hint):
    text = f"image,caption\n{name},dog\ny/b.jpg,cat\n"
    names = normalize("NFD", "Bilder/Hügel.JPG"), "y/b.jpg"
    dataset = plain(tmp_path, text, *names)
    ((image, reason),) = dataset.skipped
    assert (image, normalize("NFC", reason)) == (name, f"missing: {hint}")


# --- cells with several captions ------------------------------------------

FIVE = ["A dog .", 'it\'s "big" , [old]', "犬\u3000が", "a\\b c", "two\nlines"]
IMAGES = [f"{number}.jpg" for number in range(3)]


@pytest.mark.parametrize(
    "write_list",
    [
        json.dumps,
        str,  # as pandas does
        lambda texts: str(tuple(texts)),
        lambda texts: str(np.array(texts)),
        lambda texts: str(np.array(texts, dtype=object)),
        lambda texts: repr(np.array(texts, dtype=object)),
    ],
)
@pytest.mark.parametrize("ending", ["csv", "tsv", "json", "jsonl"])
def test_a_list_in_a_cell_is_several_captions(tmp_path, write_list, ending):
    table = pd.DataFrame(
        {
            # What Dataset.to_csv makes of the image itself.
            "image": "{'bytes': b'', 'path': None}",
            "caption": [write_list(FIVE)] * 3,
            "sentids": "[0 1 2 3 4]",
            "filename": IMAGES,
        }
    )
    write(tmp_path, dict.fromkeys(IMAGES, b"x"))
    path = tmp_path / f"captions.{ending}"
    if ending.startswith("json"):
        lines = {"lines": True} if ending == "jsonl" else {}
        table.to_json(path, orient="records", **lines)
    else:
        table.to_csv(path, sep="\t" if ending == "tsv" else ",")
    wanted = [text.replace("\n", " ") for text in FIVE]
    assert captions_of(find(tmp_path)) == dict.fromkeys(IMAGES, wanted)


@pytest.mark.parametrize(
    "document",
    [
        dict.fromkeys(IMAGES, FIVE),
        [{"image": name, "captions": FIVE} for name in IMAGES],
        [{"file_name": n, "text": text} for n in IMAGES for text in FIVE],
    ],
)
def test_json_of_captions_is_a_table(tmp_path, document):
    write(tmp_path, dict.fromkeys(IMAGES, b"x"))
    write(tmp_path, {"captions.json": json.dumps(document)})
    wanted = [text.replace("\n", " ") for text in FIVE]
    assert captions_of(find(tmp_path)) == dict.fromkeys(IMAGES, wanted)


@pytest.mark.parametrize(
    "cell",
    ["['a dog', 'a c", "['it's a dog']", "[{'raw': 'a dog'}]", r"['\x']"],
)
def test_a_list_that_cannot_be_read_is_not_taken_for_a_caption(tmp_path, cell):
    text = f'image,caption\na.jpg,"{cell}"\nb.jpg,[two] (dogs)\n'
    dataset = plain(tmp_path, text)
    assert captions_of(dataset) == {"b.jpg": ["[two] (dogs)"]}
    reason = "list of captions that cannot be read"
    assert dataset.skipped == [("a.jpg", reason)]


# --- tables that people have ----------------------------------------------

NUMBERED = "image_name,comment_number,comment\na.jpg,0,one\na.jpg,1,two\n"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("captions.csv", "image,caption_0,caption_1\na.jpg,one,two\n"),
        ("captions.csv", "image,Caption 1,Caption 2\na.jpg,one,two\n"),
        ("captions.csv", "image,caption,caption,caption\na.jpg,one,two,\n"),
        ("captions.csv", "sep=;\nimage;caption\na.jpg;one\na.jpg;two\n"),
        ("captions.csv", 'sep=\t\nimage\tcaption\na.jpg\tone\na.jpg\ttwo\n'),
        ("captions.csv", ",image,caption\n0,a.jpg,one\n1,a.jpg,two\n"),
        ("captions.csv", "image,caption\na.jpg#0,one\na.jpg#1,two\n"),
        ("Captions.CSV", "File Name|Text\na.jpg|one\na.jpg|two\n"),
        ("captions.txt", NUMBERED),
        ("captions.txt", "a.jpg#0\tone\na.jpg#1\ttwo\n"),
        ("results.csv", NUMBERED),
        ("results.csv", NUMBERED.replace(",", ";")),
    ],
)  # fmt: skip
def test_tables_that_people_have_are_understood(tmp_path, name, text):
    dataset = find(write(tmp_path, {name: text, "a.jpg": b"x"}))
    assert captions_of(dataset) == {"a.jpg": ["one", "two"]}
    assert dataset.skipped == dataset.repaired == []


def test_the_separator_is_that_of_the_header(tmp_path):
    text = "image;caption\na.jpg;one, two | three\nb.jpg;four; five\n"
    dataset = plain(tmp_path, text)
    assert captions_of(dataset) == {
        "a.jpg": ["one, two | three"],
        "b.jpg": ["four; five"],
    }
    assert dataset.repaired == [("b.jpg", "caption with ';' but no quotes")]


def test_a_wide_row_with_too_many_fields_is_skipped(tmp_path):
    text = "image,caption_0,caption_1\na.jpg,one,two,three\nb.jpg,one,two\n"
    dataset = plain(tmp_path, text)
    assert captions_of(dataset) == {"b.jpg": ["one", "two"]}
    assert dataset.skipped == [("a.jpg", "row of 4 fields under 3 columns")]


def test_any_file_of_karpathys_kind_is_read(tmp_path):
    files = {"dataset_rsicd.json": json.dumps(KARPATHY), "RSICD/a.jpg": b"x"}
    files["dataset_info.json"] = "{}"  # Hugging Face's
    assert find(write(tmp_path, files)).layout == "karpathy"


def test_captions_that_are_not_used_are_named(tmp_path):
    write(tmp_path, {"x.token": "a.jpg#0\tdog\n", "a.jpg": b"x"})
    write(tmp_path, {"y.lemma.token": "b.jpg#0\tdog\n", "z.token": "\t"})
    (message,) = find(tmp_path).messages
    assert message == "Captions not used: z.token, y.lemma.token."


# --- splits ---------------------------------------------------------------


def test_without_lists_the_split_hangs_on_the_name_alone(tmp_path):
    names = [f"{number}.jpg" for number in range(2000)]
    text = "".join(f"{name},a dog\n" for name in names)
    whole = plain(tmp_path / "1", "image,caption\n" + text, *names)
    assert "split by a hash of the image names" in whole.summary
    counts = whole.table["split"].value_counts()
    assert abs(counts["val"] - 200) < 50 and abs(counts["test"] - 200) < 50
    backwards = "\n".join(reversed(text.splitlines()[:500]))
    part = plain(tmp_path / "2", "image,caption\n" + backwards, *names)
    merged = whole.table.merge(part.table, on="image")
    assert len(merged) == 500
    assert (merged["split_x"] == merged["split_y"]).all()
    # Written down, so that no change of the hash moves anyone's images.
    splits = dict(zip(whole.table["image"], whole.table["split"], strict=True))
    known = {"0.jpg": "train", "19.jpg": "val", "26.jpg": "test"}
    assert {name: splits[name] for name in known} == known


def test_an_image_in_no_list_is_skipped(tmp_path):
    files, _ = FOLDERS["kaggle8k"]
    files = {**files, "Flickr8k_text/Flickr_8k.testImages.txt": ""}
    write(tmp_path, {**files, **{f"Images/{n}.jpg": b"x" for n in "abcd"}})
    dataset = find(tmp_path)
    assert dataset.skipped == [("d.jpg", "in no split list")]
    assert "split by Flickr8k_text/Flickr_8k.*Images.txt" in dataset.summary
    assert dataset.summary.endswith("train 2, val 1, no test")


def test_an_image_in_two_lists_stays_held_out(tmp_path):
    files, _ = FOLDERS["kaggle8k"]
    lists = {
        "Flickr8k_text/Flickr_8k.trainImages.txt": "a.jpg\nb.jpg\nd.jpg\n",
        "Flickr8k_text/Flickr_8k.devImages.txt": "c.jpg\nb.jpg\n",
    }
    images = {f"Images/{n}.jpg": b"x" for n in "abcd"}
    dataset = find(write(tmp_path, {**files, **lists, **images}))
    splits = dataset.table.groupby("image")["split"].unique()
    assert splits.explode().to_dict() == {
        "a.jpg": "train",
        "b.jpg": "val",
        "c.jpg": "val",
        "d.jpg": "test",
    }
    assert set(dataset.repaired) == {
        ("b.jpg", "in train and in val: kept in val"),
        ("d.jpg", "in train and in test: kept in test"),
    }


LISTED = [f"{number}.jpg" for number in range(7000, 7060, 3)]


def listed(folder: Path, lists: dict[str, list[str]]) -> Dataset:
    """A dataset of LISTED with split lists."""
    files = {name: "\n".join(names) for name, names in lists.items()}
    rows = "".join(f"{name},a dog\n" for name in LISTED)
    write(folder, files)
    return plain(folder, "image,caption\n" + rows, *LISTED)


@pytest.mark.parametrize(
    "spell",
    [
        lambda name: name[:-4],
        lambda name: f"Images/{name}",
        lambda name: f"C:\\data\\{name}",
        lambda name: f"{name}#0",
        lambda name: name.upper(),
        lambda name: name.replace("jpg", "png"),
        lambda name: f'"{name}"\r',
        lambda name: f"{name} 1",
        lambda name: f"17,{name},a dog with, a ball",
    ],
)
@pytest.mark.parametrize(
    "names",
    [
        ("Train.txt", "VAL.TXT"),
        ("lists/of/karpathy_train.csv", "lists/of/karpathy_dev.csv"),
        ("FLICKR_8K.trainimages.txt", "FLICKR_8K.devimages.txt"),
    ],
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
    rows = "".join(f"{name},a dog\n" for name in images)
    folder = write(tmp_path, lists)
    dataset = plain(folder, "image,caption\n" + rows, *images)
    assert dataset.summary.endswith("train 15, val 2, no test")
    (message,) = dataset.messages
    assert message.startswith("3 of 20 images are left out (in no split list)")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig"])
def test_a_list_in_another_encoding_is_read(tmp_path, encoding):
    text = "\r\n".join(LISTED).encode(encoding)
    write(tmp_path, {"train.txt": text})
    assert listed(tmp_path, {}).summary.endswith("train 20, no val, no test")


@pytest.mark.parametrize("hits", [0, 1])
def test_lists_of_another_dataset_stop_in_one_line(tmp_path, hits):
    others = [f"other{number}.jpg" for number in range(20)]
    lists = {"splits/train.txt": LISTED[:hits] + others, "splits/val.txt": []}
    with pytest.raises(UserError) as error:
        listed(tmp_path, lists)
    message = str(error.value)
    assert "\n" not in message and str(Path("splits", "train.txt")) in message
    assert f"name {hits} of the 20 images" in message
    assert "other0.jpg" in message and "7000.jpg" in message


def test_names_in_a_list_that_match_no_image_are_told(tmp_path):
    lists = {"train.txt": [*LISTED, "gone.jpg"], "val.txt": ["far/away.jpg"]}
    assert listed(tmp_path, lists).messages == [
        "train.txt: 1 of 21 names match no image, such as gone.jpg (an image "
        "is called 7000.jpg).",
        "val.txt: 1 of 1 names match no image, such as far/away.jpg (an image "
        "is called 7000.jpg).",
    ]


def test_of_several_kinds_of_lists_the_one_with_most_images_is_used(tmp_path):
    lists = {
        "train.txt": LISTED[:2],
        "deep/er/Flickr_8k.trainImages.txt": LISTED[:9],
        "notes_test.txt": ["what I tried"],
    }
    dataset = listed(tmp_path, lists)
    assert "split by deep/er/Flickr_8k.*Images.txt" in dataset.summary
    assert "Not used as split lists: notes_test.txt, train.txt." in (
        dataset.messages
    )
    del lists["train.txt"], lists["deep/er/Flickr_8k.trainImages.txt"]
    dataset = listed(tmp_path / "other", lists)
    assert "split by a hash" in dataset.summary
    assert dataset.messages == ["Not used as split lists: notes_test.txt."]


def test_a_name_that_fits_two_images_is_matched_with_neither(tmp_path):
    names = ["x/1.jpg", "y/1.jpg", "y/2.jpg", "3.jpg", "z/3.jpg"]
    rows = "".join(f"{name},a dog\n" for name in names)
    write(tmp_path, {"train.txt": "1.jpg\n2.jpg\n3.jpg\n"})
    dataset = plain(tmp_path, "image,caption\n" + rows, *names)
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
    dataset = plain(tmp_path, text, "a.jpg", "b.jpg", "c.jpg")
    assert list(dataset.table["split"]) == ["val", "val"]
    assert dataset.repaired == [("a.jpg", "in train and in val: kept in val")]
    assert dataset.skipped == [
        ("b.jpg", "no known split"),
        ("c.jpg", "no known split"),
    ]


def test_equal_pixels_in_two_splits_are_found():
    splits = {"a": "train", "b": "test", "c": "train", "d": "val", "e": "test"}
    table = pd.DataFrame({"image": [*splits], "split": splits.values()})
    same = {"a": "1", "b": "1", "c": "1", "d": "2", "e": "3", "gone": "2"}
    pairs = equal_pixels_across_splits(same, table)
    assert pairs == [("a", "b"), ("b", "c")]
    assert equal_pixels_across_splits({"a": "1", "c": "1"}, table) == []


# --- errors ---------------------------------------------------------------


@pytest.mark.parametrize(
    "files, layout, message",
    [
        ({}, "auto", "no captions found in .*: expected one of dataset_"),
        ({"a.jpg": b""}, "token", r"expected one of \*.token.txt, \*.token;"),
        ({"captions.csv": "a,b\n"}, "auto", "must name the columns"),
        ({"captions.csv": ""}, "auto", "must name the columns"),
        ({"captions.txt": "image,caption\n"}, "auto", "no captions in it"),
        (
            {"captions.csv": "image,caption\nx.jpg,dog\n"},
            "auto",
            r"none of its images can be used; the first is x.jpg \(missing\)",
        ),
        ({"dataset.json": "{"}, "auto", "not valid JSON"),
        ({"dataset.json": "[" * 100_000}, "auto", "not valid JSON"),
        ({"dataset.json": "[1]"}, "auto", "has no list 'images'"),
        (
            {"captions_x.json": '{"images": []}'},
            "auto",
            "no list 'annotations'",
        ),
    ],
)
def test_what_is_no_dataset_is_one_line(tmp_path, files, layout, message):
    with pytest.raises(UserError, match=message) as error:
        find(write(tmp_path, files), layout)
    assert "\n" not in str(error.value)
    assert "data/README.md" in str(error.value) or "download" in str(
        error.value
    )


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no folder .*nowhere"):
        find(tmp_path / "nowhere")


# --- any bytes ------------------------------------------------------------

_NAMES = {
    "karpathy": "dataset.json",
    "huggingface": "flickr_annotations_30k.csv",
    "coco": "captions_train2017.json",
    "plain": "captions.csv",
    "kaggle30k": "results.csv",
    "kaggle8k": "captions.txt",
    "token": "x.token",
    "imagefolder": "metadata.jsonl",
}
_WHOLE = {
    "karpathy": json.dumps(KARPATHY),
    "huggingface": HUGGINGFACE,
    "coco": coco({7: "a.jpg", 8: "a.jpg"}),
    "plain": PLAIN,
    "kaggle30k": KAGGLE30K,
    "kaggle8k": KAGGLE8K,
    "token": TOKEN,
    "imagefolder": '{"file_name": "a.jpg", "text": ["one", "two"]}\n' * 3,
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
_SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.sampled_from(["a.jpg", "", "../a", "train", "\ud800", "\0", "a dog"]),
)
_JSON = st.recursive(
    _SCALARS,
    lambda inner: st.lists(inner) | st.dictionaries(_KEYS, inner),
    max_leaves=20,
)
_IMAGES = st.fixed_dictionaries(
    {
        "filename": _SCALARS,
        "file_name": _SCALARS,
        "split": st.sampled_from(["train", "restval", "dev"]) | _SCALARS,
        "id": st.integers(0, 3),
        "sentences": st.lists(st.fixed_dictionaries({"raw": _SCALARS})),
    },
    optional={"cocoid": _SCALARS, "filepath": _SCALARS},
)
_ANNOTATIONS = st.fixed_dictionaries(
    {"image_id": st.integers(0, 3) | _JSON, "caption": _SCALARS}
)
_DOCUMENTS = st.fixed_dictionaries(
    {
        "images": st.lists(_IMAGES | st.dictionaries(_KEYS, _JSON)),
        "annotations": st.lists(_ANNOTATIONS | st.dictionaries(_KEYS, _JSON)),
    }
)


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
    write(folder, {_NAMES[layout]: data, "a.jpg": b"x"})
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


@pytest.mark.parametrize("layout", _NAMES)
def test_any_bytes_give_a_table_or_one_line(tmp_path, layout):
    found = set()

    @settings(max_examples=80, deadline=None)
    @given(damaged(_WHOLE[layout].encode()) | _TEXT)
    @example(b"")
    @example(_WHOLE[layout].encode())
    def fuzz(data: bytes) -> None:
        found.add(check(tmp_path, layout, data))

    fuzz()
    assert found == {"a table", "one line"}


@pytest.mark.parametrize("layout", ["karpathy", "coco"])
def test_any_json_gives_a_table_or_one_line(tmp_path, layout):
    found = set()

    @settings(max_examples=80, deadline=None)
    @given(_DOCUMENTS | _JSON)
    @example(json.loads(_WHOLE[layout]))
    def fuzz(document: object) -> None:
        found.add(check(tmp_path, layout, json.dumps(document).encode()))

    fuzz()
    assert found == {"a table", "one line"}


# --- real data ------------------------------------------------------------


@pytest.mark.real_data
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
def test_flickr30k_as_kaggle_has_it_is_read(real_data, tmp_path):
    source = real_data / "data" / "flickr30k_subset"
    shutil.copy(source / "results.csv", tmp_path)
    shutil.copytree(source / "karpathy_splits", tmp_path / "karpathy_splits")
    lines = (source / "results.csv").read_text(encoding="utf-8").splitlines()
    names = {line.split("|")[0] for line in lines[1:]}
    (tmp_path / "flickr30k_images").mkdir()
    for name in names:  # captions alone are read here
        (tmp_path / "flickr30k_images" / name).touch()
    dataset = find(tmp_path)
    assert dataset.layout == "kaggle30k"
    assert len(dataset.table) == len(lines) - 1
    assert [image for image, _ in dataset.repaired] == ["2199200615.jpg"]
    assert dataset.skipped == []
    assert dataset.summary.endswith(
        "split by karpathy_splits/*.txt: train 6,043, val 210, test 209"
    )
