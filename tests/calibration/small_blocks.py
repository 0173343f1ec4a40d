"""Small models of every shape that blocks come in, and what each of their blocks gives when they run as they are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from arrow_quant_v2.calibration.sample import Sample

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from arrow_quant_v2.calibration.blocks import Walk


def made(make: Callable[[], Any]) -> Any:
    """A module in eval mode, the same every time; torch's own generator is left alone."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().eval().requires_grad_(requires_grad=False)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def matrices(module: nn.Module) -> dict[str, Tensor]:
    """What is worth watching: every parameter with two axes or more, but for embeddings."""
    embeddings = {f"{name}.weight" for name, part in module.named_modules() if isinstance(part, nn.Embedding)}
    return {name: p for name, p in module.named_parameters() if p.ndim > 1 and name not in embeddings}


def samples_of(*arguments: tuple[Any, ...]) -> list[Sample]:
    return [Sample(arguments=own, timestep=float(number)) for number, own in enumerate(arguments)]


class Layer(nn.Module):
    """Attention without heads, and what follows; hands on a tuple, as layers of text models do."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor, *, scale: float = 1.0) -> tuple[Tensor, dict[str, Tensor]]:
        scores = (self.q(x) @ self.k(x).mT).softmax(dim=-1)
        x = x + scale * self.out(scores @ self.v(x))
        return x + self.down(self.up(x).relu()), {"scores": scores}


class Bert(nn.Module):
    """Embeddings, a list of layers, a head; what layers give is written into before the next one gets it."""

    def __init__(self, count: int = 3) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(11, 8)
        self.encoder = nn.Module()
        self.encoder.layer = nn.ModuleList(Layer() for _ in range(count))
        self.head = nn.Linear(8, 5)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        x, total = self.embeddings(ids), torch.zeros(())
        for layer in self.encoder.layer:
            x, given = layer(x, scale=0.5)
            total = total + given["scores"].sum()
            x.mul_(1.25)
        return self.head(x), total


class Residual(nn.Module):
    def __init__(self, columns: int, rows: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(columns, rows, 3, padding=1), nn.Conv2d(rows, rows, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())


class UNet(nn.Module):
    """Lists inside lists, single convolutions in lists of their own, and a way past everything in between."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv2d(2, 4, 3, padding=1)
        self.down = nn.ModuleList(nn.ModuleList([Residual(4, 4), Residual(4, 4)]) for _ in range(2))
        self.shrink = nn.ModuleList(nn.Conv2d(4, 4, 2, stride=2) for _ in range(2))
        self.up = nn.ModuleList(nn.ModuleList([Residual(8, 4), Residual(4, 4)]) for _ in range(2))
        self.leave = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x, skips = self.enter(x), []
        for blocks, shrink in zip(self.down, self.shrink, strict=True):
            for block in blocks:
                x = block(x)
            skips.append(x)
            x = shrink(x)
        for blocks in self.up:
            x = torch.cat([nn.functional.interpolate(x, scale_factor=2), skips.pop()], dim=1)
            for block in blocks:
                x = block(x).add_(0.5)
        return self.leave(x)


class Again(nn.Module):
    """One layer runs twice, then in turns with another one, and once more at the end; it has two names."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.same = nn.ModuleList([self.layers[0]])

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers[0](self.layers[0](x)[0])[0]
        x = self.same[0](self.layers[1](x)[0])[0]
        return self.same[0](self.layers[1](x)[0].mul_(2.0))[0]


class Tied(nn.Module):
    """Two layers that share one of their weights."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.layers[1].out.weight = self.layers[0].out.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[1](self.layers[0](x)[0])[0]


def stack() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(inplace=True), nn.Linear(8, 8))


def deep() -> nn.Sequential:
    return nn.Sequential(stack(), nn.ReLU(inplace=True), stack(), nn.Linear(8, 3))


def diffusers_unet() -> nn.Module:
    from diffusers import UNet2DModel  # noqa: PLC0415 - takes seconds

    return UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=8,
    )


def token_samples() -> list[Sample]:
    return samples_of(*((torch.arange(6 + i).remainder(11)[None],) for i in range(3)))


def vectors() -> list[Sample]:
    return samples_of(*((random(2, 4, 8, seed=i),) for i in range(3)))


def images() -> list[Sample]:
    return samples_of(*((random(1, 2, 8, 8, seed=i),) for i in range(3)))


def noisy() -> list[Sample]:
    return samples_of(*((random(1, 3, 8, 8, seed=i), 300 * i) for i in range(2)))


MODELS: dict[str, tuple[Callable[[], Any], Callable[[], list[Sample]]]] = {
    "bert": (Bert, token_samples),
    "unet": (UNet, images),
    "sequential": (stack, vectors),
    "nested sequential": (deep, vectors),
    "linear": (lambda: nn.Linear(8, 3), vectors),
    "again": (Again, vectors),
    "tied": (Tied, vectors),
    "diffusers": (diffusers_unet, noisy),
}


def given_by(walk: Walk, module: nn.Module, sample: int) -> dict[tuple[int, int], Any]:
    """(block, call) -> what a copy of the model without a walk gives, each as it was when it was given."""
    found: dict[tuple[int, int], Any] = {}
    calls = [0] * len(walk.blocks)
    hooks = []

    def keep(number: int) -> Callable[..., None]:
        def hook(_: object, __: object, outputs: Any) -> None:
            found[number, calls[number]] = torch.utils._pytree.tree_map(
                lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, outputs
            )
            calls[number] += 1

        return hook

    for number, block in enumerate(walk.blocks):
        hooks.append(module.get_submodule(block.name).register_forward_hook(keep(number)))
    with torch.no_grad():
        module(*walk.samples[sample].arguments)
    for hook in hooks:
        hook.remove()
    return found


def same(one: Any, other: Any) -> bool:
    """Whether both are the same structure of equal tensors, bit for bit and with the same strides."""
    ones, own = torch.utils._pytree.tree_flatten(one)
    others, others_own = torch.utils._pytree.tree_flatten(other)
    return own == others_own and all(
        torch.equal(a, b) and a.stride() == b.stride() if isinstance(a, torch.Tensor) else a == b
        for a, b in zip(ones, others, strict=True)
    )
