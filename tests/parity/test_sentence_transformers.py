"""`clae_fast.compat.sentence_transformers` against sentence-transformers."""

import compare
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sentence_transformers import util
from sentence_transformers.sentence_transformer import losses as peer
from torch import nn

from clae_fast.compat import sentence_transformers as ours

MODEL = nn.Identity()
JOINT = st.lists(
    st.sampled_from(["query_to_query", "doc_to_query", "doc_to_doc"]), unique=True
).map(lambda more: (("query_to_doc", *more), "joint"))
APART = st.sampled_from(
    [(("query_to_doc",), "per_direction"), (("query_to_doc", "doc_to_query"), "per_direction")]
)
HARDNESS = st.sampled_from([None, "in_batch_negatives", "hard_negatives", "all_negatives"])


def both(*args, similarity="cos_sim", **options):
    def of(library, functions):
        loss = library.MultipleNegativesRankingLoss(
            MODEL, *args, similarity_fct=getattr(functions, similarity), **options
        )
        return lambda *embeddings: loss.compute_loss_from_embeddings(list(embeddings), None)

    return of(ours, ours), of(peer, util)


@compare.examples
@given(
    compare.seeds,
    st.integers(1, 12),
    st.integers(0, 3),
    compare.widths,
    compare.scales,
    st.one_of(JOINT, APART),
    HARDNESS,
    st.floats(0.5, 9.0),
    compare.dtypes,
)
def test_cosines(seed, n, negatives, d, scale, directions, hardness, strength, dtype):
    """Directions, partitions, hardness and hard negatives of any number; one query alone."""
    columns = [compare.draw(seed + i, n, d) for i in range(2 + negatives)]
    losses = both(
        scale,
        directions=directions[0],
        partition_mode=directions[1],
        hardness_mode=hardness,
        hardness_strength=strength,
    )
    compare.agree(*losses, *columns, dtype=dtype, t=scale + strength)


@compare.examples
@given(compare.seeds, compare.batches, st.integers(0, 2), compare.widths, HARDNESS, compare.dtypes)
def test_dot_products(seed, n, negatives, d, hardness, dtype):
    columns = [compare.draw(seed + i, n, d) * 0.3 for i in range(2 + negatives)]
    options = {"hardness_mode": hardness, "hardness_strength": 1.0, "similarity": "dot_score"}
    t = 2 * compare.longest(*columns) ** 2  # the hardness adds as much again
    compare.agree(*both(1.0, **options), *columns, dtype=dtype, t=t)


@compare.examples
@given(
    compare.seeds,
    st.integers(1, 12),
    st.integers(0, 3),
    compare.widths,
    compare.scales,
    st.booleans(),
    compare.dtypes,
)
def test_info_nce(seed, n, negatives, d, scale, symmetric, dtype):
    """Their default and their symmetric loss: one fused loss of ours where it can be."""
    columns = [compare.draw(seed + i, n, d) for i in range(2 + negatives)]
    options = {}
    if symmetric:
        options = {
            "directions": ("doc_to_query", "query_to_doc"),
            "partition_mode": "per_direction",
        }
    compare.agree(*both(scale, **options), *columns, dtype=dtype, t=scale)


class Table(nn.Module):
    """A model as theirs are: features in, `sentence_embedding` out."""

    def __init__(self):
        super().__init__()
        self.rows = nn.Embedding(20, 6)

    def get_embedding_dimension(self):
        return 6

    def forward(self, features):
        return {"sentence_embedding": self.rows(features["input_ids"])[:, 0]}


def test_through_a_model():
    """The loss, the gradient of the model and the state, as theirs."""
    torch.manual_seed(0)
    model = Table()
    features = [{"input_ids": torch.randint(0, 20, (5, 1))} for _ in range(3)]
    out = []
    for library in (ours, peer):
        model.zero_grad()
        module = library.MultipleNegativesRankingLoss(model)
        loss = module(features, None)
        loss.backward()
        out.append((loss, model.rows.weight.grad.clone(), module.get_config_dict()))
        assert module.state_dict().keys() == {"model.rows.weight"}
        assert module.temperature == 0.05
    torch.testing.assert_close(out[0][:2], out[1][:2], rtol=1e-5, atol=1e-6)
    assert out[0][2] == out[1][2]


def test_their_functions_are_known():
    for function in (util.cos_sim, util.dot_score, util.pytorch_cos_sim):
        ours.MultipleNegativesRankingLoss(MODEL, similarity_fct=function)


@pytest.mark.parametrize("function", [util.manhattan_sim, torch.mm, lambda a, b: a @ b.T])
def test_other_similarities_are_refused(function):
    with pytest.raises(NotImplementedError, match="similarity_fct"):
        ours.MultipleNegativesRankingLoss(MODEL, similarity_fct=function)


@pytest.mark.parametrize(
    "options",
    [
        {"scale": 0.0},
        {"directions": ()},
        {"directions": ("doc_to_query",)},
        {"directions": ("query_to_doc", "sideways")},
        {"partition_mode": "both"},
        {"partition_mode": "per_direction", "directions": ("query_to_doc", "doc_to_doc")},
        {"hardness_mode": "all"},
        {"hardness_strength": -1.0},
    ],
)
def test_both_refuse(options):
    for library in (ours, peer):
        with pytest.raises(ValueError, match=r"[Ss]cale|irection|hardness"):
            library.MultipleNegativesRankingLoss(MODEL, **options)


def test_inside_matryoshka():
    """A wrapper of theirs that calls the loss once a width."""
    torch.manual_seed(0)
    model = Table()
    features = [{"input_ids": torch.randint(0, 20, (5, 1))} for _ in range(2)]
    out = []
    for library in (ours, peer):
        wrapped = peer.MatryoshkaLoss(model, library.MultipleNegativesRankingLoss(model), [6, 3])
        out.append(wrapped(features, None))
    torch.testing.assert_close(*out)
