"""`pytorch_metric_learning.losses`: NTXentLoss, SupConLoss, SelfSupervisedLoss.

Their denominators differ and stay so: NT-Xent's holds the one positive and the negatives, SupCon's
all rows but the anchor.
"""

import abc
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from .. import functional
from .. import validation as check
from ..numerics import log_sum_exp
from ._groups import positive_pairs
from ._pml_parts import THEIR_HOOKS, AvgNonZeroReducer, CosineSimilarity, MeanReducer, all_pairs
from ._refuse import refuse
from ._rows import (
    Ids,
    cross_entropy,
    labels_tensor,
    one_dtype,
    row_lse,
    rows_of,
    scalar,
    scalar_like,
    shared_ids,
)

__all__ = ["NTXentLoss", "SelfSupervisedLoss", "SupConLoss"]

OPTIONS = (
    "distance", "reducer", "collect_stats", "embedding_regularizer", "embedding_reg_weight"
)  # fmt: skip


class Losses(NamedTuple):
    """What a reducer gets: one loss a positive pair, or one a row."""

    losses: Tensor
    indices: tuple[Tensor, Tensor] | Tensor
    reduction_type: str


class Problem(NamedTuple):
    """Rows and columns on the sphere or as they are, and who is whose positive."""

    u: Tensor  # (N, D)
    v: Tensor  # (M, D)
    ids: Ids
    itself: Tensor | None  # the column that is row i itself; None: there is none
    scale: float | Tensor

    def lse(self, ids: Ids | None, skip: str = "none") -> Tensor:
        return row_lse(
            self.u, None if self.v is self.u else self.v, scale=self.scale, skip=skip, ids=ids
        )

    def counts(self) -> tuple[Tensor, Tensor]:
        """Positives and negatives of each row (N,)."""
        rows, columns = self.ids
        number = int(torch.cat(self.ids).max()) + 1
        same = torch.bincount(columns, minlength=number)[rows]
        return same - int(self.itself is not None), len(columns) - same


class PairLoss(nn.Module, abc.ABC):
    """What the two share: their call, their options and their reduction."""

    distance: Any
    reducer: Any

    def __init__(self, temperature: float | Tensor, **kwargs: Any) -> None:
        super().__init__()
        scalar("temperature", temperature)
        for name, value in kwargs.items():
            if name not in OPTIONS:
                raise TypeError(
                    f"{type(self).__name__} has no option {name}={value!r}; it has "
                    f"{', '.join(OPTIONS)}"
                )
        if kwargs.get("embedding_regularizer") is not None:
            refuse("embedding_regularizer", type(kwargs["embedding_regularizer"]).__name__, "None")
        if kwargs.get("collect_stats"):
            refuse("collect_stats", kwargs["collect_stats"], "None and False")
        self.temperature = temperature
        self.embedding_regularizer = None
        self.embedding_reg_weight = kwargs.get("embedding_reg_weight", 1)  # of nothing
        self.collect_stats = False
        distance, reducer = kwargs.get("distance"), kwargs.get("reducer")
        self.distance = self.get_default_distance() if distance is None else distance
        _normalizes(self.distance)
        if reducer is not None:
            check.function("reducer", reducer)
        self.reducer = self.get_default_reducer() if reducer is None else reducer

    def get_default_distance(self) -> Any:
        """What stands in for `distance=None`."""
        return CosineSimilarity()

    def get_default_reducer(self) -> Any:
        """What stands in for `reducer=None`."""
        return MeanReducer()

    def __getattr__(self, name: str) -> Any:
        if name in THEIR_HOOKS:
            raise AttributeError(
                f"{type(self).__name__} of clae_fast.compat has no {name}: its loss is not made of "
                "a matrix or a dictionary that it could be called on"
            )
        return super().__getattr__(name)

    @property
    def normalize(self) -> bool:
        """Whether rows are put on the sphere, as `distance` says."""
        return _normalizes(self.distance)

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        indices_tuple: tuple[Tensor, ...] | None = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Tensor:
        _refuse_overrides(self)
        if ref_emb is not None:
            embeddings, ref_emb = one_dtype(embeddings, ref_emb)
        check.matrix("embeddings", embeddings)
        for name, value in (("labels", labels), ("ref_labels", ref_labels)):
            if value is not None:
                labels_tensor(name, value)
        if labels is None and indices_tuple is None:
            raise ValueError("labels and indices_tuple are both None: one must say who belongs")
        labels = None if labels is None else labels.to(embeddings.device)
        if ref_emb is None:
            ref_emb, ref_labels = embeddings, labels
        elif ref_labels is not None:
            ref_labels = ref_labels.to(ref_emb.device)
        check.embeddings("embeddings", embeddings, "ref_emb", ref_emb, same_rows=False)
        # Theirs takes labels that are one object for rows that are one, too: no row is the positive
        # of the same index then. A clone of the labels says that the references are other rows.
        one = ref_labels is None or ref_labels is labels
        _check_labels("labels", labels, embeddings)
        _check_labels("ref_labels", labels if one else ref_labels, ref_emb)
        if indices_tuple is not None:
            found = self._of_tuple(embeddings, ref_emb, indices_tuple)
        else:
            found = self._of_labels(embeddings, ref_emb, labels, labels if one else ref_labels, one)
        return self._reduce(found, embeddings, labels)

    def pairs(self, embeddings: Tensor, ref_emb: Tensor, symmetric: bool) -> Tensor:
        """Row i of one belongs to row i of the other and to no other row."""
        _refuse_overrides(self)
        embeddings, ref_emb = one_dtype(embeddings, ref_emb)
        check.embeddings("embeddings", embeddings, "ref_emb", ref_emb)
        options: dict[str, Any] = {
            "temperature": scalar_like(self.temperature, embeddings),
            "normalize": self.normalize,
            "reduction": "none",
        }
        B, device = len(embeddings), embeddings.device
        place = torch.arange(B, device=device)
        if symmetric:
            losses = functional.nt_xent_loss(embeddings, ref_emb, **options)
            embeddings = torch.cat((embeddings, ref_emb))
            place, twin = torch.arange(2 * B, device=device), place.repeat(2)
            indices = place, place.roll(B)
        else:
            losses = functional.info_nce_loss(embeddings, ref_emb, **options)
            twin, indices = place, (place, place)
        found = self._one_each(losses, indices) if B > 1 else None
        return self._reduce(found, embeddings, twin)

    def _of_labels(
        self, embeddings: Tensor, ref_emb: Tensor, labels: Any, ref_labels: Any, one: bool
    ) -> Losses | None:
        u = rows_of(embeddings, self.normalize).z
        v = u if ref_emb is embeddings else rows_of(ref_emb, self.normalize).z
        if one and len(u) != len(v):
            raise ValueError(f"ref_labels are needed: ref_emb has {len(v)} rows, labels {len(u)}")
        itself = torch.arange(len(u), device=u.device) if one else None
        t = scalar_like(self.temperature, u)
        problem = Problem(u, v, shared_ids(labels, ref_labels), itself, 1 / t)
        positives, negatives = (int(x.sum()) for x in problem.counts())
        if not self._enough(positives, negatives):
            return None
        return self._losses(problem)

    def _of_tuple(
        self, embeddings: Tensor, ref_emb: Tensor, indices: tuple[Tensor, ...]
    ) -> Losses | None:
        """Pairs listed one by one: plain PyTorch over an N x M matrix, as the list may be long."""
        if not isinstance(indices, (tuple, list)):
            raise TypeError(f"indices_tuple must be a tuple of tensors, got {indices!r}")
        if len(indices) not in (3, 4):
            raise ValueError(f"indices_tuple must hold 3 or 4 tensors, got {len(indices)}")
        anchor, positive, other, negative = (
            indices if len(indices) == 4 else (*indices[:2], indices[0], indices[2])
        )
        for a, b in ((anchor, positive), (other, negative)):
            labels_tensor("indices_tuple's parts", a)
            labels_tensor("indices_tuple's parts", b)
            if a.dim() != 1 or a.shape != b.shape:
                raise ValueError(
                    "indices_tuple must hold anchors and partners of one length, got "
                    f"{tuple(a.shape)} and {tuple(b.shape)}"
                )
        if not self._enough(len(anchor), len(other)):
            return None
        u, v = (rows_of(x, self.normalize).z for x in (embeddings, ref_emb))
        s = all_pairs(u, v) / scalar_like(self.temperature, u)
        return self._listed(s, anchor, positive, other, negative)

    def _reduce(self, found: Losses | None, embeddings: Tensor, labels: Any) -> Tensor:
        if found is None:
            told: dict[str, Any] = {
                "losses": 0, "indices": None, "reduction_type": "already_reduced",
            }  # fmt: skip
        else:
            told = found._asdict()
        out: Tensor = self.reducer({"loss": told}, embeddings, labels)
        return out

    @abc.abstractmethod
    def _enough(self, positives: int, negatives: int) -> bool:
        """Whether a row with so many pairs of each kind has a loss."""

    @abc.abstractmethod
    def _losses(self, problem: Problem) -> Losses:
        """By labels."""

    @abc.abstractmethod
    def _listed(self, s: Tensor, *pairs: Tensor) -> Losses:
        """By pairs that a miner chose."""

    @abc.abstractmethod
    def _one_each(self, losses: Tensor, indices: tuple[Tensor, Tensor]) -> Losses:
        """As their reducers take them."""


class NTXentLoss(PairLoss):
    """Each positive pair against the negatives of its anchor; other positives do not count.

    Replaces `pytorch_metric_learning.losses.NTXentLoss`: (N, D), labels (N,), reducers of theirs.
    `indices_tuple` works in plain PyTorch with an N x M matrix. Theirs stops at -log of the
    smallest number (87.3 in float32) with no gradient, this does not. The temperature may be a
    one-element tensor that learns; `get_default_distance` and `get_default_reducer` may be
    overridden. Not served: distances but CosineSimilarity and DotProductSimilarity,
    `embedding_regularizer`, `collect_stats=True`, subclasses that override `compute_loss`,
    `_compute_loss` or another such method but not `forward`.

    Example:
        >>> from clae_fast.compat.pytorch_metric_learning import NTXentLoss
        >>> NTXentLoss(temperature=0.1)(torch.randn(8, 4), torch.arange(4).repeat(2)).shape
        torch.Size([])
    """

    def __init__(self, temperature: float | Tensor = 0.07, **kwargs: Any) -> None:
        super().__init__(temperature, **kwargs)

    def _enough(self, positives: int, negatives: int) -> bool:
        return positives > 0 and negatives > 0 and max(positives, negatives) > 1

    def _losses(self, problem: Problem) -> Losses:
        pairs = positive_pairs(problem.u, problem.v, problem.ids, problem.itself)
        lse = problem.lse(problem.ids)[pairs.rows]
        losses = cross_entropy(lse, pairs.similarity * problem.scale)
        return Losses(losses, (pairs.rows, pairs.columns), "pos_pair")

    def _listed(self, s: Tensor, *pairs: Tensor) -> Losses:
        anchor, positive, other, negative = pairs
        values = s[other, negative]
        top = values.detach().new_full((len(s),), -torch.inf)
        top = top.scatter_reduce(0, other, values.detach(), "amax")
        shift = torch.where(top == -torch.inf, 0.0, top)
        total = s.new_zeros(len(s)).index_add(0, other, (values - shift[other]).exp())
        none = total == 0
        lse = torch.where(none, -torch.inf, shift + torch.where(none, 1.0, total).log())
        losses = cross_entropy(lse[anchor], s[anchor, positive])
        return Losses(losses, (anchor, positive), "pos_pair")

    def _one_each(self, losses: Tensor, indices: tuple[Tensor, Tensor]) -> Losses:
        return Losses(losses, indices, "pos_pair")


class SupConLoss(PairLoss):
    """The mean over an anchor's positives, against all rows but itself.

    Replaces `pytorch_metric_learning.losses.SupConLoss`; the mean is over the rows whose loss is
    not 0. What it takes, and what is not served, as `NTXentLoss`.

    Example:
        >>> from clae_fast.compat.pytorch_metric_learning import SupConLoss
        >>> SupConLoss()(torch.randn(8, 4), torch.tensor([0, 0, 0, 1, 1, 2, 2, 3])).shape
        torch.Size([])
    """

    def __init__(self, temperature: float | Tensor = 0.1, **kwargs: Any) -> None:
        super().__init__(temperature, **kwargs)

    def get_default_reducer(self) -> Any:
        return AvgNonZeroReducer()

    def _enough(self, positives: int, negatives: int) -> bool:
        return positives > 0 and negatives > 0 and max(positives, negatives) > 1

    def _losses(self, problem: Problem) -> Losses:
        u, ids, t = problem.u, problem.ids[0], 1 / problem.scale
        if problem.v is u and problem.itself is not None:
            losses = functional.sup_con_loss(
                u, ids, temperature=t, normalize=False, reduction="none"
            )
        else:
            skip = "none" if problem.itself is None else "diagonal"
            count, mean = problem.counts()[0], positive_mean(problem)
            losses = problem.lse(None, skip) - (u * mean).sum(1) * problem.scale
            losses = torch.where(count > 0, losses, 0.0)
        return self._rows(losses)

    def _listed(self, s: Tensor, *pairs: Tensor) -> Losses:
        anchor, positive, other, negative = pairs
        is_positive, is_negative = (torch.zeros_like(s, dtype=torch.bool) for _ in range(2))
        is_positive[anchor, positive] = True
        is_negative[other, negative] = True
        if not s.is_meta and (is_positive & is_negative).any():
            raise ValueError("indices_tuple lists one pair as a positive and as a negative")
        lse = log_sum_exp(s.masked_fill(~(is_positive | is_negative), -torch.inf))
        count = is_positive.sum(1)
        mean = torch.where(is_positive, s, 0.0).sum(1) / count.clamp_min(1)
        return self._rows(torch.where(count > 0, lse - mean, 0.0))

    def _one_each(self, losses: Tensor, indices: tuple[Tensor, Tensor]) -> Losses:
        return self._rows(losses)

    def _rows(self, losses: Tensor) -> Losses:
        return Losses(losses, torch.arange(len(losses), device=losses.device), "element")


def positive_mean(problem: Problem) -> Tensor:
    """The mean of a row's positives (N, D), by the sums of classes; 0 where it has none."""
    rows, columns = problem.ids
    number = int(torch.cat(problem.ids).max()) + 1
    sums = problem.v.new_zeros((number, problem.v.shape[1])).index_add(0, columns, problem.v)
    mine = sums[rows] if problem.itself is None else sums[rows] - problem.v[problem.itself]
    return mine / problem.counts()[0].clamp_min(1)[:, None]


class SelfSupervisedLoss(nn.Module):
    """Rows i of two tensors belong together: labels made for `NTXentLoss` and `SupConLoss`.

    Replaces `pytorch_metric_learning.losses.SelfSupervisedLoss`. Not served: other losses.

    Example:
        >>> from clae_fast.compat.pytorch_metric_learning import NTXentLoss, SelfSupervisedLoss
        >>> SelfSupervisedLoss(NTXentLoss())(torch.randn(4, 8), torch.randn(4, 8)).shape
        torch.Size([])
    """

    def __init__(self, loss: nn.Module, symmetric: bool = True, **kwargs: Any) -> None:
        super().__init__()
        if not isinstance(loss, PairLoss):
            refuse("loss", type(loss).__name__, "NTXentLoss and SupConLoss of this module")
        for name, value in kwargs.items():
            raise TypeError(f"SelfSupervisedLoss has no option {name}={value!r}")
        self.loss = loss
        self.symmetric = symmetric

    @staticmethod
    def supported_losses() -> list[str]:
        return ["NTXentLoss", "SupConLoss"]

    def forward(self, embeddings: Tensor, ref_emb: Tensor) -> Tensor:
        if type(self.loss).forward is PairLoss.forward:
            return self.loss.pairs(embeddings, ref_emb, self.symmetric)
        labels = torch.arange(len(embeddings), device=embeddings.device)  # a subclass's own forward
        if self.symmetric:
            out: Tensor = self.loss(torch.cat([embeddings, ref_emb]), labels.repeat(2))
        else:
            out = self.loss(embeddings, labels, ref_emb=ref_emb, ref_labels=labels.clone())
        return out


def _check_labels(name: str, labels: Tensor | None, rows: Tensor) -> None:
    if labels is not None and labels.shape != rows.shape[:1]:
        raise ValueError(f"{name} must be ({len(rows)},), got {tuple(labels.shape)}")


def _normalizes(distance: Any) -> bool:
    """Whether the distance's rows are on the sphere, for the two similarities that are served."""
    known = type(distance).__name__ in ("CosineSimilarity", "DotProductSimilarity")
    if not known or (distance.p, distance.power) != (2, 1):
        _refuse_distance(distance)
    return bool(distance.normalize_embeddings)


def _refuse_distance(distance: Any) -> NoReturn:
    served = "CosineSimilarity and DotProductSimilarity, both with p=2 and power=1"
    told = (f"{x}={getattr(distance, x)}" for x in ("p", "power") if hasattr(distance, x))
    refuse("distance", f"{type(distance).__name__}({', '.join(told)})", served)


def _refuse_overrides(loss: PairLoss) -> None:
    """`forward` would not see what a subclass says there."""
    for name in THEIR_HOOKS:
        if hasattr(type(loss), name) or name in vars(loss):
            refuse(f"{type(loss).__name__}.{name}", "overridden", "a subclass with a forward")
