"""The drop-ins as modules: names, signatures, refusals, state, memory. Values: tests/parity."""

import copy
import inspect
import pickle
import re
import subprocess
import sys
from pathlib import Path

import info_nce
import lightly.loss
import lightly.loss.dcl_loss
import open_clip.loss
import pytest
import pytorch_metric_learning.losses
import sentence_transformers.sentence_transformer.losses
import torch
from torch import nn

import clae_fast
from clae_fast.compat import info_nce as our_info_nce
from clae_fast.compat import lightly as our_lightly
from clae_fast.compat import open_clip as our_open_clip
from clae_fast.compat import pytorch_metric_learning as our_pml
from clae_fast.compat import sentence_transformers as our_st
from clae_fast.compat import solo, supcontrast

MIGRATE = Path(__file__).parent.parent / "docs" / "migrate.md"
PML = pytorch_metric_learning.losses
ST = sentence_transformers.sentence_transformer.losses
PAIRS = [
    (our_info_nce.InfoNCE, info_nce.InfoNCE),
    (our_info_nce.info_nce, info_nce.info_nce),
    (our_lightly.NTXentLoss, lightly.loss.NTXentLoss),
    (our_lightly.DCLLoss, lightly.loss.DCLLoss),
    (our_lightly.DCLWLoss, lightly.loss.DCLWLoss),
    (
        our_lightly.negative_mises_fisher_weights,
        lightly.loss.dcl_loss.negative_mises_fisher_weights,
    ),
    (our_open_clip.ClipLoss, open_clip.loss.ClipLoss),
    (our_open_clip.SigLipLoss, open_clip.loss.SigLipLoss),
    (our_pml.NTXentLoss, PML.NTXentLoss),
    (our_pml.SupConLoss, PML.SupConLoss),
    (our_pml.SelfSupervisedLoss, PML.SelfSupervisedLoss),
    (our_st.MultipleNegativesRankingLoss, ST.MultipleNegativesRankingLoss),
]
METHODS = (
    "__init__",
    "forward",
    "get_logits",
    "get_ground_truth",
    "compute_loss_from_embeddings",
    "get_config_dict",
)
BUILT = {
    "InfoNCE": lambda m: m.InfoNCE(nn.Parameter(torch.tensor(0.2)), "sum", "paired"),
    "NTXentLoss": lambda m: m.NTXentLoss(0.2, (8, 4), False),
    "DCLLoss": lambda m: m.DCLLoss(0.2),
    "DCLWLoss": lambda m: m.DCLWLoss(0.2, 0.7),
    "ClipLoss": lambda m: m.ClipLoss(True, True, True, 0, 1),
    "SigLipLoss": lambda m: m.SigLipLoss(True, 0, 1, "shift"),
    "MultipleNegativesRankingLoss": lambda m: m.MultipleNegativesRankingLoss(nn.Linear(2, 2), 7.0),
}
PML_BUILT = {
    "NTXentLoss": lambda m: m.NTXentLoss(0.2),
    "SupConLoss": lambda m: m.SupConLoss(0.2),
    "SelfSupervisedLoss": lambda m: m.SelfSupervisedLoss(m.SupConLoss(0.2), False),
}
MODULES = [
    (BUILT if ours is not our_pml else PML_BUILT, name, ours, theirs)
    for names, ours, theirs in (
        (("InfoNCE",), our_info_nce, info_nce),
        (("NTXentLoss", "DCLLoss", "DCLWLoss"), our_lightly, lightly.loss),
        (("ClipLoss", "SigLipLoss"), our_open_clip, open_clip.loss),
        (("NTXentLoss", "SupConLoss", "SelfSupervisedLoss"), our_pml, PML),
        (("MultipleNegativesRankingLoss",), our_st, ST),
    )
    for name in names
]

BLOCKED = """
import sys
PEERS = ("info_nce", "lightly", "open_clip", "pytorch_metric_learning", "sentence_transformers",
         "solo", "losses", "transformers")

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in PEERS:
            raise ImportError(name + " is not here")

sys.meta_path.insert(0, Blocked())
import torch
from clae_fast.compat import (info_nce, lightly, open_clip, pytorch_metric_learning,
                              sentence_transformers, solo, supcontrast)
x, y, ids = torch.randn(6, 4), torch.randn(6, 4), torch.tensor([0, 0, 1, 1, 2, 2])
losses = [
    info_nce.InfoNCE()(x, y), lightly.NTXentLoss()(x, y), lightly.DCLWLoss()(x, y),
    lightly.NTXentLoss(memory_bank_size=(8, 4))(x, y), open_clip.ClipLoss()(x, y, 2.0),
    open_clip.SigLipLoss()(x, y, 2.0, -2.0), pytorch_metric_learning.NTXentLoss()(x, ids),
    pytorch_metric_learning.SupConLoss()(x, ids), solo.simclr_loss_func(x, ids),
    sentence_transformers.MultipleNegativesRankingLoss(
        torch.nn.Identity()).compute_loss_from_embeddings([x, y], None),
    supcontrast.SupConLoss()(x[:, None], ids),
]
assert all(x.isfinite() for x in losses)
assert not [m for m in sys.modules if m.partition(".")[0] in PEERS]
"""


def test_without_the_libraries():
    """Neither they nor what they need is imported."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", BLOCKED], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def parameters(function):
    """Names, kinds and defaults; of a default that is a function, its name."""
    return [
        (p.name, p.kind, getattr(p.default, "__name__", p.default))
        for p in inspect.signature(function).parameters.values()
    ]


@pytest.mark.parametrize(("ours", "theirs"), PAIRS, ids=lambda x: x.__name__)
def test_signatures(ours, theirs):
    assert ours.__name__ == theirs.__name__
    if not inspect.isclass(ours):
        assert parameters(ours) == parameters(theirs)
        return
    for name in METHODS:
        if hasattr(theirs, name):
            assert parameters(getattr(ours, name)) == parameters(getattr(theirs, name)), name


def test_signatures_of_those_not_on_pypi():
    text = {f.__name__: str(inspect.signature(f, eval_str=True)) for f in (
        solo.simclr_loss_func, solo.mocov2plus_loss_func,
    )}  # fmt: skip
    assert re.findall(r"(\w+):", text["simclr_loss_func"]) == ["z", "indexes", "temperature"]
    names = ["query", "key", "queue", "temperature"]
    assert re.findall(r"(\w+):", text["mocov2plus_loss_func"]) == names
    assert all("temperature: float = 0.1" in t for t in text.values())
    assert parameters(supcontrast.SupConLoss)[:3] == [
        ("temperature", inspect.Parameter.POSITIONAL_OR_KEYWORD, 0.07),
        ("contrast_mode", inspect.Parameter.POSITIONAL_OR_KEYWORD, "all"),
        ("base_temperature", inspect.Parameter.POSITIONAL_OR_KEYWORD, 0.07),
    ]
    assert [p[0] for p in parameters(supcontrast.SupConLoss().forward)] == [
        "features",
        "labels",
        "mask",
    ]


@pytest.mark.parametrize(("built", "name", "ours", "theirs"), MODULES)
def test_state(built, name, ours, theirs):
    """Options as attributes, parameters and buffers by the same names; copies and pickles."""
    torch.manual_seed(0)
    mine = built[name](ours)
    torch.manual_seed(0)
    peer = built[name](theirs)
    for option in inspect.signature(type(peer)).parameters:
        if option in vars(peer):
            value = getattr(mine, option)
            assert isinstance(value, (Exception, nn.Module, type(lambda: 0))) or value == getattr(
                peer, option
            ), option
    assert mine.state_dict().keys() == peer.state_dict().keys()
    mine.load_state_dict(peer.state_dict())
    for kind in ("named_parameters", "named_buffers"):
        expected = dict(getattr(peer, kind)())
        found = dict(getattr(mine, kind)())
        assert found.keys() == expected.keys()
        assert all(found[k].equal(v) for k, v in expected.items())
    for again in (copy.deepcopy(mine), pickle.loads(pickle.dumps(mine))):
        assert again.state_dict().keys() == mine.state_dict().keys()
        assert repr(again) == repr(mine)
        assert dict(again.named_buffers()).keys() == dict(mine.named_buffers()).keys()


class OtherLogits(our_open_clip.ClipLoss):
    def get_logits(self, *args, **kwargs):
        raise AssertionError


class OtherTruth(our_open_clip.SigLipLoss):
    def get_ground_truth(self, *args, **kwargs):
        raise AssertionError


class OtherLoss(our_pml.NTXentLoss):
    def _compute_loss(self, *args):
        raise AssertionError


def needed(module, name):
    try:
        getattr(module, name)
    except AttributeError as error:
        raise ValueError(str(error)) from error


X = torch.ones(3, 2)
REFUSED = {
    "use_horovod=True": lambda: our_open_clip.ClipLoss(use_horovod=True),
    "OtherLogits.get_logits": lambda: OtherLogits()(X, X, 1.0),
    "OtherTruth.get_ground_truth": lambda: OtherTruth()(X, X, 1.0, 0.0),
    "dist_impl": lambda: our_open_clip.SigLipLoss(dist_impl="mesh"),
    "logit_scale": lambda: our_open_clip.ClipLoss()(X, X, -1.0),
    "image_features": lambda: our_open_clip.ClipLoss()(X.int(), X, 1.0),
    "OtherLoss._compute_loss": lambda: OtherLoss()(X, IDS[:3]),
    "OtherLoss._compute_loss=": lambda: our_pml.SelfSupervisedLoss(OtherLoss())(X, X),
    "has no option weight=3; it has distance": lambda: our_pml.SupConLoss(weight=3),
    "NTXentLoss of clae_fast.compat has no compute_loss": lambda: needed(
        our_pml.NTXentLoss(), "compute_loss"
    ),
    "labels must be a torch.Tensor, got list": lambda: our_pml.SupConLoss()(X, [0, 0, 1]),
    "labels must be a torch.Tensor, got ndarray": lambda: our_pml.NTXentLoss()(X, IDS[:3].numpy()),
    "labels must be a torch.Tensor, got tuple": lambda: supcontrast.SupConLoss()(X[:, None], (0,)),
    "mask must be a torch.Tensor, got list": lambda: supcontrast.SupConLoss()(X[:, None], mask=[]),
    "indexes must be a torch.Tensor, got list": lambda: solo.simclr_loss_func(X, [0, 0, 1]),
    "queue must be a torch.Tensor, got list": lambda: solo.mocov2plus_loss_func(X, X, [X]),
    "base_temperature must not be 0": lambda: supcontrast.SupConLoss(base_temperature=0),
    "temperature must not be 0": lambda: our_lightly.DCLLoss(0.0),
    "temperature must be positive and finite, got 0": lambda: our_pml.NTXentLoss(0),
    "temperature must be positive and finite, got 0.0": lambda: supcontrast.SupConLoss(0.0),
    r"memory_bank_size must be \(num_features, 2\)": lambda: our_lightly.NTXentLoss(0.1, (4, 3))(
        X.clone().requires_grad_(), X
    ),
    "temperature must have one": lambda: our_pml.SupConLoss(torch.ones(3)),
    "scale must have one element": lambda: our_st.MultipleNegativesRankingLoss(None, X),
    "labels must have values": lambda: our_pml.NTXentLoss()(X.to("meta"), IDS[:3].to("meta")),
    "temperature must be positive with a memory bank": lambda: our_lightly.NTXentLoss(-1.0, (4, 2))(
        X, X
    ),
    "out1": lambda: our_lightly.NTXentLoss()(X, X[:2]),
    "weight_fn": lambda: our_lightly.DCLLoss(weight_fn=lambda a, b: "2")(X, X),
    "temperature must have one element": lambda: our_info_nce.InfoNCE(torch.ones(3, 1))(X, X),
    "negative_mode": lambda: our_info_nce.InfoNCE(negative_mode="all")(X, X),
    "reduction": lambda: our_info_nce.InfoNCE(reduction="max")(X, X),
    "embedding_regularizer": lambda: our_pml.NTXentLoss(embedding_regularizer=nn.Identity()),
    "distance": lambda: our_pml.SupConLoss(distance=nn.PairwiseDistance()),
    "symmetrical": lambda: our_pml.SelfSupervisedLoss(our_pml.NTXentLoss(), symmetrical=True),
    "loss='MSELoss'": lambda: our_pml.SelfSupervisedLoss(nn.MSELoss()),
    "similarity_fct": lambda: our_st.MultipleNegativesRankingLoss(None, similarity_fct=torch.mm),
    r"embeddings\[2\]": lambda: our_st.MultipleNegativesRankingLoss(
        nn.Identity()
    ).compute_loss_from_embeddings([X, X, X[:2]], None),
    "contrast_mode": lambda: supcontrast.SupConLoss(contrast_mode="two"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused(what):
    with pytest.raises((NotImplementedError, ValueError, TypeError), match=what):
        REFUSED[what]()


def test_a_subclass_with_its_own_forward_may_use_the_logits():
    class Margin(our_open_clip.ClipLoss):
        def get_logits(self, *args, **kwargs):
            return [x - 0.1 for x in super().get_logits(*args, **kwargs)]

        def forward(self, x, y, scale):
            return self.get_logits(x, y, scale)[0].sum()

    assert Margin()(X, X, 1.0) == pytest.approx(9 * 1.9)


N, D = 3072, 4
LARGE = {
    "lightly.NTXentLoss": lambda x, y: our_lightly.NTXentLoss()(x, y),
    "lightly.NTXentLoss, bank": lambda x, y: our_lightly.NTXentLoss(0.1, (N, D))(x, y),
    "lightly.DCLWLoss": lambda x, y: our_lightly.DCLWLoss()(x, y),
    "lightly.DCLLoss, negative": lambda x, y: our_lightly.DCLLoss(-0.5)(x, y),
    "open_clip.ClipLoss": lambda x, y: our_open_clip.ClipLoss()(x, y, 1.0),
    "open_clip.SigLipLoss": lambda x, y: our_open_clip.SigLipLoss()(x, y, 1.0, -1.0),
    "info_nce.InfoNCE": lambda x, y: our_info_nce.InfoNCE()(x, y),
    "pml.NTXentLoss": lambda x, y: our_pml.NTXentLoss()(torch.cat((x, y)), IDS),
    "pml.SupConLoss": lambda x, y: our_pml.SupConLoss()(torch.cat((x, y)), IDS),
    "pml.SupConLoss, references": lambda x, y: our_pml.SupConLoss()(
        x, IDS[:N], ref_emb=y, ref_labels=IDS[N:]
    ),
    "sentence_transformers": lambda x, y: our_st.MultipleNegativesRankingLoss(
        nn.Identity(), directions=our_st.DIRECTIONS, hardness_mode="all_negatives",
        hardness_strength=1.0,
    ).compute_loss_from_embeddings([x, y], None),
    "solo.simclr": lambda x, y: solo.simclr_loss_func(torch.cat((x, y)), IDS),
    "solo.moco": lambda x, y: solo.mocov2plus_loss_func(x, y, y.T.detach()),
    "supcontrast": lambda x, y: supcontrast.SupConLoss()(torch.stack((x, y), 1), IDS[:N]),
    "supcontrast, one": lambda x, y: supcontrast.SupConLoss(contrast_mode="one")(
        torch.stack((x, y), 1), IDS[:N]
    ),
}  # fmt: skip
IDS = (torch.arange(2 * N) * 7) % (N // 2)


@pytest.mark.parametrize("name", LARGE)
def test_no_large_tensor(name):
    """No N x M outside the operators, forward and backward."""
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            tensors = out if isinstance(out, (tuple, list)) else (out,)
            sizes.extend(t.numel() for t in tensors if isinstance(t, torch.Tensor))
            return out

    x, y = (nn.functional.normalize(torch.randn(N, D)).requires_grad_() for _ in range(2))
    with Watch():
        LARGE[name](x, y).backward()
    assert x.grad.isfinite().all()
    assert max(sizes) <= 8 * N * D, f"a tensor of {max(sizes)} elements"


@pytest.mark.parametrize("name", sorted(LARGE))
def test_reference_backend_is_differentiable_twice(name):
    x, y = (torch.randn(N, D)[:6].requires_grad_() for _ in range(2))
    small = {"N": 6, "D": D, "IDS": torch.tensor([0, 1, 2, 0, 1, 2] * 2)}
    code = LARGE[name]
    loss = type(code)(code.__code__, {**code.__globals__, **small})
    with clae_fast.use_backend("reference"):
        (g,) = torch.autograd.grad(loss(x, y), x, create_graph=True)
        g.square().sum().backward()
    assert x.grad.isfinite().all()
    x.grad = None
    (g,) = torch.autograd.grad(loss(x, y), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        g.square().sum().backward()


@pytest.mark.parametrize("name", sorted(LARGE))
def test_half_precision_is_computed_in_float32(name):
    """Under autocast too; the gradients are in the dtype of the embeddings."""
    x, y = (torch.randn(N, D)[:6].bfloat16().requires_grad_() for _ in range(2))
    small = {"N": 6, "D": D, "IDS": torch.tensor([0, 1, 2, 0, 1, 2] * 2)}
    code = LARGE[name]
    torch.manual_seed(0)
    half = type(code)(code.__code__, {**code.__globals__, **small})
    expected = half(x.float(), y.float())
    torch.manual_seed(0)
    loss = half(x, y)
    loss.backward()
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        again = half(x.float(), y.float())
    assert loss.dtype == again.dtype == torch.float32
    assert x.grad.dtype == torch.bfloat16
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(again, expected, rtol=1e-5, atol=1e-6)


class Table(nn.Module):
    """A model for sentence-transformers."""

    def __init__(self):
        super().__init__()
        self.rows = nn.Embedding(20, 6)

    def forward(self, features):
        return {"sentence_embedding": self.rows(features["input_ids"])[:, 0]}


def examples():
    """The sections of docs/migrate.md: imports before and after, and the code below them."""
    text = MIGRATE.read_text()
    for section in text.split("\n## ")[1:]:
        name = section.partition("\n")[0]
        if "```diff" not in section:
            continue
        (imports,) = re.findall(r"```diff\n(.*?)```", section, re.S)
        code = re.findall(r"```python\n(.*?)```", section, re.S)[0]
        yield pytest.param(name, imports.splitlines(), code, id=name)


def test_every_module_has_its_section():
    assert len(list(examples())) == len(PEERS_OF_DOCS) == 7


PEERS_OF_DOCS = (info_nce, lightly, open_clip, PML, ST, solo, supcontrast)


@pytest.mark.parametrize(("name", "imports", "code"), list(examples()))
@pytest.mark.filterwarnings("ignore:To copy construct:UserWarning")
def test_migrate(name, imports, code):
    """One changed import, one loss: the two not on PyPI run after it only."""
    losses = []
    for sign in "+" if name in ("solo-learn", "SupContrast") else "+-":
        lines = [line[1:] for line in imports if line[0] == sign]
        losses.append(run_example("\n".join([*lines, code])))
    assert losses[0].isfinite()
    torch.testing.assert_close(losses[0], losses[-1], rtol=1e-5, atol=1e-6)


def further_examples():
    """What each section goes on to show of the losses of clae_fast."""
    for section in MIGRATE.read_text().split("\n## ")[1:]:
        code = re.findall(r"```python\n(.*?)```", section, re.S)["```diff" in section :]
        if code:
            yield pytest.param("\n".join(code), id=section.partition("\n")[0])


@pytest.mark.parametrize("code", list(further_examples()))
def test_migrate_further(code):
    assert run_example(code).isfinite()


def test_there_are_further_examples():
    assert [p.id for p in further_examples()] == [
        "open_clip", "sentence-transformers", "MoCo by hand"
    ]  # fmt: skip


def run_example(code):
    """The loss that it makes of the inputs that the text speaks of."""
    torch.manual_seed(0)
    rows = {
        key: torch.randn(8, 6)
        for key in ("out0", "out1", "images", "texts", "embeddings", "query", "key", "negatives")
    }
    names = {
        "torch": torch,
        **rows,
        "labels": torch.tensor([0, 0, 1, 1, 2, 2, 0, 1]),
        "features": torch.randn(4, 2, 6),
        "queue": torch.randn(6, 10),
        "scale": torch.tensor(2.0),
        "bias": torch.tensor(-2.0),
        "model": Table(),
        "sentence_features": [{"input_ids": torch.randint(0, 20, (5, 1))} for _ in range(3)],
    }
    exec(code, names)
    return names["loss"]
