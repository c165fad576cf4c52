"""The published step, and a small encoder to run it on."""

import torch
from torch import nn

from clae_fast import convert_dual_batchnorm
from clae_fast.pretraining.published import published_step


def step(encoder, x_i, x_j, loss, eps=0.03, alpha=1.0, plain=False):
    """Returns loss, x_adv; the weight gradients are in the parameters."""
    out = published_step(encoder, x_i, x_j, loss, eps, alpha, plain=plain)
    out.loss.backward()
    return out.loss.detach(), out.x_adv


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in "12")
        self.bn1, self.bn2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)

    def forward(self, x):
        h = self.bn1(self.conv1(x)).relu()
        return (x + self.bn2(self.conv2(h))).relu()


def small_encoder(dim=8):
    """A residual net whose two branches differ, as after some training."""
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), Block(8), Block(8),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, dim),
    )  # fmt: skip
    convert_dual_batchnorm(net)
    with torch.no_grad():
        for name, p in net.named_parameters():
            if "aux" in name:
                p.add_(0.2 * torch.randn_like(p))
    return net
