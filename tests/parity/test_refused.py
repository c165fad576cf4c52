"""What the drop-ins say to values that are none: the argument, what it was, what it may be."""

import pytest
import torch
from torch import nn

from clae_fast.compat import info_nce, open_clip, solo, supcontrast

T = torch.tensor
torch.manual_seed(0)
A, B, Y = torch.randn(8, 4), torch.randn(8, 4), torch.arange(8) // 2


@pytest.mark.parametrize("gather_with_grad", [False, True])
def test_open_clip_without_the_processes_it_was_told_of(gather_with_grad):
    """The loss of this process alone is another one."""
    for loss in (
        open_clip.ClipLoss(gather_with_grad=gather_with_grad, world_size=2),
        open_clip.SigLipLoss(world_size=2),
    ):
        with pytest.raises(ValueError, match="world_size=2 needs a process group of that size"):
            loss(A, B, 1.0, 0.0)


def test_open_clip_does_not_read_a_scale_that_is_a_tensor():
    assert open_clip.ClipLoss()(A, B, T(-1.0)).isfinite()
    with pytest.raises(ValueError, match="logit_scale"):
        open_clip.ClipLoss()(A, B, -1.0)


def test_solo_names_the_users_arguments():
    with pytest.raises(ValueError, match=r"queue must be \(4, K\) as query .*got \(20, 4\)"):
        solo.mocov2plus_loss_func(A, B, torch.randn(20, 4))
    with pytest.raises(ValueError, match=r"^key must be \(8, 4\) as query is, got \(3, 4\)"):
        solo.mocov2plus_loss_func(A, B[:3], torch.randn(4, 20))
    with pytest.raises(TypeError, match="^key must be a torch.Tensor"):
        solo.mocov2plus_loss_func(A, [B], torch.randn(4, 20))


@pytest.mark.parametrize(
    "options", [{"temperature": -1}, {"reduction": "x"}, {"negative_mode": "x"}]
)
def test_info_nce_checks_when_it_is_made(options):
    with pytest.raises(ValueError, match=f"^{next(iter(options))} must be"):
        info_nce.InfoNCE(**options)


def test_info_nce_learns_its_temperature():
    loss = info_nce.InfoNCE(nn.Parameter(T(0.1)))
    loss(A, B).backward()
    assert loss.temperature.grad.isfinite()


def test_supcontrast_base_temperature_of_one_element():
    z = nn.functional.normalize(A.view(4, 2, 4), dim=2)
    assert supcontrast.SupConLoss(base_temperature=T([1.0]))(z).numel() == 1
    with pytest.raises(ValueError, match="^base_temperature must have one element"):
        supcontrast.SupConLoss(base_temperature=T([1.0, 2.0]))
