"""Weights of one input fitted together: the basis that loses least is found and shared, whatever the threads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from small_models import normal

from arrow_quant_v2.config import LayerSpec
from arrow_quant_v2.errors import QuantizationError
from arrow_quant_v2.kernels.cpu import threads_per_call
from arrow_quant_v2.kernels.tensors import dequantized
from arrow_quant_v2.packed import Layout, TensorInfo
from arrow_quant_v2.plan import quant_axis
from arrow_quant_v2.quantizers.calibrated import (
    Freedom,
    Sight,
    Weight,
    fit_together,
    outputs_beside,
)
from arrow_quant_v2.quantizers.gptq_factor import suitable_damping

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from arrow_quant_v2.quantizers.calibrated import Fitted

CHANNELS = 128
PLAIN, TURNED, EQUALIZED = "", "turned in blocks of 128", "channels equalized"


def weight(values: Tensor, name: str = "w", bits: Any = 4, method: Any = "gptq", group_size: int | None = 64) -> Weight:
    shape = tuple(values.shape)
    spec = LayerSpec(bits=bits, group_size=group_size, method=method, symmetric=False)
    return Weight(
        values=values.flatten(1),
        info=TensorInfo(name=name, shape=shape, dtype="float32"),
        layout=Layout(shape=shape, bits=bits, quant_axis=quant_axis(shape), group_size=group_size, grid=spec.grid),
        spec=spec,
    )


def sight(x: Tensor, places: int = 1) -> Sight:
    """Rows of inputs, columns in the order of channels and places."""
    channels = x.reshape(len(x), -1, places).abs().amax(dim=(0, 2))
    return Sight(hessian=x.T @ x, count=len(x), absmax=channels)


def loud() -> tuple[Tensor, Tensor]:
    """Inputs with outliers: eight channels are twenty times as large as the others."""
    x = normal(600, CHANNELS, seed=1) * 20
    x[:, ::16] *= 20.0
    return normal(48, CHANNELS), x


def with_outliers() -> tuple[Tensor, Tensor]:
    """Rows of weights have all their large values in the same few columns: turned, they are like all others."""
    values, x = normal(48, CHANNELS), normal(600, CHANNELS, seed=1) * 20
    values[:, ::16] *= 20.0
    return values, x


def on_few_levels() -> tuple[Tensor, Tensor]:
    """Weights that lie on four levels, which codes hit exactly: turned, they do not."""
    levels = torch.randint(0, 4, (48, CHANNELS), generator=torch.Generator().manual_seed(0))
    return (levels.float() - 1.5) * 0.1, normal(600, CHANNELS, seed=1) * 20


def unequal() -> tuple[Tensor, Tensor]:
    """Channels that are fed a hundred times as much have a hundredth of the weight."""
    values, x = normal(48, CHANNELS), normal(600, CHANNELS, seed=1) * 20
    factor = (
        100.0 ** torch.linspace(-1, 1, CHANNELS)[torch.randperm(CHANNELS, generator=torch.Generator().manual_seed(0))]
    )
    return values / factor, x * factor


def lost(fitted: Fitted, x: Tensor) -> float:
    return float((x @ fitted.left.T).square().sum())


# The basis


@pytest.mark.parametrize("method", ["gptq", "r2q"])
@pytest.mark.parametrize(
    ("made", "freedom", "words"),
    [
        (loud, Freedom(rotate=True), TURNED),
        (loud, Freedom(rotate=False), PLAIN),
        (with_outliers, Freedom(rotate=True), TURNED),
        (with_outliers, Freedom(rotate=False), PLAIN),
        (on_few_levels, Freedom(rotate=True), PLAIN),
        (on_few_levels, Freedom(rotate=True, equalize=True), PLAIN),
        (unequal, Freedom(rotate=True, equalize=True), EQUALIZED),
        (unequal, Freedom(rotate=False), PLAIN),
    ],
)
def test_the_basis_that_loses_least_is_taken(made: Any, freedom: Freedom, words: str, method: str) -> None:
    values, x = made()
    (found,) = fit_together([weight(values, bits=2, method=method)], sight(x), freedom)
    assert str(found.basis) == words
    (plain,) = fit_together([weight(values, bits=2, method=method)], sight(x), Freedom(rotate=False))
    assert lost(found, x) < 0.8 * lost(plain, x) if words else lost(found, x) <= lost(plain, x)


def test_weights_of_one_input_share_its_basis() -> None:
    """By itself one is turned and the other is not; together the one with more to lose decides."""
    outliers, x = with_outliers()
    levels, _ = on_few_levels()
    both = [weight(outliers, "q", 2), weight(levels, "k", 2)]
    apart = [str(fit_together([one], sight(x), Freedom())[0].basis) for one in both]
    assert apart == [TURNED, PLAIN]
    together = fit_together(both, sight(x), Freedom())
    assert [str(one.basis) for one in together] == [TURNED, TURNED]
    assert [one.packed.rotation for one in together] == [128, 128]
    small = fit_together([weight(outliers * 1e-3, "q", 2), weight(levels, "k", 2)], sight(x), Freedom())
    assert [str(one.basis) for one in small] == [PLAIN, PLAIN]
    equalized = fit_together([weight(unequal()[0], "q", 2)] * 2, sight(unequal()[1]), Freedom(equalize=True))
    assert equalized[0].packed.equalization is not None
    assert equalized[0].packed.equalization.tobytes() == equalized[1].packed.equalization.tobytes()  # type: ignore[union-attr]


def test_channels_that_no_block_divides_are_not_turned() -> None:
    (found,) = fit_together([weight(normal(8, 100))], sight(normal(200, 100, seed=1)), Freedom())
    assert (str(found.basis), found.packed.rotation) == ("", None)


# The result


@pytest.mark.parametrize("method", ["gptq", "r2q"])
@pytest.mark.parametrize("made", [with_outliers, on_few_levels, unequal])
def test_what_is_stored_is_the_weight_less_what_is_left(made: Any, method: str) -> None:
    values, x = made()
    for found in fit_together([weight(values, method=method)], sight(x), Freedom(equalize=True)):
        quantized = dequantized(found.packed)
        torch.testing.assert_close(values - found.left, quantized)
        sums = [float(part.double().square().sum()) for part in (values, quantized, found.left)]
        assert [found.error.original, found.error.quantized, found.error.difference] == pytest.approx(sums)
        assert found.error.count == values.numel()
        assert (found.packed.name, found.packed.dtype) == ("w", "float32")


@pytest.mark.parametrize("freedom", [Freedom(), Freedom(rotate=False, equalize=True)])
def test_a_convolution_keeps_the_order_of_its_columns(freedom: Freedom) -> None:
    """Outputs of the layer itself, and its outliers lie in channels: both bases change them alike at all places."""
    values, images = normal(16, 32, 3, 3), normal(6, 32, 8, 8, seed=1)
    values[:, ::8] *= 20.0
    x = torch.nn.functional.unfold(images, 3).transpose(1, 2).flatten(0, 1)
    (found,) = fit_together([weight(values, bits=8, group_size=32)], sight(x, places=9), freedom)
    assert str(found.basis)
    own = dequantized(found.packed).reshape(values.shape)
    outputs = torch.nn.functional.conv2d(images, values)
    assert float((torch.nn.functional.conv2d(images, own) - outputs).norm() / outputs.norm()) < 0.02


def test_weights_may_have_groups_and_widths_of_their_own() -> None:
    x = normal(400, CHANNELS, seed=1)
    asked = [
        weight(normal(8, CHANNELS), "a", 2, group_size=32),
        weight(normal(4, CHANNELS, seed=2), "b", 8, "r2q", None),
    ]
    found = fit_together(asked, sight(x), Freedom())
    assert [one.packed.layout for one in found] == [one.layout for one in asked]
    for one, own in zip(found, asked, strict=True):
        assert lost(one, x) < {2: 0.2, 8: 1e-3}[own.spec.bits] * float((x @ own.values.T).square().sum())


def test_more_refits_are_tried_when_they_are_allowed() -> None:
    values, x = with_outliers()
    none, some = (fit_together([weight(values, bits=2)], sight(x), Freedom(refits=n))[0] for n in (0, 2))
    assert lost(some, x) < lost(none, x)


@pytest.fixture
def _threads() -> Iterator[None]:
    before = threads_per_call.get()
    yield
    threads_per_call.set(before)


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("count", [1, 3])
def test_any_number_of_threads_gives_the_same_bytes(count: int) -> None:
    """One weight is cut into rows, several are worked on side by side."""
    x = normal(700, CHANNELS, seed=9) * 20
    values = [normal(1200 // count, CHANNELS, seed=seed) for seed in range(count)]
    found = []
    for threads in (1, 2, 5):
        threads_per_call.set(threads)
        fitted = fit_together([weight(own, bits=2) for own in values], sight(x), Freedom(equalize=True))
        found.append([(one.packed.codes.tobytes(), one.packed.scales.tobytes(), str(one.basis)) for one in fitted])
    assert found[0] == found[1] == found[2]


def test_some_rows_are_spread_over_the_weight() -> None:
    whole = weight(torch.arange(100.0)[:, None].expand(-1, 8).reshape(100, 2, 4).contiguous())
    some = whole.some(5)
    assert some.values[:, 0].tolist() == [0.0, 24.0, 49.0, 74.0, 99.0]
    assert (some.layout.rows, some.layout.columns, some.layout.channels) == (5, 8, 2)
    assert whole.some(100) is whole


# Numbers


@pytest.mark.parametrize(
    ("columns", "count", "damping"),
    [(512, 512, 0.3), (512, 5120, 0.03), (512, 10**9, 0.01), (512, 256, 0.6), (512, 1, 1.0), (512, 0, 1.0)],
)
def test_the_less_was_seen_the_less_it_is_trusted(columns: int, count: int, damping: float) -> None:
    assert suitable_damping(columns, count) == pytest.approx(damping)


def test_output_error_of_numbers_on_paper() -> None:
    left, whole = torch.tensor([[0.0, 1.0]]), torch.tensor([[2.0, 1.0]])
    probes = [torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 2.0], [0.0, 4.0]]), torch.ones(0, 2), torch.zeros(3, 2)]
    first, second, none, zeros = outputs_beside(left, whole, probes).errors
    assert (first, second) == (0.0, pytest.approx(20.0 / 32.0))
    assert none != none  # noqa: PLR0124 - NaN
    assert zeros == 0.0


# What is refused


def test_a_weight_that_is_not_finite_is_named() -> None:
    values = normal(8, 16, 2, 2)
    values[3, 7, 0, 1] = torch.nan
    with pytest.raises(QuantizationError, match=r"conv.weight: the value at \[3, 7, 0, 1\] is nan"):
        fit_together([weight(values, "conv.weight")], sight(normal(99, 64), places=4), Freedom(rotate=False))


@pytest.mark.parametrize("freedom", [Freedom(), Freedom(equalize=True)])
def test_an_input_of_zeros_alone_is_refused(freedom: Freedom) -> None:
    with pytest.raises(QuantizationError, match=r"not all inputs 0|and not all 0"):
        fit_together([weight(normal(8, 64))], sight(torch.zeros(10, 64)), freedom)
