"""The plan of a model whose weights are not at hand."""

from __future__ import annotations

from dataclasses import dataclass

from tcaq_lightning.calibration.planning.cost import DEVICE_TFLOPS
from tcaq_lightning.calibration.planning.plan import Plan, check_stop, sketch_plan
from tcaq_lightning.config import Config
from tcaq_lightning.errors import UserError
from tcaq_lightning.models.architectures import (
    architecture_scheduler,
    example_samples,
    find_architecture,
    meta_denoiser,
)
from tcaq_lightning.models.graph import trace_units
from tcaq_lightning.models.pipelines import make_scheduler
from tcaq_lightning.nn.coverage import CoverageRow
from tcaq_lightning.nn.prepare import quantize as quantize_denoiser
from tcaq_lightning.nn.prepare import shared_copy
from tcaq_lightning.quantizers.timestep_groups import TimestepGroups, group_boundaries
from tcaq_lightning.runtime.allocation_trace import SIZES


@dataclass(frozen=True)
class Sketch:
    """What a run would do, as far as a model's configuration says.

    Attributes:
        plan: counts, memory and time.
        coverage: rows of the coverage table.
        architecture: name of the configuration.
        parameters: number of the denoiser's parameters.
    """

    plan: Plan
    coverage: list[CoverageRow]
    architecture: str
    parameters: int

    def __str__(self) -> str:
        return (
            f"{self.architecture}: {self.parameters / 1e6:,.1f} million parameters, from its configuration alone; time "
            f"for {self.plan.processes} x {DEVICE_TFLOPS:g} TFLOP/s, which is assumed"
        )


def sketch_run(config: Config) -> Sketch:
    """Plan a run from `model.architecture`, without weights.

    Args:
        config: the run's configuration.

    Raises:
        UserError: there is no such architecture, or the settings do not fit it.
    """
    if config.model.architecture is None:
        raise UserError("model.architecture is null; expected the name of a shipped configuration, or a directory")
    architecture = find_architecture(config.model.architecture)
    denoiser = meta_denoiser(architecture)
    scheduler = make_scheduler(architecture_scheduler(architecture), config.calibration.sampler)
    timesteps = scheduler.timesteps.tolist()
    guidance = config.conditioning.guidance_scale
    rows = 2 if guidance is not None and guidance > 1 else 1  # of a sample in each batch of the sampler
    groups = TimestepGroups(group_boundaries(timesteps, config.quantization.activation.timestep_groups))
    coverage = quantize_denoiser(shared_copy(denoiser), config.quantization, groups)
    samples = example_samples(denoiser, SIZES[1])
    graph = trace_units(denoiser, lambda: samples.predict(denoiser))
    check_stop(config, graph.names)
    plan = sketch_plan(config, denoiser, graph, coverage, samples, rows * len(timesteps))
    return Sketch(plan, coverage, architecture.name, sum(p.numel() for p in denoiser.parameters()))
