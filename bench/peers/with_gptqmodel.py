"""GPTQModel: its GPTQ of one layer, as Optimum calls it, and a whole model by itself. Knows nothing of clocks."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from gptqmodel import GPTQModel, QuantizeConfig
from gptqmodel.quantization.gptq import GPTQ
from packing import Quantized, as_stored, bits_of_weight, restore, stored
from torch import Tensor, nn

__all__ = ["quantize", "quantize_model", "restore", "stored"]

ROWS = 4096  # that H is said to be of
RIDGE = 1e-6


def config(bits: int, group_size: int, *, symmetric: bool = True) -> QuantizeConfig:
    return QuantizeConfig(bits=bits, group_size=group_size, sym=symmetric)


def quantize(weight: Tensor, bits: int, group_size: int, products: Tensor, *, symmetric: bool = True) -> Quantized:
    """Its column loop, shown rows whose mean x x^T is `products`."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data = weight.clone()
    run = GPTQ(layer, config(bits, group_size, symmetric=symmetric))
    run.quantizer.configure(perchannel=True)
    run.add_batch(rows_of(products)[None], None)
    restored, scale, *_ = run.quantize()
    return Quantized(restored, as_stored(weight, bits, scale.numel()))


def rows_of(products: Tensor) -> Tensor:
    """Rows x with mean x x^T = `products`: its Cholesky factor, with as little on the diagonal as it takes."""
    ridge = RIDGE * float(products.diagonal().mean())
    while True:
        factor, failed = torch.linalg.cholesky_ex(products.double() + ridge * torch.eye(len(products)).double())
        if not failed:
            return factor.T.float().contiguous() * ROWS**0.5
        ridge *= 10


def quantize_model(
    described: Mapping[str, Any], names: Iterable[str], bits: int, group_size: int
) -> tuple[dict[str, Tensor], float]:
    """A folder of transformers, on the same calls; and the bits of a weight."""
    model = GPTQModel.load(described["folder"], config(bits, group_size), device="cpu")
    model.quantize([{"input_ids": row, "attention_mask": [1] * len(row)} for row in described["calls"]])
    own = dict(model.model.named_parameters())
    return {place: own[place] for place in names}, bits_of_weight(bits, group_size)
