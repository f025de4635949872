"""`main --describe`, and what a header is like on a narrow terminal."""

from rich.console import Console

from altgrad_jax.console import print_header, print_lines
from altgrad_jax.layers import layer_shapes
from altgrad_jax.model import GPTConfig
from altgrad_jax.precision.policy import resolve
from tests.test_cli_errors import assert_one_line

GPT = GPTConfig(n_layer=3, n_head=2, n_embd=64, block_size=32, vocab_size=512)


def test_a_description_has_header_layers_and_memory_and_leaves_nothing(lab, tmp_path):
    lab.prepare()
    here = {"precision.rules": (("lm_head", "mxfp8"),), "train.steps": 3}
    elsewhere = {"parallel.hosts": 2, "parallel.coordinator": "localhost:1"}
    cases = [[*lab.arguments(tmp_path / "new", changes), "--describe"] for changes in (here, elsewhere)]
    done, several = lab.run_forks(cases)
    assert done.code == 0 and not done.err, done
    for part in (
        f"{tmp_path}/new",
        "still in its warm-up when the run ends: 3 of 5 steps",
        "lm_head 32x257: ",
        "memory of a device: state 0.26 MB (parameters 0.0865 MB, optimizer 0.173 MB)",
        "MB of temporary arrays",
        "0 to 3, 8 windows each, from new weights from seed 42",
    ):
        assert part in done.out, (part, done.out)
    assert_one_line(several, 2, ["--describe is of one process"])
    assert not (tmp_path / "new").exists()


def lines_of(width: int, show) -> list[str]:
    console = Console(width=width, force_terminal=False, highlight=False)
    with console.capture() as caught:
        show(console)
    return caught.get().splitlines()


def test_words_stay_whole_at_80_columns():
    policy = resolve(((r".*attn.*", "e4m3"), (r".*mlp.*|lm_head", "hybrid")), layer_shapes(GPT))
    lines = lines_of(80, lambda console: print_lines(console, policy.lines()))
    assert max(map(len, lines)) <= 80
    assert " ".join(" ".join(lines).split()) == " ".join(policy.lines())
    path = "/a/folder/whose/name/is/longer/than/any/line/of/this/terminal/" + "x" * 60
    lines = lines_of(80, lambda console: print_header(console, "title", {"one": "word " * 30, "folder": path}))
    assert lines[-1] == f"        {path}" or lines[-1] == f"folder  {path}"
    assert all(set(line.split()) <= {"one", "word"} for line in lines[1:-2])


def test_layers_that_run_alike_share_a_line():
    policy = resolve(((r"blocks\.[01]\..*|lm_head", "e5m2"), (r"blocks\..*", "hybrid")), layer_shapes(GPT))
    e5m2, hybrid, rest = policy.lines()
    assert (
        e5m2.count("blocks.*.mlp.up 64x256") == 1 and "lm_head 64x512 [9 layers]: activation, weight, gradient" in e5m2
    )
    assert "[4 layers]: activation, weight e4m3fn delayed(16) | gradient e5m2 delayed(16), emulated (no FP8" in hybrid
    assert rest == "wte 512x64, wpe 32x64 [2 layers]: bf16, 16-bit"
