"""GPTQ of one 4096 x 4096 layer, given H: ours beside a plain PyTorch column loop, and where our time goes.

Both take the same H (8192 correlated tokens), damping, order of columns and kind of grid. The plain loop is the usual
one: H^-1 by Cholesky and back, blocks of 128 columns, a dozen torch calls a column, one product for all later columns.
The bar is for the same mathematics, that is, without refits and sweeps.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from measure import machine, show, verdict, write_json

from arrow_quant_v2.config import LayerSpec
from arrow_quant_v2.kernels import cpu, ops
from arrow_quant_v2.quantizers import gptq, gptq_core
from arrow_quant_v2.quantizers.affine import STRETCHES, clip_search
from arrow_quant_v2.quantizers.gptq_affine import AffineGrid
from arrow_quant_v2.quantizers.gptq_factor import DAMPING, factorize, group_aware_order

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

BAR = 3.0
SAME = "ours, no refits, no sweeps"  # the same mathematics as the plain loop, and the same error
BLOCK = 128
PARTS = {  # what is timed inside our loop
    "grid fits": (ops, "fit_grid"),
    "column loops": (ops, "quantize_columns"),
    "least-squares refits": (AffineGrid, "refitted"),
    "products into later spans": (gptq_core.Work, "feed"),
    "products inside a span": (gptq_core.Work, "updated"),
    "sweeps: codes": (ops, "descend_columns"),
    "sweeps: products with R": (gptq_core.Work, "pull"),
    "sweeps: products into E": (gptq_core.Work, "feed_again"),
}


def layer(size: int, tokens: int) -> tuple[Tensor, Tensor]:
    """A weight, and H of inputs whose channels are correlated and differ in size, some by 15 times."""
    random = torch.Generator().manual_seed(0)
    mixing = torch.randn(size, size, generator=random) / size**0.5
    x = torch.randn(tokens, size, generator=random) @ mixing
    x += 0.3 * torch.randn(tokens, size, generator=random)
    x[:, torch.randperm(size, generator=random)[: size // 64]] *= 15.0
    return torch.randn(size, size, generator=random) * 0.02, x.T @ x


# The plain loop


def plain_fit(w: Tensor, importance: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """(rows, 1) scale and zero point of a group: the best clipping ratio after a weighted least-squares refit."""
    most = 2**bits - 1
    low, high = w.amin(1, keepdim=True).clamp(max=0), w.amax(1, keepdim=True).clamp(min=0)
    full = (high - low).clamp(min=1e-12) / most
    start, mass = -low / full, importance.sum()
    mean_w = (w * importance).sum(1, keepdim=True) / mass
    best = torch.full_like(full, -torch.inf)
    scale, zero = full, start
    for stretch in STRETCHES[bits]:
        q = (w / full * stretch + start).round().clamp(0, most)
        mean_q = (q * importance).sum(1, keepdim=True) / mass
        covariance = ((q - mean_q) * (w - mean_w) * importance).sum(1, keepdim=True)
        variance = ((q - mean_q).square() * importance).sum(1, keepdim=True).clamp(min=1e-30)
        gain, slope = covariance.square() / variance, (covariance / variance).clamp(min=1e-12)
        wins = gain > best
        best, scale = torch.where(wins, gain, best), torch.where(wins, slope, scale)
        zero = torch.where(wins, (mean_q - mean_w / slope).clamp(0, most), zero)
    return scale, zero


def plain_gptq(weight: Tensor, hessian: Tensor, spec: LayerSpec) -> Tensor:
    """The usual PyTorch code: the quantized weight, in float32."""
    group, most, columns = spec.group_size or weight.shape[1], 2**spec.bits - 1, weight.shape[1]
    order, _ = group_aware_order(hessian.diagonal(), group)
    w, h = weight[:, order], hessian[order][:, order]
    h.diagonal().add_(DAMPING * h.diagonal().mean())
    u = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    quantized = torch.zeros_like(w)
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        block, errors, inner = w[:, start:stop].clone(), torch.zeros_like(w[:, start:stop]), u[start:stop, start:stop]
        for i in range(stop - start):
            if (start + i) % group == 0:
                importance = inner.diagonal()[i : i + group] ** -2
                scale, zero = plain_fit(block[:, i : i + group], importance, spec.bits)
            column = block[:, i]
            code = (column.unsqueeze(1) / scale + zero).round().clamp(0, most)
            q = ((code - zero) * scale).flatten()
            error = (column - q) / inner[i, i]
            block[:, i:] -= error.unsqueeze(1).matmul(inner[i, i:].unsqueeze(0))
            quantized[:, start + i], errors[:, i] = q, error
        w[:, stop:] -= errors.matmul(u[start:stop, stop:])
    result = torch.empty_like(quantized)
    result[:, order] = quantized
    return result


# Ours


def restored(rows: Any, spec: LayerSpec, columns: int) -> Tensor:
    stored = (torch.from_numpy(part) for part in (rows.codes, rows.scales, rows.zero_points))
    row_scales = torch.from_numpy(rows.row_scales).view(torch.bfloat16)
    result: Tensor = ops.dequantize(*stored, row_scales, spec.bits, columns, spec.group_size, torch.float32)
    return result


@contextmanager
def timed_parts() -> Iterator[dict[str, float]]:
    """Seconds spent in each part, all threads together."""
    spent: dict[str, float] = defaultdict(float)

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            start = time.perf_counter()
            result = function(*given, **named)
            spent[name] += time.perf_counter() - start
            return result

        return call

    patches = [mock.patch.object(o, name, timed(part, getattr(o, name))) for part, (o, name) in PARTS.items()]
    for patch in patches:
        patch.start()
    try:
        yield spent
    finally:
        for patch in patches:
            patch.stop()


def where_it_goes(weight: Tensor, hessian: Tensor, spec: LayerSpec) -> dict[str, float]:
    """Seconds of each part of one run as it is by default; the parts of the rows shared by the threads."""
    start = time.perf_counter()
    factor = factorize(hessian, spec.group_size)
    middle = time.perf_counter()
    with timed_parts() as spent:
        gptq.gptq(weight, spec, factor)
    total = time.perf_counter() - middle
    parts = {name: seconds / torch.get_num_threads() for name, seconds in spent.items()}
    return {"factor of H": middle - start} | parts | {"the rest": total - sum(parts.values())}


def output_error(weight: Tensor, quantized: Tensor, hessian: Tensor) -> float:
    """tr(dW H dW^T) / tr(W H W^T)."""
    d = weight - quantized
    return float(((d @ hessian) * d).sum(dtype=torch.float64) / ((weight @ hessian) * weight).sum(dtype=torch.float64))


def measure(weight: Tensor, hessian: Tensor, spec: LayerSpec, rounds: int) -> dict[str, Any]:
    """The best of some rounds of each, one after the other in each round, and what they are worth."""
    runs: dict[str, Callable[[], Any]] = {
        "plain PyTorch loop": lambda: plain_gptq(weight, hessian, spec),
        SAME: lambda: gptq.gptq(weight, spec, hessian, refits=0, sweeps=0),
        f"ours, {gptq.REFITS} refits": lambda: gptq.gptq(weight, spec, hessian, sweeps=0),
        f"ours, {gptq.REFITS} refits, {gptq.SWEEPS} sweeps": lambda: gptq.gptq(weight, spec, hessian),
    }
    found: dict[str, Any] = {name: {"seconds": float("inf")} for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            quantized = run()
            found[name]["seconds"] = min(found[name]["seconds"], time.perf_counter() - start)
            values = quantized if isinstance(quantized, torch.Tensor) else restored(quantized, spec, weight.shape[1])
            found[name]["output_error"] = output_error(weight, values, hessian)
    start = time.perf_counter()
    clip = restored(clip_search(weight, spec), spec, weight.shape[1])
    seconds = time.perf_counter() - start
    found["clip, not calibrated"] = {"seconds": seconds, "output_error": output_error(weight, clip, hessian)}
    return found


def report(bits: int, found: dict[str, Any], parts: dict[str, float]) -> float:
    """Print two tables; how many times faster ours is."""
    plain, ours = found["plain PyTorch loop"]["seconds"], found[SAME]["seconds"]
    rows = [
        (name, f"{f['seconds']:.2f}", f"{plain / f['seconds']:.2f}", f"{f['output_error']:.5f}")
        for name, f in found.items()
    ]
    show(f"INT{bits}, group 64", ("", "seconds", "times faster", "output error"), rows)
    show("where our time goes", ("part", "seconds"), [(name, f"{seconds:.3f}") for name, seconds in parts.items()])
    print(f"INT{bits}: {plain / ours:.2f} times faster: {verdict(plain / ours, BAR)}\n")
    return float(plain / ours)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    cpu.activate()
    print(machine())
    weight, hessian = layer(given.size, 2 * given.size)
    figures: dict[str, Any] = {"machine": machine()}
    for bits in given.bits:
        spec = LayerSpec(bits=bits, group_size=64, method="clip", symmetric=False)
        found = measure(weight, hessian, spec, given.rounds)
        parts = where_it_goes(weight, hessian, spec)
        ratio = report(bits, found, parts)
        figures[f"int{bits}"] = {"runs": found, "parts": parts, "times_faster": ratio}
    if given.json:
        write_json(given.json, figures)


if __name__ == "__main__":
    main()
