"""What every source of weights offers: names, shapes and slices of values. Knows nothing of quantization or files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from arrow_quant_v2.packed import TensorInfo


class Source(Protocol):
    """Named tensors that are read lazily, slice by slice; the whole model is never in memory.

    Slices are counted in elements of the flattened, row-major tensor, so that any layout of rows can be
    read in bounded memory. Reading is safe from several threads at once.
    """

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        """Every tensor, sorted by name; the order is the same in every run."""
        ...

    @property
    def location(self) -> str:
        """Where the weights lie, for messages: a path, or the class of a live module."""
        ...

    @property
    def weight_files(self) -> tuple[Path, ...]:
        """The files that hold the weights and must not be copied beside the quantized ones."""
        ...

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Elements [start, stop) of the flattened tensor, 1-D, contiguous, in the tensor's own dtype, on the CPU.

        Raises:
            SourceError: the tensor is unknown, the slice lies outside it, or the bytes cannot be read.
        """
        ...

    def close(self) -> None:
        """Give file handles and maps back; reading afterwards is an error."""
        ...
