"""The TensorFlow Datasets builder for EUR-Lex. It needs no TensorFlow: records are kept as ArrayRecord files.

This module imports `tensorflow_datasets`, which takes about a second, so import it only where a corpus is prepared or
read. `altgrad_jax.data.eurlex` does, and is what to use; the builder also works on its own:

    builder = Eurlex(config="eurlex57k", data_dir="data/tfds", file_format="array_record")
    builder.download_and_prepare()
    acts = builder.as_data_source("train")  # acts[0]["text"] is UTF-8 bytes
"""

import contextlib
import dataclasses
import io
import itertools
import json
import logging
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from google.protobuf import json_format
from tensorflow_datasets.core.utils import tqdm_utils

from altgrad_jax.data.documents import SPLITS
from altgrad_jax.data.eurlex_corpora import CORPORA
from altgrad_jax.data.eurlex_layouts import CONCEPTS_FILE, SOURCE_FILE, Layout, published
from altgrad_jax.data.progress import progress_bar
from altgrad_jax.errors import UserError

# TFDS collects a split in memory, and past 1000 MiB of records spills to disk through TensorFlow, which is not there.
MAX_SPLIT_BYTES = 900 << 20
_RECORD_BYTES = 1 << 10  # for all of a record but title and text; on the safe side


class _OfflineInfo(tfds.core.DatasetInfo):
    """Dataset info that never asks Google's bucket of ready-made datasets, which has never heard of this one."""

    def initialize_from_bucket(self) -> None:
        """Does nothing; TFDS would look for the dataset's info on the network."""


class Eurlex(tfds.core.GeneratorBasedBuilder):
    """EU legislation in English with EuroVoc concepts.

    Splits `train`, `validation` and `test`; features `id`, `title`, `text` (title included), `date` and `labels`. The
    order within a split is that of the source, not shuffled.

    Beside TFDS's own files it writes `source.json`: the hashes of the files read, and the documents per split; and
    `concepts.json` where the source has one. All appear together, by one rename, once everything is written.
    """

    BUILDER_CONFIGS = tuple(
        tfds.core.BuilderConfig(name=corpus.name, description=corpus.description, version=corpus.version)
        for corpus in CORPORA.values()
    )

    def __init__(self, *, layout: Layout | None = None, progress: bool = False, **kwargs: Any):
        """Constructs the builder; nothing is read or written yet.

        Args:
          layout: where the corpus lies; None: it is downloaded when the builder is run.
          progress: whether progress lines are drawn.
          **kwargs: as for every builder: `data_dir`, `config`, `file_format`.
        """
        self._layout = layout
        self._progress = progress
        self._renamed, self._left_out = Counter[str](), [0, 0]  # documents by split; labels, and documents with some
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text
        features = {name: text() for name in ("id", "title", "text", "date")} | {
            "labels": tfds.features.Sequence(text())
        }
        return _OfflineInfo(
            builder=self,
            description=CORPORA[self.builder_config.name].description,
            features=tfds.features.FeaturesDict(features),
            disable_shuffling=True,  # the source's order is kept
        )

    def _download_and_prepare(self, dl_manager: Any, download_config: Any) -> None:
        """TFDS's hook for filling the dataset folder, which gets its name only if this returns."""
        folder = Path(self.data_dir)
        corpus = CORPORA[self.builder_config.name]
        layout = self._layout or published(corpus, Path(dl_manager.download_dir), self._progress)
        digests = layout.digests()
        with tempfile.TemporaryDirectory(dir=folder) as work:
            self._opened = layout.unpacked(Path(work) / "archive")
            super()._download_and_prepare(dl_manager, download_config)
            concepts = self._opened.concepts()
        source = {
            "builder": self.info.full_name,
            "files": digests,
            "documents": {split: self.info.splits[split].num_examples for split in SPLITS},
            "notes": self._notes(),
        }
        for note in source["notes"] if self._progress else ():
            print(f"note: {note}", file=sys.stderr)
        _write_json(folder / SOURCE_FILE, source)
        if concepts:
            _write_json(folder / CONCEPTS_FILE, concepts)

    def _notes(self) -> list[str]:
        """What is to be known of the documents and is no error."""
        notes = []
        if self._renamed:
            where = ", ".join(f"{count:,} in {split}" for split, count in self._renamed.items())
            notes.append(f"documents whose id another has before them, and that got a number: {where}")
        if self._left_out[0]:
            labels, documents = self._left_out
            count = len(CORPORA[self.builder_config.name].labels)
            notes.append(f"{labels:,} labels of {documents:,} documents are none of the {count} and were left out")
        return notes

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, object]]]]:
        """TFDS's hook: split -> its examples. TFDS runs through the generators one after the other."""
        seen: set[str] = set()
        return {split: self._generate_examples(split, seen) for split in SPLITS}

    def _generate_examples(self, split: str, seen: set[str]) -> Iterator[tuple[int, dict[str, object]]]:
        """TFDS's hook: (position, example) pairs. An id that was there before gets "#2", "#3" and so on appended."""
        size = 0
        with progress_bar(f"preparing {split}", unit="documents", show=self._progress) as advance:
            for number, record in enumerate(self._opened.records(split)):
                example = dataclasses.asdict(record) | {"id": _unused(record.id, seen)}
                del example["left_out"]
                self._renamed.update([split] if example["id"] != record.id else [])
                self._left_out[0] += len(record.left_out)
                self._left_out[1] += bool(record.left_out)
                size += len(record.text.encode()) + len(record.title.encode()) + _RECORD_BYTES
                if size > MAX_SPLIT_BYTES:
                    raise UserError(
                        f"the {split} split is larger than {MAX_SPLIT_BYTES:,} bytes, more than this builder can hold: "
                        f"read the files as plain JSON lines instead"
                    )
                yield number, example
                advance(1)


def write_dataset(layout: Layout, tfds_dir: Path, download_dir: Path, progress: bool) -> None:
    """Runs the builder on a corpus, unless TFDS finds that dataset below `tfds_dir`.

    Raises:
      UserError: the source is broken; nothing is left of the dataset then.
    """
    with quiet():
        builder = Eurlex(
            layout=layout, progress=progress, config=layout.corpus.name, data_dir=tfds_dir, file_format="array_record"
        )
        # Without `extract_dir` TFDS makes a folder for archives that it never gets to see.
        config = tfds.download.DownloadConfig(extract_dir=download_dir)
        builder.download_and_prepare(download_dir=download_dir, download_config=config)


def read_examples(folder: Path, split: str) -> Iterator[dict[str, Any]]:
    """The examples of a split of a prepared dataset, in order; texts are UTF-8 bytes.

    Raises:
      UserError: its files are damaged or missing. ArrayRecord stores a hash with each chunk of records and checks it.
    """
    try:
        with quiet():
            examples = tfds.builder_from_directory(folder).as_data_source(split)
        yield from examples
    except (RuntimeError, ValueError, OSError, json_format.ParseError) as error:
        raise UserError(
            f"the prepared data in {folder} is damaged ({error}); prepare it again with --overwrite"
        ) from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps TFDS off the console while the block runs: its progress bars, its stdout and its absl log lines.

    Everything is as before once the block ends. Standard output is the whole process's: print to stderr meanwhile.
    """
    logger = logging.getLogger("absl")
    level, bars = logger.level, tqdm_utils._active
    try:
        logger.setLevel(logging.ERROR)
        tfds.display_progress_bar(False)
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tfds.display_progress_bar(bars)
        logger.setLevel(level)


def _unused(name: str, seen: set[str]) -> str:
    """The id itself, or with the first number that makes it new; remembers it."""
    names = itertools.chain((name,), (f"{name}#{count}" for count in itertools.count(2)))
    unused = next(candidate for candidate in names if candidate not in seen)
    seen.add(unused)
    return unused


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
