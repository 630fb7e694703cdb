"""Where results go: a run directory, one file, or standard output."""

from __future__ import annotations

import base64
import io
import json
import os
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from guidegen.cli import console
from guidegen.errors import UsageError
from guidegen.run import atomically, encode_row, parameters_line, png_text

if TYPE_CHECKING:
    from guidegen.run import Row

_IMAGES = {".png": "PNG", ".webp": "WEBP", ".jpg": "JPEG", ".jpeg": "JPEG"}
_LONGEST_SIDE = {".webp": 16383, ".jpg": 65535, ".jpeg": 65535}
_PACKED = b"guidegen:"
_JPEG_CELLS = 500  # whose metadata surely fits into the 64 KiB of a JPEG segment
_EXIF_IFD, _USER_COMMENT = 0x8769, 0x9286


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
    there = _read_plan(output.path)
    if isinstance(there, dict) and there.get("rows") and {**there, "rows": None} == {**_as_json(plan), "rows": None}:
        return list(there["rows"])
    raise UsageError(f"{output.path} is there and holds something else. Name another -o, or --overwrite it.")


def export(folder: Path, rows: Sequence[Row], picture: Path, plan: dict[str, Any], output: Output) -> None:
    """Makes the one file from the run in `folder`; `picture` is its image or grid."""
    if output.to_stdout:
        console.result_bytes(picture.read_bytes())
        return
    with atomically(output.path) as temporary:
        if output.suffix == ".npz":
            write_npz(temporary, folder, rows, plan)
        else:
            temporary.write_bytes(_encode(picture, rows, {**plan, "rows": list(rows)}, output.suffix))


def _encode(picture: Path, rows: Sequence[Row], plan: dict[str, Any], suffix: str) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    with Image.open(picture) as image:
        line = None
        if len(rows) == 1:
            facts = {"settings": plan["settings"], "cell": plan["cells"][0], "label_name": rows[0]["label_name"]}
            line = parameters_line(facts, *image.size)
        if suffix == ".png":
            image.save(buffer, "PNG", pnginfo=png_text(plan, line))
        else:
            exif = Image.Exif()
            packed = zlib.compress(json.dumps(plan, sort_keys=True).encode(), 9)
            exif.get_ifd(_EXIF_IFD)[_USER_COMMENT] = b"ASCII\0\0\0" + _PACKED + base64.b64encode(packed)
            image.convert("RGB").save(buffer, _IMAGES[suffix], exif=exif, quality=95)
    return buffer.getvalue()


def write_npz(path: Path, folder: Path, rows: Sequence[Row], plan: dict[str, Any]) -> None:
    """uint8 NHWC `arr_0` and labels `arr_1`, as OpenAI's evaluator reads them, streamed image by image.

    Beside them `guidegen`, the plan as JSON, and `guidegen_rows`, the rows as packed JSON lines.
    """
    import numpy as np
    from numpy.lib import format as npy
    from PIL import Image

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
                with Image.open(folder / row["file"]) as image:
                    file.write(np.asarray(image).reshape(shape[1:]).tobytes())
        text = np.array(json.dumps(plan, sort_keys=True))
        others = {"arr_1": labels, "guidegen": text, "guidegen_rows": np.frombuffer(packed, np.uint8)}
        for name, array in others.items():
            with _member(archive, name) as file:
                npy.write_array(file, array)


def _member(archive: zipfile.ZipFile, name: str) -> Any:
    """An array of the archive to write; without the time of day, so that equal images are equal bytes."""
    return archive.open(zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0)), "w", force_zip64=True)


def _read_plan(path: Path) -> Any:
    """The plan that a file of ours carries, or None."""
    import numpy as np
    from PIL import Image

    try:
        if path.suffix.lower() == ".npz":
            with np.load(path, allow_pickle=False) as data:
                rows = zlib.decompress(data["guidegen_rows"].tobytes()).splitlines()
                return {**json.loads(str(data["guidegen"])), "rows": [json.loads(row) for row in rows]}
        with Image.open(path) as image:
            if path.suffix.lower() == ".png":
                return json.loads(image.text["guidegen"])  # type: ignore[attr-defined]
            comment = image.getexif().get_ifd(_EXIF_IFD)[_USER_COMMENT]
            return json.loads(zlib.decompress(base64.b64decode(bytes(comment[8:]).removeprefix(_PACKED))))
    except (OSError, KeyError, ValueError, TypeError, AttributeError, EOFError, zipfile.BadZipFile, zlib.error):
        return None


def _as_json(data: Any) -> Any:
    """What comes back from JSON: lists for tuples, text for keys."""
    return json.loads(json.dumps(data))
