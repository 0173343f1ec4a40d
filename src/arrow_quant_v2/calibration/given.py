"""What a person gave to calibrate with, a file or a function, as calls of the model. Knows no trajectories."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from arrow_quant_v2.calibration.arrays import SUFFIXES as ARRAYS
from arrow_quant_v2.calibration.arrays import read_arrays
from arrow_quant_v2.calibration.files import read_rows
from arrow_quant_v2.calibration.masked_text import maskable, masked_calls, masked_fraction
from arrow_quant_v2.calibration.sample import Sample
from arrow_quant_v2.calibration.tokens import argument_names, shown, vocabulary_of
from arrow_quant_v2.errors import ConfigurationError, SourceError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    from torch import nn

    from arrow_quant_v2.calibration.files import Row
    from arrow_quant_v2.calibration.runnable import Runnable
    from arrow_quant_v2.calibration.tokens import Vocabulary

ROWS = (".jsonl", ".parquet", ".txt")
TEXTS, TOKENS = ("text", "prompt"), ("input_ids", "tokens")
LONGEST = 2048  # tokens of a text that are looked at, as in Quant-dLLM (arXiv 2510.03274)
TIMESTEP = "timestep"
MOST_USES = (
    32  # times at which a sequence is shown for the sake of tokens: it teaches less each time, and takes as long
)
SHORTEST = 8  # tokens of a sequence: so many rows of texts are read, where tokens are asked for
SURROGATE = re.compile("[\ud800-\udfff]")  # what JSON can write and no tokenizer can read
OF_AN_INPUT = {"data", "shape", TIMESTEP, "inputs"}
LARGEST = torch.finfo(torch.float32).max


@dataclass(frozen=True, kw_only=True, eq=False)
class Given:
    """What a file holds: calls, or prompts that a pipeline turns into calls; and what a person should know of it."""

    calls: tuple[Sample, ...] = ()
    prompts: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def from_file(
    runnable: Runnable, path: Path, count: int, seed: int, length: int | None = None, *, tokens: int = 0
) -> Given:
    """`count` calls from a file, of texts as many more as it takes to show `tokens` tokens; fewer where it holds fewer.

    `.jsonl` and `.parquet` rows hold one of: `text`; `input_ids` or `tokens`; `prompt`; or an input as it is: `data`, a
    flat list of numbers, with its `shape` (the batch axis included), its `timestep`, in `inputs` the name of the
    forward's argument (else the first), and further arguments by their names, as numbers or lists of them: 3 is the
    vector of one that `class_labels` are for a batch of one. `.txt` holds a text a line. `.safetensors` holds tensors
    named like arguments, with the samples along the first axis, and the vector `timestep`. `.npy` holds the first
    argument, or token ids.

    Of a masked text model, sequences are masked at times stratified over (0, 1], and used again where there are fewer
    of them than `count`, or, at most 32 times, than hold `tokens`; those with mask tokens are shown as they are. Of
    other text models all are shown as they are, at time 0. Texts are cut to `length` tokens, else to the model's
    context, at most 2,048.

    Raises:
        ConfigurationError: the file cannot be read, is not for this model, or over 10% of its rows are bad.
        SourceError: an array file is damaged.
    """
    if not path.is_file():
        raise ConfigurationError(f"{path}: is no file; give one that ends in {', '.join((*ROWS, *ARRAYS))}")
    if path.suffix in ARRAYS:
        found: Sequence[_Row] = _array_rows(runnable, path, count)
        notes: tuple[str, ...] = ()
    elif path.suffix in ROWS:
        rows = max(count, tokens // SHORTEST) if is_text(runnable) else count
        usable = read_rows(path, rows, _reader(runnable, length))
        found, notes = usable.made, usable.notes
    else:
        raise ConfigurationError(f"{path}: is of an unknown kind; allowed are {', '.join((*ROWS, *ARRAYS))}")
    prompts = tuple(row for row in found if isinstance(row, str))
    calls = tuple(row for row in found if isinstance(row, Sample))
    sequences = [row for row in found if isinstance(row, torch.Tensor)]
    if prompts and calls:
        raise ConfigurationError(f"{path}: holds prompts and inputs; give one kind in a file")
    calls, asked, most = calls[:count], enough(sequences, tokens), MOST_USES * len(sequences)
    wanted = max(count - len(calls), min(asked, most))
    more = sequence_calls(runnable, sequences, wanted, seed) if sequences else ()
    if runnable.mask_token is not None and wanted < asked:
        notes = (*notes, few_tokens(path, sequences, wanted, tokens))
    return Given(calls=(*calls, *more), prompts=prompts, notes=notes)


def few_tokens(path: Path, sequences: Sequence[torch.Tensor], shown_times: int, tokens: int) -> str:
    """That a file holds too little text for what was asked."""
    held = sum(map(len, sequences))
    return (
        f"{path.name}: {len(sequences)} sequences of {held:,} tokens are shown {shown_times:,} times in all, which is"
        f" less than the {tokens:,} tokens asked for (calibration_tokens); more texts calibrate better"
    )


def enough(sequences: Sequence[torch.Tensor], tokens: int) -> int:
    """How many sequences of these lengths, one after the other and over again, hold so many tokens."""
    whole = sum(len(sequence) for sequence in sequences)
    if not whole:
        return 0
    rounds, rest = divmod(tokens, whole)
    reached = itertools.accumulate(len(sequence) for sequence in sequences)
    return rounds * len(sequences) + (1 + sum(total < rest for total in reached) if rest else 0)


def is_text(runnable: Runnable) -> bool:
    """Whether the model is shown tokens."""
    return runnable.modality in {"text", "code"}


def sequence_calls(runnable: Runnable, sequences: Sequence[torch.Tensor], count: int, seed: int) -> tuple[Sample, ...]:
    """Sequences of ids (length,) shown to a masked model at `count` times, or to another one as they are."""
    if runnable.mask_token is None:
        return tuple(shown(runnable.module, ids, 0.0) for ids in sequences[:count])
    special = vocabulary_of(runnable).special
    return masked_calls(runnable.module, sequences, count, mask=runnable.mask_token, special=special, seed=seed)


# Rows of a text file: each becomes a sequence of ids (length,), a call, or a prompt

_Row = torch.Tensor | Sample | str


def _reader(runnable: Runnable, length: int | None) -> Callable[[Row, str], _Row]:
    if not is_text(runnable):
        return partial(_image_row, runnable)
    vocabulary = vocabulary_of(runnable)
    longest = min(length or LONGEST, vocabulary.context or LONGEST)
    return partial(_text_row, runnable, vocabulary, longest)


def _image_row(runnable: Runnable, row: Row, where: str) -> _Row:
    if "data" in row:
        return _input(runnable, row, where)
    return _text(row, where, (*TEXTS, "data"))


def _text_row(runnable: Runnable, vocabulary: Vocabulary, longest: int, row: Row, where: str) -> _Row:
    if "data" in row:
        return _input(runnable, row, where)
    key = next((key for key in TOKENS if key in row), None)
    ids = _ids(row[key], where) if key else _tokenized(runnable, row, longest, where)
    return _sequence(runnable, vocabulary, ids[:longest], where)


def _text(row: Row, where: str, allowed: tuple[str, ...]) -> str:
    key = next((key for key in TEXTS if key in row), None)
    if key is None:
        found = ", ".join(map(str, row)) or "nothing"
        raise SourceError(f"{where}: holds {found[:80]}; one of {', '.join(allowed)} is needed")
    text = row[key]
    if not isinstance(text, str) or not text.strip() or SURROGATE.search(text):
        raise SourceError(f"{where}: {key} is {ascii(text)[:40]}; a text is needed")
    return text


def _ids(entry: object, where: str) -> list[int]:
    if not isinstance(entry, list) or not entry or not all(type(token) is int for token in entry):
        raise SourceError(f"{where}: token ids are {str(entry)[:40]}; a list of whole numbers is needed")
    return entry


def _tokenized(runnable: Runnable, row: Row, longest: int, where: str) -> list[int]:
    text = _text(row, where, (*TEXTS, *TOKENS, "data"))
    if runnable.tokenizer is None:
        raise SourceError(f"{where}: is a text, and the model has no tokenizer; give token ids (input_ids)")
    return list(runnable.tokenizer(text, truncation=True, max_length=longest)["input_ids"])


def _sequence(runnable: Runnable, vocabulary: Vocabulary, tokens: list[int], where: str) -> torch.Tensor | Sample:
    """The ids, to be masked; or a call where they hold mask tokens already."""
    wrong = next((token for token in tokens if not 0 <= token < vocabulary.size), None)
    if wrong is not None:
        found = str(wrong)[:20]
        raise SourceError(f"{where}: token {found} is none of the model's, which are 0 to {vocabulary.size - 1}")
    ids, mask = torch.tensor(tokens), runnable.mask_token
    if mask is not None and mask in tokens:
        return shown(runnable.module, ids, masked_fraction(ids, mask))
    if mask is not None and not len(maskable(ids, vocabulary.special)):
        raise SourceError(f"{where}: holds special tokens alone, and nothing that could be masked")
    return ids


# Inputs as they are


def _input(runnable: Runnable, row: Row, where: str) -> Sample:
    shape: Any = row.get("shape")
    data: Any = row["data"]
    timestep: Any = row.get(TIMESTEP)
    if not isinstance(shape, list) or not shape or not all(type(size) is int and size > 0 for size in shape):
        raise SourceError(f"{where}: shape is {str(shape)[:40]}; a list of positive whole numbers is needed")
    if not isinstance(data, list) or len(data) != math.prod(shape):
        found = f"{len(data)} numbers" if isinstance(data, list) else type(data).__name__
        raise SourceError(f"{where}: data is {found}; shape {shape} needs a list of {math.prod(shape)}")
    if not all(type(number) in {int, float} for number in (*data, timestep)):
        raise SourceError(f"{where}: data and timestep hold something that is no number")
    if not all(-LARGEST <= number <= LARGEST for number in (*data, timestep)):
        raise SourceError(f"{where}: data and timestep hold a number that float32 cannot hold")
    name = str(row.get("inputs", next(iter(argument_names(runnable.module)), None)))
    if name == "input_ids":
        raise SourceError(f"{where}: data is for input_ids; give token ids as a row {{'input_ids': [...]}}")
    values = torch.tensor(data, dtype=torch.float32).reshape(shape)
    further = {key: _tensor(key, entry, where) for key, entry in row.items() if key not in OF_AN_INPUT}
    if name in further:
        raise SourceError(f"{where}: {name} is given twice, as data and by its name")
    try:
        return _call(runnable, {**further, name: values}, float(timestep), where)
    except ConfigurationError as error:
        raise SourceError(str(error)) from error


def _tensor(name: str, entry: object, where: str) -> torch.Tensor:
    """Of a number, (1,), or of lists of them that lie evenly: whole numbers stay whole, others are float32."""
    try:
        found = torch.tensor(entry if isinstance(entry, list) else [entry])
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        reason = f"{where}: {name} is {str(entry)[:40]}; a number is needed, or lists of them of one length"
        raise SourceError(reason) from error
    if not found.isfinite().all():
        raise SourceError(f"{where}: {name} holds a number that is not finite")
    return found


def _call(runnable: Runnable, arguments: dict[str, torch.Tensor], timestep: float, where: str) -> Sample:
    """The call with these arguments; the timestep is among them where the forward takes it."""
    known = argument_names(runnable.module)
    if unknown := sorted(set(arguments) - set(known)):
        raise ConfigurationError(
            f"{where}: {', '.join(unknown)} is no argument of the model's forward; allowed are {', '.join(known)}"
        )
    times = {TIMESTEP: torch.tensor([timestep])} if TIMESTEP in known else {}
    return Sample(keywords={**arguments, **times}, timestep=timestep)


def _array_rows(runnable: Runnable, path: Path, count: int) -> list[_Row]:
    names = argument_names(runnable.module)
    if not names:
        raise ConfigurationError(f"{path}: the model's forward names no argument that the arrays could be for")
    rows = read_arrays(path, count, names[0]).items()
    return [_array_row(runnable, arrays, f"{path.name} sample {at}") for at, arrays in rows]


def _array_row(runnable: Runnable, arrays: dict[str, torch.Tensor], where: str) -> _Row:
    times, ids = arrays.pop(TIMESTEP, None), arrays.get("input_ids")
    if ids is not None and (ids.is_floating_point() or ids.ndim != 2 or not ids.numel()):  # noqa: PLR2004
        raise ConfigurationError(f"{where}: input_ids are {ids.dtype} {tuple(ids.shape)}; rows of token ids are needed")
    if times is None and len(arrays) == 1 and ids is not None and is_text(runnable):
        return _sequence(runnable, vocabulary_of(runnable), ids[0].tolist(), where)
    if times is None and TIMESTEP in argument_names(runnable.module):
        raise ConfigurationError(f"{where}: has no timestep, which the model needs; add the vector 'timestep'")
    if times is not None and times.numel() != 1:
        raise ConfigurationError(f"{where}: timestep has {times.numel()} numbers; a vector, one a sample, is needed")
    return _call(runnable, arrays, 0.0 if times is None else times.item(), where)


# A function of the user's own


def from_callable(
    module: nn.Module, make: Callable[[nn.Module], Iterable[tuple[object, float]]], count: int
) -> tuple[Sample, ...]:
    """The first `count` items (inputs, timestep) that `make(module)` gives.

    Inputs are a dict of the forward's arguments by name, a tuple of them, or a tensor, its first.

    Raises:
        ConfigurationError: an item is something else, or there is none.
    """
    calls = tuple(_item(item, number) for number, item in enumerate(itertools.islice(make(module), count), 1))
    if not calls:
        raise ConfigurationError("the calibration function gave no samples; at least one (inputs, timestep) is needed")
    return calls


def _item(item: object, number: int) -> Sample:
    if not isinstance(item, tuple) or len(item) != 2:  # noqa: PLR2004
        raise ConfigurationError(f"calibration sample {number}: is {_kind(item)}; a pair (inputs, timestep) is needed")
    inputs, timestep = item[0], _timestep(item[1], number)
    if isinstance(inputs, torch.Tensor):
        return Sample(arguments=(_on_cpu(inputs),), timestep=timestep)
    if isinstance(inputs, tuple) and _holds_tensor(inputs):
        return Sample(arguments=tuple(map(_on_cpu, inputs)), timestep=timestep)
    if isinstance(inputs, Mapping) and all(isinstance(key, str) for key in inputs) and _holds_tensor(inputs.values()):
        return Sample(keywords={key: _on_cpu(entry) for key, entry in inputs.items()}, timestep=timestep)
    raise ConfigurationError(
        f"calibration sample {number}: its inputs are {_kind(inputs)}; a tensor is needed, a tuple with tensors, or a"
        " dict with tensors by the names of the forward's arguments"
    )


def _timestep(entry: object, number: int) -> float:
    value: Any = entry.item() if isinstance(entry, torch.Tensor) and entry.numel() == 1 else entry
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ConfigurationError(f"calibration sample {number}: its timestep is {_kind(entry)}; a number is needed")
    return float(value)


def _kind(entry: object) -> str:
    return f"{entry!r}"[:40] if isinstance(entry, (int, float, str, type(None))) else f"a {type(entry).__name__}"


def _holds_tensor(entries: Iterable[object]) -> bool:
    return any(isinstance(entry, torch.Tensor) for entry in entries)


def _on_cpu(entry: object) -> object:
    return entry.detach().cpu() if isinstance(entry, torch.Tensor) else entry
