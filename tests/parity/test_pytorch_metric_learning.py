"""`clae_fast.compat.pytorch_metric_learning` against pytorch-metric-learning."""

import compare
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pytorch_metric_learning import distances, losses, miners, reducers

from clae_fast.compat import pytorch_metric_learning as ours

LOSSES = st.sampled_from(["NTXentLoss", "SupConLoss"])
OPTIONS = {
    "as it comes": dict,
    "dot products": lambda: {
        "distance": distances.DotProductSimilarity(normalize_embeddings=False)
    },
    "mean": lambda: {"reducer": reducers.MeanReducer()},
    "per anchor": lambda: {"reducer": reducers.PerAnchorReducer()},
    "not 0": lambda: {"reducer": reducers.AvgNonZeroReducer()},
}
labels = st.lists(st.integers(-2, 4), min_size=1, max_size=14)


def drawn(seed, n, d):
    return compare.draw(seed, n, d) * 0.3  # dot products of long rows are a lottery


def both(name, temperature, option, **call):
    """The two losses as functions of their float inputs."""

    def of(library):
        loss = getattr(library, name)(temperature, **OPTIONS[option]())

        def run(embeddings, labels=None, ref_emb=None, ref_labels=None):
            return loss(embeddings, labels, ref_emb=ref_emb, ref_labels=ref_labels, **call)

        return run

    return of(ours), of(losses)


@compare.examples
@given(
    LOSSES, compare.seeds, labels, compare.widths, compare.temperatures,
    st.sampled_from(sorted(OPTIONS)), compare.dtypes,
)  # fmt: skip
def test_labels(name, seed, some, d, temperature, option, dtype):
    """Classes of any size, rows without a positive, one class alone, one row alone."""
    inputs = drawn(seed, len(some), d), torch.tensor(some)
    t = (compare.longest(inputs[0]) ** 2 if option == "dot products" else 1) / temperature
    compare.agree(*both(name, temperature, option), *inputs, dtype=dtype, t=t)


@compare.examples
@given(
    LOSSES, compare.seeds, labels, labels, st.booleans(), compare.widths, compare.temperatures,
    compare.dtypes,
)  # fmt: skip
def test_references(name, seed, some, others, same, d, temperature, dtype):
    """Other rows as columns; with the very same labels theirs takes row i for column i."""
    labels = torch.tensor(some)
    ref_labels = labels if same else torch.tensor(others)
    inputs = drawn(seed, len(some), d), labels, drawn(seed + 1, len(ref_labels), d), ref_labels
    compare.agree(*both(name, temperature, "as it comes"), *inputs, dtype=dtype, t=1 / temperature)


@compare.examples
@given(
    LOSSES, compare.seeds, st.integers(1, 12), st.booleans(), compare.widths,
    compare.temperatures, compare.dtypes,
)  # fmt: skip
def test_self_supervised(name, seed, n, symmetric, d, temperature, dtype):
    def of(library):
        return library.SelfSupervisedLoss(getattr(library, name)(temperature), symmetric)

    inputs = drawn(seed, n, d), drawn(seed + 1, n, d)
    compare.agree(of(ours), of(losses), *inputs, dtype=dtype, t=1 / temperature)


@compare.examples
@given(LOSSES, compare.seeds, labels, st.booleans(), compare.widths, compare.dtypes)
def test_miners(name, seed, some, triplets, d, dtype):
    """The tuples of their miners, of pairs and of triplets."""
    inputs = drawn(seed, len(some), d), torch.tensor(some)
    miner = miners.TripletMarginMiner(0.2) if triplets else miners.MultiSimilarityMiner()
    found = miner(*inputs)
    compare.agree(*both(name, 0.5, "as it comes", indices_tuple=found), *inputs, dtype=dtype, t=2)


def test_nt_xent_goes_on_where_theirs_stops():
    """Theirs adds the smallest number inside the logarithm: 87.3 at most, and no gradient."""
    z = torch.tensor([[1.0, 0.0], [-1.0, 0.01], [1.0, 0.0], [-1.0, 0.01]], requires_grad=True)
    labels = torch.tensor([0, 0, 1, 1])
    theirs = losses.NTXentLoss(0.01)(z, labels)
    assert theirs < 87.4
    truth = losses.NTXentLoss(0.01)(z.double(), labels)
    assert truth > 190
    torch.testing.assert_close(ours.NTXentLoss(0.01)(z, labels), truth.float())


def test_a_pair_that_is_positive_and_negative():
    """SupConLoss of both refuses it; NTXentLoss takes it, of both."""
    a, b = torch.tensor([0, 1, 3]), torch.tensor([1, 2, 4])
    z, both_kinds = drawn(0, 6, 3), (a, b, a[1:2], b[1:2])
    for library, error in ((ours, ValueError), (losses, AssertionError)):
        with pytest.raises(error, match="positive"):
            library.SupConLoss()(z, indices_tuple=both_kinds)
        library.SupConLoss()(z, indices_tuple=(a, b, b, a))
    mine, theirs = (x.NTXentLoss()(z, indices_tuple=both_kinds) for x in (ours, losses))
    torch.testing.assert_close(mine, theirs)


def test_reducer_that_reduces_nothing():
    z, labels = drawn(0, 6, 3), torch.tensor([0, 0, 0, 1, 1, 2])
    for name in ("NTXentLoss", "SupConLoss"):
        out = [
            getattr(x, name)(reducer=reducers.DoNothingReducer())(z, labels) for x in (ours, losses)
        ]
        mine, theirs = (x["loss"] for x in out)
        torch.testing.assert_close(mine["losses"], theirs["losses"])
        torch.testing.assert_close(mine["indices"], theirs["indices"])
        assert mine["reduction_type"] == theirs["reduction_type"]


@pytest.mark.parametrize("name", ["NTXentLoss", "SupConLoss"])
def test_refused(name):
    loss = getattr(ours, name)
    for option, value in {
        "distance": distances.LpDistance(),
        "embedding_regularizer": torch.nn.Identity(),
        "collect_stats": True,
    }.items():
        with pytest.raises(NotImplementedError, match=option):
            loss(**{option: value})
    for library in (ours, losses):  # a name that neither knows; a default said aloud
        with pytest.raises(TypeError, match="weight_regularizer"):
            getattr(library, name)(weight_regularizer=1)
        getattr(library, name)(embedding_reg_weight=1, embedding_regularizer=None)
    with pytest.raises(NotImplementedError, match="p=2"):
        loss(distance=distances.CosineSimilarity(p=1))
    with pytest.raises(NotImplementedError, match="TripletMarginLoss"):
        ours.SelfSupervisedLoss(losses.TripletMarginLoss())
    with pytest.raises(ValueError, match="labels and indices_tuple"):
        loss()(torch.randn(3, 2))
    with pytest.raises(ValueError, match=r"labels must be \(3,\)"):
        loss()(torch.randn(3, 2), torch.arange(4))


@pytest.mark.parametrize("name", ["NTXentLoss", "SupConLoss"])
def test_inside_cross_batch_memory(name):
    """A wrapper of theirs: references from past batches, and pairs as tuples."""
    labels = torch.tensor([0, 0, 1, 1, 2])
    out = []
    for library in (ours, losses):
        memory = losses.CrossBatchMemory(getattr(library, name)(0.3), 3, memory_size=12)
        out.append([float(memory(drawn(i, 5, 3), labels)) for i in range(4)])
    assert out[0] == pytest.approx(out[1])


def subclass(library, name):
    """Their extension points that say how rows are compared, and how losses become one."""

    class Mine(getattr(library, name)):
        def get_default_distance(self):
            return distances.DotProductSimilarity(normalize_embeddings=False)

        def get_default_reducer(self):
            return reducers.PerAnchorReducer()

    return Mine


@pytest.mark.parametrize("name", ["NTXentLoss", "SupConLoss"])
def test_default_distance_and_reducer_of_a_subclass(name):
    inputs = drawn(3, 6, 3), torch.tensor([0, 0, 0, 1, 1, 2])
    pair = [subclass(library, name)(0.7) for library in (ours, losses)]
    compare.agree(*pair, *inputs, dtype=torch.float64)
    plain = getattr(ours, name)(0.7)(*inputs)
    assert abs(plain - pair[0](*inputs)) > 1e-3


@pytest.mark.parametrize("name", ["NTXentLoss", "SupConLoss"])
def test_what_users_read(name):
    """`distance` and `reducer` of a loss, called by hand and replaced."""
    mine, theirs = (getattr(library, name)(0.7) for library in (ours, losses))
    z, labels = drawn(4, 6, 3), torch.tensor([0, 0, 0, 1, 1, 2])
    torch.testing.assert_close(mine.distance(z), theirs.distance(z))
    torch.testing.assert_close(mine.distance(z, z[:2]), theirs.distance(z, z[:2]))
    for attribute in ("p", "power", "normalize_embeddings", "is_inverted"):
        assert getattr(mine.distance, attribute) == getattr(theirs.distance, attribute)
    for value in ("embedding_regularizer", "embedding_reg_weight", "collect_stats"):
        assert getattr(mine, value) == getattr(theirs, value)
    assert type(mine.reducer).__name__ == type(theirs.reducer).__name__
    for loss in (mine, theirs):
        loss.distance = distances.DotProductSimilarity(normalize_embeddings=False)
        loss.reducer = reducers.MeanReducer()
    compare.agree(mine, theirs, z, labels, dtype=torch.float64)


@pytest.mark.parametrize("symmetric", [True, False])
def test_self_supervised_calls_a_forward_of_the_user(symmetric):
    def of(library):
        class Doubled(library.NTXentLoss):
            def forward(self, *args, **kwargs):
                return 2 * super().forward(*args, **kwargs)

        Doubled.__name__ = "NTXentLoss"  # theirs looks at the name
        return library.SelfSupervisedLoss(Doubled(0.3), symmetric)

    compare.agree(of(ours), of(losses), drawn(1, 5, 3), drawn(2, 5, 3), dtype=torch.float64)
