"""How the EUR-Lex corpora lie on disk, found in a folder and read record by record.

* `eurlex57k`: `dataset.zip`, or `train`, `dev` and `test` as `.jsonl` files or folders with one `.json` file per act;
  fields `celex_id title header recitals main_body attachments eurovoc_concepts`.
* `lexglue`: `eurlex.tar.gz`, or the `eurlex.jsonl` in it; fields `data_type text labels`, the split being `data_type`.
* `local`: `train`, `dev` and `test` as above; fields `celex_id text`, and `title date concepts` where known.

Every `.jsonl` may be gzipped (`.jsonl.gz`), `dev` may be called `validation`, the files may lie in a folder `dataset`
or `eurlex` as they do in some archives, and a `concepts.json` (concept id -> label) beside them is kept.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from altgrad_jax.data.archives import extract
from altgrad_jax.data.documents import SPLITS
from altgrad_jax.data.download import fetch, sha256_of
from altgrad_jax.data.eurlex_corpora import CORPORA, Corpus, Record
from altgrad_jax.data.jsonlines import SUFFIXES, JsonRecord, read_json_file, read_json_lines
from altgrad_jax.errors import UsageError, UserError

CONCEPTS_FILE = "concepts.json"
SOURCE_FILE = "source.json"  # beside prepared data: what it was made from
_SPLIT_NAMES = {"train": ("train",), "validation": ("dev", "validation"), "test": ("test",)}


@dataclass(frozen=True)
class Layout:
    """One corpus found on disk.

    Attributes:
      corpus: which.
      root: the folder it was found in.
      archive: the archive to unpack first; None if the files lie open.
      splits: split -> a JSON lines file or a folder of JSON files; empty while the corpus is in an archive.
      concepts_file: concept id -> label, if there is one.
    """

    corpus: Corpus
    root: Path
    archive: Path | None = None
    splits: Mapping[str, Path] | None = None
    concepts_file: Path | None = None

    def digests(self) -> dict[str, str]:
        """File name relative to `root` -> SHA-256, for everything the documents are made of."""
        paths = {*(self.splits or {}).values()} | {path for path in (self.archive, self.concepts_file) if path}
        return {path.relative_to(self.root).as_posix(): _digest(path) for path in sorted(paths)}

    def unpacked(self, work: Path) -> "Layout":
        """This layout with its files lying open: itself, or its archive's content, unpacked into the new folder `work`.

        Raises:
          UserError: the archive is damaged or dangerous, or holds something else.
        """
        if self.archive is None:
            return self
        extract(self.archive, lambda member: _is_data_file(self.corpus, member), work)
        found = _find_open(self.corpus, work)
        if found is None:
            raise UserError(f"{self.archive} does not hold {_open_files(self.corpus)}")
        return found

    def records(self, split: str) -> Iterator[Record]:
        """The documents of a split, in the order of its file, or of the file names in its folder.

        Raises:
          UserError: a record is broken (names file and line), there is none, or the archive is not unpacked yet.
        """
        path = (self.splits or {})[split]
        found = False
        for number, record in enumerate(_read(path), start=1):
            if self.corpus.single_file and _split_of(record) != split:
                continue
            found = True
            yield self.corpus.parse(record, split, number)
        if not found:
            raise UserError(f"{path} holds no document of the {split} split")

    def concepts(self) -> dict[str, str]:
        """Concept id -> label; empty if the corpus came without."""
        return read_concepts(self.concepts_file) if self.concepts_file else {}


def read_concepts(path: Path) -> dict[str, str]:
    """Reads a JSON object of concept id -> label.

    Raises:
      UserError: it is something else.
    """
    return read_json_file(path).names()


def published(corpus: Corpus, directory: Path, progress: bool = True) -> Layout:
    """Downloads a corpus into `directory`, unless it is there already, and returns its layout.

    Raises:
      UserError: it is published nowhere, or could not be fetched whole.
    """
    if corpus.remote is None:
        raise UserError(f"the {corpus.name} corpus is published nowhere: pass the folder that holds it: --source=DIR")
    return Layout(corpus, directory, archive=fetch(corpus.remote, directory, progress=progress))


def find_layout(source: Path, corpus: Corpus | None = None) -> Layout:
    """Looks into a folder for a corpus.

    Args:
      source: the folder.
      corpus: which one to look for; None: whichever is there.

    Raises:
      UserError: no such folder, no corpus in it, a split missing, or several corpora and no telling which is meant.
    """
    if not source.is_dir():
        raise UsageError(f"{source} is not a folder: --source takes the folder that holds the EUR-Lex files")
    wanted = (corpus,) if corpus else tuple(CORPORA.values())
    found = [layout for one in wanted if (layout := _find_archive(one, source) or _find_open(one, source))]
    if corpus is None and found:
        marked = [layout for layout in found if layout.archive or _has_marker(layout)]
        if not marked:
            raise _unmarked(found)
        found = marked
    if not found:
        expected = "; ".join(f"{one.name}: {_files(one)}" for one in wanted)
        raise UserError(f"no EUR-Lex corpus in {source}; looked for {expected}")
    if len(found) > 1:
        raise UserError(f"{source} holds more than one corpus: say which, {' or '.join(f.corpus.name for f in found)}")
    return found[0]


def _find_archive(corpus: Corpus, source: Path) -> Layout | None:
    if corpus.remote is None or not (source / corpus.remote.name).is_file():
        return None
    return Layout(corpus, source, archive=source / corpus.remote.name)


def _find_open(corpus: Corpus, source: Path) -> Layout | None:
    """The corpus lying open in the folder or its inner folder, or None; UserError if only some splits are there."""
    for folder in (source, source / corpus.inner_folder):
        if corpus.single_file:
            path = _one_of(folder, (corpus.single_file,))
            splits = {split: path for split in SPLITS if path}
        else:
            splits = {split: path for split in SPLITS if (path := _one_of(folder, _SPLIT_NAMES[split]))}
        if splits:
            if missing := [split for split in SPLITS if split not in splits]:
                names = ", ".join("/".join(f"{name}.jsonl[.gz]" for name in _SPLIT_NAMES[split]) for split in missing)
                raise UserError(f"{folder} has {next(iter(splits.values())).name} but lacks {names}")
            concepts = folder / CONCEPTS_FILE
            return Layout(corpus, source, splits=splits, concepts_file=concepts if concepts.is_file() else None)
    return None


def _one_of(folder: Path, stems: tuple[str, ...]) -> Path | None:
    """The one JSON lines file, or folder of JSON files, with one of these names."""
    found = [path for stem in stems for suffix in SUFFIXES if (path := folder / f"{stem}{suffix}").is_file()]
    found += [folder / stem for stem in stems if _json_files(folder / stem)]
    if len(found) > 1:
        raise UserError(f"{folder} has both {found[0].name} and {found[1].name}: remove the one that is not meant")
    return found[0] if found else None


def _json_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.json") if not path.name.startswith("."))


def _is_data_file(corpus: Corpus, member: str) -> bool:
    """Whether an archive's member is a file that `_find_open` would look at."""
    stems = {corpus.single_file} if corpus.single_file else {name for names in _SPLIT_NAMES.values() for name in names}
    *folders, name = member.removeprefix(f"{corpus.inner_folder}/").split("/")
    if not folders:
        return name == CONCEPTS_FILE or name in {f"{stem}{suffix}" for stem in stems for suffix in SUFFIXES}
    return len(folders) == 1 and folders[0] in stems and name.endswith(".json") and not name.startswith(".")


def _has_marker(layout: Layout) -> bool:
    """Whether the first record has the field that tells this corpus from others with the same file names."""
    first = next(_read(next(iter((layout.splits or {}).values()))), None)
    return first is not None and layout.corpus.marker in first.values


def _unmarked(found: list[Layout]) -> UserError:
    """Why the files that are there are taken for no corpus: their first record has no field that tells which."""
    path = next(iter((found[0].splits or {}).values()))
    first = next(_read(path), None)
    if first is None:
        return UserError(f"{path} holds no record: is it empty?")
    fields = " or ".join(f"{layout.corpus.marker!r} (as in {layout.corpus.name})" for layout in found)
    has = ", ".join([repr(name) for name in first.values][:10]) or "an empty object"
    return UserError(f"{first.where}: the first record, which tells the corpus, has no field {fields}; found {has}")


def _split_of(record: JsonRecord) -> str:
    name = record.text("data_type")
    for split, names in _SPLIT_NAMES.items():
        if name in names:
            return split
    raise UserError(f"{record.where}: field 'data_type' should be train, dev, validation or test, not {name!r}")


def _read(path: Path) -> Iterator[JsonRecord]:
    return map(read_json_file, _json_files(path)) if path.is_dir() else read_json_lines(path)


def _digest(path: Path) -> str:
    if not path.is_dir():
        return sha256_of(path)
    lines = "".join(f"{sha256_of(file)}  {file.name}\n" for file in _json_files(path))
    return hashlib.sha256(lines.encode()).hexdigest()


def _open_files(corpus: Corpus) -> str:
    stems = (corpus.single_file,) if corpus.single_file else ("train", "dev", "test")
    return f"{', '.join(f'{stem}.jsonl[.gz]' for stem in stems)} with a field {corpus.marker!r}"


def _files(corpus: Corpus) -> str:
    return f"{corpus.remote.name} or {_open_files(corpus)}" if corpus.remote else _open_files(corpus)
