"""The page in a real browser, as a reader has it: from a file, without a network, wide and narrow, light and dark.

Needs the package playwright and a Chromium on this machine; without them the tests are skipped, unless
ALTGRAD_JAX_NEEDS_BROWSER=1 says that they must run.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from altgrad_jax.report.export import write_report
from altgrad_jax.report.runs import read_runs
from altgrad_jax.report.study import make_study
from tests.report.made import falling, make_matrix, make_run
from tests.report.test_page import HOSTILE, broken

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
ARGUMENTS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
]
CHARTS = {"losses", "gaps", "final_gaps", "matrix", "gains", "heat"}
READY = "document.documentElement.dataset.ready === 'true'"
OPTIMIZERS = ("adamw", "relative", "madam")
LINES = "document.querySelectorAll('[data-chart=losses] svg .mark-line path').length"


@dataclass
class Reader:
    """A browser, and what it complained of and asked for."""

    context: Any
    said: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)

    @contextmanager
    def reading(self, page: Path, width: int = 1400, scheme: str = "light") -> Iterator[Any]:
        """A tab with the page in it, drawn."""
        self.said.clear(), self.asked.clear()
        tab = self.context.new_page()
        tab.set_viewport_size({"width": width, "height": 900})
        tab.emulate_media(color_scheme=scheme)
        tab.on("console", lambda message: self.said.append(f"{message.type}: {message.text}"))
        tab.on("pageerror", lambda error: self.said.append(str(error)))
        tab.on("dialog", lambda dialog: (self.said.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        tab.on("request", lambda request: self.asked.append(request.url))
        tab.goto(page.as_uri())
        tab.wait_for_function(READY, timeout=60_000)
        yield tab
        tab.close()
        assert self.said == []
        assert [url for url in self.asked if not url.startswith(("file:", "data:"))] == []


def _lacks(what: str) -> None:
    if os.environ.get("ALTGRAD_JAX_NEEDS_BROWSER") == "1":
        pytest.fail(f"{what}, and ALTGRAD_JAX_NEEDS_BROWSER=1 says that the page must be tested")
    pytest.skip(what)


@pytest.fixture(scope="module")
def reader(tmp_path_factory) -> Iterator[Reader]:
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        _lacks("playwright is not installed")
    path = next((found for name in NAMES if (found := shutil.which(name))), None)
    if path is None:
        _lacks(f"no Chromium on the PATH ({', '.join(NAMES)})")
    profile = tmp_path_factory.mktemp("profile")
    with sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            str(profile), executable_path=path, headless=True, args=ARGUMENTS
        )
        context.set_offline(True)
        yield Reader(context)
        context.close()


def written(folder: Path, page: Path) -> Path:
    write_report(make_study(read_runs([str(folder)]), [folder], page), page, "python -m altgrad_jax.report")
    return page


@pytest.fixture(scope="module")
def matrix(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("matrix")
    make_matrix(folder / "m", ("e0m7", "e5m2", "e7m0"), OPTIMIZERS, (1, 2, 3))
    return written(folder / "m", folder / "report.html")


@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_charts_are_drawn_and_the_page_fits(reader, matrix, width, scheme):
    with reader.reading(matrix, width, scheme) as tab:
        charts = tab.evaluate(
            "[...document.querySelectorAll('.chart')].map(e => [e.dataset.chart,"
            " e.querySelectorAll('svg path').length, e.querySelector('svg').getBoundingClientRect().width])"
        )
        assert {name for name, _, _ in charts} == CHARTS
        assert all(paths > 5 and 0.6 * min(width, 1320) < wide <= width for _, paths, wide in charts), charts
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        # Wide tables scroll in their own box.
        wider = "[...document.querySelectorAll('.scroll')].some(e => e.scrollWidth > e.clientWidth)"
        assert tab.evaluate(wider) or width > 400
        paper, ink = tab.evaluate(
            "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
            ".map(c => c.match(/\\d+/g).slice(0, 3).reduce((a, b) => a + +b, 0))"
        )
        assert (paper > ink) == (scheme == "light") and abs(paper - ink) > 400
        axis = tab.evaluate("getComputedStyle(document.querySelector('[data-chart=losses] svg text')).fill")
        assert sum(map(int, axis[4:-1].split(","))) == ink, "the charts follow the page"


def test_the_legend_toggles_conditions(reader, matrix):
    with reader.reading(matrix) as tab:
        everything = tab.evaluate(LINES)
        assert everything == 12  # 4 formats x 3 optimizers
        rules = "document.querySelectorAll('[data-chart=final_gaps] svg .mark-symbol.role-mark path').length"
        points = tab.evaluate(rules)
        tab.click("button[data-name='e5m2']")
        tab.wait_for_function(f"{LINES} === 9")
        assert tab.get_attribute("button[data-name='e5m2']", "aria-pressed") == "false"
        assert tab.evaluate(rules) == points - 3
        tab.click("button[data-name='relative']")
        tab.wait_for_function(f"{LINES} === 6")
        # What is hidden stays hidden when a chart is drawn anew.
        tab.select_option(".controls[data-for=losses] [name=kind]", "training")
        tab.wait_for_timeout(300)
        tab.wait_for_function(f"{LINES} === 6")
        tab.click("button[data-name='e5m2']")
        tab.wait_for_function(f"{LINES} === 8")
        tab.click("[data-all]")
        tab.wait_for_function(f"{LINES} === 12")


def test_the_controls_change_the_axes(reader, matrix):
    with reader.reading(matrix) as tab:
        losses = tab.locator("[data-chart=losses] svg")
        for value, title in (("tokens", "tokens"), ("seconds", "training time, s"), ("step", "step")):
            tab.select_option(".controls[data-for=losses] [name=x]", value)
            losses.locator("text", has_text=title).first.wait_for()
        before = losses.inner_html()
        for name in ("logx", "logy", "bands"):
            tab.click(f".controls[data-for=losses] [name={name}]")
            tab.wait_for_function("b => document.querySelector('[data-chart=losses] svg').innerHTML !== b", arg=before)
            before = losses.inner_html()
        heat = tab.locator("[data-chart=heat] svg")
        assert heat.locator("text", has_text="lm_head · gradient").count() == 1
        tab.select_option(".controls[data-for=heat] [name=measure]", "stall")
        heat.locator("text", has_text="lm_head · update").first.wait_for()
        tab.select_option(".controls[data-for=heat] [name=condition]", "bf16, adamw")
        heat.locator("text", has_text="stall").first.wait_for()


CURVES = {f"{curve}, {optimizer}" for curve in ("bf16", "e0m7", "e5m2", "e7m0") for optimizer in OPTIMIZERS}


def said_under_the_pointer(tab, chart: str) -> dict[str, str]:
    """The tooltip of a chart as {name: value}, the pointer in its middle."""
    tab.locator(f"[data-chart={chart}]").scroll_into_view_if_needed()
    box = tab.locator(f"[data-chart={chart}] svg").bounding_box()
    for share in (0.5, 0.52):
        tab.mouse.move(box["x"] + share * box["width"], box["y"] + 0.5 * box["height"])
        tab.wait_for_timeout(200)
    tip = tab.locator("#vg-tooltip-element")
    tip.wait_for(state="visible")
    return {row.locator("td.key").inner_text(): row.locator("td.value").inner_text() for row in tip.locator("tr").all()}


@pytest.mark.parametrize("chart", ["losses", "gaps"])
def test_hovering_over_a_line_names_the_condition(reader, matrix, chart):
    with reader.reading(matrix) as tab:
        if chart == "losses":  # drawn anew as well as at first
            tab.select_option(".controls[data-for=losses] [name=kind]", "training")
        said = said_under_the_pointer(tab, chart)
        assert said["condition"] in CURVES and "undefined" not in said.values()
        points = f"[...document.querySelectorAll('[data-chart={chart}] svg .mark-symbol path')]"
        tab.wait_for_function(f"{points}.filter(e => +e.getAttribute('opacity') === 1).length === 1")


@pytest.mark.parametrize(
    ("chart", "where"),
    [
        ("matrix", "[data-chart=matrix] svg .mark-rect path >> nth=3"),
        ("final_gaps", "[data-chart=final_gaps] svg .mark-symbol.role-mark path >> nth=3"),
        ("gains", "[data-chart=gains] svg .mark-symbol.role-mark path >> nth=3"),
    ],
)
def test_hovering_over_a_cell_or_a_point_names_the_condition(reader, matrix, chart, where):
    with reader.reading(matrix) as tab:
        tab.locator(where).hover(force=True)
        tip = tab.locator("#vg-tooltip-element")
        tip.wait_for(state="visible")
        cells = tip.locator("tr").all()
        said = {row.locator("td.key").inner_text(): row.locator("td.value").inner_text() for row in cells}
        assert said["condition"] in CURVES, (chart, said)


def test_wide_tables_show_all_their_columns_on_a_wide_screen(reader, matrix):
    with reader.reading(matrix, 1400) as tab:
        for table in ("results", "formats", "gains", "matrix", "first_failures", "speed"):
            cut = f"(e => e.scrollWidth - e.clientWidth)(document.querySelector('#table-{table} .scroll'))"
            assert tab.evaluate(cut) <= 0, table


def test_on_paper_everything_is_open_and_black_on_white(reader, matrix):
    with reader.reading(matrix, scheme="dark") as tab:
        tab.evaluate("dispatchEvent(new Event('beforeprint'))")
        tab.emulate_media(media="print")
        assert tab.evaluate("[...document.querySelectorAll('details')].every(e => e.open)")
        assert tab.evaluate("getComputedStyle(document.body).color") == "rgb(0, 0, 0)"


@pytest.mark.parametrize("width", [400, 1400])
def test_hostile_names_and_broken_runs(reader, tmp_path, width):
    """Names that would run, break out of a script or widen the page; runs with NaN, without losses, without files."""
    broken(tmp_path / "m")
    name = HOSTILE.replace("/", "∕")
    for seed in (1, 2):
        make_run(tmp_path / "m" / f"{name}{seed}", seed=seed)
        condition = {"recipe": HOSTILE * 3, "optimizer": "x" * 200, "layers": HOSTILE, "seed": seed}
        make_run(tmp_path / "m" / f"long{seed}", falling(3.3), "e5m2", seed=seed, condition=condition)
    with reader.reading(written(tmp_path / "m", tmp_path / "report.html"), width) as tab:
        assert tab.evaluate("window.hacked") is None
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        assert tab.locator("[data-chart=losses] svg .mark-line path").count() > 0


def test_one_seed_of_one_condition(reader, tmp_path):
    make_run(tmp_path / "m" / "a", measured=False)
    with reader.reading(written(tmp_path / "m", tmp_path / "report.html"), 400) as tab:
        assert tab.locator(".chart").count() == 1
        assert "nothing to compare" in tab.locator("#answer").inner_text()
