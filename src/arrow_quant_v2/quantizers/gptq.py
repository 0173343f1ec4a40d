"""Calibrated quantization of one layer, given what its inputs were; knows nothing of models, hooks or files."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from arrow_quant_v2.calibration.second_moment import SecondMoment
from arrow_quant_v2.config import LayerSpec
from arrow_quant_v2.engines.one_core import each_on_one_core, tiles
from arrow_quant_v2.errors import ConfigurationError, QuantizationError
from arrow_quant_v2.kernels import cpu, ops, reference
from arrow_quant_v2.packed import ITEM_BITS, Layout, PackedTensor, sparing
from arrow_quant_v2.plan import quant_axis
from arrow_quant_v2.quantizers.affine import STRETCHES
from arrow_quant_v2.quantizers.gptq_core import Ask, calibrated_rows
from arrow_quant_v2.quantizers.gptq_factor import DAMPING, Factor, factorize, suitable_damping
from arrow_quant_v2.quantizers.result import QuantizedRows, joined, not_finite

if TYPE_CHECKING:
    from torch import Tensor

    from arrow_quant_v2.packed import Bits

REFITS = 2
SWEEPS = 3
ROWS = 1024  # rows that one core works on: fewer keep more cores busy, and pay more for Python
MOST = 100  # refits, and sweeps


class GridParameters(NamedTuple):
    """Scale and zero point of every group, float32 (rows, groups): weight ~ scale * (code - zero_point)."""

    scale: Tensor
    zero_point: Tensor


def gptq(
    weight: Tensor,
    spec: LayerSpec,
    hessian: Tensor | Factor,
    *,
    damping: float = DAMPING,
    refits: int = REFITS,
    sweeps: int = SWEEPS,
) -> QuantizedRows:
    """GPTQ (Frantar et al., 2022, arXiv 2210.17323) on the grid of `spec`: its method says no more.

    weight is (rows, columns) float32, bfloat16 or float16; hessian (columns, columns) the sum or mean of x x^T over the
    layer's inputs x, or its Factor, which weights with the same inputs and group size share. The mathematics and its
    parts are told in gptq_core. The same input gives the same bytes, whatever the number of threads.

    Raises:
        QuantizationError: the weight or H is of another kind, or they do not belong together.
    """
    if weight.ndim != 2 or weight.dtype not in ops.FLOATS or not weight.numel():  # noqa: PLR2004 - a matrix
        raise QuantizationError(
            f"gptq: the weight is {weight.dtype} {list(weight.shape)}; allowed: a matrix of "
            + ", ".join(map(str, ops.FLOATS))
        )
    group_size = _group_size(spec, weight.shape[1])
    factor = hessian if isinstance(hessian, Factor) else factorize(hessian, group_size, damping)
    if (len(factor.order), factor.group_size) != (weight.shape[1], group_size):
        raise QuantizationError(
            f"gptq: H is for {len(factor.order)} columns in groups of {factor.group_size};"
            f" the weight has {weight.shape[1]} in groups of {group_size}"
        )
    cpu.activate()
    ask = Ask(
        grid=sparing(spec.grid, len(factor.groups)),
        bits=spec.bits,
        symmetric=spec.symmetric,
        stretches=STRETCHES[spec.bits],
        refits=refits,
        sweeps=sweeps,
    )
    if sweeps:
        _ = factor.spans  # made once, on all cores, before the rows are shared out
    pieces = tiles(weight.shape[0], ROWS)
    return joined(each_on_one_core(lambda rows: _quantized(weight[rows].to(torch.float32), factor, ask), pieces))


def _group_size(spec: LayerSpec, columns: int) -> int:
    return columns if spec.group_size is None else min(spec.group_size, columns)


def _quantized(weight: Tensor, factor: Factor, ask: Ask) -> QuantizedRows:
    found = calibrated_rows(weight, factor, ask)
    codes = ops.pack(found.codes, ask.bits)
    return QuantizedRows.of(codes, found.scales, found.zero_points, found.row_scales, found.sums)


class GPTQCalibrator:
    """Sees what goes into one layer, and quantizes that layer's weight so that what comes out changes least.

    For a linear layer, observe its inputs. For a convolution, observe its unfolded inputs, one row for each place that
    the kernel visits, columns in the order of weight.flatten(1):

        patches = torch.nn.functional.unfold(images, kernel_size, padding=padding, stride=stride)
        calibrator.observe(patches.transpose(1, 2))

    (a grouped convolution has one calibrator for each of its groups). Layers that share their inputs, such as the
    query, key and value of attention, share one calibrator.
    """

    def __init__(
        self,
        bits: Bits = 4,
        *,
        group_size: int | None = 64,
        symmetric: bool = False,
        damping: float | None = None,
        refits: int = REFITS,
        sweeps: int = SWEEPS,
    ) -> None:
        """Choose the grid, the least damping (a part of the mean of diag H), refits tried for each group, and sweeps.

        Damping None follows how much was seen: 0.3 columns / tokens, but 0.01 to 1. With few tokens H fits what was
        seen, not what will be.

        Raises:
            ConfigurationError: a value is not allowed.
        """
        if damping is not None and not 0.0 < damping <= 1.0:
            raise ConfigurationError(f"damping is {damping}; allowed: above 0, at most 1, or None")
        for what, count in (("refits", refits), ("sweeps", sweeps)):
            if type(count) is not int or not 0 <= count <= MOST:
                raise ConfigurationError(f"{what} is {count!r}; allowed: 0 to {MOST}")
        self.spec = LayerSpec(bits=bits, group_size=group_size, method="clip", symmetric=symmetric)
        self.damping, self.refits, self.sweeps = damping, refits, sweeps
        self._seen: SecondMoment | None = None
        self._factor: Factor | None = None

    def observe(self, inputs: Tensor) -> None:
        """Add inputs (tokens, columns), or with more axes before the last one, to H and to the count of tokens.

        Raises:
            QuantizationError: they have another number of columns than before, no floating dtype, or NaN or infinity.
        """
        if not inputs.is_floating_point() or not inputs.ndim or not inputs.shape[-1]:
            raise QuantizationError(
                f"observe: the inputs are {inputs.dtype} {list(inputs.shape)}; (tokens, columns) of floats are needed"
            )
        x = inputs.detach().to("cpu", torch.float32).flatten(0, -2) if inputs.ndim > 1 else inputs[None].float()
        self._room(x.shape[1]).add(x)

    def merge(self, other: GPTQCalibrator) -> None:
        """Add what another calibrator saw of the same layer, as if this one had seen it too.

        Raises:
            QuantizationError: it saw inputs with another number of columns.
        """
        if other._seen is not None:
            self._room(other._seen.columns).merge(other._seen)

    @property
    def count(self) -> int:
        """Tokens seen."""
        return self._seen.count if self._seen else 0

    @property
    def hessian(self) -> Tensor:
        """H, the sum of x x^T over all tokens x seen, float32 (columns, columns); not to be changed.

        Raises:
            QuantizationError: nothing was observed.
        """
        if self._seen is None or not self._seen.count:
            raise QuantizationError("nothing was observed yet; show the layer's inputs to observe() first")
        return self._seen.matrix

    @property
    def factor(self) -> Factor:
        """R of H and the order of the columns, made once for all weights; its damping is what was needed.

        Raises:
            QuantizationError: nothing was observed, or only zeros.
        """
        if self._factor is None:
            hessian = self.hessian
            fitting = suitable_damping(len(hessian), self.count)
            damping = fitting if self.damping is None else self.damping
            self._factor = factorize(hessian, _group_size(self.spec, len(hessian)), damping)
        return self._factor

    def calibrate(self, weight: Tensor, name: str = "weight") -> PackedTensor:
        """Codes and parameters of a weight (out, in) or (out, in, *kernel) of any floating dtype.

        Raises:
            QuantizationError: nothing was observed, the weight has other columns than the inputs, or it holds NaN or
                infinity.
        """
        layout = self._layout(weight, name)
        matrix = weight.detach().to("cpu").reshape(layout.rows, layout.columns)
        native = matrix if matrix.dtype in ops.FLOATS else matrix.to(torch.float32)
        rows = gptq(native, self.spec, self.factor, refits=self.refits, sweeps=self.sweeps)
        if not np.isfinite(rows.sums).all():
            raise not_finite(matrix, name, tuple(weight.shape))
        return rows.packed(name, str(weight.dtype).removeprefix("torch."), layout)

    def quantization_parameters(self, weight: Tensor) -> GridParameters:
        """Scale and zero point of every group, as `calibrate` stores them; costs as much as `calibrate`.

        Raises:
            QuantizationError: as `calibrate`.
        """
        packed = self.calibrate(weight)
        scales, row_scales = torch.from_numpy(packed.scales), torch.from_numpy(packed.row_scales).view(torch.bfloat16)
        zeros = scales[:, :0] if packed.zero_points is None else torch.from_numpy(packed.zero_points)
        scale = reference.scale_of(scales, row_scales)
        return GridParameters(scale=scale, zero_point=reference.zero_of(zeros, scales, self.spec.bits))

    def _room(self, columns: int) -> SecondMoment:
        """The sum to add to; what was made of it before is void."""
        self._seen = self._seen or SecondMoment(columns)
        self._factor = None
        return self._seen

    def _layout(self, weight: Tensor, name: str) -> Layout:
        dtype = str(weight.dtype).removeprefix("torch.")
        if weight.ndim < 2 or not weight.is_floating_point() or dtype not in ITEM_BITS:  # noqa: PLR2004 - a matrix
            raise QuantizationError(f"{name}: is {dtype} {list(weight.shape)}; (out, in) or more axes of floats needed")
        shape = tuple(weight.shape)
        layout = Layout(shape=shape, bits=self.spec.bits, quant_axis=quant_axis(shape), group_size=self.spec.group_size)
        layout = layout.on(self.spec.grid)
        if layout.columns != len(self.hessian):
            raise QuantizationError(
                f"{name}: has {layout.columns} columns a row; the inputs that were observed have {len(self.hessian)}"
            )
        return layout
