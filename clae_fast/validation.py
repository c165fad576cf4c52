"""Checks of user input: one error that names the argument, its value and what was expected."""

import math
import numbers
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NUMBER_OR_TENSOR = "a number or a one-element tensor"
REDUCTIONS = ("mean", "sum", "none")


def float_tensor(name: str, x: Any) -> None:
    """A strided tensor of float16, bfloat16, float32 or float64."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}")
    if x.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {x.layout}")


def embeddings(
    first: str,
    x: Any,
    second: str,
    y: Any,
    same_rows: bool = True,
    empty: bool = False,
    any_float: bool = False,
) -> None:
    """Two float matrices of one width, dtype and device; `same_rows`: of one shape; not empty.

    `empty`: they may have no rows, as a rank's share of a batch may. `any_float`: the second may
    be of another float dtype, as a queue is beside a half-precision encoder.
    """
    matrix(first, x, empty)
    same_kind(first, x, second, y, any_float)
    if y.dim() != 2 or (y.shape != x.shape if same_rows else y.shape[1] != x.shape[1]):
        expected = tuple(x.shape) if same_rows else f"(M, {x.shape[1]})"
        raise ValueError(f"{second} must be {expected} as {first} is, got {tuple(y.shape)}")


def matrix(name: str, x: Any, empty: bool = False) -> None:
    """A float matrix (N, D) with N, D >= 1; `empty`: N may be 0."""
    float_tensor(name, x)
    if x.dim() != 2:
        raise ValueError(f"{name} must be (N, D), got shape {tuple(x.shape)}")
    if (x.shape[0] == 0 and not empty) or x.shape[1] == 0:
        raise ValueError(f"{name} must hold at least one row and column, got {tuple(x.shape)}")


def same_kind(first: str, x: Tensor, second: str, y: Any, any_float: bool = False) -> None:
    """`y` is a float tensor of x's dtype and device."""
    float_tensor(second, y)
    if y.dtype != x.dtype and not any_float:
        raise ValueError(f"{second} must be {x.dtype} as {first} is, got {y.dtype}")
    if y.device != x.device:
        raise ValueError(f"{second} must be on {x.device} as {first} is, got {y.device}")


def integers(name: str, value: Any, length: int, like: Tensor | None = None) -> None:
    """An integer tensor (length,) of any integer type, on the device of `like`."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{name} must be of an integer type, got {value.dtype}")
    placed(name, value, (length,), like)


def placed(name: str, value: Tensor, shape: tuple[int, ...], like: Tensor | None) -> None:
    """Of this shape, on the device of `like`."""
    if tuple(value.shape) != shape:
        raise ValueError(f"{name} must be {shape}, got {tuple(value.shape)}")
    if like is not None and value.device != like.device:
        raise ValueError(f"{name} must be on {like.device} as the embeddings, got {value.device}")


def positive_int(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def one_element(name: str, value: Any, like: Tensor) -> None:
    """A float tensor with one element, on the device of `like`; its value is never read."""
    float_tensor(name, value)
    if value.numel() != 1:
        raise ValueError(f"{name} must have one element, got shape {tuple(value.shape)}")
    if value.device != like.device:
        raise ValueError(f"{name} must be on {like.device} as the embeddings, got {value.device}")


def positive_scalar(name: str, value: Any, like: Tensor) -> None:
    """A positive finite number, or a one-element float tensor (whose value is not read)."""
    if isinstance(value, Tensor):
        return one_element(name, value, like)
    return positive_number(name, value, NUMBER_OR_TENSOR)


def positive_number(name: str, value: Any, expected: str = "a number") -> None:
    """A positive finite number; `expected`: what the caller would take too."""
    if not is_number(value):
        raise TypeError(f"{name} must be {expected}, got {type(value).__name__}")
    if not (0 < value < math.inf):
        raise ValueError(f"{name} must be positive and finite, got {value}")
    if not (1e-37 <= value <= 1e37):  # it and its inverse must be float32 numbers
        shown = f"an int of {value.bit_length()} bits" if isinstance(value, int) else value
        raise ValueError(f"{name} must lie between 1e-37 and 1e37, got {shown}")


def number(name: str, value: Any, at_least: float = -math.inf, expected: str = "a number") -> None:
    """A finite number, not below `at_least`; `expected`: what the caller would take too."""
    if not is_number(value):
        raise TypeError(f"{name} must be {expected}, got {type(value).__name__}")
    if not (at_least <= value and -math.inf < value < math.inf):
        limit = "" if at_least == -math.inf else f" and at least {at_least}"
        raise ValueError(f"{name} must be finite{limit}, got {value}")


def share(name: str, value: Any) -> None:
    """A number in [0, 1)."""
    number(name, value)
    if not 0 <= value < 1:
        raise ValueError(f"{name} must lie in [0, 1), got {value}")


def flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def function(name: str, value: Any) -> None:
    """A callable that is no class: `loss=NTXentLoss` for `loss=NTXentLoss()` is a common slip."""
    if isinstance(value, type):
        raise TypeError(
            f"{name} must be a function or an instance, got the class {value.__name__}: "
            f"call it first, {value.__name__}(...)"
        )
    if not callable(value):
        raise TypeError(f"{name} must be callable, got {type(value).__name__}")


def instance(name: str, value: Any, kind: type, expected: str) -> None:
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be {expected}, got {type(value).__name__}")


def is_number(value: Any) -> bool:
    return isinstance(value, (float, int, numbers.Real)) and not isinstance(value, bool)


def word(name: str, value: Any, known: Iterable[str]) -> None:
    known = tuple(known)
    if value not in known:
        raise ValueError(f"{name} must be one of {known}, got {value!r}")


def not_inference_mode(what: str) -> None:
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            f"{what} needs autograd, which torch.inference_mode() switches off for good: "
            "use torch.no_grad() instead"
        )
