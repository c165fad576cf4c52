"""One process of `test_two_processes`: ours and theirs on the same share of a batch."""

import gc
import itertools
import os
import sys

import open_clip
import torch
import torch.distributed as dist
from lightly import loss as lightly
from sentence_transformers.sentence_transformer import losses as sentence_transformers
from torch import nn

from clae_fast.compat import lightly as our_lightly
from clae_fast.compat import open_clip as our_open_clip
from clae_fast.compat import sentence_transformers as our_sentence_transformers
from clae_fast.compat import solo

B, D = 5, 4


def weights(out0, out1):
    return ((out0 - out1) ** 2).sum(1)


def lightly_cases():
    for name, options in (
        ("NTXentLoss", {"temperature": 0.3}),
        ("NTXentLoss", {"temperature": -0.3}),
        ("NTXentLoss", {"memory_bank_size": (7, D)}),
        ("DCLLoss", {"weight_fn": weights}),
        ("DCLWLoss", {"sigma": 0.3}),
    ):
        for gathered in (False, True):
            said = {**options, "gather_distributed": gathered}
            yield (
                f"lightly.{name}({said})",
                [getattr(library, name)(**said).double() for library in (our_lightly, lightly)],
            )


def open_clip_cases(rank):
    for local, with_grad in itertools.product((False, True), repeat=2):
        yield (
            f"open_clip.ClipLoss({local}, {with_grad})",
            [
                library.ClipLoss(local, with_grad, rank=rank, world_size=2)
                for library in (our_open_clip, open_clip)
            ],
        )
    for exchange in ("bidir", "shift", "reduce", "gather"):
        yield (
            f"open_clip.SigLipLoss({exchange})",
            [
                library.SigLipLoss(rank=rank, world_size=2, dist_impl=exchange)
                for library in (our_open_clip, open_clip.loss)
            ],
        )


def sentence_transformers_cases():
    for options in (
        {},
        {"directions": ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")},
        {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"},
        {"hardness_mode": "all_negatives", "hardness_strength": 2.0},
    ):
        losses = [
            library.MultipleNegativesRankingLoss(
                nn.Identity(), gather_across_devices=True, **options
            )
            for library in (our_sentence_transformers, sentence_transformers)
        ]

        def on_columns(loss):
            return lambda *columns: loss.compute_loss_from_embeddings(list(columns), None)

        yield f"sentence_transformers({options})", [on_columns(loss) for loss in losses]


def simclr(rank):
    """solo-learn's, written out: own rows against all, which get their gradient back."""
    indexes = torch.arange(3 * B).repeat(2)[torch.tensor([0, 7, 3, 4, 1, 2, 4, 0, 3, 3]) + rank]

    def theirs(x, y):
        z = nn.functional.normalize(torch.cat((x, y)), dim=1)
        everyone = torch.cat(dist.nn.functional.all_gather(z))
        ids = [torch.empty_like(indexes) for _ in range(2)]
        dist.all_gather(ids, indexes)
        same = indexes[:, None] == torch.cat(ids)
        s = z @ everyone.T / 0.2
        s[:, rank * 2 * B :].fill_diagonal_(-torch.inf)
        return (s.logsumexp(1) - s.masked_fill(~same, -torch.inf).logsumexp(1)).mean()

    return lambda x, y: solo.simclr_loss_func(torch.cat((x, y)), indexes, 0.2), theirs


def outcome(loss, inputs, scalars=()):
    leaves = [x.clone().requires_grad_() for x in (*inputs, *scalars)]
    value = loss(*leaves)
    (3 * value).backward()
    return [value.detach(), *(x.grad for x in leaves)]


def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    g = torch.Generator().manual_seed(rank)
    columns = [torch.randn(B, D, generator=g, dtype=torch.float64) for _ in range(4)]
    unit = [nn.functional.normalize(x, dim=1) for x in columns[:2]]
    numbers = [torch.tensor(x, dtype=torch.float64) for x in (7.0, -2.0)]
    wrong = []

    def compare(name, losses, inputs, scalars=()):
        mine, theirs = (outcome(loss, inputs, scalars) for loss in losses)
        for i, (a, b) in enumerate(zip(mine, theirs, strict=True)):
            zero = torch.zeros((), dtype=torch.float64)
            a, b = (zero if x is None else x for x in (a, b))
            if not torch.allclose(a, b, rtol=1e-9, atol=1e-12):
                wrong.append(f"{name}, rank {rank}, {i}: {a} is not {b}")

    for name, losses in lightly_cases():
        banks = [getattr(loss, "memory_bank", None) for loss in losses]
        if banks[0] is not None:
            banks[0].bank.copy_(banks[1].bank)
        for _ in range(2):  # the second looks at the bank that the first left
            compare(name, losses, columns[:2])
        if banks[0] is not None and not banks[0].bank.allclose(banks[1].bank):
            wrong.append(f"{name}: another bank")
    for name, losses in open_clip_cases(rank):
        compare(name, losses, unit, numbers)
    for name, losses in sentence_transformers_cases():
        compare(name, losses, columns)
    compare("solo.simclr", simclr(rank), columns[:2])
    torch.save(wrong, f"{folder}/{rank}.pt")
    dist.barrier()
    gc.collect()
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads may outlive the interpreter and abort it


if __name__ == "__main__":
    worker(int(sys.argv[1]), sys.argv[2])
