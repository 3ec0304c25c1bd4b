"""The Inception v3 that published FID, sFID and IS are measured with, as a network of its own.

The network is that of the TensorFlow graph of 2015-12-05, which differs from torchvision's Inception v3: average pools
leave the padding out, the last block takes a maximum instead, images are resized as TensorFlow 1 did, and there are
1008 classes. Names of parameters are those of torch-fidelity's conversion, whose file of weights is read. The package
itself is not used: it cannot be imported without a torchvision that fits the installed torch, unpickles what it loads,
and does not give the features of sFID.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from tcaq_lightning.errors import UserError

WEIGHTS_NAME = "weights-inception-2015-12-05-6726825d.pth"
WEIGHTS_SOURCE = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/" + WEIGHTS_NAME
INPUT_SIZE = 299
POOL_FEATURES = 2048
SPATIAL_CHANNELS = 7
SPATIAL_FEATURES = SPATIAL_CHANNELS * 17 * 17


class Layer(NamedTuple):
    """A convolution with batch norm and ReLU; padded to keep the size unless it is strided."""

    name: str
    channels: int
    kernel: int | tuple[int, int] = 1
    stride: int = 1
    padded: bool = True


Step = tuple[Layer, ...]
"""Layers side by side on one input, mostly a single one."""


class ConvUnit(nn.Module):
    """Convolution, batch norm with stored statistics, ReLU."""

    def __init__(self, inputs: int, layer: Layer) -> None:
        super().__init__()
        kernel = (layer.kernel, layer.kernel) if isinstance(layer.kernel, int) else layer.kernel
        padding = (kernel[0] // 2, kernel[1] // 2) if layer.padded and layer.stride == 1 else (0, 0)
        self.conv = nn.Conv2d(inputs, layer.channels, kernel, layer.stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(layer.channels, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C', H', W')."""
        return F.relu(self.bn(self.conv(x)))


class Block(nn.Module):
    """Parallel chains of layers whose outputs are concatenated.

    Args:
        inputs: channels of the input.
        chains: steps of each chain.
        pool: what the last chain's input goes through first.
    """

    def __init__(self, inputs: int, chains: Sequence[Sequence[Step]], pool: nn.Module) -> None:
        super().__init__()
        self.pool = pool
        self.names = [[[layer.name for layer in step] for step in chain] for chain in chains]
        self.outputs = 0
        for chain in chains:
            width = inputs
            for step in chain:
                for layer in step:
                    self.add_module(layer.name, ConvUnit(width, layer))
                width = sum(layer.channels for layer in step)
            self.outputs += width

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C', H', W')."""
        outputs = []
        for number, chain in enumerate(self.names):
            y = self.pool(x) if number == len(self.names) - 1 else x
            for step in chain:
                y = torch.cat([getattr(self, name)(y) for name in step], dim=1)
            outputs.append(y)
        return torch.cat(outputs, dim=1)


def _chain(*layers: Layer | Step) -> list[Step]:
    return [(layer,) if isinstance(layer, Layer) else layer for layer in layers]


def _average_pool() -> nn.Module:
    return nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)


def _block_a(inputs: int, pooled: int) -> Block:
    chains = [
        _chain(Layer("branch1x1", 64)),
        _chain(Layer("branch5x5_1", 48), Layer("branch5x5_2", 64, 5)),
        _chain(Layer("branch3x3dbl_1", 64), Layer("branch3x3dbl_2", 96, 3), Layer("branch3x3dbl_3", 96, 3)),
        _chain(Layer("branch_pool", pooled)),
    ]
    return Block(inputs, chains, _average_pool())


def _block_b(inputs: int) -> Block:
    chains = [
        _chain(Layer("branch3x3", 384, 3, stride=2)),
        _chain(Layer("branch3x3dbl_1", 64), Layer("branch3x3dbl_2", 96, 3), Layer("branch3x3dbl_3", 96, 3, stride=2)),
        _chain(),
    ]
    return Block(inputs, chains, nn.MaxPool2d(3, stride=2))


def _block_c(inputs: int, width: int) -> Block:
    row, column = (1, 7), (7, 1)
    chains = [
        _chain(Layer("branch1x1", 192)),
        _chain(Layer("branch7x7_1", width), Layer("branch7x7_2", width, row), Layer("branch7x7_3", 192, column)),
        _chain(
            Layer("branch7x7dbl_1", width),
            Layer("branch7x7dbl_2", width, column),
            Layer("branch7x7dbl_3", width, row),
            Layer("branch7x7dbl_4", width, column),
            Layer("branch7x7dbl_5", 192, row),
        ),
        _chain(Layer("branch_pool", 192)),
    ]
    return Block(inputs, chains, _average_pool())


def _block_d(inputs: int) -> Block:
    chains = [
        _chain(Layer("branch3x3_1", 192), Layer("branch3x3_2", 320, 3, stride=2)),
        _chain(
            Layer("branch7x7x3_1", 192),
            Layer("branch7x7x3_2", 192, (1, 7)),
            Layer("branch7x7x3_3", 192, (7, 1)),
            Layer("branch7x7x3_4", 192, 3, stride=2),
        ),
        _chain(),
    ]
    return Block(inputs, chains, nn.MaxPool2d(3, stride=2))


def _block_e(inputs: int, pool: nn.Module) -> Block:
    def fork(name: str) -> Step:
        return Layer(f"{name}a", 384, (1, 3)), Layer(f"{name}b", 384, (3, 1))

    chains = [
        _chain(Layer("branch1x1", 320)),
        _chain(Layer("branch3x3_1", 384), fork("branch3x3_2")),
        _chain(Layer("branch3x3dbl_1", 448), Layer("branch3x3dbl_2", 384, 3), fork("branch3x3dbl_3")),
        _chain(Layer("branch_pool", 192)),
    ]
    return Block(inputs, chains, pool)


class InceptionFeatures(NamedTuple):
    """What FID, sFID and IS look at."""

    pooled: Tensor
    """(B, 2048), the average of the last block: FID, KID, precision and recall."""
    spatial: Tensor
    """(B, 2023), seven channels of 17 x 17, channels last: sFID."""
    logits: Tensor
    """(B, 1008), without the bias, as in the published graph: IS."""


class Inception(nn.Module):
    """Inception v3 of 2015-12-05 (Szegedy et al. 2016) as FID has it (Heusel et al. 2017)."""

    num_features = POOL_FEATURES

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = ConvUnit(3, Layer("", 32, 3, stride=2))
        self.Conv2d_2a_3x3 = ConvUnit(32, Layer("", 32, 3, padded=False))
        self.Conv2d_2b_3x3 = ConvUnit(32, Layer("", 64, 3))
        self.Conv2d_3b_1x1 = ConvUnit(64, Layer("", 80))
        self.Conv2d_4a_3x3 = ConvUnit(80, Layer("", 192, 3, padded=False))
        self.Mixed_5b = _block_a(192, pooled=32)
        self.Mixed_5c = _block_a(256, pooled=64)
        self.Mixed_5d = _block_a(288, pooled=64)
        self.Mixed_6a = _block_b(288)
        self.Mixed_6b = _block_c(768, width=128)
        self.Mixed_6c = _block_c(768, width=160)
        self.Mixed_6d = _block_c(768, width=160)
        self.Mixed_6e = _block_c(768, width=192)
        self.Mixed_7a = _block_d(768)
        self.Mixed_7b = _block_e(1280, _average_pool())
        self.Mixed_7c = _block_e(2048, nn.MaxPool2d(3, stride=1, padding=1))
        self.fc = nn.Linear(POOL_FEATURES, 1008)

    def forward(self, images: Tensor) -> InceptionFeatures:
        """Features of a batch.

        Args:
            images: uint8 (B, 3, H, W), or (B, 1, H, W), which stands for three equal channels.
        """
        x = resize(images.to(self.fc.weight.dtype).expand(-1, 3, -1, -1), INPUT_SIZE)
        x = (x - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, stride=2)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, stride=2))))  # (B, 288, 35, 35)
        x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))))  # (B, 768, 17, 17)
        # The first channels are those of the block's 1 x 1 branch, `mixed_6/conv` in the published graph.
        spatial = x[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x))))  # (B, 2048, 8, 8)
        pooled = x.mean(dim=(2, 3))
        return InceptionFeatures(pooled, spatial, pooled @ self.fc.weight.T)


def resize(images: Tensor, size: int) -> Tensor:
    """Bilinear as in TensorFlow 1: the first pixels of both grids coincide, and there is no antialiasing.

    Args:
        images: float (B, C, H, W).
        size: of the result's sides.

    >>> resize(torch.tensor([[[[0.0, 1.0], [0.0, 1.0]]]]), 4)[0, 0, 0]
    tensor([0.0000, 0.5000, 1.0000, 1.0000])
    """

    def grid(length: int) -> tuple[Tensor, Tensor, Tensor]:
        # float32 whatever the images are: the published graph's positions, rounded as it rounds them
        position = torch.arange(size, dtype=torch.float32, device=images.device) * torch.tensor(
            length / size, dtype=torch.float32
        )
        low = position.long().clamp(max=length - 1)
        return low, (low + 1).clamp(max=length - 1), (position - low).to(images.dtype)

    low, high, share = grid(images.shape[3])
    x = torch.lerp(images[..., low], images[..., high], share)
    low, high, share = grid(images.shape[2])
    return torch.lerp(x[:, :, low], x[:, :, high], share[:, None])


def load_inception(weights: Path | None = None) -> Inception:
    """Read the network; nothing is downloaded.

    Args:
        weights: torch-fidelity's file, or the same tensors as safetensors; None: that file in torch hub's cache.

    Returns:
        The frozen network, on the CPU.

    Raises:
        UserError: there is no such file, or it holds something else.
    """
    path = weights or Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS_NAME
    if not path.is_file():
        raise UserError(
            f"evaluation.inception_weights: expected Inception's weights at {path}, got no such file; download "
            f"{WEIGHTS_SOURCE} (91 MB) to that path, or give the path where you have it"
        )
    with torch.device("meta"):
        network = Inception()
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        network.load_state_dict(state, assign=True)
        if any(p.is_meta for p in (*network.parameters(), *network.buffers())):
            raise ValueError("buffers are missing")
    except Exception as error:  # noqa: BLE001 - torch.load raises whatever a foreign file makes it stumble over
        raise UserError(
            f"evaluation.inception_weights: expected the weights of torch-fidelity's Inception v3 in {path}, got "
            f"{' '.join(str(error).split())[:200]}; download {WEIGHTS_SOURCE} again"
        ) from None
    return network.float().eval().requires_grad_(False)
