"""Text from a masked diffusion model: everything behind a prompt is hidden, and uncovered step by step.

As calibration/unmasking.py does it: low-confidence remasking (LLaDA, arXiv 2502.09992) at temperature 1, with the
fading noise of MaskGIT. Models of block diffusion, which have no mask token, bring a way of their own. Knows nothing of
files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from arrow_quant_v2.calibration import chance
from arrow_quant_v2.calibration.tokens import LENGTH
from arrow_quant_v2.calibration.unmasking import NOISE, masked_model, revealed
from arrow_quant_v2.errors import ConfigurationError, QuantizationError

if TYPE_CHECKING:
    from collections.abc import Callable

    from arrow_quant_v2.calibration.runnable import Runnable
    from arrow_quant_v2.calibration.unmasking import MaskedModel

    Told = Callable[[int, int, str], object]

HIDDEN = "\u2591"  # stands in a text for a token that is not known yet


@dataclass(frozen=True, kw_only=True)
class GeneratedText:
    """What was written: the prompt with its continuation, and how many tokens were uncovered in how many steps."""

    text: str
    tokens: int
    steps: int


@torch.inference_mode()
def generate_text(
    runnable: Runnable, prompt: str, *, seed: int, steps: int | None, length: int | None, told: Told
) -> GeneratedText:
    """Uncover `length` hidden tokens behind the prompt in `steps` steps, by default one for each token.

    `told` is called with (step, steps, text so far) after each one. The same seed gives the same text.

    Raises:
        ConfigurationError: the model hides no tokens, has no tokenizer, or the length or the steps do not fit.
        QuantizationError: the model cannot be called, or gives no finite logits over its vocabulary.
    """
    model = _model(runnable)
    ids, length = _start(model, runnable, prompt, length)
    steps = _allowed_steps(steps, length)
    draw = chance.generator(seed, "text")
    shown = _spelled(runnable, model, ids)
    for step in range(1, steps + 1):
        hidden = torch.tensor([round(length * (1.0 - step / steps))])
        ids = revealed(model, ids, hidden, NOISE * (1.0 - step / steps), draw)
        shown = _spelled(runnable, model, ids)
        told(step, steps, shown)
    return GeneratedText(text=shown, tokens=length, steps=steps)


def in_blocks(runnable: Runnable) -> bool:
    """Whether the model denoises block by block by its own `generate`, as DiffusionGemma does."""
    return hasattr(runnable.module, "generate") and hasattr(runnable.module.config, "canvas_length")


def generate_blocks(
    runnable: Runnable, prompt: str, *, seed: int, steps: int | None, length: int | None, told: Told
) -> GeneratedText:
    """At least `length` tokens behind the prompt, in whole blocks, or until the model ends the text.

    `steps` are those of one block at most; None: as generation_config.json has it. `told` and the seed are as for
    `generate_text`.

    Raises:
        ConfigurationError: there is no tokenizer, or the length or the steps are not allowed.
        QuantizationError: the model fails.
    """
    if runnable.tokenizer is None:
        raise _without_tokenizer(runnable)
    ids = torch.tensor([runnable.tokenizer(prompt)["input_ids"]])
    if any(asked is not None and asked < 1 for asked in (length, steps)):
        raise ConfigurationError(f"length is {length} and steps is {steps}; allowed: 1 and more")
    drafts = _Drafts(runnable.tokenizer, told)
    wish = {"max_new_tokens": length or LENGTH} | ({} if steps is None else {"max_denoising_steps": steps})
    made = _own_generate(runnable, ids, seed, wish | {"streamer": drafts, "disable_compile": True})
    text = str(runnable.tokenizer.decode(made, skip_special_tokens=True))
    return GeneratedText(text=text, tokens=len(made) - ids.shape[1], steps=drafts.count)


def _own_generate(runnable: Runnable, ids: torch.Tensor, seed: int, asked: dict[str, Any]) -> list[int]:
    module: Any = runnable.module
    try:
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(seed)
            output = module.generate(ids.to(module.device), **asked)
    except (TypeError, ValueError, AttributeError, KeyError, IndexError, RuntimeError) as error:
        raise QuantizationError(f"{type(module).__name__}: its generate fails: {error}") from error
    found: list[int] = getattr(output, "sequences", output)[0].tolist()
    return found


class _Drafts:
    """What `generate` of transformers tells: the prompt and finished blocks by `put`, drafts by `put_draft`."""

    def __init__(self, tokenizer: Any, told: Told) -> None:
        self._tokenizer, self._told = tokenizer, told
        self._finished: list[int] = []
        self.count = 0

    def put(self, value: torch.Tensor) -> None:
        self._finished += value.flatten().tolist()

    def put_draft(self, value: torch.Tensor) -> None:
        self.count += 1
        ids = [*self._finished, *value.flatten().tolist()]
        self._told(self.count, self.count, str(self._tokenizer.decode(ids, skip_special_tokens=True)))

    def end(self) -> None:
        pass


def _model(runnable: Runnable) -> MaskedModel:
    name = type(runnable.module).__name__
    if runnable.mask_token is None:
        raise ConfigurationError(
            f"{name}: has no mask token, so it uncovers no text; a masked diffusion model is needed whose tokenizer or"
            " config.json (mask_token_id) names it"
        )
    if runnable.tokenizer is None:
        raise _without_tokenizer(runnable)
    return masked_model(runnable)


def _without_tokenizer(runnable: Runnable) -> ConfigurationError:
    return ConfigurationError(
        f"{type(runnable.module).__name__}: no tokenizer lies beside its weights; put its files (tokenizer.json or"
        " vocab.txt) into the folder"
    )


def _start(model: MaskedModel, runnable: Runnable, prompt: str, length: int | None) -> tuple[torch.Tensor, int]:
    """Ids (1, n): the prompt and `length` hidden tokens, with the special tokens around; and that length."""
    before = _tokens(runnable.tokenizer, prompt)
    context = model.vocabulary.context
    room = LENGTH if context is None else context - model.vocabulary.around - len(before)
    asked = min(room, LENGTH) if length is None else length
    if asked < 1 or (context is not None and asked > room):
        raise ConfigurationError(
            f"length is {asked}; the model takes {context or 'any number of'} tokens, of which the prompt is"
            f" {len(before)}: allowed is 1 to {max(room, 0) if context else 'any number'}"
        )
    inner = torch.tensor([*before, *[model.mask] * asked], dtype=torch.long)[None]
    return model.vocabulary.wrapped(inner), asked


def _tokens(tokenizer: Any, prompt: str) -> list[int]:
    ids = list(tokenizer(prompt, add_special_tokens=False)["input_ids"]) if prompt else []
    unknown = ids.count(getattr(tokenizer, "unk_token_id", None))
    if unknown:
        raise ConfigurationError(
            f"the prompt has {unknown} parts, of {len(ids)}, that are not in the model's vocabulary; spell it as the"
            " model was trained to read it: in its letter case, with spaces between the letters of a protein"
        )
    return ids


def _allowed_steps(steps: int | None, length: int) -> int:
    if steps is not None and steps < 1:
        raise ConfigurationError(f"steps is {steps}; allowed: 1 and more (more than {length} uncover nothing more)")
    return min(steps or length, length)


def _spelled(runnable: Runnable, model: MaskedModel, ids: torch.Tensor) -> str:
    """The text, with a block for every hidden token, without the special tokens around it."""
    around = model.vocabulary
    inner = ids[0, len(around.before) : ids.shape[1] - len(around.after)].tolist()
    if model.mask not in inner:
        return str(runnable.tokenizer.decode(inner))
    parts: list[list[int]] = [[]]
    for token in inner:
        parts[-1].append(token) if token != model.mask else parts.append([])
    return HIDDEN.join(str(runnable.tokenizer.decode(part)) if part else "" for part in parts)
