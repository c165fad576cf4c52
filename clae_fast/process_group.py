"""What the losses need of torch.distributed: numbers and rows of all ranks, and a named culprit.

Every exchange begins with a meeting: a few numbers of fixed length, by which the ranks see that
they compute the same, and how many rows each has. Every collective can be watched while it runs;
when a connection breaks or the group's timeout is over, `lost_ranks` knows who is missing.
"""

import contextlib
import hashlib
import re
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .lost_ranks import GRACE, NOTICE, LostRankError, Signs

WORLD = "world"
_TEXT = 2048  # bytes of what a rank says of itself when they disagree


class Told(NamedTuple):
    """What a rank says of itself at a meeting."""

    rows: int
    flags: int


class Group:
    """A process group by name, and how its ranks meet.

    Args:
        name: of the group as torch.distributed knows it, or "world".
        call: what the ranks compute, as `described` puts it: the same on all of them.
    """

    def __init__(self, name: str, call: str) -> None:
        self.group = resolve(name)
        self.call = call
        self.rank, self.size = dist.get_rank(self.group), dist.get_world_size(self.group)
        self.timeout = _timeout(self.group)
        self.signs = _signs(self.group)

    # ----------------------------------------------------------------------------------- meetings

    def meet(self, device: torch.device, rows: int = 0, flags: int = 0) -> list[Told]:
        """The ranks say how many rows they have and which flags are set.

        Raises:
            ValueError: they do not compute the same; names a rank, what it says and what rank 0
                says.
            LostRankError: a rank did not take part.
        """
        self.signs.count += 1
        digest = hashlib.blake2b(self.call.encode(), digest_size=7).digest()
        mine = [int.from_bytes(digest, "little"), rows, flags, self.signs.count]
        told = self._numbers(mine, device)
        # All go on from one count, whoever was here before or has left a call out.
        self.signs.count = max(numbers[3] for numbers in told)
        if any(numbers[0] != told[0][0] for numbers in told):
            raise self._disagreement(device)
        return [Told(numbers[1], numbers[2]) for numbers in told]

    def _disagreement(self, device: torch.device) -> ValueError:
        text = self.call.encode()[:_TEXT].ljust(_TEXT)
        home = _home_of_numbers(self.group, device)
        with _aside(home):
            sent = torch.tensor(list(text), dtype=torch.uint8, device=home)
            got = sent.new_empty(self.size * _TEXT)
            self._finish(_all_gather(got, sent, group=self.group, async_op=True), home, watch=True)
            rows = got.view(self.size, _TEXT).tolist()
        texts = [bytes(row).decode(errors="replace").rstrip() for row in rows]
        other = next(r for r, text in enumerate(texts) if text != texts[0])
        return ValueError(_difference(texts[0], texts[other], self.name_of(0), self.name_of(other)))

    def name_of(self, rank: int) -> int:
        """The rank among all processes."""
        return int(dist.get_global_rank(self.group, rank))

    # ------------------------------------------------------------------------------- collectives

    def _numbers(self, mine: list[int], device: torch.device) -> list[list[int]]:
        """The integers of every rank, on the host; as many on each.

        On a GPU they travel on a stream of their own: the host waits for the other hosts, and for
        collectives of the group that were begun before, not for what is queued on the device.
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
        self.signs.take_back()

    @property
    def _grace(self) -> float:
        """Seconds of the timeout that are left for finding out who is missing."""
        return min(GRACE, self.timeout / 3)

    def _wait(self, work: Any) -> None:
        deadline = time.monotonic() + self.timeout - self._grace
        while True:
            left = deadline - time.monotonic()
            try:
                work.wait(timedelta(seconds=max(1e-3, min(NOTICE, left))))
                return
            except RuntimeError:
                if work.is_completed():  # it failed, or ended just now
                    work.wait()
                    return
            if time.monotonic() >= deadline:
                raise TimeoutError(self._late())
            self.signs.leave()

    def _poll(self, work: Any) -> None:
        start, deadline = time.monotonic(), self.timeout - self._grace
        while not work.is_completed():
            waited = time.monotonic() - start
            if waited > deadline:
                raise TimeoutError(self._late())
            if not self.signs.left and waited > NOTICE:
                self.signs.leave()
            if waited > 1e-3:
                time.sleep(1e-4)

    def _late(self) -> str:
        return f"no answer within the group's timeout, {self.timeout:g} s"

    def _named(self, error: Exception) -> LostRankError:
        """The error to raise: who did not take part."""
        missing = self.signs.missing(self._grace)
        reason = " ".join(str(error).split()).partition(" This is typically")[0]
        what = self.call.partition(": ")[0]
        if missing is None:
            who = "a rank did not take part, and the store that would know which is silent too (it "
            who += "is often rank 0's)"
        elif missing:
            names = ", ".join(str(self.name_of(r)) for r in missing)
            who = (
                f"rank {names} did not take part"
                if len(missing) == 1
                else (f"ranks {names} did not take part")
            )
        else:
            return LostRankError(
                f"{what}: an exchange between the ranks failed, though all of them are there: one "
                f"may have called something else meanwhile ({reason})"
            )
        return LostRankError(f"{what}: {who}: ended, stuck, or still at other work ({reason})")


def described(name: str, **facts: Any) -> str:
    """A call and its options in one line, for ranks to compare."""
    return f"{name}: " + "; ".join(f"{k}={_word(v)}" for k, v in facts.items())


def _word(value: Any) -> str:
    if isinstance(value, Tensor):
        return "a tensor"
    if isinstance(value, float):
        return repr(float(value))  # NumPy's own would be another word
    return re.sub(r" at 0x[0-9a-fA-F]+", "", str(value))  # differs from process to process


def _difference(first: str, other: str, rank_0: int, rank: int) -> str:
    """What two ranks' calls differ in."""
    (name, _, facts), (other_name, _, other_facts) = (x.partition(": ") for x in (first, other))
    if name != other_name:
        return (
            "the ranks of a group must make the same calls in the same order, got "
            f"{name} on rank {rank_0} and {other_name} on rank {rank}"
        )
    mine, theirs = (dict(_pair(x) for x in y.split("; ")) for y in (facts, other_facts))
    key = next((k for k in mine if theirs.get(k) != mine[k]), "the call")
    return (
        f"{name}: {key} must be the same on every rank of the group, got {mine.get(key)} on rank "
        f"{rank_0} and {theirs.get(key)} on rank {rank}"
    )


def _pair(fact: str) -> tuple[str, str]:
    key, _, value = fact.partition("=")
    return key, value


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
        'group must be None (this process alone), "world" or a torch.distributed.ProcessGroup '
        f"(of a DeviceMesh: mesh.get_group()), got {group!r}"
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
    try:
        return dist.distributed_c10d._resolve_process_group(name)  # type: ignore[attr-defined, arg-type]
    except (RuntimeError, ValueError) as error:
        raise RuntimeError(
            f"group is one that is gone, {name!r}: destroy_process_group() was called since"
        ) from error


def _home_of_numbers(group: Any, device: torch.device) -> torch.device:
    """Where a few integers are exchanged: the CPU, if the group has a backend for it."""
    return torch.device("cpu") if "cpu" in _devices(group) else device


def _devices(group: Any) -> list[str]:
    return [pair.split(":")[0] for pair in dist.get_backend_config(group).split(",")]


def _timeout(group: Any) -> float:
    """Seconds; the shortest of the group's backends."""
    found = [dist.default_pg_timeout]
    for device in _devices(group):
        options = getattr(group._get_backend(torch.device(device)), "options", None)
        found.append(getattr(options, "_timeout", None) or dist.default_pg_timeout)
    return float(min(timeout.total_seconds() for timeout in found))


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


_known: dict[str, Signs] = {}


def _signs(group: Any) -> Signs:
    """Of this very group: another may have had its name before."""
    signs = _known.get(group.group_name)
    if signs is None or signs.group is not group:
        signs = _known[group.group_name] = Signs(group)
    return signs


# ------------------------------------------------------------------------------------ small parts


def _all_gather(out: Tensor, x: Tensor, **options: Any) -> Any:
    """`all_gather_into_tensor`, by the name that this version of PyTorch does not warn about."""
    function = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    return function(out, x, **options)


def _bytes(x: Tensor) -> Tensor:
    """x as bytes, one dimension, no copy: backends differ in the dtypes they know."""
    return x.view(-1).view(torch.uint8)
