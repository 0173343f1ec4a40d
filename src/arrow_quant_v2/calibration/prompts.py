"""What the text encoders of a pipeline say of plain prompts; knows nothing of the denoiser's other arguments."""

from __future__ import annotations

import inspect
import logging
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from arrow_quant_v2.calibration.pipelines import installed
from arrow_quant_v2.engines.one_core import each_on_one_core
from arrow_quant_v2.errors import QuantizationError
from arrow_quant_v2.sources.files import read_json
from arrow_quant_v2.sources.folder import PIPELINE

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import nn

    from arrow_quant_v2.config import Modality

    Encoded = tuple[torch.Tensor, ...]

PICTURES = (
    "a red bicycle leaning against a brick wall",
    "a bowl of oranges on a wooden table, morning light",
    "portrait of an old fisherman with a white beard",
    "an empty street at night after the rain, neon signs",
    "a snowy mountain behind a calm lake",
    "two children flying a kite on the beach",
    "a watercolor painting of a fox in a forest",
    "a cup of coffee seen from above",
    "a small white church on a green hill",
    "an astronaut riding a horse, oil painting",
    "a black cat asleep on a stack of books",
    "a market stall full of fish and ice",
    "the word OPEN on a blue wooden sign",
    "a glass skyscraper reflecting clouds",
    "a steam train crossing a stone bridge",
    "pencil sketch of a dancer",
)
SOUNDS = (
    "rain on a tin roof, distant thunder",
    "a slow piano melody in a minor key",
    "a dog barks twice in a large hall",
    "upbeat electronic dance music, 128 beats per minute",
    "footsteps on gravel",
    "a woman humming a lullaby",
    "acoustic guitar and soft brushes on a drum",
    "waves breaking on a beach, seagulls",
)
PROMPTS: Mapping[Modality, Sequence[str]] = {"audio": SOUNDS, "image": PICTURES, "text": PICTURES, "code": PICTURES}
SECONDS = 10.0  # of sound that a model which asks for it is told to make


def encode(module: nn.Module, prompts: Sequence[str]) -> list[Encoded]:
    """What the text encoders that lie beside `module` say of each prompt: states, pooled states and masks, in float32.

    Raises:
        QuantizationError: there are none, they cannot be loaded, or they say something that is no finite number.
    """
    folder = Path(str(dict(getattr(module, "config", {})).get("_name_or_path", "")))
    if not (folder.parent / PIPELINE).is_file():
        raise QuantizationError("no pipeline lies around the model")
    try:
        with quietly(), torch.random.fork_rng(devices=[]):
            pipeline = _text_pipeline(folder.parent, folder.name, module)
            # All in one piece: a tokenizer keeps its padding in itself while it works, so it serves one thread.
            (said,) = each_on_one_core(lambda texts: _all_said(pipeline, texts), [prompts])
    except QuantizationError:
        raise
    except Exception as error:  # tokenizers raise it bare
        first_line = str(error).strip().partition("\n")[0][:200]
        raise QuantizationError(f"its text encoders cannot be run ({type(error).__name__}: {first_line})") from error
    if not all(t.isfinite().all() for tensors in said for t in tensors):
        raise QuantizationError("its text encoders said something that is no finite number")
    return _with_zeros(folder.parent, prompts, said)


def _text_pipeline(root: Path, component: str, module: nn.Module) -> Any:
    """The pipeline with its tokenizers and text encoders alone: for its own way of encoding a prompt."""
    diffusers, index = installed("diffusers"), read_json(root / PIPELINE)
    name = index.get("_class_name")
    build = getattr(diffusers, name) if isinstance(name, str) and name in diffusers.__all__ else None
    if not (isinstance(build, type) and issubclass(build, diffusers.DiffusionPipeline)):
        raise QuantizationError(f"{name!r} is no pipeline of diffusers")
    parts = {name: _part(root / name, entry) for name, entry in index.items() if _is_of_text(name, entry)}
    if not parts:
        raise QuantizationError("no text encoder lies in the pipeline")
    # Some pipelines ask their transformer for its width; some correct the config of their unet, which is ours.
    known: dict[str, Any] = parts | ({} if component == "unet" else {component: module})
    given = {p.name: known.get(p.name, _setting(p)) for p in _parameters(build)}
    return build(**given)


def _is_of_text(name: str, entry: object) -> bool:
    return (
        isinstance(entry, list)
        and all(isinstance(part, str) for part in entry)
        and name.startswith(("tokenizer", "text_encoder", "projection_model"))
    )


def _part(folder: Path, entry: Sequence[str]) -> Any:
    """A tokenizer or encoder, of a class of transformers or diffusers alone."""
    package = installed("transformers" if entry[0] == "transformers" else "diffusers")
    build = getattr(package, entry[1], None)
    if not (isinstance(build, type) and hasattr(build, "from_pretrained") and folder.is_dir()):
        raise QuantizationError(f"{folder.name} is {entry}, which is no class of transformers or diffusers")
    if "tokenizer" in folder.name:
        return build.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if entry[0] == "transformers":
        options: dict[str, Any] = {"dtype": torch.float32, "trust_remote_code": False}
    else:
        options = {"torch_dtype": torch.float32}
    return build.from_pretrained(folder, local_files_only=True, **options).eval()


def _setting(parameter: inspect.Parameter) -> object:
    if parameter.default is parameter.empty:
        return None
    return False if parameter.name == "requires_safety_checker" else parameter.default


def _all_said(pipeline: Any, prompts: Sequence[str]) -> list[Encoded]:
    with torch.no_grad():  # which holds for the thread that says it
        return [_said(pipeline, prompt) for prompt in prompts]


def _said(pipeline: Any, prompt: str) -> Encoded:
    known = {
        "prompt": prompt,
        "device": torch.device("cpu"),
        "do_classifier_free_guidance": False,
        "num_images_per_prompt": 1,
        "num_videos_per_prompt": 1,
    }
    asked = {
        p.name: known.get(p.name)
        for p in _parameters(pipeline.encode_prompt)
        if p.name in known or p.default is p.empty
    }
    said = pipeline.encode_prompt(**asked)
    tensors = (said,) if isinstance(said, torch.Tensor) else tuple(t for t in said if isinstance(t, torch.Tensor))
    if hasattr(pipeline, "encode_duration"):
        start, end = pipeline.encode_duration(0.0, SECONDS, torch.device("cpu"), False, 1)  # noqa: FBT003
        tensors = (torch.cat([tensors[0], start, end], dim=1), torch.cat([start, end], dim=2))
    return tuple(t.float() if t.is_floating_point() else t for t in tensors)


def _parameters(function: Any) -> Iterator[inspect.Parameter]:
    found = inspect.signature(function).parameters.values()
    yield from (p for p in found if p.kind is p.POSITIONAL_OR_KEYWORD and p.name != "self")


def _with_zeros(root: Path, prompts: Sequence[str], said: list[Encoded]) -> list[Encoded]:
    """Zeros for the empty prompt, where the pipeline says that it was trained so."""
    if not read_json(root / PIPELINE).get("force_zeros_for_empty_prompt"):
        return said
    return [
        tensors if prompt else tuple(torch.zeros_like(t) if t.is_floating_point() else t for t in tensors)
        for prompt, tensors in zip(prompts, said, strict=True)
    ]


@contextmanager
def quietly() -> Iterator[None]:
    """No progress bars and no advice from the libraries while a person waits for our own."""
    packages = [installed(f"{name}.utils.logging") for name in ("transformers", "diffusers")]
    before = [(p.get_verbosity(), p.is_progress_bar_enabled()) for p in packages]
    try:
        for package in packages:
            package.set_verbosity(logging.ERROR)
            package.disable_progress_bar()
        yield
    finally:
        for package, (verbosity, bar) in zip(packages, before, strict=True):
            package.set_verbosity(verbosity)
            (package.enable_progress_bar if bar else package.disable_progress_bar)()
