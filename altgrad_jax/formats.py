"""Shows number formats: range, grid, special codes; one, or several side by side.

    python -m altgrad_jax.formats                                    # every format that has a name
    python -m altgrad_jax.formats e5m2 [--values]                    # one, with the value of every code
    python -m altgrad_jax.formats e5m2 e4m3fn e3m4:bias=1 --plot=FILE.png

docs/formats.md says what the names mean, and how to write a format that has none.
"""

from altgrad_jax.interrupt import watch

if __name__ == "__main__":
    watch()  # before imports that take seconds

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations, groupby
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from altgrad_jax import cli
from altgrad_jax.console import make_console
from altgrad_jax.errors import UsageError
from altgrad_jax.precision.formats import FloatFormat, family, get_format, registry

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PLOT = flags.DEFINE_string("plot", None, "File for a plot of grids and rounding errors: .png, .svg or .pdf.")
VALUES = flags.DEFINE_boolean("values", False, "Show the value of every code; formats of up to 8 bits.")

SIDE_BY_SIDE = 8  # formats that fit into one table or plot
VALUE_BITS = 8  # widest format whose values are listed
PLOT_SUFFIXES = (".png", ".svg", ".pdf")
PLOT_BINADES = 40  # widest range that is plotted; what lies outside is pointed to
# Okabe and Ito's colours, told apart by colour-blind readers too; for their yellow, which is faint on white, a brown.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#56B4E9", "#E69F00", "#8C6D46")


def power(k: int, e: int) -> str:
    """k 2^e as an odd number times a power of two."""
    zeros = (k & -k).bit_length() - 1
    odd, exponent = k >> zeros, e + zeros
    if exponent == 0:
        return str(odd)
    return f"2^{exponent}" if odd == 1 else f"{odd} x 2^{exponent}"


def number(k: int, e: int, digits: int = 7) -> str:
    """k 2^e in decimal; as a power of two where it lies beyond float64."""
    if e + k.bit_length() > 1024 or e < -1074:
        return power(k, e)
    return f"{math.ldexp(k, e):.{digits}g}"


def both(k: int, e: int) -> str:
    """k 2^e as a power of two, exactly, and in decimal."""
    exact, decimal = power(k, e), number(k, e, digits=6)
    return exact if decimal == exact else f"{exact} ({decimal})"


def named(name: str) -> FloatFormat:
    """`get_format`, for a name from the command line. Raises UsageError."""
    try:
        return get_format(name)
    except ValueError as e:
        raise UsageError(str(e)) from None


def special_codes(fmt: FloatFormat) -> dict[str, list[tuple[int, int]]]:
    """The codes that are infinities, NaN and -0, as ranges (first, last)."""
    signs = (0, fmt.magnitudes) if fmt.signed else (0,)
    first_nan, last = fmt.max_magnitude + 1 + int(fmt.inf), fmt.magnitudes - 1
    nans = [(sign + first_nan, sign + last) for sign in signs if first_nan <= last]
    if fmt.nan == "zero":
        nans.append((fmt.magnitudes, fmt.magnitudes))
    infinities = [(sign + fmt.inf_code, sign + fmt.inf_code) for sign in signs] if fmt.inf_code is not None else []
    return {"infinity": infinities, "NaN": nans, "-0": [(fmt.magnitudes,) * 2] if fmt.negative_zero else []}


def _ranges(codes: Sequence[tuple[int, int]], bits: int) -> str:
    """ "0x7d-0x7f, 0xfd-0xff"."""
    width = math.ceil(bits / 4)
    texts = (f"0x{a:0{width}x}" if a == b else f"0x{a:0{width}x}-0x{b:0{width}x}" for a, b in codes)
    return ", ".join(texts) or "none"


def _smallest_normal(fmt: FloatFormat) -> str:
    if fmt.exponent_bits == 0:
        return "none: fixed point"
    if fmt.has_zero and fmt.max_magnitude < 1 << fmt.mantissa_bits:
        return "none"
    return both(1, fmt.min_exponent)


def _ulp_at_one(fmt: FloatFormat) -> str:
    spacing = both(1, max(0, fmt.min_exponent) - fmt.mantissa_bits)
    if fmt.max_exponent < 0:
        return f"{spacing}; 1 is beyond the largest"
    return spacing if fmt.step_exponent <= 0 else f"{spacing}; 1 is below the smallest"


def _binades(fmt: FloatFormat) -> str:
    """ "2^-7 to 2^-1: 1, 2, ... 64" for the subnormal numbers, then a line for each run of equally full binades."""
    counts = fmt.values_per_binade()
    doubling = [e for e in counts if e < fmt.min_exponent or fmt.exponent_bits == 0]
    lines = []
    if doubling:
        shown = [str(counts[e]) for e in doubling]
        listed = ", ".join(shown if len(shown) < 4 else [*shown[:2], f"... {shown[-1]}"])
        lines.append(f"{_span(doubling)}: {listed}")
    normal = [(e, count) for e, count in counts.items() if e not in doubling]
    for count, run in groupby(normal, key=lambda item: item[1]):
        lines.append(f"{_span([e for e, _ in run])}: {count}")
    return "\n".join(lines)


def _span(exponents: Sequence[int]) -> str:
    first, last = exponents[0], exponents[-1]
    return f"2^{first}" if first == last else f"2^{first} to 2^{last}"


def facts(fmt: FloatFormat) -> dict[str, str]:
    """What the table of a format says, by row."""
    specials = {f"codes of {kind}": _ranges(codes, fmt.bits) for kind, codes in special_codes(fmt).items()}
    return {
        "bits": str(fmt.bits) + ("" if fmt.signed else ", no sign"),
        "exponent bits E": str(fmt.exponent_bits),
        "mantissa bits M": str(fmt.mantissa_bits),
        "bias": str(fmt.bias),
        "largest": both(*fmt.parts(fmt.max_magnitude)),
        "smallest normal": _smallest_normal(fmt),
        "smallest positive": both(*fmt.parts(fmt.min_magnitude)),
        "finite values": str(fmt.finite_count),
        **specials,
        "ulp at 1": _ulp_at_one(fmt),
        "values per binade": _binades(fmt),
        "stored as": fmt.dtype_name or "emulated",
    }


def factor_text(exponent: int) -> str:
    """2^exponent, as 4 or 1/4 where that is short."""
    if abs(exponent) > 10:
        return f"2^{exponent}"
    return str(1 << exponent) if exponent >= 0 else f"1/{1 << -exponent}"


def twins(pairs: Iterable[tuple[FloatFormat, FloatFormat]]) -> Iterator[str]:
    """A sentence for each pair of formats that is one grid up to a power of two."""
    for one, other in pairs:
        exponent = one.same_grid_factor(other)
        if exponent is None:
            continue
        larger, smaller = (one, other) if exponent >= 0 else (other, one)
        where = "code" if (one.inf, one.nan) == (other.inf, other.nan) else "finite value"
        yield (
            f"{larger.name} is {factor_text(abs(exponent))} x {smaller.name} on every {where}:"
            " under a free scale per tensor the two are one experiment."
        )


def _table(*headings: str) -> Table:
    return Table(*headings, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)


def show(console: Console, formats: Sequence[FloatFormat]) -> None:
    """The table of one format, or of several side by side, and which of them are one grid."""
    table = _table()
    table.add_column("", no_wrap=True)
    for fmt in formats:
        table.add_column(fmt.name.replace(":", ":\n"), overflow="fold")
    columns = [facts(fmt) for fmt in formats]
    for row in columns[0]:
        table.add_row(row, *(column[row] for column in columns))
    console.print(table)
    others = [fmt for fmt in registry().values() if fmt != formats[0]]
    pairs = combinations(formats, 2) if len(formats) > 1 else ((formats[0], other) for other in others)
    for sentence in twins(pairs):
        console.print(sentence)


def show_values(console: Console, formats: Sequence[FloatFormat]) -> None:
    """The value of every code: formats side by side, a single one in four columns of codes."""
    stacks = max(1, 4 // len(formats))
    rows = math.ceil(max(1 << fmt.bits for fmt in formats) / stacks)
    table = _table()
    for _ in range(stacks):
        table.add_column("code")
        for fmt in formats:
            table.add_column(fmt.name.replace(":", ":\n"), justify="right")
    for row in range(rows):
        cells = []
        for code in range(row, rows * stacks, rows):
            cells.append(f"0x{code:02x}")
            cells += [f"{fmt.value(code):.7g}" if code < 1 << fmt.bits else "" for fmt in formats]
        table.add_row(*cells)
    console.print(table)


def groups() -> dict[str, list[FloatFormat]]:
    """The registered formats, as the list shows them."""
    wide = [fmt for fmt in registry().values() if fmt.dtype_name and fmt.bits >= 16]
    p3109 = [fmt for fmt in registry().values() if fmt.name.startswith("binary8p")]
    placed = {*wide, *p3109, *family(7), *family(15)}
    return {
        "ml_dtypes": [fmt for fmt in registry().values() if fmt not in placed],
        "IEEE P3109": p3109,
        "E+M=7": list(family(7)),
        "E+M=15": list(family(15)),
        "16 and 32 bit": wide,
    }


def show_list(console: Console) -> None:
    """All registered formats, one line each."""
    headings = ("format", "bits", "E", "M", "bias", "largest", "smallest positive", "finite values", "stored as")
    table = _table(*headings, "same grid as")
    listed: list[FloatFormat] = []
    for title, formats in groups().items():
        table.add_section()
        table.add_row(Text(title, style="bold"))
        for fmt in formats:
            factors = ((fmt.same_grid_factor(other), other.name) for other in listed)
            twin = next((f"{factor_text(k)} x {name}" for k, name in factors if k is not None), "")
            listed.append(fmt)
            table.add_row(
                fmt.name,
                *(str(n) for n in (fmt.bits, fmt.exponent_bits, fmt.mantissa_bits, fmt.bias)),
                number(*fmt.parts(fmt.max_magnitude)),
                number(*fmt.parts(fmt.min_magnitude)),
                str(fmt.finite_count),
                fmt.dtype_name or "emulated",
                twin,
            )
    console.print(table)
    console.print(
        "E+M=7, E+M=15: sign and magnitude, every code finite. Same grid: under a free scale, one experiment."
    )


def error_knots(fmt: FloatFormat) -> list[tuple[float, float]]:
    """The worst relative error of nearest rounding, for all numbers from x up to the largest value, as a function of x.

    It is worst in the middle between two neighbours: (b - a) / (b + a). Where the spacing stays the same that is half a
    step over the number itself, from 100 % at half the smallest value down; from the smallest normal number on every
    binade begins alike. So on logarithmic axes it is a few straight lines.

    Returns:
      Their ends, as pairs of log2(x) and the error there.
    """
    last = fmt.max_magnitude - 1
    binade = 1 << fmt.mantissa_bits
    knots = []
    for lower in sorted({0, min(binade, last), last // binade * binade, last}):
        (k, e), (next_k, next_e) = fmt.parts(lower), fmt.parts(lower + 1)
        next_k <<= next_e - e
        knots.append((math.log2(k + next_k) + e - 1, (next_k - k) / (next_k + k)))
    return knots


def _window(formats: Sequence[FloatFormat]) -> tuple[int, int]:
    """Exponents between which is plotted: all ranges, or PLOT_BINADES around where most of them are."""
    lows, highs = [fmt.step_exponent for fmt in formats], [fmt.max_exponent + 1 for fmt in formats]
    low, high = min(lows) - 3, max(highs) + 2
    if high - low <= PLOT_BINADES:
        return low, high
    centres = sorted((a + b) // 2 for a, b in zip(lows, highs, strict=True))
    middle = centres[len(centres) // 2]
    return max(low, middle - PLOT_BINADES // 2), min(high, middle + PLOT_BINADES // 2)


def _draw_grid(axes: "Axes", fmt: FloatFormat, row: int, colour: str, binade_points: float) -> None:
    """The positive values of a format as ticks in its row; a band where ticks would touch."""
    low, high = axes.get_xlim()
    magnitude, ticks = fmt.min_magnitude, []
    for exponent, count in fmt.values_per_binade().items():
        if low <= exponent < high and count * 1.4 <= binade_points:
            pairs = (fmt.parts(m) for m in range(magnitude, magnitude + count))
            ticks += [math.log2(k) + e for k, e in pairs]
        elif low <= exponent < high:
            top = fmt.parts(magnitude + count - 1)
            end = math.log2(top[0]) + top[1] if exponent == fmt.max_exponent else exponent + 1
            axes.fill_between([exponent, end], row - 0.32, row + 0.32, color=colour, alpha=0.75, linewidth=0)
        magnitude += count
    axes.vlines(ticks, row - 0.32, row + 0.32, color=colour, linewidth=0.7)
    for end, inside, marker in ((low, fmt.step_exponent >= low, "<"), (high, fmt.max_exponent < high, ">")):
        if not inside:
            axes.plot([end], [row], marker=marker, color=colour, markeredgecolor="white", markersize=10, clip_on=False)


def _draw_error(axes: "Axes", fmt: FloatFormat, colour: str, width: float) -> None:
    """`error_knots`, with 100 % below them, and above what is lost by making numbers the largest."""
    low, high = axes.get_xlim()
    k, e = fmt.parts(fmt.max_magnitude)
    largest = math.log2(k) + e
    points = error_knots(fmt)
    if fmt.has_zero:
        points.insert(0, (min(low, points[0][0]), 1.0))
    beyond = [largest + i / 64 for i in range(64 * max(0, math.ceil(high - largest)) + 1)]
    points += [(x, max(points[-1][1], 1 - 2 ** (largest - x))) for x in beyond]
    axes.plot(*zip(*points, strict=True), color=colour, linewidth=width, label=fmt.name)


def plot(formats: Sequence[FloatFormat], file: Path) -> None:
    """Draws the grids, and the worst relative rounding error over the range, into a file.

    Raises:
      UsageError: the file cannot be written.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    low, high = _window(formats)
    rows = len(formats)
    grid_height, error_height = 0.8 + 0.36 * rows, 3.4
    figure = Figure(figsize=(11, grid_height + error_height), layout="constrained")
    grids, errors = figure.subplots(2, 1, sharex=True, height_ratios=(grid_height, error_height))
    grids.set_xlim(low, high)
    for row, (fmt, colour) in enumerate(zip(formats, COLOURS, strict=False)):
        _draw_grid(grids, fmt, row, colour, 72 * 8 / (high - low))
        # Ever thinner, so that lines on top of each other all show.
        _draw_error(errors, fmt, colour, 3.0 - 0.25 * row)
        ends = (fmt.parts(magnitude) for magnitude in (fmt.min_magnitude, fmt.max_magnitude))
        grids.text(
            1.02,
            row,
            " to ".join(number(k, e, digits=6) for k, e in ends),
            transform=grids.get_yaxis_transform(),
            va="center",
            fontsize=8,
        )
    grids.set_yticks(range(rows), [fmt.name for fmt in formats])
    grids.set_ylim(rows - 0.5, -0.5)
    grids.set_title("Positive values (bands where they are dense)", fontsize=10, loc="left")
    errors.set_title(
        "Worst relative error of rounding to nearest, of numbers from here up; beyond the largest value: saturating",
        fontsize=10,
        loc="left",
    )
    errors.set_yscale("log", base=2)
    errors.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:.3g} %"))
    errors.xaxis.set_major_locator(MaxNLocator(16, steps=[1, 2, 4, 8], integer=True))
    errors.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"$2^{{{x:.0f}}}$"))
    errors.set_xlabel("magnitude")
    errors.set_ylabel("relative error")
    errors.grid(alpha=0.3)
    errors.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8, frameon=False)
    try:
        figure.savefig(file, dpi=150)
    except OSError as e:
        raise UsageError(f"--plot={file} cannot be written: {e.strerror or e}") from None


def check(names: Sequence[str]) -> list[FloatFormat]:
    """The formats of the command line, each once, if the flags suit them. Raises UsageError."""
    formats = list(dict.fromkeys(named(name) for name in names))
    for flag, given in (("--plot", PLOT.value is not None), ("--values", VALUES.value)):
        if given and not formats:
            raise UsageError(f"{flag} needs the name of a format, e.g. e5m2")
    if len(formats) > SIDE_BY_SIDE:
        raise UsageError(f"{len(formats)} formats are too many to show side by side; give up to {SIDE_BY_SIDE}")
    if VALUES.value and (wide := [fmt for fmt in formats if fmt.bits > VALUE_BITS]):
        raise UsageError(f"--values lists formats of up to {VALUE_BITS} bits; {wide[0].name} has {wide[0].bits}")
    if PLOT.value is not None and Path(PLOT.value).suffix.lower() not in PLOT_SUFFIXES:
        raise UsageError(f"--plot={PLOT.value} must end in {', '.join(PLOT_SUFFIXES)}")
    return formats


def main(names: Sequence[str]) -> int:
    """Shows the formats with these names, or lists all."""
    cli.quiet_libraries()
    formats = check(names)
    console = make_console()
    if not formats:
        show_list(console)
        return 0
    if PLOT.value is not None:
        plot(formats, Path(PLOT.value).expanduser())
    show(console, formats)
    if VALUES.value:
        show_values(console, formats)
    if PLOT.value is not None:
        console.print(f"plot in {PLOT.value}")
    return 0


if __name__ == "__main__":
    cli.run_with_names(main)
