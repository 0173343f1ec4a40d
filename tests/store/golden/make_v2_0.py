"""Wrote v2_0.parquet and v2_0.json, once, with pyarrow 26. Kept to show how; never run it again.

Every file of schema 2.0 loads for ever: a newer schema gets files of its own beside these.
"""

import json
import math
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent))

from stored_examples import METADATA, SPATIAL, STATS, TIME_AWARE, chunked, record  # noqa: E402

from arrow_quant_v2.packed import Layout, PackedTensor  # noqa: E402
from arrow_quant_v2.store.record import RawTensor, payload_bytes  # noqa: E402
from arrow_quant_v2.store.rows import record_batch  # noqa: E402
from arrow_quant_v2.store.schema import FACTS  # noqa: E402
from arrow_quant_v2.store.writer import write_group  # noqa: E402


def counted(count: int, step: int) -> np.ndarray:
    return (np.arange(count) * step % 256).astype(np.uint8)


def packed(name, shape, bits, axis, group_size, *, symmetric=False) -> PackedTensor:
    layout = Layout(shape=shape, bits=bits, quant_axis=axis, group_size=group_size)
    grid = (layout.rows, layout.groups)
    return PackedTensor(
        name=name,
        dtype="bfloat16",
        layout=layout,
        codes=counted(layout.rows * layout.row_bytes, 37).reshape(layout.rows, -1),
        scales=counted(math.prod(grid), 53).reshape(grid),
        zero_points=None if symmetric else counted(math.prod(grid), 91).reshape(grid),
        row_scales=(0x3F00 + np.arange(layout.rows) * 16).astype(np.uint16),
    )


def layers():
    yield record(packed("attention.weight", (4, 10), 2, 1, 4), cosine_similarity=0.75, mse=0.125, modality="text")
    yield record(RawTensor(name="bias", shape=(3,), dtype="float32", values=np.array([1, -2, 0.5], "<f4").view("u1")))
    yield record(packed("conv.weight", (2, 3, 2, 2), 8, 1, 5), spatial_quant=SPATIAL, method="gptq")
    yield from chunked(packed("embedding.weight", (5, 6), 4, 1, None, symmetric=True), 2, modality="text")
    yield record(packed("experts", (2, 2, 7), 4, 2, 3), time_aware_quant=TIME_AWARE, activation_stats=STATS)
    yield record(packed("per_tensor", (3, 5), 4, None, None), is_diffusion_model=False)
    yield record(RawTensor(name="scalar", shape=(), dtype="bfloat16", values=np.array([0x80, 0x3F], np.uint8)))


def dequantized(tensor: PackedTensor) -> list[float]:
    """One weight at a time in plain Python, so that nothing is shared with any program that reads the file."""
    layout, values = tensor.layout, []
    for row in range(tensor.rows):
        row_scale = float(np.array([int(tensor.row_scales[row]) << 16], np.uint32).view(np.float32)[0])
        for column in range(layout.columns):
            bit = column * layout.bits
            code = int(tensor.codes[row, bit // 8]) >> bit % 8 & 2**layout.bits - 1
            s = int(tensor.scales[row, column // layout.group])
            zero = 2 ** (layout.bits - 1)
            if tensor.zero_points is not None:
                zero = int(tensor.zero_points[row, column // layout.group]) / (255 // (2**layout.bits - 1))
            values.append(row_scale * (s * s / 65025) * (code - zero))
    return values


def expected(one) -> dict[str, object]:
    payload = one.payload
    columns = [None if column is None else column.tobytes().hex() for column in payload_bytes(payload)]
    values = None if isinstance(payload, RawTensor) else dequantized(payload)
    (row,) = record_batch([one]).to_pylist()
    facts = {name: row[name] for name in FACTS.names}
    return {"facts": facts, "columns": columns, "values": values}


if __name__ == "__main__":
    write_group(HERE / "v2_0.parquet", list(layers()), METADATA)
    (HERE / "v2_0.json").write_text(json.dumps([expected(one) for one in layers()], indent=1) + "\n")
