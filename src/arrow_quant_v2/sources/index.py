"""The index of a sharded model: which file holds which tensor. Knows nothing of what lies in the shards."""

from __future__ import annotations

from typing import TYPE_CHECKING

from arrow_quant_v2.errors import SourceError
from arrow_quant_v2.sources.files import read_json, refuse_traversal

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path


def read_index(index: Path) -> dict[str, Path]:
    """Tensor name -> shard, from the `weight_map` of a `*.index.json`.

    Raises:
        SourceError: the file is no index, or names a shard outside its folder.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceError(f"{index}: has no `weight_map` from tensor names to files; save the model again")
    places = {}
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str):
            raise SourceError(f"{index}: tensor {tensor!r} points at {shard!r}; the name of a file is needed")
        places[tensor] = index.parent / refuse_traversal(shard, f"{index}: tensor {tensor!r}")
    return places


def shards_of(places: dict[str, Path], index: Path) -> tuple[Path, ...]:
    """The distinct shards, sorted.

    Raises:
        SourceError: one of them is missing.
    """
    shards = tuple(sorted(set(places.values())))
    missing = [shard.name for shard in shards if not shard.exists()]
    if missing:
        raise SourceError(
            f"{index}: {len(missing)} of {len(shards)} shards are missing: {', '.join(missing[:3])}; download them"
        )
    return shards


def refuse_lost_tensors(places: dict[str, Path], held: Iterable[tuple[str, Path]], index: Path) -> None:
    """Check that every tensor lies in the shard that the index promises; `held` is what the shards hold.

    Raises:
        SourceError: a shard does not hold a tensor.
    """
    found = set(held)
    for tensor, shard in places.items():
        if (tensor, shard) not in found:
            raise SourceError(
                f"{index}: says that {shard.name} holds tensor {tensor!r}, which it does not;"
                " the shards are of another version: download index and shards together"
            )
