"""The original networks, written down anew from their published architectures, with the original parameters' names.

They share no code with diffusers or with the converter, so that equal outputs prove the conversion.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def randomized(module: Any, seed: int = 0) -> Any:
    """Every parameter random and of a size that matters, those that begin at zero or one too."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        fan = p[0].numel() if p.ndim > 1 else 1
        scale = fan**-0.5 if p.ndim > 1 else 0.3
        with torch.no_grad():
            p.copy_(noise * scale + (1.0 if p.ndim == 1 and name.endswith("weight") else 0.0))
    return module.requires_grad_(False).eval()


def conv(c_in: int, c_out: int, kernel: int = 3, stride: int = 1, padding: int | None = None) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2 if padding is None else padding)


def group_norm(channels: int, eps: float) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=eps)


# ---------------------------------------------------------------------------------------------------------------------
# Ho et al.'s network in PyTorch: the DDIM repository's `Model`, and (without timesteps) the latent models' first stage.


class Block(nn.Module):
    def __init__(self, c_in: int, c_out: int, temb: int | None) -> None:
        super().__init__()
        self.norm1, self.conv1 = group_norm(c_in, 1e-6), conv(c_in, c_out)
        if temb:
            self.temb_proj = nn.Linear(temb, c_out)
        self.norm2, self.conv2 = group_norm(c_out, 1e-6), conv(c_out, c_out)
        if c_in != c_out:
            self.nin_shortcut = conv(c_in, c_out, 1)

    def forward(self, x: Tensor, temb: Tensor | None) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        if temb is not None:
            h = h + self.temb_proj(F.silu(temb)).unflatten(1, (-1, 1, 1))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class SpatialAttention(nn.Module):
    """One head over all positions, with pointwise convolutions; scores are divided by sqrt(C)."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.norm = group_norm(c, 1e-6)
        self.q, self.k, self.v, self.proj_out = (conv(c, c, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (f(h).flatten(2) for f in (self.q, self.k, self.v))  # (B, C, H*W)
        p = torch.softmax(q.transpose(1, 2) @ k / math.sqrt(x.shape[1]), dim=-1)  # (B, query, key)
        return x + self.proj_out((v @ p.transpose(1, 2)).view_as(x))


class Resample(nn.Module):
    def __init__(self, c: int, down: bool) -> None:
        super().__init__()
        self.down = down
        self.conv = conv(c, c, 3, 2, 0) if down else conv(c, c)

    def forward(self, x: Tensor) -> Tensor:
        if self.down:
            return self.conv(F.pad(x, (0, 1, 0, 1)))
        return self.conv(x.repeat_interleave(2, 2).repeat_interleave(2, 3))


def level(blocks: list[nn.Module], attentions: list[nn.Module], **resample: nn.Module) -> nn.Module:
    made = nn.Module()
    made.block, made.attn = nn.ModuleList(blocks), nn.ModuleList(attentions)
    for name, module in resample.items():
        setattr(made, name, module)
    return made


def middle(c: int, temb: int | None) -> nn.Module:
    made = nn.Module()
    made.block_1, made.attn_1, made.block_2 = Block(c, c, temb), SpatialAttention(c), Block(c, c, temb)
    return made


class DDIMModel(nn.Module):
    """`Model` of the DDIM repository, from a config in that repository's format."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        c = config["model"]
        self.width, temb = c["ch"], 4 * c["ch"]
        widths = [self.width * m for m in c["ch_mult"]]
        sizes = [config["data"]["image_size"] // 2**i for i in range(len(widths))]
        attended = [s in c["attn_resolutions"] for s in sizes]
        last = len(widths) - 1
        self.temb = nn.Module()
        self.temb.dense = nn.ModuleList([nn.Linear(self.width, temb), nn.Linear(temb, temb)])
        self.conv_in = conv(c["in_channels"], self.width)
        skips, now, down = [self.width], self.width, []
        for i, w in enumerate(widths):
            blocks = []
            for _ in range(c["num_res_blocks"]):
                blocks.append(Block(now, w, temb))
                now = w
                skips.append(w)
            attentions = [SpatialAttention(w) for _ in blocks if attended[i]]
            if i < last:
                skips.append(w)
                down.append(level(blocks, attentions, downsample=Resample(w, True)))
            else:
                down.append(level(blocks, attentions))
        self.down, self.mid = nn.ModuleList(down), middle(now, temb)
        up: list[nn.Module] = []
        for i, w in reversed(list(enumerate(widths))):
            blocks = []
            for _ in range(c["num_res_blocks"] + 1):
                blocks.append(Block(now + skips.pop(), w, temb))
                now = w
            attentions = [SpatialAttention(w) for _ in blocks if attended[i]]
            up.insert(0, level(blocks, attentions, **({"upsample": Resample(w, False)} if i else {})))
        self.up = nn.ModuleList(up)
        self.norm_out, self.conv_out = group_norm(now, 1e-6), conv(now, c["out_ch"])

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        half = self.width // 2
        rates = torch.exp(torch.arange(half, dtype=torch.float32) * -(math.log(10000) / (half - 1)))
        angles = t.float()[:, None] * rates
        temb = torch.cat([angles.sin(), angles.cos()], 1).to(x.dtype)
        temb = self.temb.dense[1](F.silu(self.temb.dense[0](temb)))
        kept = [self.conv_in(x)]
        for part in self.down:
            for i, block in enumerate(part.block):
                h = block(kept[-1], temb)
                kept.append(part.attn[i](h) if len(part.attn) else h)
            if hasattr(part, "downsample"):
                kept.append(part.downsample(kept[-1]))
        h = self.mid.block_2(self.mid.attn_1(self.mid.block_1(kept[-1], temb)), temb)
        for part in reversed(self.up):
            for i, block in enumerate(part.block):
                h = block(torch.cat([h, kept.pop()], 1), temb)
                h = part.attn[i](h) if len(part.attn) else h
            if hasattr(part, "upsample"):
                h = part.upsample(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class Encoder(nn.Module):
    def __init__(self, dd: dict[str, Any]) -> None:
        super().__init__()
        widths = [dd["ch"] * m for m in dd["ch_mult"]]
        self.conv_in = conv(dd["in_channels"], dd["ch"])
        now, down = dd["ch"], []
        for i, w in enumerate(widths):
            blocks = []
            for _ in range(dd["num_res_blocks"]):
                blocks.append(Block(now, w, None))
                now = w
            attended = dd["resolution"] // 2**i in dd["attn_resolutions"]
            attentions = [SpatialAttention(w) for _ in blocks if attended]
            down.append(level(blocks, attentions, **({"downsample": Resample(w, True)} if i < len(widths) - 1 else {})))
        self.down, self.mid = nn.ModuleList(down), middle(now, None)
        self.norm_out = group_norm(now, 1e-6)
        self.conv_out = conv(now, dd["z_channels"] * (2 if dd["double_z"] else 1))

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for part in self.down:
            for i, block in enumerate(part.block):
                h = block(h, None)
                h = part.attn[i](h) if len(part.attn) else h
            if hasattr(part, "downsample"):
                h = part.downsample(h)
        h = self.mid.block_2(self.mid.attn_1(self.mid.block_1(h, None)), None)
        return self.conv_out(F.silu(self.norm_out(h)))


class Decoder(nn.Module):
    def __init__(self, dd: dict[str, Any]) -> None:
        super().__init__()
        widths = [dd["ch"] * m for m in dd["ch_mult"]]
        now = widths[-1]
        self.conv_in, self.mid = conv(dd["z_channels"], now), middle(now, None)
        up: list[nn.Module] = []
        for i, w in reversed(list(enumerate(widths))):
            blocks = []
            for _ in range(dd["num_res_blocks"] + 1):
                blocks.append(Block(now, w, None))
                now = w
            attended = dd["resolution"] // 2**i in dd["attn_resolutions"]
            attentions = [SpatialAttention(w) for _ in blocks if attended]
            up.insert(0, level(blocks, attentions, **({"upsample": Resample(w, False)} if i else {})))
        self.up = nn.ModuleList(up)
        self.norm_out, self.conv_out = group_norm(now, 1e-6), conv(now, dd["out_ch"])

    def forward(self, z: Tensor) -> Tensor:
        h = self.conv_in(z)
        h = self.mid.block_2(self.mid.attn_1(self.mid.block_1(h, None)), None)
        for part in reversed(self.up):
            for i, block in enumerate(part.block):
                h = block(h, None)
                h = part.attn[i](h) if len(part.attn) else h
            if hasattr(part, "upsample"):
                h = part.upsample(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class KLFirstStage(nn.Module):
    def __init__(self, params: dict[str, Any]) -> None:
        super().__init__()
        dd, d = params["ddconfig"], params["embed_dim"]
        self.encoder, self.decoder = Encoder(dd), Decoder(dd)
        self.quant_conv, self.post_quant_conv = conv(2 * dd["z_channels"], 2 * d, 1), conv(d, dd["z_channels"], 1)

    def encode(self, x: Tensor) -> Tensor:
        """Mean and log-variance, side by side."""
        return self.quant_conv(self.encoder(x))

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(z))


class VQFirstStage(nn.Module):
    """`VQModelInterface`: encodes to values before quantization, decodes the nearest codes."""

    def __init__(self, params: dict[str, Any]) -> None:
        super().__init__()
        dd, d = params["ddconfig"], params["embed_dim"]
        self.encoder, self.decoder = Encoder(dd), Decoder(dd)
        self.quantize = nn.Module()
        self.quantize.embedding = nn.Embedding(params["n_embed"], d)
        self.quant_conv, self.post_quant_conv = conv(dd["z_channels"], d, 1), conv(d, dd["z_channels"], 1)

    def encode(self, x: Tensor) -> Tensor:
        return self.quant_conv(self.encoder(x))

    def decode(self, z: Tensor) -> Tensor:
        codes = self.quantize.embedding.weight
        flat = z.movedim(1, -1)  # (B, H, W, D)
        nearest = ((flat[..., None, :] - codes) ** 2).sum(-1).argmin(-1)
        return self.decoder(self.post_quant_conv(codes[nearest].movedim(-1, 1)))


# ---------------------------------------------------------------------------------------------------------------------
# Latent diffusion's denoiser: guided-diffusion's UNet, optionally with transformers that read a context.


class ResBlock(nn.Module):
    """Residual block; resamples in place of a convolution when `resample` is -1 (down) or 1 (up)."""

    def __init__(self, c_in: int, c_out: int, emb: int, film: bool, resample: int = 0) -> None:
        super().__init__()
        self.film, self.resample = film, resample
        self.in_layers = nn.Sequential(group_norm(c_in, 1e-5), nn.SiLU(), conv(c_in, c_out))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb, c_out * (2 if film else 1)))
        self.out_layers = nn.Sequential(group_norm(c_out, 1e-5), nn.SiLU(), nn.Identity(), conv(c_out, c_out))
        self.skip_connection = nn.Identity() if c_in == c_out else conv(c_in, c_out, 1)

    def resampled(self, x: Tensor) -> Tensor:
        if self.resample > 0:
            return x.repeat_interleave(2, 2).repeat_interleave(2, 3)
        return F.avg_pool2d(x, 2) if self.resample < 0 else x

    def forward(self, x: Tensor, emb: Tensor, context: Tensor | None) -> Tensor:
        h = self.in_layers[2](self.resampled(F.silu(self.in_layers[0](x))))
        e = self.emb_layers(emb)[..., None, None]
        if self.film:
            scale, shift = e.chunk(2, 1)
            h = self.out_layers[3](F.silu(self.out_layers[0](h) * (1 + scale) + shift))
        else:
            h = self.out_layers(h + e)
        return self.skip_connection(self.resampled(x)) + h


class AttentionBlock(nn.Module):
    """Heads first: each head's q, k and v lie side by side in the rows of `qkv`."""

    def __init__(self, c: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.qkv, self.proj_out = group_norm(c, 1e-5), nn.Conv1d(c, 3 * c, 1), nn.Conv1d(c, c, 1)

    def forward(self, x: Tensor, emb: Tensor, context: Tensor | None) -> Tensor:
        b, c = x.shape[:2]
        flat = x.flatten(2)
        q, k, v = self.qkv(self.norm(flat)).view(b, self.heads, 3, c // self.heads, -1).unbind(2)
        p = torch.softmax(q.transpose(-1, -2) @ k / math.sqrt(c // self.heads), -1)
        h = (v @ p.transpose(-1, -2)).reshape(b, c, -1)
        return (flat + self.proj_out(h)).view_as(x)


class Heads(nn.Module):
    def __init__(self, c: int, context: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(c, c, bias=False)
        self.to_k, self.to_v = nn.Linear(context, c, bias=False), nn.Linear(context, c, bias=False)
        self.to_out = nn.Sequential(nn.Linear(c, c), nn.Identity())

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q, k, v = (
            f(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for f, y in ((self.to_q, x), (self.to_k, context), (self.to_v, context))
        )
        p = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), -1)
        return self.to_out((p @ v).transpose(1, 2).flatten(2))


class Gated(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.proj = nn.Linear(c, 8 * c)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, -1)
        return value * F.gelu(gate)


class TransformerBlock(nn.Module):
    def __init__(self, c: int, context: int, heads: int) -> None:
        super().__init__()
        self.attn1, self.attn2 = Heads(c, c, heads), Heads(c, context, heads)
        self.ff = nn.Module()
        self.ff.net = nn.Sequential(Gated(c), nn.Identity(), nn.Linear(4 * c, c))
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(c) for _ in range(3))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        n = self.norm1(x)
        x = x + self.attn1(n, n)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff.net(self.norm3(x))


class SpatialTransformer(nn.Module):
    def __init__(self, c: int, context: int, heads: int, depth: int) -> None:
        super().__init__()
        self.norm, self.proj_in, self.proj_out = group_norm(c, 1e-6), conv(c, c, 1), conv(c, c, 1)
        self.transformer_blocks = nn.ModuleList(TransformerBlock(c, context, heads) for _ in range(depth))

    def forward(self, x: Tensor, emb: Tensor, context: Tensor) -> Tensor:
        h = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2)  # (B, H*W, C)
        for block in self.transformer_blocks:
            h = block(h, context)
        return x + self.proj_out(h.transpose(1, 2).view_as(x))


class Strided(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.op = conv(c, c, 3, 2, 1)

    def forward(self, x: Tensor, emb: Tensor, context: Tensor | None) -> Tensor:
        return self.op(x)


class Doubled(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv = conv(c, c)

    def forward(self, x: Tensor, emb: Tensor, context: Tensor | None) -> Tensor:
        return self.conv(x.repeat_interleave(2, 2).repeat_interleave(2, 3))


class Plain(nn.Module):
    """A convolution's parameters one level up, as in `input_blocks.0.0.weight`."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        made = conv(c_in, c_out)
        self.weight, self.bias = made.weight, made.bias

    def forward(self, x: Tensor, emb: Tensor, context: Tensor | None) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, padding=1)


class LatentUNet(nn.Module):
    """`UNetModel` of latent diffusion, from its parameters in the YAML file."""

    def __init__(self, p: dict[str, Any]) -> None:
        super().__init__()
        self.width, emb = p["model_channels"], 4 * p["model_channels"]
        film, resblocks = p.get("use_scale_shift_norm", False), p.get("resblock_updown", False)

        def attention(c: int) -> nn.Module:
            heads = c // p["num_head_channels"] if "num_head_channels" in p else p["num_heads"]
            if p.get("use_spatial_transformer"):
                return SpatialTransformer(c, p["context_dim"], heads, p.get("transformer_depth", 1))
            return AttentionBlock(c, heads)

        def sequence(*layers: nn.Module) -> nn.ModuleList:
            return nn.ModuleList(layers)

        self.time_embed = nn.Sequential(nn.Linear(self.width, emb), nn.SiLU(), nn.Linear(emb, emb))
        blocks, skips, now, factor = [sequence(Plain(p["in_channels"], self.width))], [self.width], self.width, 1
        multipliers: Sequence[int] = p["channel_mult"]
        for i, m in enumerate(multipliers):
            for _ in range(p["num_res_blocks"]):
                layers: list[nn.Module] = [ResBlock(now, m * self.width, emb, film)]
                now = m * self.width
                if factor in p["attention_resolutions"]:
                    layers.append(attention(now))
                blocks.append(sequence(*layers))
                skips.append(now)
            if i < len(multipliers) - 1:
                blocks.append(sequence(ResBlock(now, now, emb, film, -1) if resblocks else Strided(now)))
                skips.append(now)
                factor *= 2
        self.input_blocks = nn.ModuleList(blocks)
        self.middle_block = sequence(ResBlock(now, now, emb, film), attention(now), ResBlock(now, now, emb, film))
        blocks = []
        for i, m in reversed(list(enumerate(multipliers))):
            for j in range(p["num_res_blocks"] + 1):
                layers = [ResBlock(now + skips.pop(), m * self.width, emb, film)]
                now = m * self.width
                if factor in p["attention_resolutions"]:
                    layers.append(attention(now))
                if i and j == p["num_res_blocks"]:
                    layers.append(ResBlock(now, now, emb, film, 1) if resblocks else Doubled(now))
                    factor //= 2
                blocks.append(sequence(*layers))
        self.output_blocks = nn.ModuleList(blocks)
        self.out = nn.Sequential(group_norm(now, 1e-5), nn.SiLU(), conv(now, p["out_channels"]))

    def forward(self, x: Tensor, t: Tensor, context: Tensor | None = None) -> Tensor:
        half = self.width // 2
        rates = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half)
        angles = t.float()[:, None] * rates
        emb = self.time_embed(torch.cat([angles.cos(), angles.sin()], 1).to(x.dtype))
        kept = []
        for block in self.input_blocks:
            for layer in block:
                x = layer(x, emb, context)
            kept.append(x)
        for layer in self.middle_block:
            x = layer(x, emb, context)
        for block in self.output_blocks:
            x = torch.cat([x, kept.pop()], 1)
            for layer in block:
                x = layer(x, emb, context)
        return self.out(x)


class LatentDiffusion(nn.Module):
    """What a CompVis checkpoint's state dict holds: denoiser, its average, first stage, embedder, schedule."""

    def __init__(self, params: dict[str, Any]) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.diffusion_model = LatentUNet(params["unet_config"]["params"])
        first = params["first_stage_config"]
        kind = VQFirstStage if first["target"].endswith("VQModelInterface") else KLFirstStage
        self.first_stage_model = kind(first["params"])
        condition = params["cond_stage_config"]
        if isinstance(condition, dict) and condition["target"].endswith("ClassEmbedder"):
            self.cond_stage_model = nn.Module()
            sizes = condition["params"]
            self.cond_stage_model.embedding = nn.Embedding(sizes["n_classes"], sizes["embed_dim"])
        betas = torch.linspace(params["linear_start"] ** 0.5, params["linear_end"] ** 0.5, 1000, dtype=torch.float64)
        betas = betas**2
        self.register_buffer("betas", betas.float())
        self.register_buffer("alphas_cumprod", (1 - betas).cumprod(0).float())
        if params.get("scale_by_std"):
            self.register_buffer("scale_factor", torch.tensor(0.22765929))

    def state_with_ema(self, averaged: LatentUNet) -> dict[str, Tensor]:
        """The state dict of training: the denoiser's average beside it, under names without dots."""
        state = self.state_dict()
        for key, value in averaged.state_dict().items():
            state["model_ema.diffusion_model" + key.replace(".", "")] = value
        return state | {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}


def relative_error(got: Tensor, expected: Tensor) -> float:
    """The largest, over samples, of ||got - expected||^2 / ||expected||^2."""
    got, expected = got.detach(), expected.detach()
    difference = (got - expected).double().flatten(1).square().sum(1)
    return float((difference / expected.double().flatten(1).square().sum(1)).max())
