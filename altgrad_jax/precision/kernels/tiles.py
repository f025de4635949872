"""How the FP8 kernel cuts a product into tiles: by a rule of size, or as a table of measurements says.

The table is what `benchmarks/tune_kernel.py` writes on a card: for every product of a training step, of all tilings the
one that was the fastest. M, N, K are those of the padded operands, as the kernel sees them.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

COMPUTE_WARPGROUPS = 2
SHARED_BYTES = 227 * 1024  # that one block may use on compute capability 9.0
TYPES = ("e5m2", "e4m3fn")


@dataclass(frozen=True)
class Tiles:
    """How the product is cut up.

    Attributes:
      m: rows of a compute warpgroup's part of the tile, a multiple of 64; the tile has twice as many.
      n: columns of the tile, a multiple of 8, at most 256.
      k: length of a slice of the contraction, a multiple of 128.
      stages: slices in shared memory at a time.
    """

    m: int
    n: int
    k: int
    stages: int

    def label(self) -> str:
        """A name: "64x256x128x2"."""
        return f"{self.m}x{self.n}x{self.k}x{self.stages}"

    def shared_bytes(self) -> int:
        """Shared memory that a block needs: the slices, and the float32 result on its way out."""
        rows = COMPUTE_WARPGROUPS * self.m
        return self.stages * self.k * (rows + self.n) + 4 * rows * self.n

    def divide(self, m: int, n: int, k: int) -> bool:
        """Whether a product of this size is whole tiles."""
        return m % (COMPUTE_WARPGROUPS * self.m) == 0 and n % self.n == 0 and k % self.k == 0


# From large to small: a large tile reads its operands less often, a small one leaves no multiprocessor idle.
CANDIDATES: tuple[Tiles, ...] = (
    Tiles(64, 256, 128, 2),
    Tiles(64, 128, 128, 4),
    Tiles(64, 128, 128, 5),
    Tiles(64, 64, 128, 4),
    Tiles(64, 64, 128, 6),
)
MULTIPLE = 128  # operands are padded to this along every axis, so that one of the candidates fits
MULTIPROCESSORS = 132  # of an H100 or H200


def choose_tiles(m: int, n: int, k: int) -> Tiles:
    """The largest candidate that divides the product and still gives every multiprocessor a tile; else the smallest."""
    fitting = [tiles for tiles in CANDIDATES if tiles.divide(m, n, k)]
    if not fitting:
        raise ValueError(f"no tiles divide a product of {m} x {n} x {k}: every axis must be a multiple of {MULTIPLE}")
    for tiles in fitting:
        if (m // (COMPUTE_WARPGROUPS * tiles.m)) * (n // tiles.n) >= MULTIPROCESSORS:
            return tiles
    return min(fitting, key=lambda tiles: tiles.m * tiles.n)


class Product(NamedTuple):
    """A product that the kernel computes: the type of both operands, and the padded sizes."""

    type: str
    m: int
    n: int
    k: int

    def __str__(self) -> str:
        return f"{self.type} {self.m}x{self.n}x{self.k}"


@dataclass(frozen=True)
class TileTable:
    """Measured tilings; hashable, for it is part of what a compiled program was made from.

    Attributes:
      entries: product and its fastest tiles.
      source: the file; "" for the table that knows none.
      gpu: the card that they were measured on.
    """

    entries: tuple[tuple[Product, Tiles], ...] = ()
    source: str = ""
    gpu: str = ""

    def find(self, product: Product) -> Tiles | None:
        """What the table says of a product, or None."""
        return dict(self.entries).get(product)

    def tiles(self, product: Product) -> Tiles:
        """What the table says, or else the rule."""
        return self.find(product) or choose_tiles(product.m, product.n, product.k)


BY_SIZE = TileTable()


def load_tiles(file: str) -> TileTable:
    """Reads a table as `benchmarks/tune_kernel.py` writes it: `results.gpu`, and `results.products` with
    `type`, `m`, `n`, `k` and `tiles`, an object of `m`, `n`, `k` and `stages`.

    Raises:
      ValueError: in one line, what is wrong with the file.
    """
    try:
        content = json.loads(Path(file).read_text())
    except (OSError, ValueError, RecursionError) as e:
        raise ValueError(f"{file} cannot be read as JSON: {' '.join(str(e).split())}") from e
    results = content.get("results") if isinstance(content, dict) else None
    rows = results.get("products") if isinstance(results, dict) else None
    if not isinstance(results, dict) or not isinstance(rows, list) or not isinstance(results.get("gpu"), str):
        raise ValueError(f"{file} is no table of tiles: it has no results.gpu or results.products")
    found: dict[Product, Tiles] = {}
    for i, row in enumerate(rows, start=1):
        try:
            product, tiles = _entry(row)
        except (KeyError, TypeError, ValueError) as e:
            reason = f"{e.args[0]} is missing" if isinstance(e, KeyError) else str(e)
            raise ValueError(f"{file}, product {i}: {reason}") from None
        if found.setdefault(product, tiles) != tiles:
            raise ValueError(f"{file}, product {i}: {product} has two different tilings")
    return TileTable(tuple(found.items()), file, results["gpu"])


def _entry(row: Any) -> tuple[Product, Tiles]:
    """One row, checked."""
    if not isinstance(row, Mapping) or not isinstance(row["tiles"], Mapping):
        raise ValueError("it is no object with an object `tiles`")
    product = Product(row["type"], *(_count(row, name) for name in ("m", "n", "k")))
    tiles = Tiles(*(_count(row["tiles"], name) for name in ("m", "n", "k", "stages")))
    if product.type not in TYPES:
        raise ValueError(f"the type {product.type!r} is not one of {', '.join(TYPES)}")
    if tiles not in CANDIDATES:
        raise ValueError(f"{tiles} is none of the kernel's candidates; measure again")
    if any(size % MULTIPLE for size in product[1:]) or not tiles.divide(*product[1:]):
        raise ValueError(f"{tiles} do not divide {product}")
    return product, tiles


def _count(row: Mapping[str, Any], name: str) -> int:
    value = row[name]
    if type(value) is not int or value < 1:
        raise ValueError(f"{name} is {value!r}, which is no count")
    return value
