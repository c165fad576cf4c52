"""The parts of pytorch-metric-learning's losses that its users read, set and override."""

from typing import Any

import torch
from torch import Tensor, nn

from ..numerics import full_precision

THEIR_HOOKS = (
    "compute_loss", "_compute_loss", "mat_based_loss", "pair_based_loss", "loss_method",
    "zero_loss", "zero_losses", "sub_loss_names", "_sub_loss_names", "set_reducer",
    "all_regularization_loss_names", "regularization_loss_names", "reset_stats",
    "embedding_regularization_loss", "add_embedding_regularization_to_loss_dict",
    "get_default_weight_init_func", "add_to_recordable_attributes",
)  # fmt: skip
"""What a subclass of theirs may override or call, and no fused loss has."""


class CosineSimilarity(nn.Module):
    """The default `distance`: read by code that wants the similarities, N x M, for itself.

    The losses look at its attributes alone.
    """

    normalize_embeddings, p, power, is_inverted = True, 2, 1, True

    def forward(self, query_emb: Tensor, ref_emb: Tensor | None = None) -> Tensor:
        ref_emb = query_emb if ref_emb is None else ref_emb
        q, k = (nn.functional.normalize(x, dim=1) for x in (query_emb, ref_emb))
        return q @ k.T


class MeanReducer(nn.Module):
    """The default `reducer` of NTXentLoss: the mean of what a loss dictionary holds."""

    def forward(self, loss_dict: dict[str, Any], embeddings: Tensor, labels: Any) -> Tensor:
        (told,) = loss_dict.values()
        if told["indices"] is None:
            return (embeddings * 0).sum()
        return self.mean(told["losses"])

    def mean(self, losses: Tensor) -> Tensor:
        return losses.mean()


class AvgNonZeroReducer(MeanReducer):
    """The default `reducer` of SupConLoss: the mean over the losses above 0."""

    def mean(self, losses: Tensor) -> Tensor:
        there = ~(losses <= 0)  # a NaN is there
        return torch.where(there, losses, 0.0).sum() / there.sum().clamp_min(1)


@full_precision
def all_pairs(u: Tensor, v: Tensor) -> Tensor:
    return u @ v.T
