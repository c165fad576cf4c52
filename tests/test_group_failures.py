"""A rank that does something else, ends or is stuck: an error that names it, in bounded time."""

import functools

import numpy as np
import pytest
import torch
import torch.distributed as dist
from group_failures import (
    arrives_late,
    differ,
    ends_before,
    ends_within,
    is_stopped,
    is_stuck,
    needs_differ,
    nobody_has_rows,
    raises_alone,
    reinitialised,
    works_on,
)
from processes import Processes, free_port

import clae_fast
from clae_fast.process_group import described

TIMEOUT = 4


@pytest.fixture
def three():
    processes = Processes(3, timeout=TIMEOUT)
    yield processes
    processes.close()


def same(name, fact, first, other):
    return (
        f"{name}: {fact} must be the same on every rank of the group, got {first} on rank 0 and "
        f"{other} on rank 1"
    )


def order(first, other):
    return (
        "the ranks of a group must make the same calls in the same order, got "
        f"{first} on rank 0 and {other} on rank 1"
    )


DISAGREEMENTS = {
    "width": same("nt_xent_loss", "width", 16, 24),
    "dtype": same("nt_xent_loss", "dtype", "torch.float32", "torch.float64"),
    "temperature": same("nt_xent_loss", "temperature", 0.1, 0.2),
    "number or tensor": same("nt_xent_loss", "temperature", 0.1, "a tensor"),
    "reduction": same("nt_xent_loss", "reduction", "mean", "sum"),
    "normalize": same("nt_xent_loss", "normalize", True, False),
    "exchange": same("nt_xent_loss", "exchange", "gather", "ring"),
    "symmetric": same("info_nce_loss", "symmetric", False, True),
    "negative_weight": same("uel_loss", "negative_weight", 1.0, 2.0),
    "queue": same("info_nce_loss", "negative_keys", 5, 7),
    "uel's reduction": same("uel_loss", "reduction", "mean", "sum"),
    "uel's normalize": same("uel_loss", "normalize", True, False),
    "dcl's reduction": same("log-sum-exps of dcl_loss", "reduction", "sum", "mean"),
    "dcl's normalize": same("log-sum-exps of dcl_loss", "normalize", True, False),
    "weight_fn": "weight_fn must be the same on every rank",
    "tau_plus": same("a sum over the ranks of hard_negative_loss", "tau_plus", 0.1, 0.2),
    "beta": same("a sum over the ranks of hard_negative_loss", "beta", 1.0, 0.0),
    "bias": same("a sum over the ranks of siglip_loss", "logit_bias", -10.0, -9.0),
    "loss": order("nt_xent_loss", "uel_loss"),
    "composed loss": order("nt_xent_loss", "log-sum-exps of dcl_loss"),
    "label_smoothing": order("nt_xent_loss", "log-sum-exps of nt_xent_loss"),
    "ids": order("nt_xent_loss", "rows of all ranks of nt_xent_loss"),
    "backward": order("the backward of nt_xent_loss", "nt_xent_loss"),
}


@pytest.mark.parametrize("kind", DISAGREEMENTS)
def test_ranks_that_disagree(four, kind):
    """Every rank raises the same, and the group works on."""
    for good, answer in four.answers(differ, kind):
        assert not good
        assert f"ValueError: {DISAGREEMENTS[kind]}" in answer or (
            kind == "weight_fn" and DISAGREEMENTS[kind] in answer
        ), answer
    assert len(set(four.run(works_on))) == 1


@pytest.mark.parametrize("name", ["nt_xent", "uel", "dcl"])
def test_no_rank_has_a_row(four, name):
    for good, answer in four.answers(nobody_has_rows, name):
        assert not good
        assert "ValueError: " in answer
        assert "no rank of the group has a row" in answer


def test_ranks_that_want_other_gradients(four):
    """Each gets its own, whatever the others want; with ids and without it is the same loss."""
    fused, composed = (four.run(needs_differ, with_ids) for with_ids in (False, True))
    for a, b in zip(fused, composed, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("victim", [1, 2])
def test_a_rank_that_ended(three, victim):
    answers = three.answers(ends_before, victim)
    assert answers[victim] is None
    for rank in {0, 1, 2} - {victim}:
        words, seconds = answers[rank][1]
        assert f"rank {victim} did not take part" in words
        assert seconds < 3 * TIMEOUT


def test_a_rank_that_ends_within_an_exchange(three):
    answers = three.answers(ends_within, 1)
    assert answers[1] is None
    for rank in (0, 2):
        assert "rank 1 did not take part" in answers[rank][1]


def test_a_rank_that_is_stuck(three):
    answers = three.run(is_stuck, 2, 2 * TIMEOUT)
    for words, seconds in answers[:2]:
        assert "rank 2 did not take part" in words
        assert f"{TIMEOUT} s" in words
        assert TIMEOUT - 1 < seconds < 2 * TIMEOUT


def test_a_rank_whose_own_input_is_wrong(three):
    answers = three.run(raises_alone, 0)
    assert "z_j must be" in answers[0][0]
    for words, seconds in answers[1:]:
        assert "rank 0 did not take part" in words
        assert seconds < 2 * TIMEOUT


def test_rank_0_is_stopped_and_its_store_with_it(three):
    """Nobody can tell who is missing; it ends in time all the same."""
    for pipe in three.pipes:
        pipe.send((is_stopped.__module__, is_stopped.__name__, (0,)))
    for pipe in three.pipes[1:]:
        assert pipe.poll(3 * TIMEOUT)
        words, seconds = pipe.recv()[1]
        assert "did not take part" in words
        assert "rank 1" not in words
        assert "rank 2" not in words
        assert seconds < 2 * TIMEOUT


def test_a_rank_that_comes_late_is_not_blamed(three):
    words = three.run(arrives_late)[0]
    assert "rank 2 did not take part" in words


def test_a_new_group_counts_anew(three):
    three.run(works_on)
    answers = three.run(reinitialised, free_port())
    assert answers == ["rank 2 did not take part", "rank 2 did not take part", "was away"]


def test_without_a_process_group():
    z = torch.randn(4, 8)
    assert not dist.is_initialized()
    with pytest.raises(RuntimeError, match="init_process_group"):
        clae_fast.nt_xent_loss(z, z, group="world")
    loss = clae_fast.NTXentLoss(group="world")  # may be made before
    with pytest.raises(RuntimeError, match="init_process_group"):
        loss(z, z)


@pytest.mark.parametrize("group", ["word", 3, [0, 1]])
def test_what_is_no_group(group):
    z = torch.randn(4, 8)
    with pytest.raises(TypeError, match="group must be None .*ProcessGroup .*, got"):
        clae_fast.nt_xent_loss(z, z, group=group)
    with pytest.raises(TypeError, match="group must be"):
        clae_fast.NTXentLoss(group=group)


def test_a_call_is_described_alike_in_all_processes():
    class Weights:
        def __call__(self, a, b):
            return a

    for weight_fn in (Weights(), functools.partial(len), lambda a, b: a, len):
        told = described("dcl_loss", weight_fn=weight_fn, temperature=np.float64(0.1))
        assert "0x" not in told
        assert told.endswith("temperature=0.1")


def test_what_is_no_exchange():
    z = torch.randn(4, 8)
    with pytest.raises(ValueError, match="exchange must be one of .*ring.*, got 'tree'"):
        clae_fast.nt_xent_loss(z, z, exchange="tree")
    with pytest.raises(ValueError, match="exchange must be"):
        clae_fast.UELLoss(exchange="tree")
