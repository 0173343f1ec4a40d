"""The torch port of the terrain UNet does what its ONNX file does, and hooks see all of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx
import onnxruntime
import pytest
import torch
from terrain_unet import SIGMAS, TerrainUNet, load_terrain, sample, save_terrain, trajectory, variance_ratio
from torch import nn

from arrow_quant_v2 import ArrowQuantV2
from arrow_quant_v2.sources.folder import open_model

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

DIFFICULTIES = (0.1, 0.9)
# Seeds 0 to 2 at sigma 80 and 2 gave 0.00013 to 0.00043, 0.026 to 0.24 and 0.83 to 4.1.
LIMITS = {8: (5e-5, 1e-3), 4: (0.01, 0.7), 2: (0.3, 10.0)}

api = ArrowQuantV2()


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """On shared cores torch's waiting threads cost up to twenty times what they do."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def unet(terrain: Path) -> TerrainUNet:
    return load_terrain(terrain)


@pytest.fixture(scope="module")
def session(terrain: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(terrain, options, providers=["CPUExecutionProvider"])


def quantized(model: nn.Module, bits: int) -> nn.Module:
    """The model with its matrices and kernels rounded to nearest in groups of 32."""
    weights = {name: weight for name, weight in model.state_dict().items() if weight.ndim > 1 and weight.numel() > 1023}
    rounded = api.dequantize(api.quantize(weights, bits, group_size=32, method="rtn"))
    other = TerrainUNet().eval()
    other.load_state_dict(model.state_dict() | rounded)
    return other


# the port


@pytest.mark.parametrize("sigma", [80.0, 10.0, 2.0, 0.1])
def test_the_port_returns_what_onnxruntime_returns(
    sigma: float, unet: TerrainUNet, session: onnxruntime.InferenceSession
) -> None:
    noise = torch.randn(len(DIFFICULTIES), 1, 128, 128, generator=torch.Generator().manual_seed(0))
    inputs = {
        "noisy": (sigma**2 + 0.25) ** 0.5 * noise,
        "sigma": torch.full((len(DIFFICULTIES),), sigma),
        "difficulty": torch.tensor(DIFFICULTIES),
    }
    wanted = torch.from_numpy(session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})[0])
    with torch.no_grad():
        found = unet(**inputs)
    assert (found - wanted).abs().max() <= 1e-4 * wanted.abs().max()


def test_every_number_of_the_file_is_a_parameter_but_111_constants_of_its_graph(
    unet: TerrainUNet, terrain: Path
) -> None:
    stored = onnx.load(terrain).graph.initializer
    assert len(stored) == 815
    assert sum(onnx.numpy_helper.to_array(tensor).size for tensor in stored) == 10_456_656
    assert sum(parameter.numel() for parameter in unet.parameters()) == 10_456_656 - 111
    assert {tensor.name for tensor in stored if tensor.name.startswith("network.")} < set(unet.state_dict())


def test_a_hook_sees_the_input_of_every_matrix_and_kernel(unet: TerrainUNet) -> None:
    seen: dict[str, int] = {}
    hooks = [
        module.register_forward_pre_hook(lambda _, inputs, name=name: seen.update({name: inputs[0].shape[1]}))
        for name, module in unet.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    ]
    sample(unet, 0, SIGMAS[:1])
    for hook in hooks:
        hook.remove()
    assert seen == {
        name.removesuffix(".weight"): weight.shape[1] for name, weight in unet.state_dict().items() if weight.ndim > 1
    }


def test_loading_and_drawing_leave_the_global_random_numbers_alone(terrain: Path) -> None:
    before = torch.get_rng_state()
    sample(load_terrain(terrain), 0, SIGMAS[:1])
    assert torch.equal(torch.get_rng_state(), before)


# its maps


def test_a_seed_draws_the_same_maps_again_and_another_one_others(unet: TerrainUNet) -> None:
    maps, again, others = (sample(unet, seed, SIGMAS[:1]) for seed in (7, 7, 8))
    assert torch.equal(maps, again)
    assert not torch.allclose(maps, others, atol=0.1)


@pytest.mark.parametrize("sigmas", [SIGMAS[:1], SIGMAS], ids=["one step", "three steps"])
def test_maps_are_smooth_and_hard_terrain_has_more_relief(sigmas: tuple[float, ...], unet: TerrainUNet) -> None:
    maps = sample(unet, 0, sigmas, difficulty=(0.0, 1.0))
    easy, hard = maps.std(dim=(1, 2, 3))
    assert 0.05 < easy < 0.8 * hard < 0.8
    assert (maps.diff(dim=-1).std(dim=(1, 2, 3)) < 0.2 * maps.std(dim=(1, 2, 3))).all()


def test_a_trajectory_is_what_the_model_is_given_on_its_way_to_the_maps(unet: TerrainUNet) -> None:
    states = trajectory(unet, 3, SIGMAS[:2])
    calls: list[float] = []
    hook = unet.register_forward_pre_hook(lambda _, __, inputs: calls.append(inputs["sigma"].item()), with_kwargs=True)
    with torch.no_grad():
        results = {sigma: unet(**inputs) for inputs, sigma in states}
    hook.remove()
    assert calls == list(results) == list(SIGMAS[:2])
    assert torch.equal(results[SIGMAS[1]], sample(unet, 3, SIGMAS[:2]))


# quantized


@pytest.mark.parametrize("sigma", [80.0, 2.0])
def test_fewer_bits_stray_further(sigma: float, unet: TerrainUNet) -> None:
    for bits, (low, high) in LIMITS.items():
        assert low < variance_ratio(unet, quantized(unet, bits), sigma, difficulty=(0.5,)) < high


def test_a_saved_model_is_read_as_an_image_model(unet: TerrainUNet, tmp_path: Path) -> None:
    folder, weights = save_terrain(unet, tmp_path / "terrain"), unet.state_dict()
    assert api.doctor(folder)["modality"] == "image"
    with open_model(folder) as model:
        read = {info.name: model.source.read(info.name).reshape(info.shape) for info in model.source.tensors}
    assert read.keys() == weights.keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in read.items())
