"""One tensor in memory, quantized and back; knows nothing of models or files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np
import torch

from arrow_quant_v2.errors import QuantizationError
from arrow_quant_v2.kernels.ops import FLOATS
from arrow_quant_v2.kernels.tensors import dequantized
from arrow_quant_v2.packed import ITEM_BITS, Layout, PackedTensor
from arrow_quant_v2.plan import quant_axis
from arrow_quant_v2.quantizers import quantizer
from arrow_quant_v2.quantizers.result import not_finite

if TYPE_CHECKING:
    from arrow_quant_v2.config import LayerSpec

Granularity: TypeAlias = Literal["tensor", "channel", "group"]
GRANULARITIES: tuple[Granularity, ...] = ("tensor", "channel", "group")


def quantize_tensor(tensor: torch.Tensor, name: str, spec: LayerSpec, granularity: Granularity) -> PackedTensor:
    """Codes and parameters of a tensor of any floating dtype and shape.

    Raises:
        QuantizationError: the tensor is empty, of no floating dtype, or holds NaN or infinity.
    """
    if not isinstance(tensor, torch.Tensor):
        raise QuantizationError(f"{name}: is a {type(tensor).__name__}; a torch.Tensor is needed")
    dtype = str(tensor.dtype).removeprefix("torch.")
    if not tensor.is_floating_point() or dtype not in ITEM_BITS or not tensor.numel():
        raise QuantizationError(
            f"{name}: is {dtype} {list(tensor.shape)}; a floating-point tensor with values is needed"
        )
    layout = Layout(
        shape=tuple(tensor.shape),
        bits=spec.bits,
        quant_axis=_axis(tensor, granularity),
        group_size=spec.group_size,
    ).on(spec.grid)
    weight = tensor.detach().to("cpu").reshape(layout.rows, layout.columns)
    rows = quantizer(spec.method)(weight if weight.dtype in FLOATS else weight.to(torch.float32), spec)
    if not np.isfinite(rows.sums).all():
        raise not_finite(weight, name, tuple(tensor.shape))
    return rows.packed(name, dtype, layout)


def dequantize_tensor(packed: PackedTensor) -> torch.Tensor:
    """The whole tensor again, in its own shape and dtype.

    Raises:
        QuantizationError: it is none that was packed.
    """
    if not isinstance(packed, PackedTensor):
        raise QuantizationError(f"a {type(packed).__name__} is no PackedTensor, as quantize gives it")
    dtype: torch.dtype = getattr(torch, packed.dtype)
    return dequantized(packed, dtype).reshape(packed.layout.shape)


def _axis(tensor: torch.Tensor, granularity: Granularity) -> int | None:
    if granularity == "tensor" or tensor.ndim == 0:
        return None
    return 0 if tensor.ndim == 1 else quant_axis(tuple(tensor.shape))
