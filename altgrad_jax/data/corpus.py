"""From `config.data` to a token cache: which corpus, which tokenizer, and building what is not there yet."""

from pathlib import Path

from ml_collections import ConfigDict

from altgrad_jax.data.cache import TokenCache, find_caches, open_cache
from altgrad_jax.data.documents import Source
from altgrad_jax.errors import UserError

# What a user calls each EUR-Lex corpus, and its builder config. "eurlex" and "auto" take any of them.
EURLEX_CONFIGS = {"eurlex57k": "eurlex57k", "lexglue": "lexglue", "eurlex-local": "local"}


def cache_root(data_dir: str) -> Path:
    """The folder that holds the token caches."""
    return Path(data_dir).expanduser() / "cache"


def open_corpus(config: ConfigDict, progress: bool = True) -> TokenCache:
    """The token cache that a run reads.

    In this order: `data.cache`, as it is; the corpus of `data.name` if it is on this machine, its cache built when
    missing; for EUR-Lex, a cache of it brought from another machine. "auto" is EUR-Lex where it is prepared, else the
    embedded corpus; the cache's header says which it became.

    Raises:
      UserError: the corpus is missing or damaged, or its tokens do not fit the model.
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
        return open_cache(Path(data.cache).expanduser())
    vocab_size = data.vocab_size or config.model.vocab_size
    source = find_source(data.name, data.data_dir, data.path)
    if source is None and (brought := _brought_caches(data, vocab_size)):
        return open_cache(brought[0])
    if source is None and data.name != "auto":
        raise UserError(
            f"config.data.name={data.name}, but it is not prepared in {Path(data.data_dir).expanduser()}; run"
            f" `python -m altgrad_jax.data prepare --name={data.name} [--source=DIR]`, or use"
            " --config.data.name=embedded"
        )
    if source is None:
        source = find_source("embedded", data.data_dir, None)
        assert source is not None
    from altgrad_jax.data.cache_build import build_cache

    return build_cache(source, data.tokenizer, vocab_size, cache_root(data.data_dir), progress)


def _brought_caches(data: ConfigDict, vocab_size: int) -> list[Path]:
    if data.name not in ("auto", "eurlex", *EURLEX_CONFIGS):
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
