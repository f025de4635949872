"""Where the tiles of the FP8 kernel's products came from, in the program that runs: measured, or by size."""

from dataclasses import dataclass
from typing import Any

from altgrad_jax.precision.audit import Audit
from altgrad_jax.precision.kernels.tiles import Product, Tiles, TileTable


@dataclass(frozen=True)
class TilesUsed:
    """The different products that the kernel computes in a step.

    Attributes:
      table: what they were looked up in.
      measured: those that it has, and how they are cut.
      by_size: those that it does not have.
    """

    table: TileTable
    measured: dict[Product, Tiles]
    by_size: dict[Product, Tiles]

    def line(self) -> str:
        """For the header; "" where there is neither a table nor a product."""
        table, total = self.table, len(self.measured) + len(self.by_size)
        if not total and not table.source:
            return ""
        if not total:
            return f"kernel tiles: {table.source} is not used, the kernel multiplies nothing here"
        if not table.source:
            return f"kernel tiles: all {total} by size, none measured (benchmarks/tune_kernel.py does)"
        rest = f"; by size, for it does not have them: {', '.join(map(str, self.by_size))}" if self.by_size else ""
        return f"kernel tiles: {len(self.measured)} of {total} from {table.source}, measured on {table.gpu}{rest}"

    def as_json(self) -> dict[str, Any]:
        """For the manifest."""

        def rows(found: dict[Product, Tiles]) -> dict[str, str]:
            return {str(product): tiles.label() for product, tiles in found.items()}

        table = {"file": self.table.source, "gpu": self.table.gpu} if self.table.source else None
        return {"table": table, "measured": rows(self.measured), "by_size": rows(self.by_size)}


def kernel_products(found: Audit) -> list[Product]:
    """The different products of a step that are left to the kernel, in the step's order."""
    gemms = [gemm for finding in found.findings for gemm in finding.gemms if gemm.engine == "Pallas"]
    return list(dict.fromkeys(Product(gemm.met[0], *gemm.shape[1:]) for gemm in gemms))


def tiles_used(found: Audit, table: TileTable) -> TilesUsed:
    """How a step's products are cut.

    Args:
      found: what the compiled step multiplies.
      table: the one that it was compiled with.
    """
    products = kernel_products(found)
    known = {product for product in products if table.find(product)}
    return TilesUsed(
        table,
        {product: table.tiles(product) for product in products if product in known},
        {product: table.tiles(product) for product in products if product not in known},
    )
