"""Samplers of the paper's set-ups that diffusers lacks."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin  # noqa: F401 - diffusers' loader looks for it here
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

QUADRATIC_SHARE = 0.8
"""Share of the training timesteps that quadratic spacing spans, as in the DDIM repository."""


class QuadraticDDIMScheduler(DDIMScheduler):
    """DDIM whose timesteps grow quadratically (Song et al. 2021, appendix D.2; their CIFAR-10 results).

    The S timesteps are floor(i^2 * 0.8 T / (S - 1)^2), i = 0..S-1, taken from the largest, and each step leads to the
    next of them, the last to x_0. Of many steps several fall on t = 0: the denoiser is called for each of them as in
    the DDIM repository, and all but the last of these leave x unchanged. Its settings are those of `DDIMScheduler`;
    `timestep_spacing` and `steps_offset` have no effect.
    """

    def set_timesteps(self: Any, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Choose the timesteps of a run.

        Args:
            num_inference_steps: S.
            device: of the timesteps.

        Raises:
            ValueError: S is not in 1..T.
        """
        total = self.config.num_train_timesteps
        if not 1 <= num_inference_steps <= total:
            raise ValueError(f"num_inference_steps must be in 1..{total}, got {num_inference_steps}")
        self.num_inference_steps = num_inference_steps
        spaced = np.linspace(0, np.sqrt(total * QUADRATIC_SHARE), num_inference_steps) ** 2
        self.timesteps = torch.from_numpy(spaced.astype(np.int64)[::-1].copy()).to(device)
        self._position = 0

    def previous_timestep(self: Any, timestep: int) -> int:
        """The timestep that a step from `timestep` leads to; -1 stands for x_0.

        Of equal timesteps the one after that of the last step is meant.

        Raises:
            ValueError: it is not one of the run's timesteps.
        """
        places = (self.timesteps == timestep).nonzero().flatten().tolist()
        if not places:
            raise ValueError(f"timestep must be one of {self.timesteps.tolist()}, got {timestep}")
        place = self._position if self._position in places else places[0]
        self._position = place + 1
        return int(self.timesteps[place + 1]) if place + 1 < len(self.timesteps) else -1

    def step(
        self: Any,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """One step (Song et al. 2021, eq. 12 and 16).

        Args:
            model_output: the denoiser's prediction, of the configured prediction type, (B, C, H, W).
            timestep: t, one of the run's timesteps.
            sample: x_t.
            eta: share of the noise; 0 is deterministic, 1 is DDPM-like.
            use_clipped_model_output: derive eps again from the clipped x_0.
            generator: of the noise.
            variance_noise: noise in place of drawn one.
            return_dict: whether a `DDIMSchedulerOutput` comes back, or a tuple.

        Returns:
            The next sample and the predicted x_0.

        Raises:
            ValueError: `set_timesteps` was not called, or t is none of the run's timesteps.
        """
        if self.num_inference_steps is None:
            raise ValueError("call set_timesteps before step")
        now = int(timestep)
        previous = self.previous_timestep(now)
        alpha = self.alphas_cumprod[now]
        alpha_previous = self.alphas_cumprod[previous] if previous >= 0 else self.final_alpha_cumprod
        kind = self.config.prediction_type
        if kind == "epsilon":
            x0, eps = (sample - (1 - alpha).sqrt() * model_output) / alpha.sqrt(), model_output
        elif kind == "sample":
            x0, eps = model_output, (sample - alpha.sqrt() * model_output) / (1 - alpha).sqrt()
        else:
            x0 = alpha.sqrt() * sample - (1 - alpha).sqrt() * model_output
            eps = alpha.sqrt() * model_output + (1 - alpha).sqrt() * sample
        if self.config.thresholding:
            x0 = self._threshold_sample(x0)
        elif self.config.clip_sample:
            x0 = x0.clamp(-self.config.clip_sample_range, self.config.clip_sample_range)
        if use_clipped_model_output:
            eps = (sample - alpha.sqrt() * x0) / (1 - alpha).sqrt()
        sigma = eta * self._get_variance(now, previous).sqrt()
        x = alpha_previous.sqrt() * x0 + (1 - alpha_previous - sigma**2).clamp(min=0).sqrt() * eps
        if eta > 0:
            if variance_noise is None:
                variance_noise = randn_tensor(
                    model_output.shape, generator=generator, device=model_output.device, dtype=model_output.dtype
                )
            x = x + sigma * variance_noise
        return DDIMSchedulerOutput(prev_sample=x, pred_original_sample=x0) if return_dict else (x, x0)


OWN_SCHEDULERS = {c.__name__: c for c in (QuadraticDDIMScheduler,)}
"""Schedulers that a config or a model_index.json may name beside those of diffusers."""
