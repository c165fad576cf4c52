"""`lightly.loss`: `from clae_fast.compat.lightly import NTXentLoss, DCLLoss, DCLWLoss`."""

import functools
import math
from collections.abc import Callable, Sequence
from operator import index
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from .. import functional
from .. import validation as check
from ..numerics import Unit, cosine, full_precision
from ._gather import all_rows, gather, world
from ._rows import cross_entropy, one_dtype, row_lse, rows_of

__all__ = ["DCLLoss", "DCLWLoss", "NTXentLoss", "negative_mises_fisher_weights"]


class MemoryBank(nn.Module):
    """The keys of past batches, oldest overwritten first. `bank` (size, dim), `bank_ptr` (1,)."""

    bank: Tensor
    bank_ptr: Tensor

    def __init__(self, size: int | Sequence[int], gather_distributed: bool = False) -> None:
        super().__init__()
        extents = _extents(size)
        if any(x < 0 for x in extents) or (extents != (0,) and len(extents) != 2):
            raise ValueError(
                f"memory_bank_size must be 0 or (num_features, dim), none negative, got {size!r}"
            )
        self.size = extents
        self.gather_distributed = gather_distributed
        rows = torch.empty(extents, dtype=torch.float32)
        if len(extents) == 2:
            rows = nn.functional.normalize(torch.randn(extents).to(rows.dtype), dim=-1)
        self.register_buffer("bank", rows, persistent=False)
        self.register_buffer("bank_ptr", torch.zeros(1, dtype=torch.long), persistent=False)

    @torch.no_grad()
    def enqueue(self, rows: Tensor) -> None:
        """Overwrite from the pointer on; what does not fit is dropped, and the pointer returns."""
        if self.gather_distributed and world()[1] > 1:
            rows = all_rows(rows)
        start, size = int(self.bank_ptr), self.size[0]
        rows = rows[: size - start]
        self.bank[start : start + len(rows)] = rows.to(self.bank.dtype)
        self.bank_ptr[0] = (start + len(rows)) % size


def _extents(size: Any) -> tuple[int, ...]:
    try:
        return (size,) if isinstance(size, int) else tuple(index(x) for x in size)
    except TypeError:
        raise TypeError(
            f"memory_bank_size must be 0 or (num_features, dim), both ints, got {size!r}"
        ) from None


class NTXentLoss(nn.Module):
    """NT-Xent of SimCLR; with a memory bank, the loss of MoCo. (B, D) and (B, D), normalised here.

    Replaces `lightly.loss.NTXentLoss`. `gather_distributed`: each process contrasts its own rows
    with those of all and returns their mean, as theirs; keys from elsewhere get their gradient.

    Example:
        >>> from clae_fast.compat.lightly import NTXentLoss
        >>> loss = NTXentLoss(temperature=0.1, memory_bank_size=(64, 8))
        >>> loss(torch.randn(4, 8, requires_grad=True), torch.randn(4, 8)).backward()
        >>> int(loss.memory_bank.bank_ptr)
        4
    """

    def __init__(
        self,
        temperature: float = 0.5,
        memory_bank_size: int | Sequence[int] = 0,
        gather_distributed: bool = False,
    ) -> None:
        super().__init__()
        _check_number("temperature", temperature)
        if abs(temperature) < 1e-8:
            raise ValueError(f"temperature must be at least 1e-8 in magnitude, got {temperature}")
        _check_gather(gather_distributed)
        self.memory_bank = MemoryBank(memory_bank_size, gather_distributed)
        self.temperature = temperature
        self.gather_distributed = gather_distributed

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        out0, out1 = one_dtype(out0, out1)
        check.embeddings("out0", out0, "out1", out1)
        if self.memory_bank.size[0] > 0:
            return self._with_bank(out0, out1)
        if self.temperature > 0 and not (self.gather_distributed and world()[1] > 1):
            return functional.nt_xent_loss(out0, out1, temperature=self.temperature)
        return _nt_xent_of_own_rows(out0, out1, self.temperature, self.gather_distributed)

    def _with_bank(self, out0: Tensor, out1: Tensor) -> Tensor:
        if self.temperature < 0:
            raise ValueError(
                f"temperature must be positive with a memory bank, got {self.temperature}"
            )
        memory = self.memory_bank
        if memory.size[1:] != out0.shape[1:]:
            raise ValueError(
                f"memory_bank_size must be (num_features, {out0.shape[1]}) as out0 has columns, "
                f"got {tuple(memory.size)}"
            )
        negatives = memory.bank.to(out0.device, copy=True)
        dtype = torch.promote_types(out0.dtype, negatives.dtype)
        q, k = (rows_of(x, True).z for x in (out0, out1))
        if q.requires_grad:  # evaluation leaves the bank alone
            memory.enqueue(k)
        # As they lie: rows that were normalised in float32 stay so in a bank of float64.
        rows = [x.to(dtype) for x in (q, k, negatives)]
        return functional.info_nce_loss(*rows, temperature=self.temperature, normalize=False)


@full_precision
def _nt_xent_of_own_rows(out0: Tensor, out1: Tensor, temperature: float, gathered: bool) -> Tensor:
    """NT-Xent of this process's rows against all processes' rows."""
    u0, u1 = rows_of(out0, True), rows_of(out1, True)
    positive = cosine(u0, u1) / temperature
    lse = _negatives(u0, u1, temperature, gathered)
    return cross_entropy(lse, torch.cat((positive, positive))).mean()


def _negatives(u0: Unit, u1: Unit, temperature: float, gathered: bool) -> Tensor:
    """Log-sum-exp (2B,) over all rows but a row's own pair; first those of u0."""
    z = torch.cat((u0.z, u1.z))
    scale = 1 / abs(temperature)
    rank, processes = world() if gathered else (0, 1)
    if processes == 1 and temperature > 0:
        return row_lse(z, scale=scale, skip="twins")
    keys = torch.cat((gather(u0.z), gather(u1.z))) if gathered else z
    B = len(u0.z)
    own = torch.arange(rank * B, (rank + 1) * B, device=z.device, dtype=torch.int32).repeat(2)
    everyone = torch.arange(processes * B, device=z.device, dtype=torch.int32).repeat(2)
    return row_lse(z if temperature > 0 else -z, keys, scale=scale, ids=(own, everyone))


class DCLLoss(nn.Module):
    """Decoupled contrastive loss: the positive is not in the denominator. (B, D) and (B, D).

    Replaces `lightly.loss.DCLLoss`. `weight_fn(out0, out1)` gets the normalised embeddings, once
    in each order, and returns (B,) weights of the positives; it may be differentiable.

    Example:
        >>> from clae_fast.compat.lightly import DCLLoss
        >>> DCLLoss(temperature=0.07)(torch.randn(4, 8), torch.randn(4, 8)).shape
        torch.Size([])
    """

    def __init__(
        self,
        temperature: float = 0.1,
        weight_fn: Callable[[Tensor, Tensor], Tensor] | None = None,
        gather_distributed: bool = False,
    ) -> None:
        super().__init__()
        _check_number("temperature", temperature, zero=False)
        if weight_fn is not None:
            check.function("weight_fn", weight_fn)
        _check_gather(gather_distributed)
        self.temperature = temperature
        self.weight_fn = weight_fn
        self.gather_distributed = gather_distributed

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        out0, out1 = one_dtype(out0, out1)
        check.embeddings("out0", out0, "out1", out1)
        if self.temperature > 0 and not (self.gather_distributed and world()[1] > 1):
            weight_fn = None if self.weight_fn is None else self._weights
            return functional.dcl_loss(
                out0, out1, temperature=self.temperature, weight_fn=weight_fn
            )
        return self._of_own_rows(out0, out1)

    def _of_own_rows(self, out0: Tensor, out1: Tensor) -> Tensor:
        u0, u1 = rows_of(out0, True), rows_of(out1, True)
        positive = cosine(u0, u1) / self.temperature
        lse = _negatives(u0, u1, self.temperature, self.gather_distributed)
        if self.weight_fn is None:
            weighted = torch.cat((positive, positive))
        else:
            weights = self._weights(u0.z, u1.z), self._weights(u1.z, u0.z)
            weighted = torch.cat([positive * w for w in weights])
        alone = lse == -torch.inf  # nothing to be told from
        return torch.where(alone, 0.0, torch.where(alone, 0.0, lse) - weighted).mean()

    def _weights(self, z0: Tensor, z1: Tensor) -> Tensor:
        """What `weight_fn` says (B,); one number is the weight of all."""
        assert self.weight_fn is not None
        w: Any = self.weight_fn(z0, z1)
        if check.is_number(w) or (isinstance(w, Tensor) and w.shape in ((), (1,))):
            return torch.as_tensor(w, dtype=z0.dtype, device=z0.device).expand(len(z0))
        if not isinstance(w, Tensor) or w.shape != z0.shape[:1]:
            got = tuple(w.shape) if isinstance(w, Tensor) else type(w).__name__
            raise ValueError(f"weight_fn must return ({len(z0)},) or one number, got {got}")
        return w


class DCLWLoss(DCLLoss):
    """`DCLLoss` whose positives weigh less the more they agree (`negative_mises_fisher_weights`).

    Replaces `lightly.loss.DCLWLoss`.
    """

    def __init__(
        self, temperature: float = 0.1, sigma: float = 0.5, gather_distributed: bool = False
    ) -> None:
        _check_number("sigma", sigma, zero=False)
        weight_fn = functools.partial(negative_mises_fisher_weights, sigma=sigma)
        super().__init__(temperature, weight_fn, gather_distributed)


def negative_mises_fisher_weights(out0: Tensor, out1: Tensor, sigma: float = 0.5) -> Tensor:
    """`2 - B softmax(<out0_i, out1_i> / sigma)` (B,), constants.

    Replaces `lightly.loss.dcl_loss.negative_mises_fisher_weights`.
    """
    similarity = (out0.detach() * out1.detach()).sum(1) / sigma
    return 2 - len(out0) * similarity.softmax(0)


def _check_number(name: str, value: Any, zero: bool = True) -> None:
    """A finite number or a tensor that holds one; `zero`: it may be 0."""
    if isinstance(value, Tensor):
        check.one_element(name, value, value)
        if not math.isfinite(value):
            raise ValueError(f"{name} must be finite, got {float(value)}")
    else:
        check.number(name, value)
    if not zero and value == 0:
        raise ValueError(f"{name} must not be 0, got {value}")


def _check_gather(gather_distributed: bool) -> None:
    check.flag("gather_distributed", gather_distributed)
    if gather_distributed and not dist.is_available():
        raise ValueError("gather_distributed=True needs torch.distributed, which torch lacks here")
