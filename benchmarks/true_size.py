"""Models of true size with random weights: a whole run on a CPU, and what a large model's blocks take.

    python -m benchmarks.true_size --model ddpm-cifar10-32 --threads 2
    python -m benchmarks.true_size --model stable-diffusion-v1-4 --threads 2

An unconditional model goes through train.py from trajectories to report in a process of its own, and the artifact is
opened again and sampled in another one. Of Stable Diffusion, train.py plans the run, and calibrates its denoiser unit
by unit up to the first residual and the first transformer block, which are at the full size of the latents (64 x 64,
77 tokens of context, both rows of guidance). Its text encoder and its autoencoder, which nothing is done to, are small
ones of the same interface.
"""

from __future__ import annotations

import gc
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from benchmarks.common import (
    ROOT,
    Ended,
    Settings,
    arguments,
    calibration,
    denoiser_config,
    make_denoiser,
    read_json,
    run,
    save_model,
    train,
    watch,
)
from tcaq_lightning.calibration.storage import GIGABYTE
from tcaq_lightning.cli import parse_config
from tcaq_lightning.config import Config
from tcaq_lightning.errors import UserError
from tcaq_lightning.models.architectures import example_samples, on_meta
from tcaq_lightning.models.graph import trace_units
from tcaq_lightning.models.pipelines import quiet_diffusers
from tcaq_lightning.nn.coverage import KEPT_BY_RULE, UNKNOWN_ATTENTION
from tcaq_lightning.nn.prepare import quantize
from tcaq_lightning.quantizers.timestep_groups import TimestepGroups
from tcaq_lightning.runtime.allocation_trace import SIZES
from tcaq_lightning.runtime.files import load_tensors
from tcaq_lightning.runtime.memory import release_freed_memory

TEXT_CONFIG = ROOT / "configs" / "paper" / "coco.yaml"
TEXT_TOKENS, LATENT_FACTOR = 77, 8
"""Of Stable Diffusion: tokens of a prompt, and pixels of an image by side of a latent."""
PROMPTS = ("a red boot", "a bag on a table", "two dogs in the snow", "a boat")
SECONDS_LIMIT, GIGABYTES_LIMIT = 1800, 12


def write_model(config: Mapping[str, Any], directory: Path) -> None:
    """Write a pipeline around a denoiser of random weights, of which nothing is left in memory."""
    quiet_diffusers({"text_encoder": ("transformers", "CLIPTextModel")})
    denoiser = make_denoiser(config)
    (save_text_model if takes_text(config) else save_model)(denoiser, directory)
    del denoiser
    gc.collect()  # pipelines are full of reference cycles
    release_freed_memory()


def takes_text(config: Mapping[str, Any]) -> bool:
    """Whether a denoiser is a UNet with cross-attention."""
    return "cross_attention_dim" in config


def save_text_model(denoiser: Any, directory: Path) -> Path:
    """Write a Stable Diffusion pipeline around a denoiser, with a small text encoder and a small autoencoder."""
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    directory.mkdir(parents=True)
    characters = [chr(code) for code in range(33, 127)]
    words = [*characters, *(f"{c}</w>" for c in characters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary, merges = directory / "vocab.json", directory / "merges.txt"
    vocabulary.write_text(json.dumps({word: i for i, word in enumerate(words)}))
    merges.write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(vocabulary), str(merges), model_max_length=TEXT_TOKENS)
    text = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=denoiser.config.cross_attention_dim,
        intermediate_size=denoiser.config.cross_attention_dim,
        num_hidden_layers=1,
        num_attention_heads=8,
        max_position_embeddings=TEXT_TOKENS,
        bos_token_id=len(words) - 2,
        eos_token_id=len(words) - 1,
    )
    stages = LATENT_FACTOR.bit_length()
    parts: Any = diffusers
    decoder = parts.AutoencoderKL(
        3,
        3,
        down_block_types=("DownEncoderBlock2D",) * stages,
        up_block_types=("UpDecoderBlock2D",) * stages,
        block_out_channels=(8,) * stages,
        latent_channels=denoiser.config.in_channels,
        norm_num_groups=4,
        mid_block_add_attention=False,
    )
    noise: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler = parts.PNDMScheduler(**noise, skip_prk_steps=True, steps_offset=1)
    components = decoder, CLIPTextModel(text), tokenizer, denoiser, scheduler, None, None
    pipeline = parts.StableDiffusionPipeline(*components, requires_safety_checker=False)
    pipeline.save_pretrained(directory)
    return directory


def coverage(denoiser: nn.Module, config: Config) -> dict[str, Any]:
    """What the coverage table of a denoiser says; the denoiser's layers are replaced.

    Returns:
        `rows` of the table; `parameters` of the denoiser and the `covered` share of them that the rows account for;
        names of `unknown` attentions, which stay in full precision, and of layers `kept` by rule.
    """
    parameters = sum(p.numel() for p in denoiser.parameters())
    rows = quantize(denoiser, config.quantization, TimestepGroups([]))
    return {
        "rows": len(rows),
        "parameters": parameters,
        "covered": sum(row.parameters for row in rows) / parameters,
        "unknown": [row.name for row in rows if row.note.startswith(UNKNOWN_ATTENTION)],
        "kept": [row.name for row in rows if row.note == KEPT_BY_RULE],
    }


def first_of_both(denoiser: nn.Module) -> str:
    """The first unit, in execution order, at which a residual and a transformer block have been met.

    Args:
        denoiser: on the meta device.
    """
    samples = example_samples(denoiser, SIZES[1])
    seen: set[type[nn.Module]] = set()
    for name in trace_units(denoiser, lambda: samples.predict(denoiser)).names:
        seen.add(type(denoiser.get_submodule(name)))
        if {ResnetBlock2D, BasicTransformerBlock} <= seen:
            return name
    raise UserError("--model must be a UNet with residual and transformer blocks; give --stop_after for another one")


def bounded(ended: Ended) -> dict[str, Any]:
    """Time and memory of a command, beside their limits."""
    return {
        "wall_seconds": ended.seconds,
        "peak_rss_gb": ended.resident / GIGABYTE,
        "peak_anonymous_gb": ended.peak / GIGABYTE,
    }


def planned(run_dir: Path) -> dict[str, Any]:
    """What a run's plan said about units, bits and memory."""
    plan = read_json(run_dir / "manifest.json")["plan"]
    gigabytes = {f"{key}_gb": plan[f"{key}_bytes"] for key in ("model", "store", "workspace")}
    return {
        **{key: plan[key] for key in ("units", "samples", "layers", "kept", "seconds")},
        "model_gb": gigabytes["model_gb"] / GIGABYTE,
        "store_gb": sum(gigabytes["store_gb"].values()) / GIGABYTE,
        "workspace_gb": {kind: nbytes / GIGABYTE for kind, nbytes in gigabytes["workspace_gb"].items()},
    }


def whole_run(settings: Settings, directory: Path) -> dict[str, Any]:
    """Run the main job, open what it made in another process, and sample an image."""
    ended = train(settings)
    run_dir = Path(settings["run_dir"])
    artifact, image = run_dir / "quantized", directory / "image.png"
    sampler = ["--num", "1", "--num_steps", str(settings["calibration.sampler.num_steps"])]
    threads = ["--threads", str(settings["trainer.threads"])]
    command = [sys.executable, "-m", "tcaq_lightning", "sample", str(artifact), "--output", str(image)]
    reopened = watch([*command, *sampler, *threads])
    metrics = read_json(run_dir / "metrics.json")
    seconds = ended.seconds + reopened.seconds
    return {
        "run": bounded(ended),
        "reopened": bounded(reopened) | {"image_bytes": image.stat().st_size},
        "plan": planned(run_dir),
        "seconds": {**metrics["stages"], "other": ended.seconds - sum(metrics["stages"].values())},
        "rounds": len(metrics["rounds"]),
        "units_kept": sum(unit["kept"] for unit in metrics["units"]),
        "units_learned": len(metrics["units"]),
        "noise_error": metrics["noise_error"]["summary"],
        "bytes": metrics["bytes"],
        "minutes": seconds / 60,
        "minutes_limit": SECONDS_LIMIT / 60,
        "within_limit": seconds <= SECONDS_LIMIT,
    }


def first_units(settings: Settings, denoiser: nn.Module) -> dict[str, Any]:
    """Calibrate the first units of a text-to-image model.

    Args:
        settings: of the run. denoiser: on the meta device.
    """
    config, _ = parse_config(arguments(settings, TEXT_CONFIG))
    table = coverage(denoiser, config)
    ended = train(settings, TEXT_CONFIG)
    run_dir = Path(settings["run_dir"])
    units = [load_tensors(path)[1] for path in sorted((run_dir / "rounds" / "00" / "units").iterdir())]
    keys = ("unit", "before", "learned", "kept", "undecided", "seconds")
    return {
        "coverage": table,
        "plan": planned(run_dir),
        "units": [{key: unit[key] for key in keys if key in unit} for unit in units],
        **bounded(ended),
        "peak_rss_limit_gb": GIGABYTES_LIMIT,
        "within_limit": ended.resident <= GIGABYTES_LIMIT * GIGABYTE,
    }


def true_size(
    model: str = "ddpm-cifar10-32",
    threads: int = 1,
    trajectories: int | None = None,
    held_out: int | None = None,
    sampler_steps: int | None = None,
    iterations: int | None = None,
    batch_size: int | None = None,
    rounds: int = 1,
    stop_after: str | None = None,
    weighting: Literal["sensitivity", "uniform"] = "sensitivity",
) -> dict[str, Any]:
    """Run a model of true size.

    Args:
        model: shipped architecture or model of random weights: a UNet, unconditional or with text.
        threads: CPU threads.
        trajectories: calibration trajectories; 8, of a model with text 1.
        held_out: further ones; 2, of a model with text 1.
        sampler_steps: of each, and timestep groups; 20, of a model with text 2.
        iterations: optimisation steps of a unit; 60, of a model with text 20.
        batch_size: samples a step; 8, of a model with text 2.
        rounds: rounds after the first, of an unconditional model.
        stop_after: the last unit that is calibrated, of a model with text; without it, the first one that is, or
            follows on, a residual and a transformer block.
        weighting: as reconstruction.weighting; sensitivity takes backward passes through the whole denoiser.
    """
    config = denoiser_config(model)
    text = takes_text(config)
    given = trajectories, held_out, sampler_steps, iterations, batch_size
    usual = (1, 1, 2, 20, 2) if text else (8, 2, 20, 60, 8)
    sizes = tuple(own if value is None else value for value, own in zip(given, usual, strict=True))
    result = {"model": model, "threads": threads, "weighting": weighting}
    result |= dict(zip(("trajectories", "held_out", "sampler_steps", "iterations", "batch_size"), sizes, strict=True))
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        settings = calibration(directory / "run", directory / "model", threads, *sizes)
        settings["reconstruction.weighting"] = weighting
        write_model(config, directory / "model")
        if not text:
            return result | whole_run(settings | {"par.rounds": rounds}, directory)
        prompts = directory / "prompts.txt"
        prompts.write_text("\n".join(PROMPTS))
        settings |= {
            "conditioning.prompts": prompts,
            "calibration.sampler.scheduler": "DDIMScheduler",
            "calibration.batch_size": sizes[-1],
            "evaluation.fid_samples": 0,
            "evaluation.metrics": ["fid"],
            "trainer.stop_after": stop_after or first_of_both(on_meta(config)),
        }
        return result | first_units(settings, on_meta(config))


if __name__ == "__main__":
    run(true_size)
