"""A model that runs from its packed weights takes less memory than the model that was quantized."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest
from packed_models import pair
from small_models import run_python
from text_models import save_folder, small_module

if TYPE_CHECKING:
    from pathlib import Path

GROWN = """
import sys, torch, transformers, arrow_quant_v2.runtime.load
from arrow_quant_v2 import load
from transformers import BertModel

def highest():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

read = {"packed": load, "plain": BertModel.from_pretrained}[sys.argv[1]]
before = highest()
with torch.no_grad():
    read(sys.argv[2]).eval()(input_ids=torch.arange(32)[None])
print(highest() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_packed_model_takes_less_than_half_of_what_it_was(tmp_path: Path) -> None:
    sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 5, "num_attention_heads": 12}
    module = small_module("BertModel", **sizes, vocab_size=8000)  # 43 million weights, 170 MB
    both = pair(save_folder(tmp_path / "source", module), tmp_path, group_size=64, method="rtn")
    done = [run_python(GROWN, "packed", both.quantized), run_python(GROWN, "plain", both.dequantized)]
    assert [run.code for run in done] == [0, 0], done
    packed, plain = (int(run.out.split()[-1]) for run in done)
    assert plain > 150_000
    assert packed < plain / 2
