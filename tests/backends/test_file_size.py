"""Size of the exported file beside that of the full-precision model's graph, at the size of a published model."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.inference import prepare

pytest.importorskip("onnx")


@pytest.mark.slow
@pytest.mark.parametrize(("weight_bits", "limit"), [(8, 0.27), (4, 0.15)])
def test_codes_make_the_file_small(weight_bits: int, limit: float, tmp_path: Path) -> None:
    prepared = prepare("ddpm-cifar10-32", None, (weight_bits, 8), 20, tmp_path)
    sizes = {kind: (tmp_path / f"{kind}.onnx").stat().st_size for kind in ("full", "quantized")}
    assert sizes == prepared["onnx_bytes"]
    assert sizes["full"] > 4 * 30e6  # bytes: all parameters in float32
    assert weight_bits / 32 < sizes["quantized"] / sizes["full"] <= limit
