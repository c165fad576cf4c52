"""The attack of `clae_step` recorded as a CUDA graph: one launch instead of hundreds."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

DEVICE = "cuda"  # of the tensors that a graph can be recorded from
WARM_UP = 3  # attacks before the recording: libraries and compilers make their choices in them

Loss = Callable[[Tensor, Tensor], Tensor]
Gradient = Callable[[nn.Module, Tensor, Loss], Tensor]


class GraphedAttack:
    """For `clae_step(..., attack=GraphedAttack())`: the exact attack, as a CUDA graph.

    An attack is a forward and a backward of the encoder, hundreds of small kernels; where the batch
    is small, launching them takes longer than running them. The first three attacks run as
    `attack="exact"` does, the next one is recorded, and all further ones of its shape, dtype,
    layout, autocast and training mode are replayed with the encoder's weights of that time. Others
    (a shorter last batch) run as "exact". One object serves one encoder and one loss.

    Weights that are replaced, not updated in place, are seen, and recorded anew after three attacks
    more. Memory: the activations of one attack stay allocated. Not recorded, but run as "exact":
    encoders with SyncBatchNorm in several processes. An encoder compiled with
    `mode="reduce-overhead"` has graphs of its own already.

    Not run on a GPU yet: tested with a recorder of PyTorch's operators in place of CUDA's.

    Example:
        >>> attack = GraphedAttack()
        >>> for x_i, x_j in loader:                                      # doctest: +SKIP
        ...     out = clae_step(encoder, x_i, x_j, attack=attack)
    """

    def __init__(self) -> None:
        self._of: tuple[nn.Module, Loss] | None = None
        self._forget()

    def _forget(self) -> None:
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
            x.shape, x.stride(), x.dtype, x.device, encoder.training,
            torch.is_autocast_enabled(x.device.type), torch.get_autocast_dtype(x.device.type),
        )  # fmt: skip
        if self._recorded is not None and self._recorded[1] != _places(encoder):
            self._forget()
        if self._recorded is None:
            attacks = self._attacks.get(key, 0)
            self._attacks[key] = attacks + 1
            if attacks < WARM_UP or _synchronises(encoder):
                return compute(encoder, x, loss)
            self._record(key, compute, encoder, x, loss)
        assert self._recorded is not None
        if self._recorded[0] != key:
            return compute(encoder, x, loss)
        assert self._replay is not None
        self._x.copy_(x)
        self._replay()
        return self._grad

    def _record(
        self, key: Any, compute: Gradient, encoder: nn.Module, x: Tensor, loss: Loss
    ) -> None:
        # The images' own memory is the caller's: the graph reads a copy.
        self._x = torch.empty_like(x)
        try:
            self._replay, self._grad = record(lambda: compute(encoder, self._x, loss))
        except RuntimeError as error:
            self._forget()
            raise RuntimeError(
                "attack=GraphedAttack(): what the encoder or the loss does cannot be recorded in a "
                f'CUDA graph ({str(error).splitlines()[0]}): use attack="exact"'
            ) from error
        self._recorded = (key, _places(encoder))


def record(function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """What runs the GPU's work of `function` again, and its result, which each run fills anew.
    Recording runs nothing."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()
    return graph.replay, result


def _places(encoder: nn.Module) -> tuple[int, ...]:
    """Where weights and buffers lie: a graph reads them there."""
    return tuple(t.data_ptr() for t in (*encoder.parameters(), *encoder.buffers()))


def _synchronises(encoder: nn.Module) -> bool:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return (
        distributed
        and torch.distributed.get_world_size() > 1
        and any(isinstance(m, nn.SyncBatchNorm) for m in encoder.modules())
    )
