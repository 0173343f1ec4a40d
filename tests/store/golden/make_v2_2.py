"""Wrote v2_2.parquet and v2_2.json, once, with pyarrow 26. Kept to show how; never run it again.

Every file of schema 2.2 loads for ever: a newer schema gets files of its own beside these.
"""

import json
import math
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent))

from stored_examples import METADATA, chunked, record  # noqa: E402

from arrow_quant_v2.packed import Layout, PackedTensor  # noqa: E402
from arrow_quant_v2.store.record import RawTensor, payload_bytes  # noqa: E402
from arrow_quant_v2.store.rows import record_batch  # noqa: E402
from arrow_quant_v2.store.schema import FACTS  # noqa: E402
from arrow_quant_v2.store.writer import write_group  # noqa: E402


def counted(count: int, step: int) -> np.ndarray:
    return (np.arange(count) * step % 256).astype(np.uint8)


def packed(name, shape, bits, axis, group_size, *, grid="row", symmetric=False, **basis) -> PackedTensor:
    layout = Layout(shape=shape, bits=bits, quant_axis=axis, group_size=group_size, grid=grid)
    scales = counted(layout.rows * layout.scales_per_row, 53).reshape(layout.rows, -1)
    return PackedTensor(
        name=name,
        dtype="bfloat16",
        layout=layout,
        codes=counted(layout.rows * layout.row_bytes, 37).reshape(layout.rows, -1),
        scales=scales * 0 + 255 if grid == "row" else scales,
        zero_points=None if symmetric else counted(layout.rows * layout.groups, 91).reshape(layout.rows, -1),
        row_scales=(0x3F00 + np.arange(layout.rows) * 16).astype(np.uint16),
        **basis,
    )


def equalization(channels: int) -> np.ndarray:
    return np.float32(2) ** (np.arange(channels) % 7 - 3).astype(np.float32)


def layers():
    yield record(packed("affine", (4, 10), 2, 1, 4, grid="affine"))
    yield record(RawTensor(name="bias", shape=(3,), dtype="float32", values=np.array([1, -2, 0.5], "<f4").view("u1")))
    yield record(packed("conv.turned", (2, 16, 3, 3), 4, 1, 144, rotation=8), method="clip", modality="image")
    both = {"rotation": 16, "equalization": equalization(32)}
    yield record(packed("experts", (2, 2, 32), 2, 2, None, symmetric=True, **both), method="gptq")
    yield record(packed("per_tensor", (3, 5), 8, None, 64), is_diffusion_model=False)
    yield record(packed("r2q.row", (3, 16), 4, 1, None, grid="r2q", symmetric=True), method="r2q")
    yield record(packed("row.as_before", (2, 9), 4, 1, None, grid="affine"))
    yield from chunked(packed("row.int2", (5, 10), 2, 1, None, symmetric=True), 2, bits_per_weight=4.0)
    yield record(packed("row.int4", (3, 9), 4, 1, None), output_error=[0.125, 0.25])
    yield record(packed("row.int8", (2, 24), 8, 1, 1000, symmetric=True), cosine_similarity=0.75, mse=0.125)


def level(tensor: PackedTensor, row: int, column: int) -> float:
    """What one code means, in plain Python, so that nothing is shared with any program that reads the file."""
    layout = tensor.layout
    row_scale = float(np.array([int(tensor.row_scales[row]) << 16], np.uint32).view(np.float32)[0])
    bit, group = column * layout.bits, column // layout.group
    code = int(tensor.codes[row, bit // 8]) >> bit % 8 & 2**layout.bits - 1
    z = None if tensor.zero_points is None else int(tensor.zero_points[row, group])
    if layout.grid != "r2q":
        zero = 2 ** (layout.bits - 1) if z is None else z / (255 / (2**layout.bits - 1))
        scale = row_scale if layout.grid == "row" else row_scale * (int(tensor.scales[row, group]) / 255) ** 2
        return scale * (code - zero)
    m = 2 ** (layout.bits - 1) - 1
    a1, a2 = (row_scale * (int(tensor.scales[row, 2 * group + i]) / 255) ** 2 for i in range(2))
    mu = 0.0 if z is None else (a1 + m * a2) * (1 - 2 * z / 255)
    return mu + (a1 if code > m else -a1) + a2 * (2 * (code % (m + 1)) - m)


def sign(channel: int) -> int:
    channel ^= channel >> 16
    channel = channel * 0x7FEB352D % 2**32
    channel ^= channel >> 15
    channel = channel * 0x846CA68B % 2**32
    return -1 if (channel ^ channel >> 16) & 1 else 1


def unturned(values: list[float], block: int) -> list[float]:
    """Each block times Sylvester's matrix, whose entries are -1 where i and j share an odd number of bits."""
    result = []
    for j in range(len(values)):
        start = j - j % block
        total = sum((-1) ** (i & j % block).bit_count() * values[start + i] for i in range(block))
        result.append(sign(j) * total / math.sqrt(block))
    return result


def dequantized(tensor: PackedTensor) -> list[float]:
    """The weight in its original basis, one row and one place of the kernel at a time."""
    layout, values = tensor.layout, []
    kernel = layout.columns // (layout.channels or layout.columns)
    for row in range(tensor.rows):
        found = [level(tensor, row, column) for column in range(layout.columns)]
        for place in range(kernel):
            along = found[place::kernel]
            if tensor.rotation:
                along = unturned(along, tensor.rotation)
            if tensor.equalization is not None:
                along = [value / float(s) for value, s in zip(along, tensor.equalization, strict=True)]
            found[place::kernel] = along
        values += found
    return values


def expected(one) -> dict[str, object]:
    payload = one.payload
    columns = [None if column is None else column.tobytes().hex() for column in payload_bytes(payload)]
    values = None if isinstance(payload, RawTensor) else dequantized(payload)
    (row,) = record_batch([one]).to_pylist()
    facts = {name: row[name] for name in FACTS.names}
    return {"facts": facts, "columns": columns, "values": values}


if __name__ == "__main__":
    write_group(HERE / "v2_2.parquet", list(layers()), METADATA)
    (HERE / "v2_2.json").write_text(json.dumps([expected(one) for one in layers()], indent=1) + "\n")
