"""Losses over the GPUs of a machine with NCCL, against one process in float64."""

import pytest
import torch
from group_losses import FAMILY, LOSSES, family_loss, one_loss
from processes import Processes
from test_group_family import check as check_family
from test_group_losses import check

pytestmark = pytest.mark.gpu_only


@pytest.fixture(scope="module")
def gpus():
    """As many processes as there are GPUs, four at most: NCCL gives each its own."""
    processes = Processes(min(torch.cuda.device_count(), 4), backend="nccl")
    yield processes
    processes.close()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("exchange", ["gather", "ring"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", LOSSES)
def test_loss(gpus, name, reduction, exchange, compiled):
    sizes = (3, 1, 2, 5)[: len(gpus.pipes)]
    answers = gpus.run(
        one_loss, name, sizes, torch.float32, reduction, exchange, compiled, None, "cuda"
    )
    check(name, sizes, torch.float32, reduction, answers)


@pytest.mark.parametrize("exchange", ["gather", "ring"])
@pytest.mark.parametrize("name", FAMILY)
def test_family(gpus, name, exchange):
    sizes = (3, 1, 2, 5)[: len(gpus.pipes)]
    answers = gpus.run(family_loss, name, sizes, torch.float32, "mean", exchange, False, "cuda")
    check_family(name, sizes, torch.float32, "mean", answers)
