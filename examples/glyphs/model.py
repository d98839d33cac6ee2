"""A small convolutional embedding: 360,048 parameters, (B, 1, 32, 32) in, (B, 128) out."""

from __future__ import annotations

import torch
from torch import Tensor, nn

EMBEDDING_SIZE = 128
WIDTHS = (16, 32, 64, 128)
# Ink between 0 and 1 is shifted and scaled by these before the first layer.
INK_MEAN, INK_SCALE = 0.3, 0.35


class GlyphNet(nn.Module):
    """Four convolutions, each with batch normalisation and ReLU, and one linear layer."""

    def __init__(self) -> None:
        super().__init__()
        a, b, c, d = WIDTHS
        self.features = nn.Sequential(
            *_convolution(1, a, kernel=5, stride=2),
            *_convolution(a, b, pool=2),
            *_convolution(b, c, pool=2),
            *_convolution(c, d),
            nn.Flatten(),
        )
        self.embed = nn.Linear(d * 4 * 4, EMBEDDING_SIZE, bias=False)
        self.norm = nn.BatchNorm1d(EMBEDDING_SIZE)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, 1, 32, 32) float32, ink from 0 to 1, to embeddings (B, 128), not normalised."""
        x = ((x - INK_MEAN) / INK_SCALE).contiguous(memory_format=torch.channels_last)
        return self.norm(self.embed(self.features(x)))


def _convolution(
    inputs: int, outputs: int, kernel: int = 3, stride: int = 1, pool: int = 1
) -> list[nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    # The maximum of ReLUs is the ReLU of the maximum, which has a quarter of the numbers.
    pooling = [nn.MaxPool2d(pool)] if pool > 1 else []
    return [convolution, nn.BatchNorm2d(outputs), *pooling, nn.ReLU(inplace=True)]


def make_net(seed: int) -> GlyphNet:
    """A fresh network, the same for the same seed; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = GlyphNet()
    return net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


@torch.no_grad()
def embed(net: nn.Module, images: Tensor, batch: int = 1000) -> Tensor:
    """Embeddings (..., 128) float32, normalised, in eval mode, of images (..., 32, 32) uint8."""
    was_training = net.training
    net.eval()
    flat = images.reshape(-1, 1, *images.shape[-2:])
    rows = torch.cat([net(part.float() / 255) for part in flat.split(batch)])
    net.train(was_training)
    return nn.functional.normalize(rows).reshape(*images.shape[:-2], -1)
