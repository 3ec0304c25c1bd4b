"""Latency, throughput, memory and file size of the denoiser: full precision and quantized, on every engine.

    python -m benchmarks.inference --artifact runs/quickstart/quantized --threads 2
    python -m benchmarks.inference --model ddpm-cifar10-32 --weight_bits 4 --threads 2 --batch_sizes [1,4]
    python -m benchmarks.inference --model ddpm-cifar10-32 --integer_ready true

Every engine runs in a process of its own, so that its memory is its own, and the engines take turns, so that a slow
minute of the machine falls on all of them. Ratios are to the fastest full-precision engine of the same batch size.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMPipeline, DDIMScheduler
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.common import SHIPPED, anonymous_memory, denoiser_config, machine, make_denoiser, median, run, watch
from tcaq_lightning.artifact.directory import freeze, save_artifact, weights_digest
from tcaq_lightning.backends.engines import open_engine
from tcaq_lightning.backends.graph.build import build_graph
from tcaq_lightning.backends.graph.inputs import example_inputs, nest
from tcaq_lightning.backends.load import load_quantized
from tcaq_lightning.backends.stand_in import EngineDenoiser
from tcaq_lightning.config import ActivationConfig, QuantizationConfig, WeightConfig
from tcaq_lightning.errors import UserError
from tcaq_lightning.models.pipelines import find_denoiser, open_pipeline
from tcaq_lightning.nn.layers import QuantLayer
from tcaq_lightning.nn.parts import quant_layers, quantizers
from tcaq_lightning.nn.prepare import quantize
from tcaq_lightning.quantizers.timestep_groups import TimestepGroups

ENGINES = ("torch", "onnxruntime", "openvino")
KINDS = ("full", "quantized")


@torch.no_grad()
def nearest(
    denoiser: nn.Module, weight_bits: int, activation_bits: int, groups: int, integer_ready: bool = False
) -> None:
    """Quantize a denoiser of random weights to nearest, with ranges of a normal input; its speed is what is asked."""
    boundaries = [1000.0 * g / groups for g in range(1, groups)]
    config = QuantizationConfig(
        WeightConfig(weight_bits), ActivationConfig(activation_bits), integer_ready=integer_ready
    )
    quantize(denoiser, config, TimestepGroups(boundaries))
    for quantizer in quantizers(denoiser).values():
        levels = 2**quantizer.bits - 1
        grown = torch.linspace(1.0, 1.2, groups)
        if quantizer.place == "probabilities":
            quantizer.delta.copy_(grown / levels)
        else:
            quantizer.delta.copy_(8 * grown / levels)
            zeros = torch.linspace(0.4, 0.6, groups)
            quantizer.zero_point.copy_((levels * (zeros.mean() if quantizer.constant_zero else zeros)).round())
    for layer in quant_layers(denoiser).values():
        layer.search_weight()
    if integer_ready:
        _search_outputs(denoiser)
    freeze(denoiser)


def _search_outputs(denoiser: nn.Module) -> None:
    """Ranges of the quantized outputs, each from what the layers before it give for noise."""

    def search(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, QuantLayer)
        layer.search_output(layer.input_quantizer(args[0]))

    handles = [layer.register_forward_pre_hook(search) for layer in quant_layers(denoiser).values()]
    denoiser(**nest(example_inputs(denoiser)))
    for handle in handles:
        handle.remove()


def prepare(
    model: str, artifact: str | None, bits: tuple[int, int], groups: int, integer_ready: bool, directory: Path
) -> dict[str, Any]:
    """Write both graphs; sizes of the files in bytes."""
    if artifact is None:
        denoiser = make_denoiser(denoiser_config(model))
        frozen = make_denoiser(denoiser_config(model))
        nearest(frozen, *bits, groups, integer_ready)
        pipeline: Any = DDIMPipeline(frozen, DDIMScheduler())  # type: ignore[no-untyped-call]
        artifact = str(directory / "artifact")
        save_artifact(pipeline, "unet", frozen, artifact, {})
    else:
        denoiser = find_denoiser(open_pipeline(model))[1]
    _, quantized = find_denoiser(load_quantized(artifact))
    sizes = {}
    for kind, module, digest in (("full", denoiser, "full"), ("quantized", quantized, weights_digest(artifact))):
        content, _ = build_graph(module, digest)
        (directory / f"{kind}.onnx").write_bytes(content)
        sizes[kind] = len(content)
    save_file(denoiser.state_dict(), directory / "full.safetensors")
    return {"artifact": artifact, "onnx_bytes": sizes, "size_ratio": sizes["quantized"] / sizes["full"]}


def one(kind: str, engine: str, artifact: str, directory: str, threads: int, batch: int) -> dict[str, Any]:
    """Median seconds of a call, in this process."""
    torch.set_num_threads(threads)
    denoiser: Any = find_denoiser(load_quantized(artifact))[1]
    inputs = nest(example_inputs(denoiser, batch=batch))
    before = anonymous_memory()
    if engine != "torch":
        opened = open_engine(engine, Path(directory) / f"{kind}.onnx", None, {"threads": threads})
        denoiser = EngineDenoiser(opened, type(denoiser), denoiser.config)
    elif kind == "full":
        denoiser = type(denoiser).from_config(denoiser.config).eval()
        denoiser.load_state_dict(load_file(Path(directory) / "full.safetensors"))
    seconds: list[float] = []
    with torch.no_grad():
        started = time.perf_counter()
        while len(seconds) < 5 or (time.perf_counter() - started < 3 and len(seconds) < 100):
            begun = time.perf_counter()
            denoiser(**inputs, return_dict=False)
            seconds.append(time.perf_counter() - begun)
    return {"seconds": median(seconds[2:]), "bytes": anonymous_memory() - before}


def inference(
    model: str = SHIPPED,
    artifact: str | None = None,
    weight_bits: int = 4,
    activation_bits: int = 8,
    groups: int = 20,
    integer_ready: bool = False,
    threads: int = 1,
    batch_sizes: list[int] | None = None,
    repetitions: int = 2,
) -> dict[str, Any]:
    """Time both models on all engines.

    Args:
        model: full-precision model: shipped, of random weights, or a directory.
        artifact: what it was quantized to; without it, a model of random weights is quantized to nearest.
        weight_bits: of a model that is quantized here.
        activation_bits: likewise.
        groups: timestep groups, likewise.
        integer_ready: whether outputs of convolutions are quantized too, likewise.
        threads: of each engine.
        batch_sizes: to measure; 1 and 4 by default.
        repetitions: of every measurement, in turns; the fastest counts.
    """
    if artifact is None and model == SHIPPED:
        raise UserError("--artifact: expected what the shipped model was quantized to, got nothing; give its directory")
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        prepared = prepare(model, artifact, (weight_bits, activation_bits), groups, integer_ready, directory)
        rows: dict[str, dict[str, Any]] = {}
        for batch in batch_sizes or [1, 4]:
            found: dict[str, list[dict[str, Any]]] = {}
            for _ in range(repetitions):
                for kind in KINDS:
                    for engine in ENGINES:
                        call = [kind, engine, prepared["artifact"], name, threads, batch]
                        ended = watch([sys.executable, "-m", "benchmarks.inference", "--one", json.dumps(call)])
                        found.setdefault(f"{kind} {engine}", []).append(json.loads(ended.output.splitlines()[-1]))
            best = {key: min(r["seconds"] for r in runs) for key, runs in found.items()}
            reference = min(seconds for key, seconds in best.items() if key.startswith("full") and "torch" not in key)
            rows[f"batch {batch}"] = {
                key: {
                    "ms": 1e3 * seconds,
                    "samples_per_s": batch / seconds,
                    "speed_up": reference / seconds,
                    "megabytes": max(r["bytes"] for r in found[key]) / 1e6,
                }
                for key, seconds in best.items()
            }
    return {"model": model, "threads": threads, **prepared, "results": rows}


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(one(*json.loads(sys.argv[2])) | {"machine": machine()}))
    else:
        run(inference)
