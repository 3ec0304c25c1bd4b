"""Convert a published checkpoint: tell what it is, build the same network in diffusers, write the directory."""

from __future__ import annotations

import importlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tcaq_lightning.errors import UserError
from tcaq_lightning.models.pipelines import hub_answers
from tcaq_lightning.runtime.files import sha256, write_json
from tcaq_lightning.zoo.conversion import ddim, latent, latent_config
from tcaq_lightning.zoo.conversion.architecture import (
    ARCHITECTURES,
    Architecture,
    Component,
    load_exactly,
    names,
    read_architecture,
)
from tcaq_lightning.zoo.conversion.checkpoint import State, read_checkpoint
from tcaq_lightning.zoo.conversion.settings import read_yaml

RECORD = "conversion.json"
CLIP_POSITIONS = 77
"""Tokens that CLIP's text model takes."""
SCHEDULE_TOLERANCE = 1e-3
"""Relative difference of alpha-bar, at its largest, between a checkpoint's table and the config's."""


def convert(source: Path, output: Path, config: str | None, ema: bool | None, tokenizer: str | None) -> dict[str, Any]:
    """Write a checkpoint of the DDIM repository or of CompVis as a diffusers directory.

    Args:
        source: checkpoint file.
        output: directory to write; it must not exist, or be empty.
        config: the checkpoint's YAML file, or the name of a shipped architecture.
        ema: whether to take averaged weights; None takes them where there are some.
        tokenizer: of Stable Diffusion: a directory, or a hub id.

    Returns:
        The record that is also written beside the model: source, its SHA-256, which weights.

    Raises:
        UserError: a file is missing, damaged or of another architecture; nothing is written then.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output}: expected a directory that is new or empty; choose another path")
    content = read_checkpoint(source)
    state, averaged, architecture = _recognized(source, content, config, ema)
    text = {"tokenizer": read_tokenizer(tokenizer)} if "tokenizer" in architecture.components else {}
    if ddim.TELLTALE in state:
        converted = {"unet": ddim.convert_unet(state, architecture["unet"])}
    else:
        check_schedule(state, architecture)
        converted = latent.convert(state, architecture)
    pipeline = assemble(architecture, converted, **text)
    record = {
        "source": source.name,
        "sha256": sha256(source),
        "architecture": config and Path(config).name,
        "weights": "moving average" if averaged else "as stored",
        "parameters": {name: sum(v.numel() for v in part.values()) for name, part in converted.items()},
    }
    with replacing_directory(output) as temporary:
        pipeline.save_pretrained(temporary)
        write_json(temporary / RECORD, record)
    return record


def _recognized(source: Path, content: Any, config: str | None, ema: bool | None) -> tuple[State, bool, Architecture]:
    """Weights, whether they are averages, and their architecture."""
    found = ddim.find_weights(content, ema)
    is_ddim = found is not None
    found = found or latent.find_weights(content, ema)
    if found is None:
        raise UserError(
            f"{source}: expected a checkpoint of the DDIM repository ({ddim.TELLTALE}) or of CompVis "
            f"({latent.DENOISER}*), got neither"
        )
    state, averaged = found
    kind = "the DDIM repository" if is_ddim else "CompVis"
    known = [n for n in names() if _suits(read_architecture(ARCHITECTURES / n), is_ddim)]
    if config is None:
        raise UserError(
            f"--architecture: {source} is a checkpoint of {kind} that does not say its architecture; give its YAML "
            f"file, or one of {', '.join(known)}"
        )
    if config in known:
        architecture = read_architecture(ARCHITECTURES / config)
    elif not Path(config).is_file():
        raise UserError(
            f"--architecture {config}: expected, for a checkpoint of {kind}, a YAML file or one of {', '.join(known)}"
        )
    else:
        settings = read_yaml(Path(config))
        architecture = ddim.architecture(settings) if is_ddim else latent_config.architecture(settings)
    return state, averaged, architecture if is_ddim else _scaled(architecture, latent.scale_factor(state))


def _suits(architecture: Architecture, is_ddim: bool) -> bool:
    """Whether checkpoints of a kind may have this architecture."""
    latents = ("LDMPipeline", "ClassConditionalLatentPipeline", "StableDiffusionPipeline")
    return architecture.pipeline == "DDIMPipeline" if is_ddim else architecture.pipeline in latents


def _scaled(architecture: Architecture, scale: float | None) -> Architecture:
    """The same with the checkpoint's factor of the latents, where training measured it (`scale_by_std`)."""
    name = str(architecture.first_stage)
    stage = architecture[name]
    if scale is None:
        if stage.name == "AutoencoderKL" and stage.config["scaling_factor"] == 1:
            raise UserError(
                "expected a factor of the latents, from the config (scale_factor) or measured in training and stored "
                "in the checkpoint, got neither; give the published checkpoint and its config"
            )
        return architecture
    config = stage.config | {"scaling_factor": scale}
    return architecture.replacing(**{name: Component(stage.library, stage.name, config)})


def check_schedule(state: State, architecture: Architecture) -> None:
    """A config of another model may fit the weights and yet have another noise schedule; the checkpoint knows."""
    table = state.get("alphas_cumprod")
    if table is None:
        return
    own = architecture["scheduler"].build_scheduler().alphas_cumprod
    if table.shape != own.shape or ((table.float() / own - 1).abs() > SCHEDULE_TOLERANCE).any():
        raise UserError(
            f"scheduler: the config's noise schedule ({len(own)} timesteps, alpha-bar {float(own[-1]):.3g} at the end) "
            f"is not that of the checkpoint ({len(table)}, {float(table[-1]):.3g}); give the config of this checkpoint"
        )


def assemble(architecture: Architecture, converted: dict[str, State], tokenizer: Any = None) -> Any:
    """The pipeline with its weights.

    Args:
        architecture: its components.
        converted: their weights, by component.
        tokenizer: of a pipeline with a text encoder.

    Raises:
        UserError: weights do not fit.
    """
    import diffusers

    from tcaq_lightning.models.pipelines import OWN_PIPELINES, quiet_diffusers

    quiet_diffusers()
    made: dict[str, Any] = {}
    for name, component in architecture.components.items():
        if component is None:
            made[name] = None
        elif name == "scheduler":
            made[name] = component.build_scheduler()
        else:
            made[name] = load_exactly(component.build(), converted[name], name)
    if tokenizer is not None:
        made |= {"tokenizer": tokenizer, "requires_safety_checker": False}
    pipeline_class: Any = OWN_PIPELINES.get(architecture.pipeline) or getattr(diffusers, architecture.pipeline)
    return pipeline_class(**made)


def read_tokenizer(source: str | None) -> Any:
    """CLIP's tokenizer.

    Raises:
        UserError: none is given, or it cannot be read.
    """
    if source is None:
        raise UserError(
            "--tokenizer: a Stable Diffusion checkpoint comes without its tokenizer; give a directory with CLIP's "
            "vocab.json and merges.txt, or a hub id such as openai/clip-vit-large-patch14"
        )
    try:
        transformers: Any = importlib.import_module("transformers")
    except ImportError as error:
        raise UserError("--tokenizer: Stable Diffusion needs the package transformers; install it") from error
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        at_hand = Path(source).exists() or not hub_answers()
        return transformers.CLIPTokenizer.from_pretrained(
            source, model_max_length=CLIP_POSITIONS, local_files_only=at_hand
        )
    except Exception as error:  # whatever transformers raises is about these files
        raise UserError(f"--tokenizer {source}: cannot be read ({' '.join(str(error).split())[:200]})") from error


@contextmanager
def replacing_directory(output: Path) -> Iterator[Path]:
    """A temporary sibling to write to, moved into the place of `output` at the end and removed if writing fails."""
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir()
        yield temporary
        temporary.replace(output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
