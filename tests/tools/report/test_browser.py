"""The report in headless Chromium, on a wide screen and on a phone.

MRP_REPORT_RUNS="RUN" or "RUN:RUN2" also tests the page of real runs. MRP_REPORT_SHOTS=FOLDER saves
screenshots of all pages.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from mask_rcnn_tools.report.command import main
from tests import browser
from tests.tools.report.conftest import HOSTILE, MakeRun

pytestmark = pytest.mark.slow

OBJECTS = [(1, 1, [5.0, 5, 20, 20]), (1, 2, [35.0, 35, 20, 20]), (2, 1, [10.0, 10, 30, 30])]
FOUND = [(1, 1, [5.0, 5, 20, 20], 0.9), (1, 1, [35.0, 35, 20, 20], 0.8)]
BETTER = [*FOUND, (1, 2, [35.0, 35, 20, 20], 0.85), (2, 1, [10.0, 12, 30, 30], 0.7)]

STATE = """({
    scroll: document.documentElement.scrollWidth,
    client: document.documentElement.clientWidth,
    images: document.images.length,
    broken: [...document.images].filter(i => !(i.complete && i.naturalWidth > 0)).length,
    unseen: [...document.images].filter(i => !(i.getBoundingClientRect().width >= 40)).length,
    wider: [...document.querySelectorAll("body *")].filter(
        e => e.getBoundingClientRect().right > document.documentElement.clientWidth + 1
            && !e.closest(".wide, pre")).map(e => e.outerHTML.slice(0, 80)),
    // The pictures of the panels in one line must be at the same height.
    uneven: [...document.querySelectorAll(".panels")].filter(p => {
        const lines = new Map();
        for (const panel of p.children) {
            const top = Math.round(panel.getBoundingClientRect().top);
            const at = Math.round(panel.querySelector("img").getBoundingClientRect().top);
            lines.set(top, (lines.get(top) || new Set()).add(at));
        }
        return [...lines.values()].some(places => places.size > 1);
    }).length,
    unnamed: [...document.querySelectorAll("a[href^='#']")].filter(
        a => !document.getElementById(a.getAttribute("href").slice(1))).length,
})"""


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Browser]:
    path = browser.find()
    if path is None:
        pytest.skip("Chromium is missing; on Debian: apt-get install chromium")
    with browser.started(path, tmp_path_factory.mktemp("profile")) as opened:
        yield opened


def check(chromium: browser.Browser, page: Path) -> None:
    for width in (1280, 400):
        chromium.open(page, width=width)
        # Folded sections must fit too.
        chromium.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true })")
        state = chromium.evaluate(STATE)
        assert chromium.console == []
        assert chromium.requests == [page.resolve().as_uri()]
        assert state["images"] > 8 and state["broken"] == state["unseen"] == 0
        assert state["scroll"] <= state["client"] <= width and state["wider"] == []
        assert state["unnamed"] == state["uneven"] == 0
        if folder := os.environ.get("MRP_REPORT_SHOTS"):
            chromium.screenshot(Path(folder) / f"{page.stem}_{width}.png")


def test_one_run(chromium: browser.Browser, trained: Path, shapes: Path, tmp_path: Path) -> None:
    assert main([str(trained), "--output", str(tmp_path / "one.html")]) == 0
    check(chromium, tmp_path / "one.html")


def test_two_runs_with_long_and_hostile_names(
    chromium: browser.Browser, make_run: MakeRun, tmp_path: Path
) -> None:
    classes = (HOSTILE, "x" * 200, *(f"class number {i}" for i in range(12)))
    files = (f"{'long' * 40}.png", "b.png")
    runs = [
        make_run(name * 40, found, objects=OBJECTS, classes=classes, files=files)
        for name, found in (("one", FOUND), ("two", BETTER))
    ]
    assert main([*map(str, runs), "--output", str(tmp_path / "two.html")]) == 0
    check(chromium, tmp_path / "two.html")


@pytest.mark.skipif("MRP_REPORT_RUNS" not in os.environ, reason="MRP_REPORT_RUNS is not set")
def test_real_runs(chromium: browser.Browser, tmp_path: Path) -> None:
    runs = os.environ["MRP_REPORT_RUNS"].split(":")
    page = tmp_path / f"{'_'.join(Path(run).name for run in runs)}.html"
    assert main([*runs, "--output", str(page)]) == 0
    check(chromium, page)
