"""Latent diffusion of small pictures by class: an autoencoder, and a transformer that removes noise from its latents.

The autoencoder makes 4 numbers of every 4 x 4 pixels. The transformer is DiT (arXiv 2212.09748); it predicts v
(arXiv 2202.00512) and learns to do without a class as well, so that it can be guided. Knows not what the pictures show.
"""

from __future__ import annotations

import copy
import json
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from keeping import Asked, asked, weights_of, write_card
from loop import Course, Learnt, learn
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

NO_CLASS = 1000  # what DiTPipeline says where it asks for no class: the table has as many rows as ImageNet has classes
WITHOUT_CLASS = 0.1  # of the examples
SHARPNESS = 10.0  # how much an error of a pixel weighs beside the bits of the latents
TENTH = 10  # every tenth picture is held out


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What is to be made: sizes of the networks, how long they learn, and what the card says of the data."""

    name: str
    side: int
    layers: int
    steps: int
    coder_steps: int
    labels: tuple[str, ...]
    about: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """Pictures (n, 1, side, side) from -1 to 1 and their classes (n,)."""

    pictures: torch.Tensor
    classes: torch.Tensor

    def part(self, *, held_out: bool) -> Pictures:
        """Those to learn from, or every tenth."""
        chosen = (torch.arange(len(self.classes)) % TENTH == TENTH - 1) == held_out
        return Pictures(pictures=self.pictures[chosen], classes=self.classes[chosen])


def autoencoder(kind: Kind, seed: int) -> AutoencoderKL:
    torch.manual_seed(seed)
    return AutoencoderKL(
        in_channels=1,
        out_channels=1,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=kind.side,
    )


def transformer(kind: Kind, seed: int) -> DiTTransformer2DModel:
    torch.manual_seed(seed)
    return DiTTransformer2DModel(
        num_attention_heads=3,
        attention_head_dim=32,
        in_channels=4,
        out_channels=4,
        num_layers=kind.layers,
        sample_size=kind.side // 4,
        patch_size=1,
        num_embeds_ada_norm=NO_CLASS,
    )


def schedule() -> DDIMScheduler:
    return DDIMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", clip_sample=False)


def autoencoder_loss(model: nn.Module, shown: Pictures, draw: torch.Generator) -> torch.Tensor:
    """Squared errors of pixels, and what the latents say more than normal numbers do (in nats), for one picture."""
    pictures = shown.pictures[torch.randint(len(shown.pictures), (64,), generator=draw)]
    latents = model.encode(pictures).latent_dist
    noise = torch.randn(latents.mean.shape, generator=draw)
    made = model.decode(latents.mean + latents.std * noise).sample
    errors = (made.float() - pictures).square().sum(dim=(1, 2, 3))
    return (SHARPNESS * errors + latents.kl().float()).mean()


@dataclass(frozen=True, kw_only=True)
class Latents:
    """What the autoencoder makes of the pictures: means and deviations (n, 4, high, wide), brought to unit variance."""

    means: torch.Tensor
    deviations: torch.Tensor
    classes: torch.Tensor

    def drawn(self, count: int, draw: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents (count, 4, high, wide) and their classes (count,)."""
        chosen = torch.randint(len(self.classes), (count,), generator=draw)
        noise = torch.randn(count, *self.means.shape[1:], generator=draw)
        return self.means[chosen] + self.deviations[chosen] * noise, self.classes[chosen]


@torch.no_grad()
def latents_of(model: AutoencoderKL, shown: Pictures, factor: float | None = None) -> tuple[Latents, float]:
    """The latents and the factor that gives them unit variance."""
    parts = [model.encode(part).latent_dist for part in shown.pictures.split(500)]
    means, deviations = torch.cat([p.mean for p in parts]), torch.cat([p.std for p in parts])
    factor = factor or float(1 / (means.var() + deviations.square().mean()).sqrt())
    return Latents(means=means * factor, deviations=deviations * factor, classes=shown.classes), factor


def transformer_loss(model: nn.Module, latents: Latents, noises: DDIMScheduler, draw: torch.Generator) -> torch.Tensor:
    """Mean squared error of v; times are spread evenly over the batch."""
    model.eval()  # its own way of leaving classes out would leave them out in each block alone
    clean, classes = latents.drawn(128, draw)
    classes = classes.masked_fill(torch.rand(len(classes), generator=draw) < WITHOUT_CLASS, NO_CLASS)
    return velocity_error(model, clean, classes, noises, draw)


def velocity_error(
    model: nn.Module, clean: torch.Tensor, classes: torch.Tensor, noises: DDIMScheduler, draw: torch.Generator
) -> torch.Tensor:
    count = len(clean)
    times = ((torch.rand(1, generator=draw) + torch.arange(count) / count) % 1 * len(noises.alphas_cumprod)).long()
    noise = torch.randn(clean.shape, generator=draw)
    said = model(noises.add_noise(clean, noise, times), timestep=times, class_labels=classes).sample
    return functional.mse_loss(said.float(), noises.get_velocity(clean, noise, times))


def train(kind: Kind, pictures: Pictures) -> Asked:
    """Read the command line, train both networks, save the pipeline and its card."""
    ask = asked(kind.name, kind.steps)
    shown, held = pictures.part(held_out=False), pictures.part(held_out=True)
    coder = learn(
        autoencoder(kind, ask.seed),
        Course(steps=_coder_steps(kind, ask), rate=2e-3, decay=0.0, seed=ask.seed, bfloat16=True),
        lambda model, _, draw: autoencoder_loss(model, shown, draw),
    )
    latents, factor = latents_of(coder.model, shown)
    coder.model.register_to_config(scaling_factor=factor)
    sys.stderr.write(f"autoencoder: {coder.seconds:.0f} s, latents are multiplied by {factor:.3f}\n")
    noises = schedule()
    learnt = learn(
        transformer(kind, ask.seed),
        Course(steps=ask.steps, rate=2e-3, decay=0.01, seed=ask.seed),
        lambda model, _, draw: transformer_loss(model, latents, noises, draw),
        lambda learnt: _save(kind, ask, learnt, coder),
    )
    _save(kind, ask, learnt, coder)
    learnt.seconds += coder.seconds
    figures = dict(kind.about) | _figures(learnt, coder, held, factor)
    write_card(ask, learnt, figures, weights_of(learnt.model, coder.model))
    return ask


def _coder_steps(kind: Kind, ask: Asked) -> int:
    """Fewer where a trial of few steps is asked for."""
    return max(2, round(kind.coder_steps * min(1.0, ask.steps / kind.steps)))


@torch.no_grad()
def _figures(learnt: Learnt, coder: Learnt, held: Pictures, factor: float) -> dict[str, str]:
    draw = torch.Generator().manual_seed(1)
    latents, _ = latents_of(coder.model, held, factor)
    clean, classes = latents.drawn(500, draw)
    error = float(velocity_error(learnt.model, clean, classes, schedule(), draw))
    pixels = functional.mse_loss(coder.model(held.pictures[:500]).sample, held.pictures[:500])
    return {
        "loss": f"{learnt.loss:.4f} (mean squared error of v, whose variance is 1) in the last tenth of the steps",
        "held-out": f"{error:.4f}; the autoencoder alone: {float(pixels):.4f} per pixel, of -1 to 1",
    }


def _save(kind: Kind, ask: Asked, learnt: Learnt, coder: Learnt) -> None:
    parts = [copy.deepcopy(one.model).to(torch.float16) for one in (learnt, coder)]
    DiTPipeline(transformer=parts[0], vae=parts[1], scheduler=schedule()).save_pretrained(ask.out)
    index = ask.out / "model_index.json"  # into which diffusers does not write the names of classes, but reads them
    names = {str(number): name for number, name in enumerate(kind.labels)}
    index.write_text(json.dumps(json.loads(index.read_text()) | {"id2label": names}, indent=2) + "\n")
