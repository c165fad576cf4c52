"""Contrastive learning with adversarial examples: exact losses, a cheap attack, the whole step.

Everything below works on any device through plain PyTorch; kernels take over where there is one.
"""

from ._version import __version__
from .adversarial import fgsm, frozen, pgd
from .backends import available_backends, use_backend
from .batchnorm import (
    DualBatchNorm,
    DualBatchNorm1d,
    DualBatchNorm2d,
    DualBatchNorm3d,
    DualSyncBatchNorm,
    batchnorm_branch,
    convert_dual_batchnorm,
    strip_dual_batchnorm,
)
from .functional import (
    clip_loss,
    dcl_loss,
    hard_negative_loss,
    info_nce_loss,
    negative_mises_fisher_weights,
    nt_xent_loss,
    siglip_loss,
    sup_con_loss,
    uel_loss,
)
from .grad import value_and_grad
from .graphed import GraphedAttack
from .losses import (
    ClipLoss,
    DCLLoss,
    HardNegativeLoss,
    InfoNCELoss,
    NTXentLoss,
    SigLipLoss,
    SupConLoss,
    UELLoss,
)
from .moco import MemoryQueue, momentum_update
from .stats import PairStats, pair_stats
from .step import CLAEOutput, clae_step

__all__ = [
    "CLAEOutput",
    "ClipLoss",
    "DCLLoss",
    "DualBatchNorm",
    "DualBatchNorm1d",
    "DualBatchNorm2d",
    "DualBatchNorm3d",
    "DualSyncBatchNorm",
    "GraphedAttack",
    "HardNegativeLoss",
    "InfoNCELoss",
    "MemoryQueue",
    "NTXentLoss",
    "PairStats",
    "SigLipLoss",
    "SupConLoss",
    "UELLoss",
    "__version__",
    "available_backends",
    "batchnorm_branch",
    "clae_step",
    "clip_loss",
    "convert_dual_batchnorm",
    "dcl_loss",
    "fgsm",
    "frozen",
    "hard_negative_loss",
    "info_nce_loss",
    "momentum_update",
    "negative_mises_fisher_weights",
    "nt_xent_loss",
    "pair_stats",
    "pgd",
    "siglip_loss",
    "strip_dual_batchnorm",
    "sup_con_loss",
    "uel_loss",
    "use_backend",
    "value_and_grad",
]
