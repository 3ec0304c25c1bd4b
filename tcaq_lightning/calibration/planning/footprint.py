"""Memory that a calibration needs beside its stored activations: models, and room to work in.

The room is measured, not guessed: every kind of work is really done on two and on three samples, with a quantized twin
that is thrown away, and what it allocates is scaled to the number of samples that it will be done on. With large
models it is done on the meta device, which takes neither the memory that is asked about nor the time.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from tcaq_lightning.calibration.losses import block_error
from tcaq_lightning.calibration.probes import capture_inputs
from tcaq_lightning.calibration.reconstruction import BlockReconstruction, Phase
from tcaq_lightning.calibration.unit_data import SplitArguments, UnitData, split_arguments
from tcaq_lightning.config import Config
from tcaq_lightning.methods.sensitivity import unit_sensitivities
from tcaq_lightning.models.denoiser_calls import Samples
from tcaq_lightning.models.graph import UnitGraph
from tcaq_lightning.models.pipelines import find_decoder, one_by_one
from tcaq_lightning.models.trajectories import Trajectories
from tcaq_lightning.models.unit_outputs import Outputs
from tcaq_lightning.nn.layers import QuantLayer
from tcaq_lightning.nn.parts import output_quantizers, quant_layers, quantizers, readers
from tcaq_lightning.nn.prepare import quantize, shared_copy
from tcaq_lightning.nn.state import quantization_state
from tcaq_lightning.quantizers import ActivationQuantizer, SoftmaxQuantizer
from tcaq_lightning.quantizers.logarithmic import log_fake_quantize
from tcaq_lightning.quantizers.timestep_groups import TimestepGroups
from tcaq_lightning.runtime.allocation_trace import SIZES, scaled_peak
from tcaq_lightning.runtime.distributed.collectives import world_size
from tcaq_lightning.runtime.distributed.shared_memory import SharedSums

META = torch.device("meta")
LARGE = 50_000_000
"""Bytes of a model's parameters from which on trial work is quicker on the meta device than on a CPU."""
LIBRARIES = 45_000_000
"""Bytes that libraries keep for themselves as a run goes on, and that lie between freed blocks."""
COMPILER = 80_000_000
"""Bytes that torch's compiler and all kernels of a run take beside that, made anew (torch 2.13 on Linux)."""
SAMPLE_COPIES = 2
"""Copies of the calibration samples: the trajectories, and those of the running round as the streams read them."""


@dataclass(frozen=True)
class Footprint:
    """Bytes that a run needs beside its stored activations.

    Attributes:
        models: the full-precision pipeline, whose denoiser's weights the quantized one shares, and that one's codes and
            tables.
        workspace: by kind of work, one of which is done at a time; each with the calibration samples themselves.
    """

    models: int
    workspace: dict[str, int]


def unit_samples(denoiser: nn.Module, graph: UnitGraph, samples: Samples) -> dict[str, UnitData]:
    """Inputs and outputs of every unit in one pass of the full-precision denoiser, all in timestep group 0.

    Args:
        denoiser: full precision.
        graph: its units.
        samples: inputs of the denoiser.
    """
    found: dict[str, UnitData] = {}
    groups = torch.zeros(len(samples), dtype=torch.long)
    arguments: dict[str, SplitArguments] = {}

    def enter(name: str) -> Any:
        def receive(_module: nn.Module, args: Any, kwargs: Any) -> None:
            if name in arguments:  # it runs again
                return
            arguments[name] = split = split_arguments((args, kwargs), len(samples), graph.rows.get(name))
            split.inputs = [v.clone() for v in split.inputs]

        return receive

    def leave(name: str) -> Any:
        def receive(_module: nn.Module, _args: Any, output: Outputs) -> None:
            if name in found:
                return
            split, keys = arguments[name], iter(graph.keys(name))
            found[name] = UnitData(
                split.inputs,
                split.constants,
                split.spec,
                tree_map_only(Tensor, lambda v: graph.kept(next(keys), v, len(samples)).clone(), output),
                groups,
                dtype=samples.x.dtype,
                folded=split.folded,
                dtypes=split.dtypes,
            )

        return receive

    modules = {name: denoiser.get_submodule(name) for name in graph.names}
    handles = [m.register_forward_pre_hook(enter(n), with_kwargs=True) for n, m in modules.items()]
    handles += [m.register_forward_hook(leave(n)) for n, m in modules.items()]
    try:
        with torch.no_grad():
            samples.predict(denoiser)
    finally:
        for handle in handles:
            handle.remove()
    return found


def measure_footprint(
    config: Config, denoiser: nn.Module, others: Mapping[str, nn.Module], graph: UnitGraph, samples: Samples, calls: int
) -> Footprint:
    """Do every kind of work on a few samples, and scale what it allocates.

    Args:
        config: the run's configuration.
        denoiser: full precision; left as it is, like the random state.
        others: the pipeline's other networks.
        graph: its units.
        samples: inputs like those of the calibration, any number.
        calls: denoiser calls of one trajectory.
    """
    few = samples.cycled(SIZES[1])
    data = config.calibration
    trajectories = len(data.indices)
    of_trajectories = SAMPLE_COPIES * trajectories * (calls * samples.x[0].nbytes + samples.conditioning_bytes())
    groups = config.quantization.activation.timestep_groups
    probes = min(groups * max(1, data.probe_samples // groups), calls * data.num_trajectories)

    def measured(work: TrialWork) -> Footprint:
        distinct = work.distinct()
        workspace = {
            "sampling": work.peak(work.sample, max(data.batch_size, config.evaluation.batch_size)),
            "search": max(work.search_bytes(name, probes) for name in distinct),
            "gate": max(work.scaled(name, work.judge, config.judged_batch_size) for name in distinct),
        }
        if config.reconstruction.enabled:
            workspace["learn"] = work.learning_bytes()
        return Footprint(work.model_bytes(), workspace)

    def weigh(count: int) -> None:  # not on the meta device, where full-precision attention allocates more
        timestep_groups, trajectories = TimestepGroups([]), Trajectories.of_samples(few[:count])
        # the second probe meets what is left of the first
        unit_sensitivities(denoiser, graph, timestep_groups, trajectories, torch.ones(count), count, seed=0, probes=2)

    with torch.random.fork_rng(enabled=config.reconstruction.qdrop > 0):
        found = measured(_trial_work(config, denoiser, graph, few))
        if config.reconstruction.enabled and config.reconstruction.weighting == "sensitivity":
            found.workspace["sensitivity"] = scaled_peak(weigh, min(data.batch_size, calls))
    if (decoder := find_decoder(others)) is not None:
        found.workspace["decoding"] = decoding_bytes(
            decoder, samples.x, max(data.batch_size, config.evaluation.batch_size)
        )
    always = of_trajectories + LIBRARIES + (COMPILER if config.reconstruction.compile_kernels else 0)
    always += SharedSums.size(world_size()) // world_size() if world_size() > 1 else 0
    models = found.models + sum(tensor.nbytes for part in others.values() for tensor in part.state_dict().values())
    return Footprint(models, {kind: always + nbytes for kind, nbytes in found.workspace.items()})


def decoding_bytes(decoder: Any, x: Tensor, count: int) -> int:
    """Bytes that it takes to make images of latents; 0 of a decoder that does not say what its latents are.

    Args:
        decoder: an autoencoder of diffusers.
        x: (B, C, H, W) samples of the denoiser, or (B, T, C) where a token stands for four places of the latents.
        count: images at a time.
    """
    channels = getattr(decoder.config, "latent_channels", None)
    if channels is None:
        return 0
    size = x.shape[2:] if x.ndim == 4 else (2, 2 * x.shape[1])

    def decode(network: Any, count: int) -> Any:
        like = next(network.parameters())
        with torch.no_grad(), one_by_one(network):
            return network.decode(like.new_zeros(count, channels, *size), return_dict=False)

    if sum(p.nbytes for p in decoder.parameters()) >= LARGE:
        with suppress(RuntimeError, NotImplementedError):
            return scaled_peak(partial(decode, without_values(decoder)), count, decoder.device.type)
    return scaled_peak(partial(decode, decoder), count)


def _trial_work(config: Config, denoiser: nn.Module, graph: UnitGraph, few: Samples) -> TrialWork:
    """Trial work on the meta device for a large denoiser, unless its path depends on values."""
    if sum(p.nbytes for p in denoiser.parameters()) < LARGE:
        return TrialWork(config, denoiser, graph, few)
    device = next(denoiser.parameters()).device
    try:
        return TrialWork(config, without_values(denoiser), graph, few.to(META), device.type)
    except (RuntimeError, NotImplementedError):  # "Tensor.item() cannot be called on meta tensors", and such
        return TrialWork(config, denoiser, graph, few)


def without_values(denoiser: nn.Module) -> nn.Module:
    """A copy of a denoiser on the meta device."""
    memo: dict[int, Any] = {id(p): nn.Parameter(p.to(META), requires_grad=False) for p in denoiser.parameters()}
    memo |= {id(b): b.to(META) for b in denoiser.buffers()}
    return copy.deepcopy(denoiser, memo)


class TrialWork:
    """The kinds of work of a calibration, done on the first of a few samples by a quantized twin of its own.

    Args:
        config: the run's configuration.
        denoiser: full precision.
        graph: its units.
        samples: inputs of the denoiser, at least `SIZES[1]`.
        stood_for: type of the device that is planned for, where the denoiser is on the meta device.

    Attributes:
        data: the samples of every unit.
        twin: the denoiser with neutral quantizers.
        timestep_groups: the twin's, a single one.
    """

    def __init__(
        self, config: Config, denoiser: nn.Module, graph: UnitGraph, samples: Samples, stood_for: str = "meta"
    ) -> None:
        self.config, self.denoiser, self.graph, self.samples = config, denoiser, graph, samples
        self.device = next(denoiser.parameters()).device
        self.data = unit_samples(denoiser, graph, samples)
        self.stood_for = stood_for
        self.twin, self.timestep_groups = shared_copy(denoiser), TimestepGroups([])
        quantize(self.twin, config.quantization, self.timestep_groups)
        for quantizer in quantizers(self.twin).values():
            if quantizer.place == "probabilities":
                quantizer.logarithmic()  # which it remembers: to find it out is no part of the work

    def model_bytes(self) -> int:
        """As in `Footprint`."""
        states = (self.denoiser.state_dict(), quantization_state(self.twin))
        codes = sum(layer.learned_weight.weight.numel() for layer in quant_layers(self.twin).values())  # a byte each
        return codes + sum(tensor.nbytes for state in states for tensor in state.values())

    def peak(self, work: Callable[[int], Any], samples: int) -> int:
        """`scaled_peak` for the device that is planned for."""
        return scaled_peak(work, samples, self.stood_for)

    def distinct(self) -> list[str]:
        """One of all units that have equal layers and inputs, and so take the same memory."""
        found: dict[Any, str] = {}
        for name in self.graph.names:
            unit, data = self.twin.get_submodule(name), self.data[name]
            layers = tuple((key, tensor.shape) for key, tensor in unit.state_dict().items())
            found[type(unit), layers, tuple(tensor.shape for tensor in data.tensors())] = name
        return list(found.values())

    def scaled(self, name: str, work: Callable[[nn.Module, UnitData], Any], samples: int) -> int:
        """Bytes that work on a unit takes for `samples` samples, the next batch included.

        Args:
            name: of the unit.
            work: takes the unit and some of its samples.
            samples: number of samples that the work is scaled to.
        """
        unit, data = self.twin.get_submodule(name), self.data[name]
        next_batch = sum(tensor.nbytes for tensor in data.tensors()) * samples // len(data)  # may be read meanwhile
        weights = [layer.learned_weight for layer in quant_layers(unit).values()]
        for weight in weights:
            weight.open()
        kept = sum(weight.logits.nbytes for weight in weights)
        kept += sum(tensor.nbytes for tensor in quantization_state(unit).values())  # what the gate may put back
        taken = self.peak(lambda count: work(unit, data.select(slice(count))), samples)
        for weight in weights:
            weight.discard_logits()
        return kept + next_batch + taken

    def learning_bytes(self) -> int:
        """Bytes that the optimisation of a unit takes at most."""
        batch_size = self.config.reconstruction.batch_size // world_size()
        phases: set[Any] = {phase for _, phase in self.config.phase_iterations()}
        return max(
            self.scaled(name, partial(self.learn, phase=phase), batch_size)
            for name in self.distinct()
            for phase in sorted(phases)
        )

    @torch.no_grad()
    def sample(self, count: int) -> Tensor:
        """One call of the quantized denoiser."""
        return self.samples[:count].predict(self.twin)

    @torch.no_grad()
    def search_bytes(self, name: str, probes: int) -> int:
        """Bytes that setting a unit's quantizers takes: all their inputs, and a pass or a search beside them."""
        unit, data = self.twin.get_submodule(name), self.data[name]
        queries = self.config.calibration.probe_queries
        inputs = capture_inputs(unit, data, self.timestep_groups, self.device, queries=queries)
        held = sum(x.nbytes for x in inputs.values()) * probes // len(data)

        layers_of = readers(unit)

        def search(unit: nn.Module, part: UnitData) -> None:
            with self.timestep_groups.using(part.groups):
                for key, quantizer in quantizers(unit).items():
                    rows = max(1, len(inputs[key]) * len(part) // len(data))  # a single one is every sample's
                    self._search(quantizer, layers_of.get(id(quantizer), []), inputs[key][:rows])

        seen = sum(x.nbytes for x in data.tensors()) * probes // len(data)
        batch = min(probes, self.config.judged_batch_size)
        return held + max(self.scaled(name, search, probes), seen + self.scaled(name, self.judge, batch))

    @staticmethod
    def _search(quantizer: ActivationQuantizer | SoftmaxQuantizer, layers: list[QuantLayer], x: Tensor) -> None:
        """One candidate of a quantizer's search, on the input of the layers that read it."""
        if quantizer.place == "probabilities":
            tau, one = quantizer.tau.new_ones(()), x[:1]  # sample by sample
            torch.matmul(log_fake_quantize(one, quantizer.delta[0], tau, quantizer.bits) - one, one.mT[..., :1])
            return
        centred = quantizer.centred(x)
        targets = [layer.linear_map(centred, layer.learned_weight.weight, None) for layer in layers]
        quantized = quantizer(x)
        for layer, target in zip(layers, targets, strict=True):
            (layer.linear_map(quantized, layer.learned_weight.weight, None) - target).square().sum()

    def judge(self, unit: nn.Module, data: UnitData) -> None:
        """The error of a unit's output."""
        batch = data.read(torch.arange(len(data)), self.device)
        with torch.no_grad():
            block_error(data.run_batch(unit, self.timestep_groups, batch), batch.targets)

    def learn(self, unit: nn.Module, data: UnitData, phase: Phase) -> None:
        """An optimisation step that meets the optimizer's state, with the regulariser.

        Args:
            unit: quantized unit.
            data: its samples.
            phase: "r" or "v".
        """
        count = len(data)
        settings: dict[str, Any] = {"batch_size": count * world_size(), "warmup": 0.0}
        config = dataclasses.replace(self.config.reconstruction, **settings, compile=False)  # as it is, it takes more
        module = BlockReconstruction(unit, data, torch.arange(count), self.timestep_groups, config, phase, 1, (0, 0, 0))
        module.to(self.device)  # as a Trainer would
        if not module.learns:
            module.finish()
            return
        optimizer = module.configure_optimizers()
        for parameter in module.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        optimizer.step()  # makes its state, and moves nothing
        module._batches = (data.read(index, self.device) for index in [torch.arange(count)])  # by this thread, traced
        optimizer.zero_grad()
        module.training_step(0, 0).backward()  # type: ignore[no-untyped-call]
        module.regularize()
        optimizer.step()
        module.on_train_end()
        weights = (layer.learned_weight for layer in quant_layers(unit).values())
        for part in (*quantizers(unit).values(), *output_quantizers(unit), *weights):
            part.end_learning()
