"""Which kernel runs an operator: one table, and the choice from it."""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _extension, cpp, cpp_pairs, cuda, reference, triton_backend

OPERATORS = tuple(reference.__all__)
BACKENDS = ("reference", "cpp", "triton", "cuda")


class Unavailable(Exception):
    """Why a kernel cannot be loaded here."""


class Row(NamedTuple):
    """One kernel: `load()` returns it or raises Unavailable; `can_run(*args)` says why not.

    `unasked(x)`: whether "auto" may choose it for x; by name it is had anyway.
    """

    op: str
    backend: str
    priority: int
    load: Callable[[], Callable[..., Any]]
    can_run: Callable[..., str | None]
    unasked: Callable[[Tensor], bool] = lambda x: True


def _always(*args: Any, **kwargs: Any) -> None:
    return None


def _load_cpp(op: str) -> Callable[..., Any]:
    if reason := _extension.load():
        raise Unavailable(reason)
    kernel: Callable[..., Any] = getattr(cpp if op == "sign_step" else cpp_pairs, op)
    return kernel


def _load_gpu(backend: ModuleType, op: str) -> Callable[..., Any]:
    kernel = backend.load(op)
    if isinstance(kernel, str):
        raise Unavailable(kernel)
    return kernel


def _on_hopper(x: Tensor) -> bool:
    """GPUs of compute capability 9.0 (H100, H200): an H200 has run and checked these kernels."""
    return x.device.type == "cuda" and _capability(x.device) == (9, 0)


@functools.cache
def _capability(device: torch.device) -> tuple[int, int] | None:
    return torch.cuda.get_device_capability(device) if torch.cuda.is_available() else None


def _never(x: Tensor) -> bool:
    """0.13 times as fast as compiled PyTorch on an H200 (SigLIP, D = 512): only by name."""
    return False


def _gpu_row(
    backend: ModuleType,
    op: str,
    priority: int,
    can_run: Callable[..., str | None],
    unasked: Callable[[Tensor], bool],
) -> Row:
    name = backend.__name__.rpartition(".")[2].removesuffix("_backend")
    return Row(op, name, priority, functools.partial(_load_gpu, backend, op), can_run, unasked)


_MAY_TRITON = {"pair_sigmoid": _never}
_CPP_PAIRS = tuple(op for op in OPERATORS if op != "sign_step")
TABLE = (
    *(
        Row(op, "reference", 0, functools.partial(getattr, reference, op), _always)
        for op in OPERATORS
    ),
    Row("sign_step", "cpp", 10, functools.partial(_load_cpp, "sign_step"), cpp.sign_step_refusal),
    *(Row(op, "cpp", 10, functools.partial(_load_cpp, op), cpp_pairs.refusal) for op in _CPP_PAIRS),
    *(_gpu_row(cuda, op, 30, getattr(cuda, f"{op}_refusal"), _on_hopper) for op in cuda.OPERATORS),
    *(
        _gpu_row(triton_backend, op, 20, triton_backend.refusal, _MAY_TRITON.get(op, _on_hopper))
        for op in triton_backend.OPERATORS
    ),
)


@functools.cache
def _candidates(op: str) -> tuple[tuple[Row, Callable[..., Any] | str], ...]:
    """The rows of an operator, best first, each with its kernel or why there is none."""
    rows = sorted((r for r in TABLE if r.op == op), key=lambda r: -r.priority)
    return tuple((row, _load(row)) for row in rows)


def _load(row: Row) -> Callable[..., Any] | str:
    try:
        return row.load()
    except Unavailable as reason:
        return str(reason)


def choose(
    op: str, backend: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Callable[..., Any]:
    """The best kernel for these arguments, or the one of `backend` ("auto": any).

    Raises:
        RuntimeError: a forced backend cannot run it; names each reason.
    """
    for row, kernel in _candidates(op):
        if (
            not isinstance(kernel, str)
            and (backend == row.backend or (backend == "auto" and row.unasked(args[0])))
            and row.can_run(*args, **kwargs) is None
        ):
            return kernel
    reasons = [
        kernel if isinstance(kernel, str) else str(row.can_run(*args, **kwargs))
        for row, kernel in _candidates(op)
        if backend in ("auto", row.backend)
    ]
    why = "; ".join(reasons) or "it has no kernel for this operator in this version"
    have = ", ".join(row.backend for row, _ in _candidates(op))
    raise RuntimeError(
        f"backend={backend!r} cannot run {op}: {why} (backends with a kernel: {have}; "
        "a backend is forced by the argument, by use_backend or by CLAE_FAST_BACKEND)"
    )


def serving(op: str, backend: str) -> str:
    """The backend for an operator that a loss does not need: the one asked for, or, where that has
    no kernel for it in any version of ours, "auto"."""
    known = backend == "auto" or any(r.op == op and r.backend == backend for r in TABLE)
    return backend if known else "auto"


_active = os.environ.get("CLAE_FAST_BACKEND") or "auto"


def requested(backend: str | None) -> str:
    """The backend asked for: the argument, else `use_backend`, else CLAE_FAST_BACKEND, else "auto".

    Raises:
        ValueError: an unknown word.
    """
    if backend is None:
        backend, source = _active, "CLAE_FAST_BACKEND"
    else:
        source = "backend"
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"{source} must be 'auto' or one of {BACKENDS}, got {backend!r}")
    return backend


@contextlib.contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Force a backend inside the `with`, for the whole process.

    Args:
        backend: "reference" (plain PyTorch, differentiable twice), "cpp", "triton", "cuda", "auto".

    Raises:
        ValueError: an unknown word. A backend that cannot run an operator raises RuntimeError with
            the reason when that operator is called.

    Example:
        >>> import torch, clae_fast
        >>> with clae_fast.use_backend("reference"):
        ...     loss = clae_fast.nt_xent_loss(torch.randn(4, 8), torch.randn(4, 8))
    """
    global _active
    if not isinstance(backend, str):
        raise ValueError(f"backend must be 'auto' or one of {BACKENDS}, got {backend!r}")
    before = _active
    _active = requested(backend)
    try:
        yield
    finally:
        _active = before


def available_backends() -> dict[str, dict[str, str]]:
    """`{operator: {backend: "ok" or the reason}}` for this installation and machine."""
    table: dict[str, dict[str, str]] = {}
    for op in OPERATORS:
        kernels = {row.backend: kernel for row, kernel in _candidates(op)}
        table[op] = {
            backend: "ok" if callable(kernel) else kernel
            for backend in BACKENDS
            for kernel in (kernels.get(backend, "no kernel in this version"),)
        }
    return table
