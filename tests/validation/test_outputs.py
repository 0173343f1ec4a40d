"""A model's outputs beside those with other weights: real models, and what is refused."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest
import torch

from arrow_quant_v2.calibration.runnable import Runnable
from arrow_quant_v2.calibration.sample import Sample
from arrow_quant_v2.calibration.samples import Asked, gather
from arrow_quant_v2.calibration.transformers_model import open_transformers
from arrow_quant_v2.errors import ValidationError
from arrow_quant_v2.sources.folder import open_model
from arrow_quant_v2.time_groups import uniform_groups
from arrow_quant_v2.validation.outputs import (
    compare_outputs,
    first_tensor,
    hidden_logits,
    model_outputs,
    other_values,
    replaced,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import SimpleNamespace

    from arrow_quant_v2.validation.outputs import OutputAccuracy


def opened(folder: Any, mask_token: int | None = None) -> Runnable:
    with open_model(folder) as model:
        return open_transformers(model, "text", mask_token)


def judged(made: Any, runnable: Runnable, count: int) -> OutputAccuracy:
    """The outputs of a quantized folder beside the original's, on its own trajectory."""
    samples = gather(runnable, Asked(count=count, seed=7)).calls
    groups = uniform_groups([sample.timestep for sample in samples], 3)
    reference = model_outputs(runnable, samples)
    with ExitStack() as stack:
        other = stack.enter_context(open_model(made.path))
        stack.enter_context(replaced(runnable, other_values(runnable, other.source)))
        outputs = model_outputs(runnable, samples)
    assert all(map(torch.equal, reference, model_outputs(runnable, samples))), "its own weights are back"
    return compare_outputs(reference, outputs, samples, groups)


def test_more_bits_are_closer_at_every_masked_fraction_of_a_real_model(quantized: Callable[[str, int], Any]) -> None:
    runnable = opened(quantized("antiberty", 2).original, mask_token=4)
    found = {bits: judged(quantized("antiberty", bits), runnable, 12) for bits in (2, 4, 8)}
    assert found[2].cosine < found[4].cosine < found[8].cosine
    assert found[8].cosine > 0.999
    assert found[8].error < 2e-3
    assert found[4].cosine > 0.93
    assert found[2].cosine < 0.75  # at 2 bits its losses are four times those of the original
    steps = zip(found[2].steps, found[8].steps, strict=True)
    assert [low.error > 10 * high.error for low, high in steps] == [True] * 3
    assert sum(step.samples for step in found[2].steps) == 12


def test_outputs_tell_what_weights_hide_on_a_real_encoder(quantized: Callable[[str, int], Any]) -> None:
    made = quantized("minilm", 2)
    found = judged(made, opened(made.original), 4)
    assert made.result["cosine_similarity"] > 0.9
    assert found.cosine < 0.75


def test_only_hidden_tokens_count_where_some_are_hidden() -> None:
    logits = torch.randn(1, 5, 7, generator=torch.Generator().manual_seed(0))
    (rows,) = model_outputs(speaking(logits), [shown([2, 4, 9, 4, 3])])
    assert torch.allclose(rows, logits[0, [1, 3]].softmax(dim=-1))
    assert torch.equal(hidden_logits(speaking(logits), [shown([2, 4, 9, 4, 3])])[0], logits[0, [1, 3]])
    (every,) = model_outputs(speaking(logits), [shown([2, 5, 9, 5, 3])])
    assert len(every) == 5


def test_a_shift_of_all_logits_is_no_difference() -> None:
    logits = torch.randn(1, 5, 7, generator=torch.Generator().manual_seed(0))
    samples = [shown([2, 4, 9, 4, 3])]
    pair = [model_outputs(speaking(one), samples) for one in (logits, logits + 3.0)]
    assert compare_outputs(pair[0], pair[1], samples).error < 1e-12


def test_padding_does_not_count() -> None:
    states = torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(0))
    sample = shown([2, 5, 0], attention_mask=torch.tensor([[1, 1, 0]]))
    (rows,) = model_outputs(speaking(states, mask=None, name="last_hidden_state"), [sample])
    assert torch.equal(rows, states[0, :2])


def test_the_first_floating_tensor_of_any_output_is_found() -> None:
    one = torch.ones(2, 3)
    for output in (one, (one, None), {"ids": torch.ones(1, dtype=torch.int64), "sample": one}, [[None, one]]):
        assert first_tensor(output) is one
    assert first_tensor(([one, one],)).shape == (2, 2, 3)  # type: ignore[union-attr]
    assert first_tensor((None, torch.ones(1, dtype=torch.int64), "text")) is None


def test_outputs_that_are_no_numbers_are_as_far_as_can_be() -> None:
    samples = [shown([4])]
    found = compare_outputs([torch.ones(1, 3)], [torch.full((1, 3), torch.nan)], samples)
    assert (found.cosine, found.error) == (0.0, float("inf"))
    with pytest.raises(ValidationError, match="the original's own outputs"):
        compare_outputs([torch.full((1, 3), torch.nan)], [torch.ones(1, 3)], samples)


def test_a_model_that_cannot_be_called_says_why() -> None:
    with pytest.raises(ValidationError, match=r"Speaker: its forward fails: TypeError.*--samples"):
        model_outputs(speaking(torch.ones(1)), [Sample(keywords={"colour": torch.ones(1)}, timestep=0.0)])


def test_weights_of_another_model_are_refused(quantized: Callable[[str, int], Any]) -> None:
    runnable = opened(quantized("antiberty", 4).original, mask_token=4)
    with (
        open_model(quantized("minilm", 4).path) as other,
        pytest.raises(ValidationError, match=r"give a copy of the same model"),
    ):
        other_values(runnable, other.source)


class Speaker(torch.nn.Module):
    """A model that always says the same."""

    def __init__(self, said: torch.Tensor, name: str) -> None:
        super().__init__()
        self.said, self.name = said, name

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> SimpleNamespace:
        from types import SimpleNamespace  # noqa: PLC0415

        return SimpleNamespace(**{self.name: self.said})


def speaking(said: torch.Tensor, mask: int | None = 4, name: str = "logits") -> Runnable:
    return Runnable(module=Speaker(said, name), modality="text", names={}, mask_token=mask)


def shown(ids: list[int], **more: torch.Tensor) -> Sample:
    return Sample(keywords={"input_ids": torch.tensor([ids]), **more}, timestep=0.5)
