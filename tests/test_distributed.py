"""Two processes: a CLAE step under DistributedDataParallel gives the averaged gradients."""

import copy
import gc
import os

import published
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from clae_fast import clae_step


def views():
    g = torch.Generator().manual_seed(1)
    return [torch.randn(2, 8, 3, 8, 8, generator=g) for _ in range(2)]  # rank first


def worker(rank, folder, attack):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.manual_seed(0)
    net = published.small_encoder()
    model = DistributedDataParallel(net, find_unused_parameters=False, broadcast_buffers=False)
    forwards = []
    model.register_forward_hook(lambda *_: forwards.append(1))
    x_i, x_j = views()
    for _ in range(2):  # the second step fails if the first left the reducer waiting
        model.zero_grad()
        out = clae_step(model, x_i[rank], x_j[rank], attack=attack)
        out.loss.backward()
    # The attack runs on the inner module: DDP would wait for weight gradients.
    assert len(forwards) == 6
    torch.save([out.x_adv, [p.grad for p in net.parameters()]], f"{folder}/{rank}.pt")
    # Under load one process was aborted in gloo's threads: it took them down while the reducer
    # still held the group and the other process was still at work.
    dist.barrier()
    del model, out
    gc.collect()
    dist.destroy_process_group()
    os._exit(0)  # all is saved; gloo's threads may outlive the interpreter and abort it


@pytest.mark.parametrize("attack", ["exact", "shared"])
def test_ddp(tmp_path, attack):
    mp.spawn(worker, (str(tmp_path), attack), nprocs=2)
    torch.manual_seed(0)
    net = published.small_encoder()
    x_i, x_j = views()
    expected, images = [], []
    for rank in range(2):
        local = copy.deepcopy(net)
        for _ in range(2):
            local.zero_grad()
            out = clae_step(local, x_i[rank], x_j[rank], attack=attack)
            out.loss.backward()
        expected.append([p.grad for p in local.parameters()])
        images.append(out.x_adv)
    for rank in range(2):
        x_adv, grads = torch.load(tmp_path / f"{rank}.pt")
        assert (x_adv != images[rank]).float().mean() < 1e-3
        for g, a, b in zip(grads, *expected, strict=True):
            torch.testing.assert_close(g, (a + b) / 2, rtol=1e-4, atol=1e-6)
