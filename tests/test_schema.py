"""The border: files that are none, JSON that is none, values of other types."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import pytest

from guidegen.errors import CheckpointError, UsageError
from guidegen.schema import convert, decode, read_bytes


@dataclass(frozen=True)
class Thing:
    count: Annotated[int, msgspec.Meta(ge=0)]
    name: str = ""


def test_a_value_of_the_type_comes_out_and_unknown_fields_do_not_matter() -> None:
    assert decode(b'{"count": 3, "newer": [1]}', Thing, "it", UsageError) == Thing(3)
    assert convert({"count": 3, "name": "x"}, Thing, "it", UsageError) == Thing(3, "x")


@pytest.mark.parametrize(
    "data",
    [
        *(b"", b"{", b"\xff\xfe", b"[]", b"null", b'{"count": -1}', b'{"count": true}', b'{"count": "3"}', b'{"name": "x"}'),
        *(b'{"count": NaN}', b'{"count": 1e999}', b"[" * 100_000, b'{"a":' * 100_000, b'{"count": ' + b"9" * 5000 + b".5}"),
    ],
    ids=lambda data: repr(data[:16]),
)
def test_anything_else_is_an_error_of_one_line_that_names_it(data: bytes) -> None:
    with pytest.raises(UsageError) as found:
        decode(data, Thing, "run.json", UsageError)
    assert str(found.value).startswith("run.json is ")
    assert "\n" not in str(found.value)


def test_the_message_says_where() -> None:
    with pytest.raises(CheckpointError, match=r"^it is not valid: expected int >= 0 at count\.$"):
        convert({"count": -1}, Thing, "it", CheckpointError)


def test_only_regular_files_of_some_size_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "file").write_bytes(b"12345")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    assert read_bytes(tmp_path / "file", UsageError) == b"12345"
    cases: list[Any] = [tmp_path / "fifo", tmp_path, tmp_path / "dangling", Path("/dev/zero"), tmp_path / "a\0b"]
    for path in cases:
        with pytest.raises(UsageError):
            read_bytes(path, UsageError)
    with pytest.raises(UsageError, match="more than 4 bytes"):
        read_bytes(tmp_path / "file", UsageError, 4)
