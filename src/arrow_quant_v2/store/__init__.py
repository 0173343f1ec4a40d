"""Parquet V2 Extended, read and written; knows nothing of how codes were chosen, and loads no torch."""

from arrow_quant_v2.store.entries import LayerEntry
from arrow_quant_v2.store.merge import merge_parts
from arrow_quant_v2.store.reader import StoredModel
from arrow_quant_v2.store.record import LayerRecord, Payload, RawTensor
from arrow_quant_v2.store.writer import make_durable, write_part

__all__ = [
    "LayerEntry",
    "LayerRecord",
    "Payload",
    "RawTensor",
    "StoredModel",
    "make_durable",
    "merge_parts",
    "write_part",
]
