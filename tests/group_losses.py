"""What the processes of test_group_losses.py do: losses on their share of a batch."""

import functools
import time
import weakref
from datetime import timedelta
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from clae_fast import (
    clip_loss,
    dcl_loss,
    hard_negative_loss,
    info_nce_loss,
    negative_mises_fisher_weights,
    nt_xent_loss,
    siglip_loss,
    sup_con_loss,
    uel_loss,
    value_and_grad,
)
from clae_fast.compat import lightly as compat_lightly
from clae_fast.compat import open_clip as compat_open_clip
from clae_fast.compat import sentence_transformers as compat_st
from clae_fast.process_group import Group

LOSSES = {
    "nt_xent": (nt_xent_loss, 2),
    "plain": (info_nce_loss, 1),
    "symmetric": (functools.partial(info_nce_loss, symmetric=True), 2),
    "queue": (info_nce_loss, 1),
    "paired": (functools.partial(info_nce_loss, negative_mode="paired"), 1),
    "uel": (functools.partial(uel_loss, negative_weight=1.5), 2),
    "clip": (clip_loss, 2),
}
"""The function, and how many rows of loss a pair has."""


@functools.cache
def subgroup(ranks):
    """The group of the first ranks; all processes must ask for it."""
    return dist.new_group(list(range(ranks)), timeout=timedelta(seconds=20))


def batch(name, sizes, dtype, D=24, seed=0):
    """The whole batch: inputs by name, which of them are split over the ranks, the scale."""
    g = torch.Generator().manual_seed(seed)
    B = sum(sizes)
    q = torch.randn(B, D, generator=g, dtype=torch.float64)
    k = q + 0.5 * torch.randn(B, D, generator=g, dtype=torch.float64)
    inputs = [q, k]
    if name == "queue":
        inputs.append(torch.randn(19, D, generator=g, dtype=torch.float64))
    if name == "paired":
        inputs.append(torch.randn(B, 5, D, generator=g, dtype=torch.float64))
    split = [True, True] + [name == "paired"] * (len(inputs) - 2)
    scale = torch.tensor(3.0 if name == "clip" else 0.3, dtype=torch.float64)
    return [x.to(dtype) for x in inputs], split, scale


def bind(name, scale, **options):
    """The loss as a function of its tensors."""
    function = LOSSES[name][0]
    if name == "clip":
        return lambda *x: function(*x, scale, normalize=True, **options)
    return lambda *x: function(*x, temperature=scale, **options)


def share(rank, sizes, inputs, split):
    first = sum(sizes[:rank])
    return [
        x[first : first + sizes[rank]] if part else x for x, part in zip(inputs, split, strict=True)
    ]


def one_loss(
    rank, name, sizes, dtype, reduction, exchange, compiled=False, backend=None, device="cpu"
):
    """(loss, input gradients, scale's gradient) of this rank; None outside the group."""
    group = subgroup(len(sizes))
    if rank >= len(sizes):
        return None
    inputs, split, scale = batch(name, sizes, dtype)
    mine = [x.to(device, copy=True).requires_grad_() for x in share(rank, sizes, inputs, split)]
    t = scale.to(device, copy=True).requires_grad_()
    options = {"reduction": reduction, "group": group, "exchange": exchange, "backend": backend}
    if name == "paired":
        del options["backend"]
    run = bind(name, t, **options)
    if compiled:
        torch._dynamo.reset()
        run = torch.compile(run, fullgraph=True)
    loss = run(*mine)
    weight = upstream(loss, rank).to(device)
    (loss * weight).sum().backward()
    fused = None
    if reduction != "none":
        fused = value_and_grad(bind(name, t.detach(), **options))(*mine)[1]
        fused = [x.cpu() for x in fused]
    return loss.detach().cpu(), [x.grad.cpu() for x in mine], t.grad.cpu(), fused


def upstream(loss, rank):
    """Of a scalar 1.5; of rows different ones."""
    if loss.dim() == 0:
        return torch.tensor(1.5)
    g = torch.Generator().manual_seed(100 + rank)
    return torch.rand(loss.shape, generator=g, dtype=torch.float64).to(loss.dtype)


def encoder():
    g = torch.Generator().manual_seed(7)
    net = torch.nn.Sequential(torch.nn.Linear(24, 16), torch.nn.Tanh(), torch.nn.Linear(16, 8))
    net = net.double()
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=g, dtype=torch.float64) * 0.3)
    return net


class Learner(torch.nn.Module):
    """An encoder and a temperature (or scale) that learns."""

    def __init__(self, scale):
        super().__init__()
        self.net = encoder()
        self.scale = torch.nn.Parameter(scale.clone())

    def forward(self, *inputs):
        return [self.net(x) for x in inputs]


def train(rank, name, sizes, exchange):
    """The weights after three steps of SGD; rank None: one process with everything."""
    inputs, split, scale = batch(name, sizes, torch.float64)
    learner = model = Learner(scale)
    options = {}
    if rank is not None:
        options = {"group": "world", "exchange": exchange}
        inputs = share(rank, sizes, inputs, split)
        model = DistributedDataParallel(learner)
    optimizer = torch.optim.SGD(learner.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        embeddings = model(*inputs)
        # Of the forward through DDP, so that its reducer sees the scale too.
        bind(name, learner.scale, **options)(*embeddings).backward()
        optimizer.step()
    return [p.detach() for p in learner.parameters()]


def measured_exchange(rank, name, b, exchange, gradients):
    """Bytes received and sent, the most that buffers held, and bytes of each meeting."""
    sizes = (b,) * 4
    inputs, split, scale = batch(name, sizes, torch.float32)
    mine = [x.clone().requires_grad_(gradients) for x in share(rank, sizes, inputs, split)]
    count = {"received": 0, "sent": 0, "peak": 0}
    alive = []

    def held():
        return sum({id(s): s.nbytes() for ref in alive if (s := ref()) is not None}.values())

    def note(*buffers):
        alive.extend(weakref.ref(x.untyped_storage()) for x in buffers)
        least = held()
        for _ in range(20):  # gloo's threads let go of a buffer a moment later
            time.sleep(1e-3)
            least = min(least, held())
        count["peak"] = max(count["peak"], least)

    gather, pass_on = Group.gather, Group.pass_on
    numbers, meetings = Group._numbers, []

    def counted_gather(self, x):
        out = gather(self, x)
        count["received"] += out.nbytes - x.nbytes
        count["sent"] += (self.size - 1) * x.nbytes
        note(out)
        return out

    def counted_pass_on(self, sent, out):
        arrive = pass_on(self, sent, out)
        count["received"] += out.nbytes
        count["sent"] += sent.nbytes
        note(sent, out)
        return arrive

    def counted_numbers(self, mine, device):
        meetings.append(8 * len(mine))
        return numbers(self, mine, device)

    with (
        mock.patch.object(Group, "gather", counted_gather),
        mock.patch.object(Group, "pass_on", counted_pass_on),
        mock.patch.object(Group, "_numbers", counted_numbers),
    ):
        loss = bind(name, float(scale), group="world", exchange=exchange)(*mine)
        if gradients:
            loss.backward()
    return count["received"], count["sent"], count["peak"], meetings


# ------------------------------------------------ losses put together from sweeps, and options


def family(name, inputs, given, scale, bias, **options):
    """One of the family's losses on pairs (q, k); `given` are its other tensors."""
    q, k = inputs[:2]
    kind, _, option = name.partition("+")
    told = {o: given[o] for o in option.split(",") if o in given}
    if option == "smoothing":
        told["label_smoothing"] = 0.2
    if kind == "sup_con":
        features = torch.stack((q, k), 1)
        return sup_con_loss(features, given["labels"], temperature=scale, **told, **options)
    if kind == "uel":
        return uel_loss(q, k, temperature=scale, **told, **options)
    if kind == "dcl":
        return dcl_loss(q, k, temperature=scale, **told, **options)
    if kind == "dclw":
        weight_fn = negative_mises_fisher_weights(0.5)
        return dcl_loss(q, k, temperature=scale, weight_fn=weight_fn, **told, **options)
    if kind == "hard":
        return hard_negative_loss(
            q, k, temperature=scale, beta=0.7, tau_plus=0.05, **told, **options
        )
    if kind == "debiased":
        return hard_negative_loss(q, k, temperature=scale, beta=0.0, **told, **options)
    if kind == "siglip":
        return siglip_loss(q, k, 1 / scale, bias, normalize=True, **told, **options)
    if kind == "nt_xent":
        return nt_xent_loss(q, k, temperature=scale, **told, **options)
    if kind == "plain":
        if "ids" in told:
            told["query_ids"] = told["key_ids"] = told.pop("ids")
        return info_nce_loss(q, k, temperature=scale, **told, **options)
    assert kind == "clip"
    return clip_loss(q, k, 1 / scale, normalize=True, **told, **options)


FAMILY = (
    "sup_con", "sup_con+sample_weight", "sup_con+smoothing", "dcl", "dcl+ids", "dclw", "hard",
    "hard+ids", "debiased", "siglip", "siglip+positive_ids", "siglip+sample_weight",
    "nt_xent+ids", "nt_xent+sample_weight", "nt_xent+smoothing", "nt_xent+extra_negatives",
    "plain+ids", "plain+smoothing", "plain+targets", "plain+extra_negatives", "clip+ids",
    "clip+sample_weight", "clip+targets", "clip+smoothing", "uel+sample_weight",
    "uel+ids",
)  # fmt: skip
STACKED = ("nt_xent", "dcl", "dclw", "hard", "debiased", "uel")  # rows of z_i, then of z_j


def family_batch(name, sizes, dtype):
    """The whole batch: (q, k), the other tensors by name, which of those are split by rows."""
    g = torch.Generator().manual_seed(5)
    (q, k), _, _ = batch("nt_xent", sizes, dtype)
    B = len(q)
    ids = torch.randint(0, max(2, B // 2), (B,), generator=g)
    given = {
        "labels": torch.randint(-1, max(1, B // 3), (B,), generator=g),
        "ids": ids,
        "positive_ids": ids,
        "sample_weight": torch.rand(B, generator=g, dtype=torch.float64).to(dtype),
        "targets": torch.rand(B, B, generator=g, dtype=torch.float64).to(dtype),
        "extra_negatives": torch.randn(7, q.shape[1], generator=g, dtype=torch.float64).to(dtype),
    }
    return [q, k], given


def family_loss(rank, name, sizes, dtype, reduction, exchange, compiled=False, device="cpu"):
    """As `one_loss`: (loss, input gradients, gradients of scale, bias and extra negatives)."""
    group = subgroup(len(sizes))
    if rank >= len(sizes):
        return None
    inputs, given = family_batch(name, sizes, dtype)
    split = [v is not given["extra_negatives"] for v in given.values()]
    mine = share(rank, sizes, inputs, [True, True])
    mine = [x.to(device, copy=True).requires_grad_() for x in mine]
    shares = share(rank, sizes, list(given.values()), split)
    given = {n: x.to(device) for n, x in zip(given, shares, strict=True)}
    learned = parameters(given, device)
    options = {"reduction": reduction, "group": group, "exchange": exchange}

    def run(*x):
        return family(name, x, given, *learned[:2], **options)

    if compiled:
        torch._dynamo.reset()
        run = torch.compile(run, fullgraph=True)
    loss = run(*mine)
    (loss * upstream(loss, rank).to(device)).sum().backward()
    grads = [[None if x.grad is None else x.grad.cpu() for x in xs] for xs in (mine, learned)]
    return loss.detach().cpu(), *grads


def parameters(given, device="cpu"):
    """Scale, bias and extra negatives, which may learn."""
    scale = torch.tensor(0.4, dtype=torch.float64, device=device).requires_grad_()
    bias = torch.tensor(-2.0, dtype=torch.float64, device=device).requires_grad_()
    given["extra_negatives"] = given["extra_negatives"].clone().requires_grad_()
    return scale, bias, given["extra_negatives"]


def theirs_and_ours(rank):
    """{mapping of docs/several-processes.md: (their gradients, ours)}, by our drop-ins of theirs,
    which tests/parity holds against the libraries."""
    sizes = (4, 4, 4, 4)
    inputs, split, _ = batch("clip", sizes, torch.float64)
    mine = share(rank, sizes, inputs, split)

    def gradients(loss):
        leaves = [x.clone().requires_grad_() for x in mine]
        loss(*leaves).backward()
        return [x.grad for x in leaves]

    def clip(**options):
        loss = compat_open_clip.ClipLoss(rank=rank, world_size=4, **options)
        return lambda x, y: loss(F.normalize(x, dim=1), F.normalize(y, dim=1), torch.tensor(3.0))

    def ranking(q, k):
        loss = compat_st.MultipleNegativesRankingLoss(None, gather_across_devices=True)
        return loss.compute_loss_from_embeddings([q, k], None)

    def siglip(x, y):
        loss = compat_open_clip.SigLipLoss(rank=rank, world_size=4)
        x, y = F.normalize(x, dim=1), F.normalize(y, dim=1)
        return loss(x, y, torch.tensor(3.0), torch.tensor(-2.0))

    ours = {"group": "world"}
    pairs = {
        "clip, whole loss": (
            clip(local_loss=False, gather_with_grad=True),
            lambda x, y: clip_loss(x, y, 3.0, normalize=True, **ours),
        ),
        "clip, local loss": (
            clip(local_loss=True, gather_with_grad=True),
            lambda x, y: clip_loss(x, y, 3.0, normalize=True, **ours),
        ),
        "clip, no gradient through the gather": (
            clip(local_loss=False, gather_with_grad=False),
            lambda x, y: clip_loss(x, y, 3.0, normalize=True, **ours) / 4,
        ),
        "siglip": (siglip, lambda x, y: siglip_loss(x, y, 3.0, -2.0, normalize=True, **ours)),
        "lightly, gathered": (
            compat_lightly.NTXentLoss(0.3, gather_distributed=True),
            lambda x, y: nt_xent_loss(x, y, temperature=0.3, **ours),
        ),
        "lightly, alone": (
            compat_lightly.NTXentLoss(0.3, gather_distributed=False),
            lambda x, y: nt_xent_loss(x, y, temperature=0.3),
        ),
        "sentence-transformers": (
            ranking,
            lambda q, k: info_nce_loss(q, k, temperature=1 / 20, **ours),
        ),
    }
    return {name: [gradients(loss) for loss in both] for name, both in pairs.items()}


def checked_operators(rank, layout):
    """`opcheck` of every operator over a group: what it returns is what its fake says."""
    g = torch.Generator().manual_seed(rank)
    q, k = (torch.randn(3 + rank, 8, generator=g) for _ in "qk")
    z = torch.cat((q, k))
    rows = torch.rand(len(q), generator=g)
    t = torch.tensor(0.5)
    ids = torch.arange(len(q), dtype=torch.int32)
    place = ("world", "ring", "a_loss: temperature=0.1")
    form = (q, k, None, 1.0, t, True, "nt_xent", True)
    two_rows = torch.rand(2 * len(q), generator=g)
    none, call = q.new_empty(0), (place[0], place[2])
    turned = torch.randn(5, 4, generator=g).t()
    if layout == "transposed":  # what comes back is contiguous all the same
        q, k, z = (x.t().contiguous().t() for x in (q, k, z))
        form = (q, k, *form[2:])
    cases = {
        "group_contrast": [
            (*form, True, False, False, True, "mean", *place),
            (*form, True, True, False, False, "none", *place),
        ],
        "group_contrast_grad": [
            (*form, two_rows, none, two_rows, True, True, False, True, *place),
        ],
        "group_uel": [
            (z, 2.0, 1.5, None, False, both, need, *place)
            for both in (None, torch.cat((ids, ids)))
            for need in (True, False)
        ],
        "group_reduce": [(rows, "mean", *call)],
        "group_average": [(t, *call)],
        "group_lse": [
            (q, k, 2.0, None, "diagonal", ids, ids, wide, *place) for wide in (False, True)
        ],
        "group_grad": [(q, k, 2.0, None, "none", None, None, rows, rows, rows, rows, *place)],
        "group_sigmoid": [
            (q, k, 2.0, None, -1.0, None, rows, None, None, need, not need, *place)
            for need in (True, False)
        ],
        "group_total": [(turned[:2], *call)],
        "group_times_ranks": [(rows, "world")],
    }
    for name, calls in cases.items():
        for args in calls:
            torch.library.opcheck(getattr(torch.ops.clae_fast, name).default, args)
    return sorted(cases)
