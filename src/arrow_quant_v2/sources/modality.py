"""What a model makes - text, code, image or audio - told from its own JSON files. Reads no weights."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from arrow_quant_v2.config import MODALITIES, Modality
from arrow_quant_v2.errors import SourceError
from arrow_quant_v2.sources.files import read_json

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


# Fragments of the names of classes and of model types, in small letters without "_" and "-". The first that
# fits decides: an encoder of text stands before "clip", the audio models before "ldm" and "dit".
FRAGMENTS: tuple[tuple[Modality, tuple[str, ...]], ...] = (
    ("text", ("cliptext", "diffusiongemma", "llada", "maskedlm", "causallm")),
    ("audio", (
        "audio", "music", "acestep", "dancediffusion", "spectrogram", "t5film", "unet1d", "transformer1d", "oobleck",
        "autoencodersame", "vocoder", "foley", "speech", "whisper", "wav2vec", "hubert", "encodec", "clapmodel",
        "hifigan", "vitsmodel", "barkmodel",
    )),
    ("image", (
        "unet2d", "unet3d", "unetmotion", "unetspatio", "unetmodel", "i2vgen", "uvit", "transformer2d", "transformer3d",
        "transformertemporal", "priortransformer", "image", "video", "animate", "dit", "pixart", "sd3", "flux", "sana",
        "stablediffusion", "stablecascade", "wuerstchen", "kandinsky", "unclip", "hunyuan", "cogview", "lumina",
        "auraflow", "ltx", "mochi", "allegro", "latte", "chroma", "omnigen", "cosmos", "bria", "anyflow", "consisid",
        "skyreels", "wanpipeline", "wanvace", "prx", "ovis", "helios", "ideogram", "kolors", "krea", "dreamlite",
        "autoencoder", "vqmodel", "ddpm", "ddim", "pndm", "ldm", "latentconsistency", "consistencymodel", "controlnet",
        "vqdiffusion", "marigold", "amused", "altdiffusion", "blipdiffusion", "unidiffuser", "versatilediffusion",
        "cyclediffusion", "paintbyexample", "piapipeline", "repaint", "scoresde", "karrasve", "ifpipeline", "ifimg",
        "ifinpaint", "ifsuper", "shapepipeline", "shapeimg", "visualcloze", "vitmodel", "vitfor", "clipvision", "dinov",
        "siglip",
    )),
    ("text", (
        "dream", "mdlm", "sedd", "bd3lm", "diffullama", "bert", "electra", "mpnet", "xlm", "llama", "qwen", "gemma",
        "mistral", "gpt2", "gptneo", "t5encoder", "t5for", "t5model",
    )),
)  # fmt: skip
CODE = re.compile(r"(?<!en)(?<!de)coder|(?<![a-z])code(?!c|book)", re.IGNORECASE)
WAY_OUT = 'set it with --modality (modality= in Python), or with {"modality": "..."} in metadata.json'


def detect_modality(root: Path, component: str) -> Modality:
    """What the model in `root` makes; `component` is that of `Model`: "" for a plain folder.

    Asks `metadata.json`, then `model_index.json`, then `config.json`, each beside the weights and in the root.

    Raises:
        SourceError: none of them tells, `metadata.json` says something else, or one is no JSON.
    """
    if stated := _stated(root / "metadata.json"):
        return stated
    classes = [*_pipeline_classes(root / "model_index.json", component), *_config_classes(root / component)]
    found = next((modality for name in classes if (modality := modality_of(name))), None)
    if found is None:
        seen = f"{', '.join(classes)} tell nothing" if classes else "no class name in model_index.json or config.json"
        raise SourceError(f"{root}: unknown modality ({seen}); {WAY_OUT}: {', '.join(MODALITIES)}")
    return "code" if found == "text" and _is_about_code(root, component) else found


def modality_of(class_name: str) -> Modality | None:
    """What a class or model type of this name makes; None where the table does not know it."""
    name = re.sub(r"[_-]", "", class_name).lower()
    return next((modality for modality, fragments in FRAGMENTS if any(f in name for f in fragments)), None)


def _object(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _stated(path: Path) -> Modality | None:
    stated = _object(path).get("modality")
    if stated is None:
        return None
    for modality in MODALITIES:
        if stated == modality:
            return modality
    raise SourceError(f"{path}: modality is {stated!r}; allowed are {', '.join(MODALITIES)}: correct it")


def _pipeline_classes(index: Path, component: str) -> Iterator[str]:
    """Class of the pipeline, then of the chosen component, then of what decodes its latents."""
    entries = _object(index)
    for key in ("_class_name", component, "vae", "vqvae", "movq"):
        entry = entries.get(key)
        name = entry[-1] if isinstance(entry, list) and entry else entry
        if isinstance(name, str):
            yield name


def _config_classes(folder: Path) -> Iterator[str]:
    config = _object(folder / "config.json")
    architectures = config.get("architectures")
    listed = architectures if isinstance(architectures, list) else []
    yield from (n for n in (config.get("_class_name"), *listed, config.get("model_type")) if isinstance(n, str))


def _is_about_code(root: Path, component: str) -> bool:
    """Whether the model's own names say so: DiffuCoder, Dream-Coder, code-...; not decoder, encoder or codec."""
    config = _object(root / component / "config.json")
    real = root.resolve()
    cached = real.parent.parent.name if real.parent.name == "snapshots" else ""
    origin = str(config.get("_name_or_path", ""))
    names = (real.name, cached, *origin.split("/")[-2:], *_config_classes(root / component))
    return any(CODE.search(name) for name in names)
