"""What the losses need of torch.distributed: numbers and rows of all ranks, and a named culprit.

Every exchange is a collective that can be watched while it runs. A rank that waits for more than a
second says so in the group's store; when a connection breaks or the group's timeout is over, the
ranks that never said anything are the ones to name.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

WORLD = "world"
_NOTICE = 1.0  # seconds of waiting before a rank says so
_GRACE = 5.0  # seconds in which the others can say so, once one of them saw a failure
_PREFIX = "clae_fast/waits/"


class Group:
    """A process group by name, and how its ranks meet.

    Args:
        name: of the group as torch.distributed knows it, or "world".
        what: the operation, for errors.
    """

    def __init__(self, name: str, what: str) -> None:
        self.group = resolve(name)
        self.what = what
        self.rank, self.size = dist.get_rank(self.group), dist.get_world_size(self.group)
        self.timeout = _timeout(self.group)

    def name_of(self, rank: int) -> int:
        """The rank among all processes."""
        return int(dist.get_global_rank(self.group, rank))

    # ------------------------------------------------------------------------------- collectives

    def numbers(self, mine: Sequence[int], device: torch.device) -> list[list[int]]:
        """The integers of every rank, on the host; as many on each.

        On a GPU they travel on a stream of their own: the host waits for the other hosts, not for
        work that is queued on the device.
        """
        home = _home_of_numbers(self.group, device)
        with _aside(home):
            sent = torch.tensor(mine, dtype=torch.int64, device=home)
            got = sent.new_empty(self.size * len(mine))
            self._finish(_all_gather(got, sent, group=self.group, async_op=True), home, watch=True)
            return [list(row) for row in got.view(self.size, -1).tolist()]

    def gather(self, x: Tensor) -> Tensor:
        """x of every rank, (size, *x.shape); of one shape on all."""
        out = x.new_empty((self.size, *x.shape))
        sent, got = _bytes(x.contiguous()), _bytes(out)
        self._finish(_all_gather(got, sent, group=self.group, async_op=True), x.device)
        return out

    def total(self, x: Tensor) -> Tensor:
        """The sum of x over the ranks."""
        out = x.detach().clone(memory_format=torch.contiguous_format)
        self._finish(dist.all_reduce(out, group=self.group, async_op=True), out.device)
        return out

    def pass_on(self, sent: Tensor, out: Tensor) -> Callable[[], None]:
        """Bytes to the next rank, and those of the one before into `out`.

        Returns at once; they are there after the returned function was called.
        """
        to, source = (self.rank + 1) % self.size, (self.rank - 1) % self.size
        from_each, to_each = [0] * self.size, [0] * self.size
        from_each[source], to_each[to] = out.numel(), sent.numel()
        # A collective, as gloo cannot be asked how a receive is getting on.
        work = dist.all_to_all_single(
            out, sent, from_each, to_each, group=self.group, async_op=True
        )
        return lambda: self._finish(work, out.device)

    # ---------------------------------------------------------------------------------- failures

    def _finish(self, work: Any, device: torch.device, watch: bool = False) -> None:
        """Wait for a collective; raises with the ranks that failed to take part.

        A GPU's collectives are only ordered on its stream, unless `watch`: PyTorch's watchdog ends
        the process of one that never ends.
        """
        try:
            if device.type == "cpu":
                self._wait(work)
            else:
                if watch:
                    self._poll(work)
                work.wait()
        except (RuntimeError, TimeoutError) as error:
            raise self._named(error) from error

    def _wait(self, work: Any) -> None:
        deadline = time.monotonic() + self.timeout
        while True:
            left = deadline - time.monotonic()
            try:
                work.wait(timedelta(seconds=max(1e-3, min(_NOTICE, left))))
                return
            except RuntimeError:
                if work.is_completed():  # it failed, or ended just now
                    work.wait()
                    return
            if left < _NOTICE:
                raise TimeoutError(self._late())
            self._say()

    def _poll(self, work: Any) -> None:
        start, said = time.monotonic(), False
        while not work.is_completed():
            waited = time.monotonic() - start
            if waited > self.timeout:
                raise TimeoutError(self._late())
            if not said and waited > _NOTICE:
                self._say()
                said = True
            if waited > 1e-3:
                time.sleep(1e-4)

    def _late(self) -> str:
        return f"no answer within the group's timeout, {self.timeout:g} s"

    def _say(self) -> None:
        """Leave a sign in the store: this rank is here, and waits."""
        with contextlib.suppress(RuntimeError):
            store = dist.distributed_c10d._get_process_group_store(self.group)
            store.set(f"{_PREFIX}{self.rank}", str(_count(self.group)))

    def _named(self, error: Exception) -> RuntimeError:
        """The error to raise: who did not take part."""
        missing = self._missing(0.0 if isinstance(error, TimeoutError) else _GRACE)
        reason = " ".join(str(error).split())
        if missing is None:
            who = "a rank, and the store that would know which (rank 0 often keeps it),"
        elif missing:
            names = ", ".join(str(self.name_of(r)) for r in missing)
            who = f"rank {names}" if len(missing) == 1 else f"ranks {names}"
        else:
            return RuntimeError(f"{self.what}: an exchange between the ranks failed: {reason}")
        return RuntimeError(
            f"{self.what}: {who} did not take part in the exchange of embeddings: ended, stuck, or "
            f"not calling the same losses in the same order ({reason})"
        )

    def _missing(self, grace: float) -> list[int] | None:
        """Ranks that did not say that they wait, within `grace` seconds; None: nobody can tell."""
        self._say()
        now, deadline = _count(self.group), time.monotonic() + min(grace, self.timeout)
        while True:
            try:
                store = dist.distributed_c10d._get_process_group_store(self.group)
                keys = {r: f"{_PREFIX}{r}" for r in range(self.size) if r != self.rank}
                missing = [
                    r
                    for r, key in keys.items()
                    if not store.check([key]) or int(store.get(key)) < now
                ]
            except RuntimeError:
                return None
            if not missing or time.monotonic() >= deadline:
                return missing
            time.sleep(0.1)


# ----------------------------------------------------------------------------------------- groups


def name_of(group: Any) -> str:
    """How an operator is told of a group: "" for None, "world", or the group's own name.

    Raises:
        TypeError: neither None, "world" nor a ProcessGroup.
        ValueError: this process is no member.
    """
    if group is None:
        return ""
    if isinstance(group, str) and group == WORLD:
        return WORLD
    if dist.is_available() and isinstance(group, dist.ProcessGroup):
        return str(group.group_name)
    if dist.is_available() and group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("group must be one that this process is a member of")
    raise TypeError(
        f'group must be None (this process alone), "world" or a torch.distributed.ProcessGroup, '
        f"got {group!r}"
    )


def resolve(name: str) -> Any:
    """The group of a name.

    Raises:
        RuntimeError: torch.distributed is not initialised.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError(
            "group needs torch.distributed.init_process_group() first, or group=None for this "
            "process alone"
        )
    if name == WORLD:
        return dist.group.WORLD
    return dist.distributed_c10d._resolve_process_group(name)  # type: ignore


def _home_of_numbers(group: Any, device: torch.device) -> torch.device:
    """Where a few integers are exchanged: the CPU, if the group has a backend for it."""
    return torch.device("cpu") if "cpu" in _devices(group) else device


def _devices(group: Any) -> list[str]:
    return [pair.split(":")[0] for pair in dist.get_backend_config(group).split(",")]


def _timeout(group: Any) -> float:
    """Seconds; the shortest of the group's backends."""
    backends = [group._get_backend(torch.device(device)) for device in _devices(group)]
    return float(min(b.options._timeout.total_seconds() for b in backends))


@contextlib.contextmanager
def _aside(device: torch.device) -> Iterator[None]:
    if device.type != "cuda":
        yield
        return
    with torch.cuda.stream(_side_stream(device)):
        yield


_streams: dict[torch.device, Any] = {}


def _side_stream(device: torch.device) -> Any:
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)
    return _streams[device]


_counts: dict[str, int] = {}


def begin(group: Any) -> None:
    """Count a meeting of the ranks: all of them count alike, as they call the same losses."""
    _counts[group.group_name] = _count(group) + 1


def _count(group: Any) -> int:
    return _counts.get(group.group_name, 0)


# ------------------------------------------------------------------------------------ small parts


def _all_gather(out: Tensor, x: Tensor, **options: Any) -> Any:
    """`all_gather_into_tensor`, by the name that this version of PyTorch does not warn about."""
    function = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    return function(out, x, **options)


def _bytes(x: Tensor) -> Tensor:
    """x as bytes, one dimension, no copy: backends differ in the dtypes they know."""
    return x.view(-1).view(torch.uint8)
