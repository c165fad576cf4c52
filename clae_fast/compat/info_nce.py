"""`info_nce` (info-nce-pytorch): `from clae_fast.compat.info_nce import InfoNCE`."""

from torch import Tensor, nn

from .. import functional
from .. import validation as check
from ._rows import one_dtype, scalar

__all__ = ["InfoNCE", "info_nce"]


class InfoNCE(nn.Module):
    """InfoNCE of queries, their keys and optional negatives, normalised here.

    Replaces `info_nce.InfoNCE`. Not served: temperatures that are not positive, or one per row.

    Example:
        >>> from clae_fast.compat.info_nce import InfoNCE
        >>> InfoNCE()(torch.randn(4, 8), torch.randn(4, 8), torch.randn(32, 8)).shape
        torch.Size([])
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        reduction: str = "mean",
        negative_mode: str = "unpaired",
    ) -> None:
        super().__init__()
        scalar("temperature", temperature)
        check.word("reduction", reduction, check.REDUCTIONS)
        check.word("negative_mode", negative_mode, functional.NEGATIVE_MODES)
        self.temperature = temperature
        self.reduction = reduction
        self.negative_mode = negative_mode

    def forward(
        self, query: Tensor, positive_key: Tensor, negative_keys: Tensor | None = None
    ) -> Tensor:
        return info_nce(
            query,
            positive_key,
            negative_keys,
            temperature=self.temperature,
            reduction=self.reduction,
            negative_mode=self.negative_mode,
        )


def info_nce(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    reduction: str = "mean",
    negative_mode: str = "unpaired",
) -> Tensor:
    """`InfoNCE` as a function. Replaces `info_nce.info_nce`."""
    check.word("negative_mode", negative_mode, functional.NEGATIVE_MODES)
    query, positive_key = one_dtype(query, positive_key)
    return functional.info_nce_loss(
        query,
        positive_key,
        negative_keys,
        temperature=temperature,
        reduction=reduction,
        # Without negatives theirs contrasts within the batch, whatever the mode.
        negative_mode="unpaired" if negative_keys is None else negative_mode,
    )
