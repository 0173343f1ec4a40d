"""Small text models of transformers, with and without a tokenizer, saved as a person would have them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

sys.path.append(str(Path(__file__).parent))  # for its own modules, which pytest's importlib mode does not find

from text_models import WORDS, opened, save_bert

if TYPE_CHECKING:
    from collections.abc import Iterator

    from arrow_quant_v2.calibration.runnable import Runnable


@pytest.fixture(scope="session")
def masked_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A masked language model with a tokenizer."""
    return save_bert(tmp_path_factory.mktemp("masked"), "BertForMaskedLM", words=WORDS)


@pytest.fixture(scope="session")
def masked(masked_folder: Path) -> Runnable:
    return opened(masked_folder)


@pytest.fixture(scope="session")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Runnable:
    """A masked language model of which only the mask token is known."""
    return opened(save_bert(tmp_path_factory.mktemp("bare"), "BertForMaskedLM"), mask_token=4)


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Runnable:
    """A model with a tokenizer and without logits."""
    return opened(save_bert(tmp_path_factory.mktemp("encoder"), "BertModel", words=WORDS))


@pytest.fixture
def torch_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _untouched_torch() -> Iterator[None]:
    """Nothing that calibration does may move the global generator, or a flag of torch."""
    torch.manual_seed(1234)
    before = torch.get_rng_state(), torch.get_default_dtype(), torch.is_grad_enabled()
    yield
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (torch.get_default_dtype(), torch.is_grad_enabled()) == before[1:]


@pytest.fixture
def jsonl(tmp_path: Path) -> Any:
    def write(*rows: object, name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return path

    return write
