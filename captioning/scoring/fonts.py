"""Fonts for figures in any script."""

import sys
import unicodedata
from collections.abc import Iterable

import matplotlib
from matplotlib import font_manager
from matplotlib.ft2font import FT2Font

# Matplotlib's own font: Latin, Greek, Cyrillic, Arabic, Hebrew and more.
_OWN = f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf"
# Fonts that draw a box for every character, or one that figures cannot show.
_UNFIT = ("lastresort", "fallback", "blank", "emoji")

_chosen = [_OWN]
_absent: set[str] = set()  # scripts of which a character has no font


def families(text: str) -> list[str]:
    """The font families that together can show a text.

    Says once for each script that no installed font has it.

    Args:
        text: what a figure shows.

    Returns:
        Names for matplotlib, DejaVu Sans first.
    """
    missing = {c for c in text if _is_visible(c) and _script(c) not in _absent}
    for path in _chosen:
        missing -= _covered(path, missing)
    if missing:
        _choose(missing)
    return [FT2Font(path).family_name for path in _chosen]


def _choose(missing: set[str]) -> None:
    """Chooses as few installed fonts as possible for some characters."""
    paths = sorted(font_manager.findSystemFonts(), key=_plainness)
    paths = [p for p in paths if not any(u in p.lower() for u in _UNFIT)]
    covered = {path: _covered(path, missing) for path in paths}
    while missing and covered:
        path = max(covered, key=lambda path: len(covered[path] & missing))
        if not covered[path] & missing:
            break
        # Matplotlib's list of fonts is from when it was first used here.
        font_manager.fontManager.addfont(path)
        _chosen.append(path)
        missing = missing - covered.pop(path)
    if missing:
        scripts = sorted({_script(each) for each in missing})
        _absent.update(scripts)
        print(
            f"Note: no installed font has {' '.join(sorted(missing)[:5])} "
            f"({', '.join(scripts)}), so figures show boxes instead: install "
            "a Noto font for this script (https://fonts.google.com/noto)",
            file=sys.stderr,
        )


def _covered(path: str, characters: Iterable[str]) -> set[str]:
    """Those characters that a font has."""
    try:
        font = FT2Font(path)
    except (OSError, RuntimeError):  # a damaged font, or one of bitmaps
        return set()
    return {c for c in characters if font.get_char_index(ord(c))}


def _plainness(path: str) -> tuple[bool, bool, bool, str]:
    """Sorts fonts so that the most suitable of several comes first."""
    name = path.replace("\\", "/").rsplit("/", 1)[-1].lower()
    return "sans" not in name, "regular" not in name, "mono" in name, path


def _is_visible(character: str) -> bool:
    """Whether a character needs a glyph, unlike spaces and controls."""
    selects_variant = "\ufe00" <= character <= "\ufe0f"
    kind = unicodedata.category(character)
    return kind not in ("Cc", "Cf", "Cs", "Zs") and not selects_variant


def _script(character: str) -> str:
    """The script of a character, as Unicode's names begin: ARABIC, CJK."""
    return unicodedata.name(character, "UNNAMED").split()[0]
