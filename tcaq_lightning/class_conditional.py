"""Latent diffusion conditioned on a class through cross-attention, which diffusers has no pipeline for."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn


class ClassEmbedder(ModelMixin, ConfigMixin):
    """Classes as one token of cross-attention context each (Rombach et al. 2022, class-conditional ImageNet).

    Args:
        num_classes: K. One embedding more stands for "no class"; its label is K.
        embedding_dim: D.
    """

    config: Any

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self, num_classes: int, embedding_dim: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.embedding = nn.Embedding(num_classes + 1, embedding_dim)

    def forward(self, class_labels: Tensor) -> Tensor:
        """Labels (B,) to context (B, 1, D)."""
        context: Tensor = self.embedding(class_labels)[:, None]
        return context


class ClassConditionalLatentPipeline(DiffusionPipeline):
    """Sample latents with classifier-free guidance on a class, and decode them.

    Args:
        vae: `AutoencoderKL` or `VQModel`; latents are multiplied by its `scaling_factor`.
        unet: `UNet2DConditionModel` whose cross-attention reads the class' embedding.
        scheduler: any diffusers scheduler.
        class_embedder: embeds the labels.
    """

    model_cpu_offload_seq = "class_embedder->unet->vae"

    def __init__(self: Any, vae: Any, unet: Any, scheduler: Any, class_embedder: ClassEmbedder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.register_modules(vae=vae, unet=unet, scheduler=scheduler, class_embedder=class_embedder)
        factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.image_processor = VaeImageProcessor(vae_scale_factor=factor)

    @torch.no_grad()
    def __call__(
        self: Any,
        class_labels: Sequence[int],
        num_inference_steps: int = 20,
        guidance_scale: float = 1.0,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:
        """Sample one image for each label.

        Args:
            class_labels: of 0..K-1; K samples without a class.
            num_inference_steps: sampler steps.
            guidance_scale: w in eps = eps_null + w (eps_class - eps_null); 1 runs the class' half alone.
            eta: DDIM's noise share, for schedulers that have it.
            generator: of x_T and of the noise of each step.
            latents: x_T in place of drawn ones, (B, C, H, W) of variance 1.
            output_type: `pil`, `np`, `pt`, or `latent`.
            return_dict: whether an `ImagePipelineOutput` comes back, or a tuple.

        Raises:
            ValueError: a label that is no class.
        """
        known = self.class_embedder.config.num_classes
        if bad := [label for label in class_labels if not 0 <= label <= known]:
            raise ValueError(f"class_labels: expected 0..{known - 1}, or {known} for no class, got {bad[0]}")
        device, dtype = self._execution_device, self.unet.dtype
        labels = torch.tensor(list(class_labels), device=device)
        context = self.class_embedder(labels)
        guided = guidance_scale != 1
        if guided:
            context = torch.cat([self.class_embedder(torch.full_like(labels, known)), context])
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        shape = (len(labels), self.unet.config.in_channels, height, width)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        x = latents.to(device, dtype) * self.scheduler.init_noise_sigma
        accepted = inspect.signature(self.scheduler.step).parameters
        extra = {k: v for k, v in {"eta": eta, "generator": generator}.items() if k in accepted}
        for t in self.progress_bar(self.scheduler.timesteps):
            doubled = self.scheduler.scale_model_input(torch.cat([x, x]) if guided else x, t)
            prediction = self.unet(doubled, t, encoder_hidden_states=context, return_dict=False)[0]
            if guided:
                unconditional, conditional = prediction.chunk(2)
                prediction = unconditional + guidance_scale * (conditional - unconditional)
            x = self.scheduler.step(prediction, t, x, **extra, return_dict=False)[0]
        if output_type != "latent":
            x = self.vae.decode(x / self.vae.config.scaling_factor, return_dict=False)[0]
            x = self.image_processor.postprocess(x, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=x) if return_dict else (x,)  # type: ignore[no-untyped-call]
