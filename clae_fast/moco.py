"""MoCo's queue of keys, and its slowly moving key encoder."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import validation as check
from .process_group import name_of, resolve


class MemoryQueue(nn.Module):
    """The last `size` keys, oldest out first: a `negative_keys` for `info_nce_loss`.

    What a call returns is a copy that no later `enqueue` changes, so the order of `enqueue` and
    `backward` does not matter. Keys, ids and position are buffers: they move, are saved and are
    broadcast (DistributedDataParallel) with the module, and two runs from one checkpoint see one
    queue. (What a compiled call knows of a broadcast is what the last `len(queue)` or other
    uncompiled call saw.) Until the queue is full, a call returns
    only what has been put in: from an empty one the first step's loss is 0, and has no gradient.
    MoCo starts with random rows: `random=True`.

    Args:
        size: how many keys it holds.
        dim: their width D.
        ids: keep an id (int64) beside each key, for `key_ids`.
        random: start full, with `fill_random()`.
        dtype, device: of the keys. Another dtype than the queries' is fine (`info_nce_loss`).

    Raises:
        TypeError, ValueError: for a size or dim that is no positive int; from `enqueue`, for keys
            of another width or type.

    Source: He et al., "Momentum Contrast for Unsupervised Visual Representation Learning", CVPR
    2020, section 3.2.

    Example:
        >>> queue = MemoryQueue(64, 16)
        >>> q, k = torch.randn(8, 16), torch.randn(8, 16)
        >>> loss = info_nce_loss(q, k, queue(), temperature=0.07)
        >>> queue.enqueue(k)
        >>> queue().shape
        torch.Size([8, 16])
    """

    keys: Tensor
    ids: Tensor | None
    position: Tensor

    def __init__(
        self,
        size: int,
        dim: int,
        *,
        ids: bool = False,
        random: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("size", size), ("dim", dim)):
            check.positive_int(name, value)
        check.flag("ids", ids)
        check.flag("random", random)
        if dtype not in check.FLOAT_DTYPES:
            raise TypeError(f"dtype must be float16, bfloat16, float32 or float64, got {dtype}")
        self.register_buffer("keys", torch.zeros(size, dim, dtype=dtype, device=device))
        numbers = torch.zeros(size, dtype=torch.int64, device=device) if ids else None
        self.register_buffer("ids", numbers)
        position = torch.zeros(2, dtype=torch.int64, device=device)
        self.register_buffer("position", position)  # where the next key goes, how many there are
        self._known: tuple[int, int] = (0, 0)
        self._seen: tuple[int, int] | None = None
        if random:
            self.fill_random()

    @torch.no_grad()
    def fill_random(self, generator: torch.Generator | None = None) -> "MemoryQueue":
        """Fill it with random unit rows, as MoCo starts; returns the queue.

        Their ids are -1, -2, ... (no id of a sample should be). With several processes give each
        the same seed, as queues must be equal on all ranks.

        Args:
            generator: of the queue's device; None: PyTorch's own.
        """
        if generator is not None:
            check.instance("generator", generator, torch.Generator, "None or a torch.Generator")
        device = self.keys.device
        rows = torch.randn(self.keys.shape, generator=generator, dtype=torch.float32, device=device)
        self.keys.copy_(nn.functional.normalize(rows))
        if self.ids is not None:
            self.ids.copy_(-1 - torch.arange(len(self.ids), device=self.ids.device))
        self._place(0, len(self.keys))
        return self

    def _at(self) -> tuple[int, int]:
        """Where the next key goes, how many there are: a copy, as a GPU would be waited for.

        The buffer is read where that is free, or where another may have written it: seen by its
        version, but for DistributedDataParallel's forward, which hides what it broadcasts. A
        compiled call takes the copy, as reading would break its graph.
        """
        x = self.position
        if x.is_meta or torch.compiler.is_compiling():
            return self._known
        seen = self._seen is not None and self._seen == _mark(x)
        if not seen or x.device.type == "cpu" or _several_processes():
            at, filled = (int(n) for n in x.tolist())
            size = len(self.keys)
            if not 0 <= filled <= size or not 0 <= at < size or (filled < size and at != filled):
                raise ValueError(
                    f"position must be where {filled} of {size} keys end, got {at}: the saved "
                    "state is damaged"
                )
            self._known, self._seen = (at, filled), _mark(x)
        return self._known

    @torch.no_grad()
    def _place(self, at: int, filled: int) -> None:
        """Write the position; numbers travel with the launch, so that no GPU is waited for."""
        self.position[0] = at
        self.position[1] = filled
        self._known = at, filled
        if not torch.compiler.is_compiling():
            self._seen = _mark(self.position)

    def __setstate__(self, state: Any) -> None:
        """A copy's buffer is another one: it is read anew."""
        super().__setstate__(state)
        self._seen = None

    def _apply(self, fn: Any, recurse: bool = True) -> "MemoryQueue":
        known, before = self._at(), self.position
        super()._apply(fn, recurse)
        if self.position is not before:
            self._place(*known)  # `to_empty` brings no values along
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        """As any module, but what is loaded in part or fails leaves an empty queue, no mixture."""
        parts = {"keys": self.keys, "ids": self.ids, "position": self.position}
        kept = {prefix + name: x for name, x in parts.items() if x is not None}
        if not any(prefix + name in state_dict for name in parts):
            return super()._load_from_state_dict(state_dict, prefix, *rest)
        whole = all(
            getattr(state_dict.get(name), "shape", None) == x.shape for name, x in kept.items()
        )
        self._place(0, 0)
        super()._load_from_state_dict(state_dict, prefix, *rest)
        if self.position is not parts["position"]:  # assign=True: the caller's own tensor
            self.position = self.position.clone()
        self._seen = None
        if not whole:
            return self._place(0, 0)
        try:
            self._at()
        except ValueError:
            self._place(0, 0)
            raise

    def __len__(self) -> int:
        """How many keys are in it."""
        return self._at()[1]

    def forward(self) -> Tensor:
        """The keys that are in it, oldest first, (M, D): a copy."""
        return self._ordered(self.keys)

    def key_ids(self) -> Tensor:
        """Their ids (M,), in the same order: a copy."""
        if self.ids is None:
            raise ValueError("the queue keeps no ids: make it with ids=True")
        return self._ordered(self.ids)

    def _ordered(self, buffer: Tensor) -> Tensor:
        at, filled = self._at()
        if filled < len(buffer):
            return buffer[:filled].clone()
        return torch.cat((buffer[at:], buffer[:at]))

    @torch.no_grad()
    def enqueue(
        self,
        keys: Tensor,
        ids: Tensor | None = None,
        *,
        group: Any = None,
    ) -> None:
        """Put keys in, in their order; of more than fit the last ones stay.

        Args:
            keys: (B, D) in any float dtype; B may differ from call to call and between processes.
            ids: (B,) integers, exactly where the queue keeps ids.
            group: "world" or a ProcessGroup, as the losses take it: the keys of all its processes
                are put in, in the order of their ranks, so that equal queues stay equal.
        """
        check.float_tensor("keys", keys)
        size, dim = self.keys.shape
        if keys.dim() != 2 or keys.shape[1] != dim:
            raise ValueError(f"keys must be (B, {dim}), got {tuple(keys.shape)}")
        if (ids is None) != (self.ids is None):
            kept = "ids" if self.ids is not None else "no ids"
            given = "None" if ids is None else "some"
            raise ValueError(f"ids must be given where the queue keeps them ({kept}), got {given}")
        keys = keys.detach().to(self.keys)
        if ids is not None and self.ids is not None:
            check.integers("ids", ids, len(keys))
            ids = ids.to(self.ids)
        if name := name_of(group):
            keys = _gathered(keys, resolve(name))
            ids = None if ids is None else _gathered(ids, resolve(name))
        self._put(keys, ids)

    def _put(self, keys: Tensor, ids: Tensor | None) -> None:
        size, count = len(self.keys), len(keys)
        kept = min(count, size)
        at, filled = self._at()
        start = (at + count - kept) % size
        head = min(kept, size - start)
        for buffer, new in ((self.keys, keys), (self.ids, ids)):
            if buffer is not None and new is not None:
                new = new[count - kept :]
                buffer[start : start + head] = new[:head]
                buffer[: kept - head] = new[head:]
        self._place((start + kept) % size, min(size, filled + count))

    def extra_repr(self) -> str:
        size, dim = self.keys.shape
        return f"{size}, {dim}" + (", ids=True" if self.ids is not None else "")


def _mark(x: Tensor) -> tuple[int, int] | None:
    """Changes when x is replaced or written; None: nothing tells."""
    return None if x.is_inference() else (id(x), x._version)


def _several_processes() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _gathered(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The rows of all processes in the order of ranks, which may differ in number."""
    count = torch.tensor([len(x)], device=x.device)
    counts = [torch.zeros_like(count) for _ in range(dist.get_world_size(group))]
    dist.all_gather(counts, count, group=group)
    lengths = [int(n) for n in counts]
    padded = x.new_zeros((max(lengths), *x.shape[1:]))
    padded[: len(x)] = x
    parts = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([part[:n] for part, n in zip(parts, lengths, strict=True)])


@torch.no_grad()
def momentum_update(encoder: nn.Module, key_encoder: nn.Module, m: float = 0.999) -> None:
    """Move the key encoder slowly: `p_key = m p_key + (1 - m) p`; buffers are copied.

    Args:
        encoder: the one that learns; wrapped in DistributedDataParallel or torch.compile or not.
        key_encoder: a copy of it, changed in place. `copy.deepcopy(encoder)` makes one.
        m: in [0, 1]; 0 copies, 1 leaves the parameters alone.

    Raises:
        TypeError: for encoders that are no modules, such as their parameters.
        ValueError: for another m, or modules whose parameters or buffers differ in name, shape or
            device.

    Source: He et al., "Momentum Contrast", CVPR 2020, equation 2.

    Example:
        >>> import copy
        >>> encoder = nn.Linear(4, 2)
        >>> key_encoder = copy.deepcopy(encoder)
        >>> momentum_update(encoder, key_encoder, 0.99)
        >>> torch.equal(encoder.weight, key_encoder.weight)
        True
    """
    for name, module in (("encoder", encoder), ("key_encoder", key_encoder)):
        check.instance(name, module, nn.Module, "an nn.Module")
    check.number("m", m)
    if not 0 <= m <= 1:
        raise ValueError(f"m must lie in [0, 1], got {m}")
    source, target = (_bare(x) for x in (encoder, key_encoder))
    moved = _matching("parameter", dict(source.named_parameters()), dict(target.named_parameters()))
    copied = _matching("buffer", dict(source.named_buffers()), dict(target.named_buffers()))
    for new, old in _by_kind(moved):
        # Not `m old + (1 - m) new`: equal ones stay equal to the last bit.
        torch._foreach_lerp_(old, new, 1 - m)
    for buffer, slow in copied:
        slow.copy_(buffer)


def _bare(module: nn.Module) -> nn.Module:
    """Without DistributedDataParallel, torch.compile and the like, in any order."""
    wrapped = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    while True:
        inner = getattr(module, "module" if isinstance(module, wrapped) else "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return module
        module = inner


def _matching(
    kind: str, source: dict[str, Tensor], target: dict[str, Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """Tensors of one name, shape and device, two by two."""
    if odd := sorted(source.keys() ^ target.keys()):
        side = "encoder" if odd[0] in source else "key_encoder"
        raise ValueError(
            f"key_encoder must have the {kind}s of encoder, but {odd[0]!r} is in {side} alone"
        )
    for name, x in source.items():
        y = target[name]
        if x.shape != y.shape or x.device != y.device:
            raise ValueError(
                f"key_encoder's {kind} {name!r} must be {tuple(x.shape)} on {x.device} as "
                f"encoder's is, got {tuple(y.shape)} on {y.device}"
            )
        if x is y:
            raise ValueError(f"key_encoder must be a copy, but shares {kind} {name!r} with encoder")
    return [(x, target[name]) for name, x in source.items()]


def _by_kind(pairs: list[tuple[Tensor, Tensor]]) -> list[tuple[list[Tensor], list[Tensor]]]:
    """Lists of new and old tensors of one device and dtype each."""
    kinds: dict[Any, tuple[list[Tensor], list[Tensor]]] = {}
    for x, y in pairs:
        new, old = kinds.setdefault((y.device, y.dtype), ([], []))
        new.append(x.to(y.dtype))
        old.append(y)
    return list(kinds.values())
