"""`sentence_transformers.losses`: `MultipleNegativesRankingLoss` without the similarities."""

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import functional
from .. import validation as check
from ..numerics import cosine, full_precision, log_sum_exp, softplus
from ._gather import gather, world
from ._refuse import refuse
from ._rows import one_dtype, row_lse, rows_of, scalar, scalar_like

__all__ = ["MultipleNegativesRankingLoss", "cos_sim", "dot_score"]

DIRECTIONS = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
PARTITIONS = ("joint", "per_direction")
HARDNESS = ("in_batch_negatives", "hard_negatives", "all_negatives")
NORMALIZED = {"cos_sim": True, "pytorch_cos_sim": True, "dot_score": False}


def cos_sim(a: Tensor, b: Tensor) -> Tensor:
    """Cosines (N, M): a name for `similarity_fct`, as `sentence_transformers.util.cos_sim`."""
    return nn.functional.normalize(a, dim=-1) @ nn.functional.normalize(b, dim=-1).T


def dot_score(a: Tensor, b: Tensor) -> Tensor:
    """Dot products (N, M), as `sentence_transformers.util.dot_score`."""
    return a @ b.T


class MultipleNegativesRankingLoss(nn.Module):
    """Each query must find its document among those of the batch and its own hard negatives.

    Replaces `sentence_transformers.losses.MultipleNegativesRankingLoss`, all directions, partitions
    and hardness modes, `gather_across_devices` included; `compute_loss_from_embeddings` takes
    [queries, positives, negatives...], each (B, D). Not served: a `similarity_fct` other than
    `cos_sim` and `dot_score` (theirs or ours). `scale` may be a one-element tensor or a Parameter,
    which learns. Columns are encoded one by one, as theirs did
    before it merged like-shaped ones.

    Example:
        >>> from clae_fast.compat.sentence_transformers import MultipleNegativesRankingLoss
        >>> loss = MultipleNegativesRankingLoss(nn.Identity())
        >>> loss.compute_loss_from_embeddings([torch.randn(4, 8) for _ in range(3)], None).shape
        torch.Size([])
    """

    def __init__(
        self,
        model: nn.Module,
        scale: float | Tensor = 20.0,
        similarity_fct: Callable[[Tensor, Tensor], Tensor] = cos_sim,
        gather_across_devices: bool = False,
        directions: Iterable[str] = ("query_to_doc",),
        partition_mode: str = "joint",
        hardness_mode: str | None = None,
        hardness_strength: float = 0.0,
    ) -> None:
        super().__init__()
        scalar("scale", scale)
        _check_similarity(similarity_fct)
        check.flag("gather_across_devices", gather_across_devices)
        if isinstance(directions, str) or not isinstance(directions, Iterable):
            raise TypeError(f"directions must be a tuple of words, got {directions!r}")
        directions = tuple(directions)
        for direction in directions:
            check.word("directions", direction, DIRECTIONS)
        if "query_to_doc" not in directions:
            raise ValueError(f"directions must hold 'query_to_doc', got {directions!r}")
        check.word("partition_mode", partition_mode, PARTITIONS)
        unpaired = set(directions) & {"query_to_query", "doc_to_doc"}
        if partition_mode == "per_direction" and unpaired:
            raise ValueError(
                "partition_mode='per_direction' needs the positive in every direction, got "
                f"directions={directions!r}"
            )
        if hardness_mode is not None:
            check.word("hardness_mode", hardness_mode, HARDNESS)
        check.number("hardness_strength", hardness_strength, at_least=0)
        self.model = model
        self.scale = scale
        self.similarity_fct = similarity_fct
        self.gather_across_devices = gather_across_devices
        self.directions = tuple(directions)
        self.partition_mode = partition_mode
        self.hardness_mode = hardness_mode
        self.hardness_strength = hardness_strength

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor) -> Tensor:
        embeddings = [self.model(x)["sentence_embedding"] for x in sentence_features]
        return self.compute_loss_from_embeddings(embeddings, labels)

    def compute_loss_from_embeddings(
        self, embeddings: Sequence[Tensor], labels: Tensor | None
    ) -> Tensor:
        """The loss of [queries, positives, negatives...], each (B, D); labels are not used."""
        if not isinstance(embeddings, (list, tuple)):
            got = type(embeddings).__name__
            raise TypeError(f"embeddings must be a list of tensors, got {got}")
        if len(embeddings) < 2:
            raise ValueError(f"embeddings must hold queries and documents, got {len(embeddings)}")
        embeddings = one_dtype(*embeddings)
        for i, column in enumerate(embeddings[1:], 1):
            check.embeddings("embeddings[0]", embeddings[0], f"embeddings[{i}]", column)
        rank, processes = world() if self.gather_across_devices else (0, 1)
        options = self._options(embeddings[0])
        if processes == 1 and options.is_info_nce(len(embeddings)):
            return functional.info_nce_loss(
                embeddings[0],
                embeddings[1],
                extra_negatives=torch.cat(embeddings[2:]) if len(embeddings) > 2 else None,
                temperature=1 / options.scale,
                symmetric=len(options.directions) == 2,
                normalize=options.normalize,
            )
        return _ranking(embeddings[0], embeddings[1:], rank, processes, options)

    @property
    def temperature(self) -> float | Tensor:
        return 1.0 / self.scale

    def get_config_dict(self) -> dict[str, Any]:
        return {
            "scale": self.scale,
            "similarity_fct": self.similarity_fct.__name__,
            "gather_across_devices": self.gather_across_devices,
            "directions": self.directions,
            "partition_mode": self.partition_mode,
            "hardness_mode": self.hardness_mode,
            "hardness_strength": self.hardness_strength,
        }

    def _options(self, like: Tensor) -> "_Options":
        return _Options(
            scalar_like(self.scale, like),
            NORMALIZED[self.similarity_fct.__name__],
            frozenset(self.directions),
            self.partition_mode == "joint",
            self.hardness_strength if self.hardness_mode in _IN_BATCH else 0.0,
            self.hardness_strength if self.hardness_mode in _OWN else 0.0,
        )


_IN_BATCH = ("in_batch_negatives", "all_negatives")
_OWN = ("hard_negatives", "all_negatives")


class _Options(NamedTuple):
    scale: float | Tensor
    normalize: bool
    directions: frozenset[str]
    joint: bool
    in_batch_hardness: float
    own_hardness: float

    def is_info_nce(self, columns: int) -> bool:
        """One direction, or both apart for pairs: a loss of ours."""
        back = {"query_to_doc", "doc_to_query"}
        both = self.directions == back and not self.joint and columns == 2
        alone = len(self.directions) == 1 or both
        return alone and self.in_batch_hardness == self.own_hardness == 0


@full_precision
def _ranking(queries: Tensor, docs: list[Tensor], rank: int, processes: int, o: _Options) -> Tensor:
    """`log(m + e^(lse of all but the positive - positive))`, m times the positive is there."""
    q, own = rows_of(queries, o.normalize), [rows_of(d, o.normalize) for d in docs]
    d = own[0]
    positive = cosine(q, d) * o.scale
    B = len(q.z)
    all_queries = gather(q.z) if processes > 1 else q.z
    all_docs = torch.cat([gather(x.z) if processes > 1 else x.z for x in own])
    local = torch.arange(rank * B, (rank + 1) * B, device=q.z.device, dtype=torch.int32)
    by_query = torch.arange(processes * B, device=q.z.device, dtype=torch.int32)
    by_doc = (local, by_query.repeat(len(docs)))

    # The documents of other queries; a query's own hard negatives are (B, n), written out.
    others = [_harder(o.scale, o.in_batch_hardness, q.z, all_docs, by_doc)]
    if len(docs) > 1:
        s = torch.stack([cosine(q, x) for x in own[1:]], 1)
        others.append(log_sum_exp(s * o.scale + o.own_hardness * s.detach()))
    if "query_to_query" in o.directions:
        others.append(row_lse(q.z, all_queries, scale=o.scale, ids=(local, by_query)))
    if "doc_to_doc" in o.directions:
        others.append(row_lse(d.z, all_docs, scale=o.scale, ids=by_doc))
    back = "doc_to_query" in o.directions
    if back:
        backward = row_lse(d.z, all_queries, scale=o.scale, ids=(local, by_query))
        if not o.joint:
            forward = log_sum_exp(torch.stack(others, 1))
            rows = softplus(forward - positive) + softplus(backward - positive)
            return 0.5 * rows.mean()
        others.append(backward)
    negatives = log_sum_exp(torch.stack(others, 1)) - positive
    return torch.logaddexp(negatives, negatives.new_tensor(2.0 if back else 1.0).log()).mean()


def _harder(
    scale: float | Tensor, hardness: float, q: Tensor, k: Tensor, ids: tuple[Tensor, Tensor]
) -> Tensor:
    """`lse_j(scale s + hardness stop(s))`: the value has both, the slope only `scale`."""
    if hardness == 0.0:
        return row_lse(q, k, scale=scale, ids=ids)
    share, both = scale / (scale + hardness), scale + hardness
    if isinstance(share, Tensor) and isinstance(scale, Tensor):
        share = share.detach()  # the slope in `scale` is whole: divided here, multiplied below
        both = (scale.detach() + hardness) + (scale - scale.detach()) / share
    lse = row_lse(q, k, scale=both, ids=ids)
    finite = torch.where(lse == -torch.inf, 0.0, lse)  # -inf - -inf is NaN
    return torch.where(
        lse == -torch.inf, -torch.inf, share * finite + (1 - share) * finite.detach()
    )


def _check_similarity(fct: Any) -> None:
    """`cos_sim` or `dot_score`, of theirs or of ours: their values are not looked at."""
    name = getattr(fct, "__name__", type(fct).__name__)
    module = getattr(inspect.getmodule(fct), "__name__", "")
    ours = module.partition(".")[0] in ("sentence_transformers", "clae_fast")
    if name not in NORMALIZED or not ours:
        refuse("similarity_fct", fct, "cos_sim and dot_score")
