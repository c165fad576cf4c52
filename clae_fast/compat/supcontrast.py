"""`losses.py` of SupContrast: `from clae_fast.compat.supcontrast import SupConLoss`."""

import torch
from torch import Tensor, nn

from .. import functional
from .. import validation as check
from ..numerics import full_precision
from ._rows import (
    cross_entropy,
    labels_tensor,
    row_lse,
    rows_of,
    scalar,
    scalar_like,
    shared_ids,
)

__all__ = ["SupConLoss"]

MODES = ("all", "one")


class SupConLoss(nn.Module):
    """Supervised contrastive loss of features (B, V, ...), normalised by the caller.

    Replaces `SupConLoss` of HobbitLong/SupContrast: labels (B,), or a mask (B, B) of who belongs to
    whom (any weights, not only 0 and 1), or neither: then the views of a sample belong together.
    The mean is over all anchors, those without a positive as 0, times
    `temperature / base_temperature`; both may be one-element tensors that learn. Not served:
    temperatures that are not positive.

    Example:
        >>> from clae_fast.compat.supcontrast import SupConLoss
        >>> features = nn.functional.normalize(torch.randn(4, 2, 8), dim=2)
        >>> SupConLoss()(features, labels=torch.tensor([0, 0, 1, 2])).shape
        torch.Size([])
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.07,
        contrast_mode: str = "all",
        base_temperature: float | Tensor = 0.07,
    ) -> None:
        super().__init__()
        scalar("temperature", temperature)
        if isinstance(base_temperature, Tensor):
            if base_temperature.numel() != 1:
                shape = tuple(base_temperature.shape)
                raise ValueError(f"base_temperature must have one element, got shape {shape}")
        else:
            check.number("base_temperature", base_temperature)
            if base_temperature == 0:
                raise ValueError("base_temperature must not be 0, got 0")
        check.word("contrast_mode", contrast_mode, MODES)
        self.temperature = temperature
        self.contrast_mode = contrast_mode
        self.base_temperature = base_temperature

    def forward(
        self, features: Tensor, labels: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        check.float_tensor("features", features)
        if features.dim() < 3:
            raise ValueError(f"features must be (B, V, ...), got {tuple(features.shape)}")
        features = features.flatten(2)
        B = len(features)
        if labels is not None and mask is not None:
            raise ValueError("labels and mask exclude each other, got both")
        for name, value in (("labels", labels), ("mask", mask)):
            if value is not None:
                labels_tensor(name, value)
        if mask is not None and mask.shape != (B, B):
            raise ValueError(f"mask must be ({B}, {B}), got {tuple(mask.shape)}")
        if labels is None:
            labels = torch.arange(B, device=features.device)
        labels = labels.flatten().to(features.device)
        if len(labels) != B:
            raise ValueError(f"labels must be ({B},), got {tuple(labels.shape)}")
        ids = shared_ids(labels, labels)[0]
        t, base = (scalar_like(x, features) for x in (self.temperature, self.base_temperature))
        one = self.contrast_mode == "one" and features.shape[1] > 1
        if mask is None and not one:
            loss = functional.sup_con_loss(features, ids, temperature=t, normalize=False)
        else:
            loss = _general(features, ids, mask, one, t)
        return loss * (t / base)


@full_precision
def _general(
    features: Tensor, ids: Tensor, mask: Tensor | None, one: bool, temperature: float | Tensor
) -> Tensor:
    """`lse_i - sum_j y_ij s_ij / sum_j y_ij`: the targets' sums are of (B, D), never N x N."""
    B, V, D = features.shape
    scale = 1 / temperature
    z = rows_of(features.transpose(0, 1).reshape(V * B, D), False).z
    anchors = z[:B] if one else z
    samples = z.view(V, B, D).sum(0)
    if mask is None:
        slots = int(ids.max()) + 1
        by_class = samples.new_zeros((slots, D)).index_add(0, ids, samples)
        wanted, weight = by_class[ids], torch.bincount(ids, minlength=slots)[ids].to(z.dtype)
        own = z.new_ones(B)
    else:
        y = mask.to(z)
        wanted, weight, own = y @ samples, y.sum(1), y.diagonal()
    # All views of whom a sample belongs to, less the anchor itself.
    views = len(anchors) // B
    count = (V * weight - own).repeat(views)
    none = count < 1e-6  # as theirs: such an anchor is not divided by its count
    per_anchor = torch.where(none, 1.0, count)[:, None]
    mean = (wanted.repeat(views, 1) - own.repeat(views)[:, None] * anchors) / per_anchor
    share = torch.where(none, count, 1.0)  # of the denominator: 0 without positives
    partner, lse = _partner(z, B, one, scale)
    if partner is None:
        lse = torch.where(lse == -torch.inf, 0.0, lse)
        return (share * lse - (anchors * mean).sum(1) * scale).mean()
    s = (anchors * partner).sum(1) * scale
    apart = (anchors * (share[:, None] * partner - mean)).sum(1) * scale
    return (share * cross_entropy(lse, s) + apart).mean()


def _partner(z: Tensor, B: int, one: bool, scale: float | Tensor) -> tuple[Tensor | None, Tensor]:
    """Another view of each anchor's sample, which stands apart, and the log-sum-exp of the rest.

    None where rows cannot be taken two by two; the log-sum-exp is then that of all others.
    """
    if one:
        everyone = torch.arange(len(z), device=z.device, dtype=torch.int32)
        first = everyone[:B]
        columns = torch.cat((first, first, everyone[2 * B :]))
        return z[B : 2 * B], row_lse(z[:B], z, scale=scale, ids=(first, columns))
    if len(z) == 2 * B:
        return z.roll(B, 0), row_lse(z, scale=scale, skip="twins")
    return None, row_lse(z, scale=scale, skip="diagonal")
