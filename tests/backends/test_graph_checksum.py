from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tcaq_lightning.artifact.directory import weights_digest
from tcaq_lightning.backends.engines import open_engine
from tcaq_lightning.backends.graph.build import build_graph
from tcaq_lightning.backends.graph_checksum import PLACEHOLDER, check_graph, is_sealed, sealed
from tcaq_lightning.backends.load import load_quantized
from tcaq_lightning.backends.openvino import write_ir
from tcaq_lightning.errors import UserError

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("openvino")


@given(st.binary(max_size=50), st.binary(max_size=50), st.data())
def test_every_flipped_bit_is_seen(before: bytes, after: bytes, data: st.DataObject) -> None:
    content = sealed(before + PLACEHOLDER.encode() + after)
    assert is_sealed(content)
    place = data.draw(st.integers(0, 8 * len(content) - 1))
    flipped = bytearray(content)
    flipped[place // 8] ^= 1 << place % 8
    assert not is_sealed(bytes(flipped))
    assert not is_sealed(content[:-1])
    assert not is_sealed(content + b"x")


def test_a_damaged_graph_is_refused_by_every_engine(artifact: Path, tmp_path: Path) -> None:
    content, _ = build_graph(load_quantized(artifact).unet, weights_digest(artifact))
    file, ir = tmp_path / "a.onnx", tmp_path / "a.xml"
    write_ir(content, ir)
    check_graph(ir)
    bin_content, xml_content = ir.with_suffix(".bin").read_bytes(), ir.read_bytes()
    for place in range(3, len(content), len(content) // 40):
        file.write_bytes(content[:place] + bytes([content[place] ^ 16]) + content[place + 1 :])
        for engine in ("onnxruntime", "openvino"):
            with pytest.raises(UserError, match="damaged"):
                open_engine(engine, file, None, {})
    for place in range(3, len(bin_content), len(bin_content) // 20):
        ir.with_suffix(".bin").write_bytes(
            bin_content[:place] + bytes([bin_content[place] ^ 1]) + bin_content[place + 1 :]
        )
        with pytest.raises(UserError, match=r"a\.bin is damaged"):
            open_engine("openvino", ir, None, {})
    ir.with_suffix(".bin").write_bytes(bin_content)
    for place in range(3, len(xml_content), len(xml_content) // 20):
        ir.write_bytes(xml_content[:place] + bytes([xml_content[place] ^ 2]) + xml_content[place + 1 :])
        with pytest.raises(UserError, match="damaged"):
            open_engine("openvino", ir, None, {})
    ir.write_bytes(xml_content)
    ir.with_suffix(".bin").unlink()
    with pytest.raises(UserError, match="missing"):
        open_engine("openvino", ir, None, {})
