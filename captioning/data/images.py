"""Reads one image, whatever state it is in.

Pillow looks the file over and OpenCV decodes and resizes it. OpenCV does not
tell the size before it decodes, the colour mode, or whether the file is all
there (of a truncated JPEG it returns half a picture); Pillow does, at a third
of the price of decoding. What is no plain photograph (transparency, CMYK, 16
bits, palettes) Pillow decodes too.
"""

import io
import os
import stat
import warnings
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

# A JPEG of 100 megapixels takes 100 MB while it is decoded, a PNG 0.8 GB and
# one with transparency 1.8 GB, which a laptop with a few worker threads still
# has; more is a map or a decompression bomb.
MAX_PIXELS = 100_000_000
# No uncompressed image of that many pixels takes more: four channels of 16
# bits, and a megabyte for what else is in a file.
_MAX_BYTES = 8 * MAX_PIXELS + 2**20
# What people store photographs in. Pillow reads more, with code that was
# written for few files and less trusted ones (EPS starts a program).
_FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "AVIF")
# How files of the commonest of them begin, to tell a damaged one from a text.
_MAGIC = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"RIFF", b"II*\0", b"MM\0*")
_EXIF_ORIENTATION = 0x0112
# EXIF orientation -> (transposed first, step over rows, step over columns):
# how the stored pixels are turned to stand upright.
_TURNS = {
    2: (False, 1, -1),
    3: (False, -1, -1),
    4: (False, -1, 1),
    5: (True, 1, 1),
    6: (True, 1, -1),
    7: (True, -1, -1),
    8: (True, -1, 1),
}
# How OpenCV is told to decode at a fraction of the sides.
_REDUCED = {
    2: cv2.IMREAD_REDUCED_COLOR_2,
    4: cv2.IMREAD_REDUCED_COLOR_4,
    8: cv2.IMREAD_REDUCED_COLOR_8,
}

# The size is checked here, in one place and with one message.
Image.MAX_IMAGE_PIXELS = None
# It would warn on standard error of what no reader of it can put right.
warnings.filterwarnings("ignore", module=r"PIL\.")


class UnusableImage(Exception):
    """An image that cannot be used; str() is the reason, in a few words."""


def read_image(path: Path, size: int) -> tuple[np.ndarray, str]:
    """Reads an image as the encoders want it.

    Args:
        path: the image file.
        size: side of the square result in pixels. The image is resized whole,
            not cropped, as the encoders' features then cover all of it.

    Returns:
        The pixels, uint8 RGB of shape (size, size, 3), and what had to be
        repaired, joined by "; " (empty if nothing).

    Raises:
        UnusableImage: whatever else the file is.
    """
    return decode_image(_read_bytes(path), size)


def decode_image(data: bytes, size: int) -> tuple[np.ndarray, str]:
    """Does for the bytes of a file what `read_image` does for its path."""
    if not data:
        raise UnusableImage("empty file")
    try:
        pixels, repairs, turn = _decode(data, size)
        pixels = _resize(pixels, size)
    except UnusableImage:
        raise
    except MemoryError:
        raise UnusableImage("needs more memory than there is") from None
    except UnidentifiedImageError:
        known = data.startswith(_MAGIC)
        reason = "broken header" if known else "not an image"
        raise UnusableImage(reason) from None
    # What decoders raise for crafted bytes is not documented: SyntaxError,
    # struct.error, IndexError, cv2.error and more.
    except Exception as error:
        truncated = "truncated" in str(error).lower()
        reason = "truncated" if truncated else "cannot be decoded"
        raise UnusableImage(reason) from None
    if turn in _TURNS:
        # The result is square, so turning it last is the least work.
        transposed, rows, columns = _TURNS[turn]
        pixels = pixels.transpose(1, 0, 2) if transposed else pixels
        pixels = pixels[::rows, ::columns]
        repairs.append("turned upright")
    return np.ascontiguousarray(pixels), "; ".join(repairs)


def _read_bytes(path: Path) -> bytes:
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise UnusableImage("is a folder")
        if not stat.S_ISREG(status.st_mode):
            raise UnusableImage("is no file")  # a pipe would wait for ever
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
    """Decodes a file, to at least twice `size` where it has as many pixels.

    Returns:
        The pixels, uint8 RGB (height, width, 3) as stored; what had to be
        repaired; the EXIF orientation that is still to be undone.
    """
    if data.startswith(b"\xff\xd8"):
        # A download that broke off may be filled up with zeros, which decode
        # as grey; without them Pillow sees that the rest is missing.
        data = data.rstrip(b"\0")
    # Pillow takes eight bytes a pixel to open a WebP, and asks later.
    _check_size(*_webp_size(data))
    with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
        width, height = image.size
        _check_size(width, height)
        repairs = _what_to_repair(image)
        plain = image.mode in ("RGB", "L") and not set(repairs) - {"grey"}
        # Every byte of a JPEG is read, but at an eighth of its sides most of
        # the work of decoding is saved.
        image.draft(None, (1, 1) if plain else (2 * size, 2 * size))
        image.load()
        turn = orientation(image)
        if plain and image.format != "TIFF":
            reduction = min(width, height) // (2 * size)
            return _opencv(data, reduction), repairs, turn
        return _to_rgb(image), repairs, turn


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise UnusableImage(f"above {MAX_PIXELS:,} pixels")


def _webp_size(data: bytes) -> tuple[int, int]:
    """(width, height) of a WebP file (RFC 9649); of any other (0, 0)."""
    if data[:4] + data[8:12] != b"RIFFWEBP":
        return 0, 0

    def number(place: int, length: int) -> int:
        return int.from_bytes(data[place : place + length], "little")

    if data[12:16] == b"VP8X":
        return number(24, 3) + 1, number(27, 3) + 1
    if data[12:16] == b"VP8L":
        sides = number(21, 4)
        return (sides & 0x3FFF) + 1, (sides >> 14 & 0x3FFF) + 1
    return number(26, 2) & 0x3FFF, number(28, 2) & 0x3FFF


def _opencv(data: bytes, reduction: int) -> np.ndarray:
    """Decodes a sound file to uint8 RGB (height, width, 3).

    Args:
        data: the file.
        reduction: by how much the sides may be divided; a JPEG of 12
            megapixels decodes five times as fast at a quarter of its sides.
    """
    flags = cv2.IMREAD_COLOR
    for factor, reduced in _REDUCED.items():
        if reduction >= factor:
            flags = reduced
    buffer = np.frombuffer(data, np.uint8)
    pixels = cv2.imdecode(buffer, flags | cv2.IMREAD_IGNORE_ORIENTATION)
    if pixels is None:
        raise UnusableImage("cannot be decoded")
    return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)


def _what_to_repair(image: Image.Image) -> list[str]:
    """What is unusual about an image, told before it is decoded."""
    is_photograph = image.format in ("JPEG", "MPO")
    # The raw mode; a BMP with ";16" has 16 bits in all, not in each channel.
    is_deep = image.format in ("PNG", "TIFF") and ";16" in str(image.tile)
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
        raise UnusableImage("pixels of 32 bits, whose white is not known")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image)
        return np.asarray(white)
    return np.asarray(image.convert("RGB"))


def orientation(image: Image.Image) -> int:
    """The EXIF orientation of an image.

    Args:
        image: an open image.

    Returns:
        1 to 8; 1, upright, where there is none that is readable.
    """
    try:
        return int(image.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:  # broken EXIF data is no reason to lose the image
        return 1


def _resize(pixels: np.ndarray, size: int) -> np.ndarray:
    """Resizes (height, width, 3) to (size, size, 3).

    In two steps, because INTER_AREA averages only where both sides shrink: a
    panorama shrinks along one side and may grow along the other.
    """
    height, width = pixels.shape[:2]
    shrunk = (min(width, size), min(height, size))
    pixels = cv2.resize(pixels, shrunk, interpolation=cv2.INTER_AREA)
    return cv2.resize(pixels, (size, size), interpolation=cv2.INTER_LINEAR)
