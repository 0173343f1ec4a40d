"""Following the libraries' imports: found as without us, registered once, whatever comes first."""

from __future__ import annotations

import importlib.util
import inspect
import sys

import diffusers
import transformers
from diffusers.models import modeling_utils as diffusers_models
from diffusers.quantizers import auto as diffusers_quantizers
from transformers import modeling_utils as transformers_models
from transformers.quantizers import auto as transformers_quantizers

from arrow_quant_v2.runtime.registration import FOLLOWED, Follower, follow


def test_following_again_changes_nothing() -> None:
    before = transformers.PreTrainedModel.from_pretrained.__func__, diffusers.ModelMixin.save_pretrained
    follow()
    follow()
    assert (transformers.PreTrainedModel.from_pretrained.__func__, diffusers.ModelMixin.save_pretrained) == before
    assert sum(isinstance(finder, Follower) for finder in sys.meta_path) == 1


def test_both_libraries_know_the_method() -> None:
    for tables in (transformers_quantizers, diffusers_quantizers):
        assert tables.AUTO_QUANTIZER_MAPPING["arrow_quant"].__module__.startswith("arrow_quant_v2.")
        settings = tables.AUTO_QUANTIZATION_CONFIG_MAPPING["arrow_quant"].from_dict({"bits": 4})
        assert settings.to_dict()["quant_method"] == "arrow_quant"
        assert settings.to_dict()["bits"] == 4


def test_a_followed_module_is_found_as_without_us() -> None:
    for name in FOLLOWED:
        ours = importlib.util.find_spec(name)
        (theirs,) = (finder for finder in [Follower()] if isinstance(finder, Follower))
        found = theirs.find_spec(name, sys.modules[name.rpartition(".")[0]].__path__)
        assert ours is not None
        assert found is not None
        assert found.origin == ours.origin


def test_other_modules_are_none_of_our_business() -> None:
    assert Follower().find_spec("json", None) is None
    assert Follower().find_spec("transformers", None) is None


def test_a_followed_module_that_does_not_exist_is_not_found() -> None:
    assert Follower().find_spec(next(iter(FOLLOWED)), []) is None


def test_the_wrapped_methods_look_as_before() -> None:
    for base in (transformers_models.PreTrainedModel, diffusers_models.ModelMixin):
        assert "safetensors" in (base.from_pretrained.__doc__ or "")
        assert "save_directory" in inspect.signature(base.save_pretrained).parameters
