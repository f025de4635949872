"""Which module may know of which, read from the source; and what training from a token cache does not load."""

import ast
import itertools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from altgrad_jax.data.cache_build import build_cache
from tests.data.tiny_source import TinySource

PACKAGE = Path(__file__).resolve().parents[1] / "altgrad_jax"

# From the bottom up: a module or package imports only what is in lines above its own (or itself). A new module is put
# into the lowest line that serves it.
LAYERS = (
    (
        "__init__",
        "errors",
        "interrupt",
        "meter",
        "ranking",
        "relay",
        "scripts",
        "streams",
        "config_keys",
        "differences",
    ),
    ("allocator",),
    ("precision", "recomputation", "files", "multilabel", "text_rules", "versions"),
    ("loss_scale",),
    ("model", "losses", "optimizers", "stability", "machine", "profiling", "records"),
    ("layers",),
    ("weights", "flops", "objectives"),
    ("state",),
    ("diagnostics",),
    ("step", "data", "tracking", "config", "console", "integrity", "workdir"),
    ("task", "diagnose", "parallel", "checkpoint_files", "provenance", "usage"),
    ("program", "evaluation", "cli", "checkpoint", "hosts", "kin"),
    ("formats",),
    ("experiment",),
    ("run_record",),
    ("start",),
    ("loop",),
    ("train", "describe", "sample", "audit", "report", "data.__main__"),
    ("main", "sweep"),
)
LEVEL = {unit: level for level, units in enumerate(LAYERS) for unit in units}

HEAVY = ("tensorflow", "tensorflow_datasets", "tokenizers", "tiktoken", "wandb", "torch", "sklearn")
# Imported by a function of eurlex.py, when a corpus is prepared.
BUILDS_DATASETS = PACKAGE / "data" / "eurlex_builder.py"


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def unit_of(file: Path) -> str:
    """ "model" for model.py, "data" for all of data/ but its command line."""
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return "data.__main__" if parts == ("data", "__main__") else parts[0]


def imported(tree: ast.AST) -> Iterator[str]:
    """Dotted names of the modules and members imported anywhere below a node, functions included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import on line {node.lineno}"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_units(file: Path) -> set[str]:
    """The units of this package that a file imports."""
    units = set()
    for name in imported(ast.parse(file.read_text())):
        top, _, rest = name.partition(".")
        if top != "altgrad_jax":
            continue
        first = rest.split(".")[0]
        units.add(first if (PACKAGE / first).is_dir() or (PACKAGE / f"{first}.py").is_file() else "__init__")
    return units


@pytest.mark.parametrize("file", sources(), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_point_one_way(file):
    unit = unit_of(file)
    assert unit in LEVEL, f"put {unit} into LAYERS"
    for other in own_units(file) - {unit}:
        assert LEVEL[other] < LEVEL[unit], f"{unit} imports {other}, which is not below it"


def test_the_designed_direction_is_in_the_layers():
    chain = (("main",), ("train",), ("step", "data", "checkpoint", "tracking"), ("model", "optimizers"), ("precision",))
    for above, below in itertools.pairwise(chain):
        assert min(LEVEL[unit] for unit in above) > max(LEVEL[unit] for unit in below)
    assert own_units(PACKAGE / "main.py") >= {"train"}
    assert own_units(PACKAGE / "train.py") >= {"checkpoint", "tracking", "data"}


@pytest.mark.parametrize("package", ["precision", "data"])
def test_packages_that_stand_alone(package):
    """precision is jax and numpy alone; data knows nothing of models and training."""
    for file in (PACKAGE / package).rglob("*.py"):
        if file.name == "__main__.py":
            continue
        names = set(imported(ast.parse(file.read_text())))
        tops = {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names)
        own = own_units(file)
        if package == "precision":
            assert tops <= {"jax", "numpy", "altgrad_jax"} and own <= {"precision"}, file
        else:
            assert not tops & {"jax", "flax", "optax", "orbax"} and own <= {"data", "errors", "files", "__init__"}, file


def at_import(node: ast.AST) -> Iterator[ast.stmt]:
    """The statements run when a module is imported: outside functions and `if TYPE_CHECKING`."""
    for child in ast.iter_child_nodes(node):
        typing_only = isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or typing_only:
            continue
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        yield from at_import(child)


def test_heavy_libraries_are_imported_where_they_are_used():
    for file in sources():
        names = {name for node in at_import(ast.parse(file.read_text())) for name in imported(node)}
        tops = {name.partition(".")[0] for name in names}
        allowed = {"tensorflow_datasets"} if file == BUILDS_DATASETS else set()
        assert not tops & set(HEAVY) - allowed, file
        assert "altgrad_jax.data.eurlex_builder" not in {name.rpartition(".")[0] for name in names}, file


def test_training_from_a_cache_needs_none_of_them(tmp_path):
    cache = build_cache(TinySource(), "bytes", 257, tmp_path, progress=False)
    program = f"""
import sys
class Refuse:
    asked = []
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {HEAVY!r}:
            self.asked.append(name)
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Refuse())
import altgrad_jax.main
from altgrad_jax.data.batches import TrainBatches
from altgrad_jax.data.cache import open_cache
batch = next(TrainBatches(open_cache({str(cache.path)!r}), 4, 2, seed=0).from_step(0))
print(batch.shape, Refuse.asked)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert run.stdout == "(2, 5) []\n", run.stderr
