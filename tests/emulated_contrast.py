"""The one-launch CUDA `contrast`, run on the CPU by the host emulator, called as the operator."""

import ctypes
import math
from ctypes import c_bool, c_char_p, c_float, c_int, c_int64, c_uint64, c_void_p

import torch

FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
FORMS = {"nt_xent": 0, "one_way": 1, "two_way": 2}
SCALES = {torch.float32: 1, torch.float64: 2, torch.bfloat16: 3, torch.float16: 4}
SCHEDULES = ("ascending", "descending", "random", "round_robin")


class Call(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("q", "k")),
        *((name, c_int64) for name in ("q_stride", "k_stride")),
        *((name, c_int) for name in ("B", "D", "form", "element_bytes")),
        *((name, c_bool) for name in ("normalize", "reciprocal")),
        *((name, c_float) for name in ("scale", "factor")),
        ("scale_tensor", c_void_p),
        ("scale_type", c_int),
        *((name, c_void_p) for name in ("loss", "total", "lse_row", "lse_col", "dq", "dk")),
        *((name, c_void_p) for name in ("dscale", "workspace")),
    ]  # fmt: skip


class How(ctypes.Structure):
    _fields_ = [
        *((name, c_int) for name in ("format", "BN", "schedule", "truncating")),
        ("seed", c_uint64),
    ]


class Emulator:
    """`contrast` of a library made from csrc/tests/contrast_cuda.cpp."""

    def __init__(self, path):
        self.library = ctypes.CDLL(str(path))
        self.library.contrast_emulated.restype = c_char_p
        self.library.workspace_floats.restype = c_int64

    def contrast(
        self, q, k, scale, scale_tensor=None, reciprocal=False, form="nt_xent", normalize=True,
        need_dq=False, need_dk=False, need_dscale=False, reduction="none", BN=64,
        schedule="ascending", seed=1, truncating=False,
    ):  # fmt: skip
        """What the operator returns, without the gradient of other negatives."""
        B, D = q.shape
        rows = 2 * B if form == "nt_xent" else B

        def new(*shape):
            return torch.full(shape, math.nan)  # what is not written shows

        loss = new(B, 2) if form == "two_way" else new(rows)
        total = new() if reduction != "none" else None
        lse, lse_col = new(rows), new(B if form == "two_way" else 0)
        dq, dk, dscale = (
            new(*shape) if wanted else None
            for wanted, shape in ((need_dq, (B, D)), (need_dk, (B, D)), (need_dscale, (1,)))
        )

        def at(x):
            return None if x is None or x.numel() == 0 else x.data_ptr()

        call = Call(
            at(q), at(k), q.stride(0) * q.element_size(), k.stride(0) * k.element_size(), B, D,
            FORMS[form], q.element_size(), normalize, reciprocal, scale,
            1 / loss.numel() if reduction == "mean" else 1.0, at(scale_tensor),
            0 if scale_tensor is None else SCALES[scale_tensor.dtype], at(loss), at(total),
            at(lse), at(lse_col), at(dq), at(dk), at(dscale), None,
        )  # fmt: skip
        workspace = new(self.library.workspace_floats(ctypes.byref(call), BN))
        call.workspace = workspace.data_ptr()
        how = How(FORMATS[q.dtype], BN, SCHEDULES.index(schedule), truncating, seed)
        error = self.library.contrast_emulated(ctypes.byref(call), ctypes.byref(how))
        if error is not None:
            raise RuntimeError(error.decode())
        out = (loss if total is None else total, lse, lse_col, dq, dk, new(0), dscale)
        return tuple(new(0) if x is None else x for x in out)
