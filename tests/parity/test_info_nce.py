"""`clae_fast.compat.info_nce` against info-nce-pytorch."""

import compare
import info_nce as peer
import torch
from hypothesis import given
from hypothesis import strategies as st

from clae_fast.compat import info_nce as ours


@compare.examples
@given(
    compare.seeds,
    compare.batches,
    st.integers(1, 30),
    compare.widths,
    st.sampled_from(["batch", "unpaired", "paired", "batch, said paired"]),
    st.sampled_from(["mean", "sum", "none"]),
    compare.temperatures,
    compare.dtypes,
)
def test_value_and_gradients(seed, n, m, d, negatives, reduction, temperature, dtype):
    """Also that of the temperature."""
    shapes = {"unpaired": (m, d), "paired": (n, m, d)}
    mode = "paired" if "paired" in negatives.split()[-1:] else "unpaired"
    inputs = [compare.draw(seed, n, d), compare.draw(seed + 1, n, d)]
    if negatives in shapes:
        inputs.append(compare.draw(seed + 2, *shapes[negatives]))

    def loss(library):
        def run(t, *rows):
            return library.InfoNCE(t, reduction, mode)(*rows)

        return run

    t = torch.tensor(temperature, dtype=torch.float64)
    compare.agree(loss(ours), loss(peer), t, *inputs, dtype=dtype, t=1 / temperature)


def test_function():
    q, k = compare.draw(0, 5, 3), compare.draw(1, 5, 3)
    assert torch.allclose(ours.info_nce(q, k), peer.info_nce(q, k))


def test_one_row():
    q, k = compare.draw(0, 1, 3), compare.draw(1, 1, 3)
    compare.agree(ours.InfoNCE(), peer.InfoNCE(), q, k, dtype=torch.float64, t=10)


def test_no_negatives_at_all():
    q, k, none = compare.draw(0, 4, 3), compare.draw(1, 4, 3), torch.empty(0, 3)
    compare.agree(ours.InfoNCE(), peer.InfoNCE(), q, k, none, dtype=torch.float32, t=10)


def test_learned_temperature_is_a_parameter_as_theirs():
    t = torch.nn.Parameter(torch.tensor(0.1))
    assert ours.InfoNCE(t).state_dict() == peer.InfoNCE(t).state_dict()
