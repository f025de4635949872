"""`python -m altgrad_jax.formats`: its tables against values decoded elsewhere, its plot, a user's mistakes."""

import io
import itertools
import re
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import ml_dtypes
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from matplotlib.colors import to_rgb
from rich.console import Console

from altgrad_jax import formats as command
from altgrad_jax.errors import UsageError
from altgrad_jax.precision.formats import family, get_format, registry

ROOT = Path(__file__).resolve().parents[1]
FAMILY = [fmt.name for fmt in family(7)]


def shown(function, *args) -> str:
    """What a function prints, without the blanks at the ends of lines."""
    console = Console(file=io.StringIO(), width=140, highlight=False)
    function(console, *args)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines()).strip("\n")


def show(*names: str) -> str:
    return shown(command.show, [get_format(name) for name in names])


def execute(*arguments: str, folder: Path = ROOT) -> subprocess.CompletedProcess:
    program = [sys.executable, "-m", "altgrad_jax.formats", *arguments]
    return subprocess.run(program, capture_output=True, text=True, cwd=folder)


# Tables


@pytest.mark.parametrize(
    "name, expected",
    [
        (
            "e5m2",
            {
                "bits": "8",
                "exponent bits E": "5",
                "mantissa bits M": "2",
                "bias": "15",
                "largest": "7 x 2^13 (57344)",
                "smallest normal": "2^-14 (6.10352e-05)",
                "smallest positive": "2^-16 (1.52588e-05)",
                "finite values": "247",
                "codes of infinity": "0x7c, 0xfc",
                "codes of NaN": "0x7d-0x7f, 0xfd-0xff",
                "codes of -0": "0x80",
                "ulp at 1": "2^-2 (0.25)",
                "values per binade": "2^-16 to 2^-15: 1, 2\n2^-14 to 2^15: 4",
                "stored as": "float8_e5m2",
            },
        ),
        (
            "e15m0",
            {
                "bits": "16",
                "exponent bits E": "15",
                "mantissa bits M": "0",
                "bias": "16383",
                "largest": "2^16384",
                "smallest normal": "2^-16382",
                "smallest positive": "2^-16382",
                "finite values": "65535",
                "codes of infinity": "none",
                "codes of NaN": "none",
                "codes of -0": "0x8000",
                "ulp at 1": "1",
                "values per binade": "2^-16382 to 2^16384: 1",
                "stored as": "emulated",
            },
        ),
    ],
)
def test_facts_by_hand(name, expected):
    assert command.facts(get_format(name)) == expected


@pytest.mark.parametrize(
    "name, row, text",
    [
        ("e0m7", "largest", "127 x 2^-7 (0.992188)"),
        ("e0m7", "smallest normal", "none: fixed point"),
        ("e0m7", "ulp at 1", "2^-7 (0.0078125); 1 is beyond the largest"),
        ("e0m7", "values per binade", "2^-7 to 2^-1: 1, 2, ... 64"),
        ("e4m3fn", "values per binade", "2^-9 to 2^-7: 1, 2, 4\n2^-6 to 2^7: 8\n2^8: 7"),
        ("e4m3fn", "codes of NaN", "0x7f, 0xff"),
        ("binary8p3", "codes of NaN", "0x80"),
        ("binary8p3", "codes of -0", "none"),
        ("e8m0fnu", "bits", "8, no sign"),
        ("e8m0fnu", "smallest normal", "2^-127 (5.87747e-39)"),
        ("e2m1fn", "codes of -0", "0x8"),
        ("e1m1:inf=1,nan=1", "smallest normal", "none"),
        ("e3m4:bias=-10", "ulp at 1", "2^7 (128); 1 is below the smallest"),
        ("e12m3", "largest", "15 x 2^2045"),
        ("e12m3", "smallest positive", "2^-2049"),
        ("e11m4", "smallest positive", "2^-1026 (1.39067e-309)"),
        ("float32", "values per binade", "2^-149 to 2^-127: 1, 2, ... 4194304\n2^-126 to 2^127: 8388608"),
        ("float32", "codes of NaN", "0x7f800001-0x7fffffff, 0xff800001-0xffffffff"),
    ],
)
def test_one_fact_by_hand(name, row, text):
    assert command.facts(get_format(name))[row] == text


def test_special_codes_are_all_codes_that_are_no_numbers():
    kinds = {"infinity": np.isinf, "NaN": np.isnan, "-0": lambda v: (v == 0) & np.signbit(v)}
    for fmt in [fmt for fmt in registry().values() if fmt.bits <= 8] + [get_format("float16")]:
        for kind, ranges in command.special_codes(fmt).items():
            codes = sorted(itertools.chain(*(range(first, last + 1) for first, last in ranges)))
            assert codes == np.flatnonzero(kinds[kind](fmt.values())).tolist(), (fmt.name, kind)


def test_formats_stand_side_by_side():
    lines = show("e5m2", "e4m3fn", "e3m4:bias=1").splitlines()
    assert lines[0].split() == ["e3m4:"] and lines[1].split() == ["e5m2", "e4m3fn", "bias=1,inf=0,nan=0"]
    rows = dict(re.split(r"\s{2,}", line.strip(), maxsplit=1) for line in lines[3:] if re.match(r" \S", line))
    assert re.split(r"\s{2,}", rows["largest"]) == ["7 x 2^13 (57344)", "7 x 2^6 (448)", "31 x 2^2 (124)"]
    assert re.split(r"\s{2,}", rows["bias"]) == ["15", "7", "1"]


def test_list_has_every_format_once_in_its_group():
    text = shown(command.show_list)
    names = [line.split()[0] for line in text.splitlines()[2:-1] if re.match(r" \S+ +\d", line)]
    assert sorted(names) == sorted(registry())
    assert text.index("ml_dtypes") < text.index(" e2m1fn ") < text.index("IEEE P3109") < text.index("binary8p7")
    assert text.index("binary8p7") < text.index("E+M=7") < text.index(" e0m7 ") < text.index("E+M=15")
    assert text.index("E+M=15") < text.index(" e15m0 ") < text.index("16 and 32 bit") < text.index("float32  ")
    line = next(line for line in text.splitlines() if " e15m0 " in line)
    assert line.split() == ["e15m0", "16", "15", "0", "16383", "2^16384", "2^-16382", "65535", "emulated"]
    assert "inf " not in text and "nan " not in text


# Formats that are one grid


@pytest.mark.parametrize("names", [["e0m7"], ["e1m6"], ["e0m7", "e1m6"], ["e1m6", "e5m2", "e0m7"], FAMILY])
def test_twins_are_named(names):
    sentences = [line for line in show(*names).splitlines() if "one experiment" in line]
    assert sentences == ["e1m6 is 4 x e0m7 on every code: under a free scale per tensor the two are one experiment."]


@pytest.mark.parametrize("names", [["e5m2"], ["e5m2", "e4m3fn"], ["e0m7", "e2m5"], ["e4m3fn", "e4m3"]])
def test_others_are_not(names):
    assert "one experiment" not in show(*names)


def test_twins_with_other_special_codes():
    assert "e4m3fn is 2 x binary8p4 on every finite value:" in show("binary8p4")
    assert "e4m3fnuz is 8 x e4m3b11fnuz on every code:" in show("e4m3fnuz", "e4m3b11fnuz")
    assert "e4m3:inf=0,nan=0 is 2^93 x e4m3:bias=100,inf=0,nan=0 on every code:" in show("e4m3:bias=100")


def test_list_names_twins():
    lines = {line.split()[0]: line for line in shown(command.show_list).splitlines() if line.strip()}
    assert lines["e1m6"].endswith(" 4 x e0m7") and lines["e1m14"].endswith(" 4 x e0m15")
    assert lines["e4m3b11fnuz"].endswith(" 1/8 x e4m3fnuz")
    assert lines["e5m2"].endswith("float8_e5m2")


# Values


def table_of_codes(text: str) -> dict[int, list[str]]:
    """Code -> its cells; blanks are left out."""
    codes = {}
    for line in text.splitlines()[2:]:
        for code, cells in re.findall(r"0x([0-9a-f]{2})((?:\s+(?!0x)\S+)*)", line):
            codes[int(code, 16)] = cells.split()
    return codes


def test_values_of_every_code():
    codes = table_of_codes(shown(command.show_values, [get_format("e5m2")]))
    assert sorted(codes) == list(range(256))
    reference = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e5m2)
    for code, (cell,) in codes.items():
        assert cell == f"{float(reference[code]):.7g}"


def test_values_side_by_side():
    text = shown(command.show_values, [get_format(name) for name in ("e2m1fn", "e1m6", "e0m7")])
    codes = table_of_codes(text)
    assert codes[0x0F] == ["-6", "0.46875", "0.1171875"]
    assert codes[0x10] == ["0.5", "0.125"]  # e2m1fn has 16 codes
    for code in range(0x10, 0x100):
        e1m6, e0m7 = codes[code]
        assert float(e1m6) == 4 * float(e0m7)


# Plot


def worst_from_here_up(fmt) -> tuple[np.ndarray, np.ndarray]:
    """log2 of the middle between all neighbours, and the largest relative error from there on."""
    values = fmt.finite_values()
    values = values[values >= 0]
    below, above = values[:-1], values[1:]
    errors = (above - below) / (above + below)
    return np.log2((above + below) / 2), np.maximum.accumulate(errors[::-1])[::-1]


@pytest.mark.parametrize(
    "name", [*(fmt.name for fmt in registry().values() if fmt.bits <= 8), "float16", "e0m15", "e1m1:nan=1", "e1m0"]
)
def test_error_lines_go_through_every_middle(name):
    fmt = get_format(name)
    x, worst = worst_from_here_up(fmt)
    ends_x, ends_error = zip(*command.error_knots(fmt), strict=True)
    np.testing.assert_allclose(np.interp(x, ends_x, np.log2(ends_error)), np.log2(worst), atol=1e-9)
    assert (ends_x[0], ends_x[-1]) == pytest.approx((x[0], x[-1]))


def test_error_lines_beyond_float64():
    assert command.error_knots(get_format("e15m0")) == [
        (-16383, 1),
        (pytest.approx(np.log2(1.5) - 16382), 1 / 3),
        (pytest.approx(np.log2(1.5) + 16383), 1 / 3),
    ]


@pytest.mark.parametrize("names", [["e2m1fn"], ["e15m0", "float32", "e8m0fnu", "e4m3:bias=100", "e5m2"], FAMILY])
def test_plot_has_a_colour_for_every_format(names, tmp_path):
    file = tmp_path / "formats.png"
    command.plot([get_format(name) for name in names], file)
    image = matplotlib.image.imread(file)[..., :3]
    assert image.shape[1] > 1000 and image.shape[0] > 500
    for index, colour in enumerate(command.COLOURS):
        pixels = (np.abs(image - to_rgb(colour)) < 0.02).all(-1).sum()
        assert (pixels > 100) == (index < len(names) or colour == "#000000"), names[index : index + 1]


@pytest.mark.parametrize("name", ["missing/formats.png", "folder.png"])
def test_unwritable_file(name, tmp_path):
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(UsageError, match=re.escape(f"--plot={tmp_path / name} cannot be written: ")) as refused:
        command.plot([get_format("e2m1fn")], tmp_path / name)
    assert "directory" in str(refused.value) and "\n" not in str(refused.value)


# The command line


@pytest.mark.parametrize(
    "names, given, said",
    [
        (["e5m3fn"], {}, "unknown format 'e5m3fn': did you mean 'e4m3fn'?"),
        (["e5m2", "e9m9"], {}, "has 19 bits"),
        (["bf16"], {"values": True}, "--values lists formats of up to 8 bits; bfloat16 has 16"),
        ([], {"values": True}, "--values needs the name of a format"),
        ([], {"plot": "x.png"}, "--plot needs the name of a format"),
        (["e5m2"], {"plot": "x.jpeg"}, "--plot=x.jpeg must end in .png, .svg, .pdf"),
        ([*FAMILY, "e5m2"], {}, "9 formats are too many to show side by side; give up to 8"),
    ],
)
def test_mistakes(names, given, said):
    flags.FLAGS.mark_as_parsed()
    with flagsaver.flagsaver(**given), pytest.raises(UsageError) as refused:
        command.check(names)
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_a_format_given_twice_is_shown_once():
    flags.FLAGS.mark_as_parsed()
    assert [fmt.name for fmt in command.check(["e5m2", "float8_e5m2", "e5m2:inf=1,nan=1", "e4m3"])] == ["e5m2", "e4m3"]


def test_the_command_shows_and_plots(tmp_path):
    done = execute("e0m7", f"--plot={tmp_path / 'e0m7.svg'}", "e1m6", "--values")
    assert (done.returncode, done.stderr) == (0, "")
    assert "e1m6 is 4 x e0m7 on every code" in done.stdout and "0xff" in done.stdout
    assert done.stdout.rstrip().endswith(f"plot in {tmp_path / 'e0m7.svg'}")
    assert (tmp_path / "e0m7.svg").read_text().startswith("<?xml")


def test_a_mistake_is_one_line_and_status_2():
    done = execute("e5m2", "--plot=missing/x.png")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --plot=missing/x.png cannot be written: No such file or directory\n"


def test_documented_table_is_what_the_command_prints():
    text = (ROOT / "docs" / "formats.md").read_text()
    assert shown(command.show, list(family(7))).split("\ne1m6 is")[0].rstrip() in text
    assert f"python -m altgrad_jax.formats {' '.join(FAMILY)} " in text
