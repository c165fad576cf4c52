"""`clae_fast.compat.supcontrast` against its formula written out: it is not on PyPI."""

import compare
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from clae_fast.compat.supcontrast import SupConLoss


def dense(features, labels, mask, temperature, mode, base):
    """Anchor by anchor and key by key, as the sums of the paper (equation 2) are written."""
    features = features.flatten(2)
    B, V, _ = features.shape
    if mask is None:
        labels = torch.arange(B) if labels is None else labels.flatten()
        mask = labels[:, None] == labels
    rows = []
    for view in range(V if mode == "all" else 1):
        for i in range(B):
            keys = [(j, w) for j in range(B) for w in range(V) if (j, w) != (i, view)]
            if not keys:
                continue
            s = torch.stack([features[i, view] @ features[k] for k in keys]) / temperature
            y = torch.stack([mask[i, j] for j, _ in keys]).to(s.dtype)
            log_p = s.log_softmax(0)
            rows.append(-(y * log_p).sum() / y.sum() if y.sum() > 0 else 0 * s.sum())
    return torch.stack(rows).mean() * temperature / base


@compare.examples
@given(
    compare.seeds,
    st.lists(st.integers(0, 3), min_size=3, max_size=8),
    st.integers(1, 3),
    compare.widths,
    st.sampled_from(["labels", "mask", "weights", "neither"]),
    st.sampled_from(["all", "one"]),
    compare.temperatures,
    st.sampled_from([0.5, 1.0]),
    compare.dtypes,
)
def test_value_and_gradients(seed, some, views, d, told, mode, temperature, base, dtype):
    """Classes of any size, one view, asymmetric masks, anchors without a positive."""
    B = len(some)
    features = F.normalize(compare.draw(seed, B, views, d), dim=2)
    labels = torch.tensor(some)[:, None] if told == "labels" else None
    mask = None
    if told == "mask":
        mask = (compare.draw(seed + 1, B, B) > 0).long()
    elif told == "weights":
        mask = compare.draw(seed + 1, B, B).abs().float()

    def ours(z):
        return SupConLoss(temperature, mode, base)(z, labels, mask)

    def formula(z):
        return dense(z, labels, mask, temperature, mode, base)

    compare.agree(ours, formula, features, dtype=dtype, t=1 / temperature)


def test_images_as_features():
    z = torch.randn(3, 2, 4, 5)
    torch.testing.assert_close(SupConLoss()(z), SupConLoss()(z.flatten(2)))


def test_nothing_to_contrast_is_0():
    """Theirs gives NaN for one view of one sample."""
    for mask in (None, torch.ones(1, 1)):
        z = torch.randn(1, 1, 4, requires_grad=True)
        loss = SupConLoss()(z, mask=mask)
        loss.backward()
        assert loss == 0
        assert (z.grad == 0).all()


def test_refused():
    z = torch.randn(3, 2, 4)
    with pytest.raises(ValueError, match=r"features must be \(B, V, \.\.\.\)"):
        SupConLoss()(z[0])
    with pytest.raises(ValueError, match="labels and mask"):
        SupConLoss()(z, torch.arange(3), torch.eye(3))
    with pytest.raises(ValueError, match=r"mask must be \(3, 3\)"):
        SupConLoss()(z, mask=torch.eye(2))
    with pytest.raises(ValueError, match=r"labels must be \(3,\)"):
        SupConLoss()(z, torch.arange(4))
    with pytest.raises(ValueError, match="contrast_mode"):
        SupConLoss(contrast_mode="some")
