"""The loss family and its options over 2 and 4 processes against one process in float64."""

import pytest
import torch
from group_losses import FAMILY, STACKED, family, family_batch, family_loss, parameters, upstream
from test_group_losses import SIZES, close


def rows_of_ranks(name, rows, sizes):
    kind = name.partition("+")[0]
    if kind in STACKED:
        halves = [half.split(list(sizes)) for half in rows.chunk(2)]
        return [torch.cat(pair) for pair in zip(*halves, strict=True)]
    if kind == "sup_con":  # the views of a sample lie side by side
        return rows.split([2 * n for n in sizes])
    return rows.split(list(sizes))


def truth(name, sizes, dtype, reduction):
    inputs, given = family_batch(name, sizes, dtype)
    whole = [x.double().requires_grad_() for x in inputs]
    given = {n: x.double() if x.is_floating_point() else x for n, x in given.items()}
    learned = parameters(given)
    loss = family(name, whole, given, *learned[:2], reduction=reduction, backend="reference")
    objective = 1.5 * loss
    if reduction == "none":
        rows = rows_of_ranks(name, loss, sizes)
        parts = [(x * upstream(x, rank)).sum() for rank, x in enumerate(rows)]
        objective = torch.stack(parts).sum() / len(sizes)
    objective.backward()
    return loss.detach(), [x.grad for x in whole], [x.grad for x in learned]


def check(name, sizes, dtype, reduction, answers):
    W, tolerance = len(sizes), {torch.float64: 1e-11, torch.float32: 2e-5}[dtype]
    loss, grads, learned = truth(name, sizes, dtype, reduction)
    answers = answers[:W]
    if reduction == "none":
        for rows, answer in zip(rows_of_ranks(name, loss, sizes), answers, strict=True):
            close(answer[0], rows, tolerance)
    else:
        for answer in answers:
            close(answer[0], loss, tolerance)
    for i, expected in enumerate(grads):
        close(torch.cat([answer[1][i] for answer in answers]) / W, expected, tolerance)
    scale, bias, extra = learned
    for answer in answers:  # the same number on every rank
        for got, expected in zip(answer[2][:2], (scale, bias), strict=True):
            assert (got is None) == (expected is None)
            if got is not None:
                close(got, expected, tolerance)
    if extra is not None:  # each rank its rows' share: DDP's average is the whole
        close(torch.stack([answer[2][2] for answer in answers]).mean(0), extra, tolerance)


@pytest.mark.parametrize("exchange", ["gather", "ring"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("sizes", [SIZES["2"], SIZES["4-uneven"]], ids=["2", "4-uneven"])
@pytest.mark.parametrize("name", FAMILY)
def test_loss(four, name, sizes, reduction, exchange):
    answers = four.run(family_loss, name, sizes, torch.float64, reduction, exchange)
    check(name, sizes, torch.float64, reduction, answers)


@pytest.mark.parametrize("name", FAMILY)
def test_float32(four, name):
    sizes = SIZES["4-uneven"]
    answers = four.run(family_loss, name, sizes, torch.float32, "mean", "ring")
    check(name, sizes, torch.float32, "mean", answers)


@pytest.mark.parametrize("name", ["dcl", "hard", "debiased", "siglip", "nt_xent+sample_weight"])
def test_compiled(four, name):
    answers = four.run(family_loss, name, (4, 1), torch.float64, "mean", "ring", True)
    check(name, (4, 1), torch.float64, "mean", answers)
