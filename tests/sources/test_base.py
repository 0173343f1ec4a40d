"""What every source promises, whatever the kind of model: the same tests for all of them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from arrow_quant_v2.errors import SourceError
from arrow_quant_v2.packed import TensorInfo
from arrow_quant_v2.sources.checkpoint import CheckpointSource
from arrow_quant_v2.sources.module import ModuleSource
from arrow_quant_v2.sources.npy import NpySource
from arrow_quant_v2.sources.safetensors import SafetensorsSource

if TYPE_CHECKING:
    from pathlib import Path

    from arrow_quant_v2.sources.base import Source

Tensors: TypeAlias = dict[str, torch.Tensor]

NUMPY_DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
)
TORCH_DTYPES = (*NUMPY_DTYPES, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
KINDS = ("safetensors", "sharded safetensors", "npy", "npy in fortran order", "checkpoint", "old checkpoint", "module")


def made(dtypes: tuple[torch.dtype, ...]) -> Tensors:
    """One matrix per dtype, and the shapes that are easily forgotten."""
    torch.manual_seed(0)
    tensors = {f"layer.{str(d)[6:]}.weight": (torch.randn(5, 7) * 40).to(d) for d in dtypes}
    tensors["mask"] = torch.tensor([True, False, True])
    tensors["scalar"] = torch.tensor(3.5)
    tensors["empty"] = torch.zeros(0, 4)
    tensors["conv.weight"] = torch.randn(3, 2, 3, 5)
    return tensors


def written(kind: str, folder: Path) -> tuple[Source, Tensors]:
    tensors = made(NUMPY_DTYPES if kind.startswith(("npy", "old")) else TORCH_DTYPES)
    if kind == "safetensors":
        save_file(tensors, folder / "m.safetensors", metadata={"format": "pt"})
        return SafetensorsSource([folder / "m.safetensors"]), tensors
    if kind == "sharded safetensors":
        halves = [dict(list(tensors.items())[i::2]) for i in range(2)]
        paths = [folder / f"m-{i}.safetensors" for i in range(2)]
        for half, path in zip(halves, paths, strict=True):
            save_file(half, path)
        return SafetensorsSource(paths), tensors
    if kind.startswith("npy"):
        for name, tensor in tensors.items():
            array = tensor.numpy()
            np.save(folder / f"{name}.npy", np.asarray(array, order="F" if "fortran" in kind else "C"))
        return NpySource(folder), tensors
    if kind.endswith("checkpoint"):
        torch.save(tensors, folder / "m.bin", _use_new_zipfile_serialization=kind == "checkpoint")
        return CheckpointSource([folder / "m.bin"]), tensors
    module = torch.nn.Module()
    for name, tensor in tensors.items():
        module.register_buffer(name.replace(".", "_"), tensor)
    return ModuleSource(module), {name.replace(".", "_"): tensor for name, tensor in tensors.items()}


@pytest.fixture(scope="module", params=KINDS)
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Source, Tensors]:
    return written(request.param, tmp_path_factory.mktemp("model"))


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.numpy(force=True).tobytes() == b.numpy(force=True).tobytes()


def bits_of(tensor: torch.Tensor) -> torch.Tensor:
    """As bytes, because numpy knows neither bfloat16 nor float8."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def test_every_tensor_is_described_and_they_are_sorted_by_name(opened: tuple[Source, Tensors]) -> None:
    source, tensors = opened
    expected = [TensorInfo(name=n, shape=tuple(t.shape), dtype=str(t.dtype)[6:]) for n, t in sorted(tensors.items())]
    assert list(source.tensors) == expected


def test_every_tensor_reads_as_the_values_that_were_written(opened: tuple[Source, Tensors]) -> None:
    source, tensors = opened
    for name, tensor in tensors.items():
        read = source.read(name)
        assert read.dtype == tensor.dtype
        assert read.shape == (tensor.numel(),)
        assert read.is_contiguous()
        assert same_bits(bits_of(read), bits_of(tensor)), name


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_slice_is_that_slice_of_the_flattened_tensor(opened: tuple[Source, Tensors], data: st.DataObject) -> None:
    source, tensors = opened
    name = data.draw(st.sampled_from(sorted(tensors)))
    start = data.draw(st.integers(0, tensors[name].numel()))
    stop = data.draw(st.integers(start, tensors[name].numel()))
    expected = tensors[name].reshape(-1)[start:stop]
    assert same_bits(bits_of(source.read(name, start, stop)), bits_of(expected))


def test_what_was_read_is_the_callers_own(opened: tuple[Source, Tensors]) -> None:
    source, _ = opened
    name = source.tensors[0].name
    before = source.read(name)
    source.read(name).zero_()
    assert same_bits(bits_of(source.read(name)), bits_of(before))


def test_many_threads_read_at_once(opened: tuple[Source, Tensors]) -> None:
    source, tensors = opened
    jobs = [(name, start) for name, t in tensors.items() for start in range(t.numel())]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda job: source.read(job[0], job[1], job[1] + 1), jobs))
    for (name, start), value in zip(jobs, found, strict=True):
        assert same_bits(bits_of(value), bits_of(tensors[name].reshape(-1)[start : start + 1]))


def test_an_unknown_tensor_is_refused_with_the_nearest_name(opened: tuple[Source, Tensors]) -> None:
    with pytest.raises(SourceError, match=r"no tensor 'scalars'; the nearest .* scalar"):
        opened[0].read("scalars")


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (2, 1), (0, 4), (4, None)])
def test_a_slice_outside_the_tensor_is_refused(opened: tuple[Source, Tensors], start: int, stop: int | None) -> None:
    with pytest.raises(SourceError, match=r"mask: elements .* were asked for; it has 3 \(3,\)"):
        opened[0].read("mask", start, stop)


@pytest.mark.parametrize("kind", KINDS)
def test_reading_after_close_is_refused(kind: str, tmp_path: Path) -> None:
    source, _ = written(kind, tmp_path)
    source.close()
    source.close()
    with pytest.raises(SourceError, match=r"was closed; (open the model again|make a new source)"):
        source.read("scalar")


@pytest.mark.parametrize("kind", KINDS)
def test_a_source_names_the_files_that_hold_its_weights(kind: str, tmp_path: Path) -> None:
    source, _ = written(kind, tmp_path)
    expected = [] if kind == "module" else sorted(p for p in tmp_path.iterdir() if p.is_file())
    assert sorted(source.weight_files) == expected
    assert ("module Module" if kind == "module" else str(tmp_path)) in source.location
    source.close()
