"""The rows of all ranks, a block at a time: gathered at once, or passed round a ring.

With W ranks of b rows each, width D and e bytes an element, a pass over the rows sends and
receives (W - 1) b D e bytes per rank in either mode. `gather` keeps what it received, W b D e
bytes, until the call ends, and passes over it as often as it likes; `ring` keeps two blocks,
2 b D e bytes, sends again for every pass, and receives the next block while the last one is
computed on.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from .process_group import Group

MODES = ("auto", "gather", "ring")
GATHER_BYTES = 256 << 20
""""auto" gathers up to so many bytes of rows."""
_ALIGN = 16


class Exchange:
    """One call's meeting of the ranks.

    Args:
        group: name of the process group.
        call: what the ranks compute (`process_group.described`).
        rows: of this rank.
        mode: "auto", "gather" or "ring".
        row_bytes: of one row with everything that a rank sends of it when it gathers.
        flags: bits; `self.flags` has those that any rank set.
        device: of the rows.

    Raises:
        ValueError: the ranks do not compute the same, or none of them has a row.
        LostRankError: a rank did not take part; names it.
    """

    def __init__(
        self,
        group: str,
        call: str,
        rows: int,
        mode: str,
        row_bytes: int,
        flags: int,
        device: torch.device,
    ) -> None:
        self.group = Group(group, call)
        self.rank, self.ranks = self.group.rank, self.group.size
        told = self.group.meet(device, rows, flags)
        self.sizes = [t.rows for t in told]
        self.flags = 0
        for t in told:
            self.flags |= t.flags
        self.rows = sum(self.sizes)
        if self.rows == 0:
            raise ValueError(f"{call.partition(': ')[0]}: no rank of the group has a row")
        small = self.rows * row_bytes <= GATHER_BYTES
        self.ring = mode == "ring" or (mode == "auto" and not small)
        self._gathered: dict[int, tuple[Tensor, list[Tensor]]] = {}

    def others(self, *parts: Tensor, copies: int = 1) -> Iterator[tuple[Tensor, ...]]:
        """The same parts of every other rank, some ranks at a time, in a fixed order.

        `parts` have `copies` times this rank's rows in their first dimension (2: both views
        stacked). The first is kept between calls when gathering.
        """
        sizes = [copies * n for n in self.sizes]
        if self.ranks == 1:
            return iter(())
        if self.ring:
            return self._round(parts, sizes)
        rows = self._kept(parts[0], sizes)
        rest = [self._spans(x, sizes) for x in parts[1:]]
        return (span for span in zip(rows, *rest, strict=True) if len(span[0]))

    # -------------------------------------------------------------------------------------- gather

    def all_rows(self, x: Tensor, copies: int = 1) -> Tensor:
        """x of every rank, in the order of their ranks."""
        return self._all_rows(x, [copies * n for n in self.sizes])

    def _all_rows(self, x: Tensor, sizes: list[int]) -> Tensor:
        out = self._padded(x, sizes)
        if min(sizes) == max(sizes):
            return out.flatten(0, 1)
        return torch.cat([out[r, :n] for r, n in enumerate(sizes)])

    def _padded(self, x: Tensor, sizes: list[int]) -> Tensor:
        """(ranks, most rows of a rank, ...)."""
        if len(x) < max(sizes):
            x = torch.cat((x, x.new_zeros(max(sizes) - len(x), *x.shape[1:])))
        return self.group.gather(x)

    def _spans(self, x: Tensor, sizes: list[int]) -> list[Tensor]:
        """The rows of the others: all before and all after this rank, or, where ranks differ, one
        by one, as joining them would take as much memory again."""
        out = self._padded(x, sizes)
        if min(sizes) == max(sizes):
            return [out[: self.rank].flatten(0, 1), out[self.rank + 1 :].flatten(0, 1)]
        return [out[r, :n] for r, n in enumerate(sizes) if r != self.rank]

    def _kept(self, x: Tensor, sizes: list[int]) -> list[Tensor]:
        """`_spans`, once for each tensor of the call."""
        if id(x) not in self._gathered:  # x is kept too: while it lives, its id is its own
            self._gathered[id(x)] = x, self._spans(x, sizes)
        return self._gathered[id(x)][1]

    # ---------------------------------------------------------------------------------------- ring

    def _round(self, parts: Sequence[Tensor], sizes: list[int]) -> Iterator[tuple[Tensor, ...]]:
        """Block after block: that of the rank before, of the one before that, and so on.

        The first one sets out now, and each next one before the last is handed out.
        """
        room = max(_block_bytes(parts, n) for n in sizes)
        block, coming = (parts[0].new_empty(room, dtype=torch.uint8) for _ in range(2))
        _pack(parts, block)
        arrive = self._start(parts, sizes, 0, block, coming)
        return self._hops(parts, sizes, block, coming, arrive)

    def _start(
        self,
        parts: Sequence[Tensor],
        sizes: list[int],
        hop: int,
        block: Tensor,
        coming: Tensor,
    ) -> Callable[[], None]:
        sent, expected = (
            _block_bytes(parts, sizes[(self.rank - h) % self.ranks]) for h in (hop, hop + 1)
        )
        return self.group.pass_on(block[:sent], coming[:expected])

    def _hops(
        self,
        parts: Sequence[Tensor],
        sizes: list[int],
        block: Tensor,
        coming: Tensor,
        arrive: Callable[[], None],
    ) -> Iterator[tuple[Tensor, ...]]:
        for hop in range(1, self.ranks):
            arrive()
            block, coming = coming, block
            if hop + 1 < self.ranks:  # on its way while this block is computed on
                arrive = self._start(parts, sizes, hop, block, coming)
            rows = sizes[(self.rank - hop) % self.ranks]
            if rows:
                yield _unpack(block, parts, rows)


def _block_bytes(parts: Sequence[Tensor], rows: int) -> int:
    return _places(parts, rows)[-1]


def _places(parts: Sequence[Tensor], rows: int) -> list[int]:
    """Where each part of a block of `rows` rows begins, in bytes, and where the block ends."""
    places = [0]
    for x in parts:
        places.append(places[-1] + -(-rows * _row_bytes(x) // _ALIGN) * _ALIGN)
    return places


def _row_bytes(x: Tensor) -> int:
    return x.shape[1:].numel() * x.element_size()


def _pack(parts: Sequence[Tensor], block: Tensor) -> None:
    """One block of bytes: a ring that sends every part on its own waits for each."""
    rows = len(parts[0])
    for x, place in zip(parts, _places(parts, rows), strict=False):
        _part(block, place, x, rows).copy_(x)


def _unpack(block: Tensor, parts: Sequence[Tensor], rows: int) -> tuple[Tensor, ...]:
    places = _places(parts, rows)
    return tuple(_part(block, at, x, rows) for x, at in zip(parts, places, strict=False))


def _part(block: Tensor, place: int, like: Tensor, rows: int) -> Tensor:
    """The view of a block where a part with the type and width of `like` lies."""
    there = block[place : place + rows * _row_bytes(like)]
    return there.view(like.dtype).view(rows, *like.shape[1:])
