"""Datasets as people download them: tables, tars and zips."""

import json
import os
import shutil
import sys
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import cv2
import datasets as hub
import numpy as np
import pytest
import webdataset

from captioning.data import prepared, unpack
from captioning.data.datasets import Dataset
from config import Config
from tests.helpers import refusal
from tests.processes import good

NAMES = [f"{number}.jpg" for number in range(12)]
SPLITS = ["train", "train", "val", "test"] * 3


def photo(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), np.uint8)
    return cv2.imencode(".jpg", pixels)[1].tobytes()


PHOTOS = dict(zip(NAMES, map(photo, range(12)), strict=True))
CAPTIONS = {name: [f"{name[:-4]} dog", f"{name[:-4]} cat"] for name in NAMES}
CSV = "image,caption,split\n" + "".join(
    f"{name},{caption},{split}\n"
    for name, split in zip(NAMES, SPLITS, strict=True)
    for caption in CAPTIONS[name]
)


def find(home: Path, name: str = "photos") -> Dataset:
    place = home / "data" / "cache" / name / "unpacked"
    folder = home / "data" / name
    return unpack.find_dataset(folder, place, "auto", (0.2, 0.2))


def captions_of(dataset: Dataset) -> dict[str, list[str]]:
    """By the content of the images, whatever they are called."""
    names = {data: name for name, data in PHOTOS.items()}
    images = dataset.table.groupby("image")["caption"].apply(list)
    return {
        names[(dataset.images_dir / image).read_bytes()]: captions
        for image, captions in images.items()
    }


# --- what writes them -----------------------------------------------------


def table(*columns: str, part: slice = slice(None)) -> hub.Dataset:
    """A table as hubs have it, with the images in it."""
    content = {
        "image": [{"bytes": b, "path": n} for n, b in PHOTOS.items()],
        "raw_image": [*PHOTOS.values()],
        "nameless": [{"bytes": b, "path": None} for b in PHOTOS.values()],
        "caption": [*CAPTIONS.values()],
        "caption_0": [first for first, _ in CAPTIONS.values()],
        "caption_1": [second for _, second in CAPTIONS.values()],
        "sentids": [["1", "2"]] * 12,
        "split": SPLITS,
        "filename": NAMES,
        "label": [1] * 12,
    }
    picked = {name: content[name][part] for name in columns}
    made = hub.Dataset.from_dict(picked)
    for name in {"image", "nameless"} & {*columns}:
        made = made.cast_column(name, hub.Image())
    return made


def write_parquet(folder: Path, name: str, *columns: str, **options) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    table(*columns, **options).to_parquet(path)
    return path


def write_splits(folder: Path, *columns: str) -> None:
    """One shard for each split, as jxie/flickr8k has them."""
    for name, part in (
        ("data/train-00000-of-00001.parquet", slice(0, 6)),
        ("data/validation-00000-of-00001.parquet", slice(6, 9)),
        ("data/test-00000-of-00001.parquet", slice(9, 12)),
    ):
        write_parquet(folder, name, *columns, part=part)


def write_arrow(folder: Path) -> None:
    parts = {"train": slice(0, 8), "test": slice(8, 12)}
    hub.DatasetDict(
        {n: table("nameless", "caption", part=p) for n, p in parts.items()}
    ).save_to_disk(folder)
    (folder / "train" / "cache-1.arrow").write_bytes(b"computed")


def write_tar(
    folder: Path, name: str = "00000.tar", start: int = 0, back: int = 0
) -> Path:
    """As img2dataset does; every other with JSON instead of text."""
    folder.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(folder / name)) as tar:
        for number in range(start, start + 6):
            captions = CAPTIONS[NAMES[number]]
            beside = {"json": {"caption": captions, "url": "http://x"}}
            if number % 2:
                beside = {"txt": "\n".join(captions), "json": {"url": "x"}}
            key, image = (
                {"__key__": f"{number - back:09}"},
                {"jpg": photo(number)},
            )
            tar.write({**key, **image, **beside})
    # What it knows of the tar.
    write_parquet(folder, f"{name.partition('.')[0]}.parquet", "caption")
    return folder / name


def write_zip(folder: Path, files: dict, name: str = "archive.zip") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / name, "w", zipfile.ZIP_DEFLATED) as archive:
        for member, data in files.items():
            archive.writestr(member, data)
    return folder / name


def images(folder: str, slash: str = "/") -> dict[str, bytes]:
    return {f"{folder}{slash}{name}": data for name, data in PHOTOS.items()}


def write_tars(folder: Path) -> None:
    write_tar(folder)
    write_tar(folder, "00001.tar.gz", 6)


def write_images_zip(folder: Path) -> None:
    """The captions lie beside the archive of the images."""
    write_zip(folder, {**images("Images"), "__MACOSX/._x.jpg": b"x"})
    (folder / "captions.csv").write_text(CSV)


SOURCES = {
    "nlphuji/flickr30k": lambda folder: write_parquet(
        folder,
        "TEST/test/0000.parquet",
        "image",
        "caption",
        "sentids",
        "split",
        "filename",
    ),
    "jxie/flickr8k": lambda folder: write_splits(
        folder, "image", "caption_0", "caption_1"
    ),
    "lmms-lab/flickr30k": lambda folder: write_parquet(
        folder,
        "data/test-00000-of-00001.parquet",
        "image",
        "caption",
        "filename",
    ),
    "raw bytes": lambda folder: write_splits(folder, "raw_image", "caption"),
    "arrow": write_arrow,
    "tar": write_tars,
    # Some of Windows' programs write backslashes.
    "kaggle": lambda folder: write_zip(
        folder, {**images("Images", "\\"), "captions.txt": CSV}
    ),
    "images.zip": write_images_zip,
}
HOW = {
    "nlphuji/flickr30k": "1 Parquet file, unpacked; plain layout in ",
    "jxie/flickr8k": "split by folder: train 6, val 3, test 3",
    "lmms-lab/flickr30k": "split by a hash of the image names",
    "raw bytes": "split by folder: train 6, val 3, test 3",
    "arrow": "2 Arrow files, unpacked; ",
    "tar": "2 archive files, unpacked; ",
    "kaggle": "split as in the file: train 6, val 3, test 3",
    "images.zip": "split as in the file: train 6, val 3, test 3",
}


@pytest.mark.parametrize("source", SOURCES)
def test_what_people_download_is_read(tmp_path, source):
    SOURCES[source](tmp_path / "data" / "photos")
    dataset = find(tmp_path)
    assert captions_of(dataset) == CAPTIONS
    assert HOW[source] in dataset.summary and dataset.messages == []
    unpacked = sorted(tmp_path.glob("data/cache/photos/unpacked/**/*"))
    times = [path.stat().st_mtime_ns for path in unpacked]
    again = find(tmp_path)
    assert again.table.equals(dataset.table)
    assert times == [path.stat().st_mtime_ns for path in unpacked]


def test_the_photographs_are_found_afterwards(tmp_path):
    """Several workers unpack once."""
    write_splits(tmp_path / "data" / "photos", "image", "caption")
    for worker in ("0/2", "1/2"):
        good(tmp_path, "--min-word-count", "1", "--worker", worker)
    wanted = Config(
        dataset="photos",
        min_word_count=1,
        tokeniser="words",
        data_dir=str(tmp_path / "data"),
    )
    folder = prepared.images_dir(wanted)
    assert (folder / "train" / "0.jpg").read_bytes() == photo(0)
    assert folder.is_relative_to(prepared.unpacked(wanted))


def test_a_row_for_each_caption_is_one_image(tmp_path):
    for columns in (["image", "caption_0"], ["nameless", "caption_0"]):
        folder = tmp_path / "data" / columns[0]
        rows = table(*columns, part=slice(0, 3))
        path = folder / "all.parquet"
        path.parent.mkdir(parents=True)
        hub.concatenate_datasets([rows, rows]).to_parquet(path)
        dataset = find(tmp_path, columns[0])
        assert dataset.table["image"].nunique() == 3
        assert len(dataset.table) == 6


def test_an_image_beside_text_and_one_without(tmp_path):
    files = {"a.txt": "a dog", "b.txt": "a cat", "a.jpg": photo(0)}
    write_zip(tmp_path / "data" / "photos", {**files, "c.jpg": photo(1)})
    dataset = find(tmp_path)
    assert [*dataset.table["caption"]] == ["a dog"]
    bare, lost = dataset.messages
    assert bare == "1 images without a caption are left out, such as c.jpg."
    assert lost.endswith("are missing and left out, such as b.")


def test_lists_beside_captions_image_by_image_are_kept(tmp_path):
    """In an archive as in a folder, where they say the split."""
    files = {f"all/{n}.jpg": photo(n) for n in range(3)}
    files |= {f"all/{n}.txt": f"dog number {n}" for n in range(3)}
    for n, split in enumerate(("train", "val", "test")):
        files[f"lists/{split}.txt"] = f"{n}.jpg\n"
    write_zip(tmp_path / "data" / "photos", files)
    dataset = find(tmp_path)
    assert [*dataset.table["split"]] == ["train", "val", "test"]
    assert "split by lists/*.txt" in dataset.summary
    assert not dataset.messages


def test_archives_that_are_not_needed_are_named(tmp_path):
    folder = tmp_path / "data" / "photos"
    write_splits(folder, "image", "caption")
    write_zip(folder, images("Images"))
    (told,) = find(tmp_path).messages
    assert told == "Not understood or not needed: archive.zip."
    # What can be read as it is is.
    (folder / "captions.csv").write_text(CSV)
    for name, data in PHOTOS.items():
        (folder / name).write_bytes(data)
    assert find(tmp_path).images_dir == folder


# --- again, and after a stop ----------------------------------------------


@pytest.mark.parametrize(
    ("write", "changed"),
    [(write_tars, False), (write_images_zip, False), (write_images_zip, True)],
)
def test_it_can_be_killed_at_any_moment(tmp_path, monkeypatch, write, changed):
    """Also after the source has changed, to files of the same size."""
    folder = tmp_path / "data" / "photos"
    write(folder)
    if changed:
        others = {name: data[::-1] for name, data in images("Images").items()}
        write_zip(folder, others)
        find(tmp_path)
        write(folder)
    replace, stops = os.replace, 0
    while True:
        left = iter(range(stops % 5 + 3))

        def replace_or_die(source, target, left=left):
            if next(left, None) is None:
                raise KeyboardInterrupt
            replace(source, target)

        monkeypatch.setattr(os, "replace", replace_or_die)
        try:
            dataset = find(tmp_path)
            break
        except KeyboardInterrupt:
            stops += 1
    assert stops > 4 and captions_of(dataset) == CAPTIONS
    assert not [*dataset.images_dir.rglob("*.part*")]


def test_a_source_that_changed_is_unpacked_again(tmp_path):
    folder = tmp_path / "data" / "photos"
    write_zip(folder, {"a/0.jpg": photo(0), "a/1.jpg": photo(1)})
    text = folder / "captions.csv"
    text.write_text("image,caption\n0.jpg,a dog\n1.jpg,a cat\n")
    assert len(find(tmp_path).table) == 2
    other = photo(0)[::-1]  # of the same size
    write_zip(folder, {"a/0.jpg": other})
    text.write_text("image,caption\n0.jpg,a cow\n")
    dataset = find(tmp_path)
    assert [*dataset.table["caption"]] == ["a cow"]
    assert (dataset.images_dir / "0.jpg").read_bytes() == other
    assert not (dataset.images_dir / "1.jpg").exists()


@pytest.mark.parametrize(
    "files",
    [
        {"0.txt": "a dog", "README.TXT": "read me", "0.jpg": photo(0)},
        {
            "Images\\": b"",  # a folder of Windows
            "Images\\0.jpg": photo(0),
            "captions.csv": "image,caption\n0.jpg,a dog\n",
        },
    ],
)
def test_odd_files_in_an_archive_stop_nothing(tmp_path, files):
    write_zip(tmp_path / "data" / "photos", files)
    assert [*find(tmp_path).table["caption"]] == ["a dog"]


# --- what cannot be used --------------------------------------------------


def cut(path: Path, share: float = 0.6) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[60] ^= 255
    path.write_bytes(data)


def cut_header(path: Path, bytes_left: int) -> None:
    """Ends a tar in a header, or just before it."""
    with tarfile.open(path) as tar:
        place = tar.getmembers()[4].offset
    path.write_bytes(path.read_bytes()[: place + bytes_left])


def damage_header(path: Path) -> None:
    with tarfile.open(path) as tar:
        place = tar.getmembers()[4].offset
    data = bytearray(path.read_bytes())
    data[place] ^= 255
    path.write_bytes(data)


def write_tar_link(folder: Path) -> None:
    folder.mkdir(parents=True)
    with tarfile.open(folder / "bad.tar", "w") as tar:
        member = tarfile.TarInfo("a.jpg")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(member)


def write_link(folder: Path) -> None:
    link = zipfile.ZipInfo("a.jpg")
    link.external_attr = 0o120777 << 16
    write_zip(folder, {link: "/etc/passwd"}, "bad.zip")


BAD = {
    "cut.parquet": (
        lambda f: cut(write_parquet(f, "a.parquet", "image", "caption")),
        "a.parquet cannot be read (",
    ),
    "cut.arrow": (
        lambda f: (write_arrow(f), cut(next(f.glob("train/d*.arrow")), 0.9)),
        "-of-00001.arrow cannot be read (",
    ),
    "cut.tar": (
        lambda f: cut(write_tar(f), 0.54),
        "00000.tar cannot be read (unexpected end of data): download",
    ),
    "cut.tar.gz": (
        lambda f: cut(write_tar(f, "a.tar.gz")),
        "a.tar.gz cannot be read (",
    ),
    "cut between members": (
        lambda f: cut_header(write_tar(f), 0),
        "(the tar breaks off after 000000001.",
    ),
    "cut in a header": (
        lambda f: cut_header(write_tar(f), 100),
        "(the tar breaks off after 000000001.",
    ),
    "damaged header": (
        lambda f: damage_header(write_tar(f)),
        "(the tar breaks off after 000000001.",
    ),
    "cut.zip": (
        lambda f: cut(write_zip(f, images("a"))),
        "archive.zip cannot be read (File is not a zip file): download it",
    ),
    "damaged.zip": (
        lambda f: damage(write_zip(f, images("a"))),
        "archive.zip cannot be read (",
    ),
    "..": (
        lambda f: write_zip(f, {"../a.jpg": b"x"}),
        "holds '../a.jpg' ('..' in the image name), which may lead out of",
    ),
    "link": (write_link, "bad.zip holds 'a.jpg' (a link or device)"),
    "link.tar": (write_tar_link, "bad.tar holds 'a.jpg' (a link or device)"),
    "large member": (
        lambda f: write_zip(f, {"a.jpg": os.urandom(200_001)}),
        "archive.zip holds 'a.jpg' (0.0 GB), too large for a photograph",
    ),
    "bomb": (
        lambda f: write_zip(f, {f"{i}.jpg": bytes(150_000) for i in range(9)}),
        "archive.zip would grow more than 200-fold",
    ),
    "another schema": (
        lambda f: (
            write_splits(f, "image", "caption"),
            write_parquet(f, "data/train-2.parquet", "image", "label"),
        ),
        "train-2.parquet has no column of captions, only image, label: ",
    ),
    "no images": (
        lambda f: write_parquet(f, "a.parquet", "filename", "caption"),
        "a.parquet has no column of images, only filename, caption: ",
    ),
    "duplicate keys": (
        lambda f: (write_tar(f), write_tar(f, "00001.tar", 6, back=5)),
        "hold two files called 000000001.jpg: rename one",
    ),
    "no captions": (
        lambda f: write_zip(f, images("a")),
        "1 archive file, unpacked, but no captions found in ",
    ),
    "captions alone": (
        lambda f: write_zip(f, {"captions.txt": CSV}),
        "none of its images can be used; the first is 0.jpg (missing)",
    ),
    "unknown": (
        lambda f: (f.mkdir(parents=True), (f / "a.7z").write_bytes(b"7z")),
        "see data/README.md. Not understood or not needed: a.7z.",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_used_is_told_in_one_line(tmp_path, monkeypatch, case):
    make, told = BAD[case]
    make(tmp_path / "data" / "photos")
    monkeypatch.setattr(unpack, "MAX_BYTES", 200_000)
    before = {*tmp_path.rglob("*")}
    line = refusal(find, tmp_path)
    assert told in line and len(line) < 900
    place = tmp_path / "data" / "cache"
    new = {*tmp_path.rglob("*")} - before
    assert all(path == place or place in path.parents for path in new)
    # Of what is there every byte is right, and nothing would be read.
    for path in place.rglob("*.jpg"):
        assert path.read_bytes() in PHOTOS.values()
    assert not [*place.rglob("captions.csv")]


def test_names_that_differ_in_case_are_two_files_or_an_error(
    tmp_path, monkeypatch
):
    names = ["a.jpg", "A.jpg"]
    files = {name: photo(n) for n, name in enumerate(names)}
    text = "image,caption\n" + "".join(f"{x},a dog\n" for x in names)
    folder = tmp_path / "data" / "photos"
    write_zip(folder, {**files, "captions.txt": text})
    with monkeypatch.context() as patch:
        patch.setattr(unpack, "_ignores_case", lambda place: True)
        line = refusal(find, tmp_path)
    place = folder / "archive.zip"
    told = f"{place} holds A.jpg, and {place} holds a.jpg, which are the same"
    assert told in line
    assert not [*(tmp_path / "data" / "cache").rglob("captions.txt")]
    if (tmp_path / "DATA").exists():
        pytest.skip("this disk ignores case")
    found = find(tmp_path)
    assert {*found.table["image"]} == {*names}
    for name, data in files.items():
        assert (found.images_dir / name).read_bytes() == data


def test_a_full_disk_is_told_before(tmp_path, monkeypatch):
    write_splits(tmp_path / "data" / "photos", "image", "caption")
    full = SimpleNamespace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    assert "GB left: free some space" in refusal(find, tmp_path)
    assert not [*tmp_path.rglob("*.jpg")]


def test_pyarrow_is_asked_for(tmp_path, monkeypatch):
    write_splits(tmp_path / "data" / "photos", "image", "caption")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pip install -r requirements-parquet" in refusal(find, tmp_path)


def test_two_folders_are_not_unpacked_into_one(tmp_path):
    for name in ("photos", "others"):
        write_tars(tmp_path / "data" / name)
    find(tmp_path)
    place = tmp_path / "data" / "cache" / "photos" / "unpacked"
    others = (tmp_path / "data" / "others", place, "auto", (0.2, 0.2))
    told = refusal(unpack.find_dataset, *others)
    assert "another name with --dataset NAME" in told
    # A project that is copied has a dataset and a cache of its own.
    shutil.copytree(tmp_path / "data", tmp_path / "copy" / "data")
    assert captions_of(find(tmp_path / "copy")) == CAPTIONS
    # The note may name the folder by its whole path.
    note = place / ".notes" / "source.json"
    home = tmp_path / "data" / "photos"
    note.write_text(json.dumps({"source": str(home.resolve())}))
    assert captions_of(find(tmp_path)) == CAPTIONS
    (tmp_path / "data" / "photos").rename(tmp_path / "data" / "moved")
    times = {p: p.stat().st_mtime_ns for p in place.rglob("*.jpg")}
    dataset = unpack.find_dataset(
        tmp_path / "data" / "moved", place, "auto", (0.2, 0.2)
    )
    assert captions_of(dataset) == CAPTIONS
    assert times == {p: p.stat().st_mtime_ns for p in place.rglob("*.jpg")}
