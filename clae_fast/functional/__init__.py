"""The losses as functions: check the input, name the operator and its arguments, reduce.

`B` pairs, `N` rows, `M` columns, `D` width; `cos(a, b) = <a, b> / (|a| |b|)`, or `<a, b>` with
`normalize=False`. All losses accept float16, bfloat16, float32 and float64 embeddings; half
precision is computed in float32, gives a float32 loss and gradients in its own dtype; those of a
mean over many rows can underflow float16 (below 6e-8 they are 0): scale the loss before the
backward as `torch.amp.GradScaler` does, or use `reduction="sum"`. Memory grows as N x D, never as
N x M.
"""

from .clip import clip_loss
from .dcl import WeightFn, check_weight_fn, dcl_loss, negative_mises_fisher_weights
from .hard_negative import hard_negative_loss
from .info_nce import NEGATIVE_MODES, info_nce_loss
from .nt_xent import nt_xent_loss
from .plan import PLANS, Plan, add_bias
from .siglip import siglip_loss
from .sup_con import sup_con_loss
from .uel import uel_loss

__all__ = [
    "NEGATIVE_MODES",
    "PLANS",
    "Plan",
    "WeightFn",
    "add_bias",
    "check_weight_fn",
    "clip_loss",
    "dcl_loss",
    "hard_negative_loss",
    "info_nce_loss",
    "negative_mises_fisher_weights",
    "nt_xent_loss",
    "siglip_loss",
    "sup_con_loss",
    "uel_loss",
]
