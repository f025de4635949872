"""A tiny probabilistic grammar whose entropy is known exactly.

A grammar is a value: a tree (with shared branches) of strings, sequences, weighted choices, and memories of what was
written before. Three facts make its entropy exact rather than estimated:

1. The weights of a `Choice` are integers fixed when the grammar is built, so the probability of every sequence of
   choices is a rational number, and the expected -log p of a node follows from those of its parts: a sum over a
   sequence, log-entropy plus weighted mean over a choice, nothing for a memory, whose text is already settled.
2. A text determines the choices that made it. Every node knows its *leads*, strings one of which any text of that node
   begins with, and a `Choice` refuses options whose leads are not prefix-free: whoever reads from left to right sees at
   every choice which option was taken. Hence p(text) is the product of the probabilities of its choices; and since two
   texts part at a choice, none is a prefix of another, so where a text ends is no news either.
3. Draws come from SHA-256 in counter mode by rejection, exactly uniform in its bits, the same on every machine.

What depends on position (the number of an article, which articles exist already) is built into the tree, one branch
for each case. What depends on earlier words (a defined term used again) goes through `Bind` and `Recall`.
"""

import hashlib
import math
import re
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

ZIPF_SCALE = 5040  # weights are 5040 // rank: whole numbers close to 1 / rank


class Seq:
    """Its parts, one after another.

    Attributes:
      parts: the nodes.
      entropy: expected -log p of its choices, in nats.
      leads: a finite set of strings such that every text of this node begins with one of them.
    """

    __slots__ = ("entropy", "leads", "parts")

    def __init__(self, *parts: "Node") -> None:
        self.parts = parts
        self.entropy = math.fsum(entropy(part) for part in parts)
        literal, following = "", frozenset({""})
        for part in parts:
            if not isinstance(part, str):
                following = leads(part)
                break
            literal += part
        self.leads = frozenset(literal + lead for lead in following)


class Choice:
    """One of several options, drawn with probability weight / total of the weights.

    Attributes:
      options: the nodes to choose from.
      weights: a positive integer for each.
      cumulative: running sums of the weights; the last is the total.
      costs: -log of each option's probability, in nats.
      entropy, leads: as for `Seq`.

    Raises:
      ValueError: no options, a weight that is not a positive integer, a total above 2^32, or two options whose leads
        are not prefix-free, so that a text might not tell which was taken.
    """

    __slots__ = ("costs", "cumulative", "entropy", "leads", "options", "weights")

    def __init__(self, options: Sequence["Node"], weights: Sequence[int] | None = None) -> None:
        self.options = tuple(options)
        self.weights = (1,) * len(self.options) if weights is None else tuple(weights)
        if not self.options or len(self.weights) != len(self.options):
            raise ValueError(f"a choice needs options and as many weights: {len(self.options)}, {len(self.weights)}")
        if any(type(weight) is not int or weight < 1 for weight in self.weights):
            raise ValueError(f"weights must be positive integers: {self.weights}")
        self.cumulative = tuple(accumulate(self.weights))
        total = self.cumulative[-1]
        if total > 1 << 32:
            raise ValueError(f"the weights sum to {total}, above 2^32")
        self.costs = tuple(math.log(total / weight) for weight in self.weights)
        self.entropy = math.fsum(
            weight / total * (cost + entropy(option))
            for weight, cost, option in zip(self.weights, self.costs, self.options, strict=True)
        )
        ordered = sorted(lead for option in self.options for lead in leads(option))
        for first, second in pairwise(ordered):  # sorted: a prefix stands right before something it begins
            if second.startswith(first):
                raise ValueError(f"options are not prefix-free: {first!r} and {second!r}")
        self.leads = frozenset(ordered)


class Bind:
    """A node whose text is remembered for `Recall`, until the same node is written again.

    Attributes:
      body: the node.
      entropy, leads: those of `body`.
    """

    __slots__ = ("body", "entropy", "leads")

    def __init__(self, body: "Node") -> None:
        self.body = body
        self.entropy = entropy(body)
        self.leads = leads(body)


class Recall:
    """The text last written by a bound node, or what a table gives for it: no choice, so no entropy.

    Attributes:
      bound: the `Bind`.
      table: remembered text -> text to write; None writes the remembered text itself.
      entropy: 0.
      leads: those of the bound node, or the values of the table.
    """

    __slots__ = ("bound", "entropy", "leads", "table")

    def __init__(self, bound: Bind, table: Mapping[str, str] | None = None) -> None:
        self.bound = bound
        self.table = table
        self.entropy = 0.0
        self.leads = bound.leads if table is None else frozenset(table.values())


Node = str | Seq | Choice | Bind | Recall


def entropy(node: Node) -> float:
    """Expected -log p of the texts of `node`, in nats (0 for a string)."""
    return 0.0 if isinstance(node, str) else node.entropy


def leads(node: Node) -> frozenset[str]:
    """Strings one of which every text of `node` begins with."""
    return frozenset({node}) if isinstance(node, str) else node.leads


def zipf(options: Sequence[Node]) -> Choice:
    """A choice with weights falling as 1 / rank, in the order given."""
    return Choice(options, [max(1, ZIPF_SCALE // rank) for rank in range(1, len(options) + 1)])


def fill(template: str, slots: Mapping[str, Node]) -> Node:
    """The sequence a template stands for: literal text, with `{name}` for a node of `slots`."""
    pieces = re.split(r"\{(\w+)\}", template)
    parts = [slots[piece] if index % 2 else piece for index, piece in enumerate(pieces)]
    return Seq(*(part for part in parts if part != ""))


class Stream:
    """Integers drawn uniformly from SHA-256(key, counter): the same for a key on every machine and Python version."""

    def __init__(self, key: str) -> None:
        self._key = key.encode()
        self._counter = 0
        self._words: list[int] = []

    def below(self, bound: int) -> int:
        """A uniform integer in [0, bound), for 1 <= bound <= 2^32; by rejection, so without bias."""
        if not 1 <= bound <= 1 << 32:
            raise ValueError(f"a bound must lie between 1 and 2^32: {bound}")
        bits = (bound - 1).bit_length()
        while True:
            if not self._words:
                block = hashlib.sha256(self._key + b"\0" + self._counter.to_bytes(8, "big")).digest()
                self._counter += 1
                self._words = [int.from_bytes(block[i : i + 4], "big") for i in range(28, -1, -4)]
            value = self._words.pop() >> (32 - bits)
            if value < bound:
                return value


@dataclass(frozen=True)
class Sample:
    """A text and its -log p in nats, natural logarithm of an exact rational up to float64 rounding."""

    text: str
    nats: float


@dataclass(frozen=True)
class _Keep:
    """Marks the end of a bound node on the sampler's stack."""

    bound: Bind
    start: int


def sample(grammar: Node, below: Callable[[int], int]) -> Sample:
    """Draws one text.

    Args:
      grammar: where to start.
      below: `below(n)` gives a uniform integer in [0, n), e.g. `Stream(key).below`.

    Raises:
      KeyError: a `Recall` was reached before its `Bind`, or its table lacks the remembered text.
    """
    written: list[str] = []
    costs: list[float] = []
    memory: dict[Bind, str] = {}
    stack: list[Node | _Keep] = [grammar]
    while stack:
        node = stack.pop()
        match node:
            case str():
                written.append(node)
            case Seq():
                stack.extend(reversed(node.parts))
            case Choice():
                taken = bisect_right(node.cumulative, below(node.cumulative[-1]))
                costs.append(node.costs[taken])
                stack.append(node.options[taken])
            case Bind():
                stack.append(_Keep(node, len(written)))
                stack.append(node.body)
            case Recall():
                text = memory[node.bound]
                written.append(text if node.table is None else node.table[text])
            case _Keep():
                memory[node.bound] = "".join(written[node.start :])
    return Sample("".join(written), math.fsum(costs))


def in_order(
    first: int,
    kinds: int,
    weight: Callable[[int, int], int],
    item: Callable[[int, int], Node],
    end: Callable[[int], Node],
    end_weight: Callable[[int], int],
) -> Node:
    """Numbered items, each of a later kind than the one before, then an end.

    After an item of kind m the next is of kind k > m with weight `weight(m + 1, k)`, or the list ends. The number of
    items is thus random, no kind comes twice, and every item is built knowing its number. The kinds and the end must
    begin differently, as the options of any `Choice`.

    Args:
      first: number of the first item.
      kinds: how many kinds there are, 0 .. kinds - 1.
      weight: (least kind still allowed, kind) -> weight of going on with that kind.
      item: (number, kind) -> node.
      end: number the next item would have had -> node that follows the list.
      end_weight: that number -> weight of ending there.
    """
    items = {(first + i, kind): item(first + i, kind) for kind in range(kinds) for i in range(kind + 1)}
    states: dict[tuple[int, int], Node] = {}
    for least in range(kinds, -1, -1):  # backwards: a state's successors exist before it
        for number in range(first, first + least + 1):
            following: list[Node] = [Seq(items[number, k], states[number + 1, k + 1]) for k in range(least, kinds)]
            weights = [weight(least, k) for k in range(least, kinds)]
            states[number, least] = Choice([*following, end(number)], [*weights, end_weight(number)])
    return states[first, 0]
