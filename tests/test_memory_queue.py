"""MoCo's queue and key encoder: order, wrap-around, what is handed out, several processes."""

import copy
import io

import dense
import pytest
import torch
from dense import error
from group_losses import subgroup
from torch import nn

from clae_fast import MemoryQueue, info_nce_loss, momentum_update


def batches(lengths, dim=3):
    """Keys that count upwards."""
    total = torch.arange(sum(lengths) * dim, dtype=torch.float32).reshape(-1, dim)
    return total.split(list(lengths))


LENGTHS = [
    [1] * 12, [3, 3, 3], [4, 4, 4], [2, 5, 1, 4, 3], [7], [2, 9, 3], [5, 5], [13, 1], [0, 2, 0, 4],
]  # fmt: skip


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_holds_the_last_keys_in_order(lengths):
    """Whatever the batches: longer than what is left, longer than the queue, empty."""
    queue = MemoryQueue(5, 3, ids=True)
    seen = torch.empty(0, 3)
    for keys in batches(lengths):
        queue.enqueue(keys, keys[:, 0].to(torch.int32))
        seen = torch.cat((seen, keys))
        assert torch.equal(queue(), seen[-5:])
        assert torch.equal(queue.key_ids(), seen[-5:, 0].long())
        assert len(queue) == min(5, len(seen))


def test_never_a_stale_view():
    """A loss whose backward comes after the next enqueue gets the gradient of its own keys."""
    q, k, *more = (torch.randn(4, 6) for _ in range(5))
    for fill in (1, 3):  # half full, full
        queue = MemoryQueue(8, 6)
        for keys in more[:fill]:
            queue.enqueue(keys)
        held = queue().clone()
        leaf, exact = q.clone().requires_grad_(), q.double().requires_grad_()
        loss = info_nce_loss(leaf, k, queue(), temperature=0.2)
        for keys in more:
            queue.enqueue(3 * keys)
        loss.backward()
        dense.info_nce(exact, k.double(), held.double(), 5.0).mean().backward()
        assert error(leaf.grad, exact.grad) < 2e-5
        assert not torch.equal(queue()[: len(held)], held)


def test_empty_and_detached():
    queue = MemoryQueue(4, 6)
    q, k = torch.randn(3, 6, requires_grad=True), torch.randn(3, 6, requires_grad=True)
    assert queue().shape == (0, 6)
    assert info_nce_loss(q, k, queue()) == 0
    queue.enqueue(k)
    assert not queue().requires_grad
    with torch.inference_mode():
        queue.enqueue(torch.randn(2, 6))
    info_nce_loss(q, k, queue()).backward()  # no inference tensor has got in
    assert q.grad.isfinite().all()


def test_ids_leave_out_own_copies():
    """Keys of the same image in the queue are no negatives of it."""
    queue = MemoryQueue(6, 4, ids=True)
    z = torch.randn(5, 4)
    queue.enqueue(z, torch.arange(5))
    q = torch.randn(2, 4)
    ids = torch.tensor([1, 3])
    loss = info_nce_loss(q, z[ids], queue(), query_ids=ids, key_ids=queue.key_ids())
    each = [
        info_nce_loss(q[i : i + 1], z[ids[i : i + 1]], z[torch.arange(5) != ids[i]]) for i in (0, 1)
    ]
    assert error(loss, sum(each) / 2) < 5e-6


def test_checkpoint():
    """Keys, ids and position go along; so does a copy and a change of dtype."""
    queue = MemoryQueue(5, 3, ids=True)
    for keys in batches([4, 3]):
        queue.enqueue(keys, keys[:, 0].long())
    file = io.BytesIO()
    torch.save(nn.ModuleDict({"queue": queue}).state_dict(), file)
    file.seek(0)
    other = nn.ModuleDict({"queue": MemoryQueue(5, 3, ids=True)})
    other.load_state_dict(torch.load(file, weights_only=True))
    for twin in (other["queue"], copy.deepcopy(queue)):
        assert torch.equal(twin(), queue())
        assert torch.equal(twin.key_ids(), queue.key_ids())
        more = torch.randn(2, 3)
        twin.enqueue(more, torch.tensor([7, 8]))
        assert torch.equal(twin()[-2:], more)
        assert torch.equal(twin()[:3], queue()[2:])
    assert queue.double()().dtype == torch.float64
    queue.enqueue(torch.ones(1, 3, dtype=torch.bfloat16), torch.zeros(1).long())
    assert (queue()[-1] == 1).all()
    assert "5, 3, ids=True" in repr(queue)


def test_a_load_that_fails_or_is_partial_leaves_no_mixture():
    """Nothing of it, or all of it: keys that were never put in are never handed out."""

    def filled(size, ids=True):
        queue = MemoryQueue(size, 3, ids=ids)
        keys = torch.full((4, 3), float(size))
        queue.enqueue(keys, torch.arange(4) if ids else None)
        return queue

    def without(*names):
        state = filled(5).state_dict()
        return {name: x for name, x in state.items() if name not in names}

    def damaged(*position):
        return {**filled(5).state_dict(), "position": torch.tensor(position)}

    for state in (without("keys"), without("ids"), without("position")):
        queue = filled(5)
        with pytest.raises(RuntimeError, match="Missing key"):
            queue.load_state_dict(state)
        assert len(queue) == 0
        queue.enqueue(torch.ones(2, 3), torch.ones(2).int())
        queue.load_state_dict(state, strict=False)
        assert queue().shape == (0, 3)
        assert queue.key_ids().shape == (0,)
    for other in (4, 9):
        queue = filled(5)
        with pytest.raises(RuntimeError, match="size mismatch"):
            queue.load_state_dict(filled(other).state_dict())
        assert len(queue) == 0
    for position in ((5, 4), (4, 6), (4, -1), (2, 4)):
        queue = filled(5)
        with pytest.raises(ValueError, match="damaged"):
            queue.load_state_dict(damaged(*position))
        assert len(queue) == 0
    for state in (damaged(2, 4), without("ids")):  # whose tensors stay the caller's
        queue, before = filled(5), state["position"].tolist()
        with pytest.raises((RuntimeError, ValueError), match="damaged|Missing key"):
            queue.load_state_dict(state, assign=True)
        assert len(queue) == 0
        assert state["position"].tolist() == before
    queue = filled(5)  # of other modules
    nn.ModuleDict({"queue": queue, "net": nn.Linear(2, 2)}).load_state_dict(
        {"net.weight": torch.ones(2, 2)}, strict=False
    )
    assert len(queue) == 4


def test_state_is_tensors_alone(tmp_path):
    """As safetensors wants it."""
    safe = pytest.importorskip("safetensors.torch")
    queue = MemoryQueue(5, 3, ids=True)
    for keys in batches([4, 3]):
        queue.enqueue(keys, keys[:, 0].long())
    safe.save_file(queue.state_dict(), tmp_path / "queue.safetensors")
    other = MemoryQueue(5, 3, ids=True)
    other.load_state_dict(safe.load_file(tmp_path / "queue.safetensors"))
    assert torch.equal(other(), queue())
    assert torch.equal(other.key_ids(), queue.key_ids())


def test_position_moves_and_is_copied():
    queue = MemoryQueue(5, 3)
    queue.enqueue(torch.ones(3, 3))
    file = io.BytesIO()
    torch.save(queue, file)
    file.seek(0)
    for twin in (torch.load(file, weights_only=False), copy.deepcopy(queue)):
        twin.enqueue(torch.zeros(1, 3))
        assert (len(twin), len(queue)) == (4, 3)
    assert len(queue.double().to("meta")) == 3
    empty = MemoryQueue(5, 3, device="meta").to_empty(device="cpu")
    assert empty.position.tolist() == [0, 0]
    assert len(empty) == 0
    assert len(queue.to_empty(device="cpu")) == 3


def test_position_is_read_where_it_was_written(monkeypatch):
    """On an accelerator only there: every read is a wait. (The CPU stands in for one.)"""
    reads, tolist = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda x: reads.append(1) or tolist(x))

    class Elsewhere(torch.Tensor):
        device = torch.device("cuda")

    queue = MemoryQueue(5, 3)
    queue.position = queue.position.as_subclass(Elsewhere)
    assert len(queue) == 0
    reads.clear()
    for _ in range(3):
        queue.enqueue(torch.ones(2, 3))
        queue()
        len(queue)
    assert not reads
    queue.position.copy_(torch.tensor([2, 2]))
    assert len(queue) == 2
    assert reads
    reads.clear()
    assert queue().shape == (2, 3)
    assert not reads


def test_compiled_in_one_graph():
    queue = MemoryQueue(5, 3, ids=True)

    def step(keys, ids):
        queue.enqueue(keys, ids)
        return queue(), queue.key_ids()

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for keys in batches([2, 2, 2, 2]):
        got, ids = compiled(keys, keys[:, 0].long())
        assert torch.equal(got, queue())
        assert torch.equal(ids, got[:, 0].long())
    assert queue.position.tolist() == [3, 5]


class Both(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.queue = nn.Linear(2, 2), MemoryQueue(9, 2, ids=True)

    def forward(self, x):
        return self.net(x)


def broadcast(rank):
    """What rank 0 alone put in: before DDP, then between two forwards, which hide their writes."""
    group = subgroup(2)
    if rank >= 2:
        return None
    both, seen = Both(), []
    if rank == 0:
        both.queue.enqueue(torch.ones(7, 2), torch.arange(7))
    wrapped = nn.parallel.DistributedDataParallel(both, process_group=group)
    seen.append((len(both.queue), both.queue(), both.queue.key_ids()))
    if rank == 0:
        both.queue.enqueue(torch.zeros(1, 2), torch.tensor([7]))
    wrapped(torch.ones(1, 2))
    seen.append((len(both.queue), both.queue(), both.queue.key_ids()))
    return seen


def test_ddp_broadcasts_the_position_too(four):
    for answer in four.run(broadcast)[:2]:
        for (length, keys, ids), count in zip(answer, (7, 8), strict=True):
            assert length == count
            assert torch.equal(keys[:7], torch.ones(7, 2))
            assert ids.tolist() == list(range(count))


BATCHES = ((2, 3, 0, 1), (0, 1, 0, 0), (4, 2, 1, 3), (1, 0, 2, 0))


def put_in(rank, kind, ranks, dtype):
    """Batches of different lengths, none at all on some ranks; None outside the group."""
    group = subgroup(ranks) if kind == "process group" else kind
    if rank >= ranks:
        return None
    queue = MemoryQueue(7, 2, ids=True, dtype=dtype)
    for step, lengths in enumerate(BATCHES):
        n = lengths[rank]
        keys = torch.full((n, 2), 10.0 * step + rank) + torch.arange(n)[:, None] / 8
        queue.enqueue(keys, torch.full((n,), rank), group=group)
    return queue(), queue.key_ids()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "ranks"), [("world", 4), ("process group", 4), ("process group", 2)]
)
def test_equal_on_all_ranks(four, kind, ranks, dtype):
    answers = four.run(put_in, kind, ranks, dtype)[:ranks]
    expected, numbers = [], []
    for step, lengths in enumerate(BATCHES):
        for rank, n in enumerate(lengths[:ranks]):
            expected += [10.0 * step + rank + i / 8 for i in range(n)]
            numbers += [rank] * n
    for keys, ids in answers:
        assert torch.equal(keys[:, 0], torch.tensor(expected[-7:], dtype=dtype))
        assert ids.tolist() == numbers[-7:]


def test_random_to_start_with():
    """As MoCo: full of unit rows, of no one's id, so that the first step has a loss."""
    queue = MemoryQueue(8, 6, ids=True, random=True)
    torch.testing.assert_close(queue().norm(dim=1), torch.ones(8))
    assert len(queue) == 8
    assert (queue.key_ids() < 0).all()
    q, k = torch.randn(3, 6, requires_grad=True), torch.randn(3, 6)
    loss = info_nce_loss(q, k, queue(), query_ids=torch.arange(3), key_ids=queue.key_ids())
    loss.backward()
    assert loss > 0
    assert q.grad.abs().sum() > 0
    queue.enqueue(k, torch.arange(3))
    assert torch.equal(queue()[-3:], k)
    assert len(queue) == 8
    same = [MemoryQueue(8, 6).fill_random(torch.Generator().manual_seed(3))() for _ in range(2)]
    assert torch.equal(*same)


def test_momentum_update_of_what_is_wrapped():
    encoder = nn.Linear(4, 2)
    for wrap in (torch.compile, nn.DataParallel, lambda x: torch.compile(nn.DataParallel(x))):
        key = copy.deepcopy(encoder)
        nn.init.zeros_(key.weight)
        momentum_update(wrap(encoder), wrap(key), 0)
        assert torch.equal(key.weight, encoder.weight)


def test_momentum_update():
    """In place, to the formula; buffers and integers copied; equal stays equal."""
    torch.manual_seed(1)
    encoder = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2).double())
    key = copy.deepcopy(encoder)
    same = copy.deepcopy(key).state_dict()
    momentum_update(encoder, key, 0.9)
    assert all(torch.equal(a, same[n]) for n, a in key.state_dict().items())
    before = [p.clone() for p in key.parameters()]
    places = [p.data_ptr() for p in key.parameters()]
    with torch.no_grad():
        for p in encoder.parameters():
            p.add_(torch.randn_like(p))
    encoder[1](torch.randn(8, 3))
    momentum_update(nn.DataParallel(encoder), key, 0.9)
    for p, old, now in zip(key.parameters(), before, encoder.parameters(), strict=True):
        torch.testing.assert_close(p, 0.9 * old + 0.1 * now)
        assert p.requires_grad
        assert p.grad_fn is None
    assert [p.data_ptr() for p in key.parameters()] == places
    assert key[1].num_batches_tracked == 1
    assert torch.equal(key[1].running_mean, encoder[1].running_mean)
    momentum_update(encoder, key, 0)
    assert all(
        torch.equal(a, b) for a, b in zip(key.parameters(), encoder.parameters(), strict=True)
    )


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (lambda q, e: MemoryQueue(0, 3), ValueError, "size must be at least 1, got 0"),
        (lambda q, e: MemoryQueue(2.0, 3), TypeError, "size must be an int, got float"),
        (lambda q, e: MemoryQueue(2, 3, dtype=torch.int64), TypeError, "dtype must be float16"),
        (lambda q, e: q.enqueue(torch.randn(2, 4)), ValueError, r"keys must be \(B, 3\)"),
        (lambda q, e: q.enqueue(torch.ones(2, 3).int()), TypeError, "keys must be float16"),
        (lambda q, e: q.enqueue(torch.ones(2, 3), torch.ones(2).int()), ValueError, "no ids"),
        (lambda q, e: q.enqueue(torch.ones(2, 3), group=4), TypeError, "group must be None"),
        (lambda q, e: q.enqueue(torch.ones(2, 3), group="world"), RuntimeError, "group needs"),
        (lambda q, e: q.key_ids(), ValueError, "ids=True"),
        (lambda q, e: MemoryQueue(2, 3, ids=True).enqueue(torch.ones(2, 3)), ValueError, "None"),
        (lambda q, e: MemoryQueue(2, 3, ids=True).enqueue(torch.ones(2, 3), torch.ones(3).int()),
         ValueError, r"ids must be \(2,\), got \(3,\)"),
        (lambda q, e: momentum_update(e, e), ValueError, "must be a copy"),
        (lambda q, e: momentum_update(e, copy.deepcopy(e), 1.5), ValueError, "m must lie in"),
        (lambda q, e: momentum_update(e, None), TypeError,
         "^key_encoder must be an nn.Module, got NoneType$"),
        (lambda q, e: momentum_update(e.parameters(), e.parameters()), TypeError,
         "^encoder must be an nn.Module, got generator$"),
        (lambda q, e: q.fill_random(3), TypeError,
         "^generator must be None or a torch.Generator, got int"),
        (lambda q, e: momentum_update(e, nn.Linear(3, 3)), ValueError, "'weight' must be "),
        (lambda q, e: momentum_update(e, nn.Linear(3, 2, bias=False)), ValueError,
         "'bias' is in encoder alone"),
    ],
)  # fmt: skip
def test_wrong_inputs(call, kind, words):
    with pytest.raises(kind, match=words):
        call(MemoryQueue(4, 3), nn.Linear(3, 2))
