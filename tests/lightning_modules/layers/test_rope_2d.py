"""Rotary positions in a grid: what a query and a key see of each other is how far apart they are, both ways."""

import torch

from lightning_modules.layers.rope import rope_tables, rotate
from lightning_modules.layers.rope_2d import rope_tables_2d

CPU = torch.device("cpu")


def scores(rows: int, columns: int, before: int = 0) -> torch.Tensor:
    """The products of one query and one key, wherever they stand, [positions, positions]."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 8)
    rope = rope_tables_2d(rows, columns, 8, 100.0, before, CPU)
    length = before + rows * columns
    return (rotate(q.expand(-1, -1, length, -1), rope) @ rotate(k.expand(-1, -1, length, -1), rope).mT)[0, 0]


def test_products_depend_on_the_distance_in_rows_and_in_columns_alone() -> None:
    products = scores(3, 4).view(3, 4, 3, 4)
    torch.testing.assert_close(products[1:, 1:, 1:, 1:], products[:-1, :-1, :-1, :-1])
    assert len({round(float(products[0, 0, i, j]), 4) for i in range(3) for j in range(4)}) == 12


def test_half_of_the_pairs_turn_as_text_by_the_row_and_half_by_the_column() -> None:
    (cos, sin), (text_cos, text_sin) = rope_tables_2d(3, 4, 8, 100.0, 0, CPU), rope_tables(4, 4, 100.0, CPU)
    for table, of_text in ((cos, text_cos), (sin, text_sin)):
        grid = table.view(3, 4, 8)
        for row in range(3):
            for column in range(4):
                expected = torch.cat((of_text[row, :2], of_text[column, :2])).repeat(2)
                torch.testing.assert_close(grid[row, column], expected)


def test_what_stands_before_the_grid_is_not_turned() -> None:
    (cos, sin), (of_patches, _) = rope_tables_2d(2, 2, 8, 100.0, 1, CPU), rope_tables_2d(2, 2, 8, 100.0, 0, CPU)
    assert torch.equal(cos[0], torch.ones(8))
    assert torch.equal(sin[0], torch.zeros(8))
    assert torch.equal(cos[1:], of_patches)
