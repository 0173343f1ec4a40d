"""AutoRound: its rounding without tuning of one weight, and a whole model by itself. Knows nothing of clocks."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from auto_round import AutoRound
from auto_round.data_type.int import quant_tensor_opt_rtn_sym, quant_tensor_rtn_sym
from packing import Quantized, as_stored, bits_of_weight, restore, stored
from torch import Tensor
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer

__all__ = ["quantize", "quantize_model", "restore", "stored"]

ITERATIONS = 50  # of its own light recipe; 200 as it comes take a quarter of an hour for AntiBERTy at one width
SEARCHED_BELOW = 8  # bits; at 8 AutoRound itself turns its search of scales off


def quantize(weight: Tensor, bits: int, group_size: int, products: Tensor) -> Quantized:
    """What `iters=0` does: scales searched for with the inputs' mean squares as importance."""
    if bits < SEARCHED_BELOW:
        restored, scale, _ = quant_tensor_opt_rtn_sym(weight.clone(), bits, group_size, imatrix=products.diagonal())
    else:
        restored, scale, _ = quant_tensor_rtn_sym(weight.clone(), bits, group_size)
    return Quantized(restored, as_stored(weight, bits, scale.numel()))


def quantize_model(
    described: Mapping[str, Any], names: Iterable[str], bits: int, group_size: int
) -> tuple[dict[str, Tensor], float]:
    """Signed gradient descent, block by block, on the same calls; and the bits of a weight."""
    folder = Path(described["folder"])
    model: Any = str(folder)
    tokenizer, calls = None, same_length(described["calls"])
    if calls:
        model = with_places(folder, names)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    run = AutoRound(
        model,
        tokenizer,
        bits=bits,
        group_size=group_size,
        iters=ITERATIONS,
        dataset=calls or None,
        nsamples=len(calls) or 1,
        seqlen=calls[0]["input_ids"].shape[1] if calls else 1,
        device_map="cpu",
        enable_torch_compile=False,
    )
    quantized, _ = run.quantize()
    own = dict(quantized.named_parameters(remove_duplicate=False))
    return {place: own[place] for place in names}, bits_of_weight(bits, group_size)


def same_length(rows: Iterable[list[int]]) -> list[dict[str, Tensor]]:
    """Calls of as many tokens as most rows have at least; shorter ones are left out, because it wants one length."""
    lengths = sorted(map(len, rows))
    length = lengths[len(lengths) // 4] if lengths else 0
    cut = [torch.tensor([row[:length]]) for row in rows if len(row) >= length]
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in cut]


def with_places(folder: Path, names: Iterable[str]) -> Any:
    """The model with all of these parameters: without a head where none is compared, since that renames the others."""
    for kind in (AutoModel, AutoModelForMaskedLM):
        model = kind.from_pretrained(folder, dtype=torch.float32)
        if set(names) <= {place for place, _ in model.named_parameters(remove_duplicate=False)}:
            return model
    raise ValueError(f"{folder.name}: no class of transformers has all of its weights")
