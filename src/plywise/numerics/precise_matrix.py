"""Keep a matrix to more digits than its dtype has, as the sum of two matrices.

Products take the first one alone. The second one holds what rounding has taken from it, so that a recursion
over many steps does not add its errors up. The sums are made in the dtype of the vectors that are given: in
float64, a few rows at a time, since a whole matrix would leave the cache; in the dtype of the matrix, where
that is enough, without the second one.

Shapes: ``g`` groups, ``k`` rows and columns.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK = 2**15
"""Numbers of a matrix that are held in float64 at a time."""


def multiply_precisely(matrix: Tensor, rest: Tensor, vector: Tensor) -> Tensor:
    """Compute ``(matrix + rest) vector`` for each group.

    Args:
        matrix: the matrices (g, k, k).
        rest: what they lack, (g, k, k).
        vector: vectors (g, k).
    """
    if vector.dtype == matrix.dtype:
        return (matrix @ vector.unsqueeze(2)).squeeze(2)
    product = torch.empty_like(vector)
    for rows in _list_blocks(matrix):
        wide = matrix[:, rows].to(vector).add_(rest[:, rows])
        product[:, rows] = (wide @ vector.unsqueeze(2)).squeeze(2)
    return product


def subtract_outer_product(
    matrix: Tensor, rest: Tensor, factor: Tensor, vector: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute ``factor (matrix + rest) - vector vectorᵀ`` for each group.

    Args:
        matrix: the matrices (g, k, k).
        rest: what they lack, (g, k, k).
        factor: numbers (g,), in the dtype of the vectors.
        vector: vectors (g, k).

    Returns:
        The matrices, and what these lack.
    """
    if vector.dtype == matrix.dtype:
        product = (matrix * factor[:, None, None]).baddbmm_(
            vector.unsqueeze(2), vector.unsqueeze(1), alpha=-1
        )
        return product, torch.zeros_like(product)
    result, lacking = matrix.new_empty(matrix.shape), matrix.new_empty(matrix.shape)
    for rows in _list_blocks(matrix):
        wide = matrix[:, rows].to(vector).add_(rest[:, rows]).mul_(factor[:, None, None])
        wide.addcmul_(vector[:, rows].unsqueeze(2), vector.unsqueeze(1), value=-1)
        result[:, rows] = wide
        lacking[:, rows] = wide.sub_(result[:, rows])
    return result, lacking


def _list_blocks(matrix: Tensor) -> Iterator[slice]:
    """List blocks of rows of about `BLOCK` numbers; on a GPU all rows are one block."""
    groups, size, _ = matrix.shape
    rows = max(1, BLOCK // (groups * size)) if matrix.device.type == "cpu" else size
    for start in range(0, size, rows):
        yield slice(start, min(start + rows, size))
