"""`python -m altgrad_jax.data`: what it makes, what it shows, and one clear line for what it cannot do."""

import gzip
import json
import math
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from altgrad_jax.data.cache import open_cache
from altgrad_jax.data.corpus import find_source
from altgrad_jax.experiment import Experiment
from tests.forks import run_module
from tests.runs import Ended, snapshot

ACTS = {
    split: [
        {
            "celex_id": f"3{split}{n}",
            "title": f"Règlement {n}",
            "text": "the [bold] goods " * (n + 1),
            "concepts": ["5"],
        }
        for n in range(count)
    ]
    for split, count in (("train", 12), ("dev", 3), ("test", 2))
}
TEXTS = {split: [f"{act['title']}\n\n{act['text'].strip()}" for act in acts] for split, acts in ACTS.items()}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    for split, acts in ACTS.items():
        with gzip.open(folder / f"{split}.jsonl.gz", "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(act) + "\n" for act in acts)
    (folder / "concepts.json").write_text(json.dumps({"5": "prices"}))
    return folder


def run(folder: Path, *cases: list[str]) -> list[Ended]:
    """Runs the command line with each of the cases, one after the other."""
    return run_module(
        "altgrad_jax.data", cases, folder / "out", ["altgrad_jax.train", "altgrad_jax.data.eurlex_builder"]
    )


def rows(out: str) -> list[list[str]]:
    """The cells of a table, its header apart; a cell's further lines are added to its first."""
    table: list[list[str]] = []
    for line in out.splitlines():
        if line.startswith("│"):
            cells = [cell.strip() for cell in line.strip("│").split("│")]
            if cells[0]:
                table.append(cells)
            else:
                table[-1] = [f"{old} {new}".strip() for old, new in zip(table[-1], cells, strict=True)]
    return table


def test_eurlex_is_prepared_and_shown(tmp_path, source):
    settings = [f"--data_dir={tmp_path / 'data'}", "--tokenizer=bytes", "--vocab_size=257"]
    prepare = ["prepare", *settings, f"--source={source}"]
    shown = [["show", *settings], ["show", *settings, "--name=eurlex-local"]]
    before, made, again, *after = run(tmp_path, shown[0], prepare, prepare, *shown)
    assert_one_line(before, 2, ["not prepared in", "altgrad_jax.data prepare --name=eurlex"])
    for done in (made, again, *after):
        assert done.code == 0, done
        assert done.out == made.out
    # Nothing but notices of progress.
    assert (again.err, after[0].err, after[1].err) == ("", "", "")

    assert made.out.startswith("eurlex-local: ") and "Decision 2011/833/EU" in made.out
    assert "tokenizer bytes, 257 tokens" in made.out
    for cells, (name, split) in zip(
        rows(made.out), (("train", "train"), ("validation", "dev"), ("test", "test")), strict=True
    ):
        stream = [token for text in TEXTS[split] for token in (*text.encode(), 256)]
        size = len(stream) - len(TEXTS[split])
        assert cells[:5] == [
            name,
            *(f"{n:,}" for n in (len(TEXTS[split]), size, len(stream))),
            f"{size / len(stream):.2f}",
        ]
        assert cells[6] == "unknown"
        if name == "train":
            counts = Counter(stream).values()
            entropy = -sum(n / len(stream) * math.log(n / len(stream)) for n in counts)
            assert float(cells[5]) == pytest.approx(entropy, abs=1e-4)
    assert "first training document, 3train0, labels 5:\nRèglement 0\n\nthe [bold] goods\n" in made.out
    [cache] = re.findall(r"token cache\s+(/\S+)", made.out)
    assert open_cache(Path(cache)).sha256 in made.out


def test_other_files_of_the_same_corpus_need_overwrite(tmp_path, source):
    command = ["prepare", f"--data_dir={tmp_path / 'data'}", "--tokenizer=bytes", f"--source={source}"]
    [first] = run(tmp_path, command)
    with gzip.open(source / "dev.jsonl.gz", "at", encoding="utf-8") as file:
        file.write(json.dumps(ACTS["dev"][0] | {"celex_id": "one more"}) + "\n")
    refused, second = run(tmp_path, command, [*command, "--overwrite"])
    assert_one_line(refused, 1, ["prepared from other files", "dev.jsonl.gz", "--overwrite"])
    assert (first.code, second.code) == (0, 0)
    assert [cells[1] for cells in rows(first.out)] == ["12", "3", "2"]
    assert [cells[1] for cells in rows(second.out)] == ["12", "4", "2"]


def test_files_of_the_users_own(tmp_path):
    """`prepare` and `show` are the same for them; what looks like markup is shown as it is."""
    mine = tmp_path / "mine [/1] :smile:"
    (mine / "train").mkdir(parents=True)
    (mine / "train" / "[a] :b:.txt").write_text("[red]stop[/red] " * 100)
    (mine / "dev.txt").write_text("go")
    options = ["--name=files", f"--path={mine}", f"--data_dir={tmp_path / 'data'}", "--tokenizer=bytes"]
    prepared, shown = run(tmp_path, ["prepare", *options], ["show", *options])
    assert (prepared.code, shown.code) == (0, 0), (prepared, shown)
    assert prepared.out == shown.out
    assert [cells[:4] for cells in rows(shown.out)] == [["train", "1", "1,600", "1,601"], ["validation", "1", "2", "3"]]
    assert "mine [/1] :smile:" in shown.out.replace("\n", " "), "wherever the line was broken"
    assert "first training document, train/[a] :b:.txt#1:\n" in shown.out
    assert shown.out.count("[red]stop[/red]") == 37 and "...\n" in shown.out, "600 characters of 1,600"


def test_the_windows_and_documents_that_a_step_saw(lab, tmp_path, monkeypatch):
    seen: list[np.ndarray] = []
    shard = Experiment.shard
    monkeypatch.setattr(Experiment, "shard", lambda self, batch: seen.append(batch) or shard(self, batch))
    workdir = tmp_path / "run"
    assert lab.train(workdir, train__steps=3) == 0
    done = run(tmp_path, *(["batch", f"--workdir={workdir}", f"--step={step}"] for step in (1, 2, 3)))

    corpus = find_source("files", "", str(lab.corpus))
    assert corpus is not None
    texts = [(document.id, [*document.text.encode(), 256]) for document in corpus.documents("train")]
    stream = np.array([token for _, tokens in texts for token in tokens])
    owner = [name for name, tokens in texts for _ in tokens]
    for step, (ended, batch) in enumerate(zip(done, seen, strict=True)):
        assert ended.code == 0 and not ended.err, ended
        share = step * 8 / ((len(stream) - 1) // 32)
        assert ended.out.startswith(f"step {step + 1}, epoch {share:.3f}, data ")
        for (window, tokens, documents), row in zip(rows(ended.out), batch, strict=True):
            first, last = map(int, tokens.split(" to "))
            assert (first, last) == (int(window) * 32, int(window) * 32 + 32)
            np.testing.assert_array_equal(stream[first : last + 1], row)
            assert documents.split() == list(dict.fromkeys(owner[first : last + 1]))


def assert_one_line(done: Ended, code: int, says: list[str]) -> None:
    assert done.code == code, done
    assert done.err.startswith("error: ") and done.err.count("\n") == 1 and done.out == "", done
    assert [text for text in says if text not in done.err] == [], done.err


MISTAKES: list[tuple[list[str], int, list[str]]] = [
    ([], 2, ["no command: give one of prepare, show, batch first"]),
    (["prepair"], 2, ["unknown command 'prepair': give one of prepare, show, batch first"]),
    (["show", "embedded"], 2, ["unexpected argument 'embedded'"]),
    (["show", "--name=eurlx"], 2, ["name", "eurlx", "eurlex"]),
    (["show", "--name=files"], 2, ["--name=files needs --path"]),
    (["prepare", "--name=files"], 2, ["--name=files needs --path"]),
    (["show", "--name=files", "--path=nowhere.txt"], 2, ["nowhere.txt does not exist"]),
    (["prepare", "--name=embedded", "--source=."], 2, ["--source is for EUR-Lex", "embedded"]),
    (["show", "--config=configs/bf16.py", "--vocab_size=3"], 2, ["--data_dir, --vocab_size beside", "data.vocab_size"]),
    (["prepare", "--source=nowhere"], 2, ["nowhere"]),
    (["prepare", "--vocab_size=0"], 2, ["vocab_size"]),
    (["batch"], 2, ["batch needs --workdir and --step"]),
    (["batch", "--step=1"], 2, ["batch needs --workdir and --step"]),
    (["batch", "--workdir=nowhere", "--step=1"], 2, ["nowhere holds no manifest.json; give a run's work directory"]),
    (["batch", "--workdir=RUN", "--step=0"], 2, ["step", "0"]),
    (["batch", "--workdir=RUN", "--step=21"], 2, ["--step=21", "has recorded its steps up to 20"]),
    (["batch", "--workdir=OTHER", "--step=1"], 1, ["holds other data than the run was trained on"]),
    (["batch", "--workdir=GONE", "--step=1"], 1, ["no token cache at", "gone"]),
]


def test_every_mistake_is_one_line_and_creates_nothing(copied, tmp_path):
    manifest = json.loads((copied / "manifest.json").read_text())
    for name, change in (("OTHER", {"sha256": "0" * 64}), ("GONE", {"cache": str(tmp_path / "gone")})):
        (tmp_path / name).mkdir()
        changed = manifest | {"corpus": manifest["corpus"] | change}
        (tmp_path / name / "manifest.json").write_text(json.dumps(changed))
    places = {f"--workdir={name}": f"--workdir={tmp_path / name}" for name in ("OTHER", "GONE")}
    places["--workdir=RUN"] = f"--workdir={copied}"
    cases = [[*(places.get(word, word) for word in words)] for words, _, _ in MISTAKES]
    cases = [[*case, f"--data_dir={tmp_path / 'data'}"] if case else case for case in cases]
    before = snapshot(tmp_path)
    for done, (_, code, says) in zip(run(tmp_path, *cases), MISTAKES, strict=True):
        assert_one_line(done, code, says)
    made = snapshot(tmp_path).keys() - before.keys()
    assert not [name for name in made if not name.startswith("out/")]
