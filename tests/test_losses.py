"""Every loss against its dense float64 formula: values, gradients, reductions, dtypes, sizes."""

import functools
import inspect
import math
import subprocess
import sys

import dense
import pytest
import torch
from dense import backends_with, error

import clae_fast
from clae_fast import clip_loss, info_nce_loss, nt_xent_loss, uel_loss, value_and_grad

BACKENDS = backends_with("contrast")
# name -> (loss, dense rows, number of embeddings, whether a queue of another length comes third)
CASES = {
    "nt_xent": (nt_xent_loss, dense.nt_xent, 2),
    "uel": (uel_loss, dense.uel, 2),
    "uel-weight": (
        functools.partial(uel_loss, negative_weight=2.5),
        functools.partial(dense.uel, m=2.5),
        2,
    ),
    "info_nce": (info_nce_loss, lambda q, k, t, **o: dense.info_nce(q, k, None, t, **o), 2),
    "queue": (info_nce_loss, dense.info_nce, 3),
    "paired": (functools.partial(info_nce_loss, negative_mode="paired"), dense.info_nce, 3),
    "symmetric": (
        functools.partial(info_nce_loss, symmetric=True),
        lambda q, k, t, normalize=True: dense.clip(q, k, t, normalize),
        2,
    ),
    "clip": (
        lambda x, y, temperature, **o: clip_loss(x, y, 1 / temperature, **{"normalize": True, **o}),
        lambda x, y, t, normalize=True: dense.clip(x, y, t, normalize),
        2,
    ),
}
# B, D, M: one pair; two; odd; wider than long; past a power of two. M is the queue's length.
SIZES = [(1, 3, 4), (2, 5, 1), (3, 1, 2), (7, 123, 33), (129, 17, 65)]
TOLERANCE = {  # loss, gradient: half precision is computed in float32 and rounded last
    torch.float64: (1e-12, 1e-11),
    torch.float32: (2e-6, 2e-5),
    torch.float16: (2e-6, 1e-3),
    torch.bfloat16: (2e-6, 5e-3),
}


def inputs(name, B, D, M, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = [(B, D), (B, D)]
    if CASES[name][2] == 3:
        shapes.append((B, M, D) if name == "paired" else (M, D))
    return [torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in shapes]


def truth(name, xs, temperature, reduction="mean", upstream=None, normalize=True):
    """Loss, gradients of the embeddings and of the temperature, in float64."""
    leaves = [x.detach().double().requires_grad_() for x in xs]
    tau = torch.tensor(temperature, dtype=torch.float64, requires_grad=True)
    rows = CASES[name][1](*leaves, 1 / tau, normalize=normalize)
    loss = {"mean": rows.mean(), "sum": rows.sum(), "none": rows}[reduction]
    weight = torch.ones_like(loss) if upstream is None else upstream.double()
    grads = torch.autograd.grad(loss, [*leaves, tau], weight, materialize_grads=True)
    return loss.detach(), grads[:-1], grads[-1]


def upstream_for(loss):
    """A weight that is neither 1 nor constant."""
    return torch.linspace(-1.5, 2.0, max(loss.numel(), 1), dtype=torch.float64)[
        -loss.numel() :
    ].reshape(loss.shape)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", CASES)
def test_against_float64(name, reduction, dtype, backend):
    loss_tol, grad_tol = TOLERANCE[dtype]
    for B, D, M in SIZES:
        xs = inputs(name, B, D, M, dtype)
        leaves = [x.clone().requires_grad_() for x in xs]
        loss = CASES[name][0](*leaves, temperature=0.2, reduction=reduction, backend=backend)
        weight = upstream_for(loss)
        ref, grads, _ = truth(name, xs, 0.2, reduction, weight)
        assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert error(loss, ref) < loss_tol, (B, D, M)
        got = torch.autograd.grad(loss, leaves, weight.to(loss.dtype), materialize_grads=True)
        for x, out, g in zip(xs, got, grads, strict=True):
            assert out.dtype == x.dtype
            # On a sphere of dimension 0 (D = 1) the gradient is 0: rounding, times t / |x|.
            floor = float(weight.norm() / 0.2 / min(v.abs().min() for v in xs)) if D == 1 else 1e-9
            assert error(out, g, floor) < grad_tol, (B, D, M)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", CASES)
def test_learnable_temperature(name, reduction, backend):
    """Its gradient, alone and together with the others; its shape and dtype are kept."""
    xs = inputs(name, 9, 6, 5)
    for shape, dtype in (((), torch.float64), ((1,), torch.float32), ((1, 1), torch.float64)):
        for leaves in (xs, [x.clone().requires_grad_() for x in xs]):
            tau = torch.full(shape, 0.3, dtype=dtype, requires_grad=True)
            loss = CASES[name][0](*leaves, temperature=tau, reduction=reduction, backend=backend)
            weight = upstream_for(loss)
            _, _, dtau = truth(name, xs, tau.item(), reduction, weight)
            loss.backward(weight)
            assert tau.grad.shape == tau.shape
            assert tau.grad.dtype == tau.dtype
            assert error(tau.grad.reshape(()), dtau) < (1e-10 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", CASES)
def test_only_what_is_asked_for(name, reduction):
    """Each input alone gets the very gradient it gets in company; the rest gets none."""
    xs = inputs(name, 8, 5, 6, torch.float32)

    def run(asked):
        leaves = [x.clone().requires_grad_(i in asked) for i, x in enumerate(xs)]
        loss = CASES[name][0](*leaves, temperature=0.2, reduction=reduction)
        loss.backward(upstream_for(loss).to(loss.dtype))
        return [x.grad for x in leaves]

    together = run(range(len(xs)))
    for i in range(len(xs)):
        alone = run([i])
        assert error(alone[i], together[i]) < 1e-6
        assert all(g is None for j, g in enumerate(alone) if j != i)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_normalize(name, normalize):
    xs = inputs(name, 6, 4, 5)
    leaves = [x.clone().requires_grad_() for x in xs]
    loss = CASES[name][0](*leaves, temperature=2.0, normalize=normalize)
    ref, grads, _ = truth(name, xs, 2.0, normalize=normalize)
    assert error(loss, ref) < 1e-12
    for out, g in zip(torch.autograd.grad(loss, leaves), grads, strict=True):
        assert error(out, g) < 1e-11


@pytest.mark.parametrize("name", CASES)
def test_layouts(name):
    """Transposed, sliced and expanded inputs give what their contiguous copies give."""
    xs = inputs(name, 6, 4, 5)

    def awkward(x):
        transposed = x.transpose(0, -1).contiguous().transpose(0, -1)
        padded = torch.full((*x.shape[:-1], 9), torch.nan, dtype=x.dtype)
        padded[..., 2:6] = x
        return transposed, padded[..., 2:6], x[..., :1].expand(x.shape)

    for variant in zip(*map(awkward, xs), strict=True):
        leaves = [x.detach().requires_grad_() for x in variant]
        assert not all(x.is_contiguous() for x in leaves)
        plain = [x.detach().contiguous().requires_grad_() for x in variant]
        losses = [CASES[name][0](*v, temperature=0.2) for v in (leaves, plain)]
        assert error(*losses) < 1e-12
        for a, b in zip(
            torch.autograd.grad(losses[0], leaves),
            torch.autograd.grad(losses[1], plain),
            strict=True,
        ):
            assert float((a - b).abs().max()) < 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_nothing_to_contrast(name, backend):
    """One pair alone, or an empty queue: loss 0 and gradient 0, never NaN."""
    B, M = (5, 0) if CASES[name][2] == 3 else (1, 0)
    leaves = [x.requires_grad_() for x in inputs(name, B, 4, M, torch.float32)]
    loss = CASES[name][0](*leaves, temperature=0.1, backend=backend)
    grads = torch.autograd.grad(loss, leaves, materialize_grads=True)
    assert loss == 0
    assert all((g == 0).all() for g in grads)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_bad_numbers_stay_visible(name, normalize, bad, backend):
    """One NaN or Inf anywhere makes the loss NaN or Inf, whatever its sign and the others'."""
    for which in range(CASES[name][2]):
        for fill in (None, 1.0):  # with equal signs every similarity becomes -inf
            xs = inputs(name, 4, 3, 3, torch.float32)
            if fill is not None:
                xs = [torch.full_like(x, fill) for x in xs]
            xs[which].view(-1)[4] = bad
            loss = CASES[name][0](*xs, temperature=0.5, normalize=normalize, backend=backend)
            assert not torch.isfinite(loss), (which, fill)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_zero_vector(name, backend):
    """Normalises to zero as in F.normalize, with gradient 0; its partners keep theirs."""
    xs = inputs(name, 5, 4, 3)
    for x in xs:
        x[1] = 0
    leaves = [x.clone().requires_grad_() for x in xs]
    loss = CASES[name][0](*leaves, temperature=0.3, backend=backend)
    ref, grads, _ = truth(name, xs, 0.3)
    assert error(loss, ref) < 1e-12
    for x, out, g in zip(xs, torch.autograd.grad(loss, leaves), grads, strict=True):
        zero = (x == 0).all(-1)
        assert (out[zero] == 0).all()
        assert error(out[~zero], g[~zero]) < 1e-11


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_gradient_of_a_half_precision_temperature(name, dtype, backend):
    """Its parts cancel: they are summed in float32, and the sum is rounded once."""
    q = torch.randn(40, 16)
    xs = [x.to(dtype) for x in (q, q + torch.randn(40, 16))]
    if CASES[name][2] == 3:
        xs.append(torch.randn((40, 7, 16) if name == "paired" else (50, 16)).to(dtype))
    tau = torch.tensor(0.03125, dtype=dtype, requires_grad=True)
    CASES[name][0](*xs, temperature=tau, backend=backend).backward()
    _, _, truth_ = truth(name, xs, 0.03125)
    assert error(tau.grad, truth_) < 5e-3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("length", [1e-14, 1e20])
def test_extreme_lengths(length, backend):
    """As F.normalize: divided by 1e-12 if shorter, 0 where the square leaves the range."""
    xs = [torch.randn(5, 4), torch.randn(5, 4)]
    for x in xs:
        x[1] *= length
    leaves = [x.clone().requires_grad_() for x in xs]
    plain = [x.clone().requires_grad_() for x in xs]
    loss, ref = nt_xent_loss(*leaves, backend=backend), dense.nt_xent(*plain, 2.0).mean()
    assert error(loss, ref) < 2e-6
    for out, g in zip(
        torch.autograd.grad(loss, leaves), torch.autograd.grad(ref, plain), strict=True
    ):
        rows = [0, 2, 3, 4] if length > 1 else [0, 1, 2, 3, 4]
        assert error(out[rows], g[rows]) < 2e-5
        assert out.isfinite().all()


def test_inf_hidden_behind_minus_inf():
    """UEL: its own row's loss would be 0 and it would vanish from the others' sums."""
    z = torch.tensor([[torch.inf, 1.0], [-1, 1], [1, 1], [-1, 1]])
    for backend in (None, "reference"):
        assert not uel_loss(z[:2], z[2:], normalize=False, backend=backend).isfinite()


@pytest.mark.parametrize("name", ["nt_xent", "info_nce", "queue", "symmetric", "clip", "uel"])
@pytest.mark.parametrize("tau", [0.5, 0.02])
@pytest.mark.parametrize("noise", [1e-3, 0.1])
def test_aligned_pairs(name, noise, tau):
    """Nearly equal pairs: the plain formula loses the gradient, and FGSM uses its sign."""
    z = torch.randn(64, 32, dtype=torch.float64)
    pair = [z, z + noise * torch.randn_like(z)]
    if name == "queue":
        pair.append(torch.randn(256, 32, dtype=torch.float64))
    xs = [x.float() for x in pair]
    ref, grads, _ = truth(name, xs, tau)
    for backend in (None, "reference"):
        leaves = [x.clone().requires_grad_() for x in xs]
        loss = CASES[name][0](*leaves, temperature=tau, backend=backend)
        assert error(loss, ref) < 1e-5
        for out, g in zip(torch.autograd.grad(loss, leaves), grads, strict=True):
            assert error(out, g) < 1e-4
            large = g.abs() > 1e-4 * g.square().mean().sqrt()
            assert (out.double().sign() == g.sign())[large].all()
    plain_leaves = [x.clone().requires_grad_() for x in xs]
    plain = CASES[name][1](*plain_leaves, 1 / tau).mean()
    if tau == 0.02 and name != "uel":  # 1 - p of the positive is far below its rounding
        lost = torch.autograd.grad(plain, plain_leaves)
        assert max(error(o, g) for o, g in zip(lost, grads, strict=True)) > 0.5 * noise


def test_uel_with_a_dominant_negative():
    """p of one negative rounds to 1: log(1 - p) must come from the others, not from 1 - p."""
    z = torch.randn(4, 8, dtype=torch.float64)
    z_i, z_j = z, -z + 0.1 * torch.randn_like(z)
    z_i[1] = z_i[0] + 1e-3 * torch.randn(8)
    xs = [z_i.float(), z_j.float()]
    # At 0.07 1 - p is below float32's rounding, at 0.01 its inverse overflows; with m between 1 and
    # 2 the other m - 1 copies of the dominant negative are most of 1 - p.
    for temperature, m in ((0.07, 1.0), (0.07, 1.3), (0.07, 2.5), (0.01, 1.0), (0.01, 1.3)):
        exact = [x.double().requires_grad_() for x in xs]
        if temperature == 0.07:
            ref = dense.uel(*exact, 1 / temperature, m).mean()
        else:  # dense float64 rounds to 1 here too
            ref = uel_loss(*exact, temperature=temperature, negative_weight=m, backend="reference")
        grads = torch.autograd.grad(ref, exact)
        for backend in (None, "reference"):
            leaves = [x.clone().requires_grad_() for x in xs]
            loss = uel_loss(*leaves, temperature=temperature, negative_weight=m, backend=backend)
            assert error(loss, ref) < 1e-5
            for out, g in zip(torch.autograd.grad(loss, leaves), grads, strict=True):
                assert error(out, g) < 2e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gap", [50.0, 150.0, 1500.0])
def test_uel_with_a_negative_far_above_the_others(gap, dtype):
    """The others are 0 beside the largest, and are still what log(1 - p) of it is made of."""

    def at(*angles):
        angles = torch.tensor(angles, dtype=torch.float64)
        return torch.stack((angles.cos(), angles.sin()), 1).to(dtype)

    xs = [at(0.0, 0.01), at(math.pi - 0.01, math.acos(-0.2))]
    temperature = 1.2 / gap
    exact = [x.double().requires_grad_() for x in xs]
    ref = uel_loss(*exact, temperature=temperature, reduction="none", backend="reference")
    leaves = [x.clone().requires_grad_() for x in xs]
    loss = uel_loss(*leaves, temperature=temperature, reduction="none")
    limit = 1e-2 if dtype == torch.bfloat16 else 1e-5
    assert error(loss, ref) < limit
    grads = torch.autograd.grad(ref.sum(), exact)
    for out, g in zip(torch.autograd.grad(loss.sum(), leaves), grads, strict=True):
        assert error(out, g) < limit


def test_second_derivatives_where_nothing_is_contrasted():
    """A row without negatives has loss 0, and all its derivatives are 0."""
    x, y = (torch.randn(4, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    n, first = torch.randn(5, 3, dtype=torch.float64), torch.tensor([7, 1, 2, 3])
    for value in (
        info_nce_loss(x, y, n, query_ids=first, key_ids=torch.full((5,), 7), backend="reference"),
        clip_loss(x, y, 2.0, normalize=True, ids=torch.zeros(4, dtype=torch.int64),
                  backend="reference"),
        nt_xent_loss(x[:1], y[:1], backend="reference"),
    ):  # fmt: skip
        grads = torch.autograd.grad(value, (x, y), create_graph=True)
        penalty = sum(g.square().sum() for g in grads)
        for second in torch.autograd.grad(penalty, (x, y)):
            assert second.isfinite().all()
            assert not second[0].any()


@pytest.mark.parametrize("scale", [1.0, 20.0, 100.0, 300.0])
def test_large_scale_and_unnormalised(scale):
    """clip_loss takes rows of any length: no overflow, no lost rows."""
    x, y = (3 * torch.randn(33, 16, dtype=torch.float64) for _ in range(2))
    xs = [v.float() for v in (x, y)]
    ref, grads, _ = truth("clip", xs, 1 / scale, normalize=False)
    leaves = [v.clone().requires_grad_() for v in xs]
    loss = clip_loss(*leaves, scale)
    assert error(loss, ref) < max(2e-6, 1e-7 * scale)
    for out, g in zip(torch.autograd.grad(loss, leaves), grads, strict=True):
        assert error(out, g) < max(2e-5, 2e-6 * scale)


@pytest.mark.parametrize("backend", BACKENDS)
def test_clip_scale_and_bias(backend):
    x, y = (torch.randn(6, 4, dtype=torch.float64) for _ in range(2))
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    bias = torch.tensor([-10.0], requires_grad=True)
    loss = clip_loss(x, y, scale, bias, backend=backend)
    assert error(loss, dense.clip(x, y, 3.0).mean()) < 1e-12
    loss.backward()
    ref = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    dense.clip(x, y, ref).mean().backward()
    assert error(scale.grad, ref.grad) < 1e-11
    assert bias.grad.shape == (1,)
    assert bias.grad == 0
    assert clip_loss(x, y, 3.0, torch.tensor(torch.nan)).isnan()
    assert error(clip_loss(x, y, 3.0, -10.0), dense.clip(x, y, 3.0).mean()) < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(dtype):
    """float32 embeddings are never cast down, half ones are computed in float32."""
    for name in CASES:
        for kind in (torch.float32, dtype):
            xs = inputs(name, 9, 16, 7, kind)
            plain = [x.clone().requires_grad_() for x in xs]
            cast = [x.clone().requires_grad_() for x in xs]
            expected = CASES[name][0](*plain, temperature=0.1)
            for backend in (None, "reference"):
                with torch.autocast("cpu", dtype):
                    loss = CASES[name][0](*cast, temperature=0.1, backend=backend)
                assert error(loss, expected) < 1e-6, name
            a = torch.autograd.grad(expected, plain)
            b = torch.autograd.grad(loss, cast)
            tol = 2e-6 if kind == torch.float32 else TOLERANCE[dtype][1]
            assert all(error(u, v) < tol for u, v in zip(b, a, strict=True)), name


def test_half_precision_gradients_do_not_underflow():
    """The mean over many rows: cast after the multiplication, not before."""
    xs = [torch.randn(1024, 32).half() for _ in range(2)]
    leaves = [x.clone().requires_grad_() for x in xs]
    (nt_xent_loss(*leaves) * 2.0**12).backward()
    _, grads, _ = truth("nt_xent", xs, 0.5, upstream=torch.tensor(2.0**12))
    for x, g in zip(leaves, grads, strict=True):
        assert error(x.grad, g) < 1e-3


@pytest.mark.parametrize("name", CASES)
def test_chunks_do_not_matter(name, monkeypatch):
    """Rows swept a few at a time, ragged at the end, recomputed by autograd."""
    xs = inputs(name, 11, 6, 9)
    ref, grads, _ = truth(name, xs, 0.2)
    monkeypatch.setattr("clae_fast.reference.sweep.CHUNK_ELEMENTS", 40)
    for backend in (None, "reference"):
        leaves = [x.clone().requires_grad_() for x in xs]
        loss = CASES[name][0](*leaves, temperature=0.2, backend=backend)
        assert error(loss, ref) < 1e-12
        for out, g in zip(torch.autograd.grad(loss, leaves), grads, strict=True):
            assert error(out, g) < 1e-11


@pytest.mark.parametrize("name", CASES)
def test_same_bits_twice(name):
    xs = inputs(name, 33, 24, 17, torch.float32)

    def run():
        leaves = [x.clone().requires_grad_() for x in xs]
        loss = CASES[name][0](*leaves, temperature=0.1)
        return [loss, *torch.autograd.grad(loss, leaves)]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


MEMORY = """
import resource, sys, torch
from clae_fast import nt_xent_loss, uel_loss

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

z = torch.randn(8192, 16, requires_grad=True)
nt_xent_loss(z[:64], z[:64].detach()).backward()
before = peak()
backend = None if sys.argv[1] == "auto" else sys.argv[1]
nt_xent_loss(z, z.detach(), backend=backend).backward()
print(peak() - before)
"""

OF_ONE_ID = """
import resource, sys, torch
from clae_fast import siglip_loss

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

def run(n, **told):
    z, ids = torch.randn(n, 64, requires_grad=True), torch.zeros(n, dtype=torch.int64)
    bias = torch.zeros((), requires_grad=True)
    siglip_loss(z, z + 1, 1.0, bias, positive_ids=ids, **told).backward()

run(64)
before = peak()
run(8192, backend=None if sys.argv[1] == "auto" else sys.argv[1])
print(peak() - before)
"""


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_process_memory(backend):
    """16,384 rows, whose float32 matrix takes 1 GiB (autograd would keep several): well below."""
    command = [sys.executable, "-c", MEMORY, backend]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert float(out) < (500 if backend == "auto" else 900), f"{out} MiB"


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_process_memory_of_positives(backend):
    """8192 pairs of one id, whose float32 matrix takes 256 MiB; plain PyTorch needs several."""
    command = [sys.executable, "-c", OF_ONE_ID, backend]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert float(out) < (120 if backend == "auto" else 600), f"{out} MiB"


def test_no_large_tensor():
    """No N x N: a batch whose similarity matrix would take 1 GiB stays far below it."""
    B = 8192
    z = torch.randn(B, 8)
    peak = 0
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            tensors = out if isinstance(out, (tuple, list)) else (out,)
            sizes.extend(t.numel() for t in tensors if isinstance(t, torch.Tensor))
            return out

    for backend in (None, "reference"):
        leaf = z.clone().requires_grad_()
        with Watch():
            nt_xent_loss(leaf, z, backend=backend).backward()
        peak = max(sizes)
        assert peak <= 1 << 23, f"a tensor of {peak} elements"


def test_modules_equal_functions():
    z_i, z_j, queue = torch.randn(6, 4), torch.randn(6, 4), torch.randn(9, 4)
    pairs = [
        (clae_fast.NTXentLoss(0.3, reduction="none"), (z_i, z_j),
         nt_xent_loss(z_i, z_j, temperature=0.3, reduction="none")),
        (clae_fast.InfoNCELoss(0.3), (z_i, z_j, queue),
         info_nce_loss(z_i, z_j, queue, temperature=0.3)),
        (clae_fast.InfoNCELoss(symmetric=True, normalize=False), (z_i, z_j),
         info_nce_loss(z_i, z_j, symmetric=True, normalize=False)),
        (clae_fast.UELLoss(0.3, negative_weight=2), (z_i, z_j),
         uel_loss(z_i, z_j, temperature=0.3, negative_weight=2)),
        (clae_fast.ClipLoss(reduction="sum"), (z_i, z_j, 5.0),
         clip_loss(z_i, z_j, 5.0, reduction="sum")),
    ]  # fmt: skip
    for module, args, expected in pairs:
        assert torch.equal(module(*args), expected), module
        names = list(inspect.signature(module.forward).parameters)
        assert torch.equal(module(**dict(zip(names, args, strict=False))), expected), module
    assert list(inspect.signature(clae_fast.ClipLoss().forward).parameters)[2:4] == [
        "logit_scale",
        "logit_bias",
    ]


def test_module_temperatures():
    """A Parameter is learnt and saved, a tensor moves with the module, a number is printed."""
    learnt = clae_fast.NTXentLoss(torch.nn.Parameter(torch.tensor(0.5)))
    assert list(learnt.state_dict()) == ["temperature"]
    learnt(torch.randn(4, 3), torch.randn(4, 3)).backward()
    assert learnt.temperature.grad is not None
    moved = clae_fast.NTXentLoss(torch.tensor(0.5)).double()
    assert moved.temperature.dtype == torch.float64
    assert "temperature=0.25" in repr(clae_fast.NTXentLoss(0.25))
    with pytest.raises(ValueError, match="temperature must be positive"):
        clae_fast.UELLoss(-1)
    with pytest.raises(ValueError, match="reduction must be one of"):
        clae_fast.ClipLoss(reduction="avg")
    with pytest.raises(ValueError, match="negative_mode"):
        clae_fast.InfoNCELoss(negative_mode="both")
    with pytest.raises(ValueError, match="backend must be"):
        clae_fast.InfoNCELoss(backend="cpu")


@pytest.mark.parametrize("name", CASES)
def test_value_and_grad(name):
    xs = inputs(name, 8, 5, 6)
    loss_fn = functools.partial(CASES[name][0], temperature=0.2)
    ref, grads, _ = truth(name, xs, 0.2)
    loss, got = value_and_grad(loss_fn)(*xs)
    assert error(loss, ref) < 1e-12
    assert not loss.requires_grad
    assert all(error(a, b) < 1e-11 for a, b in zip(got, grads, strict=True))
    _, (first, second, *rest) = value_and_grad(loss_fn, argnums=1)(*xs)
    assert first is None
    assert all(r is None for r in rest)
    assert error(second, grads[1]) < 1e-11
