"""Text from a masked diffusion model: everything behind a prompt is hidden, and uncovered step by step.

As calibration/unmasking.py does it: low-confidence remasking (LLaDA, arXiv 2502.09992), with the fading noise of
MaskGIT; all at once, or block by block from left to right. Models of block diffusion, which have no mask token, bring a
way of their own. Knows nothing of files.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

from arrow_quant_v2.calibration import chance
from arrow_quant_v2.calibration.tokens import LENGTH
from arrow_quant_v2.calibration.unmasking import NOISE, masked_model, revealed
from arrow_quant_v2.errors import ConfigurationError, QuantizationError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from arrow_quant_v2.calibration.runnable import Runnable
    from arrow_quant_v2.calibration.unmasking import MaskedModel

    Told = Callable[[int, int, str], object]

HIDDEN = "\u2591"  # stands in a text for a token that is not known yet
COOLING = (0.4, 0.8)  # last and first temperature of block diffusion, where generation_config.json names none


@dataclass(frozen=True, kw_only=True)
class GeneratedText:
    """What was written: the prompt with its continuation, or the answer; how many tokens, in how many steps."""

    text: str
    tokens: int
    steps: int


@dataclass(frozen=True, kw_only=True, eq=False)
class _Page:
    """A prompt with room behind it: ids (1, n), of which `first` to `last` are to be written.

    What is told begins at `shown`. At a token of `ends` the text is over.
    """

    ids: torch.Tensor
    first: int
    last: int
    shown: int
    ends: frozenset[int]

    @property
    def length(self) -> int:
        return self.last - self.first

    def end(self, ids: torch.Tensor) -> int:
        """Where the text ends, at the latest: behind everything, or at the first token that says so."""
        written = ids[0, self.first : self.last].tolist()
        return self.first + next((i for i, token in enumerate(written) if token in self.ends), self.length)


@dataclass(frozen=True, kw_only=True)
class _Step:
    """One step in the block of new tokens `first` to `last`, after which `hidden` of them are left.

    `left` is the share of the block's steps that are still to come.
    """

    first: int
    last: int
    hidden: int
    left: float


@torch.inference_mode()
def generate_text(
    runnable: Runnable,
    prompt: str,
    *,
    seed: int,
    steps: int | None,
    length: int | None,
    told: Told,
    temperature: float | None = None,
    block_length: int | None = None,
    chat: bool = False,
) -> GeneratedText:
    """Uncover `length` hidden tokens behind the prompt in `steps` steps, by default one for each token.

    temperature   of sampling, by default 1; 0 takes the likeliest token, of the surest places, without any chance
    block_length  tokens of a block: blocks are finished from left to right, and share the steps; None: one block
    chat          the prompt is a user's message in the tokenizer's chat template, and the text is the answer alone

    Where the tokenizer or the model names an end of a text (eos), the text ends there, and nothing behind is uncovered.
    `told` is called with (step, steps, text so far) after each one. The same seed gives the same text.

    Raises:
        ConfigurationError: the model hides no tokens, has no tokenizer or no chat template, or a number does not fit.
        QuantizationError: the model cannot be called, or gives no finite logits over its vocabulary.
    """
    heat = _allowed_temperature(temperature)
    model = _model(runnable)
    page = _page(model, runnable, prompt, length, chat=chat)
    model = replace(
        model, ordinary=model.ordinary.index_fill(0, torch.tensor(sorted(page.ends), dtype=torch.long), value=True)
    )
    steps = _allowed_steps(steps, page.length)
    plan = [*_plan(page.length, steps, _allowed_block(block_length, page.length, steps))]
    draw = chance.generator(seed, "text")
    ids, done = page.ids, 0
    for done, step in enumerate(plan, start=1):
        hidden, noise = torch.tensor([step.hidden]), NOISE * step.left
        ids = revealed(model, ids, hidden, noise, draw, temperature=heat, within=_within(page, step))
        told(done, steps, _spelled(runnable, model, page, ids))
        if not (ids[0, : page.end(ids)] == model.mask).any():
            break
    tokens = min(page.end(ids) + 1, page.last) - page.first
    return GeneratedText(text=_spelled(runnable, model, page, ids), tokens=tokens, steps=done)


def _plan(length: int, steps: int, block: int) -> Iterator[_Step]:
    """One step for each block, and the others shared among them by how many more tokens than one they have."""
    edges = [*range(0, length, block), length]
    spare, room = steps - (len(edges) - 1), max(length - (len(edges) - 1), 1)
    for number, (first, last) in enumerate(pairwise(edges)):
        before, after = first - number, last - number - 1
        own = 1 + round(spare * after / room) - round(spare * before / room)
        for step in range(1, own + 1):
            left = 1.0 - step / own
            yield _Step(first=first, last=last, hidden=round((last - first) * left), left=left)


def _within(page: _Page, step: _Step) -> torch.Tensor:
    places = torch.zeros(page.ids.shape, dtype=torch.bool)
    places[:, page.first + step.first : page.first + step.last] = True
    return places


# A way of its own


def in_blocks(runnable: Runnable) -> bool:
    """Whether the model denoises block by block by its own `generate`, as DiffusionGemma does."""
    return hasattr(runnable.module, "generate") and hasattr(runnable.module.config, "canvas_length")


def generate_blocks(
    runnable: Runnable,
    prompt: str,
    *,
    seed: int,
    steps: int | None,
    length: int | None,
    told: Told,
    temperature: float | None = None,
    block_length: int | None = None,
    chat: bool = False,
) -> GeneratedText:
    """At least `length` tokens behind the prompt, in whole blocks, or until the model ends the text.

    `steps` are those of one block at most; None: as generation_config.json has it. `temperature` is that of a block's
    first step, from which it falls by as much as the model's own does. Chat, `told` and the seed are as for
    `generate_text`.

    Raises:
        ConfigurationError: there is no tokenizer or chat template, or a number is not allowed.
        QuantizationError: the model fails.
    """
    if runnable.tokenizer is None:
        raise _without_tokenizer(runnable)
    if any(asked is not None and asked < 1 for asked in (length, steps)):
        raise ConfigurationError(f"length is {length} and steps is {steps}; allowed: 1 and more")
    if block_length is not None:
        module: Any = runnable.module
        own = module.config.canvas_length
        raise ConfigurationError(f"{type(module).__name__}: its blocks have {own} tokens; leave --block-length out")
    before = _chat(runnable, prompt) if chat else list(runnable.tokenizer(prompt)["input_ids"])
    shown = len(before) if chat else 0
    drafts = _Drafts(runnable.tokenizer, told, shown)
    wish: dict[str, Any] = {"max_new_tokens": length or LENGTH, "streamer": drafts, "disable_compile": True}
    wish |= _cooling(runnable, temperature) | ({} if steps is None else {"max_denoising_steps": steps})
    made = _own_generate(runnable, torch.tensor([before]), seed, wish)
    text = str(runnable.tokenizer.decode(made[shown:], skip_special_tokens=True))
    return GeneratedText(text=text, tokens=len(made) - len(before), steps=drafts.count)


def _cooling(runnable: Runnable, temperature: float | None) -> dict[str, float]:
    """First and last temperature of a block, in the proportion that the model has them."""
    if temperature is None:
        return {}
    name = type(runnable.module).__name__
    stated: Any = getattr(runnable.module, "generation_config", None)
    if stated is None or not hasattr(stated, "t_max"):
        raise ConfigurationError(f"{name}: its own generate takes no temperature; leave --temperature out")
    if _allowed_temperature(temperature) == 0:
        raise ConfigurationError(
            f"{name}: temperature is 0; allowed: more, because the model tells by it which tokens are sure already"
        )
    last, first = (stated.t_min, stated.t_max) if stated.t_min is not None and stated.t_max else COOLING
    return {"t_max": temperature, "t_min": temperature * last / first}


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

    def __init__(self, tokenizer: Any, told: Told, shown: int) -> None:
        self._tokenizer, self._told, self._shown = tokenizer, told, shown
        self._finished: list[int] = []
        self.count = 0

    def put(self, value: torch.Tensor) -> None:
        self._finished += value.flatten().tolist()

    def put_draft(self, value: torch.Tensor) -> None:
        self.count += 1
        ids = [*self._finished, *value.flatten().tolist()][self._shown :]
        self._told(self.count, self.count, str(self._tokenizer.decode(ids, skip_special_tokens=True)))

    def end(self) -> None:
        pass


# What is needed


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


def _page(model: MaskedModel, runnable: Runnable, prompt: str, length: int | None, *, chat: bool) -> _Page:
    """The prompt and `length` hidden tokens, with the special tokens around; a chat template brings its own."""
    around = model.vocabulary
    said = _chat(runnable, prompt) if chat else _tokens(runnable.tokenizer, prompt)
    if hidden := said.count(model.mask):
        raise ConfigurationError(
            f"the prompt has {hidden} hidden tokens; only what comes behind a prompt is uncovered: write them out"
        )
    before, after = (said, ()) if chat else ([*around.before, *said], around.after)
    length = _allowed_length(around.context, len(before) + len(after), len(said), length)
    return _Page(
        ids=torch.tensor([*before, *[model.mask] * length, *after], dtype=torch.long)[None],
        first=len(before),
        last=len(before) + length,
        shown=len(before) if chat else len(around.before),
        ends=_ends(model, runnable),
    )


def _ends(model: MaskedModel, runnable: Runnable) -> frozenset[int]:
    """Tokens with which a text ends: special ones that are named so, and do not stand around every text."""
    places = (runnable.tokenizer, *(getattr(runnable.module, name, None) for name in ("config", "generation_config")))
    stated = [getattr(place, "eos_token_id", None) for place in places]
    named = {token for one in stated for token in (one if isinstance(one, list) else [one]) if token is not None}
    around = {model.mask, *model.vocabulary.before, *model.vocabulary.after}
    return frozenset((named & model.vocabulary.special) - around)


def _chat(runnable: Runnable, prompt: str) -> list[int]:
    """The tokens of one message of a user, and what comes before the answer."""
    tokenizer, name = runnable.tokenizer, type(runnable.module).__name__
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigurationError(
            f"{name}: its tokenizer has no chat template (chat_template.jinja, or in tokenizer_config.json);"
            " leave --chat out, and give the words that it was trained to go on with"
        )
    if not prompt:
        raise ConfigurationError(f"{name}: a chat begins with a message; give one with --prompt")
    try:
        said = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=True, return_dict=True
        )
    except ImportError as error:
        raise ConfigurationError(f"{name}: a chat template needs jinja2: pip install jinja2") from error
    except Exception as error:  # whatever the template does
        raise ConfigurationError(
            f"{name}: the chat template of its tokenizer fails ({type(error).__name__}: {error}); leave --chat out"
        ) from error
    return _known(tokenizer, list(said["input_ids"]))


def _tokens(tokenizer: Any, prompt: str) -> list[int]:
    return _known(tokenizer, list(tokenizer(prompt, add_special_tokens=False)["input_ids"]) if prompt else [])


def _known(tokenizer: Any, ids: list[int]) -> list[int]:
    stranger: Any = getattr(tokenizer, "unk_token_id", None)
    if unknown := ids.count(stranger):
        raise ConfigurationError(
            f"the prompt has {unknown} parts, of {len(ids)}, that are not in the model's vocabulary; spell it as the"
            " model was trained to read it: in its letter case, with spaces between the letters of a protein"
        )
    return ids


# What is allowed


def _allowed_length(context: int | None, taken: int, prompt: int, length: int | None) -> int:
    """New tokens, where `taken` stand around them already, of which `prompt` are the prompt's."""
    room = LENGTH if context is None else context - taken
    asked = min(room, LENGTH) if length is None else length
    if asked < 1 or (context is not None and asked > room):
        raise ConfigurationError(
            f"length is {asked}; the model takes {context or 'any number of'} tokens, of which the prompt is"
            f" {prompt}: allowed is 1 to {max(room, 0) if context else 'any number'}"
        )
    return asked


def _allowed_steps(steps: int | None, length: int) -> int:
    if steps is not None and steps < 1:
        raise ConfigurationError(f"steps is {steps}; allowed: 1 and more (more than {length} uncover nothing more)")
    return min(steps or length, length)


def _allowed_block(block: int | None, length: int, steps: int) -> int:
    if block is not None and block < 1:
        raise ConfigurationError(f"block_length is {block}; allowed: 1 to {length}, or none for one block")
    if block is not None and (blocks := -(-length // block)) > steps:
        raise ConfigurationError(
            f"steps is {steps}, and {length} tokens are {blocks} blocks of {block}, which need a step each; give"
            f" --steps {blocks} or more, or a greater --block-length"
        )
    return min(block or length, length)


def _allowed_temperature(temperature: float | None) -> float:
    heat = 1.0 if temperature is None else float(temperature)
    if not (math.isfinite(heat) and heat >= 0):
        raise ConfigurationError(f"temperature is {temperature}; allowed: 0 (the likeliest tokens) and more")
    return heat


def _spelled(runnable: Runnable, model: MaskedModel, page: _Page, ids: torch.Tensor) -> str:
    """The text until its end, with a block for every hidden token, without the special tokens around it."""
    inner = ids[0, page.shown : page.end(ids)].tolist()
    if model.mask not in inner:
        return str(runnable.tokenizer.decode(inner))
    parts: list[list[int]] = [[]]
    for token in inner:
        parts[-1].append(token) if token != model.mask else parts.append([])
    return HIDDEN.join(str(runnable.tokenizer.decode(part)) if part else "" for part in parts)
