"""What a run computes once and reads again when it goes on: trajectories, and the weights of errors."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tcaq_lightning.calibration.run_files import RunFile
from tcaq_lightning.calibration.state import Setup
from tcaq_lightning.config import Config
from tcaq_lightning.methods.sensitivity import sampler_gain, unit_sensitivities
from tcaq_lightning.models.pipelines import public_config
from tcaq_lightning.models.sampling import Sampling
from tcaq_lightning.models.trajectories import Trajectories, collect, collect_together
from tcaq_lightning.runtime.distributed.collectives import on_main
from tcaq_lightning.runtime.files import DamagedFileError, locked
from tcaq_lightning.runtime.hashing import weights_hash
from tcaq_lightning.runtime.memory import release_freed_memory
from tcaq_lightning.runtime.one_line import one_line

log = logging.getLogger(__name__)


def stored_trajectories(
    file: RunFile,
    config: Config,
    denoiser: nn.Module,
    sampling: Sampling,
    indices: Sequence[int],
    advance: Callable[[int], None] | None = None,
) -> Trajectories:
    """Read trajectories from a file of the run; make and write them if it is missing, damaged, or of something else.

    They are the same on every rank. The file carries a manifest: hash of the model, sampler and its settings, seed,
    guidance, labels or prompts.

    Args:
        file: of the run.
        config: the run's configuration.
        denoiser: that samples, full-precision or quantized.
        sampling: how the pipeline is sampled.
        indices: numbers of the noises.
        advance: told the number of trajectories just done.
    """
    data, seed = config.calibration, config.seed
    manifest = trajectories_manifest(config, denoiser, sampling, indices)
    found = on_main(lambda: _stored_trajectories(file, manifest))
    if found is not None:
        return Trajectories.unpacked(*found)

    def collect_some(mine: Sequence[int]) -> Trajectories:
        return collect(denoiser, sampling, data.sampler, mine, seed, data.batch_size, advance)

    trajectories = collect_together(collect_some, indices, advance)

    def write() -> None:
        tensors, record = trajectories.packed()
        file.save(tensors, {**record, "manifest": manifest})

    on_main(write)
    return trajectories


def shared_trajectories(
    shared: Path,
    config: Config,
    denoiser: nn.Module,
    sampling: Sampling,
    advance: Callable[[int], None] | None = None,
) -> Trajectories:
    """The calibration trajectories of all runs that draw the same ones: made once, also by several runs at a time.

    Args:
        shared: directory of what runs share.
        config: the run's configuration.
        denoiser: full precision.
        sampling: how the pipeline is sampled.
        advance: told the number of trajectories just done.
    """
    indices = config.calibration.indices
    manifest = trajectories_manifest(config, denoiser, sampling, indices)
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()[:20]
    file = RunFile(shared / "trajectories" / f"{digest}.safetensors", {"file": "trajectories", "digest": digest})
    with locked(file.path.parent):
        return stored_trajectories(file, config, denoiser, sampling, indices, advance)


def trajectories_manifest(
    config: Config, denoiser: nn.Module, sampling: Sampling, indices: Sequence[int]
) -> dict[str, Any]:
    """All that determines trajectories, JSON-ready.

    Args:
        config: the run's configuration.
        denoiser: that samples.
        sampling: how the pipeline is sampled.
        indices: numbers of the noises.
    """
    own = sampling.scheduler
    manifest = {
        "denoiser": weights_hash(denoiser),
        "scheduler": {"class": type(own).__name__, **public_config(own)},
        "sampler": dataclasses.asdict(config.calibration.sampler),
        "batch_size": config.calibration.batch_size,
        "seed": config.seed,
        "noises": list(indices),
        **sampling.manifest(),
    }
    plain: dict[str, Any] = json.loads(json.dumps(manifest, default=str))
    return plain


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
    file = setup.files.sensitivities
    found = on_main(lambda: _stored_sensitivities(file, setup))
    if found is not None:
        return found
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
    on_main(lambda: file.save(sensitivities))
    release_freed_memory()  # the pass through the whole denoiser leaves holes that nothing later fills
    return sensitivities


def _stored_trajectories(file: RunFile, manifest: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """What a file of trajectories holds, if they are those of the manifest."""
    with _made_again(file):
        tensors, record = file.load()
        if record["manifest"] != manifest:
            different = next(key for key in manifest if record["manifest"].get(key) != manifest[key])
            raise ValueError(f"of another {different}")
        found = Trajectories.unpacked(tensors, record)
        counts = len(found.timesteps), len(manifest["noises"])
        if found.inputs.shape[:2] != counts or len(found.finals) != counts[1] or counts[0] % found.halves:
            raise ValueError(f"tensors of other sizes than {counts[0]} calls and {counts[1]} trajectories")
        return tensors, record
    return None


def _stored_sensitivities(file: RunFile, setup: Setup) -> dict[str, Tensor] | None:
    """What a file of weights holds, if they are those of the units."""
    with _made_again(file):
        tensors, _ = file.load()
        groups = setup.timestep_groups.num_groups
        if tensors.keys() != set(setup.graph.names) or any(x.ndim != 2 or len(x) != groups for x in tensors.values()):
            raise ValueError("weights of other units")
        return tensors
    return None


@contextmanager
def _made_again(file: RunFile) -> Iterator[None]:
    """Go on after what a missing file, or one with anything but what belongs there, raises."""
    try:
        yield
    except FileNotFoundError:
        pass
    except DamagedFileError as error:
        log.warning("%s; made again", error)
    except (KeyError, ValueError, TypeError, AttributeError, RuntimeError, IndexError) as error:
        log.warning("%s is not what belongs there (%s); made again", file.path, one_line(error))
