"""Diffusers pipelines: open a directory, find the denoiser, sample with any scheduler."""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from huggingface_hub import constants as hub
from huggingface_hub import get_session
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from tcaq_lightning.config import SamplerConfig
from tcaq_lightning.errors import UserError
from tcaq_lightning.models.class_conditional import ClassConditionalLatentPipeline, ClassConditionalTransformerPipeline
from tcaq_lightning.models.schedulers import OWN_SCHEDULERS
from tcaq_lightning.models.unets import denoiser_class, found_in
from tcaq_lightning.runtime.json_files import read_json
from tcaq_lightning.runtime.one_line import one_line
from tcaq_lightning.runtime.seeds import derive

ASSETS = Path(__file__).parent / "assets"
DENOISER_NAMES = ("unet", "transformer")
OWN_PIPELINES = {c.__name__: c for c in (ClassConditionalLatentPipeline, ClassConditionalTransformerPipeline)}
"""Pipelines that model_index.json may name and diffusers lacks."""
HUB_SECONDS = 5.0
"""How long the hub may take to answer at all; its client would try again and again for a minute."""


def shipped(name: str) -> Path | None:
    """Directory of a model or feature extractor that comes with the package, or None."""
    path = ASSETS / name
    return path if name and "/" not in name and path.is_dir() else None


def quiet_diffusers(index: dict[str, Any] | None = None) -> None:
    """Keep diffusers' progress bars and advice off the console; what goes wrong is raised as well as logged.

    Args:
        index: index of the pipeline that will be opened; transformers is kept quiet too if the pipeline uses it.
    """
    diffusers_logging.set_verbosity(logging.CRITICAL)
    diffusers_logging.disable_progress_bar()
    if any(isinstance(part, (list, tuple)) and list(part[:1]) == ["transformers"] for part in (index or {}).values()):
        with suppress(ImportError):  # opening the pipeline will say what is missing
            from transformers.utils import logging as transformers_logging

            transformers_logging.set_verbosity(logging.CRITICAL)
            transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]


def open_pipeline(path: str, variant: str | None = None, dtype: torch.dtype = torch.float32) -> DiffusionPipeline:
    """Open a pretrained model in diffusers layout.

    Args:
        path: directory with a model_index.json, name of a shipped model, or hub id.
        variant: variant of the weights' files, such as fp16.
        dtype: type that the model computes in.

    Returns:
        The pipeline on the CPU, its denoiser frozen and in evaluation mode.

    Raises:
        UserError: no such model, no denoiser, weights missing, of other shapes, NaN or infinite.
    """
    directory = shipped(path) or Path(path)
    local = directory.exists()
    if not local and (path.count("/") != 1 or path.startswith((".", "/"))):
        raise UserError(f"model.path: no model at {path}; expected a directory in diffusers layout or a hub id")
    source = str(directory) if local else path
    at_hand = local or not hub_answers()
    index = _read_index(source, local, at_hand, path)
    quiet_diffusers(index)
    name = denoiser_name(index, f"model.path: model_index.json of {path}")
    loading: dict[str, Any] = {
        "use_safetensors": True,
        "low_cpu_mem_usage": False,
        "local_files_only": at_hand,
        "variant": variant,
    }
    if dtype != torch.float32:  # the default of diffusers; newer versions call it dtype, and warn
        loading["torch_dtype"] = dtype
        warnings.filterwarnings("ignore", "`torch_dtype` is deprecated", FutureWarning)
    denoiser = _load_denoiser(source, name, str(index[name][1]), loading)
    try:
        with found_in(index[name][0], denoiser):
            pipeline = pipeline_class(index).from_pretrained(source, **loading, **{name: denoiser})
    except Exception as error:  # whatever diffusers' loaders raise is about these files
        raise UserError(f"model.path: cannot open {path}: {one_line(error)}") from error
    pipeline.set_progress_bar_config(disable=True)
    opened: DiffusionPipeline = pipeline
    return opened


def hub_answers() -> bool:
    """Whether the hub can be asked: it is asked once, and what it says does not matter."""
    if hub.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(hub.ENDPOINT, timeout=HUB_SECONDS)
    except Exception:  # noqa: BLE001 - of whatever client it has
        return False
    return True


def _read_index(source: str, local: bool, at_hand: bool, path: str) -> dict[str, Any]:
    """What a model_index.json says.

    Args:
        source: a directory or hub id.
        local: whether it is a directory.
        at_hand: whether only what is on this machine may be looked at.
        path: as the user gave it.
    """
    expected = f"model.path: {path} has no readable model_index.json; expected diffusers layout"
    if at_hand and not local:
        expected = (
            f"model.path: no directory {path}, and as a hub id it is not in the hub's cache, while the hub cannot be "
            "reached; expected a directory in diffusers layout, or a network"
        )
    try:
        if local:
            index = read_json(Path(source) / DiffusionPipeline.config_name)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # diffusers hands the hub's client an argument that it has no use for
                index = DiffusionPipeline.load_config(source, local_files_only=at_hand)
    except Exception as error:  # of a hub, whatever its client raises
        raise UserError(f"{expected}, got {one_line(error)}") from error
    if not isinstance(index, dict):
        raise UserError(f"{expected}, got a JSON {type(index).__name__}")
    return index


def denoiser_name(index: Mapping[str, Any], where: str) -> str:
    """Component name of a pipeline's denoiser, all of whose components are a library and a class by name.

    Args:
        index: content of its model_index.json.
        where: the file, for messages.

    Raises:
        UserError: it names no denoiser, or something else than components.
    """
    for name, part in index.items():
        pair = isinstance(part, list) and len(part) == 2 and all(x is None or isinstance(x, str) for x in part)
        component = isinstance(part, list) and not name.startswith("_")
        if not pair and (component or (part and name in DENOISER_NAMES)):
            raise UserError(f"{where} is damaged: expected [library, class] as {name}, got {str(part)[:100]}")
    if not isinstance(index.get("_class_name", ""), str):
        raise UserError(f"{where} is damaged: expected a text as _class_name, got {str(index['_class_name'])[:100]}")
    for name in DENOISER_NAMES:
        if index.get(name) and index[name] != [None, None]:
            return name
    raise UserError(f"{where} names no denoiser; expected a component {' or '.join(DENOISER_NAMES)}")


def pipeline_class(index: dict[str, Any]) -> Any:
    """The class that opens a pipeline, by its model_index.json."""
    return OWN_PIPELINES.get(str(index.get("_class_name")), DiffusionPipeline)


def _load_denoiser(source: str, name: str, class_name: str, loading: dict[str, Any]) -> nn.Module:
    known = denoiser_class(class_name, f"model.path: {source}")
    try:
        denoiser, info = known.from_pretrained(source, subfolder=name, output_loading_info=True, **loading)
    except Exception as error:  # as above
        raise UserError(f"model.path: cannot load {name} of {source}: {one_line(error)}") from error
    for kind in ("missing_keys", "unexpected_keys"):
        if info[kind]:
            raise UserError(
                f"model.path: {name} of {source} has {len(info[kind])} {kind.replace('_', ' ')} in its weights, such "
                f"as {min(info[kind])}; expected exactly the weights of its config.json"
            )
    for key, value in denoiser.state_dict().items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise UserError(f"model.path: {name} weight {key} of {source} is NaN or infinite; expected finite weights")
    module: nn.Module = denoiser.requires_grad_(False).eval()
    return module


def find_denoiser(pipeline: DiffusionPipeline) -> tuple[str, nn.Module]:
    """Name and module of the pipeline's denoiser.

    Raises:
        UserError: none of the known components is there.
    """
    for name in DENOISER_NAMES:
        module = getattr(pipeline, name, None)
        if isinstance(module, nn.Module):
            return name, module
    raise UserError(f"the pipeline has no denoiser; expected a component named {' or '.join(DENOISER_NAMES)}")


@torch.no_grad()
def check_denoiser(denoiser: nn.Module, scheduler: Any, arguments: dict[str, Any] | None = None) -> None:
    """Check that the scheduler can use the denoiser: it maps (x_t, t) to a finite prediction of x_t's shape.

    A scheduler of learned variances takes twice the channels.

    Args:
        denoiser: full precision.
        scheduler: for one run of the sampler.
        arguments: arguments of the denoiser for two samples, beside x_t and t.

    Raises:
        UserError: it needs further inputs, takes none of its own sample size, or predicts something else.
    """
    takes = f"x_t, t, {', '.join(arguments)}" if arguments else "x_t and t alone"
    expected = f"model.path: expected a {type(denoiser).__name__} that maps {takes} to a prediction like x_t"
    try:
        x = torch.zeros(
            2, *sample_shape(denoiser), device=next(denoiser.parameters()).device, dtype=denoiser_dtype(denoiser)
        )
        t = torch.ones(2, dtype=torch.long, device=x.device)
        prediction = denoiser(x, t, return_dict=False, **on_device(arguments or {}, x.device))[0]
    except Exception as error:  # a model raises whatever it likes
        raise UserError(f"{expected}, got {one_line(error)}") from error
    doubled = str(scheduler.config.get("variance_type")).startswith("learned")
    shape = (x.shape[0], x.shape[1] * (2 if doubled else 1), *x.shape[2:])
    if prediction.shape != shape or not prediction.isfinite().all():
        finite = "finite" if prediction.isfinite().all() else "NaN or infinite"
        raise UserError(f"{expected}, got {finite} values of shape {tuple(prediction.shape)}, not {shape}")


def other_networks(pipeline: Any, denoiser: str) -> dict[str, nn.Module]:
    """A pipeline's networks beside the denoiser of that component name, such as a decoder and text encoders."""
    return {n: part for n, part in sorted(pipeline.components.items()) if isinstance(part, nn.Module) and n != denoiser}


def find_decoder(networks: Mapping[str, nn.Module]) -> Any:
    """The autoencoder among a latent pipeline's networks, or None."""
    return networks.get("vae") or networks.get("vqvae")


@contextmanager
def one_by_one(decoder: Any) -> Iterator[None]:
    """Decode the images of a batch one by one within, if the autoencoder can: together they may take gigabytes."""
    before = getattr(decoder, "use_slicing", None)
    if before is None:
        yield
        return
    decoder.use_slicing = True
    try:
        yield
    finally:
        decoder.use_slicing = before


def public_config(component: Any) -> dict[str, Any]:
    """Settings of a component of diffusers, paths and versions left out."""
    return {key: value for key, value in component.config.items() if not key.startswith("_")}


def denoiser_dtype(denoiser: nn.Module) -> torch.dtype:
    """The type that a denoiser takes samples in, and computes in."""
    dtype: torch.dtype = getattr(denoiser, "dtype", torch.float32)
    return dtype


def denoiser_bytes(denoiser: nn.Module) -> int:
    """Bytes of a denoiser's parameters and buffers, which its safetensors file exceeds by a header."""
    return sum(v.numel() * v.element_size() for v in denoiser.state_dict().values())


def configured_scheduler(own: Any, sampler: SamplerConfig, key: str = "calibration.sampler") -> Any:
    """A scheduler with the sampler's settings, its timesteps not yet set.

    Args:
        own: the pipeline's scheduler; its noise schedule and prediction type are kept.
        sampler: class and further settings.
        key: config key that errors name.

    Raises:
        UserError: unknown class or option.
    """
    scheduler_class = type(own) if sampler.scheduler is None else find_scheduler_class(sampler.scheduler)
    if scheduler_class is None or not hasattr(scheduler_class, "set_timesteps"):
        raise UserError(
            f"{key}.scheduler must be a scheduler class of diffusers or one of {sorted(OWN_SCHEDULERS)}, "
            f"got {sampler.scheduler!r}"
        )
    known = set(inspect.signature(scheduler_class.__init__).parameters) - {"self"}
    unknown = sorted(set(sampler.options) - known)
    if unknown:
        raise UserError(
            f"{key}.options: {scheduler_class.__name__} has no option {unknown[0]!r}; it has {sorted(known)}"
        )
    try:
        return scheduler_class.from_config(own.config, **sampler.options)
    except Exception as error:  # schedulers validate their settings each in its own way
        raise UserError(f"{key}: {scheduler_class.__name__}: {one_line(error)}") from error


def make_scheduler(own: Any, sampler: SamplerConfig, key: str = "calibration.sampler") -> Any:
    """`configured_scheduler` for one run of the sampler, its timesteps set.

    Args:
        own: the pipeline's scheduler.
        sampler: sampler settings.
        key: config key that errors name.

    Raises:
        UserError: unknown class, option or number of steps.
    """
    scheduler = configured_scheduler(own, sampler, key)
    try:
        scheduler.set_timesteps(sampler.num_steps)
    except Exception as error:  # as above
        raise UserError(
            f"{key}: {type(scheduler).__name__} with {sampler.num_steps} steps: {one_line(error)}"
        ) from error
    return scheduler


def find_scheduler_class(name: str) -> Any:
    """A scheduler's class by its name, of diffusers or of ours; None where neither has it."""
    return getattr(diffusers, name, None) or OWN_SCHEDULERS.get(name)


def initial_noise(shape: Sequence[int], indices: Sequence[int], seed: int) -> tuple[Tensor, list[torch.Generator]]:
    """Noise x_T of numbered samples; sample i is the same whatever batch it is drawn in.

    Args:
        shape: (C, H, W).
        indices: numbers of the samples.
        seed: seed of the whole set.

    Returns:
        Standard normal (B, C, H, W) on the CPU, and the generators that go on with each sample's step noise.
    """
    generators = [torch.Generator().manual_seed(derive(seed, i)) for i in indices]
    return torch.stack([torch.randn(*shape, generator=g) for g in generators]), generators


@torch.no_grad()
def sample(
    denoiser: nn.Module,
    own_scheduler: Any,
    sampler: SamplerConfig,
    indices: Sequence[int],
    seed: int,
    arguments: dict[str, Any] | None = None,
) -> Tensor:
    """Sample with the denoiser, by the loop that every diffusers scheduler shares.

    (`DDIMPipeline` forces DDIM, and `DDPMPipeline` passes a generator to steps that take none.)

    Args:
        denoiser: maps (x_t, t) to its prediction.
        own_scheduler: the pipeline's scheduler.
        sampler: the scheduler to use and its steps.
        indices: numbers of the samples, which fix their noise.
        seed: seed of the noise.
        arguments: of the denoiser for these samples, beside x_t and t.

    Returns:
        Samples (B, C, H, W) in the model's range, [-1, 1] for pixels.
    """
    scheduler = make_scheduler(own_scheduler, sampler)
    device = next(denoiser.parameters()).device
    noise, generators = initial_noise(sample_shape(denoiser), indices, seed)
    x: Tensor = noise.to(device, denoiser_dtype(denoiser)) * scheduler.init_noise_sigma
    known = inspect.signature(scheduler.step).parameters
    extra: dict[str, Any] = {"eta": sampler.eta} if "eta" in known else {}
    if "generator" in known:
        extra["generator"] = generators
    others = on_device(arguments or {}, device)
    for t in scheduler.timesteps:
        model_input = scheduler.scale_model_input(x, t)
        prediction = denoiser(model_input, t.to(device), return_dict=False, **others)[0]
        x = scheduler.step(prediction, t, x, **extra, return_dict=False)[0]
    return x


def on_device(arguments: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Arguments whose tensors are on a device."""
    moved: dict[str, Any] = tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, arguments)
    return moved


def sample_shape(denoiser: nn.Module) -> tuple[int, int, int]:
    """(C, H, W) of the denoiser's input."""
    config: Any = denoiser.config
    size = config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    return config.in_channels, height, width


def to_images(samples: Tensor) -> Tensor:
    """Samples in [-1, 1] as images in [0, 1].

    >>> to_images(torch.tensor([-1.0, 0.0, 2.0]))
    tensor([0.0000, 0.5000, 1.0000])
    """
    return (samples / 2 + 0.5).clamp(0, 1)
