"""On the meta device: shapes for every loss and option, or a refusal by name."""

import pytest
import torch

import clae_fast as cf

B, D, M = 6, 4, 3


def z(*shape):
    return torch.empty(shape or (B, D), device="meta")


def ids(n=B):
    return torch.empty(n, dtype=torch.long, device="meta")


ALL = {"ids": ids(), "extra_negatives": z(M, D), "extra_ids": ids(M), "sample_weight": z(B)}
BOTH = {"query_ids": ids(), "key_ids": ids()}
LOSSES = {
    "nt_xent": (2 * B, lambda t, **o: cf.nt_xent_loss(z(), z(), temperature=t, **o)),
    "nt_xent, options": (
        2 * B,
        lambda t, **o: cf.nt_xent_loss(z(), z(), temperature=t, label_smoothing=0.1, **ALL, **o),
    ),
    "info_nce": (B, lambda t, **o: cf.info_nce_loss(z(), z(), temperature=t, **o)),
    "queue": (B, lambda t, **o: cf.info_nce_loss(z(), z(), z(M, D), temperature=t, **o)),
    "ids": (B, lambda t, **o: cf.info_nce_loss(z(), z(), temperature=t, **BOTH, **o)),
    "targets": (B, lambda t, **o: cf.info_nce_loss(z(), z(), temperature=t, targets=z(B, B), **o)),
    "paired": (
        B,
        lambda t, **o: cf.info_nce_loss(
            z(), z(), z(B, M, D), temperature=t, negative_mode="paired", **o
        ),
    ),
    "uel": (2 * B, lambda t, **o: cf.uel_loss(z(), z(), temperature=t, **o)),
    "uel, options": (
        2 * B,
        lambda t, **o: cf.uel_loss(z(), z(), temperature=t, ids=ids(), sample_weight=z(B), **o),
    ),
    "clip": (B, lambda t, **o: cf.clip_loss(z(), z(), t, **o)),
    "clip, options": (B, lambda t, **o: cf.clip_loss(z(), z(), t, **ALL, **o)),
    "siglip": (B, lambda t, **o: cf.siglip_loss(z(), z(), t, -1.0, sample_weight=z(B), **o)),
    "sup_con": (
        B,
        lambda t, **o: cf.sup_con_loss(
            z(), ids(), temperature=t, label_smoothing=0.1, extra_negatives=z(M, D), **o
        ),
    ),
    "dcl": (2 * B, lambda t, **o: cf.dcl_loss(z(), z(), temperature=t, **ALL, **o)),
    "hard": (2 * B, lambda t, **o: cf.hard_negative_loss(z(), z(), temperature=t, **ALL, **o)),
}


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_shapes(name, learned):
    rows, loss = LOSSES[name]
    t = torch.empty((), device="meta") if learned else 0.5
    assert loss(t).shape == ()
    assert loss(t, reduction="none").shape[0] == rows
    assert loss(t, reduction="none").device.type == "meta"


def test_statistics_and_queue():
    assert all(x.shape == () for x in cf.pair_stats(z(), z()))
    queue = cf.MemoryQueue(8, D, ids=True, device="meta")
    queue.enqueue(z(), ids())
    assert queue().shape == (B, D)
    assert queue.key_ids().shape == (B,)


def test_refused_by_name():
    with pytest.raises(ValueError, match="positive_ids must have values"):
        cf.siglip_loss(z(), z(), 1.0, 0.0, positive_ids=ids())
