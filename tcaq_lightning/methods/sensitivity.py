"""Sensitivity weights: how much an error in a unit's output, at a timestep and in a channel, changes the final sample.

This project's own (docs/method.md, "Sensitivity weights"). A plain block error is dominated by the last timesteps,
where a denoiser's errors are largest and matter least. Weights that follow the error to the sample let rounding be
learned for the sample. They are a product of two factors, both to second order and for errors that are independent of
each other:

- from the unit's output to the denoiser's prediction: the squared Jacobian, by random projection;
- from the prediction to the final sample: how far the sampler carries it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from tcaq_lightning.models.denoiser_calls import Samples
from tcaq_lightning.models.forwards import patched_forwards
from tcaq_lightning.models.graph import UnitGraph
from tcaq_lightning.models.trajectories import Trajectories
from tcaq_lightning.models.unit_outputs import Outputs, channel_count, mean_squares, output_tensors
from tcaq_lightning.quantizers.timestep_groups import TimestepGroups
from tcaq_lightning.runtime.distributed.collectives import is_mine, total


def sampler_gain(scheduler: Any, timesteps: Tensor, data_variance: float) -> Tensor:
    """Squared error of the final sample by squared error of the prediction at each denoiser call.

    With the noise level sigma_t = sqrt((1 - abar_t) / abar_t), an error in eps moves x_0's estimate by
    (sigma_t - sigma_s) times itself in the step from t to s, and the rest of the flow contracts it from sigma_s to 0 as
    it contracts data of variance v: c_t = (sigma_t - sigma_s)^2 v / (v + sigma_s^2).

    Args:
        scheduler: a diffusers scheduler. Of one without `alphas_cumprod`, all calls weigh the same.
        timesteps: (S,) of the denoiser calls of a trajectory.
        data_variance: v.

    Returns:
        (S,), mean 1.
    """
    alphas = getattr(scheduler, "alphas_cumprod", None)
    if not isinstance(alphas, Tensor):
        return torch.ones(len(timesteps))
    index = timesteps.double().round().long().clamp(0, len(alphas) - 1).cpu()
    alpha = alphas.double().cpu()[index].clamp(min=1e-8)  # 0 where the noise schedule ends without any signal
    sigma = ((1 - alpha) / alpha).sqrt()
    levels = torch.cat([torch.zeros(1, dtype=sigma.dtype), torch.unique(sigma)])  # ascending; the sampler ends at 0
    following = levels[torch.searchsorted(levels, sigma) - 1]
    gain = (sigma - following) ** 2 * data_variance / (data_variance + following**2)
    kind = scheduler.config.get("prediction_type", "epsilon")
    if kind == "v_prediction":
        gain = gain * alpha  # eps = sqrt(abar) v + sqrt(1 - abar) x_t
    elif kind == "sample":
        gain = gain / sigma.clamp(min=1e-8) ** 2  # eps = (x_t - sqrt(abar) x_0) / sqrt(1 - abar)
    return (gain / gain.mean()).float()


def unit_sensitivities(
    full: nn.Module,
    graph: UnitGraph,
    timestep_groups: TimestepGroups,
    trajectories: Trajectories,
    gain: Tensor,
    batch_size: int,
    seed: int,
    probes: int,
) -> dict[str, Tensor]:
    """Weight of every unit's squared output error, by timestep group and channel.

    For a random sign vector v, the expected square of d(v eps)/du is the column norm of the Jacobian d eps/du, so one
    backward pass for all units estimates every weight at once.

    Args:
        full: full-precision denoiser.
        graph: its units.
        timestep_groups: those of the quantized denoiser (G).
        trajectories: full-precision calibration data.
        gain: (S,) from `sampler_gain`.
        batch_size: samples per pass.
        seed: of the sign vectors.
        probes: samples of each denoiser call.

    Returns:
        By unit name, (G, C), non-negative, the channels of a unit's outputs in sequence; its scale is that of the
        sample's squared error.
    """
    generator = torch.Generator().manual_seed(seed)
    groups = timestep_groups.of(trajectories.timesteps)  # (S,)
    calls_of_group = torch.bincount(groups, minlength=timestep_groups.num_groups).clamp(min=1)
    weight = gain / calls_of_group[groups] / probes  # of each call in its group's mean
    channels = {name: sum(channel_count(graph.output_shapes[key]) for key in graph.keys(name)) for name in graph.names}
    sums = {name: torch.zeros(timestep_groups.num_groups, count) for name, count in channels.items()}
    batches = [
        (probe % trajectories.num_trajectories, calls)
        for probe in range(probes)
        for calls in torch.split(torch.arange(trajectories.num_steps), batch_size)
    ]
    for number, (trajectory, calls) in enumerate(batches):
        samples = trajectories.at(calls, torch.full_like(calls, trajectory))
        signs = torch.randint(2, samples.x.shape, generator=generator)  # the same ones however the batches are dealt
        if is_mine(number):
            squares = _squared_jacobians(full, graph, samples, signs)
            for name, square in squares.items():
                sums[name].index_add_(0, groups[calls], square.float().cpu() * weight[calls, None])
    return {name: total(sums[name]) for name in graph.names}


def _squared_jacobians(full: nn.Module, graph: UnitGraph, samples: Samples, signs: Tensor) -> dict[str, Tensor]:
    """(B, C) mean square of the gradient of a random projection of the prediction, by unit.

    What is within a unit is computed again in the backward pass: of deep denoisers it would not fit into memory.

    Args:
        full: full-precision denoiser.
        graph: its units.
        samples: a batch.
        signs: of x's shape, 0 or 1: the projection.
    """
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def receive(_module: nn.Module, _args: Any, output: Outputs) -> Outputs:
            if graph.keys(name)[0] in outputs:  # it runs again, which is glue
                return output
            found = output_tensors(output)
            outputs.update({key: x.requires_grad_() for key, x in zip(graph.keys(name), found, strict=True)})
            return tree_map_only(Tensor, lambda x: x * 1, output)  # glue may write in place

        return receive

    modules = {name: full.get_submodule(name) for name in graph.names}
    forwards = {name: _recomputed(module.forward) for name, module in modules.items()}
    handles = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    try:
        with torch.enable_grad(), patched_forwards(full, forwards):
            prediction = samples.predict(full)[:, : samples.x.shape[1]]  # without variances
            gradients = torch.autograd.grad(
                (prediction * (signs.to(prediction) * 2 - 1)).sum(),
                list(outputs.values()),
                allow_unused=True,
                materialize_grads=True,
            )
    finally:
        for handle in handles:
            handle.remove()
    found = zip(outputs, gradients, strict=True)
    squares = {key: mean_squares(graph.kept(key, g.float(), len(samples))) for key, g in found}
    return {name: torch.cat([squares[key] for key in graph.keys(name)], dim=1) for name in graph.names}


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A forward whose intermediate values are not kept for the backward pass."""
    return partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False)


def normalized_weights(weights: Tensor, squares: Tensor) -> Tensor:
    """Scale weights such that they leave the present error as it is; uniform ones where they are all 0.

    Args:
        weights: (G, C) from `unit_sensitivities`.
        squares: (G, C) the unit's present squared error by group and channel.

    >>> normalized_weights(torch.tensor([[1.0], [3.0]]), torch.tensor([[2.0], [2.0]]))
    tensor([[0.5000],
            [1.5000]])
    """
    weighted = (weights * squares).sum()
    if not weighted > 0:
        return torch.ones_like(weights)
    return weights * (squares.sum() / weighted)
