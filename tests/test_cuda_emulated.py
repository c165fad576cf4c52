"""The CUDA kernels' own source, run by the host emulator, against the float64 specification."""

import ctypes
import functools
import math
import shutil
import subprocess

import pytest
import torch
from dense import error
from emulated_contrast import SCHEDULES, Emulator
from native import CXX, ROOT, SANITIZE, compile_program
from torch.nn.functional import normalize

from clae_fast import reference

GRADIENT = {torch.float32: 2e-5, torch.float16: 1e-3, torch.bfloat16: 5e-3}
DTYPES = list(GRADIENT)
FORMS = ["nt_xent", "one_way", "two_way"]
ALL = {"need_dq": True, "need_dk": True, "need_dscale": True}


def library(folder, source, name, *more):
    """A shared library of one file of csrc/tests, from this tree or a copy of it."""
    path = folder / f"lib{name}.so"
    flags = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", *more]
    file = source / "csrc" / "tests" / f"{name}.cpp"
    built = subprocess.run([*CXX.split(), *flags, file, "-o", path], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return path


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
    return Emulator(library(tmp_path_factory.mktemp("emulated"), ROOT, "contrast_cuda"))


def specification(q, k, scale, scale_tensor=None, **options):
    for how in ("BN", "schedule", "seed", "truncating"):
        options.pop(how, None)
    return reference.contrast(q, k, None, scale, scale_tensor, **options)


def pair(B, D, dtype, noise=1.0):
    q = torch.randn(B, D)
    return q.to(dtype), (q + noise * torch.randn(B, D)).to(dtype)


def check(emulator, q, k, scale, **options):
    got = emulator.contrast(q, k, scale, **options)
    wide = options | {name: t.double() for name, t in options.items() if name == "scale_tensor"}
    expected = specification(q.double(), k.double(), scale, **wide)
    plain = specification(q.float(), k.float(), scale, **options)
    dtype = q.dtype
    loss = max(2e-6, 1e-7 * abs(scale)) if dtype == torch.float32 else GRADIENT[dtype]
    limits = (loss, 2e-6, 2e-6, GRADIENT[dtype], GRADIENT[dtype])
    names = ("loss", "lse", "lse_col", "dq", "dk")
    for name, a, b, c, most in zip(names, got, expected, plain, limits, strict=False):
        assert a.shape == b.shape, name
        assert not a.isnan().any(), name
        assert torch.equal(a.isinf(), b.isinf()), name  # log-sum-exps of nothing
        a, b, c = a[a.isfinite()], b[a.isfinite()], c[a.isfinite()]
        if a.numel() and (a.any() or b.any()):
            # Never worse than plain float32 by more than a small factor.
            assert error(a, b) <= max(most, 3 * error(c, b)), (name, error(a, b))
    assert got[5].numel() == 0
    if got[6].numel():  # a sum of terms that cancel: against the size of the terms
        rows = specification(q.double(), k.double(), scale, **wide | {"reduction": "none"})[0]
        longest = 1.0 if wide.get("normalize", True) else q.norm(dim=1).max() * k.norm(dim=1).max()
        terms = (1 - (-rows).exp()).sum() * longest
        terms /= rows.numel() if wide.get("reduction") == "mean" else 1
        assert (got[6] - expected[6]).abs() <= GRADIENT[dtype] * (terms + expected[6].abs())
    return got


# One pair; odd; several tiles; a width of more than two slices; more than one chunk of every BN.
SHAPES = [(1, 4, 64), (5, 10, 64), (33, 64, 64), (100, 128, 128), (70, 200, 64), (150, 72, 256)]


@pytest.mark.parametrize("scale", [2.0, 10.0, 100.0])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_the_specification(emulator, shape, form, scale):
    B, D, BN = shape
    for dtype in DTYPES:
        q, k = pair(B, D, dtype, noise=3.0 if scale > 50 else 1.0)
        check(emulator, q, k, scale, form=form, BN=BN, **ALL)


@pytest.mark.parametrize("form", FORMS)
def test_tiles_of_512_columns(emulator, form):
    q, k = pair(300, 40, torch.bfloat16)
    check(emulator, q, k, 10.0, form=form, BN=512, **ALL)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_are_not_ours(emulator, form, dtype):
    q, k = pair(70, 40, dtype)
    q, k = (q * 0.3).to(dtype), (k * 0.3).to(dtype)
    check(emulator, q, k, 1.0, form=form, normalize=False, **ALL)
    check(emulator, q, k, -2.0, form=form, normalize=False, **ALL)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exponents_far_above_what_float32_can_raise(emulator, form, dtype):
    """Collapsed rows at a small temperature, and raw rows: the side that does not count is 0 times
    e^s, which must stay 0."""
    z = torch.randn(64)
    q, k = (z + 0.2 * torch.randn(2, 70, 64)).to(dtype)
    for scale in (100.0, 200.0):
        check(emulator, q, k, scale, form=form, **ALL)
        check(emulator, q, k, scale, form=form, need_dq=True)
    check(emulator, q * 2, k * 2, 1.0, form=form, normalize=False, **ALL)


@pytest.mark.parametrize("form", FORMS)
def test_the_gradient_of_the_scale_is_not_rounded(emulator, form):
    """In collapsed batches what rounding G leaves would be a part of it."""
    q, k = (torch.randn(64) + 0.1 * torch.randn(2, 64, 64)).bfloat16()
    for scale in (14.3, 71.0):
        got = emulator.contrast(q, k, scale, form=form, need_dscale=True)[6]
        expected = specification(q.double(), k.double(), scale, form=form, need_dscale=True)[6]
        assert error(got, expected) < 5e-3


NEEDS = [(), ("need_dq",), ("need_dk",), ("need_dscale",), ("need_dq", "need_dk")]


@pytest.mark.parametrize("need", NEEDS, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_what_is_asked_for_alone(emulator, form, need):
    """The same bits as among all; the rest has no elements."""
    q, k = pair(70, 40, torch.bfloat16)
    got = check(emulator, q, k, 10.0, form=form, **dict.fromkeys(need, True))
    whole = emulator.contrast(q, k, 10.0, form=form, **ALL)
    for a, b in zip(got, whole, strict=True):
        assert a.numel() == 0 or torch.equal(a, b)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("form", FORMS)
def test_reductions(emulator, form, reduction):
    q, k = pair(37, 40, torch.float32)
    check(emulator, q, k, 10.0, form=form, reduction=reduction, **ALL)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reciprocal", [False, True])
def test_a_scale_that_the_device_reads(emulator, dtype, reciprocal):
    """Both ways of finding the maximum, as the tensor has it."""
    q, k = pair(40, 32, torch.float32)
    for value in (0.125, 10.0):
        t = torch.tensor(value, dtype=dtype)
        check(emulator, q, k, 5.0, scale_tensor=t, reciprocal=reciprocal, **ALL)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_equal_sets_fold(emulator, dtype):
    """The attack's call: B x B tiles stand for 2 B x 2 B."""
    q, _ = pair(90, 64, dtype)
    for scale in (10.0, 100.0):
        for need in ({"need_dk": True}, ALL):
            folded = check(emulator, q, q, scale, **need)
            whole = emulator.contrast(q, q.clone(), scale, **need)
            for a, b in zip(folded, whole, strict=True):
                assert a.numel() == 0 or error(a, b) < GRADIENT[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_expanded_and_unaligned_rows(emulator, dtype):
    wide = torch.randn(50, 101).to(dtype)
    check(emulator, wide[:40, 1:38], wide[10:, 3:40], 10.0, **ALL)
    check(emulator, wide[:40:2, :40], wide[1:41:2, 40:80], 10.0, form="two_way", **ALL)
    row = torch.randn(1, 40).to(dtype)
    check(emulator, row.expand(20, 40), wide[:20, :40], 5.0, form="one_way", **ALL)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("aligned", [1e-1, 1e-3])
def test_aligned_pairs_keep_their_digits(emulator, dtype, aligned):
    q, k = pair(64, 64, dtype, noise=aligned)
    for scale in (10.0, 50.0):
        check(emulator, q, k, scale, form="nt_xent", **ALL)


def test_collapsed_embeddings(emulator):
    z = torch.randn(64) + 0.05 * torch.randn(2, 80, 64)
    check(emulator, *z, 10.0, **ALL)


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("form", FORMS)
def test_nan_and_inf_stay_visible(emulator, form, bad, normalized):
    for side in range(2):
        both = pair(70, 20, torch.float32)
        both[side][41, 7] = bad
        loss, *_ = emulator.contrast(
            *both, 2.0, form=form, normalize=normalized, reduction="mean", **ALL
        )
        assert not loss.isfinite()


@pytest.mark.parametrize("form", FORMS)
def test_zero_rows_have_zero_gradient(emulator, form):
    q, k = pair(20, 16, torch.float32)
    q[3], k[5] = 0, 0
    *_, dq, dk, _, _ = check(emulator, q, k, 10.0, form=form, **ALL)
    assert dq.isfinite().all()
    assert dk.isfinite().all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_under_every_schedule(emulator, form, dtype):
    q, k = pair(100, 150, dtype)
    first = emulator.contrast(q, k, 10.0, form=form, reduction="mean", **ALL)
    for schedule in SCHEDULES[1:]:
        for seed in (1, 2) if schedule == "random" else (1,):
            other = emulator.contrast(
                q, k, 10.0, form=form, reduction="mean", schedule=schedule, seed=seed, **ALL
            )
            for a, b in zip(first, other, strict=True):
                assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_accumulators_that_truncate(emulator, dtype):
    """Tensor cores cut off what falls below the largest term: the limits hold all the same."""
    q, k = pair(200, 128, dtype)
    for scale in (10.0, 50.0):
        check(emulator, q, k, scale, BN=256, truncating=True, **ALL)
    check(emulator, *(normalize(torch.randn(64) + 0.05 * torch.randn(2, 80, 64), dim=-1)
                      .to(dtype)), 10.0, truncating=True, **ALL)  # fmt: skip


# ------------------------------------------------------------------------------- planted bugs

PLANTED = {
    "no grid barrier": (
        "contrast_kernel.h", "    sync_grid();\n    if (rows_wanted", "    if (rows_wanted",
    ),
    "no wait for a copy": ("contrast_kernel.h", "wait_copies<1>();\n    sync_block();", ";"),
    "no barrier before a slice is fetched over": (
        "contrast_kernel.h", "if (s + 2 < slices) {\n      sync_block();",
        "if (s + 2 < slices) {\n      ;",
    ),
    "no barrier between weights and product": (
        "contrast_kernel.h", "twice * g0, twice * g1);\n      }\n    }\n  }\n  sync_block();",
        "twice * g0, twice * g1);\n      }\n    }\n  }",
    ),
    "no barrier in an exchange": (
        "contrast_kernel.h", "rows[m][half];\n      }\n    }\n  }\n  sync_block();",
        "rows[m][half];\n      }\n    }\n  }",
    ),
    "a left fragment turned": (
        "contrast_products.h", "(lane / 8 % 2) * 8 + lane % 8, chunk + lane / 16",
        "(lane / 16) * 8 + lane % 8, chunk + lane / 8 % 2",
    ),
    "a row off by one": ("contrast_products.h", "(c / 2) * 8 + lane_index() / 4", "(c / 2) * 7 + "
                         "lane_index() / 4"),
    "weights past their array": (
        "contrast_params.h", "carve<char>(cursor, L::weight_bytes)",
        "carve<char>(cursor, L::weight_bytes - 16)",
    ),
    "a column's norm forgotten": (
        "contrast_kernel.h", "weight_at(tile, e.known, x0, row, k) * tile.inverse[k]",
        "weight_at(tile, e.known, x0, row, k)",
    ),
    "a side that does not count at level 0": (
        "contrast_kernel.h", "w.level : kInfinity", "w.level : 0.0f",
    ),
    "a ticket too early": ("contrast_kernel.h", "unsigned(block_count())", "unsigned(block_count() "
                           "- 1)"),
    "no second grid barrier": ("contrast_kernel.h", "if (p.gradient) sync_grid();", ""),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANTED)
def test_planted_bugs_are_caught(name, tmp_path):
    """By the emulator, or by the comparison, under one schedule or another."""
    file, right, wrong = PLANTED[name]
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    path = tmp_path / "csrc" / "cuda" / file
    text = path.read_text()
    assert right in text, "the planted bug no longer fits the source"
    path.write_text(text.replace(right, wrong, 1))
    broken = Emulator(library(tmp_path, tmp_path, "contrast_cuda", "-DCLAE_ONE_TILE"))
    q, k = pair(100, 200, torch.bfloat16)  # two row blocks, two chunks, four slices
    given = {"scale": 10.0}
    if "level" in name:
        q, k = (q[:1] + 0.2 * q).bfloat16(), (q[:1] + 0.2 * k).bfloat16()
        given = {"scale": 200.0, "form": "one_way"}
    caught = []
    for schedule in SCHEDULES:
        try:
            check(broken, q, k, BN=128, schedule=schedule, **given, **ALL)
        except (RuntimeError, AssertionError) as reason:
            caught.append(f"{schedule}: {reason}".splitlines()[0])
    assert caught
    print(*caught, sep="\n")


def test_under_address_sanitizer(tmp_path):
    assert run(compile_program(tmp_path, "contrast_cuda", *SANITIZE)) == ["0", "1", "2"]


def test_under_thread_sanitizer(tmp_path):
    flags = ("-O1", "-g", "-fsanitize=thread", "-fno-builtin")
    assert run(compile_program(tmp_path, "contrast_cuda", *flags), "one") == ["0", "1", "2"]


def run(binary, *words):
    """The formats that it says are right."""
    command = [*(["setarch", "-R"] if shutil.which("setarch") else []), binary, *words]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return [line.split()[1] for line in ran.stdout.splitlines() if line.startswith("right ")]


# ---------------------------------------------------------------------------------- sign_step


class Size(ctypes.Structure):
    _fields_ = [
        ("tensor", ctypes.c_void_p),
        ("number", ctypes.c_float),
        ("stride", ctypes.c_int),
    ]


class SignStep(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "grad", "x0", "out")),
        ("n", ctypes.c_uint64),
        *((name, Size) for name in ("step", "eps", "low", "high")),
        *((name, ctypes.c_bool) for name in ("varies", "aligned")),
        ("inner", ctypes.c_uint64),
        ("channels", ctypes.c_uint),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def sign_step(tmp_path_factory):
    path = library(tmp_path_factory.mktemp("sign_step"), ROOT, "sign_step_cuda")
    function = ctypes.CDLL(str(path)).sign_step_emulated
    function.restype = ctypes.c_char_p
    return functools.partial(run_sign_step, function)


def run_sign_step(function, x, grad, x0, step, eps, low, high):
    def size(value):
        if not isinstance(value, torch.Tensor):
            return Size(None, value, 0)
        return Size(value.data_ptr(), math.nan, int(value.numel() > 1))

    out = torch.full_like(x, math.nan)
    sizes = [step, eps, low, high]
    varies = any(isinstance(s, torch.Tensor) and s.numel() > 1 for s in sizes)
    inner = 1
    if varies and x.is_contiguous():
        inner = x.numel() // (x.shape[0] * x.shape[1])
    params = SignStep(
        x.data_ptr(), grad.data_ptr(), x0.data_ptr(), out.data_ptr(), x.numel(),
        *map(size, sizes), varies, False, inner, x.shape[1] if varies else 1,
    )  # fmt: skip
    formats = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
    said = function(ctypes.byref(params), formats[x.dtype])
    assert said is None, said.decode()
    return out


@pytest.mark.parametrize("layout", ["contiguous_format", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 5, 7), (3, 3, 16, 16), (2, 19, 9, 11)])
def test_sign_step(sign_step, shape, dtype, layout):
    """Bit for bit, with tails, one size for all or one a channel, and its own start."""
    layout = getattr(torch, layout)
    x, grad, x0 = (torch.randn(shape).to(dtype).contiguous(memory_format=layout) for _ in range(3))
    grad[0, 0, 0, 0] = 0.0
    C = shape[1]
    channels = [torch.rand(C), torch.rand(C), -torch.rand(C), torch.rand(C)]
    one = [torch.rand(1) for _ in range(4)]
    for start in (x0, x):
        for sizes in ([0.1, 0.2, -1.0, 1.0], [0.1, 0.2, -math.inf, math.inf], channels, one):
            got = sign_step(x, grad, start, *sizes)
            shaped = [s.view(-1, 1, 1) if isinstance(s, torch.Tensor) else s for s in sizes]
            numbers = [s if not isinstance(s, torch.Tensor) else 0.0 for s in shaped]
            tensors = [s if isinstance(s, torch.Tensor) else None for s in shaped]
            expected = reference.sign_step(x, grad, start, *numbers, *tensors)
            assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sign_step_of_unaligned_memory_and_nan(sign_step, dtype):
    x, grad, x0 = (torch.randn(200).to(dtype)[1:100].view(1, 3, 33, 1) for _ in range(3))
    for tensor in (x, grad, x0):
        tensor[0, 1, 5, 0] = math.nan
        got = sign_step(x, grad, x0, 0.1, 0.2, -1.0, 1.0)
        expected = reference.sign_step(x, grad, x0, 0.1, 0.2, -1.0, 1.0)
        assert torch.equal(got.isnan(), expected.isnan())
        assert torch.equal(got.nan_to_num(), expected.nan_to_num())
        tensor[0, 1, 5, 0] = 1.0
