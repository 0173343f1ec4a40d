"""The weight that a layer should have when its inputs are no longer those that it was made for.

Knows nothing of models, or of where inputs come from.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from arrow_quant_v2.engines.one_core import each_on_one_core, tiles
from arrow_quant_v2.quantizers.gptq_factor import factorize, suitable_damping

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

ROWS = 256  # of a weight that one core works on


def corrected(weights: Sequence[Tensor], hessian: Tensor, drift: Tensor, count: int, strength: float) -> list[Tensor]:
    """W + strength W D (H + damping)^-1 of each W (rows, columns) float32: QEP (Arai and Ichikawa, 2025, 2504.09629).

    At strength 1 and without damping it makes ||W x' - W* x||^2 least, inputs x of the quantized model and x' of the
    original one; H is the sum of x x^T, D that of (x' - x) x^T, `count` how many x there are. Less than all of it is
    corrected because D is seen in few samples (QEP takes a half too; GPTAQ, arXiv 2504.02692, a quarter).

    Raises:
        QuantizationError: H has no Cholesky factor.
    """
    factor = factorize(hessian, None, suitable_damping(len(hessian), count))
    curvature = hessian.diagonal().to(torch.float64)
    scale = strength * int((curvature > 0.0).sum()) / float(curvature.sum())  # the factor's H has a diagonal of mean 1
    columns = drift.index_select(1, factor.order)
    back = factor.order.argsort()
    root = factor.root

    def moved(rows: Tensor) -> Tensor:
        """X of X R R^T = W D."""
        half = torch.linalg.solve_triangular(root.mT, (rows @ columns) * scale, upper=False, left=False)
        whole: Tensor = torch.linalg.solve_triangular(root, half, upper=True, left=False)
        return rows + whole.index_select(1, back)

    pieces = [(weight, rows) for weight in weights for rows in tiles(len(weight), ROWS)]
    found = iter(each_on_one_core(lambda piece: moved(piece[0][piece[1]]), pieces))
    return [torch.cat([next(found) for _ in tiles(len(weight), ROWS)]) for weight in weights]
