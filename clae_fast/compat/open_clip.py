"""`open_clip.loss`: `from clae_fast.compat.open_clip import ClipLoss, SigLipLoss`."""

from typing import Any

import torch
from torch import Tensor, nn

from .. import functional
from .. import validation as check
from ..numerics import compute_dtype, full_precision
from ._gather import all_rows, gather, needs_processes
from ._refuse import refuse
from ._rows import cross_entropy, one_dtype, row_lse, sweeps

__all__ = ["ClipLoss", "SigLipLoss"]

EXCHANGES = ("bidir", "shift", "reduce", "gather")


class ClipLoss(nn.Module):
    """Symmetric loss of image and text features (B, D), normalised by the model.

    Replaces `open_clip.ClipLoss`, several processes included: each combination of `local_loss` and
    `gather_with_grad` gives this process the value and the gradients that theirs gives it. Beware
    that theirs scales them: only `gather_with_grad=True` averages, under DDP, to the gradient of
    the whole batch; False leaves 1/world_size of it. Not served: `use_horovod=True`; a subclass
    with its own `get_logits` or `get_ground_truth` and without its own `forward`.

    Example:
        >>> from clae_fast.compat.open_clip import ClipLoss
        >>> x, y = (nn.functional.normalize(torch.randn(4, 8), dim=1) for _ in range(2))
        >>> ClipLoss()(x, y, torch.tensor(10.0), output_dict=True)["contrastive_loss"].shape
        torch.Size([])
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
    ) -> None:
        super().__init__()
        if use_horovod:
            refuse("use_horovod", use_horovod, "False (torch.distributed)")
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.cache_labels = cache_labels  # nothing to cache: there are no labels
        self.rank = rank
        self.world_size = world_size
        self.use_horovod = use_horovod

    def get_ground_truth(self, device: torch.device, num_logits: int) -> Tensor:
        """The column of each row's partner (num_logits,), for code that makes its own logits."""
        start = num_logits * self.rank if self.world_size > 1 and self.local_loss else 0
        return torch.arange(start, start + num_logits, device=device)

    def get_logits(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Logits per image and per text: N x N, which `forward` never makes."""
        images, texts = self._everyone(image_features, text_features)
        own = (image_features, text_features) if self.local_loss else (images, texts)
        shift = 0.0 if logit_bias is None else logit_bias
        return logit_scale * own[0] @ texts.T + shift, logit_scale * own[1] @ images.T + shift

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        _refuse_overrides(self, ClipLoss)
        image_features, text_features = one_dtype(image_features, text_features)
        check.embeddings("image_features", image_features, "text_features", text_features)
        images, texts = self._everyone(image_features, text_features)
        if self.local_loss and self.world_size > 1:
            check.positive_scalar("logit_scale", logit_scale, image_features)
            own = (image_features, text_features)
            loss = _of_own_rows(*own, images, texts, logit_scale, self.rank)
            loss = functional.add_bias(loss, _bias(logit_bias))
        else:
            loss = functional.clip_loss(images, texts, logit_scale, logit_bias)
        return {"contrastive_loss": loss} if output_dict else loss

    def _everyone(self, *own: Tensor) -> list[Tensor]:
        """The features of all processes; of whom the gradient reaches is theirs to say."""
        if self.world_size == 1:
            return list(own)
        needs_processes(self.world_size)
        if self.gather_with_grad:
            return [gather(x) for x in own]
        everyone = [all_rows(x) for x in own]
        if not self.local_loss:  # this process's own rows get their gradient all the same
            for rows, x in zip(everyone, own, strict=True):
                start = self.rank * len(x)
                rows[start : start + len(x)] = x
        return everyone


def _bias(logit_bias: Any) -> Tensor | None:
    return logit_bias if isinstance(logit_bias, Tensor) else None


@full_precision
def _of_own_rows(
    images: Tensor,
    texts: Tensor,
    all_images: Tensor,
    all_texts: Tensor,
    logit_scale: float | Tensor,
    rank: int,
) -> Tensor:
    """The mean over this process's images and texts, each against everyone's."""
    dtype = compute_dtype(images.dtype)
    B = len(images)
    scale = logit_scale.to(dtype) if isinstance(logit_scale, Tensor) else logit_scale
    own = torch.arange(rank * B, (rank + 1) * B, device=images.device, dtype=torch.int32)
    everyone = torch.arange(len(all_texts), device=images.device, dtype=torch.int32)

    def direction(x: Tensor, keys: Tensor) -> Tensor:
        q, k = x.to(dtype) * scale, keys.to(dtype)
        positive = (q * k[rank * B : (rank + 1) * B]).sum(1)
        return cross_entropy(row_lse(q, k, ids=(own, everyone)), positive).mean()

    return 0.5 * (direction(images, all_texts) + direction(texts, all_images))


class SigLipLoss(nn.Module):
    """Sigmoid loss of image and text features (B, D), normalised by the model.

    Replaces `open_clip.SigLipLoss`, several processes included: own images against the texts of
    all, texts from elsewhere with their gradient. `dist_impl` only says how theirs moves the
    texts, one result for all four: here they are gathered. Not served: a subclass with its own
    `get_logits` or `get_ground_truth` and without its own `forward`.

    Example:
        >>> from clae_fast.compat.open_clip import SigLipLoss
        >>> x, y = (nn.functional.normalize(torch.randn(4, 8), dim=1) for _ in range(2))
        >>> SigLipLoss()(x, y, torch.tensor(10.0), torch.tensor(-10.0)).shape
        torch.Size([])
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
    ) -> None:
        super().__init__()
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.dist_impl = dist_impl or "bidir"
        check.word("dist_impl", self.dist_impl, EXCHANGES)

    def get_ground_truth(
        self,
        device: torch.device,
        dtype: torch.dtype,
        num_logits: int,
        negative_only: bool = False,
    ) -> Tensor:
        """1 on the diagonal and -1 elsewhere, N x N, for code that makes its own logits."""
        diagonal = 0 if negative_only else 2
        eye = torch.eye(num_logits, device=device, dtype=dtype)
        return diagonal * eye - 1

    def get_logits(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
    ) -> Tensor:
        """Logits N x N, which `forward` never makes."""
        shift = 0.0 if logit_bias is None else logit_bias
        return logit_scale * image_features @ text_features.T + shift

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        _refuse_overrides(self, SigLipLoss)
        image_features, text_features = one_dtype(image_features, text_features)
        check.embeddings("image_features", image_features, "text_features", text_features)
        bias = 0.0 if logit_bias is None else logit_bias
        if self.world_size == 1:
            loss = functional.siglip_loss(image_features, text_features, logit_scale, bias)
        else:
            needs_processes(self.world_size)
            check.positive_scalar("logit_scale", logit_scale, image_features)
            # The positive of row i is column i: one's own texts come first.
            texts = gather(text_features).roll(-self.rank * len(text_features), 0)
            loss = _sigmoid_of_own_rows(image_features, texts, logit_scale, bias)
        return {"contrastive_loss": loss} if output_dict else loss


@full_precision
def _sigmoid_of_own_rows(
    images: Tensor, texts: Tensor, logit_scale: float | Tensor, logit_bias: float | Tensor
) -> Tensor:
    """The mean over these images of the sum over all texts."""
    dtype = compute_dtype(images.dtype)
    scale = logit_scale.to(dtype) if isinstance(logit_scale, Tensor) else logit_scale
    bias = torch.as_tensor(logit_bias, dtype=dtype, device=images.device).reshape(())
    q, k = images.to(dtype) * scale, texts.to(dtype)
    weight = q.new_full((len(q),), 1 / len(q))
    return sweeps().sigmoid(q, k, bias, weight=weight)


def _refuse_overrides(loss: nn.Module, base: type) -> None:
    """`forward` would not see what a subclass says there."""
    for name in ("get_logits", "get_ground_truth"):
        if getattr(type(loss), name) is not getattr(base, name):
            refuse(f"{type(loss).__name__}.{name}", "overridden", "a subclass with a forward")
