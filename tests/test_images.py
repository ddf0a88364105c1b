"""Every state a photograph comes in: used, repaired or refused."""

import io
import os
import re
import struct
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageOps

from captioning.data.images import UnusableImage, read_image

SIZE = 32
NOBODY = 65534


@pytest.fixture
def photograph() -> Image.Image:
    """Smooth colours with every quarter different: (90, 120, 3)."""
    rows, columns = np.mgrid[0:90, 0:120]
    pixels = np.stack([rows * 2, columns * 2, 255 - rows - columns], axis=-1)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def encode(image: Image.Image, format: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def read(folder: Path, data: bytes, name: str = "x.jpg"):
    (folder / name).write_bytes(data)
    return read_image(folder / name, SIZE)


def reason(folder: Path, data: bytes) -> str:
    with pytest.raises(UnusableImage) as error:
        read(folder, data)
    assert "\n" not in str(error.value)
    return str(error.value)


def expected(image: Image.Image) -> np.ndarray:
    pixels = np.asarray(image.convert("RGB"))
    return cv2.resize(pixels, (SIZE, SIZE), interpolation=cv2.INTER_AREA)


def away(pixels: np.ndarray, wanted) -> np.ndarray:
    """How far the values are from those that are wanted."""
    return np.abs(pixels.astype(int) - wanted)


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif


def python(code: str, *arguments: str | Path) -> str:
    """Runs code in a process of its own; gives what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return done.stdout


def png(width: int, height: int, depth=8, colour=2, length=1000) -> bytes:
    """A black PNG file of so many bytes, whatever size it promises."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(length)))
        + chunk(b"IEND", b"")
    )


# --- used -----------------------------------------------------------------


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "BMP", "TIFF"])
def test_a_sound_image_is_read_as_rgb_without_repairs(
    tmp_path, photograph, format
):
    pixels, repaired = read(tmp_path, encode(photograph, format))
    assert pixels.shape == (SIZE, SIZE, 3) and pixels.dtype == np.uint8
    assert pixels.flags["C_CONTIGUOUS"]
    assert repaired == ""
    assert away(pixels, expected(photograph)).mean() < 4


def test_a_jpeg_gives_the_pixels_that_opencv_decodes(tmp_path, photograph):
    pixels, _ = read(tmp_path, encode(photograph, "JPEG"))
    bgr = cv2.imread(str(tmp_path / "x.jpg"))
    wanted = cv2.resize(bgr, (SIZE, SIZE), interpolation=cv2.INTER_AREA)
    np.testing.assert_array_equal(pixels, wanted[:, :, ::-1])


def test_a_large_jpeg_looks_like_one_decoded_in_full(tmp_path, photograph):
    large = photograph.resize((1200, 900), Image.Resampling.BICUBIC)
    pixels, _ = read(tmp_path, encode(large, "JPEG", quality=95))
    assert away(pixels, expected(large)).mean() < 1


def test_a_panorama_is_averaged_along_its_long_side(tmp_path):
    stripes = np.zeros((10, 32 * 64, 3), np.uint8)
    stripes[:, ::2] = 255
    pixels, _ = read(tmp_path, encode(Image.fromarray(stripes), "PNG"))
    assert away(pixels, 127).max() <= 1


def test_bytes_behind_the_end_of_a_jpeg_do_no_harm(tmp_path, photograph):
    data = encode(photograph, "JPEG")
    for rest in (bytes(1000), b"trailer", b"trailer\0"):
        assert read(tmp_path, data + rest)[1] == ""


@pytest.mark.parametrize(
    "format", ["AVIF", "GIF", "JPEG2000", "MPO", "PPM", "TGA", "ICO", "PCX"]
)
def test_whatever_pillow_reads_is_read(tmp_path, format):
    red = Image.new("RGB", (48, 32), (250, 0, 0))
    pixels, _ = read(tmp_path, encode(red, format))
    assert away(pixels, (250, 0, 0)).max() < 6


def test_a_heic_photograph_is_read_upright(tmp_path, photograph):
    pytest.importorskip("pillow_heif")
    data = encode(photograph, "HEIF", exif=turned(6).tobytes())
    upright = photograph.transpose(Image.Transpose.ROTATE_270)
    pixels, _ = read(tmp_path, data, "x.HEIC")
    assert away(pixels, expected(upright)).mean() < 6
    assert reason(tmp_path, data[: len(data) // 2]) in (
        "truncated",
        "cannot be decoded",
        "broken header",
    )


def test_an_image_keeps_its_proportions_where_a_person_looks_at_it(
    tmp_path, photograph
):
    path = tmp_path / "x.jpg"
    photograph.save(path, exif=turned(6))
    pixels, repaired = read_image(path, 80, square=False)
    assert pixels.shape == (80, 60, 3) and repaired == "turned upright"
    Image.new("RGB", (3000, 1)).save(path)
    assert read_image(path, 80, square=False)[0].shape == (1, 80, 3)


# --- repaired -------------------------------------------------------------


def plain(mode: str, *colour: int) -> Image.Image:
    return Image.new(mode, (40, 40), colour)


def palette(*colours: int) -> Image.Image:
    image = plain("P", 0)
    image.putpalette(colours)
    return image


def deep(*values: int) -> bytes:
    """A PNG file of 16 bits a channel: grey, or blue, green and red."""
    pixels = np.full((40, 40, len(values)), values, np.uint16)
    return cv2.imencode(".png", pixels)[1].tobytes()


def animation(format: str, **options) -> bytes:
    frames = [plain("RGB", 0, 0, 255)]
    options |= {"save_all": True, "append_images": frames}
    return encode(plain("RGB", *RED), format, **options)


RED, GREY = (255, 0, 0), (99, 99, 99)
WHITE, FRAME = "alpha composited on white", "first frame of an animation"
# What a file is -> the file, its colour, and the repairs that are told.
REPAIRED = {
    "alpha": (encode(plain("RGBA", *RED, 128), "PNG"), (255, 127, 127), WHITE),
    "transparent palette": (
        encode(palette(0, 0, 0, *RED), "PNG", transparency=0),
        (255, 255, 255),
        WHITE,
    ),
    "grey JPEG": (encode(plain("L", 99), "JPEG"), GREY, "grey"),
    "grey PNG": (encode(plain("L", 99), "PNG"), GREY, "grey"),
    "grey with alpha": (
        encode(plain("LA", 0, 0), "PNG"),
        (255, 255, 255),
        f"grey; {WHITE}",
    ),
    "CMYK": (
        encode(plain("RGB", *RED).convert("CMYK"), "JPEG"),
        (254, 0, 0),
        "CMYK",
    ),
    "deep": (deep(0, 32896, 65535), (255, 128, 0), "16 bits reduced to 8"),
    "deep grey": (deep(99 * 257), GREY, "16 bits reduced to 8; grey"),
    "GIF": (animation("GIF"), RED, FRAME),
    "WebP": (animation("WEBP", lossless=True), RED, FRAME),
    "animated PNG": (animation("PNG"), RED, FRAME),
}


@pytest.mark.parametrize(
    ("data", "colour", "told"), REPAIRED.values(), ids=REPAIRED
)
def test_every_image_becomes_rgb_and_what_changed_is_told(
    tmp_path, data, colour, told
):
    pixels, repaired = read(tmp_path, data)
    assert repaired == told
    assert away(pixels, colour).max() < 5


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_is_turned_upright(
    tmp_path, photograph, format, orientation
):
    data = encode(photograph, format, exif=turned(orientation))
    pixels, repaired = read(tmp_path, data)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert away(pixels, expected(upright)).max() <= 1
    if format != "TIFF":  # Pillow turns TIFF by itself
        assert repaired == ("" if orientation == 1 else "turned upright")


def test_damaged_jpegs_are_used_without_a_warning_of_python(
    tmp_path, photograph
):
    exif = b"Exif\0\0MM\0*\xff\xff\xff\xff"
    data = bytearray(encode(photograph, "JPEG", exif=exif))
    data[-300:-296] = b"\xff\xd0\xff\xd5"  # libjpeg's "Corrupt JPEG data"
    (tmp_path / "x.jpg").write_bytes(data)
    # In a process of its own, because pytest has filters for warnings too.
    code = (
        "import pathlib, sys, captioning.data.images as images\n"
        "pixels, _ = images.read_image(pathlib.Path(sys.argv[1]), 32)\n"
        "print(pixels.shape)"
    )
    assert python(code, tmp_path / "x.jpg") == "(32, 32, 3)\n"


# --- refused --------------------------------------------------------------


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("share", [0.3, 0.5, 0.9, 0.99])
def test_a_truncated_jpeg_is_refused_though_opencv_reads_it(
    tmp_path, photograph, capfd, progressive, share
):
    large = photograph.resize((400, 300))
    data = encode(large, "JPEG", progressive=progressive)
    data = data[: int(len(data) * share)]
    assert reason(tmp_path, data) == "truncated"
    assert reason(tmp_path, data + bytes(5000)) == "truncated"
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("format", ["PNG", "GIF", "BMP", "WEBP", "TIFF"])
def test_half_a_file_is_refused(tmp_path, photograph, format):
    data = encode(photograph, format)
    assert reason(tmp_path, data[: len(data) // 2]) in (
        "truncated",
        "cannot be decoded",
    )


@pytest.mark.parametrize(
    "data, wanted",
    [
        (b"", "empty file"),
        (b"a text about a dog", "not an image"),
        (bytes(1000), "not an image"),
        (b"\x89PNG\r\n\x1a\n", "broken header"),
        (png(20_000, 20_000), "above 100,000,000 pixels"),
        (png(2**31 - 1, 2**31 - 1), "above 100,000,000 pixels"),
        (png(100, 100), "truncated"),
    ],
)
def test_what_is_no_image_is_refused_with_the_reason(tmp_path, data, wanted):
    assert reason(tmp_path, data) == wanted


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(400)


@pytest.mark.parametrize(
    ("module", "data", "wanted"),
    [
        ("missing", HEIC, "pip install -r requirements-heic.txt"),
        ("missing", HEIC.replace(b"heic", b"mif1"), "convert it to JPEG"),
        ("there", HEIC, "broken header"),
        ("there", b"\xff\x0a" + bytes(99), "JPEG XL .* convert it to JPEG"),
        ("there", b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
    ],
)
def test_what_pillow_cannot_read_is_named_with_the_remedy(
    tmp_path, module, data, wanted
):
    pytest.importorskip("pillow_heif")
    code = (
        "import pathlib, sys\n"
        "if sys.argv[2] == 'missing': sys.modules['pillow_heif'] = None\n"
        "from captioning.data import images\n"
        "assert '.heic' in images.ENDINGS\n"
        "try: images.read_image(pathlib.Path(sys.argv[1]), 32)\n"
        "except images.UnusableImage as error: print(error)\n"
    )
    (tmp_path / "x").write_bytes(data)
    assert re.search(wanted, python(code, tmp_path / "x", module))


# A sound WebP file of 16,383 x 16,383 red pixels.
HUGE_WEBP = bytes.fromhex(
    "524946461c000000574542505650384c0f0000002ffebfff0f0710fd8ffe0722a2ff0100"
)
# Prints what it gets of each file, and by how many megabytes the peak grew.
READ = """
import pathlib, resource, sys
from captioning.data.images import UnusableImage, read_image
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
if sys.argv[1] == "limited":
    status = pathlib.Path("/proc/self/status").read_text()
    (here,) = (int(l.split()[1]) for l in status.splitlines() if "VmSize" in l)
    most = here * 1024 + 150_000_000
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
before = peak()
for path in sys.argv[2:]:
    try:
        print(read_image(pathlib.Path(path), 32)[0].shape)
    except UnusableImage as error:
        print(error)
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory by Linux")
def test_memory_is_bounded_and_the_size_decided_before_decoding(tmp_path):
    files = {
        "20,000.png": png(20_000, 20_000, 1, 0, 2501 * 20_000),
        "16,383.webp": HUGE_WEBP,
        "allowed.png": png(9_000, 9_000, 1, 0, 1126 * 9_000),
        "small.png": png(90, 90, 1, 0, 13 * 90),
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)

    def read_all(how: str, *names: str) -> list[str]:
        paths = [tmp_path / name for name in names]
        return python(READ, how, *paths).splitlines()

    large = "above 100,000,000 pixels"
    *told, grown = read_all("free", "20,000.png", "16,383.webp")
    # Decoding them takes 400 MB and 1 GB.
    assert told == [large, large] and int(grown) < 100
    *told, _ = read_all("limited", "20,000.png", "allowed.png", "small.png")
    assert told == [large, "not enough memory", "(32, 32, 3)"]


def test_a_file_of_absurd_length_is_refused_before_reading(tmp_path):
    with open(tmp_path / "x.jpg", "wb") as file:
        file.truncate(10_000_000_000)  # takes no space on the disk
    with pytest.raises(UnusableImage, match="above 801,048,576 bytes"):
        read_image(tmp_path / "x.jpg", SIZE)


def test_what_is_no_file_is_refused_with_the_reason(tmp_path):
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "dangling.jpg").symlink_to("nothing.jpg")
    (tmp_path / "circle.jpg").symlink_to("circle.jpg")
    for name, wanted in {
        "folder.jpg": "is a folder",
        "dangling.jpg": "dangling link",
        "circle.jpg": "unreadable",
        "none.jpg": "missing",
        "a\0b.jpg": "unreadable",
    }.items():
        with pytest.raises(UnusableImage, match=wanted):
            read_image(tmp_path / name, SIZE)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes on Windows")
def test_a_pipe_is_refused_instead_of_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(UnusableImage, match="not a regular file"):
        read_image(tmp_path / "pipe.jpg", SIZE)


@pytest.fixture
def as_a_user():
    """A folder that all may enter, and no rights of root while it is there."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        is_root = os.geteuid() == 0
        if is_root:  # who may read everything
            os.chown(folder, NOBODY, -1)
            os.seteuid(NOBODY)
        yield Path(folder)
        if is_root:
            os.seteuid(0)


@pytest.mark.skipif(os.name == "nt", reason="Windows has other permissions")
def test_a_file_without_permission_is_refused(as_a_user, photograph):
    assert read(as_a_user, encode(photograph, "JPEG"))[1] == ""
    (as_a_user / "x.jpg").chmod(0)
    with pytest.raises(UnusableImage, match=r"^unreadable: permission denied$"):
        read_image(as_a_user / "x.jpg", SIZE)


NOISE = Image.effect_noise((24, 16), 60).convert("RGB")
FORMATS = ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF"]


@pytest.mark.filterwarnings("ignore::UserWarning")
@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from([encode(NOISE, format) for format in FORMATS]),
    st.lists(st.tuples(st.integers(0, 2000), st.binary(max_size=4))),
    st.integers(0, 3000),
)
def test_damaged_bytes_give_pixels_or_a_reason(
    tmp_path_factory, data, changes, length
):
    damaged = bytearray(data)
    for place, patch in changes:
        damaged[place : place + len(patch)] = patch
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(bytes(damaged[:length]))
    try:
        pixels, _ = read_image(path, SIZE)
    except UnusableImage as error:
        assert str(error)
    else:
        assert pixels.shape == (SIZE, SIZE, 3) and pixels.dtype == np.uint8


@pytest.mark.real_data
def test_real_photographs_are_read_as_opencv_reads_them(real_data):
    folder = real_data / "data" / "flickr8k" / "Images"
    for path in sorted(folder.iterdir())[:50]:
        pixels, repaired = read_image(path, 224)
        assert repaired == ""
        np.testing.assert_array_equal(pixels, cv2.imread(str(path))[..., ::-1])
