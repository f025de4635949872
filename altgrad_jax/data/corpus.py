"""From `config.data` to a token cache: which corpus, which tokenizer, and building what is not there yet."""

from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from altgrad_jax.data.cache import TokenCache, find_caches, open_cache
from altgrad_jax.data.cache_header import CacheHeader
from altgrad_jax.data.documents import Source
from altgrad_jax.errors import UsageError, UserError

# What a user calls each EUR-Lex corpus, and its builder config. "eurlex" and "auto" take any of them.
EURLEX_CONFIGS = {"eurlex57k": "eurlex57k", "lexglue": "lexglue", "eurlex-local": "local"}
DEFAULT_DATA_DIR = "~/.cache/altgrad_jax"  # where prepared corpora and token caches are kept, unless one says otherwise
ANY_EURLEX = ("auto", "eurlex", *EURLEX_CONFIGS)


def cache_root(data_dir: str) -> Path:
    """The folder that holds the token caches."""
    return Path(data_dir).expanduser() / "cache"


def open_corpus(config: ConfigDict, progress: bool = True) -> TokenCache:
    """The token cache that a run reads.

    In this order: `data.cache`, as it is; the corpus of `data.name` if it is on this machine, its cache built when
    missing; for EUR-Lex, a cache of it brought from another machine. "auto" is EUR-Lex where it is prepared, else the
    embedded corpus, if the model is small enough for it; `name_of` the cache's source says which it became.

    Raises:
      UsageError: the corpus is not prepared.
      UserError: the corpus is damaged, or its tokens do not fit the model.
    """
    cache = _open(config, progress)
    if cache.vocab_size > config.model.vocab_size:
        raise UserError(
            f"the tokenizer of {cache.path} has {cache.vocab_size} tokens, the model config.model.vocab_size="
            f"{config.model.vocab_size}; raise the model's, or set config.data.vocab_size to build a smaller one"
        )
    return cache


def _open(config: ConfigDict, progress: bool) -> TokenCache:
    data = config.data
    if data.cache:
        folder = Path(data.cache).expanduser()
        if not folder.is_dir():
            raise UsageError(f"config.data.cache: no token cache at {folder}; without the setting one is built")
        return open_cache(folder)
    vocab_size = data.vocab_size or config.model.vocab_size
    if brought := brought_caches(config):
        return open_cache(brought[0])
    source = find_source(data.name, data.data_dir, data.path) or _embedded_for_auto(data, vocab_size)
    from altgrad_jax.data.cache_build import build_cache

    return build_cache(source, data.tokenizer, vocab_size, cache_root(data.data_dir), progress)


def _embedded_for_auto(data: ConfigDict, vocab_size: int) -> Source:
    """The embedded corpus for "auto", where nothing is prepared. Raises UsageError where that would be a toy run."""
    from altgrad_jax.data.embedded import MOST_TOKENS, EmbeddedCorpus

    if data.name == "auto" and vocab_size <= MOST_TOKENS:
        return EmbeddedCorpus()
    why = ""
    if data.name == "auto":
        why = f" (auto takes the embedded corpus for vocabularies up to {MOST_TOKENS:,}, not for {vocab_size:,})"
    name = "eurlex" if data.name == "auto" else data.name
    place = "" if data.data_dir == DEFAULT_DATA_DIR else f" --data_dir={data.data_dir}"
    raise UsageError(
        f"config.data.name={data.name}, but EUR-Lex is not prepared in {Path(data.data_dir).expanduser()}{why}: run"
        f" `python -m altgrad_jax.data prepare --name={name}{place} [--source=DIR]`, or train on the invented acts that"
        " come with the package: --config.data.name=embedded"
    )


def brought_caches(config: ConfigDict) -> list[Path]:
    """Token caches that serve a configuration and came from another machine: the corpus itself is not on this one."""
    data, vocab_size = config.data, config.data.vocab_size or config.model.vocab_size
    if data.name not in ANY_EURLEX or find_source(data.name, data.data_dir, data.path) is not None:
        return []
    name = f"eurlex-{EURLEX_CONFIGS.get(data.name, '')}"
    return find_caches(cache_root(data.data_dir), name, data.tokenizer, vocab_size)


def find_source(name: str, data_dir: str, path: str | None) -> Source | None:
    """The corpus of that name on this machine, or None where it is not prepared.

    "auto" and "eurlex" take the first prepared of EUR-Lex's corpora, in the order of `eurlex.find_prepared`.
    """
    if name == "embedded":
        from altgrad_jax.data.embedded import EmbeddedCorpus

        return EmbeddedCorpus()
    if name == "files":
        from altgrad_jax.data.textfiles import TextFiles

        return TextFiles(Path(path or "").expanduser())
    root = Path(data_dir).expanduser()
    if not (root / "tfds").is_dir():
        return None
    from altgrad_jax.data.eurlex import find_prepared

    prepared = find_prepared(root)
    wanted = [source for source in prepared if EURLEX_CONFIGS.get(name, source.config) == source.config]
    return wanted[0] if wanted else None


def name_of(source_name: str) -> str:
    """The `data.name` that asks for this source and no other: what "auto" and "eurlex" came to."""
    names = {f"eurlex-{config}": name for name, config in EURLEX_CONFIGS.items()} | {"embedded": "embedded"}
    return names.get(source_name, "files")


def describe(data: ConfigDict, header: CacheHeader) -> str:
    """What a run's header says of the corpus that `config.data` came to."""
    source, why = header.source, ""
    if data.name == "auto" and not data.cache and source.name == "embedded":
        why = " (auto: EUR-Lex is not prepared)"
    return f"{source.name}{why}: {source.description}"


def refuse_another_meaning(data: ConfigDict, header: CacheHeader, manifest: Any, place: Path) -> None:
    """Raises UserError if a `data.name` that leaves the choice to us stood for another corpus when this run began.

    Args:
      data: `config.data`.
      header: of the corpus that it stands for now.
      manifest: of the run's last start; None before its first.
      place: the run's folder.
    """
    corpus = manifest.get("corpus") if isinstance(manifest, dict) else None
    before = corpus.get("source") if isinstance(corpus, dict) else None
    now = header.source.name
    choice = data.name in ("auto", "eurlex") and not data.cache
    if choice and isinstance(before, str) and before != now:
        raise UserError(
            f"config.data.name={data.name} stands for {name_of(now)} now, and stood for {name_of(before)} when the run"
            f" in {place} began; go on with --config.data.name={name_of(before)}, or use another --workdir"
        )
