"""Several labels or prompts with a weight each, as text: `207:3.0,281:-1.0` and `a red fox:2 AND snow:-0.5`.

The scores of the parts are summed (Liu et al. 2022, arXiv 2206.01714, eq. 11): a product of experts,
each to the power of its weight; a negative one steers away. How the sum is formed is in
`guidegen.scores.guided`; here is only how it is written.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence

from guidegen.errors import UsageError, quoted

# in time that grows with the text alone, whatever it is: digits and blanks can be parted in one way only
_NUMBER = re.compile(r"\s*([+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)\s*")
_AND = re.compile(r"(?<!\s)\s+AND\s+")
_PART = re.compile(r"([0-9]{1,100}):(-?[0-9.]+(?:e[+-]?[0-9]+)?)")


def split_weight(text: str) -> tuple[str, float | None]:
    """`tabby:-1.5` as ("tabby", -1.5); None where no finite number stands at the end."""
    name, _, number = text.rpartition(":")
    match = _NUMBER.fullmatch(number)
    if match is None or not name.strip() or not math.isfinite(float(match[1])):
        return text, None
    return name.strip(), float(match[1]) + 0.0  # -0.0 is 0.0


def format_labels(parts: Sequence[tuple[int, float]]) -> str:
    """`207:3.0,281:-1.0`, the one way in which a mixture of labels is kept."""
    return ",".join(f"{label}:{weight}" for label, weight in parts)


def label_parts(mixture: str) -> tuple[tuple[int, float], ...]:
    """What `format_labels` wrote.

    Raises:
        UsageError: anything else.
    """
    parts = [_PART.fullmatch(part) for part in mixture.split(",")]
    try:
        found = tuple((int(part[1]), float(part[2])) for part in parts if part)
    except ValueError:  # 1.2.3
        found = ()
    if len(found) < len(parts) or len(dict(found)) < len(found) or not all(math.isfinite(weight) for _, weight in found):
        raise UsageError(f"{quoted(mixture)} is no mixture of labels, such as 207:3.0,281:-1.0.")
    return found


def main_label(mixture: str) -> int:
    """The label of the largest weight: what an image of the mixture is to show."""
    return max(label_parts(mixture), key=lambda part: part[1])[0]


def single_labels(labels: Iterable[int | str | None]) -> list[int]:
    """The labels of a list of labels and mixtures."""
    parts = (label_parts(label) if isinstance(label, str) else ((label, 1.0),) for label in labels)
    return list(dict.fromkeys(label for some in parts for label, _ in some if label is not None))


def prompt_parts(prompt: str) -> tuple[tuple[str, float], ...]:
    """The parts of `one:2 AND another`, of weight 1 where none is given; a prompt without AND is itself.

    Raises:
        UsageError: weights of one text whose sum is not finite.
    """
    texts = _AND.split(prompt.strip())
    if len(texts) == 1:
        return ((prompt, 1.0),)
    parts: dict[str, float] = {}
    for text, weight in map(split_weight, texts):
        parts[text] = parts.get(text, 0.0) + (1.0 if weight is None else weight)
    if not all(map(math.isfinite, parts.values())):
        raise UsageError(f"--prompt {quoted(prompt)}: the weights of a text are too large.")
    return tuple(parts.items())


def has_weights(prompt: str) -> bool:
    """Whether a prompt of several parts gives a weight to any of them."""
    texts = _AND.split(prompt.strip())
    return len(texts) > 1 and any(split_weight(text)[1] is not None for text in texts)
