"""Tiny models of diffusers' and transformers' own classes, and what each is called with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import diffusers
import torch
import transformers
from small_pipelines import DIT, FLUX, LATENTS, PIXART, PIXELS, SANA, SD3, SOUND, WAN, WAVE

if TYPE_CHECKING:
    from pathlib import Path

SEVERAL = (1, 5, 24)  # text states for a model of images


@dataclass(frozen=True)
class LibraryModel:
    """A class, its configuration, and a call: shapes of normal tensors, and other arguments as they are."""

    name: str
    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    other: dict[str, Any] = field(default_factory=dict)
    modality: str = "image"

    @property
    def library(self) -> Any:
        return diffusers if hasattr(diffusers, self.name) else transformers

    @property
    def cls(self) -> Any:
        return getattr(self.library, self.name)

    def build(self) -> torch.nn.Module:
        """The module, the same each time, without the zeros that some classes begin with."""
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            if self.library is diffusers:
                module: torch.nn.Module = self.cls(**self.config)
            else:
                module = self.cls(self.cls.config_class(**self.config))
            for weight in module.parameters():
                if weight.ndim > 1:
                    weight.normal_(0, 0.05)
        return module.eval()

    def save(self, folder: Path) -> Path:
        """The folder, as the library writes it."""
        self.build().save_pretrained(folder)
        return folder

    def call(self, module: torch.nn.Module) -> torch.Tensor:
        """Its first output."""
        draw = torch.Generator().manual_seed(1)
        tensors = {name: torch.randn(shape, generator=draw) for name, shape in self.shapes.items()}
        with torch.no_grad():
            output = module(**tensors, **self.other)
        first = output[0] if isinstance(output, tuple) else next(iter(output.values()))
        assert isinstance(first, torch.Tensor)
        return first


IDS = {"input_ids": torch.arange(5, 25)[None]}
TEXT = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GEMMA_TEXT = TEXT | {
    "num_key_value_heads": 1,
    "head_dim": 16,
    "global_head_dim": 16,
    "num_experts": 4,
    "top_k_experts": 2,
    "moe_intermediate_size": 32,
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention"],
}
GEMMA_SIGHT = {
    "model_type": "gemma4_vision",
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "global_head_dim": 16,
    "position_embedding_size": 16,
}
STEP = {"timestep": torch.tensor([10.0])}
WHOLE_STEP = {"timestep": torch.tensor([10])}
LIBRARY_MODELS = (
    LibraryModel("UNet2DModel", PIXELS, {"sample": (1, 3, 16, 16)}, {"timestep": 10}),
    LibraryModel(
        "UNet2DConditionModel",
        LATENTS,
        {"sample": (1, 4, 16, 16), "encoder_hidden_states": SEVERAL},
        {"timestep": 10},
    ),
    LibraryModel(
        "DiTTransformer2DModel", DIT, {"hidden_states": (1, 4, 8, 8)}, WHOLE_STEP | {"class_labels": torch.tensor([3])}
    ),
    LibraryModel(
        "PixArtTransformer2DModel",
        PIXART | {"caption_channels": 24, "use_additional_conditions": False},
        {"hidden_states": (1, 4, 8, 8), "encoder_hidden_states": SEVERAL},
        STEP | {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}},
    ),
    LibraryModel(
        "SD3Transformer2DModel",
        SD3,
        {"hidden_states": (1, 4, 8, 8), "encoder_hidden_states": SEVERAL, "pooled_projections": (1, 20)},
        STEP,
    ),
    LibraryModel(
        "FluxTransformer2DModel",
        FLUX,
        {"hidden_states": (1, 16, 16), "encoder_hidden_states": SEVERAL, "pooled_projections": (1, 20)},
        {
            "timestep": torch.tensor([0.5]),
            "guidance": torch.tensor([3.5]),
            "img_ids": torch.arange(48.0).reshape(16, 3),
            "txt_ids": torch.zeros(5, 3),
        },
    ),
    LibraryModel(
        "SanaTransformer2DModel", SANA, {"hidden_states": (1, 4, 8, 8), "encoder_hidden_states": SEVERAL}, STEP
    ),
    LibraryModel(
        "WanTransformer3DModel", WAN, {"hidden_states": (1, 4, 2, 8, 8), "encoder_hidden_states": SEVERAL}, STEP
    ),
    LibraryModel(
        "StableAudioDiTModel",
        SOUND,
        {
            "hidden_states": (1, 4, 16),
            "encoder_hidden_states": SEVERAL,
            "global_hidden_states": (1, 1, 48),
        },
        {"timestep": torch.tensor([0.5])},
        "audio",
    ),
    LibraryModel("UNet1DModel", WAVE, {"sample": (1, 2, 64)}, {"timestep": 10}, "audio"),
    LibraryModel(
        "AutoencoderKL",
        {"block_out_channels": (8, 16), "norm_num_groups": 4, "latent_channels": 4, "layers_per_block": 1}
        | {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2},
        {"sample": (1, 3, 16, 16)},
    ),
    LibraryModel("BertForMaskedLM", TEXT, {}, IDS, "text"),
    LibraryModel(
        "ModernBertForMaskedLM", TEXT | {"cls_token_id": 1, "sep_token_id": 2, "local_attention": 16}, {}, IDS, "text"
    ),
    LibraryModel("Qwen2ForCausalLM", TEXT | {"num_key_value_heads": 1}, {}, IDS | {"use_cache": False}, "text"),
    LibraryModel(
        "DiffusionGemmaForBlockDiffusion",
        {"text_config": GEMMA_TEXT, "vision_config": GEMMA_SIGHT, "canvas_length": 8},
        {},
        IDS | {"decoder_input_ids": torch.arange(30, 38)[None]},
        "text",
    ),
)
BY_NAME = {model.name: model for model in LIBRARY_MODELS}
