"""Which corpus a configuration comes to: no run trains on invented law unasked, and what "auto" stood for is kept."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
from ml_collections import ConfigDict

from altgrad_jax.config import load_config
from altgrad_jax.data.corpus import describe, name_of, open_corpus, refuse_another_meaning
from altgrad_jax.data.embedded import MOST_TOKENS, EmbeddedCorpus
from altgrad_jax.data.tokenizer import BpeTokenizer
from altgrad_jax.errors import UsageError, UserError
from altgrad_jax.tracking import Wandb
from tests.forks import ROOT, run_module

VARIANTS = ["bf16.py", "hybrid.py", "format.py:e3m4", "optimizer.py:grid,e5m2", "classify.py", "matrix.py:formats8"]


def config_of(name: str, **data) -> ConfigDict:
    config = load_config(f"{ROOT}/configs/{name}")
    config = config.base if "base" in config else config
    with config.unlocked():
        config.data.update(data)
    return config


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("asked", [None, "auto", "lexglue"])
def test_a_full_size_run_is_none_on_invented_law(tmp_path, name, asked):
    config = config_of(name, data_dir=str(tmp_path))
    assert config.data.name == "eurlex"
    config.data.name = asked or config.data.name
    with pytest.raises(UsageError, match="is not prepared in .*altgrad_jax.data prepare --name=.*data.name=embedded"):
        open_corpus(config, progress=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", VARIANTS)
def test_tags_name_no_corpus_before_it_is_known(name):
    assert not {"eurlex", "embedded"} & set(config_of(name).tracking.tags)


def test_a_small_one_says_so(tmp_path):
    config = config_of("bf16.py:quick", data_dir=str(tmp_path), tokenizer="bytes")
    assert config.data.name == "auto" and config.model.vocab_size <= MOST_TOKENS
    header = open_corpus(config, progress=False).header
    found = describe(config.data, header)
    assert found.startswith("embedded (auto: EUR-Lex is not prepared): 1000 invented acts")
    config.data.name = "embedded"
    assert describe(config.data, header).startswith("embedded: 1000 invented acts"), "it was asked for"


def test_what_the_embedded_corpus_can_fill():
    texts = (document.text for document in EmbeddedCorpus().documents("train"))
    assert BpeTokenizer.train(texts, 50257).vocab_size == MOST_TOKENS


@pytest.mark.parametrize(
    ("source", "name"),
    [("eurlex-local", "eurlex-local"), ("eurlex-lexglue", "lexglue"), ("embedded", "embedded"), ("text-x", "files")],
)
def test_names_and_tags_follow_the_data(tmp_path, monkeypatch, source, name):
    assert name_of(source) == name
    wandb = MagicMock()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    settings = {"wandb": "online", "project": "p", "entity": None, "name": "n", "tags": ("bf16", "embedded")}
    Wandb(ConfigDict(settings), tmp_path, "id", {}, (), (name_of(source),))
    assert wandb.init.call_args.kwargs["tags"] == list(dict.fromkeys(["bf16", "embedded", name]))


def test_auto_that_means_something_else_is_told(tmp_path):
    header = SimpleNamespace(source=SimpleNamespace(name="eurlex-lexglue"))
    data = ConfigDict({"name": "auto", "cache": None})
    began = {"corpus": {"source": "embedded"}}
    told = "auto stands for lexglue now, and stood for embedded when .*go on with --config.data.name=embedded"
    with pytest.raises(UserError, match=told):
        refuse_another_meaning(data, header, began, tmp_path)
    for nothing in (
        None,
        {},
        [],
        {"corpus": None},
        {"corpus": {"source": 3}},
        {"corpus": {"source": "eurlex-lexglue"}},
    ):
        refuse_another_meaning(data, header, nothing, tmp_path)
    data.name = "eurlex"
    with pytest.raises(UserError, match="name=eurlex stands for lexglue now, and stood for eurlex57k when"):
        refuse_another_meaning(data, header, {"corpus": {"source": "eurlex-eurlex57k"}}, tmp_path)
    data.name = "lexglue"
    refuse_another_meaning(data, header, began, tmp_path)  # another data hash is refused elsewhere


def test_a_run_begun_on_another_corpus(lab, copied, tmp_path):
    other = {"data__name": "auto", "data__path": "", "data__data_dir": str(tmp_path / "data")}
    with pytest.raises(UserError, match="auto stands for embedded now, and stood for files"):
        lab.train(copied, **other)


def test_prepare_makes_what_a_config_needs(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for split in ("train", "dev", "test"):
        acts = [{"celex_id": f"{split}{i}", "text": f"goods {i} of the goods {split} " * 40} for i in range(4)]
        (source / f"{split}.jsonl").write_text("".join(json.dumps(act) + "\n" for act in acts))
    data = str(tmp_path / "data")
    cases = {"bf16.py:quick": ("", 1024), "matrix.py:quick": ("base.", 512)}
    commands = [
        ["prepare", f"--config=configs/{name}", f"--config.{base}data.data_dir={data}", f"--source={source}"]
        for name, (base, _) in cases.items()
    ]
    imports = ["altgrad_jax.train", "altgrad_jax.data.eurlex_builder"]
    for (name, (_, size)), done in zip(
        cases.items(), run_module("altgrad_jax.data", commands, tmp_path / "out", imports), strict=True
    ):
        assert done.code == 0 and done.out.startswith("eurlex-local: "), done
        before = sorted(Path(data, "cache").iterdir())
        cache = open_corpus(config_of(name, data_dir=data), progress=False)
        assert sorted(Path(data, "cache").iterdir()) == before, "training has nothing left to make"
        assert cache.path.name.startswith(f"eurlex-local-bpe{size}-") and str(cache.path) in done.out.replace("\n", "")
