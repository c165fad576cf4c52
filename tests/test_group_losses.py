"""Losses over 2 and 4 processes against the single process in float64."""

import pytest
import torch
from group_losses import (
    LOSSES,
    batch,
    bind,
    checked_operators,
    one_loss,
    theirs_and_ours,
    train,
    upstream,
)

SIZES = {"2": (3, 3), "2-uneven": (4, 1), "4": (2, 2, 2, 2), "4-uneven": (3, 1, 0, 5)}


def truth(name, sizes, dtype, reduction):
    """Loss, input gradients (of the average over the ranks) and the scale's, in float64."""
    inputs, split, scale = batch(name, sizes, dtype)
    whole = [x.double().requires_grad_() for x in inputs]
    t = scale.clone().requires_grad_()
    loss = bind(name, t, reduction=reduction, backend="reference")(*whole)
    if reduction == "none":
        objective = 0.0
        for rank, rows in enumerate(rows_of_ranks(name, loss, sizes)):
            objective = objective + (rows * upstream(rows, rank)).sum() / len(sizes)
    else:
        objective = loss * 1.5
    objective.backward()
    return loss.detach(), [x.grad for x in whole], t.grad, split


def rows_of_ranks(name, rows, sizes):
    if name in ("nt_xent", "uel"):  # rows of z_i, then of z_j
        halves = [half.split(list(sizes)) for half in rows.chunk(2)]
        return [torch.cat(pair) for pair in zip(*halves, strict=True)]
    return rows.split(list(sizes))


def close(got, expected, tolerance):
    error = (got.double() - expected).norm() / expected.norm().clamp_min(1e-30)
    assert error <= tolerance, float(error)


def check(name, sizes, dtype, reduction, answers):
    W, tolerance = len(sizes), {torch.float64: 1e-12, torch.float32: 2e-5}[dtype]
    loss, grads, dt, split = truth(name, sizes, dtype, reduction)
    answers = answers[:W]
    if reduction == "none":
        for rows, answer in zip(rows_of_ranks(name, loss, sizes), answers, strict=True):
            close(answer[0], rows, tolerance)
    else:
        for answer in answers:
            close(answer[0], loss, tolerance)
            for by_autograd, fused in zip(answer[1], answer[3], strict=True):
                close(fused * 1.5, by_autograd.double(), 1e-6)
    for i, (expected, part) in enumerate(zip(grads, split, strict=True)):
        got = [answer[1][i] for answer in answers]
        # What DDP's average makes of the ranks' gradients is the single process's.
        mean = torch.cat(got) / W if part else torch.stack(got).mean(0)
        close(mean, expected, tolerance)
    for answer in answers:
        close(answer[2], dt, tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("exchange", ["gather", "ring"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("name", LOSSES)
def test_loss(four, name, sizes, reduction, exchange, dtype):
    answers = four.run(one_loss, name, sizes, dtype, reduction, exchange)
    check(name, sizes, dtype, reduction, answers)


@pytest.mark.parametrize("backend", ["reference", "cpp", "triton"])
@pytest.mark.parametrize("name", [n for n in LOSSES if n != "paired"])
def test_forced_backend(four, name, backend):
    answers = four.run(one_loss, name, (3, 1, 0, 5), torch.float32, "mean", "ring", False, backend)
    check(name, (3, 1, 0, 5), torch.float32, "mean", answers)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", LOSSES)
def test_compiled(four, name, reduction):
    """One graph without a break, with the collectives inside."""
    answers = four.run(one_loss, name, (4, 1), torch.float64, reduction, "ring", True)
    check(name, (4, 1), torch.float64, reduction, answers)


@pytest.mark.parametrize("exchange", ["gather", "ring"])
@pytest.mark.parametrize("name", LOSSES)
def test_three_steps_of_training(four, name, exchange):
    """DDP over 4 ranks with uneven shares against one process with the whole batch."""
    sizes = (3, 1, 2, 5)
    expected = train(None, name, sizes, exchange)
    for weights in four.run(train, name, sizes, exchange):
        for got, there in zip(weights, expected, strict=True):
            close(got, there, 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LOSSES)
def test_half_precision(four, name, dtype):
    """Computed in float32, gradients in the dtype of the embeddings."""
    answers = four.run(one_loss, name, (2, 2, 2, 2), dtype, "sum", "ring")
    loss, grads, dt, split = truth(name, (2, 2, 2, 2), dtype, "sum")
    for answer in answers:
        assert answer[0].dtype == torch.float32
        close(answer[0], loss, 1e-5)
        close(answer[2], dt, 1e-5)
    for i, (expected, part) in enumerate(zip(grads, split, strict=True)):
        got = [answer[1][i] for answer in answers]
        assert got[0].dtype == dtype
        mean = torch.cat(got).double() / 4 if part else torch.stack(got).double().mean(0)
        close(mean, expected, 5e-3)


def test_the_same_bits_twice(four):
    for name in LOSSES:
        runs = [four.run(one_loss, name, (3, 1, 0, 5), torch.float32, "sum", "ring") for _ in "ab"]
        for first, second in zip(*runs, strict=True):
            torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_every_rank_has_the_same_loss(four):
    for name in LOSSES:
        losses = [
            a[0] for a in four.run(one_loss, name, (3, 1, 0, 5), torch.float32, "mean", "gather")
        ]
        assert all(torch.equal(x, losses[0]) for x in losses)


def test_what_other_libraries_call_it(four):
    """The table of docs/several-processes.md: gradients of every rank, or their fixed multiple."""
    for found in four.run(theirs_and_ours):
        assert len(found) == 7
        for name, (theirs, ours) in found.items():
            for a, b in zip(theirs, ours, strict=True):
                error = (a - b).norm() / b.norm()
                assert error < 1e-9, (name, float(error))


@pytest.mark.parametrize("layout", ["rows", "transposed"])
def test_operators(four, layout):
    every = sorted(name for name in dir(torch.ops.clae_fast) if name.startswith("group_"))
    assert every
    for names in four.run(checked_operators, layout):
        assert set(every) <= set(names)
