"""Every denoiser class of diffusers that has a tiny model here: replaced, equal when off, traced, saved, exported."""

from __future__ import annotations

import pytest

from benchmarks.denoisers.__main__ import row
from benchmarks.denoisers.catalogue import denoiser_classes
from benchmarks.denoisers.measure import EXAMPLES, TOLERANCE, Measured, measure_example

FAST = (
    "AceStepTransformer1DModel",
    "Flux2Transformer2DModel",
    "HunyuanDiT2DModel",
    "LatteTransformer3DModel",
    "MochiTransformer3DModel",
    "SanaTransformer2DModel",
    "UNet1DModel",
    "WanTransformer3DModel",
    "ZImageTransformer2DModel",
)
"""One of each kind."""
EXPORTED = tuple(name for name in EXAMPLES if name.startswith(("UNet2D", "DiT", "PixArt", "SD3", "FluxT")))


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in EXAMPLES])
def test_a_denoiser_of_every_class(name: str) -> None:
    found = measure_example(name)
    refusal = found.failures.pop("export", "")
    assert found.failures == {}
    assert found.layers[1] == found.layers[0] > 0
    assert found.weights[1] == found.weights[0]
    assert found.attentions[1] == 0
    assert found.equal is not None
    assert found.equal < TOLERANCE
    assert found.units > 2
    assert found.reload
    assert (found.export == "yes") == (name in EXPORTED)
    assert not refusal or refusal.startswith("refused: ")


def test_classes_are_found_by_looking_and_examples_are_of_those() -> None:
    classes = denoiser_classes()
    assert set(EXAMPLES) <= set(classes)
    assert len(classes) > len(EXAMPLES)
    assert "MotionAdapter" not in classes


def test_what_the_table_says() -> None:
    assert row("New", None) == "| `New` | not measured | | | | | |"
    found = Measured((5, 5), (400, 400), (2, 0), 3, 0.0, True)
    assert row("Old", found) == "| `Old` | 5 of 5 | 2 of 2 | 100 % | 3 | bit-equal | refused |"
    found.failures["quantize"] = "refused: something"
    assert row("Odd", found) == "| `Odd` | refused: something | | | | | |"
