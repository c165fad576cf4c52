"""What the drop-ins say to values that are none: the argument, what it was, what it may be."""

import lightly.loss as peer
import pytest
import torch
from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.regularizers import LpRegularizer
from torch import nn

from clae_fast.compat import info_nce, lightly, open_clip, sentence_transformers, solo, supcontrast
from clae_fast.compat import pytorch_metric_learning as pml

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


NAN = float("nan")
ST = sentence_transformers.MultipleNegativesRankingLoss
WRONG = {
    "^temperature must be a number, got str": lambda: lightly.NTXentLoss("a"),
    "^temperature must be a number, got None": lambda: lightly.NTXentLoss(None),
    "^temperature must be a number, got list": lambda: lightly.DCLLoss([1]),
    "^temperature must be finite, got nan": lambda: lightly.NTXentLoss(NAN),
    "^temperature must be finite, got inf": lambda: lightly.DCLLoss(float("inf")),
    "^sigma must be a number": lambda: lightly.DCLWLoss(sigma="a"),
    "^sigma must not be 0": lambda: lightly.DCLWLoss(sigma=0),
    "^memory_bank_size must be 0 or .*got 'a'": lambda: lightly.NTXentLoss(0.5, "a"),
    "^memory_bank_size must be 0 or .*got None": lambda: lightly.NTXentLoss(0.5, None),
    "^memory_bank_size must be 0 or .*got 2.5": lambda: lightly.NTXentLoss(0.5, 2.5),
    "^gather_distributed must be": lambda: lightly.NTXentLoss(gather_distributed="yes"),
    "^gather_across_devices must be": lambda: ST(None, gather_across_devices="a"),
    "^directions must be a tuple .*'query": lambda: ST(None, directions="query_to_doc"),
    "^directions must be a tuple .*got 3": lambda: ST(None, directions=3),
    "^embeddings must be a list": lambda: ST(None).compute_loss_from_embeddings(None, None),
    "^reducer must be callable": lambda: pml.NTXentLoss(reducer=3),
    "^indices_tuple must be a tuple": lambda: pml.NTXentLoss()(A, Y, 3),
    "^indices_tuple must hold anchors": lambda: pml.NTXentLoss()(
        A, Y, (T([0, 1]), T([1]), T([0]), T([2]))
    ),
    "CosineSimilarity.p=2, power=2": lambda: pml.NTXentLoss(distance=CosineSimilarity(power=2)),
    "^embedding_regularizer='LpRegularizer'": lambda: pml.NTXentLoss(
        embedding_regularizer=LpRegularizer()
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_one_error_that_names_the_argument(what):
    with pytest.raises((TypeError, ValueError, NotImplementedError), match=what):
        WRONG[what]()


@pytest.mark.parametrize("temperature", [0.1, -0.5])
def test_lightly_weight_fn_is_checked_on_every_path(temperature):
    for one in (0.5, T(0.5), T([0.5])):
        values = [m.DCLLoss(temperature, lambda x, y, w=one: w)(A, B) for m in (lightly, peer)]
        torch.testing.assert_close(*values)
    with pytest.raises(ValueError, match=r"^weight_fn must return \(8,\) .*got \(8, 1\)"):
        lightly.DCLLoss(temperature, lambda x, y: torch.ones(8, 1))(A, B)
