from __future__ import annotations

import pytest

from guidegen.cli.options import resolve_labels
from guidegen.errors import UsageError
from guidegen.models.labels import Labels

LABELS = Labels({1: "goldfish", 207: "golden retriever", 281: "tabby, tabby cat", 134: "crane", 517: "crane", 2: "", 3: ""})


@pytest.mark.parametrize(
    ("words", "ids"),
    [
        (["207"], [207]),
        (["golden retriever"], [207]),
        (["GOLDEN Retriever "], [207]),
        (["tabby cat"], [281]),
        (["tabby, tabby cat"], [281]),
        (['207,"tabby"'], [207, 281]),
        (["207", "1"], [207, 1]),
        (["1-3"], [1, 2, 3]),
        (["1,1,207"], [1, 207]),
        (["all"], [1, 2, 3, 134, 207, 281, 517]),
    ],
)
def test_resolved(words: list[str], ids: list[int]) -> None:
    assert resolve_labels(words, LABELS) == ids


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("golden retreiver", "207 golden retriever"),
        ("crane", "134 crane; 517 crane"),
        ("206", "207 golden retriever"),
        ("1-4", "4 is not a label"),
        ("3-1", "ends before"),
        ("", "no label"),
        ("@/nowhere/labels.txt", "cannot be read"),
    ],
)
def test_refused_with_help(word: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        resolve_labels([word], LABELS)


def test_search_finds_close_names_and_ids() -> None:
    assert LABELS.search("retriever")[0] == 207
    assert LABELS.search("golden")[:2] == [1, 207] or LABELS.search("golden")[0] == 207
    assert LABELS.search("281") == [281]
    assert LABELS.search("") == [1, 2, 3, 134, 207, 281, 517]
    assert LABELS.search("zzzzzz") == []


def test_short_name_is_the_first_synonym() -> None:
    assert LABELS.name(281) == "tabby"
    assert LABELS.name(2) == ""
