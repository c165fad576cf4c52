"""An encoder in float64: two ways of running it are equal to many digits."""

import os

import torch
from torch import nn


class Double(nn.Sequential):
    def forward(self, x):
        return super().forward(x.double())


def with_batchnorm():
    return Double(
        nn.Conv2d(1, 4, 5, 3), nn.BatchNorm2d(4), nn.Softplus(), nn.AvgPool2d(2), nn.Flatten(),
        nn.Linear(64, 16), nn.BatchNorm1d(16, momentum=None), nn.Softplus(), nn.Linear(16, 8),
    ).double()  # fmt: skip


def independent():
    return Double(
        nn.Conv2d(1, 4, 5, 3), nn.Softplus(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(64, 8)
    ).double()


def with_dropout():
    net = with_batchnorm()
    return Double(*net[:5], nn.Dropout(0.2), *net[5:])


class Failing(nn.Module):
    """Fails in the process of rank 1, once training is under way."""

    def __init__(self):
        super().__init__()
        self.linear, self.calls = nn.Linear(784, 4), 0

    def forward(self, x):
        self.calls += self.training
        if self.calls > 7 and os.environ["RANK"] == "1":
            raise RuntimeError("out of luck")
        return self.linear(x.flatten(1))


def failing():
    torch.manual_seed(0)
    return Failing()
