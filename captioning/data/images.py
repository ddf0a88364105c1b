"""Reads one image, whatever state it is in.

Pillow decodes the file and OpenCV resizes the pixels. Every file that decodes
is used; any change it needed is reported, and so is the reason why a file
cannot be used.
"""

import contextlib
import io
import os
import stat
import warnings
from pathlib import Path

import cv2
import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

with contextlib.suppress(ImportError):
    import pillow_heif  # optional: requirements-heic.txt

    pillow_heif.register_heif_opener()

# A JPEG of 100 megapixels takes 100 MB to decode, a PNG 0.8 GB and one with
# transparency 1.8 GB, which a laptop with a few reader threads can spare.
# Anything larger is a map or a decompression bomb.
MAX_PIXELS = 100_000_000
# Uncompressed, four channels of 16 bits, and a megabyte of metadata.
_MAX_BYTES = 8 * MAX_PIXELS + 2**20
# Formats that Pillow opens and nobody keeps photographs in: containers that
# it cannot decode, measurements without a known white, and drawings (EPS
# starts a program).
_CONTAINERS = ["BUFR", "GRIB", "HDF5", "MPEG", "IPTC"]
_MEASUREMENTS = ["FITS", "SPIDER", "MCIDAS"]
_DRAWINGS = ["EPS", "WMF"]
_NOT_PHOTOGRAPHS = _CONTAINERS + _MEASUREMENTS + _DRAWINGS
Image.preinit()  # the common formats come first
Image.init()
_FORMATS = [name for name in Image.OPEN if name not in _NOT_PHOTOGRAPHS]
# Files in a folder that are taken for photographs, whatever their case. HEIC
# and JPEG XL are among them so that they are reported, not passed over.
ENDINGS = {e for e, f in Image.registered_extensions().items() if f in _FORMATS}
ENDINGS |= {".heic", ".heif", ".hif", ".jxl", ".mpo"}  # .mpo opens as a JPEG
_NEEDS_HEIC = (
    "HEIC needs pillow-heif: pip install -r requirements-heic.txt, or convert "
    "it to JPEG"
)
# How files begin that Pillow should have identified, and JPEG XL.
_HEADERS = b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"RIFF", b"II*\0", b"MM\0*"
_HEIC_HEADERS = b"ftyphei", b"ftyphev", b"ftypmif", b"ftypmsf"
_JXL_HEADERS = b"\xff\x0a", b"\0\0\0\x0cJXL "

# The size is checked here, in one place and with one message.
Image.MAX_IMAGE_PIXELS = None
# Pillow's warnings are about metadata, and nobody can act on them.
warnings.filterwarnings("ignore", module=r"PIL\.")


class UnusableImage(Exception):
    """An image that cannot be used; str() is the reason, in a few words."""


def read_image(
    path: Path, size: int, square: bool = True
) -> tuple[np.ndarray, str]:
    """Reads an image as the encoders expect it, or a person.

    Args:
        path: the image file.
        size: the longer side of the result in pixels.
        square: resize the image to a square, as the encoders expect it. The
            whole of it, not cropped, so that the features cover all of it.
            Otherwise it keeps its proportions.

    Returns:
        The pixels, uint8 RGB of shape (size, size, 3) or (height, width, 3),
        and what had to be repaired, joined by "; " (empty if nothing).

    Raises:
        UnusableImage: if the file is anything but an image.
    """
    return decode_image(_read_bytes(path), size, square)


def decode_image(
    data: bytes, size: int, square: bool = True
) -> tuple[np.ndarray, str]:
    """Does for the bytes of a file what `read_image` does for its path."""
    if not data:
        raise UnusableImage("empty file")
    try:
        pixels, repairs, orientation = _decode(data, size)
        height, width = pixels.shape[:2]
        if not square:
            scale = size / max(height, width)
            width = max(1, round(width * scale))
            height = max(1, round(height * scale))
        shape = (size, size) if square else (width, height)
        pixels = _turn(_resize(pixels, *shape), orientation)
    except UnusableImage:
        raise
    except MemoryError:
        raise UnusableImage("not enough memory") from None
    except UnidentifiedImageError:
        raise UnusableImage(_why_unidentified(data)) from None
    # What decoders raise for crafted bytes is not documented: SyntaxError,
    # struct.error, IndexError, cv2.error and more.
    except Exception as error:
        truncated = "truncated" in str(error).lower()
        reason = "truncated" if truncated else "cannot be decoded"
        raise UnusableImage(reason) from None
    return np.ascontiguousarray(pixels), "; ".join(repairs)


def _read_bytes(path: Path) -> bytes:
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise UnusableImage("is a folder")
        if not stat.S_ISREG(status.st_mode):
            # Reading a pipe might wait for ever.
            raise UnusableImage("not a regular file")
        if status.st_size > _MAX_BYTES:
            raise UnusableImage(f"above {_MAX_BYTES:,} bytes")
        return path.read_bytes()
    except FileNotFoundError:
        dangling = os.path.islink(path)
        reason = "dangling link" if dangling else "missing"
        raise UnusableImage(reason) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UnusableImage(f"unreadable: {reason.lower()}") from None


def _decode(data: bytes, size: int) -> tuple[np.ndarray, list[str], int]:
    """Decodes a file.

    Returns:
        The pixels as they are stored, uint8 RGB (height, width, 3); what had
        to be repaired; the EXIF orientation, still to be undone.
    """
    if data.startswith(b"\xff\xd8"):
        # An interrupted download may be padded with zeros, which decode as
        # grey; without them Pillow notices that the rest is missing.
        data = data.rstrip(b"\0")
    with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
        if image.width * image.height > MAX_PIXELS:
            raise UnusableImage(f"above {MAX_PIXELS:,} pixels")
        repairs = _what_to_repair(image)
        # A JPEG decodes at a fraction of its sides, but to twice `size` at
        # least: 12 megapixels in a fifth of the time.
        image.draft(None, (2 * size, 2 * size))
        image.load()
        orientation = _orientation(image)
        if orientation != 1:
            repairs.append("turned upright")
        return _to_rgb(image), repairs, orientation


def _why_unidentified(data: bytes) -> str:
    """Why Pillow does not know what a file is."""
    if data[4:11] in _HEIC_HEADERS:
        return "broken header" if "HEIF" in _FORMATS else _NEEDS_HEIC
    if data.startswith(_JXL_HEADERS):
        return "JPEG XL cannot be read: convert it to JPEG"
    return "broken header" if data.startswith(_HEADERS) else "not an image"


def _what_to_repair(image: Image.Image) -> list[str]:
    """What is unusual about an image, told before it is decoded."""
    is_photograph = image.format in ("JPEG", "MPO", "HEIF")
    # The raw mode; a BMP with ";16" has 16 bits in all, not in each channel.
    is_deep = image.format in ("PNG", "TIFF") and ";16" in str(
        getattr(image, "tile", "")
    )
    found = {
        "first frame of an animation": not is_photograph
        and getattr(image, "is_animated", False),
        "16 bits reduced to 8": is_deep,
        "grey": image.mode in ("1", "L", "LA") or image.mode[:4] == "I;16",
        "CMYK": image.mode == "CMYK",
        "alpha composited on white": image.has_transparency_data,
    }
    return [reason for reason, is_so in found.items() if is_so]


def _to_rgb(image: Image.Image) -> np.ndarray:
    """The pixels of a loaded image, uint8 RGB (height, width, 3)."""
    if image.mode[:4] == "I;16":
        # Pillow would clip at 255 instead of scaling; 65535 is 255 * 257.
        grey = (np.asarray(image) // 257).astype(np.uint8)
        return cv2.cvtColor(grey, cv2.COLOR_GRAY2RGB)
    if image.mode in ("I", "F"):
        raise UnusableImage("32-bit pixels without a known white level")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image)
        return np.asarray(white)
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation; 1, upright, where there is none to read."""
    try:
        found = int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # broken EXIF data is no reason to lose the image
        return 1
    return found if 1 <= found <= 8 else 1


def _turn(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Turns pixels (height, width, 3) upright, by their EXIF orientation.

    After resizing: that is less work, and OpenCV rounds a mirrored image
    differently.
    """
    image = Image.fromarray(pixels)
    image.getexif()[ExifTags.Base.Orientation] = orientation
    return np.asarray(ImageOps.exif_transpose(image))


def _resize(pixels: np.ndarray, width: int, height: int) -> np.ndarray:
    """Resizes pixels (any height, any width, 3) to (height, width, 3).

    In two steps, because INTER_AREA averages only where both sides shrink: a
    panorama shrinks along one side and may grow along the other.
    """
    rows, columns = pixels.shape[:2]
    shrunk = (min(columns, width), min(rows, height))
    pixels = cv2.resize(pixels, shrunk, interpolation=cv2.INTER_AREA)
    return cv2.resize(pixels, (width, height), interpolation=cv2.INTER_LINEAR)
