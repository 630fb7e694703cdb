"""Images that guidegen did not draw, as a run is measured: the sample batches of others, or a folder."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, overload

from guidegen.errors import UsageError
from guidegen.evaluate.features import Pixels
from guidegen.evaluate.measure import Drawn
from guidegen.evaluate.reference import SUFFIXES, Labelled, Source, open_source
from guidegen.runs.schema import Row


@dataclass(frozen=True)
class _Rows(Sequence[Row]):
    """As a manifest would have them, made when asked for.

    Attributes:
        name: of the file or folder.
        shape: of each image.
        indices: of the images.
    """

    name: str
    shape: tuple[int, ...]
    indices: range

    def __len__(self) -> int:
        return len(self.indices)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | Sequence[Row]:
        if isinstance(index, slice):
            return _Rows(self.name, self.shape, self.indices[index])
        i = self.indices[index]
        row: Row = {"file": f"{self.name}[{i}]", "sha256": f"{i:064x}", "seed": i, "shape": [*self.shape], "status": "ok"}
        return row | dict.fromkeys(("label", "label_name", "prompt"))


@dataclass(frozen=True)
class Samples(Drawn):
    """Images of a file or folder, all in one group, in their order there.

    Attributes:
        source: of the images.
    """

    source: Source = field(kw_only=True)

    @property
    def mode(self) -> str:
        """None: they have no settings."""
        return "-"

    def groups(self) -> dict[tuple[Any, ...], Sequence[Row]]:
        """All of them in one."""
        return {(): self.rows}

    @property
    def in_order(self) -> bool:
        """That of the file is the order that its makers meant."""
        return True

    @property
    def rounding(self) -> str | None:
        """Not known."""
        return None

    @cached_property
    def _temporary(self) -> tempfile.TemporaryDirectory[str]:
        return tempfile.TemporaryDirectory(prefix="guidegen-")

    @property
    def features(self) -> Path:
        """A directory that goes with this object."""
        return Path(self._temporary.name).resolve() / "features"

    def read(self, rows: Sequence[Row]) -> Iterator[Pixels]:
        """The images of rows whose order is that of the source."""
        for row in rows:
            while True:
                index, image = next(self._rest, (-1, None))
                if image is None or index > row["seed"]:  # from the beginning, once for each network
                    self.__dict__.pop("_rest")
                elif index == row["seed"]:
                    break
            if image.shape[:2] != self.size:
                raise UsageError(
                    f"{self.folder}: image {index} has {image.shape[1]}x{image.shape[0]}, and the first "
                    f"{self.size[1]}x{self.size[0]}: measure images of one size."
                )
            yield image

    @cached_property
    def _rest(self) -> Iterator[tuple[int, Pixels]]:
        images: Labelled = self.source.images(None)
        return ((i, image) for i, (image, _) in enumerate(images))


def is_samples(path: Path) -> bool:
    """Whether a path is of images that are no run: a file of them, or a folder that has images and no run.json."""
    if path.is_file():
        return path.suffix in (".npz", ".parquet")
    if not path.is_dir() or (path / "run.json").exists() or any(path.glob("manifest*.jsonl")):
        return False
    return any(one.suffix.lower() in SUFFIXES for one in path.rglob("*"))


def open_samples(path: Path) -> Samples:
    """Images of a folder, an .npz (`arr_0`) or a .parquet.

    Raises:
        UsageError: it is none of these, or holds no images.
    """
    try:
        source = open_source(path, {})
        first = next(source.images(None), None)
    except UsageError as error:
        raise UsageError(str(error).removeprefix("--reference ")) from None
    if first is None:
        raise UsageError(f"{path} holds no images.")
    rows = _Rows(path.name, first[0].shape, range(source.count))
    return Samples(path, {"settings": {}}, rows, (), [], [], source=source)
