"""A rank that does something else, ends or is stuck: an error that names it, in bounded time."""

import re

import pytest
import torch
import torch.distributed as dist
from group_failures import differ, ends_before, ends_within, is_stuck, raises_alone
from processes import Processes

import clae_fast

TIMEOUT = 6


@pytest.fixture
def three():
    processes = Processes(3, timeout=TIMEOUT)
    yield processes
    processes.close()


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (
            "width",
            "the width must be the same on every rank .* got 16 on rank 0 and 24 on rank 1",
        ),
        ("temperature", "the scale .* got 10 on rank 0 and 5 on rank 1"),
        ("queue", "negative_keys .* got 5 on rank 0 and 7 on rank 1"),
        ("weight", "negative_weight .* got 1 on rank 0 and 2 on rank 1"),
        ("normalize", "normalize .* got 1 on rank 0 and 0 on rank 1"),
        ("dtype", "the dtype .* rank 1"),
        ("reduction", "reduction .* rank 1"),
        ("exchange", "exchange .* rank 1"),
        ("loss", "form .* rank 1"),
    ],
)
def test_ranks_that_disagree(four, kind, words):
    """Every rank raises the same kind of error, and the group works on."""
    for good, answer in four.answers(differ, kind):
        assert not good
        assert re.search(f"ValueError: .*{words}", answer), answer


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
    answers = three.run(is_stuck, 2, 3 * TIMEOUT)
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
    with pytest.raises(TypeError, match="group must be None .*ProcessGroup, got"):
        clae_fast.nt_xent_loss(z, z, group=group)
    with pytest.raises(TypeError, match="group must be"):
        clae_fast.NTXentLoss(group=group)


def test_what_is_no_exchange():
    z = torch.randn(4, 8)
    with pytest.raises(ValueError, match="exchange must be one of .*ring.*, got 'tree'"):
        clae_fast.nt_xent_loss(z, z, exchange="tree")
    with pytest.raises(ValueError, match="exchange must be"):
        clae_fast.UELLoss(exchange="tree")
