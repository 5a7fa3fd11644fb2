"""The page of tools.watch in a real browser: what it draws, and what it does when somebody chooses."""

import itertools
import math
import re
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

import numpy as np
import pytest
from torch.utils.tensorboard import SummaryWriter

from tests.support.browser import CHROMIUM, WITHOUT, Browser, Page
from tests.support.watch_server import serving
from tools.watching.server import Watching

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=WITHOUT)

LOSSES = "loss (training, and validation as dots)"
NO_POLLS = "setTimeout = () => 0"
"""A page that looks once, and then only when somebody has chosen something."""
COUNTED = 2.375


def make_run(folder: Path, curves: dict[str, Sequence[float]], status: str = "done") -> None:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("{}")
    (folder / "status.json").write_text(f'{{"status": "{status}", "step": 60, "max_steps": 60}}')
    with SummaryWriter(folder) as writer:
        for tag, values in curves.items():
            for step, value in enumerate(values):
                writer.add_scalar(tag, value, step)
        writer.add_image("depth/signal", np.zeros((3, 4, 4), np.float32), 9)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("page") / "runs"
    losses = [4.2 - step / 40 for step in range(60)]
    make_run(root / "a", {"train/loss": losses, "val/loss": [3.0], "val/bigram_loss": [COUNTED], "x/small": [1, 1e-2]})
    decades = [10.0**-step for step in range(5)]
    both = {"train/loss": losses[::-1], "val/loss": [2.5], "val/bigram_loss": [COUNTED]}
    make_run(root / "b", both | {"x/decades": decades, "x/10": [1.0], "x/9": [1.0], "x/near": [0.4, 6]}, "stopped")
    (root / "elsewhere").mkdir()
    (root / "elsewhere/config.yaml").write_text("logger: {mlflow: {}}")
    (root / "elsewhere/mlflow.db").write_bytes(b"SQLite format 3\0")
    return root


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("browser") / "profile") as opened:
        yield opened


@pytest.fixture
def server(folder: Path) -> Iterator[Watching]:
    with serving(folder) as served:
        yield served


def opened(browser: Browser, server: Watching, width: int = 1200, **view: Any) -> Page:
    """The page after its first look, which is its last by itself."""
    address = f"http://127.0.0.1:{server.server_port}/#{urlencode(view, doseq=True)}"
    page = browser.open(address, width, NO_POLLS)
    page.wait("document.getElementById('state')?.textContent.startsWith('seen')")
    return page


def view(page: Page) -> dict[str, list[str]]:
    return parse_qs(page.run("location.hash.slice(1)"), keep_blank_values=True)


def lines(page: Page) -> list[tuple[str, list[tuple[float, float]]]]:
    """Of each line its colour, and its points in pixels."""
    drawn = page.run(
        "[...document.querySelectorAll('#charts path')].map(p => [p.getAttribute('stroke'), p.getAttribute('d')])"
    )
    return [
        (colour, [(float(x), float(y)) for x, y in re.findall(r"[ML]([\d.-]+) ([\d.-]+)", path)])
        for colour, path in drawn
    ]


def texts(page: Page, selector: str) -> list[str]:
    found: list[str] = page.run(f"[...document.querySelectorAll('{selector}')].map(one => one.textContent)")
    return found


def boxes(page: Page, selector: str) -> list[dict[str, float]]:
    """Where things are on the screen."""
    found: list[dict[str, float]] = page.run(
        f"[...document.querySelectorAll('{selector}')].map(one => one.getBoundingClientRect().toJSON())"
    )
    return found


def differences(values: Sequence[float]) -> list[float]:
    return [after - before for before, after in itertools.pairwise(values)]


def numbers(page: Page, kind: str) -> list[float]:
    return [float(text.replace(",", "")) for text in texts(page, f"#charts text.{kind}")]


def test_a_run_whose_curves_lie_elsewhere_is_said_to_have_none(browser: Browser, server: Watching) -> None:
    with opened(browser, server, run=["a", "elsewhere"]) as page:
        (said,) = texts(page, "#problems")
        assert said == (
            "no curves of elsewhere: the page reads TensorBoard's event files and csv/version_N/metrics.csv in a run's "
            "folder, no other logger's"
        )
        assert boxes(page, "#problems")[0]["height"] < 30, "one line"
        page.click("input[aria-label=elsewhere]")
        page.wait("!document.getElementById('problems').textContent")
        assert texts(page, "#no-pictures") == [""]
    with opened(browser, server, run="elsewhere") as page:
        assert "event files" in texts(page, "#no-pictures")[0]
    with opened(browser, server, run=["a", "b"], tag="x/decades") as page:
        assert texts(page, "#problems") == ["not written by a"]


def test_a_scalar_is_chosen_from_all_that_are_written_and_drawn_at_once(browser: Browser, server: Watching) -> None:
    with opened(browser, server, run=["a", "b"]) as page:
        assert texts(page, "#tag option") == [
            LOSSES, "train/loss", "val/bigram_loss", "val/loss", "x/9", "x/10", "x/decades", "x/near", "x/small",
        ]  # fmt: skip
        assert [len(points) for _, points in lines(page)] == [60, 60]
        page.enter("#tag", "x/decades")
        page.wait("document.querySelector('#charts svg').getAttribute('aria-label') === 'x/decades'")
        (drawn,) = page.wait("document.querySelectorAll('#charts path').length === 1") and lines(page)
        assert len(drawn[1]) == 5
        assert view(page)["tag"] == ["x/decades"]
        page.run("location.hash = '#run=a&tag=x/small'")
        page.wait("document.querySelector('#charts svg').getAttribute('aria-label') === 'x/small'")
        assert len(lines(page)[0][1]) == 2
        assert page.run("document.getElementById('tag').value") == "x/small"


def test_logarithmic_is_that_of_the_values(browser: Browser, server: Watching) -> None:
    with opened(browser, server, run="b", tag="x/decades") as page:
        ((_, points),) = lines(page)
        linear = differences([y for _, y in points])
        assert linear[0] == pytest.approx(10 * linear[1], rel=0.01), "0.9 and 0.09, two pixels' rounding aside"
        page.click("#log")
        ((_, points),) = lines(page)
        decade, *others = differences([y for _, y in points])
        assert decade > 20
        assert others == pytest.approx([decade] * 3, abs=0.2)
        assert sorted(numbers(page, "value")) == [1e-4, 1e-3, 1e-2, 0.1, 1]
        assert "log" in view(page)
        page.click("#log")
        assert "log" not in view(page)
    with opened(browser, server, run="a", tag="train/loss", log=1) as page:
        assert len(numbers(page, "value")) >= 3, "less than a decade: numbers in between"
    with opened(browser, server, run="b", tag="x/near", log=1) as page:
        assert sorted(numbers(page, "value")) == [0.5, 1, 2, 5]


def test_runs_are_told_apart_and_each_can_be_left_out(browser: Browser, server: Watching) -> None:
    with opened(browser, server) as page:
        swatches = page.run(
            "[...document.querySelectorAll('#runs tbody tr')].map("
            "row => [row.cells[1].textContent, getComputedStyle(row.querySelector('.swatch')).backgroundColor])"
        )
        assert len({colour for _, colour in swatches}) == 3
        strokes = {colour for colour, _ in lines(page)}
        assert len(strokes) == 2
        page.click("input[aria-label=a]")
        page.wait("document.querySelectorAll('#charts path').length === 1")
        assert set(view(page)["run"]) == {"b", "elsewhere"}
        page.click("input[aria-label=b]")
        page.click("input[aria-label=elsewhere]")
        page.wait("document.querySelectorAll('#charts path').length === 0")
        assert view(page)["run"] == [""], "none is a choice too"
        page.click("input[aria-label=a]")
        page.wait("document.querySelectorAll('#charts path').length === 1")
    with opened(browser, server, run="") as page:
        assert not lines(page)


def test_the_filter_hides_rows_by_name_and_status(browser: Browser, server: Watching) -> None:
    with opened(browser, server) as page:
        shown = "#runs tbody td:nth-child(2)"
        assert sorted(texts(page, shown)) == ["a", "b", "elsewhere"]
        page.enter("#filter", "ELSE")
        assert texts(page, shown) == ["elsewhere"]
        assert view(page)["only"] == ["ELSE"]
        page.enter("#filter", "stopped")
        assert texts(page, shown) == ["b"]
    with opened(browser, server, only="elsew") as page:
        assert texts(page, shown) == ["elsewhere"]


def test_the_pictures_are_those_of_the_run_that_is_chosen(browser: Browser, server: Watching) -> None:
    shown = "[...document.querySelectorAll('#pictures img')].filter(image => image.naturalWidth === 4).map(i => i.src)"
    with opened(browser, server, run=["a", "b", "elsewhere"]) as page:
        assert texts(page, "#of option") == ["a", "b"]
        (first,) = page.wait(shown)
        page.enter("#of", "b")
        (second,) = page.wait(f"(of_b => of_b.length && of_b[0] !== '{first}' && of_b)({shown})")
        assert [parse_qs(urlsplit(address).query)["run"] for address in (first, second)] == [["a"], ["b"]]
        assert texts(page, "#pictures figcaption") == ["depth/signal, step 10"]
        assert view(page)["of"] == ["b"]
    with opened(browser, server, run=["a", "b"], of="b") as page:
        assert page.run("document.getElementById('of').value") == "b"


@pytest.mark.parametrize("width", [640, 1400])
def test_axes_have_round_numbers_that_can_be_read_and_dots_are_round(
    browser: Browser, server: Watching, width: int
) -> None:
    with opened(browser, server, run=["a", "b"]) as page:
        page.resize(width)
        drawn = "document.querySelector('#charts svg').clientWidth === document.getElementById('charts').clientWidth"
        page.wait(f"innerWidth === {width} && {drawn}")
        (chart,) = boxes(page, "#charts svg")
        assert chart["width"] > 0.8 * min(width, 1240)
        for kind in ("value", "step"):
            ticks = sorted(numbers(page, kind))
            (size,) = {round(step, 9) for step in differences(ticks)}
            assert round(size / 10 ** math.floor(math.log10(size) + 1e-9), 6) in (1, 2, 5), ticks
            assert all(round(tick / size, 6) % 1 == 0 for tick in ticks)
            assert 4 <= len(ticks) <= 14
        assert numbers(page, "step")[-1] == 60, "as many as the table says"
        labels = boxes(page, "#charts text")
        assert all(12 <= box["height"] <= 20 for box in labels), "of the same size, however wide the page"
        assert all(box["left"] >= chart["left"] and box["right"] <= chart["right"] for box in labels)
        steps = boxes(page, "#charts text.step")
        assert all(before["right"] + 4 < after["left"] for before, after in itertools.pairwise(steps))
        dots = boxes(page, "#charts circle")
        assert len(dots) == 2
        assert all(box["width"] == pytest.approx(box["height"], rel=1e-3) for box in dots)


def test_counted_pairs_are_a_dashed_line_beside_losses_alone(browser: Browser, server: Watching) -> None:
    for tag in (LOSSES, "train/loss", "val/loss"):
        with opened(browser, server, run=["a", "b"], tag=tag) as page:
            assert texts(page, "#charts text.level") == ["counted pairs 2.375"], "one, which both have"
            line = "document.querySelector('#charts line.level')"
            dashes, width = (
                page.run(f"getComputedStyle({line}).{name}") for name in ("strokeDasharray", "strokeWidth")
            )
            assert (dashes, width) == ("5px, 4px", "1px")
            assert boxes(page, "#charts line.level")[0]["width"] > 1000
            values = sorted(numbers(page, "value"))
            grid = sorted((box["top"] for box in boxes(page, "#charts line.grid")), reverse=True)
            share = (COUNTED - values[0]) / (values[-1] - values[0])
            expected = grid[0] + share * (grid[-1] - grid[0])
            assert boxes(page, "#charts line.level")[0]["top"] == pytest.approx(expected, abs=1)
    with opened(browser, server, run=["a", "b"], tag="x/decades") as page:
        assert not texts(page, "#charts .level")


def test_the_nearest_point_is_told_under_the_mouse(browser: Browser, server: Watching) -> None:
    with opened(browser, server, run="a", tag="train/loss") as page:
        (chart,) = boxes(page, "#charts svg")
        ((_, points),) = lines(page)
        x, y = points[39]
        page.point(chart["left"] + x + 2, chart["top"] + y - 3)
        page.wait("document.getElementById('nearest').textContent")
        assert texts(page, "#nearest") == [f"step 40: {4.2 - 39 / 40:.4g} (a, train/loss)"]
        marked = page.run("['cx', 'cy'].map(name => document.querySelector('.nearest').getAttribute(name))")
        assert [float(part) for part in marked] == pytest.approx([x, y], abs=0.1)
        page.point(5, 5)
        page.wait("!document.getElementById('nearest').textContent")
        assert not texts(page, ".nearest")


def test_what_is_chosen_last_is_drawn_however_late_an_earlier_answer_comes(
    browser: Browser, server: Watching, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, asked, late = server.content.curves, threading.Event(), threading.Event()

    def curves(run: Path, tags: Sequence[str]) -> dict[str, Any]:
        if tags == ["x/decades"]:
            asked.set()
            late.wait(20)
        return real(run, tags)

    monkeypatch.setattr(server.content, "curves", curves)
    with opened(browser, server, run="b") as page:
        page.enter("#tag", "x/decades")
        assert asked.wait(20)
        page.enter("#tag", "x/9")
        chart = "document.querySelector('#charts svg').getAttribute('aria-label')"
        page.wait(f"{chart} === 'x/9'")
        late.set()
        page.wait("performance.getEntriesByType('resource').some(one => one.name.includes('decades'))")
        time.sleep(0.1)
        assert page.run(chart) == "x/9"
        assert len(boxes(page, "#charts circle")) == len(lines(page)[0][1]) == 1, "the one point of x/9 can be seen"


@pytest.mark.parametrize("values", [[1.0, 1.0 + 2**-23], [3e38, -3e38], [1e-45, 1e-45], [0.0, -1.0], [7e20]])
def test_any_numbers_can_be_drawn(browser: Browser, tmp_path: Path, values: list[float]) -> None:
    make_run(tmp_path / "runs/odd", {"train/loss": values})
    with serving(tmp_path / "runs") as server, opened(browser, server) as page:
        for _ in range(2):
            (chart,) = boxes(page, "#charts svg")
            assert 2 <= len(numbers(page, "value")) <= 14 or page.run("document.getElementById('log').checked")
            for box in boxes(page, "#charts text"):
                assert chart["left"] <= box["left"] < box["right"] <= chart["right"] + 1
            page.click("#log")
