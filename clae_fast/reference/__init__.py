"""Every operator in plain PyTorch: the specification that each kernel is tested against.

Notation: `N` rows `q`, `M` columns `k`, width `D`; `s_ij = t <q_i, k_j>` with the scale
`t = scale`, `scale * scale_tensor` or `scale / scale_tensor` (`reciprocal`). What a row leaves out:

    skip="none"       nothing
    skip="diagonal"   column i + offset
    skip="twins"      columns r and (r + M/2) mod M with r = i + offset: itself and its positive
                      in a batch of two stacked views; all M columns are there, rows may be a part
    row_ids, col_ids  columns with the row's id, whatever `skip` says

Everything is differentiable as often as one likes. float16 and bfloat16 are computed in float32.
No N x M matrix is kept: rows go in chunks, which autograd recomputes.
"""

from .contrast import contrast
from .pair_grad import pair_grad
from .pair_lse import pair_lse
from .pair_mean import pair_mean
from .pair_sigmoid import pair_sigmoid
from .pair_uel import pair_uel
from .sign_step import sign_step

__all__ = [
    "contrast",
    "pair_grad",
    "pair_lse",
    "pair_mean",
    "pair_sigmoid",
    "pair_uel",
    "sign_step",
]
