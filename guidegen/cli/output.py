"""Where results go: a run directory, one file, or standard output."""

from __future__ import annotations

import base64
import io
import json
import os
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from guidegen.cli import console
from guidegen.errors import UsageError
from guidegen.runs.files import atomically
from guidegen.runs.images import read_drawn
from guidegen.runs.png import parameters_line, png_text
from guidegen.runs.schema import check_row, encode_row, loads
from guidegen.schema import LARGEST_TEXT
from guidegen.spec.settings import WEIGHT_HASHES

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from guidegen.runs.schema import Row

_IMAGES = {".png": "PNG", ".webp": "WEBP", ".jpg": "JPEG", ".jpeg": "JPEG"}
_LONGEST_SIDE = {".webp": 16383, ".jpg": 65535, ".jpeg": 65535}
PACKED = b"guidegen:"
_JPEG_CELLS = 500  # whose metadata surely fits into the 64 KiB of a JPEG segment
_LARGEST_ROWS = 1 << 29  # bytes of the rows that an .npz carries
_PNG_CELLS = 50_000  # whose metadata fits into the 64 MiB of text that Pillow reads of a .png
EXIF_IFD, USER_COMMENT = 0x8769, 0x9286


@dataclass(frozen=True)
class Output:
    """What `-o` asked for.

    Attributes:
        path: the run directory or the file; `-` for standard output.
        folder: where images are kept while the run is drawn; None for a temporary one.
        is_file: one file is the result.
        to_stdout: PNG bytes on standard output are.
        default: nothing was asked for.
    """

    path: Path
    folder: Path | None
    is_file: bool = False
    to_stdout: bool = False
    default: bool = False

    @property
    def suffix(self) -> str:
        """The kind of file, in lower case."""
        return self.path.suffix.lower()

    @property
    def one_image(self) -> bool:
        """Whether it can hold one picture only."""
        return self.to_stdout or (self.is_file and self.suffix in _IMAGES)

    def check_grid(self, pages: int, size: tuple[int, int], cells: int) -> None:
        """Raises UsageError if the file cannot hold a grid of so many pages, pixels and cells."""
        if pages > 1:
            raise UsageError(f"The grid needs {pages} pages; write it to a directory instead of {self.path}.")
        if max(size) > _LONGEST_SIDE.get(self.suffix, max(size)):
            raise UsageError(
                f"A grid of {size[0]}x{size[1]} pixels does not fit into {self.suffix}; use .png or a directory."
            )
        if self.suffix in (".jpg", ".jpeg") and cells > _JPEG_CELLS:
            raise UsageError(f"A {self.suffix} holds the metadata of {_JPEG_CELLS} images, and this is {cells}; use .png.")
        if self.suffix == ".png" and cells > _PNG_CELLS:
            raise UsageError(f"A .png holds the metadata of {_PNG_CELLS:,} images, and this is {cells:,}; use a directory.")

    def named(self, name: str) -> Output:
        """The default directory gets its name from the settings, so that the same command finds it again."""
        if not self.default:
            return self
        folder = self.path / name
        return replace(self, path=folder, folder=folder)


def parse_output(out: str | None) -> Output:
    """Reads `-o`. Files are drawn through a run directory beside them, which a restart finds.

    Raises:
        UsageError: a file of a kind that cannot be written.
    """
    if out is None:
        return Output(Path("guidegen-runs"), None, default=True)
    if out == "-":
        return Output(Path("-"), None, to_stdout=True)
    path = Path(out).expanduser()
    suffix = path.suffix.lower()
    if path.is_dir() or out.endswith(os.sep):
        return Output(path, path)
    if suffix in (*_IMAGES, ".npz"):
        return Output(path, path.with_name(f"{path.name}.partial"), is_file=True)
    if suffix in (".gif", ".bmp", ".tif", ".tiff", ".npy", ".zip", ".tar"):
        raise UsageError(f"-o {out}: cannot write {suffix}. Use a directory, .png, .webp, .jpg or .npz.")
    return Output(path, path)


def already_there(output: Output, plan: dict[str, Any], overwrite: bool) -> list[Row] | None:
    """The rows of the file if it holds just this plan; None if it has to be drawn.

    Raises:
        UsageError: it is there, holds something else, and may not be overwritten.
    """
    if overwrite or not output.path.exists():
        return None
    if not output.path.is_file():
        raise UsageError(f"{output.path} is there and is no regular file. Name another -o.")
    there, mine = _read_plan(output.path), _as_json(plan)
    if there and not mine["settings"]["model_sha256"]:  # of weights that are not here yet
        mine["settings"] |= {name: there["settings"].get(name) for name in WEIGHT_HASHES}
    elsewhere = {"rows": None, "source": None}  # networks that were moved are the same
    if there and there["rows"] and {**there, **elsewhere} == {**mine, **elsewhere}:
        return list(there["rows"])
    raise UsageError(f"{output.path} is there and holds something else. Name another -o, or --overwrite it.")


def export(folder: Path, rows: Sequence[Row], picture: Path, plan: dict[str, Any], output: Output, scale: int = 1) -> None:
    """Makes the one file from the run in `folder`; `picture` is its image or grid, to be enlarged `scale` times."""
    if output.to_stdout:
        console.result_bytes(picture.read_bytes() if scale == 1 else _enlarged(picture, scale))
        return
    with atomically(output.path) as temporary:
        if output.suffix == ".npz":
            write_npz(temporary, folder, rows, plan)
        else:
            temporary.write_bytes(_encode(picture, rows, {**plan, "rows": list(rows)}, output.suffix, scale))


def _enlarged(picture: Path, scale: int) -> bytes:
    """The PNG with larger pixels and the same text."""
    from PIL import Image

    buffer = io.BytesIO()
    with Image.open(picture) as image:
        text = image.text  # type: ignore[attr-defined]
        large = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
        large.save(buffer, "PNG", pnginfo=png_text(loads(text["guidegen"]), text.get("parameters")))
    return buffer.getvalue()


def _encode(picture: Path, rows: Sequence[Row], plan: dict[str, Any], suffix: str, scale: int) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    with Image.open(picture) as drawn:
        line = None
        if len(rows) == 1:
            metadata = {"settings": plan["settings"], "cell": plan["cells"][0], "label_name": rows[0]["label_name"]}
            line = parameters_line(metadata, *drawn.size)
        image = drawn.resize((drawn.width * scale, drawn.height * scale), Image.Resampling.NEAREST)
        if suffix == ".png":
            image.save(buffer, "PNG", pnginfo=png_text(plan, line))
        else:
            exif = Image.Exif()
            packed = zlib.compress(json.dumps(plan, sort_keys=True).encode(), 9)
            exif.get_ifd(EXIF_IFD)[USER_COMMENT] = b"ASCII\0\0\0" + PACKED + base64.b64encode(packed)
            image.convert("RGB").save(buffer, _IMAGES[suffix], exif=exif, quality=95)
    return buffer.getvalue()


def write_npz(path: Path, folder: Path, rows: Sequence[Row], plan: dict[str, Any]) -> None:
    """uint8 NHWC `arr_0` and labels `arr_1`, as OpenAI's evaluator reads them, streamed image by image.

    Beside them `guidegen`, the plan as JSON, and `guidegen_rows`, the rows as packed JSON lines.
    """
    import numpy as np
    from numpy.lib import format as npy

    def good() -> Iterator[Row]:
        return (row for row in rows if row["status"] == "ok")

    labels = np.array([-1 if row["label"] is None else row["label"] for row in good()], dtype=np.int64)
    packer = zlib.compressobj(9)
    packed = b"".join([*(packer.compress(encode_row(row)) for row in rows), packer.flush()])
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        shape = (len(labels), *next(good())["shape"])
        with _member(archive, "arr_0") as file:
            npy.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
            for row in good():
                file.write(np.asarray(read_drawn(folder, row)).reshape(shape[1:]).tobytes())
        text = np.array(json.dumps(plan, sort_keys=True))
        others = {"arr_1": labels, "guidegen": text, "guidegen_rows": np.frombuffer(packed, np.uint8)}
        for name, array in others.items():
            with _member(archive, name) as file:
                npy.write_array(file, array)


def _member(archive: zipfile.ZipFile, name: str) -> Any:
    """An array of the archive to write; without the time of day, so that equal images are equal bytes."""
    return archive.open(zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0)), "w", force_zip64=True)


def _read_plan(path: Path) -> dict[str, Any] | None:
    """The plan that a file of ours carries, its rows checked, or None."""
    try:
        there = carried_by_npz(path) if path.suffix.lower() == ".npz" else _carried_by_image(path)
        return there if isinstance(there["settings"], dict) else None
    except Exception:  # whatever Pillow, numpy, zipfile and zlib raise at what is none of ours
        return None


def exported_rows(paths: Sequence[Path]) -> list[Row] | None:
    """The rows that an .npz, or the .tar of a weight, carry; None where they cannot be read."""
    try:
        if paths[0].suffix == ".npz":
            rows: list[Row] = carried_by_npz(paths[0])["rows"]
            return rows
        found = []
        for path in paths:
            with tarfile.open(path, "r:") as archive:
                files = (archive.extractfile(member) for member in archive if member.name.endswith(".json"))
                found += [check_row(loads(file.read(LARGEST_TEXT))) for file in files if file]
        return found
    except Exception:  # whatever numpy, zipfile, tarfile and zlib raise at a damaged file
        return None


def carried_by_npz(path: Path) -> dict[str, Any]:
    """The plan that an .npz of ours carries, its rows checked; raises what zipfile, zlib and numpy do."""
    with zipfile.ZipFile(path) as archive:
        plan = loads(str(_read_array(archive, "guidegen", LARGEST_TEXT)))
        lines = io.BytesIO(unpack(_read_array(archive, "guidegen_rows", _LARGEST_ROWS).tobytes(), _LARGEST_ROWS))
    return {**plan, "rows": [check_row(loads(line)) for line in lines]}


def _carried_by_image(path: Path) -> dict[str, Any]:
    from PIL import Image

    with warnings.catch_warnings(), Image.open(path) as image:
        warnings.simplefilter("ignore")  # a large grid is no bomb
        if path.suffix.lower() == ".png":
            plan = loads(image.text["guidegen"])  # type: ignore[attr-defined]
        else:
            comment = image.getexif().get_ifd(EXIF_IFD)[USER_COMMENT]
            plan = loads(unpack(base64.b64decode(bytes(comment[8:]).removeprefix(PACKED)), LARGEST_TEXT))
    return {**plan, "rows": [check_row(row) for row in plan["rows"]]}


def unpack(packed: bytes, limit: int) -> bytes:
    """What zlib packed, if it is of at most so many bytes."""
    unpacker = zlib.decompressobj()
    data = unpacker.decompress(packed, limit)
    if not unpacker.eof:
        raise ValueError("cut short, or too large")
    return data


def _read_array(archive: zipfile.ZipFile, name: str, limit: int) -> NDArray[Any]:
    """An array of an .npz that is as large as its header says, and of at most so many bytes."""
    import numpy as np
    from numpy.lib import format as npy

    with archive.open(f"{name}.npy") as file:
        if npy.read_magic(file) != (1, 0):
            raise ValueError("not as it was written")
        shape, _, dtype = npy.read_array_header_1_0(file)
        data = file.read(limit + 1)
    if dtype.hasobject or len(data) > limit or len(data) != prod(shape) * dtype.itemsize:
        raise ValueError("not of the size that its header says")
    return np.frombuffer(data, dtype).reshape(shape)


def _as_json(data: Any) -> Any:
    """What comes back from JSON: lists for tuples, text for keys."""
    return json.loads(json.dumps(data))
