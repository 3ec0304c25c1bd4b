"""What keeping weights packed in memory saves and costs: the denoiser with packed and with unpacked weights, in turns.

python -m benchmarks.packed_weights --model ddpm-cifar10-32 --weight_bits 4 --batch_sizes [1,4]
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMPipeline, DDIMScheduler

from benchmarks.common import SHIPPED, denoiser_config, make_denoiser, run
from benchmarks.inference import nearest
from tcaq_lightning.artifact.directory import save_artifact
from tcaq_lightning.backends.graph.inputs import example_inputs, nest
from tcaq_lightning.backends.load import load_quantized
from tcaq_lightning.models.pipelines import find_denoiser, open_pipeline
from tcaq_lightning.nn.parts import quant_layers


def packed_weights(
    model: str = SHIPPED,
    weight_bits: int = 4,
    groups: int = 20,
    threads: int = 1,
    batch_sizes: list[int] | None = None,
    repetitions: int = 9,
) -> dict[str, Any]:
    """Time calls with packed and unpacked weights in turn, the fastest of each; both must give the same bits.

    Seconds are those of the processor, so that other work of the machine counts little.

    Args:
        model: full-precision model, shipped or of random weights; it is quantized to nearest.
        weight_bits: code width; activations have 8 bits.
        groups: timestep groups.
        threads: CPU threads.
        batch_sizes: to measure; 1 and 4 by default.
        repetitions: of either side.
    """
    torch.set_num_threads(threads)
    denoiser: Any = (
        find_denoiser(open_pipeline(model))[1] if model == SHIPPED else make_denoiser(denoiser_config(model))
    )
    nearest(denoiser, weight_bits, 8, groups)
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "artifact"
        pipeline: Any = DDIMPipeline(denoiser, DDIMScheduler())  # type: ignore[no-untyped-call]
        save_artifact(pipeline, "unet", denoiser, path, {})
        opened: dict[str, Any] = {
            kind: find_denoiser(load_quantized(path, packed=kind == "packed"))[1] for kind in ("packed", "unpacked")
        }
    weights: dict[str, list[Any]] = {
        kind: [layer.weight_quantizer for layer in quant_layers(d).values()] for kind, d in opened.items()
    }
    stored = {
        "packed": sum(w.packed.untyped_storage().nbytes() for w in weights["packed"]),
        "unpacked": sum(w.codes.untyped_storage().nbytes() for w in weights["unpacked"]),
    }
    with torch.no_grad():
        unpacking = fastest_unpacking(weights["packed"], repetitions)
        rows = {
            f"batch {batch}": times_in_turn(opened, nest(example_inputs(denoiser, batch=batch)), repetitions)
            for batch in batch_sizes or [1, 4]
        }
    return {
        "model": model,
        "weight_bits": weight_bits,
        "threads": threads,
        "weight_bytes": stored,
        "unpacking_seconds": unpacking,
        "seconds": rows,
    }


def fastest_unpacking(weights: Sequence[Any], repetitions: int) -> float:
    """Seconds to unpack all weights once."""
    seconds = []
    for _ in range(repetitions):
        started = time.process_time()
        for weight in weights:
            _ = weight.codes
        seconds.append(time.process_time() - started)
    return min(seconds)


def times_in_turn(opened: Mapping[str, Any], inputs: Mapping[str, Any], repetitions: int) -> dict[str, float]:
    """Seconds of each denoiser's fastest call, and their ratio.

    Args:
        opened: the denoiser with packed and with unpacked weights; they take turns.
        inputs: of a call.
        repetitions: of either side, after one to warm up.
    """
    seconds: dict[str, list[float]] = {kind: [] for kind in opened}
    predictions = {}
    for turn in range(repetitions + 1):
        for kind, module in list(opened.items())[:: 1 if turn % 2 else -1]:
            started = time.process_time()
            predictions[kind] = module(**inputs, return_dict=False)[0]
            seconds[kind].append(time.process_time() - started)
    assert torch.equal(predictions["packed"], predictions["unpacked"])
    found = {kind: min(values[1:]) for kind, values in seconds.items()}  # the rest is other work of the machine
    return {**found, "ratio": found["packed"] / found["unpacked"]}


if __name__ == "__main__":
    run(packed_weights)
