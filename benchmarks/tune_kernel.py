"""The fastest tiles of the FP8 kernel for every product of a training step, as a table that training reads.

    python benchmarks/tune_kernel.py --config=configs/e5m2.py --out=tiles.json
    python -m altgrad_jax.main --config=configs/e5m2.py --config.precision.kernel=pallas \\
        --config.precision.kernel_tiles=tiles.json

The step is compiled with `precision.kernel=pallas` for the card that is here, and its program says which products the
kernel multiplies, and of which sizes. Each is then timed in all tilings that divide it (`gemm.tuned`), and the fastest
is written: of a model, batch and loss chunk, for a kind of card. Other sizes are cut by the kernel's rule, and the
header of a run says which are. Elsewhere than on compute capability 9.0, a CPU among them, the table is empty.
"""

from typing import Any

from absl import flags
from common import save_results, skipped
from gemm import tuned
from gemm_kinds import E4M3, E5M2, Shape, kernel_name, kernel_products

from altgrad_jax import cli
from altgrad_jax.config import validate
from altgrad_jax.errors import UserError
from altgrad_jax.machine import check_device
from altgrad_jax.precision.audit import audit
from altgrad_jax.precision.kernels.tiles import Product, Tiles, choose_tiles
from altgrad_jax.precision.kernels.tiles_used import kernel_products as products_of
from altgrad_jax.precision.target import has_wgmma, target_device
from altgrad_jax.program import build_program

CONFIG = cli.define_config()
OUT = flags.DEFINE_string("out", "tiles.json", "The table to write.")
DTYPES = {"e5m2": E5M2, "e4m3fn": E4M3}
Row = dict[str, Any]


def main() -> int:
    """Compiles the step, times its products, writes the table."""
    config = cli.read_config(CONFIG)
    check_device()
    results: dict[str, Any] = {"gpu": target_device().device_kind, "products": []}
    if not has_wgmma():
        results |= skipped("the kernel's wgmma instructions exist on compute capability 9.0 (H100, H200) alone")
        print(results["skipped"])
    else:
        with config.unlocked():
            config.precision.kernel, config.precision.kernel_tiles = "pallas", None
        validate(config)
        program = build_program(config)
        text = program.compile_train().as_text() or ""
        found = audit(text, program.policy, config.precision.compute, config.train.steps_per_dispatch)
        products = products_of(found)
        if not products:
            raise UserError("the kernel multiplies nothing in this step: no product has two operands of one FP8 type")
        for product in products:
            results["products"].append(row := measured(product))
            print(f"{product}: {row['milliseconds']} ms, {row['speed_over_rule']} times the speed of the rule's tiles")
            save_results(OUT.value, results)
    save_results(OUT.value, results)
    return 0


def measured(product: Product) -> Row:
    """A product's row: the fastest tiles, the times of all, and how much faster than those of the rule they are."""
    shape = Shape(product.m, product.n, product.k)
    [candidates] = [kinds for kinds in kernel_products(shape) if kinds[0].name == kernel_name(DTYPES[product.type])]
    _, entry = tuned(candidates, shape, None)
    return row_of(product, entry)


def row_of(product: Product, entry: dict[str, Any]) -> Row:
    """The same from the entry of `gemm.tuned`."""
    times = {label: row["milliseconds"] for label, row in entry["tiles"].items() if "milliseconds" in row}
    by_rule = times.get(choose_tiles(*product[1:]).label())  # None if that one does not run
    best = Tiles(*map(int, entry["best_tiles"].split("x")))
    return product._asdict() | {
        "tiles": vars(best),
        "milliseconds": times[entry["best_tiles"]],
        "speed_over_rule": by_rule and round(by_rule / times[entry["best_tiles"]], 4),
        "all": times,
    }


if __name__ == "__main__":
    cli.run(main)
