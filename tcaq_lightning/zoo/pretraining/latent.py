r"""Pretraining of a class-conditional denoiser in the latent space of a frozen autoencoder.

    python -m tcaq_lightning.zoo.pretraining.latent --denoiser unet --data /usr/share/datasets/fashion-mnist \
        --autoencoder runs/vae/model --output runs/latent --steps 5000 [--batch_size 64] [--lr 1e-3] \
        [--latents runs/latents] [--threads 1]

`--denoiser dit` trains a diffusion transformer in place of a UNet. `OUTPUT/model` is a diffusers directory with the
averaged weights, brought up to date every `save_every` steps; `OUTPUT/last.ckpt` is the state of the training. The same
command resumes from it.
"""

from __future__ import annotations

import hashlib
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DiTTransformer2DModel, UNet2DConditionModel
from diffusers.models.embeddings import LabelEmbedding
from torch import Tensor, nn

from tcaq_lightning.errors import UserError
from tcaq_lightning.models.class_conditional import (
    ClassConditionalLatentPipeline,
    ClassConditionalPipeline,
    ClassConditionalTransformerPipeline,
    ClassEmbedder,
)
from tcaq_lightning.models.pipelines import open_pipeline
from tcaq_lightning.runtime.files import DamagedFileError, load_tensors, save_tensors
from tcaq_lightning.runtime.hashing import weights_hash
from tcaq_lightning.runtime.one_line import one_line
from tcaq_lightning.zoo.pretraining.autoencoder import encode, load_autoencoder
from tcaq_lightning.zoo.pretraining.batches import batch_indices, generator, stratified_timesteps
from tcaq_lightning.zoo.pretraining.command import run
from tcaq_lightning.zoo.pretraining.idx import read_split
from tcaq_lightning.zoo.pretraining.training import Precision, Pretraining, Recipe, fit, replace_files

CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
"""Names of Fashion-MNIST's labels 0..9."""

SCHEDULE: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.0015,
    "beta_end": 0.0195,
    "clip_sample": False,
}
"""The noise schedule of class-conditional latent diffusion on ImageNet (Rombach et al. 2022)."""

UNET: dict[str, Any] = {
    "block_out_channels": (64, 64),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": 4,  # diffusers takes it for the number of heads here
    "cross_attention_dim": 64,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
}
"""Stable Diffusion's architecture with two levels, attention in both."""

DIT: dict[str, Any] = {
    "num_attention_heads": 3,
    "attention_head_dim": 32,
    "num_layers": 8,
    "patch_size": 1,
}
"""A DiT of 8 blocks, 96 channels wide; a token is one place of the latents."""


class CrossAttentionDenoiser(nn.Module):
    """A UNet, and the embeddings of classes that its cross-attention reads.

    Args:
        channels: of the latents.
        size: height and width of the latents.
        num_classes: K; label K stands for "no class".
        architecture: further arguments of `UNet2DConditionModel`.
    """

    def __init__(self, channels: int, size: int, num_classes: int, architecture: dict[str, Any] | None = None) -> None:
        super().__init__()
        settings = UNET if architecture is None else architecture
        unet_class: Any = UNet2DConditionModel
        self.unet = unet_class(in_channels=channels, out_channels=channels, sample_size=size, **settings)
        self.class_embedder = ClassEmbedder(num_classes, settings["cross_attention_dim"])

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """Noise (B, C, H, W) in x (B, C, H, W) of timesteps and labels (B,)."""
        noise: Tensor = self.unet(x, t, encoder_hidden_states=self.class_embedder(labels), return_dict=False)[0]
        return noise

    def pipeline(self, vae: Any, scheduler: Any, id2label: dict[int, str]) -> ClassConditionalPipeline:
        """The pipeline that samples with these networks."""
        return ClassConditionalLatentPipeline(vae, self.unet, scheduler, self.class_embedder, id2label)


class TransformerDenoiser(nn.Module):
    """A diffusion transformer, initialised as its authors do (Peebles and Xie 2023, "adaLN-Zero").

    Args:
        channels: of the latents.
        size: height and width of the latents.
        num_classes: K; label K stands for "no class".
        architecture: further arguments of `DiTTransformer2DModel`.
    """

    def __init__(self, channels: int, size: int, num_classes: int, architecture: dict[str, Any] | None = None) -> None:
        super().__init__()
        settings = DIT if architecture is None else architecture
        transformer_class: Any = DiTTransformer2DModel
        self.transformer = transformer_class(
            in_channels=channels,
            out_channels=channels,
            sample_size=size,
            num_embeds_ada_norm=num_classes,
            **settings,
        )
        for module in self.transformer.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            elif isinstance(module, LabelEmbedding):
                module.dropout_prob = 0.0  # each block has one and would drop by itself: the training does it for all
        for block in self.transformer.transformer_blocks:
            nn.init.zeros_(block.norm1.linear.weight)
        nn.init.zeros_(self.transformer.proj_out_1.weight)
        nn.init.zeros_(self.transformer.proj_out_2.weight)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """Noise (B, C, H, W) in x (B, C, H, W) of timesteps and labels (B,)."""
        noise: Tensor = self.transformer(x, t, class_labels=labels, return_dict=False)[0]
        return noise

    def pipeline(self, vae: Any, scheduler: Any, id2label: dict[int, str]) -> ClassConditionalPipeline:
        """The pipeline that samples with this network."""
        return ClassConditionalTransformerPipeline(vae, self.transformer, scheduler, id2label)


DENOISERS: dict[str, type[CrossAttentionDenoiser] | type[TransformerDenoiser]] = {
    "unet": CrossAttentionDenoiser,
    "dit": TransformerDenoiser,
}
"""The kinds of denoiser by their names on the command line."""


@dataclass(frozen=True)
class LatentRecipe(Recipe):
    """Recipe of a class-conditional denoiser's pretraining."""

    label_dropout: float = 0.1
    """Probability of training on "no class" (Ho and Salimans 2022, alg. 1)."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        self.check("label_dropout", 0 <= self.label_dropout <= 1, "in [0, 1]")


class LatentPretraining(Pretraining):
    """Noise prediction on samples of the latents' posteriors, some of them without their label.

    Args:
        network: one of `DENOISERS`.
        scheduler: gives the noise schedule.
        autoencoder: frozen; written beside the denoiser.
        latents: mean and standard deviation of the posteriors of the training images, (N, C, h, w) each.
        labels: int64 (N,) in 0..K-1.
        recipe: how to train.
    """

    recipe: LatentRecipe

    def __init__(
        self,
        network: CrossAttentionDenoiser | TransformerDenoiser,
        scheduler: Any,
        autoencoder: Any,
        latents: tuple[Tensor, Tensor],
        labels: Tensor,
        recipe: LatentRecipe,
    ) -> None:
        super().__init__(network, recipe)
        self.scheduler = scheduler
        self.autoencoder = autoencoder
        self.mean, self.deviation = (values * autoencoder.config.scaling_factor for values in latents)
        self.labels = labels
        self.num_classes = len(CLASSES)

    def training_step(self, batch: int, batch_idx: int) -> Tensor:
        """The loss of one step; its data are drawn from (seed, global_step), so a resumed run sees the same."""
        recipe, step = self.recipe, self.global_step
        rng = generator(recipe.seed, step, stream=1)
        index = batch_indices(len(self.labels), recipe.batch_size, step, recipe.seed)
        mean = self.mean[index]
        x0 = mean + self.deviation[index] * torch.randn(mean.shape, generator=rng)  # (B, C, h, w)
        noise = torch.randn(x0.shape, generator=rng)
        t = stratified_timesteps(recipe.batch_size, self.scheduler.config.num_train_timesteps, rng)
        dropped = torch.rand(recipe.batch_size, generator=rng) < recipe.label_dropout
        labels = self.labels[index].masked_fill(dropped, self.num_classes)
        x_t = self.scheduler.add_noise(x0, noise, t)
        prediction = self.network(x_t.to(self.device), t.to(self.device), labels.to(self.device))
        loss = F.mse_loss(prediction.float(), noise.to(self.device))
        self.log("loss", loss, on_step=True, on_epoch=False)
        return loss

    def export(self, directory: Path) -> None:
        """Write the pipeline with the averaged denoiser."""
        average: Any = self.average
        pipeline = average.pipeline(self.autoencoder, self.scheduler, dict(enumerate(CLASSES)))
        replace_files(pipeline.save_pretrained, directory)


def encode_once(autoencoder: Any, images: Tensor, cache: Path | None = None) -> tuple[Tensor, Tensor]:
    """Posteriors of the latents of many images, from a file if it has them.

    Args:
        autoencoder: `AutoencoderKL`.
        images: uint8 (N, H, W).
        cache: the file; (re)written if it is missing, damaged, or of another autoencoder or other images.

    Returns:
        Mean and standard deviation, float32 (N, C, h, w) each.
    """
    source = [weights_hash(autoencoder), hashlib.sha256(images.numpy().tobytes()).hexdigest()]
    if cache is not None and cache.exists():
        with suppress(DamagedFileError):
            tensors, record = load_tensors(cache)
            if record == source:
                return tensors["mean"], tensors["deviation"]
    mean, deviation = encode(autoencoder, images)
    if cache is not None:
        save_tensors(cache, {"mean": mean, "deviation": deviation}, source)
    return mean, deviation


def new_denoiser(kind: str, autoencoder: Any, image_size: int, seed: int) -> Any:
    """A denoiser with random weights for the latents of an autoencoder.

    Args:
        kind: a key of `DENOISERS`.
        autoencoder: `AutoencoderKL`.
        image_size: height and width of the images.
        seed: seeds the weights.
    """
    size = image_size // 2 ** (len(autoencoder.config.block_out_channels) - 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return DENOISERS[kind](autoencoder.config.latent_channels, size, len(CLASSES))


def load_weights(network: nn.Module, init: Path) -> None:
    """Give a denoiser the weights of a pipeline.

    Args:
        network: one of `DENOISERS`.
        init: directory of a pipeline with the same components.

    Raises:
        UserError: it has others, or of another architecture.
    """
    pipeline = open_pipeline(str(init))
    for name, module in network.named_children():
        source = getattr(pipeline, name, None)
        try:
            module.load_state_dict(source.state_dict() if source is not None else {})
        except RuntimeError as error:
            raise UserError(
                f"--init must be a pipeline whose {name} has the architecture to be trained, got {init} "
                f"({one_line(error)}); choose another --init or --denoiser"
            ) from None


def main(
    data: Path,
    autoencoder: Path,
    output: Path,
    steps: int,
    denoiser: Literal["unet", "dit"] = "unet",
    init: Path | None = None,
    batch_size: int = 64,
    lr: float = 1e-3,
    warmup: int = 100,
    ema_decay: float = 0.9995,
    seed: int = 0,
    label_dropout: float = 0.1,
    latents: Path | None = None,
    precision: Precision = "32-true",
    threads: int | None = None,
    save_every: int = 500,
) -> None:
    """Pretrain the denoiser of a shipped latent model.

    Args:
        data: directory of the IDX files, such as /usr/share/datasets/fashion-mnist.
        autoencoder: directory of an `AutoencoderKL`, as written by `tcaq_lightning.zoo.pretraining.autoencoder`.
        output: directory of the run; a run that is there is resumed.
        steps: optimizer steps in all.
        denoiser: unet (`UNet2DConditionModel`) or dit (`DiTTransformer2DModel`).
        init: directory of a pipeline to start from; without it, random weights.
        batch_size: images a step.
        lr: peak learning rate; a cosine takes it to 0.
        warmup: steps of linear warmup.
        ema_decay: largest decay of the moving average of the weights.
        seed: seeds the weights, the order of the images, the timesteps and the noise.
        label_dropout: probability of training on "no class".
        latents: file that keeps the encoded images from one run to another; without it, each start encodes them.
        precision: bf16-mixed is faster on some processors with bfloat16 arithmetic.
        threads: CPU threads; without it, PyTorch's own number.
        save_every: steps between two checkpoints and exports.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    recipe = LatentRecipe(steps, batch_size, lr, warmup, ema_decay, seed, label_dropout)
    vae = load_autoencoder(autoencoder)
    images, labels = read_split(data, "train")
    if int(labels.max()) >= len(CLASSES):
        raise UserError(f"expected labels 0..{len(CLASSES) - 1} in {data}, got {int(labels.max())}; use Fashion-MNIST")
    network = new_denoiser(denoiser, vae, images.shape[-1], seed)
    if init is not None:
        load_weights(network, init)
    scheduler_class: Any = DDIMScheduler
    encoded = encode_once(vae, images, latents)
    module = LatentPretraining(network, scheduler_class(**SCHEDULE), vae, encoded, labels, recipe)
    fit(module, output, save_every, precision, progress_bar=sys.stderr.isatty())


if __name__ == "__main__":
    run(main)
