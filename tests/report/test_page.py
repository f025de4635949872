"""The page as text: its numbers are the CSV's, nothing from files is markup, and it builds whatever the runs lack."""

import csv
import errno
import json
import math
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from altgrad_jax.errors import UsageError, UserError
from altgrad_jax.report import export
from altgrad_jax.report.compare import compare, decisions, notes
from altgrad_jax.report.page import embedded
from altgrad_jax.report.runs import read_runs
from altgrad_jax.report.study import make_study
from tests.forks import ROOT, run_module
from tests.report.made import falling, make_matrix, make_run
from tests.test_cli_errors import assert_one_line

HOSTILE = "</script><script>window.hacked=1</script><img src=x onerror='window.hacked=1'>\"&{{7*7}}\u2028é"


class Page(HTMLParser):
    """Tables of a page as {(table, row, column): (value, low, high, text)}, and its tags and links."""

    def __init__(self, text: str):
        super().__init__()
        self.cells: dict[tuple[str, str, str], tuple[str, str, str, str]] = {}
        self.tags: list[tuple[str, dict]] = []
        self._table, self._row, self._columns, self._inside = "", "", [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        of = dict(attrs)
        self.tags.append((tag, of))
        if tag == "table":
            self._table, self._columns = of["data-table"], []
        elif tag == "tr":
            self._row, self._at = of.get("data-row", ""), 0
        elif tag in ("td", "th"):
            self._inside, self._text, self._of = tag, "", of

    def handle_data(self, data):
        if self._inside:
            self._text += data

    def handle_endtag(self, tag):
        if tag == "th" and not self._row:
            self._columns.append(self._text)
        elif tag == "td" and self._row:
            self._at += 1
            column = self._columns[self._at]
            raw = tuple(self._of.get(f"data-{name}", "") for name in ("value", "low", "high"))
            self.cells[self._table, self._row, column] = (*raw, self._text)
        if tag in ("td", "th"):
            self._inside = ""


def report(folder: Path, page: Path) -> tuple[Page, str]:
    study = make_study(read_runs([str(folder)]), [folder], page)
    export.write_report(study, page, f"python -m altgrad_jax.report {folder.name}")
    text = page.read_text()
    return Page(text), text


def csv_cells(page: Path) -> dict[tuple[str, str, str], tuple[str, str, str, str]]:
    with page.with_suffix(".csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        for of in row.values():
            assert not of.startswith(("=", "+", "@", "\t", "\r")) and (not of.startswith("-") or float(of) < 0)
    plain = [{key: re.sub(r"^'(?=\s*[=+@\-])", "", of) for key, of in row.items()} for row in rows]
    found = {(r["table"], r["row"], r["column"]): (r["value"], r["low"], r["high"], r["text"]) for r in plain}
    assert len(found) == len(rows), "every cell has a place of its own"
    return found


def test_the_pages_numbers_are_the_csvs(tmp_path):
    folder = make_matrix(tmp_path / "m", ("e0m7", "e1m6", "e5m2"), ("adamw", "relative"), missing=["e5m2-adamw-2"])
    page = tmp_path / "report.html"
    shown, text = report(folder, page)
    cells = csv_cells(page)
    of_page = {key: value for key, value in shown.cells.items() if key[2] != "runs"}
    assert of_page == cells and len(cells) > 500
    tables = {table for table, _, _ in cells}
    assert {"results", "speed", "formats", "matrix", "gains", "first_failures", "sweet_spots", "hardware", "runs"} <= (
        tables
    )
    # The numbers are those of the runs.
    losses = []
    for seed in (1, 2, 3):
        last = (folder / f"e0m7-adamw-{seed}" / "metrics.jsonl").read_text().splitlines()[-1]
        losses.append(json.loads(last)["val/loss"])
    assert float(cells["results", "e0m7, adamw", "loss"][0]) == pytest.approx(sum(losses) / 3, rel=1e-12)
    # Each run has an anchor, a folder and a command; each table row names runs that exist.
    anchors = {of["id"] for _, of in shown.tags if "id" in of}
    links = [of["href"] for tag, of in shown.tags if tag == "a"]
    assert len(links) > 100 and all(link.startswith("#") and link[1:] in anchors for link in links)
    assert cells["runs", "1: m/bf16-adamw-1", "command"][3].endswith("--workdir=a b'")
    assert "e2" not in cells["runs", "1: m/bf16-adamw-1", "git"][3] and "0123456789ab" in text
    markdown = page.with_suffix(".md").read_text()
    assert cells["results", "e0m7, adamw", "gap"][3].replace("[", "\\[").replace("]", "\\]") in markdown
    assert "e5m2-adamw-2" in text and "e1m6 is e0m7 times 4" in text and "e1m6 is e0m7 times 4" in markdown


def test_nothing_from_files_is_markup(tmp_path):
    name = HOSTILE.replace("/", "∕")
    condition = {"matrix": HOSTILE, "recipe": HOSTILE, "optimizer": HOSTILE, "seed": 1, "layers": HOSTILE}
    folder = tmp_path / "m"
    for seed in (1, 2):
        make_run(folder / f"plain{seed}", seed=seed, layers=(HOSTILE, "lm_head"))
        hostile = condition | {"seed": seed}
        made = make_run(folder / f"{name}{seed}", falling(3.2), "e5m2", seed=seed, condition=hostile, reason=HOSTILE)
        manifest = json.loads((made / "manifest.json").read_text())
        manifest["sessions"][0] |= {"command": [HOSTILE], "git": {"commit": HOSTILE}, "started": HOSTILE}
        manifest["audit"] = {"problem": HOSTILE}
        (made / "manifest.json").write_text(json.dumps(manifest))
    expected = [{"name": HOSTILE, "recipe": HOSTILE}]
    asked = {"name": HOSTILE, "question": HOSTILE, "command": HOSTILE, "conditions": expected}
    (folder / "matrix.json").write_text(json.dumps(asked))
    shown, text = report(folder, tmp_path / "report.html")
    assert [tag for tag, _ in shown.tags].count("script") == 3
    assert not [of for tag, of in shown.tags if tag == "img" or "onerror" in of]
    assert "<script>window.hacked" not in text
    assert csv_cells(tmp_path / "report.html").items() <= shown.cells.items()
    assert any(HOSTILE.replace("\u2028", "?") in row for _, row, _ in shown.cells)
    markdown = (tmp_path / "report.md").read_text()
    assert "<script" not in markdown and "<img" not in markdown


def test_json_in_a_script():
    value = {"a": "</script><!--", "b": ["\u2028&", 1.5, None]}
    text = embedded(value)
    assert "<" not in text and "&" not in text and "\u2028" not in text and json.loads(text) == value
    with pytest.raises(ValueError):
        embedded([math.nan])


def broken(folder: Path) -> None:
    """Runs that lack or break everything once."""
    make_run(folder / "nan", lambda step: math.nan if step > 40 else 4.0, "e5m2")
    make_run(folder / "inf", lambda step: math.inf, "e4m3fn")
    make_run(folder / "diverged", lambda step: 3.0 + step, "e7m0", status="diverged", logged=30, reason="loss is NaN")
    make_run(folder / "failed", None, "e6m1", status="failed", logged=0, reason="out of memory")
    make_run(folder / "unfinished", status=None, logged=50)
    make_run(folder / "bare", measured=False)
    for name, lost in (("no_manifest", "manifest.json"), ("no_metrics", "metrics.jsonl")):
        (make_run(folder / name) / lost).unlink()
    torn = make_run(folder / "torn")
    for name in ("manifest.json", "summary.json", "metrics.jsonl"):
        (torn / name).write_text((torn / name).read_text()[:-40])
    odd = make_run(folder / "odd")
    with (odd / "metrics.jsonl").open("a") as file:
        values = {
            "val/loss": 10**400,
            "grads/lm_head/cosine": "NaN",
            "grads/lm_head/relative_error": "?",
            "train/loss": True,
        }
        file.write(json.dumps({"step": 101} | values) + "\n" + json.dumps({"step": 10**30, "val/loss": 1.0}) + "\n")
    lists = {"identity": {"seed": [1], "train.batch_size": "8", "model.block_size": None}, "audit": [], "config": 1}
    (odd / "manifest.json").write_text(json.dumps(lists | {"sessions": {"a": 1}, "corpus": "x", "condition": [1]}))
    (odd / "summary.json").write_text(json.dumps({"status": 3, "peak_memory_bytes": "much", "final": None}))


def test_it_builds_from_broken_runs_and_says_what_is_missing(tmp_path):
    broken(tmp_path / "m")
    _, text = report(tmp_path / "m", tmp_path / "report.html")
    for said in ("no manifest.json", "no summary.json", "is damaged", "out of memory", "loss is NaN", "Set apart"):
        assert said in text


@pytest.mark.parametrize("name", ["nan", "inf", "diverged", "failed", "unfinished", "bare", "no_manifest", "odd"])
def test_it_builds_from_one_run_of_each_kind(tmp_path, name):
    broken(tmp_path / "m")
    shown, _ = report(tmp_path / "m" / name, tmp_path / "report.html")
    assert any(table == "runs" for table, _, _ in shown.cells)


def test_classification_runs_have_their_own_table(tmp_path):
    make_run(tmp_path / "m" / "a")
    task = make_run(tmp_path / "m" / "b", config={"task": "classify"}, summary={"final": {"test/micro_f1": 0.61}})
    with (task / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 101, "val/micro_f1": 0.6, "val/macro_f1": 0.4}) + "\n")
    report(tmp_path / "m", tmp_path / "report.html")
    cells = csv_cells(tmp_path / "report.html")
    assert cells["classification", "2: m/b", "val micro_f1"][0] == "0.6"
    assert cells["classification", "2: m/b", "test micro_f1"][0] == "0.61"
    assert ("results", "bf16, adamw", "loss") in cells and "results" in {t for t, _, _ in cells}
    assert cells["results", "bf16, adamw", "seeds"][0] == "1.0"


def test_a_large_matrix_stays_small(tmp_path):
    layers = [f"blocks.{i}.{name}" for i in range(4) for name in ("attn.qkv", "attn.proj", "mlp.up", "mlp.down")]
    folder = make_matrix(tmp_path / "m", steps=150, every=15, layers=[*layers, "lm_head"])
    report(folder, tmp_path / "report.html")
    assert (tmp_path / "report.html").stat().st_size < 6e6
    assert len(csv_cells(tmp_path / "report.html")) > 3000


def test_the_command(tmp_path):
    """Mistakes are one line, before runs are read; without --out nothing of Altair is needed."""
    make_run(tmp_path / "runs" / "a")
    make_run(tmp_path / "runs" / "b", falling(3.1), "e5m2")
    runs, page = str(tmp_path / "runs"), str(tmp_path / "report.html")
    written, suffix, nowhere, baseline, lonely, terminal = run_module(
        "altgrad_jax.report.__main__",
        [
            [runs, f"--out={page}", "--baseline=e5m2"],
            [runs, "--out=report.pdf"],
            ["nothing", f"--out={tmp_path / 'none' / 'report.html'}"],
            [runs, f"--out={page}", "--baseline=e9m9"],
            [runs, "--baseline=e5m2"],
            [runs],
        ],
        tmp_path / "forks",
        ["altgrad_jax.console", "altgrad_jax.report.export"],
    )
    assert written.code == 0 and not written.err, written.err
    assert all(f"report.{kind}" in written.out for kind in ("html", "csv", "md"))
    assert ("results", "e5m2, adamw", "gap") in csv_cells(Path(page))
    assert csv_cells(Path(page))["results", "e5m2, adamw", "gap"][3] == "baseline"
    assert_one_line(suffix, 2, ["ends in .html"])
    assert_one_line(nowhere, 2, ["there is no folder", "none"])
    assert_one_line(baseline, 2, ["e9m9", "bf16, adamw"])
    assert_one_line(lonely, 2, ["--baseline goes with --out"])
    assert terminal.code == 0 and "no test can tell" in terminal.out


def test_without_altair_the_error_names_the_packages(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"""pip install "altgrad_jax\[report\]".*pip install 'altair>=5.4'"""):
        export.check_out(str(tmp_path / "report.html"))
    with pytest.raises(UsageError):
        export.check_out(str(tmp_path / "report.txt"))
    with pytest.raises(UserError, match="is a folder"):
        monkeypatch.undo()
        (tmp_path / "d.html").mkdir()
        export.check_out(str(tmp_path / "d.html"))


def test_the_terminal_does_without_altair():
    program = "import sys, altgrad_jax.report.__main__; print({'altair', 'vl_convert', 'jinja2'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert run.stdout == "set()\n", run.stderr


BIDI = "a\u202eb\u2066c\u200fd"


def test_no_text_moves_the_cursor_or_runs_as_a_formula(tmp_path):
    """From names of folders, manifests, metrics and matrices: in no file and in no line at the terminal."""
    folder = tmp_path / "m"
    odd = f"=cmd|'/C calc'!A0\x1b[2J\x9b31m{BIDI}\r\t"
    for seed in (1, 2):
        made = make_run(folder / f"@SUM\x1b{BIDI}{seed}", recipe="e4m3fn", seed=seed, layers=(f"-2+3{odd}", "lm_head"))
        condition = {"recipe": f"+1{odd}", "optimizer": odd, "seed": seed, "layers": "\t=1"}
        manifest = json.loads((made / "manifest.json").read_text())
        manifest |= {"condition": condition, "sessions": [{"command": ["=1", odd], "started": f"-{odd}"}]}
        (made / "manifest.json").write_text(json.dumps(manifest))
        (made / "summary.json").write_text(json.dumps({"status": "failed", "reason": odd}))
        make_run(folder / f"plain{seed}", seed=seed)
    (folder / "matrix.json").write_text(json.dumps({"name": odd, "question": odd, "conditions": [{"name": odd}]}))
    page = tmp_path / "report.html"
    _, text = report(folder, page)
    csv_cells(page)  # none begins as a formula does
    texts = [text.replace(export_vega(), "")]
    texts += [page.with_suffix(kind).read_text() for kind in (".csv", ".md")]
    study = make_study(read_runs([str(folder)]), [folder], page, first=True)
    texts += ["\n".join([*decisions(study), *notes(compare(study)), *(row.run.name for row in compare(study))])]
    for one in texts:
        assert not [c for c in one if not c.isprintable() and c != "\n"], "an unseen character"
    assert not re.search(r"\\u(202e|2066|200f|001b)", texts[0]), "in the charts' data"


def export_vega() -> str:
    from altgrad_jax.report.page import _vega

    return _vega()


def test_a_page_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    """A full disk in the middle of the page: what was there is whole, and nothing half lies about."""
    page = tmp_path / "report.html"
    make_run(tmp_path / "m" / "a")
    report(tmp_path / "m", page)
    before = page.read_bytes()
    real = os.fsync

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left"):
        report(tmp_path / "m", page)
    monkeypatch.setattr(os, "fsync", real)
    assert page.read_bytes() == before and len(list(tmp_path.glob(".*"))) == 0
