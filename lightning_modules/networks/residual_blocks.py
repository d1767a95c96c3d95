"""The residual block that the depth encoder and its mirror image are made of (ResNet, arXiv 1512.03385)."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import override


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions with batch norm beside a shortcut; ResNet's basic block, with torchvision's names.

    Args:
        inputs: Channels in.
        outputs: Channels out.
        stride: 2 halves the size with the first convolution.
        upscale: 2 doubles the size before it, each pixel repeated.
    """

    def __init__(self, inputs: int, outputs: int, *, stride: int = 1, upscale: int = 1) -> None:
        super().__init__()
        self.upscale = upscale
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    @override
    def forward(
        self, maps: Float[Tensor, "maps inputs height width"]
    ) -> Float[Tensor, "maps outputs new_height new_width"]:
        """Returns the block's output."""
        if self.upscale != 1:
            maps = F.interpolate(maps, scale_factor=self.upscale, mode="nearest")
        residual = F.relu(self.bn1(self.conv1(maps)))
        residual = self.bn2(self.conv2(residual))
        shortcut = maps if self.downsample is None else self.downsample(maps)
        return F.relu(shortcut + residual)


def initialise_residual_blocks(network: nn.Module) -> None:
    """Draws convolutions by He's rule, and lets every block begin as its shortcut (arXiv 1706.02677)."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if isinstance(module, ResidualBlock):
            nn.init.zeros_(module.bn2.weight)
