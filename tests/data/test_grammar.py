"""The grammar engine against brute force: every text of a small grammar, with its probability as a fraction."""

import hashlib
import math
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from altgrad_jax.data.grammar import (
    Bind,
    Choice,
    Node,
    Recall,
    Seq,
    Stream,
    entropy,
    fill,
    in_order,
    leads,
    sample,
    zipf,
)


def derivations(node: Node, memory: dict[Bind, str] | None = None) -> Iterator[tuple[str, Fraction, dict[Bind, str]]]:
    """Every way to write `node`: text, probability, memory afterwards."""
    memory = {} if memory is None else memory
    match node:
        case str():
            yield node, Fraction(1), memory
        case Seq():
            partial = [("", Fraction(1), memory)]
            for part in node.parts:
                partial = [(t + u, p * q, n) for t, p, m in partial for u, q, n in derivations(part, m)]
            yield from partial
        case Choice():
            for option, weight in zip(node.options, node.weights, strict=True):
                for text, p, after in derivations(option, memory):
                    yield text, p * Fraction(weight, sum(node.weights)), after
        case Bind():
            for text, p, after in derivations(node.body, memory):
                yield text, p, {**after, node: text}
        case Recall():
            yield memory[node.bound] if node.table is None else node.table[memory[node.bound]], Fraction(1), memory


def readings(grammar: Node, text: str) -> list[Fraction]:
    """The probability of every sequence of choices that writes `text`: all options are tried, leads are not used."""
    found = []
    agenda = [(0, (grammar, None), 1, 1, {})]  # position, nodes still to read, probability as two integers, memory
    while agenda:
        at, todo, p, q, memory = agenda.pop()
        if todo is None:
            if at == len(text):
                found.append(Fraction(p, q))
            continue
        node, rest = todo
        match node:
            case str():
                if text.startswith(node, at):
                    agenda.append((at + len(node), rest, p, q, memory))
            case Seq():
                for part in reversed(node.parts):
                    rest = (part, rest)
                agenda.append((at, rest, p, q, memory))
            case Choice():
                total = sum(node.weights)
                for option, weight in zip(node.options, node.weights, strict=True):
                    agenda.append((at, (option, rest), p * weight, q * total, memory))
            case Bind():
                agenda.append((at, (node.body, ((node, at), rest)), p, q, memory))
            case (Bind() as bound, start):
                agenda.append((at, rest, p, q, {**memory, bound: text[start:at]}))
            case Recall():
                recalled = memory[node.bound]
                agenda.append((at, (recalled if node.table is None else node.table[recalled], rest), p, q, memory))
    return found


def minus_log(p: Fraction) -> float:
    return math.log(p.denominator) - math.log(p.numerator)


def small_grammar() -> Node:
    name = Bind(Choice(("ann", "bob", Seq("c", Choice(("at", "od"), (2, 5)))), (3, 2, 1)))
    doing = Choice((" sees ", Seq(" tells ", Recall(name), " of ")), (5, 3))
    end = Choice((".", Seq(" and ", Recall(name, {"ann": "x", "bob": "y", "cat": "z", "cod": "z"}), "!")))
    return Seq("so ", name, doing, zipf(("dogs", "cats", "eels")), end)


def assert_texts_tell_choices(grammar: Node) -> None:
    """No two derivations give the same text, nor does one text begin another."""
    texts = sorted(text for text, _, _ in derivations(grammar))
    assert not any(second.startswith(first) for first, second in pairwise(texts))


def test_a_small_grammar_against_all_its_texts():
    grammar = small_grammar()
    table = {text: p for text, p, _ in derivations(grammar)}
    assert len(table) == 4 * 2 * 3 * 2
    assert sum(table.values()) == 1
    assert_texts_tell_choices(grammar)
    assert entropy(grammar) == pytest.approx(sum(float(p) * minus_log(p) for p in table.values()), rel=1e-14)
    assert all(readings(grammar, text) == [p] for text, p in table.items())
    assert readings(grammar, "so ann sees dogs") == []


def test_samples_have_the_probabilities_they_state():
    grammar = small_grammar()
    table = {text: p for text, p, _ in derivations(grammar)}
    draw = Stream("test").below
    samples = [sample(grammar, draw) for _ in range(20_000)]
    for text, nats in set(samples_as_pairs := [(s.text, s.nats) for s in samples]):
        assert nats == pytest.approx(minus_log(table[text]), rel=1e-14)
    counts = Counter(text for text, _ in samples_as_pairs)
    chi_square = sum((counts[t] - float(20_000 * p)) ** 2 / float(20_000 * p) for t, p in table.items())
    assert chi_square < 107  # 47 degrees of freedom: exceeded with probability 1e-6, and the stream is fixed


@st.composite
def grammars(draw, depth: int = 3) -> Node | None:
    """A random grammar over a and b with a memory, or None where the engine refused it."""
    bound = Bind(Choice(("ab", "aa", "b"), (1, 2, 3)))

    def node(level: int) -> Node:
        shape = draw(st.integers(0, 3 if level else 1))
        if shape == 0:
            return draw(st.text("ab", max_size=2))
        if shape == 1:
            return draw(st.sampled_from([Recall(bound), Recall(bound, {"ab": "b", "aa": "ab", "b": "aa"})]))
        if shape == 2:
            return Seq(*(node(level - 1) for _ in range(draw(st.integers(0, 2)))))
        beginnings = draw(st.sampled_from([("a", "b"), ("aa", "ab", "b"), ("", ""), ("a", "ab"), ("", "b")]))
        weights = draw(st.lists(st.integers(1, 9), min_size=len(beginnings), max_size=len(beginnings)))
        return Choice([Seq(beginning, node(level - 1)) for beginning in beginnings], weights)

    try:
        return Seq(bound, *(node(depth) for _ in range(2)))
    except ValueError:
        return None


@given(grammars())
def test_whatever_the_engine_accepts_is_injective_and_has_the_stated_entropy(grammar):
    if grammar is None:
        return
    table = list(derivations(grammar))
    assert_texts_tell_choices(grammar)
    assert all(any(text.startswith(lead) for lead in leads(grammar)) for text, _, _ in table)
    assert entropy(grammar) == pytest.approx(sum(float(p) * minus_log(p) for _, p, _ in table), abs=1e-12)


def test_the_engine_accepts_some_of_these_grammars():
    """The property above is not vacuous: this one, with a memory inside a choice, is accepted."""
    bound = Bind(Choice(("ab", "aa", "b")))
    assert_texts_tell_choices(Seq(bound, Choice((Seq("a", Recall(bound)), Seq("b", Recall(bound))))))


@pytest.mark.parametrize(
    "options, weights",
    [
        ((), None),
        (("a", "b"), (1,)),
        (("a", "b"), (1, 0)),
        (("a", "b"), (1, 2.0)),
        (("a", "b"), (1, True)),
        (("a", "b"), (1 << 32, 1)),
        (("Article 1", "Article 12"), None),
        (("", "a"), None),
        (("a", Seq("a")), None),
        ((Seq("a", Choice(("b", "c"))), "ac"), None),
        ((Seq(Choice(("a", "b")), "c"), "ad"), None),  # refused though a text would tell: only leads are looked at
    ],
)
def test_a_choice_refuses(options, weights):
    with pytest.raises(ValueError):
        Choice(options, weights)


def test_memory_of_alternatives_is_checked_too():
    first, second = Bind(Choice(("ab", "b"))), Bind(Choice(("a", "c")))
    with pytest.raises(ValueError, match="prefix-free"):
        Choice((Recall(first), Recall(second)))
    with pytest.raises(ValueError, match="prefix-free"):
        Choice((Recall(first, {"ab": "x", "b": "xy"}), "z"))


def test_recall_needs_something_to_recall():
    bound = Bind(Choice(("a", "b")))
    with pytest.raises(KeyError):
        sample(Seq(Recall(bound), bound), Stream("test").below)


def test_a_bound_node_written_again_is_remembered_anew():
    bound = Bind(Choice(("a", "b")))
    texts = {text for text, _, _ in derivations(Seq(bound, Recall(bound), " ", bound, Recall(bound)))}
    drawn = {sample(Seq(bound, Recall(bound), " ", bound, Recall(bound)), Stream(str(i)).below).text for i in range(99)}
    assert drawn == texts == {"aa aa", "aa bb", "bb aa", "bb bb"}


def test_fill_puts_nodes_into_a_template():
    bound = Bind("x")
    filled = fill("{first} is {first}, not {second}", {"first": bound, "second": "y"})
    assert sample(filled, Stream("test").below).text == "x is x, not y"
    with pytest.raises(KeyError, match="third"):
        fill("{third}", {})


def test_zipf_weights():
    assert zipf("abcde").weights == (5040, 2520, 1680, 1260, 1008)


def test_in_order_numbers_items_and_never_repeats_a_kind():
    grammar = in_order(
        first=3,
        kinds=3,
        weight=lambda least, kind: 1 + kind - least,
        item=lambda number, kind: f"{number}{'xyz'[kind]} ",
        end=lambda number: f"{number}end",
        end_weight=lambda number: number,
    )
    table = {text: p for text, p, _ in derivations(grammar)}
    assert set(table) == {
        "3end", "3x 4end", "3y 4end", "3z 4end", "3x 4y 5end", "3x 4z 5end", "3y 4z 5end", "3x 4y 5z 6end",
    }  # fmt: skip
    assert sum(table.values()) == 1
    assert table["3y 4z 5end"] == Fraction(2, 9) * Fraction(1, 5)  # 1 + 2 + 3 + 3; 1 + 4; nothing but the end
    assert table["3x 4end"] == Fraction(1, 9) * Fraction(4, 7)


def test_stream_is_sha256_in_counter_mode():
    """Against words cut from the digests by hand, rejection included."""
    words = []
    for counter in range(40):
        digest = hashlib.sha256(b"key\0" + counter.to_bytes(8, "big")).digest()
        words += [int.from_bytes(digest[4 * i : 4 * i + 4], "big") for i in range(8)]
    stream = Stream("key")
    assert [stream.below(1 << 32) for _ in range(20)] == words[:20]
    remaining = iter(words[20:])
    for bound in [1, 2, 3, 5, 900, 1 << 31, (1 << 31) + 1] * 9:
        bits = 0 if bound == 1 else math.ceil(math.log2(bound))
        expected = next(value for value in (word // 2 ** (32 - bits) for word in remaining) if value < bound)
        assert stream.below(bound) == expected


@pytest.mark.parametrize("bound", [0, -1, (1 << 32) + 1])
def test_stream_refuses_bounds_it_cannot_serve(bound):
    with pytest.raises(ValueError):
        Stream("key").below(bound)


@pytest.mark.parametrize("bound", [2, 3, 7, 12, 900])
def test_stream_is_uniform(bound):
    stream = Stream(f"uniform {bound}")
    counts = Counter(stream.below(bound) for _ in range(100 * bound))
    chi_square = sum((counts[value] - 100) ** 2 / 100 for value in range(bound))
    spread = 2 / (9 * (bound - 1))  # Wilson and Hilferty's approximation of the chi-square quantile at 1 - 1e-6
    assert chi_square < (bound - 1) * (1 - spread + 4.75 * math.sqrt(spread)) ** 3
