"""Labels of a checkpoint: ids, names, and what a person may have meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping

from guidegen.errors import UsageError, quoted
from guidegen.spec import limits
from guidegen.spec.parse import whole, whole_range

_LONGEST_QUERY = 500  # letters; a longer one is no name, and comparing it takes long


class Labels:
    """The label ids a checkpoint can draw, and their names where it has any.

    A name may list synonyms separated by commas, as ImageNet's do; the first one is shown, and
    each of them is understood.

    Args:
        names: id -> name, or an empty name.
    """

    def __init__(self, names: Mapping[int, str]):
        self._names = dict(sorted(names.items()))
        self._ids: dict[str, list[int]] = {}
        for label, name in self._names.items():
            for synonym in {name, *name.split(",")} - {""}:
                self._ids.setdefault(synonym.strip().casefold(), []).append(label)

    def __len__(self) -> int:
        return len(self._names)

    def __iter__(self) -> Iterator[int]:
        return iter(self._names)

    def __contains__(self, label: object) -> bool:
        return label in self._names

    @property
    def names(self) -> dict[int, str]:
        """id -> full name."""
        return dict(self._names)

    def name(self, label: int) -> str:
        """The short name of a label: its first synonym, or "" where it has none."""
        return self._names[label].split(",")[0].strip()

    def search(self, query: str) -> list[int]:
        """Ids whose id or name is close to `query`, best first; all of them for an empty query."""
        wanted = query.strip().casefold()
        if not wanted:
            return list(self._names)
        if len(wanted) > _LONGEST_QUERY:
            return []
        found: dict[int, float] = {}
        for synonym, ids in self._ids.items():
            likeness = difflib.SequenceMatcher(None, wanted, synonym).ratio()
            if wanted in synonym:
                likeness += 1
            for word in set(wanted.split()) & set(synonym.split()):
                likeness += len(word) / max(len(wanted), len(synonym))
            for label in ids:
                found[label] = max(found.get(label, 0.0), likeness)
        if (given := whole(wanted)) is not None and given in self:
            found[given] = 3.0
        return [i for i, likeness in sorted(found.items(), key=lambda item: (-item[1], item[0])) if likeness > 0.55]

    def knows(self, text: str) -> bool:
        """Whether `text`, commas and all, is a name of one of the labels."""
        return text.strip().casefold() in self._ids

    def resolve(self, text: str) -> list[int]:
        """The ids that one word of `--label` means: an id, a range `0-9`, a name, or `all`.

        Raises:
            UsageError: unknown or ambiguous; names the closest labels.
        """
        word = text.strip().strip('"').strip()
        if (label := whole(word)) is not None:
            return [self._known(label)]
        if ends := whole_range(word):
            first, last = ends
            if last < first:
                raise UsageError(f"--label {quoted(word)}: the range ends before it starts.")
            if last - first >= limits.LIST:
                raise UsageError(f"--label {quoted(word)}: the range has more than {limits.LIST:,} labels.")
            return [self._known(i) for i in range(first, last + 1)]
        if word.casefold() == "all":
            return list(self._names)
        ids = self._ids.get(word.casefold(), [])
        if len(ids) == 1:
            return ids
        if ids:
            raise UsageError(
                f"--label {quoted(word)} is ambiguous: {'; '.join(f'{i} {self._names[i]}' for i in ids)}. Give the id."
            )
        raise UsageError(f"--label {quoted(word)} is not a label of this checkpoint. {self._closest(word)}")

    def _known(self, label: int) -> int:
        if label not in self._names:
            raise UsageError(f"--label {label} is not a label of this checkpoint. {self._closest(str(label))}")
        return label

    def _closest(self, word: str) -> str:
        near = self.search(word)[:3]
        if not near and (label := whole(word)) is not None:
            near = sorted(self._names, key=lambda i: abs(i - label))[:3]
        if near:
            return f"Closest: {self._listing(near)}. `guidegen labels` lists all {len(self)}."
        return f"It knows {len(self)}, such as {self._listing(list(self._names)[:3])}; see `guidegen labels`."

    def _listing(self, ids: Iterable[int]) -> str:
        return ", ".join(f"{i} {self.name(i)}".strip() for i in ids)
