"""What only a GPU can show of the backends `triton` and `cuda`: sizes, synchronisation, graphs,
memory. Left out, with a line that says so, where there is none."""

import copy
import functools
import subprocess
import sys

import pytest
import torch
from dense import error

from clae_fast import (
    GraphedAttack,
    backends,
    clae_step,
    clip_loss,
    convert_dual_batchnorm,
    cuda,
    dcl_loss,
    hard_negative_loss,
    info_nce_loss,
    nt_xent_loss,
    siglip_loss,
    sup_con_loss,
    uel_loss,
    use_backend,
    value_and_grad,
)
from clae_fast.ops import raw

pytestmark = [pytest.mark.gpu, pytest.mark.gpu_only]
GRADIENT = {torch.float32: 2e-5, torch.float16: 1e-3, torch.bfloat16: 5e-3}
LOSSES = {
    "nt_xent": functools.partial(nt_xent_loss, temperature=0.1),
    "one_way": functools.partial(info_nce_loss, temperature=0.1),
    "clip": functools.partial(clip_loss, logit_scale=20.0, normalize=True),
}


@pytest.fixture(autouse=True)
def _device():
    torch.set_default_device("cuda")
    yield
    torch.set_default_device(None)


SHAPES = {
    "triton": [(64, 128), (1000, 100), (2048, 128), (4097, 256), (600, 768)],
    # Tiles of 64, 128 and 256 columns on an H100.
    "cuda": [(1, 8), (64, 128), (100, 100), (256, 256), (500, 64), (600, 128)],
}
CASES = [(backend, shape) for backend, shapes in SHAPES.items() for shape in shapes]


def check(loss, backend, shape, dtype):
    """Value and gradients against float64; of the sum over hard pairs, as the mean's gradients in
    float16 would be below its range."""
    q = torch.randn(shape)
    k = (q + 3 * torch.randn(shape)).to(dtype)
    q = q.to(dtype)
    call = value_and_grad(functools.partial(loss, reduction="sum"))
    with use_backend(backend):
        value, grads = call(q, k)
    with use_backend("reference"):
        expected, refs = call(q.double(), k.double())
    assert error(value, expected) < (2e-6 if dtype == torch.float32 else GRADIENT[dtype])
    for got, ref in zip(grads, refs, strict=True):
        assert got.dtype == dtype
        assert error(got, ref) < GRADIENT[dtype]


@pytest.mark.parametrize("dtype", GRADIENT, ids=str)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("backend", "shape"), CASES, ids=str)
def test_losses_against_float64(backend, shape, loss, dtype):
    check(LOSSES[loss], backend, shape, dtype)


def some(high, n):
    return torch.arange(n) * 7919 % high


def sup_con(q, k, **options):
    return sup_con_loss(torch.cat((q, k)), some(10, len(q)).repeat(2), **options)


def with_ids(q, k, **options):
    return nt_xent_loss(q, k, temperature=0.1, ids=some(len(q) // 2, len(q)), **options)


def with_extra(q, k, **options):
    extra = q.detach().flip(0)[:100] + 0.5
    return info_nce_loss(q, k, temperature=0.1, extra_negatives=extra, **options)


FAMILY = {
    "siglip": functools.partial(siglip_loss, logit_scale=10.0, logit_bias=-10.0, normalize=True),
    "sup_con": sup_con,
    "dcl": functools.partial(dcl_loss, temperature=0.1),
    "hard_negative": functools.partial(hard_negative_loss, temperature=0.5, beta=1.0),
    "uel": functools.partial(uel_loss, temperature=0.1),
    "ids": with_ids,
    "extra_negatives": with_extra,
    "smoothed": functools.partial(clip_loss, logit_scale=10.0, normalize=True, label_smoothing=0.1),
}


@pytest.mark.parametrize("dtype", GRADIENT, ids=str)
@pytest.mark.parametrize("shape", [(128, 128), (2100, 100), (4096, 128), (700, 512)], ids=str)
@pytest.mark.parametrize("loss", FAMILY)
def test_family_against_float64(loss, shape, dtype):
    check(FAMILY[loss], "triton", shape, dtype)


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("loss", [*LOSSES, "siglip", "uel", "ids"])
def test_compiled(loss, backend):
    """One graph, by inductor, as near to float64 as without it."""
    if backend == "cuda" and loss not in LOSSES:
        backend = "auto"
    call = functools.partial((LOSSES | FAMILY)[loss], reduction="sum")
    q = torch.randn(256, 128, requires_grad=True)
    k = torch.randn(256, 128, requires_grad=True)

    def run(function, q, k):
        value = function(2 * q, k)
        return value, *torch.autograd.grad(value, (q, k))

    torch.compiler.reset()  # PyTorch compiles one function 8 times, and a partial is one
    with use_backend(backend):
        got = run(torch.compile(call, fullgraph=True), q, k)
    with use_backend("reference"):
        expected = run(call, *(x.detach().double().requires_grad_() for x in (q, k)))
    for a, b in zip(got, expected, strict=True):
        assert error(a, b) < GRADIENT[torch.float32]


@pytest.mark.parametrize("dtype", GRADIENT, ids=str)
def test_which_backend_is_chosen(dtype):
    """Ours of itself on the GPUs that have run it, the specification on others."""
    hopper = torch.cuda.get_device_capability() == (9, 0)
    for rows, name in ((64, "cuda"), (20_000, "triton_backend")):
        q = torch.randn(rows, 64, dtype=dtype)
        kernel = backends.choose("contrast", "auto", (q, q, None, 1.0), {})
        module = "clae_fast.cuda" if name == "cuda" else "clae_fast.kernels.contrast"
        assert (kernel.__module__ == module) is hopper
    sigmoid = backends.choose("pair_sigmoid", "auto", (q, q, 1.0, 0.0), {})
    assert sigmoid.__module__.startswith("clae_fast.reference")


@pytest.mark.parametrize("shape", [(131_072, 131_072, 64), (1, 131_072, 128), (131_072, 1, 128)])
def test_many_rows(shape):
    N, M, D = shape
    q, k = (torch.nn.functional.normalize(torch.randn(n, D), dim=1).bfloat16() for n in (N, M))
    some = torch.randint(0, N, (min(N, 64),))
    got = raw.pair_lse(q, k, 10.0, backend="triton")[some]
    expected = (q[some].double() @ k.double().T * 10).logsumexp(1)
    assert error(got, expected) < 2e-6


def test_past_two_to_the_31_elements():
    q = torch.randn((1 << 20) + 5, 2048, dtype=torch.bfloat16)
    k = torch.randn(40, 2048, dtype=torch.bfloat16)
    got = raw.pair_lse(q, k, 0.02, backend="triton")[-3:]
    expected = (q[-3:].double() @ k.double().T * 0.02).logsumexp(1)
    assert error(got, expected) < 2e-6


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    ("backend", "shape"),
    [("triton", (256, 128)), ("triton", (4096, 128)), ("triton", (600, 768)), ("cuda", (256, 128))],
    ids=str,
)
def test_no_synchronisation_and_in_a_graph(backend, loss, shape):
    """The same bits from the replay of a CUDA graph, with other embeddings in the same memory."""
    temperature = torch.tensor(0.1)
    call = value_and_grad(LOSSES[loss])
    if loss == "nt_xent":
        call = value_and_grad(functools.partial(nt_xent_loss, temperature=temperature))
    q, k = (torch.randn(shape, dtype=torch.bfloat16) for _ in range(2))
    with use_backend(backend):
        call(q, k)  # compiles
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            call(q, k)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            value, grads = call(q, k)
        q.normal_()
        graph.replay()
        expected, refs = call(q, k)
    assert torch.equal(value, expected)
    for got, ref in zip(grads, refs, strict=True):
        assert torch.equal(got, ref)


@pytest.mark.parametrize("autocast", [False, True])
def test_graphed_attack(autocast, monkeypatch):
    """A replayed attack is the exact one, to the bit, while weights and statistics move."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 16, 3), torch.nn.BatchNorm2d(16), torch.nn.ReLU(),
        torch.nn.Flatten(), torch.nn.Linear(16 * 36, 32),
    )  # fmt: skip
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    one = convert_dual_batchnorm(net.to(memory_format=torch.channels_last))
    two, graphed = copy.deepcopy(one), GraphedAttack()
    data = [torch.rand(2, 64, 3, 8, 8) for _ in range(8)]
    for encoder, attack in ((one, "exact"), (two, graphed)):
        optimizer = torch.optim.SGD(encoder.parameters(), lr=0.1)
        for x_i, x_j in data:
            with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
                out = clae_step(encoder, x_i, x_j, attack=attack)
            optimizer.zero_grad()
            out.loss.backward()
            optimizer.step()
    assert graphed._recorded is not None  # and five replays
    for name, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[name]), name


@pytest.mark.parametrize("scale", [10.0, 100.0, 200.0])
@pytest.mark.parametrize("form", ["nt_xent", "one_way", "two_way"])
@pytest.mark.parametrize(
    ("pairs", "dtype"),
    [(64, torch.float32), (200, torch.float16), (300, torch.bfloat16), (1024, torch.bfloat16)],
    ids=str,
)
def test_one_launch_against_float64(pairs, dtype, form, scale):
    """Every tile, collapsed rows, both ways of finding the maximum, a scale the device reads."""
    z = torch.randn(128)
    q, k = (z + 0.3 * torch.randn(2, pairs if form == "nt_xent" else pairs // 2, 128)).to(dtype)
    t = torch.tensor(scale)
    needs = {"form": form, "need_dq": True, "need_dk": True, "need_dscale": True}
    if cuda.contrast_refusal(q, k, None, 1.0, t, **needs):
        assert pairs == 1024  # more than this GPU holds in one launch
        return
    got = raw.contrast(q, k, None, 1.0, t, **needs, backend="cuda")
    expected = raw.contrast(
        q.double(), k.double(), None, 1.0, t.double(), **needs, backend="reference"
    )
    plain = raw.contrast(q.float(), k.float(), None, 1.0, t, **needs, backend="reference")
    limits = (GRADIENT[dtype],) * 5
    for a, b, c, most in zip(got[:5], expected[:5], plain[:5], limits, strict=True):
        if b.numel():
            assert error(a, b) < max(most, 3 * error(c, b))


def test_one_launch():
    """Loss and gradients of 2,048 rows of bfloat16, and of two equal sets, in one kernel."""
    q, k = (torch.randn(1024, 128, dtype=torch.bfloat16) for _ in range(2))
    for first, second in ((q, k), (q, q)):
        call = functools.partial(
            raw.contrast, first, second, None, 10.0, need_dq=True, need_dk=True, backend="cuda"
        )
        call()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
            got = call()
            torch.cuda.synchronize()
        kernels = [e for e in seen.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        assert [e.name for e in kernels if "contrast_kernel" not in e.name] == []
        assert len(kernels) == 1
        for one, other in zip(got, call(), strict=True):  # the same bits
            assert torch.equal(one, other)


def test_before_anything_was_loaded():
    """Whether one launch can hold a batch may be the first question of all."""
    code = (
        "import torch; from clae_fast import cuda; q = torch.randn(8, 8, device='cuda'); "
        "print(cuda.contrast_refusal(q, q, None, 1.0))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.stdout.strip() == "None", ran.stderr


@pytest.mark.parametrize("t", [10.0, 100.0])
@pytest.mark.parametrize("N", [512, 8192, 8200])
def test_operators_of_many_rows(N, t):
    """A scale that the device alone knows, below and above where the maximum is known."""
    q, k = (torch.nn.functional.normalize(torch.randn(N, 128), dim=1).bfloat16() for _ in range(2))
    for form in ("nt_xent", "two_way"):
        given = (q, k, None, 1.0, torch.tensor(t))
        got = raw.contrast(*given, form=form, need_dq=True, need_dk=True, backend="triton")
        refs = raw.contrast(
            q.double(), k.double(), *given[2:4], torch.tensor(t).double(), form=form, need_dq=True,
            need_dk=True, backend="reference",
        )  # fmt: skip
        for a, b, limit in zip(got[:5], refs[:5], (1e-4, 2e-6, 2e-6, 5e-3, 5e-3), strict=True):
            if b.numel():
                assert error(a, b) < limit
    both = {"need_dq": True, "need_dk": True}
    for op, args, kwargs in (
        ("pair_mean", (q, k, t), {}),
        ("pair_sigmoid", (q, k, t, -t), both),
        ("pair_uel", (q, q, t, 1.0), {"need_dq": True}),
    ):
        got = getattr(raw, op)(*args, **kwargs, backend="triton")
        refs = getattr(raw, op)(*(x.double() if torch.is_tensor(x) else x for x in args), **kwargs,
                                backend="reference")  # fmt: skip
        for a, b in zip(got, refs, strict=True):
            assert error(a, b) < (5e-3 if b.dim() == 2 else 1e-4)


@pytest.mark.parametrize("rows", [4097, 8191, 8192])
def test_the_same_bits_of_shared_sweeps(rows):
    """Sums of rows and columns from one sweep: what a race would change."""
    z = torch.nn.functional.normalize(torch.randn(rows, 64), dim=1).bfloat16()
    first = raw.contrast(z, z.flip(0), None, 10.0, form="two_way", need_dq=True, backend="triton")
    for _ in range(20):
        again = raw.contrast(
            z, z.flip(0), None, 10.0, form="two_way", need_dq=True, backend="triton"
        )
        for one, other in zip(first, again, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", GRADIENT, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (4, 3, 33, 35), (64, 3, 224, 224)], ids=str)
def test_sign_step(shape, dtype, layout):
    x, grad, x0 = (torch.randn(shape).to(dtype).contiguous(memory_format=layout) for _ in range(3))
    eps, low = torch.rand(shape[1], 1, 1), -torch.rand(shape[1], 1, 1)
    for args in ((0.1, 0.2, -1.0, 1.0), (0.1, 0.0, 0.0, 1.0, None, eps, low)):
        got = raw.sign_step(x, grad, x0, *args, backend="cuda")
        assert torch.equal(got, raw.sign_step(x, grad, x0, *args, backend="reference"))


def test_memory():
    """32,768 rows of width 128: at most 100 MB beside the inputs."""
    q, k = (torch.randn(16_384, 128, dtype=torch.bfloat16) for _ in range(2))
    with use_backend("triton"):
        call = value_and_grad(LOSSES["nt_xent"])
        call(q[:64], k[:64])
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call(q, k)
    assert torch.cuda.max_memory_allocated() - before < 100e6
