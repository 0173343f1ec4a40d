"""Pipelines of diffusers with a denoiser of a few thousand random weights, saved as a person would download them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import diffusers
import tokenizers
import torch
import transformers

if TYPE_CHECKING:
    from pathlib import Path

UNET = {"sample_size": 16, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
PIXELS = UNET | {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": 8,
}
LATENTS = UNET | {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 24,
    "attention_head_dim": 8,
}
SMALL = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1}
DIT = SMALL | {"in_channels": 4, "out_channels": 8, "sample_size": 8, "num_embeds_ada_norm": 10}
PIXART = SMALL | {"in_channels": 4, "out_channels": 8, "sample_size": 8, "cross_attention_dim": 16}
SD3 = SMALL | {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "joint_attention_dim": 24,
    "caption_projection_dim": 16,
    "pooled_projection_dim": 20,
    "pos_embed_max_size": 16,
}
FLUX = {
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "pooled_projection_dim": 20,
    "axes_dims_rope": (4, 4, 8),
    "guidance_embeds": True,
}
SANA = SMALL | {
    "in_channels": 4,
    "out_channels": 4,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 8,
    "cross_attention_dim": 16,
    "caption_channels": 24,
    "sample_size": 8,
}
WAVE = {
    "sample_size": 64,
    "in_channels": 2,
    "out_channels": 2,
    "extra_in_channels": 64,
    "block_out_channels": (32, 64),
    "down_block_types": ("DownBlock1DNoSkip", "DownBlock1D"),
    "mid_block_type": "UNetMidBlock1D",
    "up_block_types": ("UpBlock1D", "UpBlock1DNoSkip"),
}
SOUND = SMALL | {
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "num_key_value_attention_heads": 2,
    "cross_attention_dim": 16,
    "cross_attention_input_dim": 24,
    "global_states_input_dim": 48,
    "time_proj_dim": 16,
}
SDXL = LATENTS | {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 80,
}
AURA = {name: SD3[name] for name in SD3 if name not in {"num_layers", "pooled_projection_dim"}} | {
    "num_mmdit_layers": 1,
    "num_single_dit_layers": 1,
}
LUMINA = {
    "sample_size": 8,
    "in_channels": 4,
    "hidden_size": 24,
    "num_layers": 1,
    "num_refiner_layers": 1,
    "num_attention_heads": 3,
    "num_kv_heads": 1,
    "multiple_of": 2,
    "axes_dim_rope": (4, 2, 2),
    "axes_lens": (128, 64, 64),
    "cap_feat_dim": 24,
}
QWEN = {name: FLUX[name] for name in ("attention_head_dim", "num_attention_heads", "joint_attention_dim")} | {
    "in_channels": 16,
    "out_channels": 4,
    "num_layers": 1,
    "axes_dims_rope": (4, 4, 8),
}
Z_IMAGE = {
    "in_channels": 4,
    "dim": 24,
    "n_layers": 1,
    "n_refiner_layers": 1,
    "n_heads": 2,
    "n_kv_heads": 2,
    "cap_feat_dim": 24,
    "axes_dims": [4, 4, 4],
    "axes_lens": [256, 64, 64],
}
WAN = SMALL | {
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 24,
    "freq_dim": 16,
    "ffn_dim": 32,
    "rope_max_seq_len": 64,
}


@dataclass(frozen=True)
class Small:
    """A denoiser, its scheduler, and what the pair is called."""

    model: str
    config: dict[str, Any]
    scheduler: str
    schedule: dict[str, Any] = field(default_factory=dict)
    pipeline: str = "DiffusionPipeline"

    @property
    def component(self) -> str:
        return "unet" if "UNet" in self.model else "transformer"

    def build(self) -> torch.nn.Module:
        """The module, the same each time, and without the zeros that some classes begin with."""
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            module: torch.nn.Module = getattr(diffusers, self.model)(**self.config)
            for weight in module.parameters():
                if weight.ndim > 1 and not weight.any():
                    weight.normal_(0, 0.02)
        return module.eval()

    def save(self, root: Path) -> Path:
        """The folder of the pipeline."""
        self.build().save_pretrained(root / self.component)
        getattr(diffusers, self.scheduler)(**self.schedule).save_pretrained(root / "scheduler")
        index = {self.component: ["diffusers", self.model], "scheduler": ["diffusers", self.scheduler]}
        (root / "model_index.json").write_text(json.dumps({"_class_name": self.pipeline} | index))
        return root


FLOW = "FlowMatchEulerDiscreteScheduler"
SHIFTED = {"use_dynamic_shifting": True}
PLMS = {"skip_prk_steps": True, "steps_offset": 1}
OFFSET = {"steps_offset": 1, "clip_sample": False}  # as Stable Diffusion has it
V = {"prediction_type": "v_prediction"}
PIPELINES = {
    "ddpm": Small("UNet2DModel", PIXELS, "DDPMScheduler", {}, "DDPMPipeline"),
    "ddpm learned variance": Small(
        "UNet2DModel", PIXELS | {"out_channels": 6}, "DDPMScheduler", {"variance_type": "learned_range"}
    ),
    "ddpm classes": Small("UNet2DModel", PIXELS | {"num_class_embeds": 10}, "DDPMScheduler"),
    "edm": Small("UNet2DModel", PIXELS, "EDMEulerScheduler"),
    "consistency": Small(
        "UNet2DModel",
        PIXELS | {"num_class_embeds": 10},
        "CMStochasticIterativeScheduler",
        {},
        "ConsistencyModelPipeline",
    ),
    "dit": Small("DiTTransformer2DModel", DIT, "DDIMScheduler", {}, "DiTPipeline"),
    "sd pndm": Small("UNet2DConditionModel", LATENTS, "PNDMScheduler", PLMS, "StableDiffusionPipeline"),
    "sd ddim v": Small("UNet2DConditionModel", LATENTS, "DDIMScheduler", V | OFFSET, "StableDiffusionPipeline"),
    "sd dpm sample": Small(
        "UNet2DConditionModel", LATENTS, "DPMSolverMultistepScheduler", {"prediction_type": "sample"}
    ),
    "sd inpaint": Small("UNet2DConditionModel", LATENTS | {"in_channels": 9}, "EulerAncestralDiscreteScheduler"),
    "lcm": Small("UNet2DConditionModel", LATENTS | {"time_cond_proj_dim": 16}, "LCMScheduler"),
    "sdxl": Small("UNet2DConditionModel", SDXL, "EulerDiscreteScheduler", {}, "StableDiffusionXLPipeline"),
    "sd3": Small("SD3Transformer2DModel", SD3, FLOW, {"shift": 3.0}, "StableDiffusion3Pipeline"),
    "flux": Small("FluxTransformer2DModel", FLUX, FLOW, SHIFTED, "FluxPipeline"),
    "pixart": Small(
        "PixArtTransformer2DModel",
        PIXART | {"caption_channels": 24, "use_additional_conditions": False},
        "DPMSolverMultistepScheduler",
        {},
        "PixArtSigmaPipeline",
    ),
    "sana": Small(
        "SanaTransformer2DModel",
        SANA,
        "DPMSolverMultistepScheduler",
        {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0},
        "SanaPipeline",
    ),
    "aura": Small("AuraFlowTransformer2DModel", AURA, FLOW, {}, "AuraFlowPipeline"),
    "lumina": Small("Lumina2Transformer2DModel", LUMINA, FLOW, SHIFTED, "Lumina2Pipeline"),
    "qwen": Small("QwenImageTransformer2DModel", QWEN, FLOW, SHIFTED, "QwenImagePipeline"),
    "z image": Small("ZImageTransformer2DModel", Z_IMAGE, FLOW, {"shift": 3.0}, "ZImagePipeline"),
    "wan": Small(
        "WanTransformer3DModel",
        WAN,
        "UniPCMultistepScheduler",
        {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0},
        "WanPipeline",
    ),
    "dance": Small("UNet1DModel", WAVE, "IPNDMScheduler", {}, "DanceDiffusionPipeline"),
    "stable audio": Small(
        "StableAudioDiTModel",
        SOUND,
        "EDMDPMSolverMultistepScheduler",
        V | {"sigma_data": 1.0, "sigma_min": 0.3, "sigma_max": 500.0},
        "StableAudioPipeline",
    ),
}  # fmt: skip


WAN_VAE = {
    "base_dim": 8,
    "z_dim": 4,
    "dim_mult": [1, 1, 1, 1],
    "num_res_blocks": 1,
    "temperal_downsample": [False, True, True],
    "latents_mean": [0.0] * 4,
    "latents_std": [1.0] * 4,
}
T5 = {"vocab_size": 64, "d_model": 24, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
SPOKEN = ("<pad>", "</s>", "<unk>", "a", "fox", "runs", "red", "bicycle", "fog")


def save_wan(root: Path) -> Path:
    """A whole pipeline of video that runs: Wan with a tokenizer of a few words, a text encoder and a decoder."""
    small = PIPELINES["wan"]
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(SPOKEN)}, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        diffusers.WanPipeline(
            tokenizer=transformers.PreTrainedTokenizerFast(
                tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
            ),
            text_encoder=transformers.UMT5EncoderModel(transformers.UMT5Config(**T5)).eval(),
            vae=diffusers.AutoencoderKLWan(**WAN_VAE).eval(),
            scheduler=getattr(diffusers, small.scheduler)(**small.schedule),
            transformer=small.build(),
        ).save_pretrained(root)
    return root
