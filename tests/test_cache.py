"""Measurements that are remembered."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from onnxcomp.cache import remembered


def counting() -> tuple[list[int], Callable[[], int]]:
    calls: list[int] = []

    def measure() -> int:
        calls.append(1)
        return len(calls)

    return calls, measure


def test_a_value_is_measured_once_for_each_key(tmp_path: Path) -> None:
    calls, measure = counting()
    assert [remembered("grid", {"cpu": c}, measure, folder=tmp_path) for c in ("a", "a", "b", "a")] == [1, 1, 2, 1]
    assert len(calls) == 2


def test_a_damaged_file_is_measured_again_and_replaced(tmp_path: Path) -> None:
    _, measure = counting()
    remembered("grid", {}, measure, folder=tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_text('{"key": {}', encoding="utf-8")
    assert remembered("grid", {}, measure, folder=tmp_path) == 2
    assert remembered("grid", {}, measure, folder=tmp_path) == 2


def test_a_folder_that_cannot_be_made_is_no_error(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("", encoding="utf-8")
    _, measure = counting()
    assert [remembered("grid", {}, measure, folder=blocked / "cache") for _ in range(2)] == [1, 2]
