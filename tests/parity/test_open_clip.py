"""`clae_fast.compat.open_clip` against open_clip_torch."""

import compare
import open_clip
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from clae_fast.compat import open_clip as ours


@compare.examples
@given(
    compare.seeds,
    compare.batches,
    compare.widths,
    compare.scales,
    st.booleans(),
    st.booleans(),
    compare.dtypes,
)
def test_clip(seed, n, d, scale, with_bias, output_dict, dtype):
    """Also the gradients of the scale and of the bias."""
    rows = [F.normalize(compare.draw(seed + i, n, d), dim=1) for i in range(2)]
    numbers = [torch.tensor(x, dtype=torch.float64) for x in (scale, -3.0)[: 1 + with_bias]]

    def loss(library):
        def run(*inputs):
            out = library.ClipLoss()(*inputs, output_dict=output_dict)
            return out["contrastive_loss"] if output_dict else out

        return run

    compare.agree(loss(ours), loss(open_clip), *rows, *numbers, dtype=dtype, t=scale)


def test_logits_and_labels_on_request():
    x, y = (F.normalize(compare.draw(i, 5, 3), dim=1) for i in range(2))
    for a, b in zip(
        *(library.ClipLoss().get_logits(x, y, 7.0, -1.0) for library in (ours, open_clip)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
    labels = [library.ClipLoss().get_ground_truth(x.device, 5) for library in (ours, open_clip)]
    assert labels[0].equal(labels[1])


@compare.examples
@given(
    compare.seeds,
    st.integers(1, 17),
    compare.widths,
    compare.scales,
    st.booleans(),
    st.sampled_from([None, "bidir", "shift", "reduce", "gather"]),
    compare.dtypes,
)
def test_siglip(seed, n, d, scale, with_bias, exchange, dtype):
    """Also the gradients of the scale and of the bias; one process does not exchange."""
    rows = [F.normalize(compare.draw(seed + i, n, d), dim=1) for i in range(2)]
    numbers = [torch.tensor(x, dtype=torch.float64) for x in (scale, -3.0)[: 1 + with_bias]]

    def loss(library):
        def run(x, y, t, bias=None):
            return library.SigLipLoss(dist_impl=exchange)(x, y, t, bias)

        return run

    compare.agree(loss(ours), loss(open_clip.loss), *rows, *numbers, dtype=dtype, t=scale)


def test_siglip_logits_and_labels_on_request():
    x, y = (F.normalize(compare.draw(i, 5, 3), dim=1) for i in range(2))
    mine, theirs = ours.SigLipLoss(), open_clip.loss.SigLipLoss()
    torch.testing.assert_close(mine.get_logits(x, y, 7.0, -1.0), theirs.get_logits(x, y, 7.0, -1.0))
    for negative_only in (False, True):
        labels = [
            loss.get_ground_truth(x.device, x.dtype, 5, negative_only) for loss in (mine, theirs)
        ]
        assert labels[0].equal(labels[1])
    out = mine(x, y, 7.0, -1.0, output_dict=True)
    assert out.keys() == theirs(x, y, 7.0, -1.0, output_dict=True).keys()
