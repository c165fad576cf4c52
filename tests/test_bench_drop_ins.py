"""Every drop-in is the loss of a row of the bench, by value and gradients on the row's inputs."""

import importlib
import pkgutil
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import clae_fast.compat
from clae_fast.compat import (
    info_nce,
    lightly,
    open_clip,
    pytorch_metric_learning,
    sentence_transformers,
    solo,
    supcontrast,
)

BENCH = Path(__file__).resolve().parent.parent / "bench"
NO_LOSSES = {"negative_mises_fisher_weights", "cos_sim", "dot_score"}


@pytest.fixture(scope="module")
def bench():
    sys.path.insert(0, str(BENCH))
    names = ("shapes", "own", "gate")
    yield {name: importlib.import_module(name) for name in names}
    sys.path.remove(str(BENCH))
    for name in names:
        del sys.modules[name]


def stacked(loss, shape):
    """Two views, one above the other, with the labels of both."""
    ids = shape.ids("cpu") if shape.classes else torch.arange(shape.pairs)
    return lambda z_i, z_j: loss(torch.cat((z_i, z_j)), ids.repeat(2))


def unit(loss):
    """With rows that the caller normalised."""
    return lambda *xs: loss(*(F.normalize(x, dim=1) for x in xs))


def ranking(shape):
    loss = sentence_transformers.MultipleNegativesRankingLoss(None, 1 / shape.temperature)
    return lambda *columns: loss.compute_loss_from_embeddings(list(columns), None)


def of_views(shape):
    loss = supcontrast.SupConLoss(shape.temperature, base_temperature=shape.temperature)
    return unit(lambda z_i, z_j: loss(torch.stack((z_i, z_j), 1), shape.ids("cpu")))


pml = pytorch_metric_learning
ROWS = (  # drop-in, the row that is its, how to call it
    ("lightly.NTXentLoss", "simclr-128", lambda s: lightly.NTXentLoss(s.temperature)),
    ("lightly.DCLLoss", "dcl-256", lambda s: lightly.DCLLoss(s.temperature)),
    ("lightly.DCLWLoss", "dclw-2048", lambda s: lightly.DCLWLoss(s.temperature)),
    (
        "open_clip.ClipLoss",
        "clip-256-d512",
        lambda s: unit(lambda x, y: open_clip.ClipLoss()(x, y, 1 / s.temperature)),
    ),
    (
        "open_clip.SigLipLoss",
        "siglip-256-d512",
        lambda s: unit(lambda x, y: open_clip.SigLipLoss()(x, y, 1 / s.temperature, -10.0)),
    ),
    (
        "pytorch_metric_learning.NTXentLoss",
        "simclr-128",
        lambda s: stacked(pml.NTXentLoss(s.temperature), s),
    ),
    (
        "pytorch_metric_learning.SupConLoss",
        "supcon-256",
        lambda s: stacked(pml.SupConLoss(s.temperature), s),
    ),
    (
        "pytorch_metric_learning.SelfSupervisedLoss",
        "simclr-128",
        lambda s: pml.SelfSupervisedLoss(pml.SupConLoss(s.temperature)),
    ),
    ("info_nce.InfoNCE", "clae-plain-128", lambda s: info_nce.InfoNCE(s.temperature)),
    (
        "info_nce.info_nce",
        "clae-plain-128",
        lambda s: lambda q, k: info_nce.info_nce(q, k, temperature=s.temperature),
    ),
    ("sentence_transformers.MultipleNegativesRankingLoss", "clae-plain-128", ranking),
    ("sentence_transformers.MultipleNegativesRankingLoss", "mnrl-512-d768", ranking),
    (
        "solo.simclr_loss_func",
        "simclr-128",
        lambda s: stacked(lambda z, ids: solo.simclr_loss_func(z, ids, s.temperature), s),
    ),
    (
        "solo.mocov2plus_loss_func",
        "queue-65536",
        lambda s: unit(lambda q, k, n: solo.mocov2plus_loss_func(q, k, n.T, s.temperature)),
    ),
    ("supcontrast.SupConLoss", "supcon-256", of_views),
)


@pytest.mark.parametrize(("name", "row", "make"), ROWS, ids=[f"{n}-{r}" for n, r, _ in ROWS])
def test_a_row_of_the_bench(name, row, make, bench):
    shape = bench["shapes"].BY_NAME[row]
    shape = shape._replace(queue=min(shape.queue, 500))  # enough to tell
    truth = bench["gate"].Truth(shape)
    got = bench["gate"].gradients(make(shape), truth.inputs, shape.learned)
    assert truth.of(*got).wrong(shape) is None


def test_every_drop_in_has_one():
    libraries = [m.name for m in pkgutil.iter_modules(clae_fast.compat.__path__)]
    there = {
        f"{library}.{name}"
        for library in libraries
        if not library.startswith("_")
        for name in importlib.import_module(f"clae_fast.compat.{library}").__all__
        if name not in NO_LOSSES
    }
    assert {name for name, *_ in ROWS} == there
