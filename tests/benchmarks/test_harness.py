"""Shared code of the benchmarks: alternation and tables."""

from functools import partial

import pytest

from benchmarks import ablate
from benchmarks.harness import alternate, markdown_table


def test_implementations_alternate_and_warm_ups_are_dropped() -> None:
    calls = []

    def run(name: str, turn: int) -> int:
        calls.append(f"{name}{turn}")
        return turn

    runs = {name: partial(run, name) for name in "ab"}
    assert alternate(runs, turns=2, warm_ups=1) == {"a": [1, 2], "b": [1, 2]}
    assert calls == ["a0", "b0", "a1", "b1", "a2", "b2"]
    calls.clear()
    assert alternate(runs, turns=9, warm_ups=1, rotate=True, enough=lambda turns: turns == 1) == {
        "a": [1],
        "b": [1],
    }
    assert calls == ["a0", "b0", "b1", "a1"]


def test_markdown_escapes_bars_in_cells() -> None:
    assert markdown_table(["class", "AP"], [["a|b", "1.0"]], align_right=True) == [
        "| class | AP |",
        "| --- | ---: |",
        r"| a\|b | 1.0 |",
    ]


@pytest.mark.parametrize(
    "argv",
    [
        ["--seeds", "2", "training", "SOLVER.BASE_LR", "-1"],
        ["training", "SOLVER.BASE_LR", "-1", "--seeds", "2"],
        ["training", "--seeds=2", "SOLVER.BASE_LR", "-1"],
    ],
)
def test_options_work_before_and_after_overrides(argv: list[str]) -> None:
    arguments = ablate._parse(argv)
    assert arguments.seeds == 2 and arguments.positionals == ["training", "SOLVER.BASE_LR", "-1"]
