"""A quantized folder, loaded, gives what the library gives with the dequantized one."""

from __future__ import annotations

import copy
import json
from typing import TYPE_CHECKING, Any

import diffusers
import pytest
import torch
import transformers
from packed_models import Net, Pair, distance, normal, pair
from safetensors.torch import load_file
from small_models import run_python
from small_pipelines import PIPELINES
from text_models import WORDS, save_bert, save_folder, small_module
from torch import nn
from transformers.models.diffusion_gemma import modeling_diffusion_gemma as diffusion_gemma

import arrow_quant_v2 as aq
from arrow_quant_v2.calibration.denoiser import Denoiser, Draw
from arrow_quant_v2.errors import ChecksumError, ConfigurationError, SourceError, StoreError
from arrow_quant_v2.runtime.packed_weight import PackedWeight
from arrow_quant_v2.store.reader import StoredModel

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

WIDE = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
CLASSES: dict[str, dict[str, Any]] = {
    "BertForMaskedLM": {"hidden_size": 64, "intermediate_size": 96},
    "BertModel": {"hidden_size": 64, "intermediate_size": 96},
    "ModernBertForMaskedLM": WIDE | TOKENS | {"cls_token_id": 1, "sep_token_id": 2},
    "Qwen2ForCausalLM": WIDE,
    "Gemma3ForCausalLM": WIDE | TOKENS | {"head_dim": 16},  # its embedding scales
    "AlbertForMaskedLM": {"hidden_size": 64, "intermediate_size": 96, "embedding_size": 32},  # one layer, used twice
    "Qwen3MoeForCausalLM": WIDE | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48},
    "GptOssForCausalLM": WIDE | TOKENS | {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16},
}
IDS = torch.randint(3, 40, (2, 12), generator=torch.Generator().manual_seed(3))
DENOISERS = ("ddpm", "sd pndm", "dit", "sd3", "flux", "pixart", "wan", "dance")


def packed_layers(module: nn.Module) -> list[str]:
    return [name for name, part in module.named_modules() if isinstance(part, PackedWeight)]


@torch.no_grad()
def logits(module: nn.Module, ids: torch.Tensor = IDS) -> torch.Tensor:
    out: torch.Tensor = module(input_ids=ids)[0]
    return out


def text_pair(class_name: str, folder: Path, **settings: Any) -> Pair:
    return pair(save_folder(folder / "source", small_module(class_name, **CLASSES[class_name])), folder, **settings)


@pytest.mark.parametrize("class_name", CLASSES)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_text_model_is_its_dequantized_twin(class_name: str, tmp_path: Path) -> None:
    both = text_pair(class_name, tmp_path)
    model = aq.load(both.quantized)
    twin = getattr(transformers, class_name).from_pretrained(both.dequantized, dtype="float32").eval()
    assert type(model) is type(twin)
    assert not model.training
    assert distance(logits(model), logits(twin)) < 1e-4
    assert len(packed_layers(model)) > 5
    assert model.arrow_quant_decisions == ()


IN_A_PROCESS = """
import sys, torch, arrow_quant_v2 as aq
ids = torch.load(sys.argv[1], weights_only=True)
with torch.no_grad():
    torch.save([aq.load(folder)(input_ids=ids)[0] for folder in sys.argv[3:]], sys.argv[2])
"""


@pytest.mark.parametrize("name", ["minilm", "antiberty"])
def test_a_real_model_in_a_process_of_its_own_is_its_dequantized_twin(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    source, widths = request.getfixturevalue(name), (2, 4, 8)
    made = [pair(source, tmp_path / str(bits), bit_width=bits, group_size=64) for bits in widths]
    ids = torch.randint(5, 24, (2, 40), generator=torch.Generator().manual_seed(0))
    torch.save(ids, tmp_path / "ids.pt")
    files = tmp_path / "ids.pt", tmp_path / "out.pt"
    done = run_python(IN_A_PROCESS, *files, *(both.quantized for both in made))
    assert done.code == 0, done.err
    kind = {"minilm": "AutoModel", "antiberty": "AutoModelForMaskedLM"}[name]
    for both, found in zip(made, torch.load(files[1], weights_only=True), strict=True):
        twin = getattr(transformers, kind).from_pretrained(both.dequantized).eval()
        assert distance(found, logits(twin, ids)) < 1e-3


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A masked language model calibrated on its own trajectory, some of its layers turned."""
    folder = tmp_path_factory.mktemp("calibrated")
    source = save_bert(folder / "source", "BertForMaskedLM", words=WORDS)
    module = small_module("BertForMaskedLM", **CLASSES["BertForMaskedLM"], num_attention_heads=4)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if "LayerNorm.weight" in name:
                weight[::9] *= 20  # outliers, which a turn spreads
    save_folder(source, module)
    settings = {"enable_calibration": True, "num_time_groups": 4, "calibration_samples": 8, "calibration_tokens": 0}
    return pair(source, folder, **settings)


def test_a_calibrated_model_is_its_dequantized_twin(calibrated: Pair) -> None:
    assert any(one.rotation for one in StoredModel(calibrated.quantized).entries)
    twin = transformers.AutoModelForMaskedLM.from_pretrained(calibrated.dequantized).eval()
    assert distance(logits(aq.load(calibrated.quantized)), logits(twin)) < 1e-4


def test_static_activations_follow_the_share_of_masked_tokens(calibrated: Pair) -> None:
    model = aq.load(calibrated.quantized, activations="static")
    query: Any = model.get_submodule("bert.encoder.layer.0.attention.self.query")
    seen = []
    query.register_forward_pre_hook(lambda layer, _: seen.append(layer.clock.group))
    edges = query.clock.groups.edges
    for share in (0.25, 0.75):
        ids = IDS.clone()
        ids[:, : int(share * ids.shape[1])] = 4  # the tokenizer's [MASK]
        logits(model, ids)
        assert seen[-1] == query.clock.groups.group_of(share)
    assert seen[0] != seen[1], edges
    with aq.timestep(0.25):
        logits(model)
    assert seen[-1] == seen[0]
    exact = logits(aq.load(calibrated.quantized))
    assert 0 < distance(logits(model), exact) < 0.3


@pytest.mark.parametrize("name", DENOISERS)
@pytest.mark.filterwarnings("ignore:.* weights are dequantized")  # of positions, where the plan takes them for weights
def test_a_denoiser_is_its_dequantized_twin(name: str, tmp_path: Path) -> None:
    small = PIPELINES[name]
    both = pair(small.save(tmp_path / "source"), tmp_path, group_size=16)
    twin = getattr(diffusers, small.model).from_pretrained(both.dequantized / small.component)
    outputs = [step(model) for model in (aq.load(both.quantized), twin.eval())]
    assert distance(*outputs) < 1e-4


@torch.no_grad()
def step(module: nn.Module) -> torch.Tensor:
    """What a denoiser says of seeded noise."""
    denoiser, draw = Denoiser(module), _draw()
    noise = torch.randn(denoiser.shape, generator=torch.Generator().manual_seed(3))
    seen = denoiser.seen(noise, denoiser.picture(draw.shared))
    time = denoiser.clock(torch.tensor(500.0))
    given = {denoiser.state: seen, denoiser.time: time, "return_dict": False} | denoiser.conditions(draw)
    return denoiser.said(module(**given))


def _draw() -> Draw:
    return Draw(condition=torch.Generator().manual_seed(1), shared=torch.Generator().manual_seed(2), empty=False)


def test_a_pipeline_draws_what_its_dequantized_twin_draws(tmp_path: Path) -> None:
    both = pair(PIPELINES["ddpm"].save(tmp_path / "source"), tmp_path, group_size=16)
    pictures = []
    for pipeline in (aq.load_pipeline(both.quantized), diffusers.DDPMPipeline.from_pretrained(both.dequantized)):
        pipeline.set_progress_bar_config(disable=True)
        drawn = pipeline(num_inference_steps=3, generator=torch.Generator().manual_seed(0), output_type="np").images
        pictures.append(torch.from_numpy(drawn))
    assert distance(*pictures) < 1e-4
    assert packed_layers(aq.load_pipeline(both.quantized).unet)


def test_a_pipeline_in_float16_is_widened_on_a_cpu_unless_asked_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = PIPELINES["ddpm"].save(tmp_path / "source")
    PIPELINES["ddpm"].build().half().save_pretrained(source / "unet")
    both = pair(source, tmp_path, group_size=16)
    caplog.clear()
    assert aq.load_pipeline(both.quantized).dtype == torch.float32
    assert "cannot run with `cpu`" not in caplog.text
    assert aq.load_pipeline(both.quantized, dtype="bfloat16").dtype == torch.bfloat16
    assert aq.load(both.quantized, dtype="auto").dtype == torch.float16
    with pytest.raises(ConfigurationError, match="dtype is 'hot'; allowed: 'auto' or a dtype of torch"):
        aq.load(both.quantized, dtype="hot")


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_the_experts_of_diffusion_gemma_stay_packed(tmp_path: Path, implementation: str) -> None:
    sizes = {"hidden_size": 64, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 48}
    config = diffusion_gemma.DiffusionGemmaTextConfig(**sizes)
    config._experts_implementation = implementation
    experts = diffusion_gemma.DiffusionGemmaTextExperts(config).eval()
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.1)
    both = pair(experts, tmp_path, modality="text")
    twin = copy.deepcopy(experts)
    twin.load_state_dict(load_file(both.dequantized / "model.safetensors"))
    model = aq.load(both.quantized, into=experts)
    assert sorted(packed_layers(model)) == ["down_proj", "gate_up_proj"]
    routed = normal(6, 64), torch.tensor([[0, 3], [1, 2]] * 3), torch.full((6, 2), 0.5)
    assert distance(model(*routed), twin(*routed)) < 3e-5


def test_a_module_of_your_own_is_filled(tmp_path: Path) -> None:
    both = pair(Net(), tmp_path, modality="text")
    mine = Net()
    with pytest.warns(UserWarning, match="3 weights are dequantized"):
        assert aq.load(both.quantized, into=mine) is mine
    assert [decision.kind for decision in mine.arrow_quant_decisions] == ["fallback"] * 3  # type: ignore[union-attr]
    with pytest.raises(SourceError, match=r"has no config.json, so its class is unknown; give your own module: into="):
        aq.load(both.quantized)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_can_be_loaded_in_another_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    both = text_pair("Qwen2ForCausalLM", tmp_path)
    model = aq.load(both.quantized, dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert logits(model).dtype == dtype
    assert distance(logits(model), logits(aq.load(both.quantized))) < 0.1


def test_tied_weights_are_one(tmp_path: Path) -> None:
    module = small_module("Qwen2ForCausalLM", **WIDE, tie_word_embeddings=True)
    state = {name: tensor for name, tensor in module.state_dict().items() if name != "lm_head.weight"}
    both = pair(save_folder(tmp_path / "source", module, state), tmp_path)
    model: Any = aq.load(both.quantized)
    twin = transformers.Qwen2ForCausalLM.from_pretrained(both.dequantized).eval()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert distance(logits(model), logits(twin)) < 1e-4


def test_layers_of_another_kind_are_dequantized_and_told(tmp_path: Path) -> None:
    module = small_module("GPT2LMHeadModel", n_embd=64, n_head=4, n_positions=64, **TOKENS)
    both = pair(save_folder(tmp_path / "source", module), tmp_path)
    with pytest.warns(UserWarning, match=r"the first is transformer.h.0.mlp.c_fc.weight, fallback as float32"):
        model = aq.load(both.quantized)
    twin = transformers.GPT2LMHeadModel.from_pretrained(both.dequantized).eval()
    assert distance(logits(model), logits(twin)) < 1e-4


def test_tensors_without_a_place_are_told(tmp_path: Path) -> None:
    module = small_module("BertForMaskedLM", **CLASSES["BertForMaskedLM"])
    state = module.state_dict() | {"another.head.weight": torch.ones(3, 3)}
    both = pair(save_folder(tmp_path / "source", module, state), tmp_path)
    with pytest.warns(UserWarning, match=r"another.head.weight have no place in the model and are left out"):
        aq.load(both.quantized)


def test_the_whole_model_compiles_without_a_break(tmp_path: Path) -> None:
    both = text_pair("BertModel", tmp_path)
    model = aq.load(both.quantized)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert distance(logits(compiled), logits(model)) < 3e-5


# What is wrong is said in one error


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_pair("BertModel", tmp_path_factory.mktemp("sound")).quantized


@pytest.fixture
def broken(sound: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    for path in sound.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def weights(folder: Path) -> Path:
    return next(folder.glob("*.parquet"))


def flip(folder: Path) -> None:
    content = bytearray(weights(folder).read_bytes())
    content[len(content) // 2] ^= 1
    weights(folder).write_bytes(content)


def newer(folder: Path) -> None:
    content = weights(folder).read_bytes()
    weights(folder).write_bytes(content.replace(b"\x0eschema_version\x18\x032.2", b"\x0eschema_version\x18\x033.0"))


def cut(folder: Path) -> None:
    weights(folder).write_bytes(weights(folder).read_bytes()[:-50])


def other_class(folder: Path) -> None:
    entries = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(entries | {"hidden_size": 32}))


def unknown_class(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "of_tomorrow", "architectures": ["OfTomorrow"]}))


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (flip, ChecksumError, "checksum is .*; the file is damaged"),
        (newer, ChecksumError, "checksum of the footer is"),
        (cut, StoreError, "it is missing, truncated or damaged"),
        (other_class, SourceError, r"does not fit BertModel: .* is \(64,\), and .* \(32,\)"),
        (unknown_class, SourceError, "does not know this model"),
        (lambda folder: weights(folder).unlink(), SourceError, "holds no weights"),
        (lambda folder: (folder / "config.json").unlink(), SourceError, "has no config.json"),
    ],
)
def test_a_damaged_folder_is_refused(broken: Path, damage: Callable[[Path], None], error: Any, message: str) -> None:
    damage(broken)
    with pytest.raises(error, match=message):
        aq.load(broken)


def test_what_is_no_quantized_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="does not exist"):
        aq.load(tmp_path / "nowhere")
    with pytest.raises(SourceError, match="is not quantized; quantize it first"):
        aq.load(save_folder(tmp_path / "plain", small_module("BertModel")))
    with pytest.raises(SourceError, match=r"is no pipeline \(no model_index.json\); use load"):
        aq.load_pipeline(tmp_path / "plain")


def test_settings_that_mean_nothing_are_refused(sound: Path) -> None:
    with pytest.raises(ConfigurationError, match="activations is 'int8'"):
        aq.load(sound, activations="int8")  # type: ignore[arg-type]


@pytest.mark.parametrize("device", ["gpu", "cuda:77", "", 1.5])
def test_a_device_that_is_not_there_is_told_before_anything_is_loaded(device: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"device is '.*'; torch .* can run a model here on cpu"):
        aq.load(tmp_path, device)
