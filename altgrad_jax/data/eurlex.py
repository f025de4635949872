"""EUR-Lex as a text source: prepared once into TFDS's format, then read like any other.

    source = prepare("data", source="path/to/eurlex")   # or prepare("data", config="eurlex57k"), which downloads
    for document in source.documents("train"): ...

`prepare` writes `<data_dir>/tfds/eurlex/<config>/<version>/`, a TFDS dataset like any other (`eurlex_builder.py`), with
two small files beside the records: `source.json`, the hashes of the files it was made from, and `concepts.json`, the
labels' names. What corpora there are is in `eurlex_corpora.py`, how they lie on disk in `eurlex_layouts.py`.

Importing this module, finding prepared corpora, and asking one for its fingerprint and splits need neither TFDS nor any
hashing of data, so training from a token cache does without both.
"""

import difflib
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from altgrad_jax.data.documents import SPLITS, Document
from altgrad_jax.data.download import sha256_of
from altgrad_jax.data.eurlex_corpora import CORPORA, EURLEX57K, Corpus
from altgrad_jax.data.eurlex_layouts import CONCEPTS_FILE, SOURCE_FILE, Layout, find_layout, published, read_concepts
from altgrad_jax.data.jsonlines import read_json_file
from altgrad_jax.data.locks import exclusive
from altgrad_jax.errors import UsageError, UserError
from altgrad_jax.files import system_error, unwritable


class EurlexSource:
    """A prepared EUR-Lex corpus (a `Source`).

    Attributes:
      name: "eurlex-" and the config.
      description: what it is, its licence, documents per split.
      config: the builder config: "eurlex57k", "lexglue" or "local".
      folder: the TFDS dataset's folder.
    """

    def __init__(self, config: str, data_dir: str | os.PathLike[str]):
        """Opens a prepared corpus; reads one small file.

        Raises:
          UserError: no such config, it is not prepared under `data_dir`, or its `source.json` is damaged.
        """
        corpus = _corpus(config)
        self.config = config
        self.folder = _folder(Path(data_dir), config)
        if not _is_prepared(self.folder):
            raise UserError(
                f"EUR-Lex ({config}) is not prepared in {data_dir}: "
                f"run python -m altgrad_jax.data prepare --name=eurlex"
            )
        self._corpus = corpus
        self._files, self._counts, notes = _read_source_file(self.folder / SOURCE_FILE)
        counts = ", ".join(f"{split} {count:,}" for split, count in self._counts.items())
        self.name = f"eurlex-{config}"
        self.description = "; ".join([_described(corpus, self._files), f"documents: {counts}", *notes])

    def fingerprint(self) -> str:
        """Hex SHA-256 over the builder's config and version and the hashes of the files it read."""
        identity = {"builder": f"eurlex/{self.config}:{self._corpus.version}", "files": self._files}
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    def splits(self) -> tuple[str, ...]:
        """All three of `SPLITS`."""
        return SPLITS

    def documents(self, split: str) -> Iterator[Document]:
        """The documents of a split, in the order of the source files.

        Raises:
          UserError: there is no such split, or the prepared files are damaged.
        """
        if split not in SPLITS:
            raise UserError(f"{self.name} has no split {split!r}: it has {', '.join(SPLITS)}")
        return self._documents(split)

    def _documents(self, split: str) -> Iterator[Document]:
        from altgrad_jax.data.eurlex_builder import read_examples

        found = 0
        for example in read_examples(self.folder, split):
            found += 1
            labels = tuple(label.decode() for label in example["labels"])
            yield Document(example["id"].decode(), example["text"].decode(), labels)
        if found != self._counts[split]:
            raise UserError(
                f"the prepared data in {self.folder} is damaged ({found} of {self._counts[split]} documents in "
                f"{split}); prepare it again with --overwrite"
            )

    def labels(self) -> tuple[str, ...]:
        """All labels of the corpus, where that is settled; () where they are those that its documents carry."""
        return self._corpus.labels

    def identity(self, document_id: str) -> str:
        """What the source calls a document: its id without the number that a repeated one has been given."""
        return re.sub(r"#\d+$", "", document_id)

    def concepts(self) -> dict[str, str]:
        """Label -> its name; empty if the corpus came without names.

        Raises:
          UserError: the file is damaged.
        """
        path = self.folder / CONCEPTS_FILE
        return read_concepts(path) if path.is_file() else {}


def find_prepared(data_dir: str | os.PathLike[str]) -> list[EurlexSource]:
    """The corpora prepared under a data directory, in the order eurlex57k, lexglue, local; empty if there is none.

    Raises:
      UserError: a corpus's `source.json` is damaged.
    """
    return [EurlexSource(config, data_dir) for config in CORPORA if _is_prepared(_folder(Path(data_dir), config))]


def prepare(
    data_dir: str | os.PathLike[str],
    config: str | None = None,
    source: str | os.PathLike[str] | None = None,
    progress: bool = True,
    overwrite: bool = False,
) -> EurlexSource:
    """Makes a corpus ready to read; does nothing if it is ready already.

    Interrupted or killed, it leaves nothing that looks prepared; two processes may call it at once, the second waits.

    Args:
      data_dir: downloads go to `<data_dir>/downloads`, the dataset to `<data_dir>/tfds`.
      config: "eurlex57k", "lexglue" or "local". None: the corpus found in `source`; without a source, the first one
        that is prepared already, else (or with `overwrite`) "eurlex57k".
      source: a folder to read the corpus from. None: it is downloaded, unless it is prepared already.
      progress: whether progress lines are drawn (on stderr).
      overwrite: prepare again even if it was prepared; on failure what was there stays.

    Raises:
      UserError: unknown config, bad source or download, or what is prepared came from other files than `source`'s.
    """
    data_dir, corpus = Path(data_dir), None if config is None else _corpus(config)
    if source is None and not overwrite:
        ready = [one for one in find_prepared(data_dir) if config in (None, one.config)]
        if ready:
            return ready[0]
    if source is None:
        corpus = corpus or EURLEX57K
        layout = published(corpus, data_dir / "downloads", progress)
    else:
        layout = find_layout(Path(source), corpus)
        _say_if_not_published(layout, progress)
    folder = _folder(data_dir, layout.corpus.name)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(folder.parent / ".lock", on_wait=lambda: _say_waiting(folder, progress)):
            if overwrite or not _is_ready(folder, layout):
                _build(layout, data_dir, folder, progress)
    except OSError as error:
        raise unwritable(folder, error) from error
    except RuntimeError as error:  # as TFDS has what it is told of the disk
        if (refused := system_error(error)) is None:
            raise
        raise unwritable(folder, refused) from error
    return EurlexSource(layout.corpus.name, data_dir)


def _is_ready(folder: Path, layout: Layout) -> bool:
    """Whether the corpus is prepared; a UserError if it is, but from other files."""
    if not _is_prepared(folder):
        return False
    files, _, _ = _read_source_file(folder / SOURCE_FILE)
    wanted = layout.digests()
    if changed := sorted(name for name in {*files, *wanted} if files.get(name) != wanted.get(name)):
        raise UserError(
            f"{folder} was prepared from other files than those in {layout.root} (differing: {', '.join(changed)}); "
            f"delete that folder or pass --overwrite to prepare it again"
        )
    return True


def _build(layout: Layout, data_dir: Path, folder: Path, progress: bool) -> None:
    """Writes the dataset folder. The caller holds the lock, so what is half-made here was left by a killed process."""
    from altgrad_jax.data.eurlex_builder import write_dataset

    for leftover in folder.parent.glob("incomplete.*"):
        shutil.rmtree(leftover)
    replaced = folder.with_name("incomplete.replaced")
    if folder.exists():
        folder.rename(replaced)
    try:
        write_dataset(layout, data_dir / "tfds", data_dir / "downloads", progress)
    except BaseException:
        if replaced.exists():
            replaced.rename(folder)
        raise
    if replaced.exists():
        shutil.rmtree(replaced)


def _corpus(config: str) -> Corpus:
    if config not in CORPORA:
        nearest = difflib.get_close_matches(config, CORPORA, n=1, cutoff=0.0)[0]
        raise UsageError(f"no EUR-Lex config {config!r}: did you mean {nearest!r}? There are {', '.join(CORPORA)}")
    return CORPORA[config]


def _folder(data_dir: Path, config: str) -> Path:
    return data_dir / "tfds" / "eurlex" / config / CORPORA[config].version


def _is_prepared(folder: Path) -> bool:
    return (folder / SOURCE_FILE).is_file()


def _read_source_file(path: Path) -> tuple[dict[str, str], dict[str, int], list[str]]:
    """File hashes, documents per split, and what else is to be known of the documents, in sentences."""
    values = read_json_file(path).values
    files, counts, notes = values.get("files"), values.get("documents"), values.get("notes", [])
    if (
        not (isinstance(files, dict) and isinstance(counts, dict) and isinstance(notes, list))
        or set(counts) != set(SPLITS)
        or not all(type(count) is int for count in counts.values())
        or not all(isinstance(text, str) for text in [*files.values(), *notes])
    ):
        raise UserError(f"{path} is damaged; delete its folder and prepare the corpus again")
    return files, counts, notes


def _described(corpus: Corpus, files: dict[str, str]) -> str:
    """What a corpus made of files with these hashes is: the published one only if they are its."""
    remote = corpus.remote
    if remote is None or files == {remote.name: remote.sha256}:
        return corpus.description
    return f"EU acts laid out as {corpus.name}, from files that are not its published archive {remote.name}"


def _say_if_not_published(layout: Layout, progress: bool) -> None:
    """Tells of an archive that has the published one's name and not its content."""
    remote = layout.corpus.remote
    if progress and layout.archive and remote and (found := sha256_of(layout.archive)) != remote.sha256:
        print(
            f"note: {layout.archive} is not the archive published at {remote.url} (SHA-256 {found[:12]}..., there"
            f" {remote.sha256[:12]}...): what it holds is taken, and not called {layout.corpus.name}",
            file=sys.stderr,
        )


def _say_waiting(folder: Path, progress: bool) -> None:
    if progress:
        print(f"waiting for another process that is preparing {folder}", file=sys.stderr)
