"""Wrong input to every public function: one error that names the argument, its value, the rule."""

import pytest
import torch
from torch import nn

import clae_fast as cf

z = torch.randn(4, 3)
q, k = z, torch.randn(4, 3)
net = nn.Linear(3, 2)


def scalar(x):
    return net(x).sum()


LOSSES = {
    "nt_xent_loss": (cf.nt_xent_loss, "z_i", "z_j"),
    "info_nce_loss": (cf.info_nce_loss, "query", "positive_key"),
    "uel_loss": (cf.uel_loss, "z_i", "z_j"),
    "clip_loss": (lambda *a, **o: cf.clip_loss(*a, 10.0, **o), "image_features", "text_features"),
}
TEMPERED = {name: c for name, c in LOSSES.items() if name != "clip_loss"}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(
    ("bad", "error", "which", "says"),
    [
        ((z, z[:3]), ValueError, 1, r"must be \(4, 3\).*got \(3, 3\)"),
        ((z, z[:, :2]), ValueError, 1, r"must be \(4, 3\).*got \(4, 2\)"),
        ((z[0], z[0]), ValueError, 0, r"must be \(N, D\), got shape \(3,\)"),
        ((z[:0], z[:0]), ValueError, 0, r"must hold at least one row.*got \(0, 3\)"),
        ((z[:, :0], z[:, :0]), ValueError, 0, r"must hold at least one row.*got \(4, 0\)"),
        ((z.long(), z.long()), TypeError, 0, "must be float16.*got torch.int64"),
        ((z + 0j, z + 0j), TypeError, 0, "must be float16.*got torch.complex64"),
        ((z, z.double()), ValueError, 1, "must be torch.float32.*got torch.float64"),
        ((z, z.to("meta")), ValueError, 1, "must be on cpu.*got meta"),
        ((z, z.tolist()), TypeError, 1, r"must be a torch.Tensor, got list"),
        ((z, None), TypeError, 1, r"must be a torch.Tensor, got NoneType"),
        ((z.to_sparse(), z), TypeError, 0, "must be a dense tensor"),
    ],
)
def test_embeddings(name, bad, error, which, says):
    loss, *names = LOSSES[name]
    with pytest.raises(error, match=f"^{names[which]} {says}"):
        loss(*bad)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"reduction": "avg"}, ValueError, r"^reduction must be one of .*'mean'.* got 'avg'"),
        ({"reduction": None}, ValueError, "^reduction must be one of"),
        ({"normalize": 1}, TypeError, "^normalize must be True or False, got 1"),
        ({"backend": "gpu"}, ValueError, "^backend must be 'auto' or one of .*got 'gpu'"),
        (
            {"backend": "cuda"},
            RuntimeError,
            "^backend='cuda' cannot run .*: (it has no kernel|no GPU here|not built|it runs on)",
        ),
    ],
)
def test_common_keywords(name, options, error, says):
    with pytest.raises(error, match=says):
        LOSSES[name][0](z, z, **options)


@pytest.mark.parametrize("name", TEMPERED)
@pytest.mark.parametrize(
    ("temperature", "error", "says"),
    [
        (0, ValueError, "must be positive and finite, got 0"),
        (-0.1, ValueError, "must be positive and finite, got -0.1"),
        (float("nan"), ValueError, "must be positive and finite, got nan"),
        (float("inf"), ValueError, "must be positive and finite, got inf"),
        (1e-39, ValueError, "must lie between 1e-37 and 1e37, got 1e-39"),
        (10**400, ValueError, "must lie between 1e-37 and 1e37, got an int of 1329 bits"),
        ("0.5", TypeError, "must be a number or a one-element tensor, got str"),
        (None, TypeError, "must be a number or a one-element tensor, got NoneType"),
        (True, TypeError, "must be a number or a one-element tensor, got bool"),
        (torch.tensor(1), TypeError, "must be float16.*got torch.int64"),
        (torch.ones(2), ValueError, r"must have one element, got shape \(2,\)"),
        (torch.tensor(1.0, device="meta"), ValueError, "must be on cpu.*got meta"),
    ],
)
def test_temperature(name, temperature, error, says):
    with pytest.raises(error, match=f"^temperature {says}"):
        LOSSES[name][0](z, z, temperature=temperature)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (
            lambda: cf.info_nce_loss(q, k, z, symmetric=True),
            ValueError,
            "negative_keys must be None",
        ),
        (lambda: cf.info_nce_loss(q, k, z[:, :2]), ValueError, r"negative_keys must be \(M, 3\)"),
        (lambda: cf.info_nce_loss(q, k, z.int()), TypeError, "negative_keys must be float16"),
        (
            lambda: cf.info_nce_loss(q, k.half(), z),
            ValueError,
            "positive_key must be torch.float32",
        ),
        (lambda: cf.sup_con_loss([q], z), TypeError, "features must be a torch.Tensor, got list"),
        (lambda: cf.sup_con_loss(q, [0, 1]), TypeError, "labels must be a torch.Tensor, got list"),
        (lambda: cf.info_nce_loss(q, k, [z]), TypeError, "negative_keys must be a torch.Tensor"),
        (
            lambda: cf.info_nce_loss(q, k, negative_mode="own"),
            ValueError,
            "negative_mode must be one",
        ),
        (lambda: cf.info_nce_loss(q, k, negative_mode="paired"), ValueError, "needs negative_keys"),
        (
            lambda: cf.info_nce_loss(q, k, z, negative_mode="paired"),
            ValueError,
            r"negative_keys must be \(4, M, 3\).*got \(4, 3\)",
        ),
        (
            lambda: cf.info_nce_loss(q, k, torch.randn(3, 5, 3), negative_mode="paired"),
            ValueError,
            r"negative_keys must be \(4, M, 3\).*got \(3, 5, 3\)",
        ),
        (lambda: cf.uel_loss(z, z, negative_weight=0.5), ValueError, "negative_weight must be .*1"),
        (
            lambda: cf.uel_loss(z, z, negative_weight="1"),
            TypeError,
            "negative_weight must be a num",
        ),
        (lambda: cf.clip_loss(z, z, -1.0), ValueError, "logit_scale must be positive"),
        (
            lambda: cf.clip_loss(z, z, torch.ones(3)),
            ValueError,
            "logit_scale must have one element",
        ),
        (lambda: cf.clip_loss(z, z, 1.0, "b"), TypeError, "logit_bias must be None, a num"),
        (lambda: cf.clip_loss(z, z, 1.0, torch.ones(2)), ValueError, "logit_bias must have one"),
    ],
)
def test_what_one_loss_has(call, error, says):
    with pytest.raises(error, match=says):
        call()


x = torch.rand(2, 3)
PGD = {"step_size": 0.1, "num_steps": 1}


@pytest.mark.parametrize("attack", [cf.fgsm, lambda *a, **o: cf.pgd(*a, **{**PGD, **o})])
@pytest.mark.parametrize(
    ("args", "options", "error", "says"),
    [
        ((scalar, [1.0], 0.1), {}, TypeError, "^x must be a torch.Tensor, got list"),
        ((3, x, 0.1), {}, TypeError, "^loss_fn must be callable, got int"),
        ((scalar, x.long(), 0.1), {}, TypeError, "^x must be float16.*got torch.int64"),
        ((scalar, x, -0.1), {}, ValueError, "^eps must be finite and at least 0, got -0.1"),
        ((scalar, x, float("nan")), {}, ValueError, "^eps must be finite"),
        ((scalar, x, "big"), {}, TypeError, "^eps must be a number, got str"),
        (
            (scalar, x, torch.ones(5)),
            {},
            ValueError,
            r"^eps must broadcast to x \(2, 3\), got \(5,",
        ),
        ((scalar, x, torch.ones(4, 2, 3)), {}, ValueError, "^eps must broadcast to x"),
        ((scalar, x, torch.ones(3).long()), {}, TypeError, "^eps must be float16"),
        (
            (scalar, x, 0.1),
            {"bounds": 1},
            ValueError,
            r"^bounds must be None or \(low, high\), got 1",
        ),
        ((scalar, x, 0.1), {"bounds": (1, 0)}, ValueError, "low <= high, got"),
        ((scalar, x, 0.1), {"bounds": (0, None)}, ValueError, "^bounds high must be a number"),
        (
            (scalar, x, 0.1),
            {"bounds": (torch.ones(7), 1)},
            ValueError,
            "^bounds low must broadcast",
        ),
        ((scalar, x, 0.1), {"model": "net"}, TypeError, "^model must be an nn.Module, got str"),
        (
            (net, x, 0.1),
            {},
            ValueError,
            r"^loss_fn must return a scalar tensor, got shape \(2, 2\)",
        ),
        (
            (lambda v: 1.0, x, 0.1),
            {},
            ValueError,
            "^loss_fn must return a scalar tensor, got float",
        ),
        ((lambda v: torch.ones(()), x, 0.1), {}, ValueError, "^loss_fn must depend on x"),
        ((lambda v: net.weight.sum(), x, 0.1), {}, ValueError, "^loss_fn must depend on x"),
    ],
)
def test_attacks(attack, args, options, error, says):
    with pytest.raises(error, match=says):
        attack(*args, **options)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"num_steps": 0}, "^num_steps must be an integer of at least 1, got 0"),
        ({"num_steps": 1.5}, "^num_steps must be an integer"),
        ({"step_size": -1.0}, "^step_size must be finite and at least 0"),
        ({"step_size": torch.ones(7)}, "^step_size must broadcast to x"),
        ({"norm": "l1"}, "^norm must be one of .*got 'l1'"),
        ({"random_start": "no"}, "^random_start must be True or False, got 'no'"),
        ({"generator": 3}, "^generator must be a torch.Generator, got int"),
    ],
)
def test_pgd(options, says):
    with pytest.raises((ValueError, TypeError), match=says):
        cf.pgd(scalar, x, 0.1, **{**PGD, **options})


class Detached(nn.Module):
    def forward(self, x):
        return x.detach().flatten(1)


encoder = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
views = torch.rand(5, 1, 2, 2), torch.rand(5, 1, 2, 2)


@pytest.mark.parametrize(
    ("args", "options", "error", "says"),
    [
        ((lambda v: v, *views), {}, TypeError, "^encoder must be an nn.Module, got function"),
        ((encoder, views[0].long(), views[1]), {}, TypeError, "^x_i must be float16"),
        ((encoder, views[0], views[1].double()), {}, ValueError, "^x_j must be torch.float32"),
        ((encoder, views[0], views[1][:3]), {}, ValueError, "two views of one batch.*got"),
        ((encoder, views[0][:0], views[1][:0]), {}, ValueError, "two views of one batch"),
        ((encoder, *views), {"eps": -1}, ValueError, "^eps must be finite and at least 0"),
        ((encoder, *views), {"alpha": -1}, ValueError, "^alpha must be finite and at least 0"),
        ((encoder, *views), {"alpha": "1"}, TypeError, "^alpha must be a number"),
        ((encoder, *views), {"attack": "fast"}, ValueError, "^attack must be one of .*got 'fast'"),
        ((encoder, *views), {"bounds": (0,)}, ValueError, "^bounds must be None or"),
        ((encoder, *views), {"loss": "simclr"}, TypeError, "^loss must be callable, got str"),
        (
            (encoder, *views),
            {"loss": cf.NTXentLoss(reduction="none")},
            ValueError,
            "^loss must return a scalar",
        ),
        ((encoder, *views), {"loss": cf.NTXentLoss}, TypeError, r"^loss .*NTXentLoss\(\.\.\.\)"),
        (
            (encoder, *views),
            {"loss": lambda a, b: torch.tensor(1.0)},
            ValueError,
            "^loss must depend on the embeddings",
        ),
        ((Detached(), *views), {}, ValueError, "^encoder's output must depend on its input"),
        ((Detached(), *views), {"attack": "shared"}, ValueError, "must depend on its input"),
        ((nn.BatchNorm2d(1), *views), {}, ValueError, "without a usable aux.*convert_dual_batch"),
        ((nn.LSTM(2, 2), views[0][:, 0], views[1][:, 0]), {}, TypeError, "must return a tensor"),
    ],
)
def test_clae_step(args, options, error, says):
    with pytest.raises(error, match=says):
        cf.clae_step(*args, **options)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: cf.value_and_grad(3), TypeError, "^loss_fn must be callable, got int"),
        (lambda: cf.value_and_grad(scalar, "0"), TypeError, "^argnums must be"),
        (lambda: cf.value_and_grad(scalar, 1.5), TypeError, "^argnums must be"),
        (lambda: cf.value_and_grad(scalar, ()), ValueError, r"^argnums must name .*got \(\)"),
        (lambda: cf.value_and_grad(cf.NTXentLoss), TypeError, "^loss_fn must be .* instance"),
        (lambda: cf.value_and_grad(cf.nt_xent_loss)(z_i=z, z_j=z), ValueError, "^inputs must hold"),
        (lambda: cf.NTXentLoss(normalize="x"), TypeError, "^normalize must be True or False"),
        (lambda: cf.InfoNCELoss(symmetric="no"), TypeError, "^symmetric must be True or False"),
        (lambda: cf.info_nce_loss(z, z, symmetric="no"), TypeError, "^symmetric must be True or F"),
        (lambda: cf.info_nce_loss(z, z, [1], symmetric=True), ValueError, "must be None, got list"),
        (lambda: cf.value_and_grad(scalar, 2)(x), ValueError, "^argnums must name .*got 2"),
        (
            lambda: cf.value_and_grad(scalar, 0)(3),
            ValueError,
            r"^argnums must name .*got 0 \(int\)",
        ),
        (
            lambda: cf.value_and_grad(net)(x),
            ValueError,
            r"^loss_fn must return a scalar .*\(2, 2\)",
        ),
        (
            lambda: cf.value_and_grad(cf.nt_xent_loss)(z, z, reduction="none"),
            ValueError,
            'must return a scalar .*reduction="none"',
        ),
        (lambda: cf.value_and_grad(cf.nt_xent_loss)(z, z[:2]), ValueError, "^z_j must be"),
        (lambda: cf.use_backend("cpu").__enter__(), ValueError, "^backend must be 'auto'"),
        (lambda: cf.frozen("net").__enter__(), TypeError, "^model must be an nn.Module, got str"),
    ],
)
def test_the_rest(call, error, says):
    with pytest.raises(error, match=says):
        call()


MODULES = (
    cf.NTXentLoss, cf.InfoNCELoss, cf.UELLoss, cf.ClipLoss, cf.SigLipLoss, cf.SupConLoss,
    cf.DCLLoss, cf.HardNegativeLoss,
)  # fmt: skip


@pytest.mark.parametrize("kind", MODULES)
def test_what_belongs_to_the_module(kind):
    """Not to its call; value_and_grad says so too."""
    inputs = {cf.ClipLoss: (z, q, 1.0), cf.SigLipLoss: (z, q, 1.0, 0.0)}.get(kind, (z, q))
    for name in kind.options:
        says = rf"^{name} belongs to {kind.__name__}\({name}=...\), got {name}='x' at a call$"
        for call in (kind(), cf.value_and_grad(kind())):
            with pytest.raises(TypeError, match=says):
                call(*inputs, **{name: "x"})


def test_inference_mode_is_refused():
    with torch.inference_mode():
        for call in (
            lambda: cf.fgsm(scalar, x, 0.1),
            lambda: cf.pgd(scalar, x, 0.1, **PGD),
            lambda: cf.clae_step(encoder, *views),
            lambda: cf.value_and_grad(scalar)(x),
        ):
            with pytest.raises(RuntimeError, match=r"inference_mode.*torch\.no_grad"):
                call()


def test_numpy_numbers_are_numbers():
    import numpy as np

    a = cf.nt_xent_loss(z, k, temperature=np.float32(0.5))
    assert torch.equal(a, cf.nt_xent_loss(z, k))
    assert torch.isfinite(cf.fgsm(scalar, x, np.float64(0.1))).all()
