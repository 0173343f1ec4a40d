"""Files and functions that a person gives, as calls of a text model and of a model of images."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file
from text_models import ids_of, image_model, same_calls

from arrow_quant_v2.calibration.given import from_callable, from_file
from arrow_quant_v2.errors import ConfigurationError, SourceError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from arrow_quant_v2.calibration.runnable import Runnable
    from arrow_quant_v2.calibration.sample import Sample

MASK = 4
TEXTS = [{"text": "the sea was calm and a white whale rose"}, {"text": "slowly from deep water near our ship"}]
INPUT = {"data": [0.5] * 12, "shape": [1, 3, 2, 2], "timestep": 250}


# Text models


def test_texts_are_masked_at_times_from_all_over(masked: Runnable, jsonl: Callable[..., Path]) -> None:
    calls = from_file(masked, jsonl(*TEXTS), 20, seed=0).calls
    assert len(calls) == 20
    for i, time in enumerate(sorted(call.timestep for call in calls)):
        assert min(i / 20, 0.75) <= time <= (i + 1) / 20 + 0.15
    clean = {tuple(masked.tokenizer(row["text"])["input_ids"]) for row in TEXTS}
    for call in calls:
        ids = ids_of(call).tolist()
        (whole,) = [text for text in clean if len(text) == len(ids)]
        assert all(found in {MASK, token} for found, token in zip(ids, whole, strict=True))
        assert (ids[0], ids[-1]) == (2, 3)
        assert call.timestep == ids.count(MASK) / len(ids)


@pytest.mark.parametrize("key", ["text", "prompt"])
def test_a_prompt_is_a_text_to_a_text_model(key: str, encoder: Runnable, jsonl: Callable[..., Path]) -> None:
    (call,) = from_file(encoder, jsonl({key: "a white whale"}), 4, seed=0).calls
    assert ids_of(call).tolist() == encoder.tokenizer("a white whale")["input_ids"]
    assert call.timestep == 0.0


@pytest.mark.parametrize("key", ["input_ids", "tokens"])
def test_token_ids_need_no_tokenizer(key: str, bare: Runnable, jsonl: Callable[..., Path]) -> None:
    calls = from_file(bare, jsonl({key: list(range(10, 20))}), 6, seed=0).calls
    assert len(calls) == 6
    for call in calls:
        ids = ids_of(call)
        assert torch.equal(ids[ids != MASK], torch.arange(10, 20)[ids != MASK])


def test_without_masks_texts_are_shown_once_and_as_they_are(encoder: Runnable, jsonl: Callable[..., Path]) -> None:
    calls = from_file(encoder, jsonl(*TEXTS), 20, seed=0).calls
    assert [ids_of(call).tolist() for call in calls] == [encoder.tokenizer(t["text"])["input_ids"] for t in TEXTS]


def test_sequences_with_mask_tokens_are_shown_as_they_are(masked: Runnable, jsonl: Callable[..., Path]) -> None:
    state = [2, 9, MASK, MASK, 10, 3]
    calls = from_file(masked, jsonl({"tokens": state}, TEXTS[0]), 5, seed=0).calls
    assert ids_of(calls[0]).tolist() == state
    assert calls[0].timestep == 2 / 6
    assert len(calls) == 5


def test_texts_are_cut_to_what_the_model_can_read(encoder: Runnable, jsonl: Callable[..., Path]) -> None:
    (call,) = from_file(encoder, jsonl({"text": "whale " * 500}), 4, seed=0).calls
    assert len(ids_of(call)) == 64
    (call,) = from_file(encoder, jsonl({"text": "whale " * 500}), 4, seed=0, length=10).calls
    assert len(ids_of(call)) == 10
    assert ids_of(call)[-1] == 3


def test_few_texts_are_shown_a_few_times_however_many_tokens_are_asked_for(
    masked: Runnable, jsonl: Callable[..., Path]
) -> None:
    given = from_file(masked, jsonl(*TEXTS), 8, seed=0, tokens=32_768)
    assert len(given.calls) == 2 * 32
    (note,) = given.notes
    assert "2 sequences of" in note
    assert "shown 64 times in all, which is less than the 32,768 tokens asked for" in note


def test_more_samples_than_that_are_shown_where_they_are_asked_for(
    masked: Runnable, jsonl: Callable[..., Path]
) -> None:
    assert len(from_file(masked, jsonl(*TEXTS), 70, seed=0, tokens=32_768).calls) == 70
    assert from_file(masked, jsonl(*TEXTS), 8, seed=0, tokens=40).notes == ()


def test_the_same_seed_masks_the_same(masked: Runnable, jsonl: Callable[..., Path]) -> None:
    path = jsonl(*TEXTS)
    first, again, other = (from_file(masked, path, 8, seed=seed).calls for seed in (1, 1, 2))
    assert same_calls(first, again)
    assert not same_calls(first, other)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"label": 1}, "holds label; one of text, prompt, input_ids, tokens, data is needed"),
        ({}, "holds nothing; one of"),
        ({"text": 5}, "text is 5; a text is needed"),
        ({"text": "  "}, "text is '  '; a text is needed"),
        ({"text": "\ud800"}, r"text is '\\ud800'; a text is needed"),
        ({"tokens": "5 6"}, "token ids are 5 6; a list of whole numbers is needed"),
        ({"tokens": []}, r"token ids are \[\]"),
        ({"tokens": [5, True]}, r"token ids are \[5, True\]"),
        ({"tokens": [5, 40]}, "token 40 is none of the model's, which are 0 to 39"),
        ({"tokens": [-1]}, "token -1 is none"),
        ({"tokens": [10**30]}, "token 10000000000000000000 is none"),
        ({"tokens": [2, 3]}, "holds special tokens alone"),
        (INPUT, "data is for input_ids; give token ids"),
    ],
    ids=lambda entry: str(entry)[:30],
)
def test_a_bad_row_says_why(row: Any, reason: str, masked: Runnable, jsonl: Callable[..., Path]) -> None:
    with pytest.raises(ConfigurationError, match=f"1 of 1 rows cannot be used: rows.jsonl line 1: {reason}"):
        from_file(masked, jsonl(row), 4, seed=0)


def test_texts_without_a_tokenizer_are_refused(bare: Runnable, jsonl: Callable[..., Path]) -> None:
    with pytest.raises(ConfigurationError, match=r"line 1: is a text, and the model has no tokenizer; give token ids"):
        from_file(bare, jsonl(*TEXTS), 4, seed=0)


def test_bad_rows_are_noted(masked: Runnable, jsonl: Callable[..., Path]) -> None:
    given = from_file(masked, jsonl(*TEXTS * 6, {"tokens": [99]}, *TEXTS), 30, seed=0)
    (note,) = given.notes
    assert note.startswith("1 of 15 rows were left out: rows.jsonl line 13: token 99 is none of the model's")


# Models of images


def test_an_input_is_given_as_it_is(jsonl: Callable[..., Path]) -> None:
    (call,) = from_file(image_model(), jsonl(INPUT), 4, seed=0).calls
    assert torch.equal(call.keywords["sample"], torch.full((1, 3, 2, 2), 0.5))  # type: ignore[arg-type]
    assert torch.equal(call.keywords["timestep"], torch.tensor([250.0]))  # type: ignore[arg-type]
    assert call.timestep == 250.0


def test_an_input_may_name_its_argument(masked: Runnable, jsonl: Callable[..., Path]) -> None:
    row = {"data": [0.5] * 32, "shape": [1, 2, 16], "timestep": 0.25, "inputs": "inputs_embeds"}
    (call,) = from_file(masked, jsonl(row), 4, seed=0).calls
    assert set(call.keywords) == {"inputs_embeds"}
    assert masked.module(**call.keywords).logits.shape == (1, 2, 40)


def test_an_input_may_have_further_arguments(jsonl: Callable[..., Path]) -> None:
    rows = [INPUT | {"encoder_hidden_states": given} for given in (3, [[[0.5, 1], [2, 3]]])]
    whole, states = (
        call.keywords["encoder_hidden_states"] for call in from_file(image_model(), jsonl(*rows), 4, 0).calls
    )
    assert torch.equal(whole, torch.tensor([3]))  # type: ignore[arg-type]
    assert torch.equal(states, torch.tensor([[[0.5, 1.0], [2.0, 3.0]]]))  # type: ignore[arg-type]


def test_columns_of_a_parquet_file_may_be_further_arguments(tmp_path: Path) -> None:
    file = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist([INPUT | {"encoder_hidden_states": [label]} for label in (3, 5)]), file)
    calls = from_file(image_model(), file, 4, seed=0).calls
    assert [call.keywords["encoder_hidden_states"].tolist() for call in calls] == [[3], [5]]  # type: ignore[attr-defined]


def test_prompts_are_handed_on(jsonl: Callable[..., Path]) -> None:
    given = from_file(image_model(), jsonl({"prompt": "a whale"}, {"text": "the sea"}), 4, seed=0)
    assert (given.calls, given.prompts) == ((), ("a whale", "the sea"))


def test_prompts_and_inputs_are_not_mixed(jsonl: Callable[..., Path]) -> None:
    with pytest.raises(ConfigurationError, match="holds prompts and inputs; give one kind"):
        from_file(image_model(), jsonl({"prompt": "a whale"}, INPUT), 4, seed=0)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"shape": [1, 3, 2]}, r"data is 12 numbers; shape \[1, 3, 2\] needs a list of 6"),
        ({"shape": None}, "shape is None; a list of positive whole numbers"),
        ({"shape": [1, 0]}, r"shape is \[1, 0\]"),
        ({"shape": [1, 3.0, 2, 2]}, "shape is"),
        ({"data": "0.5"}, "data is str"),
        ({"data": [0.5] * 11 + ["x"]}, "hold something that is no number"),
        ({"timestep": None}, "hold something that is no number"),
        ({"data": [0.5] * 11 + [math.nan]}, "a number that float32 cannot hold"),
        ({"data": [0.5] * 11 + [10**400]}, "a number that float32 cannot hold"),
        ({"timestep": math.inf}, "a number that float32 cannot hold"),
        ({"label": 3}, "label is no argument of the model's forward; allowed are sample, timestep, enc"),
        ({"sample": [1]}, "sample is given twice"),
        ({"class_labels": "dog"}, "class_labels is dog; a number is needed"),
        ({"class_labels": [[1], [2, 3]]}, "class_labels is .*; a number is needed, or lists of them of one length"),
        ({"class_labels": math.nan}, "class_labels holds a number that is not finite"),
        ({"inputs": "latents"}, "latents is no argument of the model's forward; allowed are sample, timestep, enc"),
    ],
    ids=lambda entry: str(entry)[:30],
)
def test_a_bad_input_says_why(change: dict[str, Any], reason: str, jsonl: Callable[..., Path]) -> None:
    with pytest.raises(ConfigurationError, match=f"rows.jsonl line 1: .*{reason}"):
        from_file(image_model(), jsonl(INPUT | change), 4, seed=0)


def test_token_ids_are_nothing_to_a_model_of_images(jsonl: Callable[..., Path]) -> None:
    with pytest.raises(ConfigurationError, match="holds tokens; one of text, prompt, data is needed"):
        from_file(image_model(), jsonl({"tokens": [5]}), 4, seed=0)


# Arrays


def test_a_safetensors_file_holds_arguments_by_name(tmp_path: Path) -> None:
    path = tmp_path / "inputs.safetensors"
    latents, times = torch.randn(5, 3, 4, 4, generator=torch.Generator()), torch.arange(5).half()
    save_file({"sample": latents, "timestep": times, "encoder_hidden_states": latents.bfloat16()}, path)
    calls = from_file(image_model(), path, 9, seed=0).calls
    assert [call.timestep for call in calls] == [0, 1, 2, 3, 4]
    for i, call in enumerate(calls):
        assert torch.equal(call.keywords["sample"], latents[i : i + 1])  # type: ignore[arg-type]
        assert {value.dtype for value in call.keywords.values()} == {torch.float32}  # type: ignore[attr-defined]


def test_of_many_samples_evenly_spread_ones_are_read(tmp_path: Path) -> None:
    path = tmp_path / "inputs.safetensors"
    save_file({"sample": torch.zeros(100, 2), "timestep": torch.arange(100)}, path)
    assert [call.timestep for call in from_file(image_model(), path, 4, seed=0).calls] == [0, 25, 50, 75]


@pytest.mark.parametrize("ending", ["npy", "safetensors"])
def test_whole_numbers_are_token_ids_to_a_text_model(ending: str, masked: Runnable, tmp_path: Path) -> None:
    path, ids = tmp_path / f"inputs.{ending}", np.arange(5, 20, dtype=np.int32).reshape(3, 5)
    if ending == "npy":
        np.save(path, ids)
    else:
        save_file({"input_ids": torch.from_numpy(ids)}, path)
    calls = from_file(masked, path, 12, seed=0).calls
    assert len(calls) == 12
    assert all(0 < call.timestep <= 1 for call in calls)


def test_states_with_timesteps_are_shown_as_they_are(masked: Runnable, tmp_path: Path) -> None:
    path = tmp_path / "states.safetensors"
    ids, mask = torch.tensor([[2, 9, 10, 3], [2, 9, 3, 0]]), torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    save_file({"input_ids": ids, "attention_mask": mask, "timestep": torch.tensor([0.25, 0.5])}, path)
    calls = from_file(masked, path, 12, seed=0).calls
    assert [call.timestep for call in calls] == [0.25, 0.5]
    assert torch.equal(calls[1].keywords["attention_mask"], mask[1:])  # type: ignore[arg-type]


def test_an_npy_file_holds_the_first_argument(tmp_path: Path) -> None:
    class Plain(torch.nn.Module):
        def forward(self, waves: torch.Tensor) -> torch.Tensor:
            return waves

    runnable = image_model()
    runnable = type(runnable)(module=Plain(), modality="audio", names={})
    np.save(tmp_path / "waves.npy", np.ones((2, 1, 8), np.float64))
    calls = from_file(runnable, tmp_path / "waves.npy", 4, seed=0).calls
    assert [torch.equal(call.keywords["waves"], torch.ones(1, 1, 8)) for call in calls] == [True, True]  # type: ignore[arg-type]


def safetensors(tmp_path: Path, **arrays: torch.Tensor) -> Path:
    save_file(arrays, tmp_path / "bad.safetensors")
    return tmp_path / "bad.safetensors"


def npy(tmp_path: Path, array: Any) -> Path:
    np.save(tmp_path / "bad.npy", array, allow_pickle=True)
    return tmp_path / "bad.npy"


def cut(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:-3])
    return path


ZEROS = torch.zeros(2, 3)
BAD_ARRAYS: list[tuple[Callable[[Path], Path], str]] = [
    (lambda p: safetensors(p, sample=ZEROS), "sample 0: has no timestep, which the model needs"),
    (lambda p: safetensors(p, sample=ZEROS, timestep=torch.zeros(3)), "the first axis counts the samples"),
    (lambda p: safetensors(p, sample=torch.zeros(())), r"holds sample \(\); the first axis"),
    (lambda p: safetensors(p, sample=torch.zeros(0, 3)), r"holds sample \(0, 3\); the first axis"),
    (safetensors, "holds nothing; the first axis"),
    (
        lambda p: safetensors(p, **{f"w{n}": torch.zeros(n + 1) for n in range(9)}),
        r"holds w0 \(1,\), w1 \(2,\), w2 \(3,\) and 6 more; the",
    ),
    (lambda p: safetensors(p, sample=ZEROS, timestep=ZEROS + 1), "timestep has 3 numbers; a vector"),
    (lambda p: safetensors(p, sample=ZEROS / 0, timestep=torch.zeros(2)), "sample 0 of sample is not finite"),
    (lambda p: safetensors(p, latents=ZEROS, timestep=torch.zeros(2)), "latents is no argument of the model's"),
    (lambda p: cut(safetensors(p, sample=ZEROS)), "not a valid safetensors file"),
    (lambda p: npy(p, np.zeros((2, 3), np.float32)), "sample 0: has no timestep"),
    (lambda p: npy(p, np.array([{"a": 1}], object)), "holds Python objects .*, which can run code"),
    (lambda p: cut(npy(p, np.zeros((2, 3)))), "need 48 bytes"),
]


@pytest.mark.parametrize(("make", "reason"), BAD_ARRAYS, ids=[reason for _, reason in BAD_ARRAYS])
def test_a_bad_file_of_arrays_says_why(make: Callable[[Path], Path], reason: str, tmp_path: Path) -> None:
    with pytest.raises((ConfigurationError, SourceError), match=reason):
        from_file(image_model(), make(tmp_path), 4, seed=0)


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.zeros((2, 3), np.float32), r"sample 0: input_ids are torch.float32 \(1, 3\); rows of token ids are needed"),
        (np.arange(5, 8), r"input_ids are torch.int64 \(1,\)"),
        (np.array([[5, 6], [5, 99]]), "sample 1: token 99 is none of the model's"),
    ],
)
def test_bad_arrays_of_tokens_say_why(array: Any, reason: str, masked: Runnable, tmp_path: Path) -> None:
    with pytest.raises((ConfigurationError, SourceError), match=reason):
        from_file(masked, npy(tmp_path, array), 4, seed=0)


@pytest.mark.parametrize("name", ["rows.csv", "rows.pkl", "rows"])
def test_other_kinds_of_files_are_refused(name: str, masked: Runnable, tmp_path: Path) -> None:
    (tmp_path / name).write_text("a")
    with pytest.raises(ConfigurationError, match=r"of an unknown kind; allowed are .jsonl, .parquet, .txt, .safetenso"):
        from_file(masked, tmp_path / name, 4, seed=0)


def test_what_is_no_file_is_refused(masked: Runnable, tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing.jsonl"):
        with pytest.raises(ConfigurationError, match="is no file; give one that ends in"):
            from_file(masked, path, 4, seed=0)


# Functions

TENSOR = torch.zeros(1, 2)


def calls_of(*items: Any, count: int = 9) -> tuple[Sample, ...]:
    return from_callable(torch.nn.Identity(), lambda _: iter(items), count)


def test_inputs_are_a_tensor_a_tuple_or_a_dict() -> None:
    calls = calls_of((TENSOR, 1), ((TENSOR, None), 2.5), ({"x": TENSOR, "return_dict": False}, torch.tensor([3])))
    assert [len(call.arguments) for call in calls] == [1, 2, 0]
    assert set(calls[2].keywords) == {"x", "return_dict"}
    assert [call.timestep for call in calls] == [1.0, 2.5, 3.0]


def test_the_function_is_given_the_module_and_asked_for_no_more_than_is_needed() -> None:
    module, asked = torch.nn.Identity(), []

    def endless(given: torch.nn.Module) -> Any:
        assert given is module
        while True:
            asked.append(1)
            yield TENSOR, 0

    assert len(from_callable(module, endless, 5)) == len(asked) == 5


def test_gradients_are_left_behind() -> None:
    (call,) = calls_of((torch.zeros(1, 2, requires_grad=True), 0))
    assert not call.arguments[0].requires_grad  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        (TENSOR, r"sample 2: is a Tensor; a pair \(inputs, timestep\) is needed"),
        ((TENSOR,), "sample 2: is a tuple; a pair"),
        (({"x": 1}, 0), "sample 2: its inputs are a dict; a tensor is needed"),
        (({1: TENSOR}, 0), "sample 2: its inputs are a dict"),
        (((1, 2), 0), "sample 2: its inputs are a tuple"),
        (("a text", 0), "sample 2: its inputs are 'a text'"),
        ((TENSOR, "now"), "sample 2: its timestep is 'now'; a number is needed"),
        ((TENSOR, None), "sample 2: its timestep is None"),
        ((TENSOR, True), "sample 2: its timestep is True"),
        ((TENSOR, math.nan), "sample 2: its timestep is nan"),
        ((TENSOR, TENSOR), "sample 2: its timestep is a Tensor"),
    ],
    ids=lambda entry: str(entry)[:30],
)
def test_a_wrong_item_is_named(item: Any, reason: str) -> None:
    with pytest.raises(ConfigurationError, match=reason):
        calls_of((TENSOR, 0), item)


def test_no_items_are_an_error() -> None:
    with pytest.raises(ConfigurationError, match="the calibration function gave no samples"):
        calls_of()
