"""What may stand in run.json, in a row of a manifest and in the text of an image: checked types, or an error in one line."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

from msgspec import Meta

from guidegen.errors import GuidegenError, OutputError, UsageError
from guidegen.schema import convert, read_bytes
from guidegen.spec.composition import label_parts
from guidegen.spec.plan import Plan, read_plan
from guidegen.spec.settings import MODE_NAMES, Settings

Row = dict[str, Any]
Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Side = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Sha256 = Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]
ImageFile = Annotated[str, Meta(pattern=r"\Aimages(/(?!\.\.?/)[^/\x00-\x1f\x7f]+)+\.png\Z", max_length=4096)]
"""Below images/: no `..`, no absolute path, nothing that a terminal acts on."""
ExportName = Annotated[str, Meta(pattern=r"\A[^./\x00-\x1f\x7f][^/\x00-\x1f\x7f]*\.(npz|tar)\Z")]
"""In the run directory itself."""
Scalar = str | int | float | bool | None


def dumps(value: Any, **options: Any) -> str:
    """JSON that UTF-8 can hold: halves of surrogate pairs, as arguments that are no UTF-8 have, are escaped."""
    text = json.dumps(value, ensure_ascii=False, **options)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value, **options)
    return text


def loads(data: bytes | str) -> Any:
    """JSON as `dumps` writes it. msgspec reads no halves of surrogate pairs, so here it is the standard library.

    Raises:
        ValueError: it is none: NaN and infinity, and what is nested too deeply, neither.
    """
    try:
        return json.loads(data, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number")


# --- rows of a manifest


@dataclass(frozen=True)
class _Row:
    """What every row has; an axis of `--by` adds a plain value under its own name."""

    file: ImageFile
    mode: str
    w: float
    label: Count | None
    label_name: str | None
    prompt: str | None
    seed: Count
    nfe: Count
    sha256: Sha256 | None
    shape: tuple[Side, Side, Side] | None
    status: Literal["ok", "nonfinite"]
    w_classifier: float | None = None
    w_guide: float | None = None
    mixture: str | None = None
    dtype: str | None = None


def check_row(value: Any, where: object = "The row", error: type[GuidegenError] = OutputError) -> Row:
    """A decoded row of a manifest.

    Raises:
        error: it is none.
    """
    row = convert(value, _Row, where, error)
    if (row.status == "ok") != (row.sha256 is not None) or (row.status == "ok") != (row.shape is not None):
        raise error(f"{where} is not valid: status {row.status} with sha256 {row.sha256} and shape {row.shape}.")
    for key, some in value.items():
        if key != "shape" and (not isinstance(some, Scalar) or (isinstance(some, float) and not math.isfinite(some))):
            raise error(f"{where} is not valid: {key!r} is no plain value.")
    try:
        label_parts(row.mixture) if row.mixture is not None else None
    except UsageError:
        raise error(f"{where} is not valid: mixture is no labels with weights.") from None
    checked: Row = value
    return checked


def parse_row(line: bytes) -> Row | None:
    """The row of a line of a manifest; None for a torn one and for what is no row."""
    try:
        return check_row(loads(line)) if line.endswith(b"\n") else None
    except (ValueError, OutputError):
        return None


def encode_row(row: Row) -> bytes:
    """A line of the manifest."""
    return dumps(row).encode() + b"\n"


# --- run.json


@dataclass(frozen=True)
class _Settings(Settings):
    """The settings, with the ranges of their numbers."""

    steps: Annotated[int, Meta(ge=1)]
    size: tuple[Side, Side] | None = None


@dataclass(frozen=True)
class _Part:
    """A checkpoint that took part."""

    path: str
    revision: str | None = None
    weight: float = 1.0


@dataclass(frozen=True)
class _Command:
    """What asked for a plan."""

    command: str | None = None
    options: dict[str, Scalar | list[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class _RunJson:
    """What every run.json has; `plans` are checked where they are read."""

    settings: _Settings
    plans: list[dict[str, Any]] = field(default_factory=list)
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)
    exports: list[ExportName] = field(default_factory=list)
    command: str | None = None
    options: dict[str, Scalar | list[str]] = field(default_factory=dict)
    commands: list[_Command] = field(default_factory=list)
    checkpoint: _Part | None = None
    classifier: _Part | list[_Part] | None = None
    guide_model: _Part | None = None
    versions: dict[str, str] = field(default_factory=dict)
    guidegen: str | None = None


def read_run(folder: Path) -> dict[str, Any]:
    """run.json.

    Raises:
        UsageError: `folder` is no run directory.
    """
    path = folder / "run.json"
    if not path.exists():
        raise UsageError(f"{folder} is not a run directory: run.json is missing.")
    data = read_bytes(path, UsageError)
    try:
        about: dict[str, Any] = loads(data)
    except ValueError as problem:
        raise UsageError(f"{path} is not valid JSON: {problem}.") from None
    checked = convert(about, _RunJson, path, UsageError)
    _check_settings(checked.settings, path)
    for changes in checked.variants.values():
        settings_of({**about["settings"], **changes}, path)
    return about


def settings_of(data: Mapping[str, Any], where: object) -> Settings:
    """Settings as run.json holds them.

    Raises:
        UsageError: they are none.
    """
    checked = convert(data, _Settings, where, UsageError)
    _check_settings(checked, where)
    return Settings(**{name.name: data.get(name.name, getattr(checked, name.name)) for name in fields(Settings)})


def _check_settings(settings: Settings, where: object) -> None:
    if settings.mode not in MODE_NAMES:
        raise UsageError(f"{where} is not valid: no such mode as {settings.mode!r}.")
    if settings.eta is not None and not math.isfinite(settings.eta):
        raise UsageError(f"{where} is not valid: eta is {settings.eta}.")


# --- plans


def read_plans(folder: Path, about: Mapping[str, Any]) -> list[Plan]:
    """What the run is to hold, from its run.json.

    Raises:
        UsageError: it does not say.
    """
    again = "The command that drew the run adds it: run that again."
    if not about.get("plans"):
        raise UsageError(f"{folder}/run.json has no plan. {again}")
    try:
        return [read_plan(plan, f"plans[{i}]") for i, plan in enumerate(about["plans"])]
    except UsageError as error:
        raise UsageError(f"{folder}/run.json has no plan that can be read: {error} {again}") from None


def is_plan(data: Any) -> bool:
    """Whether `read_plan` takes it."""
    try:
        read_plan(data)
    except UsageError:
        return False
    return True
