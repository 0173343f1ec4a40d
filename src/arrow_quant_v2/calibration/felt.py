"""What outputs felt of every call of a model that was looked at, in a folder; knows nothing of gradients.

    81c0....-12.safetensors    name of a weight -> (rows,) float32, of call 12

What is damaged, or was asked otherwise, is as if it were not there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from arrow_quant_v2.calibration import tensor_file

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Felt:
    """Where it is kept, and a hash of the model, the calls and the seed; no folder: nowhere."""

    folder: Path | None = None
    key: str = ""

    def known(self, count: int) -> list[Mapping[str, Tensor]]:
        """Of the first calls, `count` at most, as far as nothing is missing."""
        found: list[Mapping[str, Tensor]] = []
        while self.folder is not None and len(found) < count:
            one = tensor_file.kept(self._path(self.folder, len(found)))
            if one is None:
                break
            found.append(one[0])
        return found

    def keep(self, call: int, rows: Mapping[str, Tensor]) -> None:
        """Write down what was felt of one call.

        Raises:
            StoreError: the disk refuses.
        """
        if self.folder is not None:
            tensor_file.keep(self._path(self.folder, call), rows, {})

    def _path(self, folder: Path, call: int) -> Path:
        return folder / f"{self.key}-{call}.safetensors"


NOWHERE = Felt()
