"""The one registration file: a schema, an implementation and a fake for every operator.

An operator exists without any extension; inside, `choose` picks the kernel, so `torch.compile`
sees one opaque node. Raw operators have no gradient of their own: see `autograd.py`.
"""

import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from . import reference
from .backends import choose
from .numerics import compute_dtype

NAMESPACE = "clae_fast"
SCALE = "float scale, Tensor? scale_tensor=None, bool reciprocal=False"
_SKIP = 'str skip="none", int offset=0'
_IDS = "Tensor? row_ids=None, Tensor? col_ids=None"
SCHEMAS = {
    "pair_lse": f"(Tensor q, Tensor k, {SCALE}, {_SKIP}, {_IDS}, bool wide=False, *, "
    "str backend='auto') -> Tensor",
    "pair_grad": f"(Tensor q, Tensor k, {SCALE}, {_SKIP}, Tensor? row_lse=None, "
    "Tensor? row_weight=None, Tensor? col_lse=None, Tensor? col_weight=None, "
    f"{_IDS}, *, str backend='auto') -> Tensor",
    "pair_mean": f"(Tensor q, Tensor k, {SCALE}, {_SKIP}, {_IDS}, bool wide=False, *, "
    "str backend='auto') -> (Tensor, Tensor)",
    "pair_sigmoid": "(Tensor q, Tensor k, float scale, float bias, Tensor? scale_tensor=None, "
    "bool reciprocal=False, Tensor? bias_tensor=None, Tensor? row_weight=None, "
    f"{_IDS}, bool need_dq=False, bool need_dk=False, int offset=0, *, "
    "str backend='auto') -> (Tensor, Tensor, Tensor, Tensor)",
    "pair_uel": "(Tensor q, Tensor k, float scale, float negative_weight, "
    "Tensor? scale_tensor=None, bool reciprocal=False, Tensor? row_weight=None, "
    f"{_IDS}, bool need_dq=False, int offset=0, *, str backend='auto')"
    " -> (Tensor, Tensor)",
    "contrast": f"(Tensor q, Tensor k, Tensor? negatives, {SCALE}, str form='nt_xent', "
    "bool normalize=True, bool need_dq=False, bool need_dk=False, bool need_dnegatives=False, "
    "bool need_dscale=False, str reduction='none', *, str backend='auto')"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    "sign_step": "(Tensor x, Tensor grad, Tensor x0, float step, float eps, float? low=None, "
    "float? high=None, Tensor? step_tensor=None, Tensor? eps_tensor=None, "
    "Tensor? low_tensor=None, Tensor? high_tensor=None, *, str backend='auto') -> Tensor",
}


def _implementation(op: str) -> Callable[..., Any]:
    def run(*args: Any, backend: str = "auto", **kwargs: Any) -> Any:
        kernel = choose(op, backend, args, kwargs)
        if not torch.is_grad_enabled():
            return kernel(*args, **kwargs)
        with torch.no_grad():
            return kernel(*args, **kwargs)

    return run


def _fake(op: str) -> Callable[..., Any]:
    """Shapes and dtypes of an operator's results, from its arguments by name."""
    signature = inspect.signature(getattr(reference, op))

    def run(*args: Any, backend: str = "auto", **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return FAKES[op](SimpleNamespace(**bound.arguments))

    return run


def _like(x: Tensor, *shape: int) -> Tensor:
    return x.new_empty(shape, dtype=compute_dtype(x.dtype))


def _lse(a: Any) -> Tensor:
    x = _like(a.q, a.q.shape[0])
    return x.double() if a.wide else x


def _asked(x: Tensor, need: bool) -> Tensor:
    return _like(x, *x.shape) if need else _like(x, 0)


def fake_contrast(a: Any) -> tuple[Tensor, ...]:
    B = a.q.shape[0]
    rows = {"nt_xent": (2 * B,), "one_way": (B,), "two_way": (B, 2)}[a.form]
    return (
        _like(a.q, *(rows if a.reduction == "none" else ())),
        _like(a.q, rows[0]),
        _like(a.q, B if a.form == "two_way" else 0),
        _asked(a.q, a.need_dq),
        _asked(a.k, a.need_dk),
        _like(a.q, 0) if a.negatives is None else _asked(a.negatives, a.need_dnegatives),
        _like(a.q, 1 if a.need_dscale else 0),
    )


def _fake_pair_sigmoid(a: Any) -> tuple[Tensor, ...]:
    N = a.q.shape[0]
    return _like(a.q, N), _like(a.q, N), _asked(a.q, a.need_dq), _asked(a.k, a.need_dk)


FAKES: dict[str, Callable[[Any], Any]] = {
    "pair_lse": _lse,
    "pair_grad": lambda a: _like(a.q, *a.q.shape),
    "pair_mean": lambda a: (_lse(a), _like(a.q, *a.q.shape)),
    "pair_sigmoid": _fake_pair_sigmoid,
    "pair_uel": lambda a: (_like(a.q, a.q.shape[0]), _asked(a.q, a.need_dq)),
    "contrast": fake_contrast,
    "sign_step": lambda a: torch.empty_like(a.x),
}

_KERNELS: dict[str, Callable[..., Any]] = {}
_OPERATORS: dict[str, Callable[..., Any]] = {}
_library = torch.library.Library(NAMESPACE, "DEF")
raw = getattr(torch.ops, NAMESPACE)


def define(op: str, schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Register an operator."""
    _library.define(op + schema.replace("'", '"'))
    _library.impl(op, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{op}", fake, lib=_library)
    _KERNELS[op], _OPERATORS[op] = kernel, getattr(raw, op).default


for _op, _schema in SCHEMAS.items():
    define(_op, _schema, _implementation(_op), _fake(_op))
_PLAIN = (Tensor, torch.nn.Parameter)


def call(op: str, *args: Any, **kwargs: Any) -> Any:
    """An operator by name; its kernel directly where nobody watches operators.

    The dispatcher takes about 20 us for so many arguments, a tenth of the time of a small loss.
    """
    run = _OPERATORS[op] if watched(*args, *kwargs.values()) else _KERNELS[op]
    return run(*args, **kwargs)


def watched(*args: Any) -> bool:
    """Compilers, modes, transforms, tracers, profilers, subclasses and meta see operators."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._is_torch_function_mode_enabled()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or torch._C._autograd._profiler_enabled()
        or any(isinstance(x, Tensor) and not _is_plain(x) for x in args)
    )


def _is_plain(x: Tensor) -> bool:
    return type(x) in _PLAIN and not x.is_meta and not x._is_zerotensor()
