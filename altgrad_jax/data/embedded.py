"""The embedded corpus: acts of an invented legislation, drawn from a grammar whose entropy is known.

It needs no download, is the same bytes everywhere, and has what makes a loss curve worth watching: one of ten fields of
law steers the words of each act; the goods, the actor and the document it defines return throughout; articles are
numbered and refer only to earlier ones; the kind of act, its date and the acts it cites must be copied from far above;
the concept labels at the end follow from the definitions. The words are in `legislation.py`, the machinery and why its
entropy is exact in `grammar.py`; this file joins them.

**The floor.** `EmbeddedCorpus.nats(split)` is the sum of -log p over the documents of a split, in nats, p being the
probability of the document's whole text under the grammar. Since no text begins another, the end of a document is
certain once it is reached: an end-of-document token adds nothing. For any lossless tokenizer the floor in nats per
token is therefore nats(split) / tokens(split), end-of-document tokens counted. `expected_nats()` is the mean over all
possible documents, the entropy of the grammar. No model has a lower expected loss on unseen documents; on a finite
split a lucky or unlucky draw moves model and floor together, so compare with the split's own sum. It is a bound that
cannot quite be reached: a model whose window is finite or opens in mid-document must guess the field and the
definitions it did not see. On the *training* split a loss below it is possible: documents have been memorised.
"""

import hashlib
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache

from altgrad_jax.data import legislation as words
from altgrad_jax.data.documents import SPLITS, Document
from altgrad_jax.data.grammar import (
    Bind,
    Choice,
    Node,
    Recall,
    Sample,
    Seq,
    Stream,
    entropy,
    fill,
    in_order,
    sample,
    zipf,
)
from altgrad_jax.errors import UserError

MOST_TOKENS = 3428  # of a bpe vocabulary trained on it, which then finds no pair of tokens that occurs twice
VERSION = 1  # of the generator: raise it with every change to the text of any document
YEARS = range(2010, 2025)  # of the acts; the acts they cite are older
OLD_YEARS = range(1995, 2010)
PARAGRAPHS = 4  # the most an article may have


@cache
def act() -> Node:
    """The grammar of one act, from its title to its concept labels."""
    author, kind = Bind(zipf(("Commission", "Council"))), Bind(zipf(words.KINDS))
    year = Bind(Choice([str(year) for year in YEARS]))
    date = Bind(Seq(Choice([f"{day} " for day in range(1, 29)]), Choice(words.MONTHS), " ", Recall(year)))
    serial = Choice([str(number) for number in range(100, 1000)])
    title = fill(words.TITLE, {"author": author, "type": kind, "year": year, "serial": serial, "date": date})

    def by_author(commission: str, council: str) -> Node:
        return Recall(author, {"Commission": commission, "Council": council})

    slots = {
        "author": Recall(author),
        "AUTHOR": by_author("EUROPEAN COMMISSION", "COUNCIL OF THE EUROPEAN UNION"),
        "proposal": by_author("After consulting the Committee", "Having regard to the proposal from the Commission"),
        "signature": by_author("A Member of the Commission", "The President"),
        "type": Recall(kind),
        "TYPE": Recall(kind, {name: name.upper() for name in words.KINDS}),
        "force": Recall(kind, words.FORCE),
        "date": Recall(date),
        "next": Recall(year, {str(year): str(year + 1) for year in YEARS}),
        "later": Recall(year, {str(year): str(year + 3) for year in YEARS}),
        "serial": serial,
    }
    return Seq(title, Choice([_act_of_field(field, index, slots) for index, field in enumerate(words.FIELDS)]))


def _act_of_field(field: words.Field, index: int, slots: Mapping[str, Node]) -> Node:
    """An act from the field's name in the title to its end; `slots` are what the title's beginning settles."""
    action, goods, base = Bind(zipf(field.actions)), Bind(zipf(field.goods)), Bind(zipf(field.acts))
    actor, paper = Bind(zipf(field.actors)), Bind(zipf(field.papers))
    old_year = Choice([str(year) for year in OLD_YEARS])
    old = Bind(Seq(zipf(words.KINDS), " (EC) ", old_year, "/", slots["serial"]))
    fate = Bind(Choice(("should be repealed", "should be amended"), (2, 1)))
    recalled = {"action": action, "goods": goods, "base": base, "actor": actor, "paper": paper, "old": old}
    slots = {**slots, **{name: Recall(bound) for name, bound in recalled.items()}}
    slots |= {"property": zipf(field.aspects), "aim": zipf(field.aims)}
    slots |= {name: _one_of(alternatives, slots) for name, alternatives in words.PHRASES.items()}
    for name, alternatives in words.SHARED.items():
        start = index % len(alternatives)
        slots[name] = _one_of(alternatives[start:] + alternatives[:start], slots)
    slots |= {name: _one_of(alternatives, slots) for name, alternatives in words.FRAME.items()}
    slots |= {
        "field": field.name,
        "treaty": zipf(field.treaty),
        "basis": Choice([f"{number}(1)" for number in range(3, 20)]),
        "repeal": Recall(fate, {"should be repealed": "Repeal", "should be amended": "Amendment"}),
        "repealed": Recall(fate, {"should be repealed": "repealed", "should be amended": "amended as set out above"}),
        "concepts": _concepts(field, index, goods, paper),
    }
    # A bound node stands where its words are first chosen; everywhere else the slot recalls them.
    preamble = fill(words.PREAMBLE, {**slots, "action": action, "goods": goods, "base": base})
    adoption = fill(words.ADOPTION, {**slots, "old": old, "fate": fate, "actor": actor, "paper": paper})

    def recital(number: int, kind: int) -> Node:
        return Seq(f"({number}) ", fill(words.RECITALS[kind], slots), ".\n")

    def enacting(number: int) -> Node:
        return Seq(f"({number}) ", adoption, articles)

    def closing(number: int) -> Node:
        return Seq(f"Article {number}\n", fill(words.CLOSING, {**slots, "last": str(number + 1)}))

    articles = in_order(3, len(words.ARTICLES), _nearest, _articles(slots), closing, lambda number: 8 * number)
    recitals = in_order(1, len(words.RECITALS), _nearest, recital, enacting, lambda number: 16 * number)
    return Seq(preamble, recitals)


def _concepts(field: words.Field, index: int, goods: Bind, paper: Bind) -> Node:
    """Concept labels: the field, its goods and its document as chosen above, and at times one aspect."""

    def labels(group: int, names: Sequence[str]) -> dict[str, str]:
        return {name: f"C{10 + index}{group + position:02d} {name}" for position, name in enumerate(names)}

    chosen = Seq(Recall(goods, labels(10, field.goods)), "; ", Recall(paper, labels(40, field.papers)))
    aspect = zipf([f"; {label}." for label in labels(70, field.aspects).values()])
    return Seq(labels(0, [field.name])[field.name], "; ", chosen, Choice((".", aspect)))


def _articles(slots: Mapping[str, Node]) -> Callable[[int, int], Node]:
    """The function (number, kind) -> article: a heading and numbered paragraphs of one or two sentences."""

    def sentence(kind: int, case: Callable[[str], str]) -> Node:
        sentences = words.ARTICLES[kind][1]
        return zipf([Seq(fill(case(who), slots), _one_of(what, slots)) for who, what in sentences.items()])

    initial = [sentence(kind, str) for kind in range(len(words.ARTICLES))]
    inner = [sentence(kind, _lowered) for kind in range(len(words.ARTICLES))]
    follow_up = _one_of(words.FOLLOW_UPS, slots)
    rider = _one_of((" where the {aspect} {fault}.", ", having regard to {aim}.", " pursuant to {base}."), slots)

    def article(number: int, kind: int) -> Node:
        accord = Seq(", in accordance with Article ", _earlier(number, "."))
        without = Seq(", without prejudice to Article ", _earlier(number, "."))
        stop = Choice((".", rider, accord, without), (6, 4, 3, 2))
        paragraphs: Node = "\n"  # after the last, a blank line
        for k in range(PARAGRAPHS, 0, -1):
            openings = [initial[kind], Seq("Subject to Article ", _earlier(number, ", "), inner[kind])]
            if k > 1:
                openings.append(Seq("For the purposes of paragraph ", _earlier(k, ", "), inner[kind]))
            onward = Choice(("\n", paragraphs), (2, 3)) if k < PARAGRAPHS else paragraphs
            end = Choice((Seq("\n", onward), Seq(" ", follow_up, "\n", onward)), (5, 2))
            paragraphs = Seq(f"{k}. ", Choice(openings, (6, 2, 2)[: len(openings)]), stop, end)
        return Seq(f"Article {number}\n", fill(words.ARTICLES[kind][0], slots), "\n", paragraphs)

    return article


def _earlier(number: int, end: str) -> Node:
    """A number from 1 to `number` - 1, the nearest most likely, and the text that closes it off."""
    return zipf([f"{earlier}{end}" for earlier in range(number - 1, 0, -1)])


def _lowered(beginning: str) -> str:
    """The beginning of a sentence as it reads after an introductory phrase."""
    return beginning if beginning.startswith("Member States") else beginning[0].lower() + beginning[1:]


def _nearest(least: int, kind: int) -> int:
    """Weight of going on with a kind of recital or article: the next in order is the most likely."""
    return 120 // (kind - least + 1) ** 2


def _one_of(templates: Sequence[str], slots: Mapping[str, Node]) -> Node:
    """One of several templates, with weights falling as 1 / rank."""
    return zipf([fill(template, slots) for template in templates])


class EmbeddedCorpus:
    """The embedded corpus as a `Source`.

    Every document is drawn from a stream of its own, keyed by seed, split and index: the splits are independent, any
    document can be made alone, and a larger corpus begins, split by split, with the documents of a smaller one.

    Args:
      documents: number of documents in all; a twentieth each (at least one) is for validation and for test.
      seed: any integer.

    Raises:
      UserError: fewer than three documents, one for each split.
    """

    name = "embedded"

    def __init__(self, documents: int = 1000, seed: int = 0) -> None:
        if documents < len(SPLITS):
            raise UserError(f"the embedded corpus needs at least {len(SPLITS)} documents, one a split, not {documents}")
        held_out = max(1, documents // 20)
        self._sizes = {"train": documents - 2 * held_out, "validation": held_out, "test": held_out}
        self._seed = seed
        self.description = f"{documents} invented acts of law drawn from a grammar of known entropy, seed {seed}"

    def fingerprint(self) -> str:
        """Hex SHA-256 of the generator's version, the seed and the sizes of the splits."""
        return hashlib.sha256(f"{self.name} {VERSION} {self._seed} {sorted(self._sizes.items())}".encode()).hexdigest()

    def splits(self) -> tuple[str, ...]:
        """All three."""
        return SPLITS

    def documents(self, split: str) -> Iterator[Document]:
        """Documents of a split, in order, each with the concept identifiers that its last line prints as labels."""
        for index in range(self._sizes[split]):
            text = self.draw(split, index).text
            yield Document(f"{split}-{index}", text, tuple(re.findall(r"\bC\d{4}\b", text[text.rindex("\n") :])))

    def draw(self, split: str, index: int) -> Sample:
        """The text of one document, counted from 0, and its -log p in nats."""
        return sample(act(), Stream(f"{self.name} {VERSION} {self._seed} {split} {index}").below)

    def nats(self, split: str) -> float:
        """Sum of -log p over the documents of a split, in nats (natural log). It draws them all: some seconds."""
        return math.fsum(self.draw(split, index).nats for index in range(self._sizes[split]))

    def expected_nats(self) -> float:
        """Expected -log p of one document, in nats: the entropy of the grammar, in closed form."""
        return entropy(act())
