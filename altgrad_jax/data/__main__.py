"""Prepares and shows corpora.

    python -m altgrad_jax.data prepare --name=eurlex [--source=DIR]     # EUR-Lex into TFDS and the token cache
    python -m altgrad_jax.data prepare --config=configs/bf16.py:quick   # what this config trains on, in its tokens
    python -m altgrad_jax.data show    --name=eurlex                    # counts, sizes, a sample
    python -m altgrad_jax.data batch   --workdir=runs/quick --step=17   # the documents that a training step saw

`prepare` without --source downloads EUR-Lex (EURLEX57K, or --name=lexglue) and checks it against published hashes; with
it, the same files are read from DIR. Corpus, tokenizer and vocabulary are those of --config=FILE[:VARIANT] with the
--config flags of the run or the sweep, EUR-Lex where its data.name is auto. Without --config they are those of --name,
--tokenizer and --vocab_size, whose defaults are those of configs/base.py.
"""

from altgrad_jax.interrupt import watch

if __name__ == "__main__":
    watch()  # before imports that take seconds

import sys
from pathlib import Path

import numpy as np
from absl import flags
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from altgrad_jax import cli
from altgrad_jax.config import check_is_experiment, check_is_matrix, validate
from altgrad_jax.data.batches import TrainBatches
from altgrad_jax.data.cache import TokenCache, open_cache
from altgrad_jax.data.corpus import (
    ANY_EURLEX,
    DEFAULT_DATA_DIR,
    EURLEX_CONFIGS,
    brought_caches,
    find_source,
    name_of,
    open_corpus,
)
from altgrad_jax.data.documents import Source
from altgrad_jax.data.labels import open_labels
from altgrad_jax.data.overlap import open_overlap
from altgrad_jax.errors import UsageError, UserError
from altgrad_jax.files import read_json
from altgrad_jax.stability import batch_of
from altgrad_jax.task import make_task
from altgrad_jax.tracking import read_metrics

CONFIG = cli.define_config()
MANIFEST = {  # what of a run's is read here
    "config": {
        "seed": int,
        "model": {"block_size": int},
        "train": {"batch_size": int, "grad_accumulation": int},
        "task?": str,
        "data?": dict,
    },
    "corpus": {"cache": str, "sha256": str},
}
NAMES = ("eurlex", *EURLEX_CONFIGS, "embedded", "files")
NAME = flags.DEFINE_enum("name", "eurlex", NAMES, "The corpus; eurlex: the one found in --source, else EURLEX57K.")
SOURCE = flags.DEFINE_string("source", None, "Folder with local copies of the corpus's files; downloads nothing.")
PATH = flags.DEFINE_string("path", None, "For --name=files: a .txt, .jsonl or .jsonl.gz file, or a folder of them.")
DATA_DIR = flags.DEFINE_string("data_dir", DEFAULT_DATA_DIR, "Where prepared corpora and token caches are kept.")
TOKENIZER = flags.DEFINE_enum("tokenizer", "auto", ("auto", "bpe", "bytes", "gpt2"), "The tokenizer.")
VOCAB_SIZE = flags.DEFINE_integer("vocab_size", 50257, "Entries the tokenizer may use.", lower_bound=1)
OVERWRITE = flags.DEFINE_boolean("overwrite", False, "Prepare again what is prepared already.")
WORKDIR = flags.DEFINE_string("workdir", None, "For batch: the run's work directory.")
STEP = flags.DEFINE_integer("step", None, "For batch: the step, counted from 1 as in metrics.jsonl.", lower_bound=1)


def prepare(console: Console) -> None:
    """Makes the corpus and its token cache ready, then shows them."""
    config = _settings()
    data = config.data
    ready = data.cache or (SOURCE.value is None and not OVERWRITE.value and brought_caches(config))
    if data.name in ANY_EURLEX and not ready:
        from altgrad_jax.data import eurlex

        source = None if SOURCE.value is None else Path(SOURCE.value).expanduser()
        root, wanted = Path(data.data_dir).expanduser(), EURLEX_CONFIGS.get(data.name)
        prepared = eurlex.prepare(root, wanted, source, overwrite=OVERWRITE.value)
        taken = find_source(data.name, data.data_dir, None)
        if taken is not None and taken.name != prepared.name:
            console.print(
                f"data.name={data.name} goes on standing for {name_of(taken.name)}, which is prepared as well; train on"
                f" this corpus with --config.data.name={name_of(prepared.name)}"
            )
        with config.unlocked():
            config.data.name = name_of(prepared.name)
    elif SOURCE.value:
        raise UsageError(f"--source is for EUR-Lex; the corpus asked for is {data.cache or data.name}")
    _show(console, config)


def _settings() -> ConfigDict:
    """The settings that say which corpus, in which tokens: a run's configuration, or that of a sweep's conditions."""
    if CONFIG.value is None:
        data: dict[str, str | int | None] = {"name": NAME.value, "path": PATH.value, "data_dir": DATA_DIR.value}
        data |= {"cache": None, "tokenizer": TOKENIZER.value, "vocab_size": VOCAB_SIZE.value}
        if NAME.value == "files" and not PATH.value:
            raise UsageError("--name=files needs --path")
        return ConfigDict({"data": data, "model": {"vocab_size": VOCAB_SIZE.value}})
    if given := [flag.name for flag in (NAME, PATH, DATA_DIR, TOKENIZER, VOCAB_SIZE) if flag.present]:
        beside, settings = (", ".join(f"{prefix}{name}" for name in given) for prefix in ("--", "--config.data."))
        raise UsageError(f"{beside} beside --config, which says what to prepare: use {settings}")
    config = CONFIG.value
    if "base" in config:
        check_is_matrix(config)
        config = config.base
    else:
        check_is_experiment(config)
    validate(config)
    return config


def show(console: Console) -> None:
    """Counts and sizes of a corpus, a sample of its text, and its tokens (built if they are not there)."""
    _show(console, _settings())


def _show(console: Console, config: ConfigDict) -> None:
    cache = open_corpus(config)
    header = cache.header
    console.print(f"{header.source.name}: {header.source.description}")
    console.print(f"tokenizer {header.tokenizer.kind}, {cache.vocab_size} tokens; data hash {cache.sha256}")
    table = Table("split", "documents", "bytes", "tokens", "bytes/token", "unigram", "floor")
    for split in header.splits:
        floor = cache.entropy_floor(split.name)
        table.add_row(
            split.name,
            f"{split.documents:,}",
            f"{split.utf8_bytes:,}",
            f"{split.tokens:,}",
            f"{split.utf8_bytes / split.tokens:.2f}",
            f"{split.unigram_nats:.4f}",
            "unknown" if floor is None else f"{floor:.4f}",
        )
    console.print(table)
    console.print("unigram entropy and entropy floor in nats per token")
    console.print(_labels(cache))
    overlap = open_overlap(cache)
    shared = "not counted: the token cache is of an older version" if overlap is None else overlap.line()
    console.print(f"documents in two splits: {shared or 'none'}")
    data = config.data
    source = None if data.cache else find_source(data.name, data.data_dir, data.path)
    if source is not None:
        _show_sample(console, source)
    console.print(f"token cache {cache.path}")


def _labels(cache: TokenCache) -> str:
    """How many labels there are to classify documents by."""
    try:
        labels = open_labels(cache)
    except UserError as error:
        return f"labels: none ({error})"
    counts = np.bincount(labels.pairs("train")[:, 1], minlength=len(labels.header.labels))
    enough = ", ".join(f"{(counts >= n).sum():,} of at least {n}" for n in (1, 10, 50))
    return f"labels: {len(counts):,}; {enough} training documents (config.classify.min_documents)"


def _show_sample(console: Console, source: Source) -> None:
    document = next(iter(source.documents("train")))
    labels = f", labels {' '.join(document.labels)}" if document.labels else ""
    console.print(f"\nfirst training document, {document.id}{labels}:")
    console.print(document.text[:600] + ("..." if len(document.text) > 600 else ""))
    console.print()


def batch(console: Console) -> None:
    """The windows and documents that one training step of a run saw."""
    if WORKDIR.value is None or STEP.value is None:
        raise UsageError("batch needs --workdir and --step")
    manifest = read_json(Path(WORKDIR.value).expanduser() / "manifest.json", MANIFEST)
    if manifest is None:
        raise UsageError(f"{WORKDIR.value} holds no manifest.json; give a run's work directory")
    cache = _cache_of(manifest)
    config = ConfigDict({"task": "lm"} | manifest["config"])
    batches = make_task(config, cache).batches(config, cache)
    records = read_metrics(Path(WORKDIR.value).expanduser() / "metrics.jsonl")
    if STEP.value > (taken := max((record["step"] for record in records), default=0)):
        raise UsageError(f"--step={STEP.value}, but the run in {WORKDIR.value} has recorded its steps up to {taken}")
    number = batch_of(records, STEP.value)
    if isinstance(batches, TrainBatches):
        table = Table("window", "tokens", "documents")
        for window, documents in zip(batches.windows_of(number), batches.documents_of(number), strict=True):
            start = window * batches.block_size
            table.add_row(str(window), f"{start} to {start + batches.block_size}", " ".join(documents))
    else:
        table = Table("tokens of the document", "document")
        for (first, last), document in zip(batches.tokens_of(number), batches.documents_of(number), strict=True):
            table.add_row(f"{first} to {last}", document)
    console.print(f"step {STEP.value}, epoch {batches.epoch_of(number):.3f}, data {cache.sha256[:12]}")
    console.print(table)


def _cache_of(manifest: dict) -> TokenCache:
    cache = open_cache(manifest["corpus"]["cache"])
    if cache.sha256 != manifest["corpus"]["sha256"]:
        raise UserError(f"{cache.path} holds other data than the run was trained on; find the cache it names by hash")
    return cache


def main(command: str) -> int:
    """Runs a command."""
    cli.quiet_libraries()
    width = None if sys.stdout.isatty() else 120
    console = Console(highlight=False, markup=False, emoji=False, width=width)
    {"prepare": prepare, "show": show, "batch": batch}[command](console)
    return 0


if __name__ == "__main__":
    cli.run_command(main, ("prepare", "show", "batch"))
