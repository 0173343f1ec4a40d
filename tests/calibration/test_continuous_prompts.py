"""Conditions come from the text encoders that lie beside the model, or a note says why they do not."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import diffusers
import pytest
import torch
from small_pipelines import PIPELINES
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
from transformers.utils import logging

from arrow_quant_v2.calibration.continuous import trajectory
from arrow_quant_v2.calibration.pipelines import open_pipeline

if TYPE_CHECKING:
    from pathlib import Path

    from arrow_quant_v2.calibration.sample import Samples

pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("FutureWarning", "DeprecationWarning")]


@dataclass(frozen=True)
class Asked:
    count: int = 16
    seed: int = 0
    steps: int = 2
    prompts: tuple[str, ...] = ()


def add_text(root: Path, *suffixes: str, width: int = 24, projected: int | None = None) -> Path:
    """Text encoders of a few thousand weights, and tokenizers that know letters."""
    ends = [chr(code) + end for end in ("", "</w>") for code in range(ord("a"), ord("z") + 1)]
    vocabulary = {token: number for number, token in enumerate([*ends, "<|startoftext|>", "<|endoftext|>"])}
    index = json.loads((root / "model_index.json").read_text())
    for suffix in suffixes:
        config = CLIPTextConfig(
            vocab_size=len(vocabulary),
            hidden_size=width,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            projection_dim=projected or width,
            bos_token_id=52,
            eos_token_id=53,
        )
        build = CLIPTextModelWithProjection if suffix and projected else CLIPTextModel
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            build(config).save_pretrained(root / f"text_encoder{suffix}")
        letters = root / "letters"
        letters.mkdir(exist_ok=True)
        (letters / "vocab.json").write_text(json.dumps(vocabulary))
        (letters / "merges.txt").write_text("#version: 0.2\n")
        tokenizer = CLIPTokenizer(
            vocab=str(letters / "vocab.json"), merges=str(letters / "merges.txt"), model_max_length=77
        )
        tokenizer.save_pretrained(root / f"tokenizer{suffix}")
        index |= {
            f"text_encoder{suffix}": ["transformers", build.__name__],
            f"tokenizer{suffix}": ["transformers", "CLIPTokenizer"],
        }
    (root / "model_index.json").write_text(json.dumps(index))
    return root


def run(root: Path, *prompts: str) -> Samples:
    return trajectory(open_pipeline(root), Asked(prompts=prompts))


def states(samples: Samples) -> list[torch.Tensor]:
    """The different conditions, in the order in which they first come."""
    found: list[Any] = []
    for sample in samples.calls:
        state = sample.keywords["encoder_hidden_states"]
        if not any(torch.equal(state, other) for other in found):
            found.append(state)
    return found


def test_prompts_are_encoded_by_the_encoders_beside_the_model(tmp_path: Path) -> None:
    root = add_text(PIPELINES["sd ddim v"].save(tmp_path), "")
    samples = run(root, "a cat", "the dog")
    assert samples.notes == ()
    tokenizer = CLIPTokenizer.from_pretrained(root / "tokenizer")
    encoder = CLIPTextModel.from_pretrained(root / "text_encoder")
    found = states(samples)
    assert len(found) == 3
    assert not any(state.requires_grad for state in found)
    for text in ("a cat", "", "the dog"):
        with torch.no_grad():
            expected = encoder(tokenizer(text, padding="max_length", return_tensors="pt").input_ids)[0]
        assert any(torch.allclose(expected, state, atol=1e-5) for state in found), text


def test_plain_prompts_of_ours_stand_in_for_missing_ones(tmp_path: Path) -> None:
    root = add_text(PIPELINES["sd ddim v"].save(tmp_path), "")
    samples = run(root)
    assert len(states(samples)) == 5  # four trajectories and the empty prompt
    assert samples.identity == run(root).identity
    assert samples.identity != run(root, "a cat").identity


def test_encoding_leaves_the_random_state_and_the_libraries_as_they_were(tmp_path: Path) -> None:
    root = add_text(PIPELINES["sd ddim v"].save(tmp_path), "")
    before = (
        torch.get_rng_state(),
        torch.get_num_threads(),
        logging.get_verbosity(),
        logging.is_progress_bar_enabled(),
    )
    run(root)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (torch.get_num_threads(), logging.get_verbosity(), logging.is_progress_bar_enabled()) == before[1:]


@pytest.mark.parametrize("zeros", [True, False])
def test_sdxl_is_told_both_prompts_and_what_it_was_trained_to_see_without_one(tmp_path: Path, *, zeros: bool) -> None:
    root = add_text(PIPELINES["sdxl"].save(tmp_path), "", "_2", width=12, projected=32)
    index = json.loads((root / "model_index.json").read_text()) | {"force_zeros_for_empty_prompt": zeros}
    (root / "model_index.json").write_text(json.dumps(index))
    samples = run(root, "a cat")
    assert samples.notes == ()
    assert [bool(state.any()) for state in states(samples)].count(False) == zeros
    added: Any = samples.calls[0].keywords["added_cond_kwargs"]
    assert added["text_embeds"].shape == (1, 32)


def with_code_of_its_own(root: Path) -> None:
    rename(root, "text_encoder", ["transformers", "AutoModel"])
    path = root / "text_encoder" / "config.json"
    config = json.loads(path.read_text()) | {"model_type": "evil", "auto_map": {"AutoModel": "evil.Evil"}}
    path.write_text(json.dumps(config))
    (root / "text_encoder" / "evil.py").write_text("raise SystemExit('was imported')")


@pytest.mark.parametrize(
    ("spoil", "because"),
    [
        (lambda root: (root / "text_encoder" / "model.safetensors").write_bytes(b"no"), "cannot be run"),
        (lambda root: (root / "tokenizer" / "tokenizer.json").write_text("{"), "cannot be run"),
        (lambda root: rename(root, "text_encoder", ["evil", "Backdoor"]), "no class of transformers or diffusers"),
        (lambda root: rename(root, "text_encoder", ["transformers", "pipeline"]), "no class of transformers"),
        (with_code_of_its_own, "cannot be run"),
        (lambda root: rename(root, "_class_name", "os"), "is no pipeline of diffusers"),
        (lambda root: rename(root, "_class_name", ["pipeline", "Evil"]), "is no pipeline of diffusers"),
    ],
)
def test_what_cannot_be_encoded_is_random_and_a_note_says_why(tmp_path: Path, spoil: Any, because: str) -> None:
    root = add_text(PIPELINES["sd ddim v"].save(tmp_path), "")
    (root / "evil.py").write_text("raise SystemExit('was imported')")
    spoil(root)
    samples = run(root)
    assert len(samples.calls) == 16
    assert len(samples.notes) == 1
    assert "conditions are random numbers, not encoded prompts" in samples.notes[0]
    assert because in samples.notes[0]


def rename(root: Path, name: str, entry: object) -> None:
    index = json.loads((root / "model_index.json").read_text()) | {name: entry}
    (root / "model_index.json").write_text(json.dumps(index))


def test_a_bare_model_folder_has_no_encoders(tmp_path: Path) -> None:
    root = PIPELINES["sd ddim v"].save(tmp_path)
    (root / "model_index.json").rename(root / "elsewhere.json")
    runnable = open_pipeline(root / "unet")
    assert runnable.scheduler is None
    samples = trajectory(replace(runnable, scheduler=diffusers.DDIMScheduler()), Asked())
    assert "no pipeline lies around the model" in samples.notes[0]
