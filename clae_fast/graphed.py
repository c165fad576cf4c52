"""The attack of `clae_step` recorded as a CUDA graph: one launch instead of hundreds."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .backends import requested
from .sync_batchnorm import SYNCHRONIZED

DEVICE = "cuda"  # of the tensors that a graph can be recorded from
WARM_UP = 3  # attacks before the recording: libraries and compilers make their choices in them
MOST_KINDS = 8  # of attacks that are counted at a time

Loss = Callable[[Tensor, Tensor], Tensor]
Gradient = Callable[[nn.Module, Tensor, Loss], Tensor]


class GraphedAttack:
    """For `clae_step(..., attack=GraphedAttack())`: the exact attack, as a CUDA graph.

    An attack is a forward and a backward of the encoder, hundreds of small kernels; where the batch
    is small, launching them takes longer than running them. The first three attacks run as
    `attack="exact"` does, the next one is recorded, and all further ones like it are replayed, with
    the encoder's weights of that time: of the same shape, dtype, layout, autocast, backend, and
    numbers, words and flags in all modules of encoder and loss (training mode, momentum, dropout,
    temperature). Others (a shorter last batch) run as "exact". One object serves one encoder and
    one loss.

    Weights that are replaced, not updated in place, are seen, and recorded anew after three attacks
    more. What else changes what the encoder computes (hooks, a switch of PyTorch's, modules put in
    place of others) is not seen: call `reset`. Memory: the activations of one attack stay
    allocated. Not recorded, but run as "exact": encoders with SyncBatchNorm in several processes.
    An encoder compiled with `mode="reduce-overhead"` has graphs of its own already.

    Not run on a GPU yet: tested with a recorder of PyTorch's operators in place of CUDA's.

    Example:
        >>> attack = GraphedAttack()
        >>> for x_i, x_j in loader:                                      # doctest: +SKIP
        ...     out = clae_step(encoder, x_i, x_j, attack=attack)
    """

    def __init__(self) -> None:
        self._of: tuple[nn.Module, Loss] | None = None
        self.reset()

    def reset(self) -> None:
        """Forget what was recorded; the encoder and the loss stay."""
        self._attacks: dict[Any, int] = {}
        self._recorded: tuple[Any, Any] | None = None  # its key, and where the tensors lie
        self._replay: Callable[[], None] | None = None
        self._x = self._grad = torch.empty(0)

    def gradient(self, compute: Gradient, encoder: nn.Module, x: Tensor, loss: Loss) -> Tensor:
        """`compute(encoder, x, loss)`; valid until the next call.

        Raises:
            ValueError: x is not on a GPU; another encoder or loss than before.
            RuntimeError: what the encoder does cannot be recorded.
        """
        if x.device.type != DEVICE:
            raise ValueError(
                f'attack=GraphedAttack() needs images on a GPU, got x_i on {x.device}: use "exact"'
            )
        if self._of is None:
            self._of = (encoder, loss)
        if self._of[0] is not encoder or self._of[1] is not loss:
            what = "encoder" if self._of[0] is not encoder else "loss"
            raise ValueError(f"attack=GraphedAttack() has served another {what}: make a new one")
        key = (
            x.shape, x.stride(), x.dtype, x.device, requested(None), _settings(encoder, loss),
            torch.is_autocast_enabled(x.device.type), torch.get_autocast_dtype(x.device.type),
        )  # fmt: skip
        if self._recorded is not None and self._recorded[1] != _places(encoder, loss):
            self.reset()
        if self._recorded is None:
            if len(self._attacks) > MOST_KINDS:  # a temperature that is never twice the same
                self._attacks.clear()
            attacks = self._attacks.get(key, 0)
            self._attacks[key] = attacks + 1
            if attacks < WARM_UP or _synchronises(encoder) or _meets(loss):
                return compute(encoder, x, loss)
            self._record(key, compute, encoder, x, loss)
        assert self._recorded is not None
        if self._recorded[0] != key:
            return compute(encoder, x, loss)
        assert self._replay is not None
        with torch.no_grad():
            self._x.copy_(x)
        self._replay()
        return self._grad

    def _record(
        self, key: Any, compute: Gradient, encoder: nn.Module, x: Tensor, loss: Loss
    ) -> None:
        # The images' own memory is the caller's: the graph reads a copy.
        self._x = torch.empty_like(x)
        try:
            self._replay, self._grad = record(lambda: compute(encoder, self._x, loss), x.device)
        except RuntimeError as error:
            self.reset()
            cause = error.__context__ or error  # the end of a failed recording fails too
            raise RuntimeError(
                "attack=GraphedAttack(): what the encoder or the loss does cannot be recorded in a "
                f'CUDA graph ({str(cause).splitlines()[0]}): start anew with attack="exact"'
            ) from error
        self._recorded = (key, _places(encoder, loss))


def record(
    function: Callable[[], Tensor], device: torch.device
) -> tuple[Callable[[], None], Tensor]:
    """What runs the GPU's work of `function` again, and its result, which each run fills anew.
    Recording runs nothing."""
    with torch.cuda.device(device):
        before = torch.cuda.current_stream(device)
        # A stream of that GPU: PyTorch's own is of whichever was current at its first use.
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)
        try:
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                result = function()
        finally:
            torch.cuda.set_stream(before)  # the end of a failed recording leaves its own
    return graph.replay, result


def _tensors(*owners: object) -> Iterator[Tensor]:
    for owner in owners:
        if isinstance(owner, nn.Module):
            yield from owner.parameters()
            yield from owner.buffers()


def _places(encoder: nn.Module, loss: Loss) -> tuple[int, ...]:
    """Where weights and buffers lie: a graph reads them there."""
    return tuple(t.data_ptr() for t in _tensors(encoder, loss))


def _settings(*owners: object) -> tuple[Any, ...]:
    """The numbers, words and flags of all modules: they are part of what was recorded."""
    plain = (bool, int, float, str, type(None))
    return tuple(
        (name, value)
        for owner in owners
        if isinstance(owner, nn.Module)
        for module in owner.modules()
        for name, value in vars(module).items()
        if isinstance(value, plain) and name != "branch"  # which the attack itself switches
    )


def _meets(loss: Loss) -> bool:
    """Whether the loss is over a process group: its ranks meet on the host, which no graph can."""
    told = loss.keywords if isinstance(loss, functools.partial) else {}
    return getattr(loss, "group", None) is not None or told.get("group") is not None


def _synchronises(encoder: nn.Module) -> bool:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return (
        distributed
        and torch.distributed.get_world_size() > 1
        and any(isinstance(m, SYNCHRONIZED) for m in encoder.modules())
    )
