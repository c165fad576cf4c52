"""The training step: published, exact and shared CLAE, and no CLAE; ResNet-18, 32 px."""

from __future__ import annotations

import statistics

import pytest
import torch
from replay import REPLAY
from shapes import STEP_METHODS

from clae_fast.pretraining import PretrainConfig
from clae_fast.pretraining.config import VARIANTS
from clae_fast.pretraining.data import ImageData
from clae_fast.pretraining.step_cost import step_costs

BATCH, PIXELS = 32, 32
CASES = [(method, variant) for method in STEP_METHODS for variant in VARIANTS]


def measure(bench, method):
    if method in bench.measured:
        return bench.measured[method]
    g = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (4 * BATCH, 3, PIXELS, PIXELS), generator=g, dtype=torch.uint8)
    labels = torch.zeros(len(images), dtype=torch.int64)
    data = ImageData("noise", images, labels, images, labels, (0.5,) * 3, (0.25,) * 3)
    config = {"method": method, "data": "cifar10", "encoder": "resnet18-cifar", "workers": 0,
              "batch_size": BATCH, "threads": bench.threads, "device": bench.device}  # fmt: skip
    configs = {name: PretrainConfig(**config, **change) for name, change in VARIANTS.items()}
    bench.measured[method] = step_costs(configs, data, rounds=5, memory=False)
    return bench.measured[method]


@pytest.mark.parametrize(("method", "variant"), CASES, ids=["-".join(c) for c in CASES])
@pytest.mark.benchmark(timer=REPLAY.timer, warmup=False)
def test_step(method, variant, bench, benchmark):
    costs = measure(bench, method)
    cost = costs[variant]
    benchmark.group = f"training step, {method}, ResNet-18, batch {BATCH}"
    record = {
        "kind": "step", "method": method, "variant": variant, "seconds": cost.seconds,
        "encoder": "resnet18-cifar", "batch": BATCH, "pixels": PIXELS, "rounds": len(cost.rounds),
        "forwards": cost.forwards, "times_baseline": cost.ratio,
        "times_as_fast_as_published": statistics.median(
            p / o for p, o in zip(costs["published"].rounds, cost.rounds, strict=True)
        ),
    }  # fmt: skip
    bench.records.append(record)
    benchmark.extra_info.update(bench.facts | record)
    REPLAY.play(benchmark, list(cost.rounds))
