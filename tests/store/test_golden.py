import importlib.util
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from stored_examples import METADATA, unsealed

from arrow_quant_v2.kernels.tensors import dequantized
from arrow_quant_v2.store import StoredModel
from arrow_quant_v2.store.record import payload_bytes
from arrow_quant_v2.store.writer import write_group

GOLDEN = Path(__file__).parent / "golden"
VERSIONS = ("v2_0", "v2_1", "v2_2")
EXPECTED = {version: json.loads((GOLDEN / f"{version}.json").read_text()) for version in VERSIONS}


def maker(version: str):
    spec = importlib.util.spec_from_file_location(f"make_{version}", GOLDEN / f"make_{version}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("sealed", [True, False])
@pytest.mark.parametrize("version", VERSIONS)
def test_every_schema_loads_for_ever(tmp_path, version, sealed) -> None:
    golden = GOLDEN / f"{version}.parquet"
    model = StoredModel(golden if sealed else unsealed(golden, tmp_path / "a.parquet"))
    for entry, expected in zip(model.entries, EXPECTED[version], strict=True):
        payload = model.read_chunk(entry)
        found = [None if column is None else column.tobytes().hex() for column in payload_bytes(payload)]
        assert found == expected["columns"]
        if expected["values"] is not None:
            values = dequantized(payload).flatten()
            np.testing.assert_allclose(values, expected["values"], rtol=1e-6, atol=1e-6 * float(values.abs().max()))


@pytest.mark.parametrize("version", VERSIONS)
def test_the_facts_of_every_schema_load_for_ever(version) -> None:
    model = StoredModel(GOLDEN / f"{version}.parquet")
    assert model.metadata.items() >= METADATA.items()
    for entry, expected in zip(model.entries, EXPECTED[version], strict=True):
        facts = expected["facts"]
        assert {name: getattr(entry, name) for name in facts} == facts | {"shape": tuple(facts["shape"])}


def test_equalization_scales_mean_nothing_before_2_1() -> None:
    (conv,) = StoredModel(GOLDEN / "v2_0.parquet").chunks("conv.weight")
    assert conv.spatial_quant["channel_equalization"]
    assert (conv.equalization, conv.rotation, conv.grid, conv.layout.grid) == (None, None, None, "affine")


def test_checksums_are_those_on_paper() -> None:
    assert [(one.layer_name, one.chunk, one.checksum) for one in StoredModel(GOLDEN / "v2_0.parquet").entries] == [
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

    assert [(one.layer_name, one.chunk, one.checksum) for one in StoredModel(GOLDEN / "v2_1.parquet").entries] == [
        ("affine", 0, 0x0BF5E270),
        ("bias", 0, 0x332B058B),
        ("conv.turned", 0, 0x9E30DF89),
        ("equalized", 0, 0x9234DD19),
        ("equalized", 1, 0x09946617),
        ("experts.turned", 0, 0x62AB237D),
        ("r2q.int2", 0, 0xCD5E0A67),
        ("r2q.int4", 0, 0x91C1C362),
        ("r2q.int8", 0, 0x42F710CA),
        ("turned", 0, 0xEDB69185),
    ]

    assert [(one.layer_name, one.chunk, one.checksum) for one in StoredModel(GOLDEN / "v2_2.parquet").entries] == [
        ("affine", 0, 0x0BF5E270),
        ("bias", 0, 0x332B058B),
        ("conv.turned", 0, 0x37D992CC),
        ("experts", 0, 0x2FE5E8D5),
        ("per_tensor", 0, 0xDD15F38E),
        ("r2q.row", 0, 0x91C1C362),
        ("row.as_before", 0, 0x94B58BBF),
        ("row.int2", 0, 0xA6FCEE42),
        ("row.int2", 1, 0x5779C784),
        ("row.int2", 2, 0x3F442ADF),
        ("row.int4", 0, 0x12056C03),
        ("row.int8", 0, 0x27D2553A),
    ]


def test_the_same_arrow_writes_the_same_bytes(tmp_path) -> None:
    path, golden = tmp_path / "again.parquet", GOLDEN / f"{VERSIONS[-1]}.parquet"
    write_group(path, list(maker(VERSIONS[-1]).layers()), METADATA)
    created_by = pq.read_metadata(golden).created_by
    if pq.read_metadata(path).created_by != created_by:
        pytest.skip(f"the golden file is by {created_by}")
    assert path.read_bytes() == golden.read_bytes()
