"""A consistency UNet of height maps: modules, trained weights, sampler, and how far another model strays from it."""

from __future__ import annotations

import json
import math
from ast import literal_eval
from typing import TYPE_CHECKING

import onnx
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

SIGMA_MIN, SIGMA_MAX, SIGMA_DATA = 0.002, 80.0, 0.5
SIGMAS = (80.0, 40.0, 20.0)  # it was distilled at 80 alone: noise added at 10 or below stays in the map
SIZE = 128
WIDTHS = (32, 32, 64, 96, 128)  # channels at 128, 64, 32, 16 and 8 pixels
ATTENDING = frozenset({64, 96, 128})  # widths, so from 32 pixels down
BLOCKS = 4  # of each width
EMBEDDING = 128
WAVES = 32
HEAD = 32
NORMALIZING = {"Mul": "weight", "Add": "bias"}  # the exporter made nameless constants (channels, 1, 1) of these
SLICED = "slice(None, -1, None)."  # what the exporter writes where a block ran `in_layers[:-1]`


def norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels)


class Residual(nn.Module):
    """Two convolutions; noise level and difficulty scale and shift what is between. `rescale` is 2 up, 0.5 down."""

    def __init__(self, columns: int, rows: int, rescale: float = 1.0) -> None:
        super().__init__()
        self.rescale = rescale
        self.in_layers = nn.Sequential(norm(columns), nn.SiLU(), nn.Conv2d(columns, rows, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(EMBEDDING, 2 * rows))
        self.out_layers = nn.Sequential(norm(rows), nn.SiLU(), nn.Dropout(0.0), nn.Conv2d(rows, rows, 3, padding=1))
        self.skip_connection = nn.Identity() if columns == rows else nn.Conv2d(columns, rows, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = self.emb_layers(embedding)[:, :, None, None].chunk(2, dim=1)
        h = self.in_layers[2](self.resized(self.in_layers[:2](x)))
        h = self.out_layers[0](h) * (1 + scale) + shift
        return self.skip_connection(self.resized(x)) + self.out_layers[1:](h)

    def resized(self, x: Tensor) -> Tensor:
        if self.rescale < 1:
            return functional.avg_pool2d(x, 2)
        return functional.interpolate(x, scale_factor=self.rescale) if self.rescale > 1 else x


class Attention(nn.Module):
    """Every pixel attends to every pixel, in heads of 32 channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(self.norm(x)).reshape(len(x), 3, -1, HEAD, x[0, 0].numel())
        attended = functional.scaled_dot_product_attention(*heads.transpose(-1, -2).contiguous().unbind(1))
        return x + self.proj_out(attended.transpose(-1, -2).reshape(x.shape))


class Block(nn.Sequential):
    """Layers one after the other; only the residual ones are told the embedding."""

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        for layer in self:
            x = through(layer, x, embedding)
        return x


def through(layer: nn.Module, x: Tensor, embedding: Tensor) -> Tensor:
    return layer(x, embedding) if isinstance(layer, Residual) else layer(x)


def layers(columns: int, rows: int) -> list[nn.Module]:
    return [Residual(columns, rows), *([Attention(rows)] if rows in ATTENDING else [])]


def input_blocks() -> Iterator[Block]:
    """From 128 pixels down to 8; what each returns is kept for its mirror image in `output_blocks`."""
    yield Block(nn.Conv2d(1, WIDTHS[0], 3, padding=1))
    columns = WIDTHS[0]
    for depth, rows in enumerate(WIDTHS):
        if depth:
            yield Block(Residual(columns, columns, rescale=0.5))
        for _ in range(BLOCKS):
            yield Block(*layers(columns, rows))
            columns = rows


def output_blocks() -> Iterator[Block]:
    """From 8 pixels up to 128; each sees what the block before it and its mirror image returned."""
    columns = WIDTHS[-1]
    for depth, rows in reversed(list(enumerate(WIDTHS))):
        for _ in range(BLOCKS):
            yield Block(*layers(columns + rows, rows))
            columns = rows
        enlarge = [Residual(rows, rows, rescale=2.0)] if depth else []
        yield Block(*layers(rows + WIDTHS[max(depth - 1, 0)], rows), *enlarge)


def mlp(columns: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(columns, EMBEDDING), nn.SiLU(), nn.Linear(EMBEDDING, EMBEDDING))


def waves(time: Tensor) -> Tensor:
    """(b,) -> (b, 32): cosines and sines at 1 radian per unit of time, and ever slower down to about 1 / 5,600."""
    half = WAVES // 2
    frequencies = torch.exp(-math.log(10_000) * torch.arange(half, device=time.device) / half)
    angles = time[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class UNet(nn.Module):
    """The network inside, for maps whose values are of about unit variance."""

    def __init__(self) -> None:
        super().__init__()
        widest = WIDTHS[-1]
        self.time_embed = mlp(WAVES)
        self.label_emb = mlp(1)
        self.input_blocks = nn.ModuleList(input_blocks())
        self.middle_block = nn.ModuleList([*layers(widest, widest), Residual(widest, widest)])
        self.output_blocks = nn.ModuleList(output_blocks())
        self.out = nn.Sequential(norm(WIDTHS[0]), nn.SiLU(), nn.Conv2d(WIDTHS[0], 1, 3, padding=1))

    def forward(self, x: Tensor, time: Tensor, difficulty: Tensor) -> Tensor:
        embedding = self.time_embed(waves(time)) + self.label_emb(difficulty[:, None])
        kept = []
        for block in self.input_blocks:
            x = block(x, embedding)
            kept.append(x)
        for layer in self.middle_block:
            x = through(layer, x, embedding)
        for block in self.output_blocks:
            x = block(torch.cat([x, kept.pop()], dim=1), embedding)
        return self.out(x)


class TerrainUNet(nn.Module):
    """Noisy map -> map, heights in -1..1.

    noisy is (b, 1, 128, 128); sigma (b,) its noise; difficulty (b,) runs from 0 for easy to 1 for hard terrain.
    The network's part fades out as sigma falls to 0.002, so that there a map is returned as it came.
    """

    def __init__(self) -> None:
        super().__init__()
        self.network = UNet()

    def forward(self, noisy: Tensor, sigma: Tensor, difficulty: Tensor) -> Tensor:
        above, deviation = sigma - SIGMA_MIN, (sigma**2 + SIGMA_DATA**2).sqrt()
        skip = SIGMA_DATA**2 / (above**2 + SIGMA_DATA**2)
        drawn = self.network(noisy * broad(1 / deviation), 250 * sigma.log(), difficulty)
        return (broad(SIGMA_DATA * above / deviation) * drawn + broad(skip) * noisy).clamp(-1, 1)


def broad(x: Tensor) -> Tensor:
    return x[:, None, None, None]


def load_terrain(path: Path) -> TerrainUNet:
    """The trained model, from the ONNX file that its package ships."""
    graph = onnx.load(path).graph
    found = {tensor.name: torch.tensor(onnx.numpy_helper.to_array(tensor)) for tensor in graph.initializer}
    weights = {name: tensor for name, tensor in found.items() if name.startswith("network.")}
    for node in graph.node:
        tensor = found.get(node.input[1]) if node.op_type in NORMALIZING else None
        if tensor is not None and tensor.ndim == 3:
            weights[f"{module_of(node)}.{NORMALIZING[node.op_type]}"] = tensor.flatten()
    with torch.device("meta"):  # draws no random numbers for weights that are then replaced
        model = TerrainUNet().eval()
    model.load_state_dict(weights, assign=True)
    return model


def module_of(node: onnx.NodeProto) -> str:
    """The name of the module that this node was a part of."""
    properties = {entry.key: entry.value for entry in node.metadata_props}
    return literal_eval(properties["pkg.torch.onnx.name_scopes"])[-2].replace(SLICED, "")


def save_terrain(model: nn.Module, folder: Path) -> Path:
    """A folder that `arrow-quant quantize` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), folder / "model.safetensors")
    (folder / "metadata.json").write_text(json.dumps({"modality": "image"}))
    return folder


def sample(
    model: nn.Module, seed: int, sigmas: Sequence[float] = SIGMAS, difficulty: Sequence[float] = (0.5,)
) -> Tensor:
    """One map for each difficulty, (b, 1, 128, 128), drawn in as many steps as there are sigmas."""
    *_, (_, _, maps) = steps(model, seed, sigmas, difficulty)
    return maps


def trajectory(
    model: nn.Module, seed: int, sigmas: Sequence[float] = SIGMAS, difficulty: Sequence[float] = (0.5,)
) -> Iterator[tuple[dict[str, Tensor], float]]:
    """What the model is given while it draws maps, and the noise level; all of it is drawn before this returns."""
    return iter([(inputs, sigma) for inputs, sigma, _ in steps(model, seed, sigmas, difficulty)])


@torch.no_grad()
def steps(
    model: nn.Module, seed: int, sigmas: Sequence[float], difficulty: Sequence[float]
) -> Iterator[tuple[dict[str, Tensor], float, Tensor]]:
    """Inputs, noise level and result of each step: the model removes all noise, then the next step adds less again."""
    generator, maps = torch.Generator().manual_seed(seed), torch.zeros(len(difficulty), 1, SIZE, SIZE)
    for sigma in sigmas:
        noise = torch.randn(maps.shape, generator=generator)
        noisy = maps + math.sqrt(sigma**2 - SIGMA_MIN**2) * noise
        inputs = {"noisy": noisy, "sigma": torch.full((len(maps),), sigma), "difficulty": torch.tensor(difficulty)}
        maps = model(**inputs)
        yield inputs, sigma, maps


@torch.no_grad()
def variance_ratio(
    original: nn.Module,
    other: nn.Module,
    sigma: float,
    seed: int = 0,
    difficulty: Sequence[float] = (0.2, 0.4, 0.6, 0.8),
) -> float:
    """var(other - original) / var(original) of what both make of the same noisy maps: 0 is equal, above 1 worthless.

    The maps are the original's own; at the highest noise level nothing of a map is left, so there it is noise alone.
    """
    sigmas = (SIGMA_MAX, sigma) if sigma < SIGMA_MAX else (sigma,)
    *_, (inputs, _, maps) = steps(original, seed, sigmas, difficulty)
    return ((other(**inputs) - maps).var() / maps.var()).item()
