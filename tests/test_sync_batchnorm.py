"""SyncBatchNorm on the CPU: the numbers of one BatchNorm over the images of all processes."""

import copy

import pytest
import torch
import torch.distributed as dist
from processes import run
from torch import nn

from clae_fast import batchnorm_branch, convert_dual_batchnorm
from clae_fast.sync_batchnorm import SyncBatchNorm

WORLD = 3
# images in each process, shape of one image, dtype, options of the layer
CASES = {
    "even": ((4, 4, 4), (5, 3, 3), torch.float64, {}),
    "uneven": ((1, 4, 2), (5, 3, 3), torch.float32, {}),
    "no_image": ((0, 3, 1), (5, 3, 3), torch.float32, {}),
    "one_value_each": ((1, 1, 1), (5,), torch.float32, {}),
    "all_in_one": ((0, 0, 4), (5,), torch.float64, {"momentum": 0.3}),
    "cumulative": ((2, 1, 3), (5, 2), torch.float64, {"momentum": None}),
    "untracked": ((2, 1, 3), (5, 2, 2, 2), torch.float64, {"track_running_stats": False}),
    "no_weights": ((2, 1, 3), (5, 2, 2), torch.float64, {"affine": False, "eps": 0.1}),
    "bfloat16": ((2, 1, 3), (5, 4, 4), torch.bfloat16, {}),
    "float16": ((2, 1, 3), (5, 4, 4), torch.float16, {}),
}
# the same in all processes, or their collectives would not meet
PAIR = ((3, 2), (5, 2, 2), torch.float64, {})
ALONE = ((4,), *CASES["even"][1:])
STEPS = 2


def layer_of(kind, channels, dtype, options):
    layer = kind(channels, dtype=dtype if dtype == torch.float64 else torch.float32, **options)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.linspace(0.5, -2, channels))
    return layer


def images(sizes, shape, dtype, offset=3.0):
    """Inputs and gradients of each step, of all processes; far from 0, so that sums cancel."""
    g = torch.Generator().manual_seed(sum(sizes))
    x, dy = (
        torch.randn(STEPS, sum(sizes), *shape, generator=g, dtype=torch.float64) for _ in range(2)
    )
    return (x * 2 + offset).to(dtype), dy.to(dtype)


def forward_backward(layer, xs, dys):
    """Outputs and gradients of every step, and the layer's state after them."""
    out = []
    for x, dy in zip(xs, dys, strict=True):
        x = x.detach().requires_grad_()
        layer.zero_grad()
        y = layer(x)
        y.backward(dy)
        assert y.dtype == x.dtype
        out.append([y.detach(), x.grad, *(p.grad.clone() for p in layer.parameters())])
    layer.eval()
    return out, layer(xs[0]).detach(), {k: v.clone() for k, v in layer.state_dict().items()}


def one_case(rank, case, group=None):
    sizes, shape, dtype, options = case
    layer = layer_of(SyncBatchNorm, shape[0], dtype, {**options, "process_group": group})
    xs, dys = (t.split(sizes, 1)[rank] for t in images(sizes, shape, dtype))
    return forward_backward(layer, xs, dys)


def small():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 2),
        nn.BatchNorm2d(3),
    ).double()  # fmt: skip


def dual(rank, compiled):
    """PyTorch's conversion, then the dual one: both branches of a net, forward and backward."""
    net = convert_dual_batchnorm(nn.SyncBatchNorm.convert_sync_batchnorm(small()), momentum=0.2)
    model = torch.compile(net, backend="eager") if compiled else net
    found = []
    for branch in ("main", "aux"):
        x = torch.randn(5, 2, 6, 6, generator=torch.Generator().manual_seed(7)).double()
        x = x.split((2, 0, 3))[rank].requires_grad_()
        with batchnorm_branch(net, branch):
            model(x).square().sum().backward()
        found.append(x.grad)
    return found, [p.grad for p in net.parameters()], net.state_dict()


def refused(rank):
    """One value per channel in all: every process says so."""
    try:
        SyncBatchNorm(3)(torch.ones(int(rank == 1), 3))
    except ValueError as error:
        return str(error)


def worker(rank):
    found = {name: one_case(rank, case) for name, case in CASES.items()}
    group = dist.new_group([0, 2])
    if rank != 1:
        found["pair"] = one_case(rank // 2, PAIR, group)
    alone = dist.new_group([rank], use_local_synchronization=True)
    found["alone"] = one_case(0, ALONE, alone)
    found["dual"], found["compiled"] = dual(rank, False), dual(rank, True)
    found["refused"] = refused(rank)
    x = torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    found["layout"] = SyncBatchNorm(3)(x).is_contiguous(memory_format=torch.channels_last)
    return found


@pytest.fixture(scope="module")
def found():
    return run(worker, WORLD)


def batchnorm(shape):
    return {1: nn.BatchNorm1d, 2: nn.BatchNorm1d, 3: nn.BatchNorm2d, 4: nn.BatchNorm3d}[len(shape)]


def compare(parts, sizes, shape, dtype, options):
    half = dtype in (torch.bfloat16, torch.float16)
    reference = layer_of(batchnorm(shape), shape[0], torch.float64, options)
    xs, dys = images(sizes, shape, dtype)
    steps, _, state = forward_backward(reference, xs.double(), dys.double())
    close = {
        torch.float64: {"rtol": 1e-10, "atol": 1e-10},
        torch.float32: {"rtol": 1e-4, "atol": 1e-5},
        torch.bfloat16: {"rtol": 1e-2, "atol": 1e-2},
        torch.float16: {"rtol": 2e-3, "atol": 2e-3},
    }[dtype]
    for i, (y, dx, *weights) in enumerate(steps):
        got = [part[0][i] for part in parts]
        for j, whole in enumerate((y, dx)):
            mine = torch.cat([g[j] for g in got])
            assert mine.dtype == dtype
            torch.testing.assert_close(mine.double(), whole, **close)
        for j, whole in enumerate(weights):  # the sums over each process's own images
            mine = sum(g[2 + j].double() for g in got)
            sums = {"rtol": 1e-4, "atol": 1e-3} if half else close
            torch.testing.assert_close(mine, whole, **sums)
    for part, x in zip(parts, xs[0].split(sizes), strict=True):
        # In eval mode each process is on its own, statistics tracked or not.
        torch.testing.assert_close(part[1].double(), reference(x.double()), **close)
        assert part[2].keys() == state.keys()
        for name, value in state.items():  # of any dtype: the statistics are of float32 at least
            exact = close if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
            torch.testing.assert_close(part[2][name].to(value.dtype), value, **exact)


@pytest.mark.parametrize("name", CASES)
def test_as_one_batchnorm_over_all_images(found, name):
    compare([part[name] for part in found], *CASES[name])


def test_a_group_of_some_processes(found):
    compare([found[0]["pair"], found[2]["pair"]], *PAIR)
    assert "pair" not in found[1]


def test_a_group_of_one_is_a_batchnorm(found):
    for part in found:
        compare([part["alone"]], *ALONE)


def test_statistics_are_the_same_bits_everywhere(found):
    for name in CASES:
        states = [part[name][2] for part in found]
        for key, value in states[0].items():
            assert all(torch.equal(state[key], value) for state in states), (name, key)


@pytest.mark.parametrize("name", ["dual", "compiled"])
def test_both_branches_of_a_dual_layer(found, name):
    net = convert_dual_batchnorm(small(), momentum=0.2)
    for i, branch in enumerate(("main", "aux")):
        x = torch.randn(5, 2, 6, 6, generator=torch.Generator().manual_seed(7)).double()
        x.requires_grad_()
        with batchnorm_branch(net, branch):
            net(x).square().sum().backward()
        torch.testing.assert_close(torch.cat([part[name][0][i] for part in found]), x.grad)
    for j, p in enumerate(net.parameters()):
        torch.testing.assert_close(sum(part[name][1][j] for part in found), p.grad)
    for key, value in net.state_dict().items():
        for part in found:
            torch.testing.assert_close(part[name][2][key], value)


def test_too_few_values_are_refused_by_every_process(found):
    for rank, part in enumerate(found):
        assert "at least 2 values per channel in all processes" in part["refused"]
        assert f"got 1 (here: ({int(rank == 1)}, 3))" in part["refused"]


def test_memory_format_is_kept(found):
    assert all(part["layout"] for part in found)


def test_without_a_process_group_it_is_a_batchnorm():
    x = torch.randn(4, 5, 3, 3)
    ours, theirs = SyncBatchNorm(5, momentum=None), nn.BatchNorm2d(5, momentum=None)
    for _ in range(2):
        assert torch.equal(ours(x), theirs(x))
    for key, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value)
    assert torch.equal(copy.deepcopy(ours).eval()(x), theirs.eval()(x))
    with pytest.raises(ValueError, match="at least 2D input"):
        ours.train()(torch.ones(5))
