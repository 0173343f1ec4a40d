import importlib.util
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from stored_examples import METADATA, unsealed

from arrow_quant_v2.packed import PackedTensor
from arrow_quant_v2.store import StoredModel
from arrow_quant_v2.store.record import payload_bytes
from arrow_quant_v2.store.writer import write_group

GOLDEN = Path(__file__).parent / "golden"
EXPECTED = json.loads((GOLDEN / "v2_0.json").read_text())


def maker():
    spec = importlib.util.spec_from_file_location("make_v2_0", GOLDEN / "make_v2_0.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def dequantized(tensor: PackedTensor) -> np.ndarray:
    layout = tensor.layout
    codes = tensor.codes[:, :, None] >> np.arange(0, 8, layout.bits, np.uint8) & 2**layout.bits - 1
    codes = codes.reshape(tensor.rows, -1)[:, : layout.columns].astype(np.float32)
    group = np.arange(layout.columns) // layout.group
    s = tensor.scales[:, group].astype(np.float32)
    row_scales = (tensor.row_scales.astype(np.uint32) << 16).view(np.float32)[:, None]
    zeros = np.float32(2 ** (layout.bits - 1))
    if tensor.zero_points is not None:
        zeros = tensor.zero_points[:, group] / np.float32(255 // (2**layout.bits - 1))
    return row_scales * (s * s / np.float32(65025)) * (codes - zeros)


@pytest.mark.parametrize("sealed", [True, False])
def test_schema_2_0_loads_for_ever(tmp_path, sealed) -> None:
    path = GOLDEN / "v2_0.parquet" if sealed else unsealed(GOLDEN / "v2_0.parquet", tmp_path / "a.parquet")
    model = StoredModel(path)
    for entry, expected in zip(model.entries, EXPECTED, strict=True):
        payload = model.read_chunk(entry)
        found = [None if column is None else column.tobytes().hex() for column in payload_bytes(payload)]
        assert found == expected["columns"]
        if expected["values"] is not None:
            np.testing.assert_allclose(dequantized(payload).reshape(-1), expected["values"], rtol=1e-6)


def test_the_facts_of_schema_2_0_load_for_ever() -> None:
    model = StoredModel(GOLDEN / "v2_0.parquet")
    assert model.metadata.items() >= METADATA.items()
    for entry, expected in zip(model.entries, EXPECTED, strict=True):
        facts = expected["facts"]
        assert {name: getattr(entry, name) for name in facts} == facts | {"shape": tuple(facts["shape"])}


def test_checksums_are_those_on_paper() -> None:
    assert [(one.layer_name, one.chunk, one.checksum) for one in StoredModel(GOLDEN).entries] == [
        ("attention.weight", 0, 0x0BF5E270),
        ("bias", 0, 0x332B058B),
        ("conv.weight", 0, 0x5709BD78),
        ("embedding.weight", 0, 0x222926A9),
        ("embedding.weight", 1, 0xFCEBB517),
        ("embedding.weight", 2, 0x208A3CCA),
        ("experts", 0, 0xDCC32D95),
        ("per_tensor", 0, 0x4189A62C),
        ("scalar", 0, 0xCC3CA789),
    ]


def test_the_same_arrow_writes_the_same_bytes(tmp_path) -> None:
    path = tmp_path / "again.parquet"
    write_group(path, list(maker().layers()), METADATA)
    created_by = pq.read_metadata(GOLDEN / "v2_0.parquet").created_by
    if pq.read_metadata(path).created_by != created_by:
        pytest.skip(f"the golden file is by {created_by}")
    assert path.read_bytes() == (GOLDEN / "v2_0.parquet").read_bytes()
