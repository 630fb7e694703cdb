"""One HTML file that shows runs: samples, curves and settings. It opens from disk and makes no network requests."""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
import os
import re
import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from guidegen import __version__
from guidegen.evaluate.measure import Drawn, finite, key_of, sortable
from guidegen.evaluate.metrics import titles_of
from guidegen.evaluate.reference import subject_of
from guidegen.report.grid import axes_of
from guidegen.report.series import Series, about_series, make_series, names_of, shown
from guidegen.report.tuning import shown_tuning
from guidegen.runs.images import CorruptImageError, read_drawn, read_drawn_bytes
from guidegen.runs.manifest import read_rows, with_axes
from guidegen.runs.schema import Row
from guidegen.spec.axes import axis_of, axis_options, value_name
from guidegen.spec.command import Command, read_command

if TYPE_CHECKING:
    from PIL.Image import Image

_SMALL = 96  # up to here pixels are shown as squares, and images stay lossless


class TooLargeError(Exception):
    """The images do not fit into the size that was allowed."""


def build_page(
    runs: Sequence[tuple[Drawn, Sequence[Mapping[str, Any]]]],
    out: Path,
    max_bytes: int,
    thumbnail: int = 256,
    warnings: Sequence[str] = (),
    per_run: Collection[str] = (),
) -> tuple[str, bool, list[str]]:
    """The page as text, whether its images are inside it (else they are linked), and what is wrong with those left out.

    Args:
        runs: each with its rows of metrics, which may be none.
        out: where it will stand; links start there.
        max_bytes: past this many bytes of images they are linked.
        thumbnail: longest side of an image inside the page; larger ones are made smaller.
        warnings: shown at the top.
        per_run: the options of a run's command that the command of one image of it does not have.
    """
    images = _Images(max_bytes, thumbnail)
    try:
        data = _data(runs, images, warnings, per_run)
    except TooLargeError:
        images = _Links(out.resolve().parent)
        data = _data(runs, images, warnings, per_run)
    title = f"guidegen: {', '.join(dict.fromkeys(drawn.about['settings']['model'] for drawn, _ in runs))}"
    return fill_template(title, data, linked=isinstance(images, _Links)), not isinstance(images, _Links), images.corrupt


def fill_template(title: str, data: Mapping[str, Any], linked: bool) -> str:
    """page.html with its data; its policy allows only its script and style, and no requests."""
    template = files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    hashes = {}
    for part in ("style", "script"):
        body = re.search(rf"\{{\{{{part}\}}\}}(.*?)\{{\{{/{part}\}}\}}", template, re.DOTALL)
        assert body is not None, part
        hashes[part] = base64.b64encode(hashlib.sha256(body[1].encode()).digest()).decode()
        template = template.replace(body[0], body[1])
    policy = (
        f"default-src 'none'; script-src 'sha256-{hashes['script']}'; style-src 'sha256-{hashes['style']}'; "
        f"img-src data:{' file: ' + chr(39) + 'self' + chr(39) if linked else ''}; base-uri 'none'; form-action 'none'"
    )
    values = {
        "policy": html.escape(policy, quote=True),
        "generator": f"guidegen {__version__}",
        "title": html.escape(title),
        "data": safe_json(data),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], template)


def safe_json(data: Any) -> str:
    """JSON that cannot end the script element it stands in, whatever its text; null for numbers that are not finite."""
    text = json.dumps(finite(data), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    escapes = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}
    return re.sub("[<>&\u2028\u2029]", lambda match: escapes[match[0]], text)


class _Images:
    """Images inside the page, each content once."""

    def __init__(self, max_bytes: int, thumbnail: int):
        self._left, self._thumbnail = max_bytes, thumbnail
        self.sources: list[str] = []
        self.corrupt: list[str] = []
        self._index: dict[str, int] = {}

    def add(self, folder: Path, row: Row) -> int | None:
        """Index of the image among `sources`; None where it is not the one that was drawn.

        Raises:
            TooLargeError: it does not fit any more.
        """
        try:
            return self._add(folder, row)
        except CorruptImageError as error:
            self.corrupt.append(str(error))
            return None

    def _add(self, folder: Path, row: Row) -> int:
        source = self._source(read_drawn(folder, row))
        if source not in self._index:
            self._left -= len(source)
            if self._left < 0:
                raise TooLargeError
            self._index[source] = len(self.sources)
            self.sources.append(source)
        return self._index[source]

    def _source(self, image: Image) -> str:
        from PIL import Image

        buffer = io.BytesIO()
        if max(image.size) <= _SMALL:
            clean = Image.new(image.mode, image.size)  # without the text chunks, which are larger than the pixels
            clean.paste(image)
            clean.save(buffer, "PNG", optimize=True)
            kind = "png"
        else:
            small = image.convert("RGB")
            small.thumbnail((self._thumbnail, self._thumbnail), Image.Resampling.LANCZOS)
            small.save(buffer, "WEBP", quality=85)
            kind = "webp"
        return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


class _Links(_Images):
    """Images that stay where they are."""

    def __init__(self, start: Path):
        super().__init__(0, 0)
        self._start = start

    def _add(self, folder: Path, row: Row) -> int:
        read_drawn_bytes(folder, row)
        path = os.path.relpath((folder / row["file"]).resolve(), self._start)
        self.sources.append(quote(Path(path).as_posix()))
        return len(self.sources) - 1


def _data(
    runs: Sequence[tuple[Drawn, Sequence[Mapping[str, Any]]]],
    images: _Images,
    warnings: Sequence[str],
    per_run: Collection[str],
) -> dict[str, Any]:
    series = make_series([run for run in runs if run[1]])
    axis = _axis([drawn for drawn, _ in runs], series)
    names = names_of([drawn for drawn, _ in runs])
    described = [_run(drawn, name, axis, images, per_run) for (drawn, _), name in zip(runs, names, strict=True)]
    largest = max(max(row["shape"][:2]) for drawn, _ in runs for row in drawn.rows)
    measured = next((line.best(metric) for line in series for metric in shown(series)[:1]), None)
    middle = described[0]["x"][len(described[0]["x"]) // 2]
    subtitles = [run["about"] for run in described]
    folders = " ".join(shlex.quote(str(drawn.folder)) for drawn, _ in runs)
    return {
        "axis": axis,
        "subtitle": subtitles[0] if len(runs) == 1 else f"{len(runs)} runs",
        "footer": f"Made by guidegen {__version__}: guidegen report {folders}",
        "warnings": list(warnings),
        "pixelated": largest <= _SMALL,
        "tile": 72 if largest <= _SMALL else 128,
        "start": series[0].x[measured] if measured is not None else middle,
        "runs": described,
        "images": images.sources,
        "curves": _curves(series) if shown(series) else None,
        "tuning": [found for drawn, _ in runs if (found := shown_tuning(drawn.folder)) is not None],
        "unmeasured": f"Not measured yet: guidegen evaluate {folders} --reference PATH",
    }


def _axis(runs: Sequence[Drawn], series: Sequence[Series]) -> str:
    """What the slider moves along: what the curves do, else w, else the first axis that varies."""
    if series:
        return series[0].axis
    for drawn in runs:
        for axis in drawn.axes:
            if len({row.get(axis) for row in drawn.rows}) > 1 and isinstance(drawn.rows[0].get(axis), (int, float)):
                return axis
    return "w"


def _run(drawn: Drawn, name: str, axis: str, images: _Images, per_run: Collection[str]) -> dict[str, Any]:
    others = [other for other in drawn.axes if other != axis and len({row.get(other) for row in drawn.rows}) > 1]
    rows = with_axes(read_rows(drawn.folder), drawn.about["settings"], drawn.axes)
    there = {row["file"] for row in drawn.rows}
    subjects: dict[str, dict[str, Any]] = {}
    for row in rows:
        key = str(subject_of(row))
        text = row["label_name"] or row["prompt"] or ("" if row["label"] is None else f"label {row['label']}")
        subjects.setdefault(key, {"key": key, "label": row["label"], "name": text})
    cells = [
        {
            "x": row.get(axis),
            "subject": str(subject_of(row)),
            "seed": row["seed"],
            "other": list(key_of(row, others)),
            "image": images.add(drawn.folder, row) if row["file"] in there else None,
            "again": _words(row),
            "row": row,
        }
        for row in rows
    ]
    values = [sorted({row.get(other) for row in rows}, key=lambda value: sortable((value,))) for other in others]
    settings = dict(drawn.about["settings"])
    for other, found in zip(others, values, strict=True):
        settings[axis_of(other).title] = ", ".join(value_name(other, value) for value in found)
    about = {key: drawn.about.get(key) for key in ("checkpoint", "classifier", "guide_model") if drawn.about.get(key)}
    versions, command = drawn.about.get("versions") or {}, read_command(drawn.about)
    return {
        "name": name,
        "folder": str(drawn.folder),
        "about": _about(drawn),
        "settings": {
            **{key.replace("_", " "): value for key, value in settings.items() if value not in (None, "", [], {})},
            **{f"{key.replace('_', ' ')} from": _path(value) for key, value in about.items()},
            **{f"{package} version": version for package, version in versions.items()},
        },
        "command": str(command or ""),
        "again": str(replace(command, name="sample").without(*per_run)) if command else "",
        "axes": [
            {
                "name": axis_of(other).title,
                "key": other,
                "values": found,
                "names": [value_name(other, value) for value in found],
            }
            for other, found in zip(others, values, strict=True)
        ],
        "x": sorted({row.get(axis) for row in rows}, key=lambda value: sortable((value,))),
        "subjects": list(subjects.values()),
        "cells": cells,
    }


def _about(drawn: Drawn) -> str:
    """The scheduler, the steps and the number of images, but for what varies in the run."""
    settings = drawn.about["settings"]
    words = {
        "scheduler": value_name("scheduler", settings["scheduler"]),
        "steps": f"{settings['steps']} step{'s' * (settings['steps'] != 1)}",
    }
    how = ", ".join(word for axis, word in words.items() if axis not in drawn.axes)
    return " · ".join(filter(None, (how, f"{len(drawn.rows):,} images")))


def _path(origin: Any) -> str:
    """Path of a part, or of several, from run.json."""
    parts = origin if isinstance(origin, list) else [origin]
    return ", ".join(str(part.get("path", "")) if isinstance(part, dict) else str(part) for part in parts)


def _words(row: Row) -> list[str]:
    """What the command needs beside the options of the run to draw this one image."""
    varied = {name: row[name] for name in axes_of([row]) if name not in ("w", "label", "prompt", "seed")}
    given = axis_options({} if row["mode"] == "none" else {"w": row["w"]}, varied)
    if row["label"] is not None:
        given["label"] = row.get("mixture") or row["label"]
    if row["prompt"] is not None:
        given["prompt"] = row["prompt"]
    return Command("sample", given | {"seed": row["seed"]}).words()[2:]


def _curves(series: Sequence[Series]) -> dict[str, Any]:
    metrics = shown(series)
    titles = titles_of(metrics, [row for line in series for row in line.rows])
    return {
        "metrics": [{"name": m.name, "title": title, "better": m.better} for m, title in zip(metrics, titles, strict=True)],
        "about": about_series(series).replace("\n", "; ") + ".",
        "series": [
            {
                "name": line.name,
                "run": line.run,
                "at": line.at,
                "axis": line.axis,
                "x": line.x,
                "thin": {m.name: line.thin(m) for m in metrics},
                "values": {m.name: line.values(m) for m in metrics},
                "spreads": {m.name: line.spreads(m) for m in metrics},
                "counts": {m.name: line.counts(m) for m in metrics},
                "best": {m.name: line.best(m) for m in metrics},
            }
            for line in series
        ],
    }
