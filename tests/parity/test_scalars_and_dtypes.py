"""Temperatures and scales that are tensors, and two dtypes at once, as the libraries take them."""

import importlib

import compare
import pytest
import torch
from pytorch_metric_learning import losses as pml
from sentence_transformers.sentence_transformer import losses as st
from torch import nn

from clae_fast.compat import info_nce, open_clip, solo, supcontrast
from clae_fast.compat import lightly as our_lightly
from clae_fast.compat import pytorch_metric_learning as our_pml
from clae_fast.compat import sentence_transformers as our_st

LABELS = torch.tensor([0, 0, 0, 1, 1, 2])
OTHERS = torch.tensor([0, 1, 0, 3, 1, 2])
MODES = (None, "in_batch_negatives", "hard_negatives", "all_negatives")


def ranking(library, mode, directions):
    def loss(scale, *embeddings):
        made = library.MultipleNegativesRankingLoss(
            nn.Identity(), scale, directions=directions, hardness_mode=mode, hardness_strength=2.0
        )
        return made.compute_loss_from_embeddings(list(embeddings), None)

    return loss


@pytest.mark.parametrize(
    "directions", [("query_to_doc",), ("query_to_doc", "doc_to_query")], ids=len
)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(), (1,)])
def test_scale_of_sentence_transformers(mode, directions, shape):
    scale = torch.full(shape, 3.0, dtype=torch.float64)
    inputs = scale, *(compare.draw(i, 5, 4) for i in range(3))
    pair = [ranking(library, mode, directions) for library in (our_st, st)]
    for dtype in (torch.float64, torch.float32):
        compare.agree(*pair, *inputs, dtype=dtype, t=3 + 2)


def test_scale_in_all_directions():
    """Theirs multiplies -inf by the scale there: its gradient is NaN."""
    embeddings = [compare.draw(i, 4, 3) for i in range(3)]
    loss = ranking(our_st, None, our_st.DIRECTIONS)
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: loss(t, *embeddings), (scale,))


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("way", ["labels", "references", "tuple", "self-supervised"])
@pytest.mark.parametrize("name", ["NTXentLoss", "SupConLoss"])
def test_temperature_of_pytorch_metric_learning(name, way, shape):
    pairs = tuple(torch.tensor(x) for x in ([0, 3], [1, 4], [0, 3], [5, 0]))

    def of(library):
        def loss(t, x, y):
            made = getattr(library, name)(t)
            if way == "self-supervised":
                return library.SelfSupervisedLoss(made)(x, y)
            if way == "references":
                return made(x, LABELS, ref_emb=y, ref_labels=OTHERS)
            return made(x, LABELS, pairs if way == "tuple" else None)

        return loss

    t = torch.full(shape, 0.6, dtype=torch.float64)
    inputs = t, compare.draw(1, 6, 4), compare.draw(2, 6, 4)
    for dtype in (torch.float64, torch.float32):
        compare.agree(of(our_pml), of(pml), *inputs, dtype=dtype, t=1 / 0.6)


@pytest.mark.parametrize("mode", ["all", "one"])
@pytest.mark.parametrize("masked", [False, True])
def test_temperatures_of_supcontrast(mode, masked):
    """Their gradients by differences: the real one is on no index."""
    z = nn.functional.normalize(compare.draw(1, 6, 2 * 4).view(6, 2, 4), dim=2)
    told = {"mask": torch.eye(6) + 0.5} if masked else {"labels": LABELS}

    def loss(t, base):
        return supcontrast.SupConLoss(t, mode, base)(z, **told)

    t, base = (torch.tensor(x, dtype=torch.float64).requires_grad_() for x in (0.5, 0.7))
    torch.testing.assert_close(loss(t, base), loss(0.5, 0.7))
    assert torch.autograd.gradcheck(loss, (t, base))


def test_parameters_of_a_module():
    """They are parameters of the loss too."""
    for made in (
        our_pml.NTXentLoss(nn.Parameter(torch.tensor(0.5))),
        our_st.MultipleNegativesRankingLoss(nn.Identity(), nn.Parameter(torch.tensor(20.0))),
        supcontrast.SupConLoss(nn.Parameter(torch.tensor(0.5))),
    ):
        assert len(list(made.parameters())) == 1


TWO = {
    "lightly.NTXentLoss": (lambda x, y: our_lightly.NTXentLoss(0.2)(x, y), None),
    "lightly.DCLLoss": (lambda x, y: our_lightly.DCLLoss(0.2)(x, y), None),
    "bank": (lambda x, y: our_lightly.NTXentLoss(0.2, (8, 4))(x, y), None),
    "pml.SelfSupervisedLoss": (
        lambda x, y: our_pml.SelfSupervisedLoss(our_pml.SupConLoss())(x, y),
        pml.SelfSupervisedLoss(pml.SupConLoss()),
    ),
    "pml.NTXentLoss": (
        lambda x, y: our_pml.NTXentLoss()(x, LABELS, ref_emb=y, ref_labels=OTHERS),
        None,
    ),
    "sentence_transformers": (
        lambda x, y: ranking(our_st, None, ("query_to_doc",))(5.0, x, y),
        None,
    ),
    "open_clip.ClipLoss": (lambda x, y: open_clip.ClipLoss()(x, y, 3.0), None),
    "open_clip.SigLipLoss": (lambda x, y: open_clip.SigLipLoss()(x, y, 3.0, -1.0), None),
    "info_nce": (lambda x, y: info_nce.InfoNCE()(x, y), None),
    "info_nce, queue": (lambda x, y: info_nce.InfoNCE()(x, x, y), None),
    "solo": (lambda x, y: solo.mocov2plus_loss_func(x, y, y.T.detach()), None),
}


@pytest.mark.parametrize(
    ("a", "b"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float64)], ids=str
)
@pytest.mark.parametrize("name", TWO)
def test_two_dtypes(name, a, b):
    """In the wider of the two; gradients in each one's own."""
    ours, theirs = TWO[name]
    x, y = compare.draw(1, 6, 4).to(a).requires_grad_(), compare.draw(2, 6, 4).to(b)
    y.requires_grad_()
    torch.manual_seed(0)
    loss = ours(x, y)
    loss.backward()
    torch.manual_seed(0)
    expected = ours(x.detach().to(b), y.detach())
    assert loss.dtype == b
    torch.testing.assert_close(loss, expected)
    assert (x.grad.dtype, y.grad is None or y.grad.dtype == b) == (a, True)
    if theirs is not None:
        torch.testing.assert_close(loss, theirs(x, y), rtol=1e-2, atol=1e-2, check_dtype=False)


def test_the_libraries_are_those_of_the_docs():
    """The short imports of docs/migrate.md are of the same classes."""
    for module, name, other in (
        ("open_clip", "ClipLoss", "open_clip.loss"),
        ("sentence_transformers.losses", "MultipleNegativesRankingLoss", st.__name__),
    ):
        one, two = (getattr(importlib.import_module(m), name) for m in (module, other))
        assert one is two
