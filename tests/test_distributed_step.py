"""clae_step in two processes: the numbers of one, and no gradient sent for the attack."""

import copy

import published
import pytest
import torch
import torch.distributed as dist
from processes import run
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

from clae_fast import (
    NTXentLoss,
    batchnorm_branch,
    clae_step,
    convert_dual_batchnorm,
    strip_dual_batchnorm,
)

WORLD, STEPS = 2, 3
SIZES = ((5, 3), (2, 6), (4, 4))  # images of each process, by step
SCATTER = "_reduce_scatter_base_"


def views(dtype=torch.float64):
    g = torch.Generator().manual_seed(1)
    return torch.randn(STEPS, 2, 8, 3, 8, 8, generator=g, dtype=dtype)


def encoder(sync, dtype=torch.float64):
    """`published.small_encoder`, with SyncBatchNorm before the dual conversion if asked for."""
    torch.manual_seed(0)
    ordinary = published.small_encoder()
    if not sync:
        return ordinary.to(dtype)
    net = nn.SyncBatchNorm.convert_sync_batchnorm(strip_dual_batchnorm(copy.deepcopy(ordinary)))
    net = convert_dual_batchnorm(net)
    net.load_state_dict(ordinary.state_dict())
    return net.to(dtype)


def train(model, attack, rank=None):
    """Three steps; the attacked images of all of them. Without a rank: of the whole batch."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    attacked, losses = [], []
    for sizes, (x_i, x_j) in zip(SIZES, views(), strict=True):
        loss = NTXentLoss(0.5)
        if rank is not None:
            x_i, x_j = (x.split(sizes)[rank] for x in (x_i, x_j))
            loss = NTXentLoss(0.5, group="world")
        out = clae_step(model, x_i, x_j, loss=loss, eps=0.1, attack=attack)
        assert all(p.grad is None for p in model.parameters())  # the attack leaves none
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        attacked.append(out.x_adv)
        losses.append(out.loss.detach())
    return attacked, losses


def whole(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def sharded(net):
    mesh = init_device_mesh("cpu", (WORLD,))
    for block in (net[3], net[4]):
        fully_shard(block, mesh=mesh)
    return fully_shard(net, mesh=mesh)


def ddp(net, **options):
    return DistributedDataParallel(
        net, find_unused_parameters=False, broadcast_buffers=False, **options
    )


WRAPPERS = {
    "ddp": ddp,
    "ddp_compiled": lambda net: torch.compile(ddp(net), backend="aot_eager"),
    "fsdp": sharded,
}


def trained(rank, wrap, attack):
    net = encoder(sync=True)
    attacked, losses = train(WRAPPERS[wrap](net), attack, rank)
    return attacked, losses, {k: whole(v) for k, v in net.state_dict().items()}


def sequence():
    """Collectives that this process has begun, the gradient buckets of DDP among them."""
    return dist.group.WORLD._get_sequence_number_for_group()


def without_attack(model, x_i, x_j, x_adv, loss):
    """The training of clae_step on given adversarial images."""
    with batchnorm_branch(model, "main"):
        z_i, z_j = model(x_i), model(x_j)
    with batchnorm_branch(model, "aux"):
        z_adv = model(x_adv)
    return loss(z_i, z_j) + loss(z_i, z_adv)


def collectives(rank):
    """Of a step of DDP with BatchNorm of each process: with the attack, and without."""
    model = ddp(encoder(sync=False), bucket_cap_mb=0.002)
    x_i, x_j = (x.split((4, 4))[rank] for x in views()[0])
    counts = []
    for attack in (True, True, True, False):  # the second puts the buckets together anew
        before = sequence()
        if attack:
            loss = clae_step(model, x_i, x_j, loss=NTXentLoss(0.5)).loss
            assert sequence() == before or len(counts) < 2
        else:
            loss = without_attack(model, x_i, x_j, x_i, NTXentLoss(0.5))
        loss.backward()
        counts.append(sequence() - before)
    return counts


def scatters(rank):
    """Reduce-scatters of FSDP2, with the attack and without."""
    model = sharded(encoder(sync=False))
    x_i, x_j = (x.split((4, 4))[rank] for x in views()[0])
    counts = []
    for attack in (True, False):
        with CommDebugMode() as mode:
            if attack:
                loss = clae_step(model, x_i, x_j, loss=NTXentLoss(0.5)).loss
                assert not any(SCATTER in str(op) for op in mode.get_comm_counts())
            else:
                loss = without_attack(model, x_i, x_j, x_i, NTXentLoss(0.5))
            loss.backward()
        counts.append(sum(n for op, n in mode.get_comm_counts().items() if SCATTER in str(op)))
        model.zero_grad()
    return counts


def flops(model, rank):
    x_i, x_j = (x.split((4, 4))[rank] for x in views()[0])
    with FlopCounterMode(display=False) as counter:
        clae_step(model, x_i, x_j, loss=NTXentLoss(0.5))
    return counter.get_total_flops()


class Weighted(nn.Module):
    """Of each image its own linear function, 2,000 times as steep in the second half."""

    def __init__(self, start, count):
        super().__init__()
        steep = torch.tensor([1e-4] * 4 + [0.2] * 4)[start : start + count]
        g = torch.Generator().manual_seed(3)
        self.slopes = torch.randn(8, 8, generator=g)[start : start + count] * steep[:, None]

    def forward(self, z_i, z_j):
        return (z_j.float() * self.slopes).sum() + 0 * z_i.float().sum()


def mixed():
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.BatchNorm1d(16), nn.Linear(16, 8))
    return nn.SyncBatchNorm.convert_sync_batchnorm(layers)


def half_step(net, rank=None):
    x_i, x_j = views(torch.float32)[0]
    loss = Weighted(0, 8)
    if rank is not None:
        x_i, x_j = x_i.split(4)[rank], x_j.split(4)[rank]
        loss = Weighted(4 * rank, 4)
    with torch.autocast("cpu", torch.bfloat16):
        return clae_step(convert_dual_batchnorm(net), x_i, x_j, loss=loss, eps=0.5).x_adv - x_i


def worker(rank):
    return {
        "trained": {
            (wrap, attack): trained(rank, wrap, attack)
            for wrap, attack in TRAINED
        },
        "collectives": collectives(rank),
        "scatters": scatters(rank),
        "flops": [flops(sharded(encoder(sync=False)), rank), flops(encoder(sync=False), rank)],
        "half": half_step(mixed(), rank),
    }  # fmt: skip


TRAINED = [
    ("ddp", "exact"),
    ("ddp", "shared"),
    ("ddp_compiled", "exact"),
    ("fsdp", "exact"),
    ("fsdp", "shared"),
]


@pytest.fixture(scope="module")
def found():
    return run(worker, WORLD)


@pytest.mark.parametrize(("wrap", "attack"), TRAINED)
def test_three_steps_are_those_of_one_process(found, wrap, attack):
    net = encoder(sync=False)
    attacked, losses = train(net, attack)
    parts = [part["trained"][wrap, attack] for part in found]
    for step, x in enumerate(attacked):
        got = torch.cat([part[0][step] for part in parts])
        assert (got != x).double().mean() < 1e-3  # where a gradient is 0 to rounding
    state = net.state_dict()
    for part in parts:
        torch.testing.assert_close(part[1], losses, rtol=1e-6, atol=1e-8)
        assert part[2].keys() == state.keys()
        for name, value in state.items():
            torch.testing.assert_close(part[2][name], value, rtol=1e-6, atol=1e-8)


def test_the_attack_reduces_no_gradients_under_ddp(found):
    for part in found:
        *_, with_attack, without = part["collectives"]
        assert with_attack == without > 1


def test_the_attack_reduces_no_gradients_under_fsdp(found):
    for part in found:
        with_attack, without = part["scatters"]
        assert with_attack == without > 2


def test_the_attack_computes_no_weight_gradients_under_fsdp(found):
    for part in found:
        assert part["flops"][0] == part["flops"][1] > 0


def test_half_precision_is_scaled_alike_in_all_processes(found):
    """SyncBatchNorm adds up gradients of the processes: one factor for all of them."""
    expected = half_step(mixed())
    got = torch.cat([part["half"] for part in found])
    assert (got != expected).float().mean() < 0.02
