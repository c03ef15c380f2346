"""Which tile a product is cut into: the shapes of kernels/cuda/layout.h, and a choice among them.

The choice models a wave of tiles as rows of the tile times a price per row. The prices are estimates from L2 traffic
(a 256x128 tile reads 48 KB for 2x the products of a 128x128 tile's 32 KB) and not yet measured on a GPU.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

COLUMNS = 128
"""Columns of every tile: one 128x128 scale block."""


@dataclass(frozen=True)
class Tile:
    """A tile of the output.

    Attributes:
        rows: of the tile.
        pair: blocks that share the rows of A they load, on neighbouring tiles along N: 1 or 2.
        stages: steps of 128 columns that can be in flight.
        price: of one row of the tile, relative.
    """

    rows: int
    pair: int
    stages: int
    price: float

    def shared(self, column_scales: bool) -> int:
        """Bytes of shared memory of a block."""
        step = (self.rows + COLUMNS) * 128 + self.rows * 4 + (COLUMNS * 4 if column_scales else 0)
        return self.stages * (step + 2 * 8)


TILES = {
    "large": Tile(256, 1, 4, 1.05),
    "large_pair": Tile(256, 2, 4, 1.0),
    "medium": Tile(128, 1, 6, 1.2),
    "medium_pair": Tile(128, 2, 6, 1.05),
    "small": Tile(64, 1, 8, 1.3),
}


def up(n: int, unit: int) -> int:
    return -(-n // unit)


@functools.lru_cache(maxsize=4096)
def choose(rows: tuple[int, ...], columns: int, multiprocessors: int, names: tuple[str, ...] = tuple(TILES)) -> str:
    """The tile with the cheapest waves.

    Args:
        rows: rows of each product (of each group, as far as the host knows).
        columns: columns of the output.
        multiprocessors: blocks at work at one time.
        names: the tiles to choose from.
    """

    def cost(name: str) -> float:
        tile = TILES[name]
        units = sum(up(m, tile.rows) for m in rows) * up(columns, COLUMNS * tile.pair)
        return up(units, max(1, multiprocessors // tile.pair)) * tile.rows * tile.price

    return min(names, key=cost)


def grid(name: str, row_tiles: int, columns: int, multiprocessors: int) -> int:
    """Blocks to launch for `row_tiles` rows of tiles: as many as there is work for, at most one a multiprocessor."""
    tile = TILES[name]
    units = min(row_tiles * up(columns, COLUMNS * tile.pair), multiprocessors // tile.pair)
    return max(1, units) * tile.pair
