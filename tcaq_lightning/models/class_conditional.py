"""Latent diffusion conditioned on a class: pipelines of small models that diffusers has none for.

`DiTPipeline` is for ImageNet alone: it takes label 1000 for "no class", whatever the number of classes.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
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


class ClassConditionalPipeline(DiffusionPipeline):
    """Sample latents with classifier-free guidance on a class, and decode them.

    A subclass has a component `vae` and a `scheduler`, and says which of its components denoises and how that takes a
    label.
    """

    @property
    def denoiser(self: Any) -> Any:
        """The component that predicts noise."""
        raise NotImplementedError

    @property
    def num_classes(self: Any) -> int:
        """K: classes are 0..K-1, and label K stands for "no class"."""
        raise NotImplementedError

    def condition(self: Any, class_labels: Tensor) -> dict[str, Tensor]:
        """Labels (B,) as keyword arguments of the denoiser."""
        raise NotImplementedError

    def _register(self: Any, id2label: Mapping[int, str] | None, **components: Any) -> None:
        self.register_modules(**components)
        self.register_to_config(id2label=None if id2label is None else {str(i): n for i, n in id2label.items()})
        self.labels = {name: int(i) for i, name in (id2label or {}).items()}
        factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
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
        denoiser, known = self.denoiser, self.num_classes
        if bad := [label for label in class_labels if not 0 <= label <= known]:
            raise ValueError(f"class_labels: expected 0..{known - 1}, or {known} for no class, got {bad[0]}")
        device, dtype = self._execution_device, denoiser.dtype
        labels = torch.tensor(list(class_labels), device=device)
        guided = guidance_scale != 1
        condition = self.condition(torch.cat([torch.full_like(labels, known), labels]) if guided else labels)
        size = denoiser.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        shape = (len(labels), denoiser.config.in_channels, height, width)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        x = latents.to(device, dtype) * self.scheduler.init_noise_sigma
        accepted = inspect.signature(self.scheduler.step).parameters
        extra = {k: v for k, v in {"eta": eta, "generator": generator}.items() if k in accepted}
        for t in self.progress_bar(self.scheduler.timesteps):
            doubled = self.scheduler.scale_model_input(torch.cat([x, x]) if guided else x, t)
            prediction = denoiser(doubled, t.expand(len(doubled)), **condition, return_dict=False)[0]
            if guided:
                unconditional, conditional = prediction.chunk(2)
                prediction = unconditional + guidance_scale * (conditional - unconditional)
            x = self.scheduler.step(prediction, t, x, **extra, return_dict=False)[0]
        if output_type != "latent":
            x = self.vae.decode(x / self.vae.config.scaling_factor, return_dict=False)[0]
            x = self.image_processor.postprocess(x, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=x) if return_dict else (x,)  # type: ignore[no-untyped-call]


class ClassConditionalLatentPipeline(ClassConditionalPipeline):
    """A UNet that reads the class through cross-attention.

    Args:
        vae: `AutoencoderKL` or `VQModel`; latents are multiplied by its `scaling_factor`.
        unet: `UNet2DConditionModel` whose cross-attention reads the class' embedding.
        scheduler: any diffusers scheduler.
        class_embedder: embeds the labels.
        id2label: names of the classes by number.
    """

    model_cpu_offload_seq = "class_embedder->unet->vae"

    def __init__(
        self: Any,
        vae: Any,
        unet: Any,
        scheduler: Any,
        class_embedder: ClassEmbedder,
        id2label: Mapping[int, str] | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._register(id2label, vae=vae, unet=unet, scheduler=scheduler, class_embedder=class_embedder)

    @property
    def denoiser(self: Any) -> Any:
        """The UNet."""
        return self.unet

    @property
    def num_classes(self: Any) -> int:
        """Classes of the embedder."""
        return int(self.class_embedder.config.num_classes)

    def condition(self: Any, class_labels: Tensor) -> dict[str, Tensor]:
        """The class as context (B, 1, D)."""
        return {"encoder_hidden_states": self.class_embedder(class_labels)}


class ClassConditionalTransformerPipeline(ClassConditionalPipeline):
    """A diffusion transformer with any number of classes (Peebles and Xie 2023).

    Args:
        vae: `AutoencoderKL`; latents are multiplied by its `scaling_factor`.
        transformer: `DiTTransformer2DModel` that predicts as many channels as it reads; its label
            `num_embeds_ada_norm` stands for "no class".
        scheduler: any diffusers scheduler.
        id2label: names of the classes by number.
    """

    model_cpu_offload_seq = "transformer->vae"

    def __init__(
        self: Any, vae: Any, transformer: Any, scheduler: Any, id2label: Mapping[int, str] | None = None
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._register(id2label, vae=vae, transformer=transformer, scheduler=scheduler)

    @property
    def denoiser(self: Any) -> Any:
        """The transformer."""
        return self.transformer

    @property
    def num_classes(self: Any) -> int:
        """Classes of the transformer's embeddings."""
        return int(self.transformer.config.num_embeds_ada_norm)

    def condition(self: Any, class_labels: Tensor) -> dict[str, Tensor]:
        """The class as label."""
        return {"class_labels": class_labels}
