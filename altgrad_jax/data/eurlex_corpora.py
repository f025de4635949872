"""The public EUR-Lex corpora: where each is published, and how one of its records becomes a document.

A document's text is its title, a blank line, and its body; white space around either is dropped. The body of EURLEX57K
is header, recitals, main body and attachments, one part a line. LexGLUE's records have no title, id or date: the title
is part of the text, and the id is made of the split and the line number; its labels are held to the list in `lexglue`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from altgrad_jax.data.download import RemoteFile
from altgrad_jax.data.jsonlines import JsonRecord
from altgrad_jax.data.lexglue import LABELS, split_labels


@dataclass(frozen=True)
class Record:
    """One act, as it is stored.

    Attributes:
      id: its name in the source.
      title: empty where the source has it in the text.
      text: begins with the title.
      date: ISO 8601 or empty.
      labels: EuroVoc ids.
      left_out: labels that the record has and the corpus has not; not stored.
    """

    id: str
    title: str
    text: str
    date: str
    labels: tuple[str, ...]
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class Corpus:
    """One corpus.

    Attributes:
      name: the builder config's name.
      description: one line, with the licence.
      remote: where it is published; None for one that exists only on the user's disk.
      single_file: name, without suffix, of the one file that holds all splits; None if each split has its own.
      inner_folder: the folder its files lie in inside the archive, unless they lie at the top.
      marker: a field that its records have and those of the other corpora with the same file names have not.
      parse: JSON record, split, line number (from 1) -> Record.
      labels: all that there are, where that is settled; () where they are those that the documents carry.
      version: of the rules by which a record becomes a document: raise it with every change to its id, text or labels.
    """

    name: str
    description: str
    remote: RemoteFile | None
    single_file: str | None
    inner_folder: str
    marker: str
    parse: Callable[[JsonRecord, str, int], Record]
    labels: tuple[str, ...] = ()
    version: str = "1.0.0"


def _join(title: str, body: str) -> str:
    return "\n\n".join(part for part in (title, body.strip()) if part)


def _parse_eurlex57k(record: JsonRecord, split: str, number: int) -> Record:
    title = record.text("title").strip()
    body = [part for field in ("header", "recitals", "main_body", "attachments") for part in record.paragraphs(field)]
    labels = record.identifiers("eurovoc_concepts")
    return Record(record.identifier("celex_id"), title, _join(title, "\n".join(body)), record.text("date", ""), labels)


def _parse_lexglue(record: JsonRecord, split: str, number: int) -> Record:
    labels, left_out = split_labels(record.identifiers("labels"), record.where)
    return Record(f"{split}-{number}", "", record.text("text").strip(), "", labels, left_out)


def _parse_local(record: JsonRecord, split: str, number: int) -> Record:
    title, labels = record.text("title", "").strip(), record.identifiers("concepts", ())
    text, date = _join(title, record.text("text")), record.text("date", "")
    return Record(record.identifier("celex_id"), title, text, date, labels)


EURLEX57K = Corpus(
    name="eurlex57k",
    description="EURLEX57K: 57,000 EU acts in English with EuroVoc concepts (Chalkidis et al. 2019), CC BY-SA 4.0",
    remote=RemoteFile(
        url="http://archive.org/download/EURLEX57K/dataset.zip",
        name="dataset.zip",
        size=50_289_403,
        sha256="dc6830ce8ea49aea049989c4a8253b12d0fb3665fc336d830cb07b9bd28c0f92",
    ),
    single_file=None,
    inner_folder="dataset",
    marker="main_body",
    parse=_parse_eurlex57k,
)

LEXGLUE = Corpus(
    name="lexglue",
    description="LexGLUE EUR-LEX: 65,000 EU acts in English, 100 concepts, split by date (Chalkidis et al. 2022), "
    "CC BY 4.0",
    remote=RemoteFile(
        url="https://zenodo.org/record/5532997/files/eurlex.tar.gz",
        name="eurlex.tar.gz",
        size=125_413_277,
        sha256="82376ff55c3812632d8a21ad0d7e515e2e7ec6431ca7673a454cdd41a3a7bf46",
    ),
    single_file="eurlex",
    inner_folder="eurlex",
    marker="data_type",
    parse=_parse_lexglue,
    labels=LABELS,
    version="1.1.0",  # 1.0.0 took labels that the benchmark has not
)

LOCAL = Corpus(
    name="local",
    description="EUR-Lex acts from local JSON lines, (c) European Union, reuse with attribution (Decision 2011/833/EU)",
    remote=None,
    single_file=None,
    inner_folder="eurlex",
    marker="text",
    parse=_parse_local,
)

CORPORA: Mapping[str, Corpus] = {corpus.name: corpus for corpus in (EURLEX57K, LEXGLUE, LOCAL)}
