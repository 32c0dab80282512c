"""Face networks as InsightFace builds them, with random weights: IResNet-18 and MobileFaceNet.

Written from their papers (Deng et al. 2019, arXiv:1801.07698; Chen et al. 2018, arXiv:1804.07573): PReLU after
BatchNorm, no pooling before the embedding, which is a dense layer or a global depthwise convolution with a BatchNorm.
"""

from torch import Tensor, nn


class _Residual(nn.Module):
    """A block with its shortcut."""

    def __init__(self, body: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.body, self.shortcut = body, shortcut

    def forward(self, x: Tensor) -> Tensor:
        added: Tensor = self.body(x) + self.shortcut(x)
        return added


def _improved(channels: int, filters: int, stride: int) -> nn.Module:
    body = nn.Sequential(
        nn.BatchNorm2d(channels, eps=1e-5),
        nn.Conv2d(channels, filters, 3, 1, 1, bias=False),
        nn.BatchNorm2d(filters),
        nn.PReLU(filters),
        nn.Conv2d(filters, filters, 3, stride, 1, bias=False),
        nn.BatchNorm2d(filters),
    )
    if stride == 1 and channels == filters:
        return _Residual(body, nn.Identity())
    shortcut = nn.Sequential(nn.Conv2d(channels, filters, 1, stride, bias=False), nn.BatchNorm2d(filters))
    return _Residual(body, shortcut)


def iresnet18(width: int = 64, size: int = 112, embedding: int = 512) -> nn.Module:
    """IResNet-18: (N, 3, size, size) -> (N, embedding)."""
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.PReLU(width)]
    channels = width
    for stage in range(4):
        for block in range(2):
            layers.append(_improved(channels, width << stage, 2 if block == 0 else 1))
            channels = width << stage
    flat = channels * (size // 16) ** 2
    end = [
        nn.BatchNorm2d(channels),
        nn.Dropout(0.4),
        nn.Flatten(),
        nn.Linear(flat, embedding),
        nn.BatchNorm1d(embedding),
    ]
    return nn.Sequential(*layers, *end)


def _unit(channels: int, filters: int, kernel: int, stride: int, groups: int, linear: bool = False) -> nn.Sequential:
    padding = kernel // 2 if kernel < 7 else 0
    parts = [nn.Conv2d(channels, filters, kernel, stride, padding, groups=groups, bias=False), nn.BatchNorm2d(filters)]
    return nn.Sequential(*parts, *([] if linear else [nn.PReLU(filters)]))


def _bottleneck(channels: int, filters: int, stride: int, inner: int) -> nn.Module:
    body = nn.Sequential(
        _unit(channels, inner, 1, 1, 1),
        _unit(inner, inner, 3, stride, inner),
        _unit(inner, filters, 1, 1, 1, linear=True),
    )
    return _Residual(body, nn.Identity()) if stride == 1 and channels == filters else body


def mobilefacenet(width: int = 64, size: int = 112, embedding: int = 128) -> nn.Module:
    """MobileFaceNet: (N, 3, size, size) -> (N, embedding)."""
    layers: list[nn.Module] = [_unit(3, width, 3, 2, 1), _unit(width, width, 3, 1, width)]
    channels = width
    # filters, inner channels, blocks, stride of the first
    for filters, inner, blocks, stride in ((1, 2, 5, 2), (2, 4, 1, 2), (2, 2, 6, 1), (2, 4, 1, 2), (2, 2, 2, 1)):
        for block in range(blocks):
            layers.append(_bottleneck(channels, filters * width, 1 if block else stride, inner * width))
            channels = filters * width
    side = size // 16
    layers += [_unit(channels, 8 * width, 1, 1, 1), _unit(8 * width, 8 * width, side, 1, 8 * width, linear=True)]
    layers += [nn.Conv2d(8 * width, embedding, 1, bias=False), nn.BatchNorm2d(embedding), nn.Flatten()]
    return nn.Sequential(*layers)
