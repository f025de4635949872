"""A user's mistakes in formats, recipes, rules and loss scales: one line from the command itself, and nothing left."""

import shutil

from tests.runs import ROOT, Ended
from tests.test_cli_errors import assert_one_line

# What comes after --config=configs/, the exit status being 2, and what the line must say.
BY_NAME: dict[str, tuple[str, list[str]]] = {
    "unknown recipe": ("format.py:hybird,quick", ["unknown recipe or format 'hybird'", "did you mean 'hybrid'?"]),
    "unknown format": ("format.py:e5m2x,quick", ["unknown recipe or format 'e5m2x'", "did you mean 'e5m2"]),
    "format too wide": ("format.py:e9m9", ["has 19 bits with its sign; 2 to 16 are possible"]),
    "powers of two": ("format.py:e8m0fnu", ["e8m0fnu", "holds only powers of two"]),
    "impossible format": ("format.py:e3m4:nan=ieee,quick", ["e3m4:bias=3,inf=0,nan=ieee", "needs inf=1"]),
    "unknown option": ("format.py:e5m2 scalling=current,quick", ["'scalling'", "did you mean 'scaling'?"]),
    "unknown value": ("format.py:e5m2 scaling=delay", ["scaling='delay'", "none, static, current, delayed, mx"]),
    "no value": ("format.py:e5m2 scaling", ["'scaling' is not of the form option=value"]),
    "no such operand": ("format.py:e5m2 y.scaling=none", ["'y' is not one of the operands x, w, g"]),
    "word for a number": ("format.py:e5m2 history=long", ["history='long' is no int"]),
    "no history": ("format.py:e5m2 history=0", ["history=0 must lie between 1 and 65536 steps"]),
    "options of bf16": ("format.py:bf16 scaling=none", ["bf16 leaves a layer as it is and takes no options"]),
    "no format": ("format.py", ["name a format or a recipe after the colon: --config=configs/format.py:e3m4"]),
    "quick alone": ("format.py:quick", ["name a format or a recipe after the colon"]),
    "unknown variant": ("e5m2.py:quik", ["unknown variant 'quik'", "'quick'"]),
}
# What is typed after a command line that would work.
BY_FLAG: dict[str, tuple[list[str], list[str]]] = {
    "rule of nothing": (
        ["--config.precision.rules=(('blokcs.*', 'e5m2'),)"],
        ["rule 1 ('blokcs.*', 'e5m2') matches no layer; the layers are blocks.0-0.attn.qkv, ", "lm_head, wte, wpe"],
    ),
    "rule too late": (
        ["--config.precision.rules=(('.*', 'e5m2'), ('lm_head', 'e4m3'))"],
        ["rule 2 ('lm_head', 'e4m3') matches only layers that earlier rules have decided"],
    ),
    "half a pair": (["--config.precision.rules=(('lm_head',),)"], ["('lm_head',) is not a pair (pattern, recipe)"]),
    "bare pair": (["--config.precision.rules=('lm_head', 'e5m2')"], ["'lm_head' is not a pair (pattern, recipe)"]),
    "bad pattern": (["--config.precision.rules=(('lm_head(', 'e5m2'),)"], ["the pattern is no regular expression"]),
    "word for a scale": (["--config.train.loss_scale=abc"], ["config.train.loss_scale='abc'", "'dynamic'"]),
    "scale of zero": (["--config.train.loss_scale=0"], ["config.train.loss_scale='0' is neither a number above 0"]),
    "endless scale": (["--config.train.loss_scale=inf"], ["config.train.loss_scale='inf'"]),
    "strict": (
        ["--config.precision.rules=(('lm_head', 'hybrid'),)", "--config.precision.strict=True"],
        ["precision.strict: 1 layers", "no FP8 matrix units on this machine; use precision.strict=False"],
    ),
    "native": (
        ["--config.precision.rules=(('lm_head', 'mxfp8'),)", "--config.precision.backend=native"],
        ["precision.backend=native: lm_head cannot run as 'mxfp8'", "use auto or emulated"],
    ),
    "tiles of nothing": (
        ["--config.precision.kernel_tiles=tiles.json"],
        ["config.precision.kernel_tiles is read only with config.precision.kernel=pallas, not 'xla'"],
    ),
    "no tiles": (
        ["--config.precision.kernel=pallas", "--config.precision.kernel_tiles=none.json"],
        ["config.precision.kernel_tiles: none.json cannot be read as JSON: ", "No such file"],
    ),
    "unknown backend": (["--config.precision.backend=nativ"], ["precision.backend='nativ'", "auto, native, emulated"]),
    "every -1 steps": (["--config.diagnostics.shadow_every=-1"], ["config.diagnostics.shadow_every=-1", "0 or more"]),
    "several at once": (
        ["--config.precision.rules=(('lm_head', 'e5m3x'),)", "--config.train.loss_scale=-2"],
        ["unknown recipe or format 'e5m3x'", "config.train.loss_scale='-2'"],
    ),
}


OWN_CONFIG = """
from altgrad_jax.config import load_sibling
def get_config(variant=""):
    config = load_sibling(__file__, "base").get_config("quick")
    config.precision.rules = ((r"blocks[.]\\d[.]atn[.].*", "e5m2"), (r".*", "e4m3"))
    return config
"""


def test_every_mistake_is_one_line_and_leaves_nothing(lab, tmp_path):
    corpus = [f"--config.data.path={lab.corpus}", "--config.data.name=files", "--config.data.tokenizer=bytes"]
    (tmp_path / "runs").mkdir()
    names, cases = [*BY_NAME, *BY_FLAG, "a config file of one's own"], []
    for config, _ in BY_NAME.values():
        cases.append([f"--config=configs/{config}", f"--workdir={tmp_path / 'runs' / f'{len(cases)}'}", *corpus])
    for more, _ in BY_FLAG.values():
        cases.append([*lab.arguments(tmp_path / "runs" / f"{len(cases)}"), *more])
    shutil.copy(ROOT / "configs" / "base.py", tmp_path)
    (tmp_path / "own.py").write_text(OWN_CONFIG)
    cases.append([f"--config={tmp_path / 'own.py'}", f"--workdir={tmp_path / 'runs' / 'own'}", *corpus])
    says = [text for _, text in (*BY_NAME.values(), *BY_FLAG.values())]
    says.append([r"rule 1 ('blocks[.]\\d[.]atn[.].*', 'e5m2') matches no layer; the layers are blocks.0-3.attn.qkv, "])
    for name, expected, done in zip(names, says, lab.run_forks(cases), strict=True):
        try:
            assert_one_line(done, 2, expected)
            assert not done.out and "Traceback" not in done.err
        except AssertionError as e:
            raise AssertionError(f"{name}: {e}") from None
    assert not list((tmp_path / "runs").iterdir()), "a work directory is made when there is something to put into it"


def test_the_command_itself(lab, tmp_path):
    """Once in a process of its own rather than a fork."""
    process = lab.start(tmp_path / "run", {"train.loss_scale": "abc"})
    out, err = process.communicate(timeout=120)
    assert_one_line(Ended(process.returncode, out, err), 2, ["config.train.loss_scale='abc'"])
    assert not out and not (tmp_path / "run").exists()
