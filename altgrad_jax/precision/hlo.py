"""Reading optimised HLO, the text of a compiled program: instructions, their types, and how often each runs.

The grammar is that of `xla::HloModule::ToString`: computations of one instruction a line, the type of a result on its
line and not at its uses. Only what the audit asks of it is read.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

_SHAPE = re.compile(r"\b([a-z][a-z0-9]*)\[([\d,<=]*)\]")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_ASSIGNMENT = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_CALLED = re.compile(r"\b(calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_CALLED_LISTS = re.compile(r"\b(?:branch_computations|called_computations)=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_OP_NAME = re.compile(r'op_name="([^"]*)"')


@dataclass(frozen=True)
class Shape:
    """An array's type: XLA's name of the dtype, such as "bf16" or "f8e4m3fn", and the dimensions."""

    dtype: str
    dims: tuple[int, ...]


@dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      name: unique in the program.
      shapes: of its result; several where that is a tuple.
      opcode: what it does, such as "dot".
      operands: names of what it reads.
      attributes: the rest of the line.
    """

    name: str
    shapes: tuple[Shape, ...]
    opcode: str
    operands: tuple[str, ...]
    attributes: str

    @property
    def op_name(self) -> str:
        """Where it comes from in the traced Python: scopes and primitive, joined by slashes; "" if XLA made it."""
        found = _OP_NAME.search(self.attributes)
        return found[1] if found else ""

    def called(self) -> Iterator[str]:
        """Names of the computations it runs."""
        for found in _CALLED.finditer(self.attributes):
            yield found[2]
        for found in _CALLED_LISTS.finditer(self.attributes):
            yield from re.findall(r"%?([\w.\-]+)", found[1])

    def trips(self) -> int | None:
        """How often a loop runs its body, where XLA knows; 1 for anything else."""
        if self.opcode != "while":
            return 1
        found = _TRIPS.search(self.attributes)
        return int(found[1]) if found else None


@dataclass
class Computation:
    """A function of the program: instructions by name, in order, and the name of the one that is its result."""

    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)
    root: str = ""


@dataclass
class Module:
    """A program.

    Attributes:
      computations: by name.
      entry: name of the one that is run.
    """

    computations: dict[str, Computation]
    entry: str

    def executions(self) -> dict[str, int]:
        """How often each computation runs in one execution; a loop of unknown length counts once."""
        counts = dict.fromkeys(self.computations, 0)
        order = list(self.computations)  # HLO text has callees before their callers

        counts[self.entry] = 1
        for name in reversed(order):
            if not counts[name]:
                continue
            for instruction in self.computations[name].instructions.values():
                for callee in instruction.called():
                    if callee in counts:
                        counts[callee] += counts[name] * (instruction.trips() or 1)
        return counts


def parse(text: str) -> Module:
    """Reads a program's text.

    Raises:
      ValueError: it is no HLO.
    """
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        if header := _HEADER.match(line):
            current = computations[header[2]] = Computation(header[2])
            entry = header[2] if header[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and (found := _ASSIGNMENT.match(line)):
            instruction = _instruction(found[2], re.sub(r"/\*.*?\*/", "", line[found.end() :]))
            current.instructions[instruction.name] = instruction
            if found[1]:
                current.root = instruction.name
    if not entry:
        raise ValueError("this is no HLO text: it has no ENTRY computation")
    return Module(computations, entry)


def _instruction(name: str, rest: str) -> Instruction:
    """Reads "type opcode(operands), attributes"."""
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    opening = rest.index("(", end)
    closing = _closing(rest, opening)
    return Instruction(
        name=name,
        shapes=tuple(_shapes(rest[:end])),
        opcode=rest[end:opening].strip(),
        operands=tuple(re.findall(r"%([\w.\-]+)", rest[opening:closing])),
        attributes=rest[closing + 1 :],
    )


def _shapes(text: str) -> Iterator[Shape]:
    for dtype, dims in _SHAPE.findall(text):
        yield Shape(dtype, tuple(int(d.lstrip("<=")) for d in dims.split(",") if d))


def _closing(text: str, opening: int) -> int:
    """Where the parenthesis that opens there closes."""
    depth = 0
    for i in range(opening, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i
    raise ValueError(f"this is no HLO text: a parenthesis is not closed in {text[:80]!r}")
