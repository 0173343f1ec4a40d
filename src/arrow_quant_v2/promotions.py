"""Which layers have been given more bits than asked, kept in the work folder so that a killed run goes on with them.

Knows nothing of why, beyond the words.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from arrow_quant_v2.errors import StoreError
from arrow_quant_v2.layer_widths import fallen_back

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from arrow_quant_v2.layer_widths import LayerWidth
    from arrow_quant_v2.workfolder import WorkFolder


@dataclass(frozen=True, kw_only=True)
class Promotions:
    """The widths that layers have instead of those that were asked, and after how many rounds.

    stale  numbers of parts that were made before, and have to be made again
    """

    rounds: int = 0
    widths: Mapping[str, LayerWidth] = field(default_factory=dict)
    stale: tuple[int, ...] = ()

    @classmethod
    def of(cls, folder: WorkFolder) -> Promotions:
        """What an earlier run decided; its stale parts are removed first.

        Raises:
            StoreError: it cannot be read.
        """
        text = folder.recall()
        if text is None:
            return cls()
        try:
            found = json.loads(text)
            widths = {name: fallen_back(*entry) for name, entry in found["widths"].items()}
            before = cls(rounds=int(found["rounds"]), widths=widths, stale=tuple(map(int, found["stale"])))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StoreError(f"{folder.folder}: what it says of widths is damaged; remove it to start anew") from error
        return before.kept_in(folder)

    def more(self, folder: WorkFolder, widths: Mapping[str, LayerWidth], stale: Iterable[int]) -> Promotions:
        """These layers too, decided for good; parts that do not fit them any more are gone afterwards.

        A run that is killed in between finds either what was before, or this, and what it still has to remove.
        """
        later = replace(self, rounds=self.rounds + 1, widths={**self.widths, **widths}, stale=tuple(sorted(set(stale))))
        return later.kept_in(folder)

    def kept_in(self, folder: WorkFolder) -> Promotions:
        """The same without stale parts, which are removed, once the folder tells of them."""
        folder.remember(self.text)
        if not self.stale:
            return self
        folder.forget(self.stale)
        return replace(self, stale=()).kept_in(folder)

    @property
    def text(self) -> str:
        """As it lies in the work folder."""
        widths = {name: [one.bits, one.because] for name, one in sorted(self.widths.items())}
        return json.dumps({"rounds": self.rounds, "widths": widths, "stale": self.stale}, indent=1)
