"""A masked model's own trajectory: what is generated, what it leaves behind, and what it never does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from text_models import opened, same_calls, small_module

from arrow_quant_v2.calibration.runnable import Runnable
from arrow_quant_v2.calibration.tokens import vocabulary_of
from arrow_quant_v2.calibration.unmasking import _schedule, generate, own_trajectory
from arrow_quant_v2.errors import QuantizationError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from arrow_quant_v2.calibration.sample import Sample

MASK = 4


def rows_of(calls: Sequence[Sample]) -> list[torch.Tensor]:
    """Every sequence (length,) of all calls."""
    return [ids for call in calls for ids in call.keywords["input_ids"]]  # type: ignore[attr-defined]


def hidden_part(ids: torch.Tensor) -> float:
    return float((ids == MASK).sum() / len(ids))


@pytest.mark.parametrize("count", [1, 2, 7, 32])
def test_times_are_stratified(masked: Runnable, count: int) -> None:
    rows = rows_of(own_trajectory(masked, count, seed=1, length=40))
    assert len(rows) == count
    for i, time in enumerate(sorted(hidden_part(ids) for ids in rows)):
        # up to one token more than the time asked for, and never the special tokens
        assert i / count * 0.9 < time <= (i + 1) / count + 1 / 20


def test_the_timestep_is_the_masked_fraction_of_what_is_shown_together(masked: Runnable) -> None:
    calls = own_trajectory(masked, 64, seed=1, length=40)
    assert 16 <= len(calls) < 64 <= len(rows_of(calls))
    for call in calls:
        parts = [hidden_part(ids) for ids in rows_of([call])]
        assert call.timestep == pytest.approx(sum(parts) / len(parts), abs=1e-6)
        assert max(parts) - min(parts) < 0.5
        assert 20 <= call.keywords["input_ids"].shape[1] <= 40  # type: ignore[attr-defined]
        assert call.keywords["attention_mask"].shape == call.keywords["input_ids"].shape  # type: ignore[attr-defined]


def test_special_tokens_stand_around_a_sequence_and_never_inside(masked: Runnable) -> None:
    vocabulary = vocabulary_of(masked)
    assert (vocabulary.before, vocabulary.after) == ((2,), (3,))
    assert {0, 1, 2, 3, 4} < vocabulary.special  # and the rows of the embedding that no token has
    for row in rows_of(own_trajectory(masked, 12, seed=1, length=40)):
        ids = row.tolist()
        assert (ids[0], ids[-1]) == (2, 3)
        assert not set(ids[1:-1]) & (vocabulary.special - {MASK})


def test_without_a_tokenizer_only_the_mask_token_is_known(bare: Runnable) -> None:
    _, finished = generate(bare, [0.5] * 40, seed=0, length=64)
    seen = {token for ids in finished for token in ids.tolist()}
    assert MASK not in seen
    assert seen & {0, 1, 2, 3}


def test_a_state_lies_on_the_way_to_its_finished_sequence(masked: Runnable) -> None:
    times = [0.05, 0.2, 0.4, 0.6, 0.8, 0.95, 1.0]
    for time, state, finished in zip(times, *generate(masked, times, seed=3, length=50), strict=True):
        hidden = state == MASK
        assert torch.equal(state[~hidden], finished[~hidden])
        assert not (finished == MASK).any()
        assert abs(int(hidden.sum()) - time * len(state)) < 2.5  # one for rounding; at 1.0 the two special ones


def test_finished_sequences_differ(masked: Runnable) -> None:
    _, finished = generate(masked, [0.5] * 12, seed=3, length=50)
    assert len({tuple(ids.tolist()) for ids in finished}) == 12
    assert len({len(ids) for ids in finished}) == 3


@given(inner=st.integers(1, 200), steps=st.integers(1, 40), data=st.data())
def test_schedules_go_from_all_to_none_by_way_of_what_is_wanted(inner: int, steps: int, data: st.DataObject) -> None:
    wanted = data.draw(st.integers(1, inner))
    hidden = _schedule(inner, torch.tensor([wanted]), steps)[:, 0].tolist()
    assert (hidden[0], hidden[-1], len(hidden)) == (inner, 0, steps + 1)
    assert hidden == sorted(hidden, reverse=True)
    assert wanted in hidden or steps == 1


@pytest.mark.usefixtures("torch_threads")
def test_the_number_of_threads_changes_nothing(bare: Runnable) -> None:
    found = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        found.append(own_trajectory(bare, 16, seed=5, length=40))
    assert all(same_calls(found[0], other) for other in found[1:])


def test_the_same_seed_gives_the_same_samples_and_another_gives_others(bare: Runnable) -> None:
    first, again, other = (own_trajectory(bare, 8, seed=seed, length=40) for seed in (5, 5, 6))
    assert same_calls(first, again)
    assert not same_calls(first, other)


def test_samples_carry_no_gradients(bare: Runnable) -> None:
    call = own_trajectory(bare, 1, seed=5, length=40)[0]
    assert not rows_of([call])[0].is_inference()
    assert bare.module(**call.keywords).logits.requires_grad is False


def test_a_length_is_cut_to_what_the_model_can_read(masked: Runnable) -> None:
    assert max(len(ids) for ids in rows_of(own_trajectory(masked, 8, seed=0, length=500))) <= 64


@pytest.mark.parametrize(("steps", "length"), [(1, 40), (2, 40), (50, 8), (16, 1), (16, 3)])
def test_any_number_of_steps_and_tokens_will_do(masked: Runnable, steps: int, length: int) -> None:
    calls = own_trajectory(masked, 9, seed=0, steps=steps, length=length)
    assert len(rows_of(calls)) == 9
    assert all(0 < call.timestep <= 1 for call in calls)


# What cannot have one


class Failing(torch.nn.Module):
    """A model whose forward does one thing."""

    def __init__(self, result: Any) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(40, 4, device="meta")
        self.result = result

    def get_input_embeddings(self) -> torch.nn.Embedding:
        return self.embedding

    def forward(self, input_ids: torch.Tensor) -> Any:
        return self.result(input_ids)


def failing(result: Any) -> Runnable:
    return Runnable(module=Failing(result), modality="text", names={}, mask_token=MASK)


def raising(_: torch.Tensor) -> None:
    raise KeyError("species")


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (
            raising,
            r"Failing: its forward fails on \(1, \d+\) masked tokens: KeyError: 'species'; give calibration data",
        ),
        (lambda ids: torch.full((*ids.shape, 40), torch.nan), "its logits for masked tokens are not finite"),
        (lambda ids: torch.zeros(*ids.shape, 16), r"gives \(1, \d+, 16\); logits \(1, \d+, 40\) are needed"),
        (lambda ids: torch.zeros(len(ids), 40), r"gives \(1, 40\); logits"),
        (lambda _: None, "gives NoneType; logits"),
    ],
)
def test_a_model_that_gives_no_logits_is_a_clear_error(result: Any, message: str) -> None:
    with pytest.raises(QuantizationError, match=message):
        own_trajectory(failing(result), 1, seed=0, length=8)


def test_plain_tensors_and_tuples_are_logits_too() -> None:
    for result in (lambda ids: torch.zeros(*ids.shape, 40), lambda ids: (torch.zeros(*ids.shape, 40), None)):
        assert len(rows_of(own_trajectory(failing(result), 2, seed=0, length=8))) == 2


def test_without_a_mask_token_there_is_no_trajectory(encoder: Runnable) -> None:
    with pytest.raises(QuantizationError, match="BertModel: has no mask token"):
        own_trajectory(encoder, 4, seed=0)


def test_a_model_of_something_else_has_no_tokens() -> None:
    runnable = Runnable(module=torch.nn.Linear(2, 2, device="meta"), modality="image", names={}, mask_token=0)
    with pytest.raises(QuantizationError, match="Linear: has no embedding of tokens"):
        own_trajectory(runnable, 4, seed=0)


def test_a_vocabulary_of_special_tokens_alone_generates_nothing() -> None:
    runnable = Runnable(module=small_module("BertForMaskedLM", vocab_size=1), modality="text", names={}, mask_token=0)
    with pytest.raises(QuantizationError, match="no token but special ones"):
        own_trajectory(runnable, 4, seed=0)


# The real one


def test_antiberty_writes_antibodies(antiberty: Path) -> None:
    letters = (antiberty.parent / "vocab.txt").read_text().split()
    _, finished = generate(opened(antiberty, mask_token=MASK), [0.5] * 4, seed=0, length=120)
    chains = ["".join(letters[i] for i in ids.tolist()) for ids in finished]
    # the conserved ends of the variable domain's framework regions 2 and 3
    assert all("YYC" in chain for chain in chains), chains
    assert any("WYQQ" in chain or "WVRQAPG" in chain for chain in chains), chains
