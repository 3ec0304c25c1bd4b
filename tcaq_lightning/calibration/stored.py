"""What a run computes once and reads again when it goes on: trajectories, and the weights of errors."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tcaq_lightning.calibration.state import Setup
from tcaq_lightning.config import Config
from tcaq_lightning.methods.sensitivity import sampler_gain, unit_sensitivities
from tcaq_lightning.models.sampling import Sampling
from tcaq_lightning.models.trajectories import Trajectories, collect, collect_together
from tcaq_lightning.runtime.distributed.collectives import on_main
from tcaq_lightning.runtime.files import DamagedFileError, load_tensors, save_tensors
from tcaq_lightning.runtime.hashing import weights_hash
from tcaq_lightning.runtime.memory import release_freed_memory

log = logging.getLogger(__name__)


def stored_trajectories(
    path: Path,
    config: Config,
    denoiser: nn.Module,
    sampling: Sampling,
    indices: Sequence[int],
    advance: Callable[[int], None] | None = None,
) -> Trajectories:
    """Read trajectories from a file of the run; make and write them if it is missing or damaged.

    They are the same on every rank. The file carries a manifest: hash of the model, sampler and its settings, seed,
    guidance, labels or prompts.

    Args:
        path: of the file.
        config: the run's configuration.
        denoiser: that samples, full-precision or quantized.
        sampling: how the pipeline is sampled.
        indices: numbers of the noises.
        advance: told the number of trajectories just done.
    """
    found = on_main(lambda: _stored(path))
    if found is not None:
        return Trajectories.unpacked(*found)
    data, seed = config.calibration, config.seed

    def collect_some(mine: Sequence[int]) -> Trajectories:
        return collect(denoiser, sampling, data.sampler, mine, seed, data.batch_size, advance)

    trajectories = collect_together(collect_some, indices, advance)

    def write() -> None:
        tensors, record = trajectories.packed()
        manifest = {
            "denoiser": weights_hash(denoiser),
            "sampler": {"own": type(sampling.scheduler).__name__, **dataclasses.asdict(data.sampler)},
            "seed": seed,
            "noises": list(indices),
            **sampling.manifest(),
        }
        save_tensors(path, tensors, {**record, "manifest": manifest})

    on_main(write)
    return trajectories


def stored_sensitivities(setup: Setup, trajectories: Trajectories) -> dict[str, Tensor]:
    """Read the weights of the units' errors from the run's file; measure and write them if it is missing or damaged.

    Args:
        setup: what the calibration works on.
        trajectories: of the full-precision sampler.

    Returns:
        By unit, (G, C) weights of its squared output error (docs/method.md, "Sensitivity weights"); empty where the
        configuration weighs all errors alike.
    """
    config = setup.config
    if not config.reconstruction.enabled or config.reconstruction.weighting == "uniform":
        return {}
    path = setup.files.sensitivities
    found = on_main(lambda: _stored(path))
    if found is not None:
        return found[0]
    gain = sampler_gain(setup.sampling.scheduler, trajectories.timesteps, config.sensitivity.data_variance)
    sensitivities = unit_sensitivities(
        setup.full,
        setup.graph,
        setup.timestep_groups,
        trajectories,
        gain,
        config.calibration.batch_size,
        config.seed,
        config.sensitivity.probes,
    )
    on_main(lambda: save_tensors(path, sensitivities))
    release_freed_memory()  # the pass through the whole denoiser leaves holes that nothing later fills
    return sensitivities


def _stored(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    if not path.exists():
        return None
    try:
        return load_tensors(path)
    except DamagedFileError as error:
        log.warning("%s; made again", error)
        return None
