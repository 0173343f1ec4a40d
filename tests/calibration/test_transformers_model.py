"""A transformers folder is opened as the module that transformers itself would make of it, with every name known."""

from __future__ import annotations

import shutil
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from text_models import WORDS, opened, save_bert, save_folder, small_module

from arrow_quant_v2.calibration.transformers_model import open_transformers
from arrow_quant_v2.errors import ConfigurationError, SourceError
from arrow_quant_v2.sources.folder import open_model

if TYPE_CHECKING:
    from pathlib import Path

IDS = torch.tensor([[2, 9, 7, 4, 4, 13, 3], [2, 5, 6, 7, 8, 9, 3]])
CLASSES = [
    ("BertForMaskedLM", {}),
    ("BertModel", {}),
    ("RobertaForMaskedLM", {"pad_token_id": 1}),
    ("DistilBertForMaskedLM", {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32}),
    ("ModernBertForMaskedLM", {"pad_token_id": 0, "global_attn_every_n_layers": 2}),
    ("LlamaForCausalLM", {}),
    ("LlamaModel", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 100.0}}),
    ("GPT2LMHeadModel", {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "tie_word_embeddings": True}),
]


def output_of(module: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        first = module(input_ids=ids)[0]
    assert isinstance(first, torch.Tensor)
    return first


@pytest.mark.parametrize(("name", "settings"), CLASSES, ids=[name for name, _ in CLASSES])
def test_a_model_gives_what_it_gave_before_it_was_saved(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    module = small_module(name, **settings)
    runnable = opened(save_folder(tmp_path, module))
    assert type(runnable.module) is type(module)
    assert torch.equal(output_of(runnable.module), output_of(module))
    assert runnable.names == {key: key for key in module.state_dict()}
    assert not runnable.module.training
    assert not any(p.requires_grad or p.is_meta for p in runnable.module.parameters())


def test_half_precision_becomes_float32(tmp_path: Path) -> None:
    module = small_module("BertForMaskedLM").to(torch.bfloat16)
    runnable = opened(save_folder(tmp_path, module))
    assert {p.dtype for p in runnable.module.parameters()} == {torch.float32}
    assert torch.equal(output_of(runnable.module), output_of(module.to(torch.float32)))


def test_what_has_no_place_in_the_module_is_left_out(tmp_path: Path) -> None:
    module = small_module("BertForMaskedLM")
    extra = {"cls.species.weight": torch.ones(6, 16), "bert.embeddings.position_ids": torch.arange(64)[None]}
    runnable = opened(save_folder(tmp_path, module, module.state_dict() | extra))
    assert torch.equal(output_of(runnable.module), output_of(module))
    assert set(runnable.names) == set(module.state_dict())


@pytest.mark.parametrize("with_prefix", [True, False])
def test_the_prefix_of_the_base_model_may_be_missing_or_too_much(with_prefix: bool, tmp_path: Path) -> None:
    base = small_module("BertModel")
    name = "BertModel" if with_prefix else "BertForMaskedLM"
    module = small_module(name)
    if with_prefix:
        tensors = {f"bert.{key}": value for key, value in base.state_dict().items()}
    else:
        tensors = {key.removeprefix("bert."): value for key, value in module.state_dict().items()}
    runnable = opened(save_folder(tmp_path, module, tensors))
    assert torch.equal(output_of(runnable.module), output_of(module))
    for file_name, place in runnable.names.items():
        assert torch.equal(runnable.module.get_parameter(place), tensors[file_name])


def test_old_names_of_norms_are_known(tmp_path: Path) -> None:
    module = small_module("BertForMaskedLM")
    old = {k.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta") for k in module.state_dict()}
    tensors = dict(zip(sorted(old), (module.state_dict()[_new(k)] for k in sorted(old)), strict=True))
    runnable = opened(save_folder(tmp_path, module, tensors))
    assert torch.equal(output_of(runnable.module), output_of(module))
    assert runnable.names["bert.embeddings.LayerNorm.gamma"] == "bert.embeddings.LayerNorm.weight"


def _new(name: str) -> str:
    return name.replace("Norm.gamma", "Norm.weight").replace("Norm.beta", "Norm.bias")


@pytest.mark.parametrize("held", ["cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"])
def test_of_tied_weights_one_is_enough(held: str, tmp_path: Path) -> None:
    module = small_module("BertForMaskedLM")
    both = {"cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"}
    tensors = {key: value for key, value in module.state_dict().items() if key not in both - {held}}
    runnable = opened(save_folder(tmp_path, module, tensors))
    decoder, words = (runnable.module.get_parameter(name) for name in sorted(both, reverse=True))
    assert decoder is words
    assert torch.equal(output_of(runnable.module), output_of(module))
    assert both & set(runnable.names) == {held}


def test_tied_weights_that_the_files_hold_twice_stay_two(tmp_path: Path) -> None:
    module = small_module("BertForMaskedLM")
    other = module.state_dict() | {"cls.predictions.decoder.weight": torch.ones(40, 16)}
    runnable = opened(save_folder(tmp_path, module, other))
    assert torch.equal(runnable.module.cls.predictions.decoder.weight, torch.ones(40, 16))
    assert torch.equal(runnable.module.get_input_embeddings().weight, module.get_input_embeddings().weight)


def test_a_class_of_its_own_is_opened_by_its_model_type(tmp_path: Path) -> None:
    module = small_module("BertForMaskedLM")
    runnable = opened(save_folder(tmp_path, module, architectures=["AntiBERTy"]))
    assert type(runnable.module) is transformers.BertForMaskedLM
    assert torch.equal(output_of(runnable.module), output_of(module))


def test_without_the_head_for_tokens_the_base_model_is_opened(tmp_path: Path) -> None:
    module = small_module("BertModel")
    runnable = opened(save_folder(tmp_path, module, architectures=["SomeEncoder"]))
    assert type(runnable.module) is transformers.BertModel
    assert torch.equal(output_of(runnable.module), output_of(module))


def test_a_class_is_enough_without_a_model_type(tmp_path: Path) -> None:
    module = small_module("BertForMaskedLM")
    runnable = opened(save_folder(tmp_path, module, model_type=...))
    assert torch.equal(output_of(runnable.module), output_of(module))


def test_a_missing_pooler_is_zero_and_has_no_name(tmp_path: Path) -> None:
    module = small_module("BertModel")
    tensors = {key: value for key, value in module.state_dict().items() if "pooler" not in key}
    runnable = opened(save_folder(tmp_path, module, tensors))
    assert torch.equal(output_of(runnable.module), output_of(module))
    assert not runnable.module.pooler.dense.weight.any()
    assert set(runnable.names) == set(tensors)


# The mask token


def test_the_tokenizer_tells_the_mask_token(masked_folder: Path) -> None:
    runnable = opened(masked_folder)
    assert runnable.mask_token == runnable.tokenizer.mask_token_id == 4


def test_config_json_tells_the_mask_token(tmp_path: Path) -> None:
    assert opened(save_bert(tmp_path, "BertForMaskedLM", mask_token_id=7)).mask_token == 7


def test_what_is_asked_for_counts_more_than_what_is_stated(tmp_path: Path) -> None:
    assert opened(save_bert(tmp_path, "BertForMaskedLM", words=WORDS, mask_token_id=7), mask_token=9).mask_token == 9


def test_without_logits_nothing_is_masked(tmp_path: Path) -> None:
    folder = save_bert(tmp_path, "BertModel", words=WORDS)
    assert opened(folder).mask_token is None
    with pytest.raises(ConfigurationError, match="mask_token is 4, but BertModel gives no logits"):
        opened(folder, mask_token=4)


@pytest.mark.parametrize("token", [-1, 40])
def test_a_mask_token_outside_the_vocabulary_is_refused(token: int, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=f"mask_token is {token}; BertForMaskedLM has tokens 0 to 39"):
        opened(save_bert(tmp_path, "BertForMaskedLM"), mask_token=token)


def test_no_tokenizer_is_made_up_where_no_vocabulary_lies(tmp_path: Path) -> None:
    assert opened(save_bert(tmp_path, "BertForMaskedLM")).tokenizer is None


# What cannot be opened


def test_without_transformers_the_error_says_what_to_install(
    masked_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'arrow-quant-v2\[models\]'"):
        opened(masked_folder)


def test_lacking_parameters_are_named(tmp_path: Path) -> None:
    module = small_module("BertForMaskedLM")
    tensors = {key: value for key, value in module.state_dict().items() if "layer.1.output" not in key}
    with pytest.raises(SourceError, match=r"lacks 4 of the parameters of BertForMaskedLM: bert.encoder.layer.1.output"):
        opened(save_folder(tmp_path, module, tensors))


def test_another_shape_is_named(tmp_path: Path) -> None:
    module = small_module("BertForMaskedLM")
    with pytest.raises(SourceError, match=r"word_embeddings.weight is \(40, 16\); BertForMaskedLM .* needs \(41, 16\)"):
        opened(save_folder(tmp_path, module, vocab_size=41))


def test_eight_bit_floats_are_refused(tmp_path: Path) -> None:
    module = small_module("BertForMaskedLM")
    name = "bert.encoder.layer.0.output.dense.weight"
    tensors = module.state_dict()
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    with pytest.raises(SourceError, match=r"output.dense.weight is float8_e4m3fn, whose scales lie elsewhere"):
        opened(save_folder(tmp_path, module, tensors))


def test_code_that_comes_with_a_model_is_never_run(tmp_path: Path) -> None:
    entries = {"model_type": "dream", "auto_map": {"AutoConfig": "mine.Config", "AutoModel": "mine.Model"}}
    folder = save_bert(tmp_path, "BertForMaskedLM", architectures=["DreamModel"], **entries)
    (folder / "mine.py").write_text("raise SystemExit('was run')")
    with pytest.raises(SourceError, match="code that comes with a model is never run"):
        opened(folder)


def test_a_kernel_that_config_json_names_is_not_fetched(tmp_path: Path) -> None:
    folder = save_bert(tmp_path, "BertForMaskedLM", attn_implementation="someone/kernel")
    assert opened(folder).module.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    "entries",
    [
        {"num_hidden_layers": 10**9},
        {"hidden_size": "wide"},
        {"hidden_size": 15},
        {"num_attention_heads": 0},
        {"model_type": "nonsense"},
    ],
)
def test_a_config_that_builds_nothing_is_a_clear_error(entries: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"config.json"):
        opened(save_bert(tmp_path, "BertForMaskedLM", **entries))


def test_a_damaged_tokenizer_is_a_clear_error(masked_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(masked_folder, tmp_path / "model")
    (folder / "vocab.txt").unlink()
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(SourceError, match="its tokenizer cannot be opened"):
        opened(folder)


# Real ones


def test_antiberty_gives_the_logits_that_transformers_gives(antiberty: Path) -> None:
    with open_model(antiberty) as model:
        runnable = open_transformers(model, "text", mask_token=4)
        kept = {
            info.name: model.source.read(info.name).reshape(info.shape)
            for info in model.source.tensors
            if info.name in runnable.names
        }
    with torch.random.fork_rng(devices=()):
        expected = transformers.BertForMaskedLM(transformers.BertConfig.from_pretrained(antiberty)).eval()
    expected.load_state_dict(kept)
    ids = torch.tensor([[2, *range(5, 25), 4, 4, 3]])
    assert torch.equal(output_of(runnable.module, ids), output_of(expected, ids))
    left_out = {"cls.species", "cls.chain", "cls.graft", "bert.pooler.dense", "bert.embeddings"}
    assert {i.name.rpartition(".")[0] for i in model.source.tensors if i.name not in runnable.names} == left_out


def test_minilm_gives_the_states_that_transformers_gives(minilm: Path) -> None:
    runnable = opened(minilm)
    expected = transformers.BertModel.from_pretrained(minilm).eval()
    ids = runnable.tokenizer("Call me Ishmael.", return_tensors="pt")["input_ids"]
    assert torch.equal(output_of(runnable.module, ids), output_of(expected, ids))
    assert runnable.mask_token is None
