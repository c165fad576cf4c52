"""The one registration file: a schema, an implementation and a fake for every operator.

An operator exists without any extension; inside, `choose` picks the kernel, so `torch.compile`
sees one opaque node. Raw operators have no gradient of their own: see `autograd.py`.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .backends import choose
from .numerics import compute_dtype

NAMESPACE = "clae_fast"
_SCALE = "float scale, Tensor? scale_tensor=None, bool reciprocal=False"
_SKIP = 'str skip="none", int offset=0'
_IDS = "Tensor? row_ids=None, Tensor? col_ids=None"
SCHEMAS = {
    "pair_lse": f"(Tensor q, Tensor k, {_SCALE}, {_SKIP}, {_IDS}, *, str backend='auto') -> Tensor",
    "pair_grad": f"(Tensor q, Tensor k, {_SCALE}, {_SKIP}, Tensor? row_lse=None, "
    "Tensor? row_weight=None, Tensor? col_lse=None, Tensor? col_weight=None, "
    f"{_IDS}, *, str backend='auto') -> Tensor",
    "pair_mean": f"(Tensor q, Tensor k, {_SCALE}, {_SKIP}, {_IDS}, *, str backend='auto')"
    " -> (Tensor, Tensor)",
    "pair_sigmoid": "(Tensor q, Tensor k, float scale, float bias, Tensor? scale_tensor=None, "
    "bool reciprocal=False, Tensor? bias_tensor=None, Tensor? row_weight=None, "
    f"{_IDS}, bool need_dq=False, bool need_dk=False, *, str backend='auto')"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    "pair_uel": "(Tensor q, Tensor k, float scale, float negative_weight, "
    "Tensor? scale_tensor=None, bool reciprocal=False, Tensor? row_weight=None, "
    f"{_IDS}, bool need_dq=False, *, str backend='auto') -> (Tensor, Tensor)",
    "contrast": f"(Tensor q, Tensor k, Tensor? negatives, {_SCALE}, str form='nt_xent', "
    "bool normalize=True, bool need_dq=False, bool need_dk=False, bool need_dnegatives=False, "
    "bool need_dscale=False, *, str backend='auto')"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    "sign_step": "(Tensor x, Tensor grad, Tensor x0, float step, float eps, float? low=None, "
    "float? high=None, Tensor? step_tensor=None, Tensor? eps_tensor=None, "
    "Tensor? low_tensor=None, Tensor? high_tensor=None, *, str backend='auto') -> Tensor",
}


def _implementation(op: str) -> Callable[..., Any]:
    def run(*args: Any, backend: str = "auto", **kwargs: Any) -> Any:
        with torch.no_grad():
            return choose(op, backend, args, kwargs)(*args, **kwargs)

    return run


def _fake_pair_lse(q: Tensor, *_: Any, **__: Any) -> Tensor:
    return q.new_empty(q.shape[0], dtype=compute_dtype(q.dtype))


def _fake_pair_grad(q: Tensor, *_: Any, **__: Any) -> Tensor:
    return q.new_empty(q.shape, dtype=compute_dtype(q.dtype))


def _fake_pair_mean(q: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    return _fake_pair_lse(q), _fake_pair_grad(q)


def _asked(x: Tensor, need: bool) -> Tensor:
    return x.new_empty(x.shape if need else 0, dtype=compute_dtype(x.dtype))


def _fake_pair_sigmoid(
    q: Tensor,
    k: Tensor,
    scale: float,
    bias: float,
    scale_tensor: Tensor | None = None,
    reciprocal: bool = False,
    bias_tensor: Tensor | None = None,
    row_weight: Tensor | None = None,
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
    need_dq: bool = False,
    need_dk: bool = False,
    **_: Any,
) -> tuple[Tensor, ...]:
    return _fake_pair_lse(q), _fake_pair_lse(q), _asked(q, need_dq), _asked(k, need_dk)


def _fake_pair_uel(
    q: Tensor,
    k: Tensor,
    scale: float,
    negative_weight: float,
    scale_tensor: Tensor | None = None,
    reciprocal: bool = False,
    row_weight: Tensor | None = None,
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
    need_dq: bool = False,
    **_: Any,
) -> tuple[Tensor, ...]:
    return _fake_pair_lse(q), _asked(q, need_dq)


def _fake_contrast(
    q: Tensor,
    k: Tensor,
    negatives: Tensor | None,
    scale: float,
    scale_tensor: Tensor | None = None,
    reciprocal: bool = False,
    form: str = "nt_xent",
    normalize: bool = True,
    need_dq: bool = False,
    need_dk: bool = False,
    need_dnegatives: bool = False,
    need_dscale: bool = False,
    **_: Any,
) -> tuple[Tensor, ...]:
    new = functools.partial(q.new_empty, dtype=compute_dtype(q.dtype))
    B = q.shape[0]
    rows = {"nt_xent": (2 * B,), "one_way": (B,), "two_way": (B, 2)}[form]
    return (
        new(rows),
        new(rows[0]),
        new(B if form == "two_way" else 0),
        _asked(q, need_dq),
        _asked(k, need_dk),
        new(0) if negatives is None else _asked(negatives, need_dnegatives),
        new(1 if need_dscale else 0),
    )


def _fake_sign_step(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return torch.empty_like(x)


_library = torch.library.Library(NAMESPACE, "DEF")
for _op, _schema in SCHEMAS.items():
    _library.define(_op + _schema.replace("'", '"'))
    _library.impl(_op, _implementation(_op), "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{_op}", globals()[f"_fake_{_op}"], lib=_library)

raw = getattr(torch.ops, NAMESPACE)
