"""Text in pictures: how wide it is, how it wraps, and how long names become short and stay different."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import Any

SIZE = 16
LINE = SIZE + 4
_LEAST_SHARED = 12  # letters of a common beginning that are worth leaving out


@cache
def font() -> Any:
    """Pillow's own font."""
    from PIL import ImageFont

    return ImageFont.load_default(SIZE)


def width_of(text: str) -> int:
    """Pixels of the widest line."""
    return max(int(font().getlength(drawable(line))) + 1 if line else 0 for line in text.split("\n"))


def drawable(text: str) -> str:
    """Without accents, which Pillow's own font does not have, and what is no letter at all."""
    return "".join(
        letter
        for letter in unicodedata.normalize("NFD", text)
        if letter == "\n" or not (unicodedata.combining(letter) or unicodedata.category(letter) in ("Cc", "Cf", "Cs"))
    )


def one_line(text: str) -> str:
    """With single spaces for all white space."""
    return " ".join(text.split())


def wrap(text: str, width: int) -> list[str]:
    """Lines of at most so many pixels, broken between words; words that are wider are broken too."""
    lines = [""]
    for word in text.split():
        if width_of(f"{lines[-1]} {word}".strip()) <= width:
            lines[-1] = f"{lines[-1]} {word}".strip()
            continue
        if lines[-1]:
            lines.append("")
        while width_of(word) > width and len(word) > 1:
            end = _fitting(word, width)
            end = word.rfind("-", 0, end) + 1 or end
            lines[-1], word = word[:end], word[end:]
            lines.append("")
        lines[-1] = word
    return lines


def fold(text: str, width: int) -> str:
    """The lines of a text, each wrapped."""
    return "\n".join(part for line in text.split("\n") for part in wrap(line, width))


def shorten(text: str, width: int, lines: int) -> str:
    """The text in at most so many lines, joined by newlines; an ellipsis stands for what does not fit."""
    if len(text) * SIZE <= width:  # no letter is wider than that; a million names are quick
        return text
    wrapped = wrap(text[: lines * width], width)
    if len(wrapped) > lines:
        last = " ".join(wrapped[lines - 1 :])
        wrapped = [*wrapped[: lines - 1], f"{last[: _fitting(last, width - width_of('…'))].rstrip()}…"]
    return "\n".join(wrapped)


def shorten_all(texts: Iterable[str], width: int, lines: int) -> dict[str, str]:
    """Each text, shortened; of long ones that begin alike what differs is kept."""
    clean = {text: one_line(text) for text in texts}
    short = {text: shorten(line, width, lines) for text, line in clean.items()}
    alike = _groups(short, lambda text: clean[text][:_LEAST_SHARED])
    for some in [some for some in alike if any(short[text].endswith("…") for text in some)]:
        _leave_out_start(short, clean, some, width, lines)
    for some in _groups(short, short.__getitem__):
        _leave_out_start(short, clean, some, width, lines)
    return short


def _groups(texts: Iterable[str], key: Callable[[str], str]) -> list[list[str]]:
    """Those texts that are not alone with their key."""
    found: dict[str, list[str]] = {}
    for text in texts:
        found.setdefault(key(text), []).append(text)
    return [some for some in found.values() if len(some) > 1]


def _leave_out_start(short: dict[str, str], clean: Mapping[str, str], some: Sequence[str], width: int, lines: int) -> None:
    """Shortens anew what differs of some texts."""
    start = _shared_words([clean[text] for text in some])
    if start >= _LEAST_SHARED:
        short.update({text: shorten(f"… {clean[text][start:]}", width, lines) for text in some})


def _shared_words(texts: list[str]) -> int:
    """Letters of the words with which all begin."""
    first, last = min(texts), max(texts)
    shared = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return first.rfind(" ", 0, shared) + 1


def _fitting(text: str, width: int) -> int:
    """How many letters of one line fit; one at least."""
    low, high = 1, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if width_of(text[:middle]) <= width else (low, middle - 1)
    return low
