"""The C++ operators over all pairs: every path of theirs, memory, threads, interruption."""

import functools
import os
import signal
import subprocess
import sys
import threading
import time

import dense
import pytest
import torch
from dense import error
from native import SANITIZE, compile_and_run

from clae_fast import _extension, cpp_pairs, info_nce_loss, nt_xent_loss, reference, value_and_grad
from clae_fast.ops import raw

pytestmark = pytest.mark.skipif(
    _extension.build_facts().get("requested") == "none", reason="built with CLAE_FAST_BUILD=none"
)
FORMS = ["nt_xent", "one_way", "queue", "two_way"]
ALL = (True, True, True, True)


def contrast(form, q, k, n, t, need=ALL, normalize=True, backend="cpp"):
    queue = form == "queue"
    return raw.contrast(
        q, k, n if queue else None, t, None, False, "one_way" if queue else form, normalize,
        *need, backend=backend,
    )  # fmt: skip


def rows(B, D, M, dtype=torch.float32):
    return [torch.randn(n, D, dtype=torch.float64).to(dtype) for n in (B, B, M)]


# ------------------------------------------------------------------------------- every path


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("shape", "t"),
    [
        ((1, 4, 3), 5.0),  # nothing to contrast
        ((2, 1, 1), 5.0),
        ((127, 123, 252), 10.0),
        ((252, 37, 507), 10.0),
        ((300, 64, 127), 100.0),  # past the known range: running maxima
        ((2100, 8, 2300), 14.0),  # more tiles than are kept: two sweeps, in rounds
        ((2100, 8, 2300), 100.0),
        ((2150, 128, 40), 14.0),  # nt_xent keeps all tiles, in room made for the gradient
        ((2150, 128, 40), 100.0),
        ((3000, 128, 40), 14.0),  # so does two_way
        ((3000, 128, 40), 100.0),
    ],
)
def test_against_float64(form, shape, t):
    xs = rows(*shape)
    out = contrast(form, *xs, t)
    truth = contrast(form, *(x.double() for x in xs), t, backend="reference")
    loss, lse_row, lse_col, dq, dk, dn, dscale = (
        error(a, b, floor=1e-6) for a, b in zip(out, truth, strict=True)
    )
    assert max(loss, lse_row, lse_col) < max(2e-6, 1e-7 * t)
    plain = contrast(form, *xs, t, backend="reference")
    limits = [max(2e-5, 3 * error(a, b, 1e-6)) for a, b in zip(plain[3:], truth[3:], strict=True)]
    for name, got, limit in zip(
        ["dq", "dk", "dn", "dscale"], (dq, dk, dn, dscale), limits, strict=True
    ):
        assert got < limit, name


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scale", [-3.0, 0.0, 1e-30])
@pytest.mark.parametrize("B", [20, 150])
def test_scales_that_training_may_reach(form, scale, B):
    """A learned scale is not checked on the host: where it is negative or 0 the formula holds."""
    xs = rows(B, 12, 70, torch.float64)
    xs = [x.float().double() for x in xs]
    truth = contrast(form, *xs, scale, backend="reference")
    for dtype, limit in ((torch.float64, 1e-11), (torch.float32, 2e-5)):
        out = contrast(form, *(x.to(dtype) for x in xs), scale)
        for i, (a, b) in enumerate(zip(out, truth, strict=True)):
            if scale == 0 and i == 6:  # the specification divides by the scale
                assert a.isfinite().all()
            else:
                assert error(a, b, floor=1e-6) < limit, i
    q, k, _ = xs
    expected = raw.pair_lse(q, k, scale, skip="diagonal", backend="reference")
    assert error(raw.pair_lse(q, k, scale, skip="diagonal", backend="cpp"), expected) < 1e-12


def test_odd_corners():
    """An odd stack, ids past int32, rows so short that their squares vanish."""
    q, k = torch.randn(41, 6, dtype=torch.float64), torch.randn(41, 6, dtype=torch.float64)
    wide = torch.arange(41) % 3 * 2**40
    tiny, long = torch.full((4, 1), 1e-24), torch.full((4, 1), 1e18)
    for call in (
        lambda backend: raw.pair_lse(q, k, 1.0, skip="twins", backend=backend),
        lambda backend: raw.pair_lse(q, k, 1.0, row_ids=wide, col_ids=wide, backend=backend),
        lambda backend: raw.pair_lse(tiny, long, 1e8, backend=backend),
    ):
        assert error(call("cpp"), call("reference")) < 1e-6


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("D", [5, 32, 130])
@pytest.mark.parametrize("need", range(1, 16))
def test_nothing_of_an_output_is_left_unwritten(form, D, need, monkeypatch):
    """Outputs and working memory hold NaN before; what is not asked for has no elements."""
    xs = rows(70, D, 90, torch.float64)
    asked = [bool(need >> i & 1) for i in range(4)]
    truth = contrast(form, *xs, 5.0, asked, backend="reference")
    empty = torch.empty

    def filled(*size, dtype=None, **options):
        x = empty(*size, dtype=dtype, **options)
        return x.fill_(255) if dtype == torch.uint8 else x.fill_(torch.nan)

    monkeypatch.setattr(cpp_pairs.torch, "empty", filled)
    for step_by_step in (False, True):
        if step_by_step:
            pause_after_every_step(monkeypatch)
        for a, b in zip(contrast(form, *xs, 5.0, asked), truth, strict=True):
            assert error(a, b) < 1e-11


def pause_after_every_step(monkeypatch):
    """As an operator that takes long runs: memory from Python, a fresh call for each task."""

    def run(op, *args):
        memory, seen, token = torch.empty(1 << 28, dtype=torch.uint8), [], 0
        while token := op(*args, memory, token, 0):
            seen.append(token)
        assert len(set(seen)) == len(seen) >= 2

    monkeypatch.setattr(cpp_pairs, "_run", run)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("shape", "t"), [((200, 20, 300), 5.0), ((2100, 4, 2300), 100.0)])
def test_a_pause_changes_no_bit(form, shape, t, monkeypatch):
    xs = rows(*shape)
    whole = contrast(form, *xs, t)
    pause_after_every_step(monkeypatch)
    assert all(map(torch.equal, contrast(form, *xs, t), whole))


def test_a_pause_changes_no_bit_of_the_others(monkeypatch):
    q, k, _ = rows(300, 40, 1)
    ids = torch.arange(300, dtype=torch.int32) % 3
    calls = {
        "pair_lse": lambda: (raw.pair_lse(q, k, 9.0, None, False, "twins", 0, ids, ids),),
        "pair_mean": lambda: raw.pair_mean(q, k, 0.1, row_ids=ids, col_ids=ids),
        "pair_grad": lambda: (raw.pair_grad(q, k, 0.1, row_lse=q[:, 0], row_weight=q[:, 1]),),
        "pair_uel": lambda: raw.pair_uel(q, k, 0.5, 1.0, need_dq=True),
        "pair_sigmoid": lambda: raw.pair_sigmoid(q, k, 0.5, -1.0, need_dq=True, need_dk=True),
    }
    whole = {name: call() for name, call in calls.items()}
    pause_after_every_step(monkeypatch)
    for name, call in calls.items():
        assert all(map(torch.equal, call(), whole[name])), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_half_precision_is_read_exactly(form, dtype):
    """The truth is float64 of the rounded inputs, subnormal numbers included."""
    xs = rows(40, 24, 30, dtype)
    for x in xs:
        x[3] *= 1e-6 if dtype == torch.float16 else 1e-10
    out = contrast(form, *xs, 5.0)
    truth = contrast(form, *(x.double() for x in xs), 5.0, backend="reference")
    assert all(x.dtype == torch.float32 for x in out)
    # On a processor's bfloat16 units the weights of a gradient are rounded, nothing else.
    rounded = dtype == torch.bfloat16
    for i, (a, b) in enumerate(zip(out, truth, strict=True)):
        assert error(a, b) < (4e-3 if rounded and 3 <= i < 6 else 2e-5 if i < 6 else 1e-3)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("shape", "t"), [((127, 123, 252), 10.0), ((2100, 9, 2300), 14.0),
                                          ((300, 65, 127), 100.0)])  # fmt: skip
@pytest.mark.parametrize("normalize", [True, False])
def test_bfloat16(form, shape, t, normalize):
    """Every path of the bfloat16 units: odd widths, rounds, running maxima, rows as they are."""
    xs = rows(*shape, torch.bfloat16)
    t = t if normalize else t / shape[1]
    for need in (ALL, (True, False, False, False), (False, True, False, False)):
        out = contrast(form, *xs, t, need, normalize)
        truth = contrast(form, *(x.double() for x in xs), t, need, normalize, backend="reference")
        for i, (a, b) in enumerate(zip(out[:6], truth, strict=False)):
            assert error(a, b, floor=1e-6) < (4e-3 if i > 2 else max(2e-6, 1e-7 * t)), i


def test_every_half_number():
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        x = bits.view(dtype)
        x = x[x.isfinite()].reshape(-1, 1)
        one = torch.ones(1, 1, dtype=dtype)
        # exp(log-sum-exp) of one column is the number itself
        assert torch.equal(raw.pair_lse(x, one, 1.0, backend="cpp"), x.float().squeeze(1))


# ---------------------------------------------------------------------------- the same bits


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("shape", "t"), [((150, 33, 190), 10.0), ((2100, 16, 2300), 100.0)])
def test_same_bits_for_any_number_of_threads(form, shape, t):
    xs = rows(*shape)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            results.append(contrast(form, *xs, t))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_two_python_threads_at_once():
    xs = rows(600, 40, 600)
    expected = contrast("nt_xent", *xs, 10.0)
    wrong = []

    def work():
        for _ in range(10):
            if not all(map(torch.equal, contrast("nt_xent", *xs, 10.0), expected)):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


class Losses(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        q, k = Losses.inputs
        return nt_xent_loss(q, k, backend="cpp")


def test_in_the_workers_of_a_loader():
    """After the threads of the parent have run: a forked child has none of them."""
    Losses.inputs = [torch.randn(400, 32) for _ in range(2)]
    expected = nt_xent_loss(*Losses.inputs, backend="cpp")
    context = "fork"
    loader = torch.utils.data.DataLoader(
        Losses(), batch_size=2, num_workers=2, multiprocessing_context=context, timeout=60
    )
    assert all(torch.equal(x, expected.expand(2)) for x in loader)


# ----------------------------------------------------------------------- memory and patience


def peak_growth(code):
    """Bytes by which `code` raises a fresh process's peak above what it held before."""
    script = f"""
import resource, torch
from clae_fast import info_nce_loss, nt_xent_loss, value_and_grad
torch.set_num_threads(2)
def used(name):
    for line in open("/proc/self/status"):
        if line.startswith(name):
            return int(line.split()[1]) * 1024
value_and_grad(nt_xent_loss)(torch.randn(8, 16), torch.randn(8, 16))
{code.partition("---")[0]}
open("/proc/self/clear_refs", "w").write("5")
before = used("VmRSS")
{code.partition("---")[2]}
print(used("VmHWM") - before)
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return int(ran.stdout)


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux's /proc")
def test_memory_grows_with_n_not_n_squared():
    """16 copies of the input at most, and 32 MB of kept exponentials; S alone would take 1.6 GB."""
    N, D = 20_000, 32
    grown = peak_growth(
        f"z = torch.randn(2, {N // 2}, {D})\n---\nvalue_and_grad(nt_xent_loss)(z[0], z[1])"
    )
    assert grown < 16 * N * D * 4 + (32 << 20) + (16 << 20), grown


LONG = """
import sys, torch
from clae_fast import nt_xent_loss
torch.set_num_threads(1)
z = torch.randn(2, 50_000, 128)
print("go", flush=True)
nt_xent_loss(z[0].requires_grad_(), z[1], backend="cpp")
"""


def test_ctrl_c_within_a_second_at_100_000_rows():
    process = subprocess.Popen(
        [sys.executable, "-c", LONG],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout.readline() == "go\n"
    time.sleep(1.5)
    start = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert time.monotonic() - start < 2.5  # the interpreter's own end included
    assert "KeyboardInterrupt" in err


@pytest.mark.parametrize(
    ("op", "shape", "dtype"),
    [
        ("contrast", (50_000, 512), torch.float32),
        ("pair_grad", (100_000, 512), torch.float32),
        ("pair_mean", (100_000, 512), torch.float32),
        ("pair_lse", (100_000, 2), torch.float64),  # the exponentials are the work
        ("pair_uel", (30_000, 2), torch.float64),
        ("contrast", (15_000, 1), torch.float64),
    ],
)
def test_a_pause_is_never_far(op, shape, dtype, monkeypatch):
    """The first calls of a long run, on one thread: each comes back within a second of its own."""
    q = torch.randn(shape, dtype=dtype)
    weight = torch.ones(len(q), dtype=dtype)
    calls = {
        "contrast": lambda: contrast("nt_xent", q, q, None, 10.0, (True, True, False, False)),
        "pair_grad": lambda: raw.pair_grad(q, q, 0.1, row_lse=weight, row_weight=weight,
                                           col_lse=weight, col_weight=weight, backend="cpp"),
        "pair_mean": lambda: raw.pair_mean(q, q, 0.1, backend="cpp"),
        "pair_lse": lambda: raw.pair_lse(q, q, 0.1, backend="cpp"),
        "pair_uel": lambda: raw.pair_uel(q, q, 0.1, 1.0, need_dq=True, backend="cpp"),
    }  # fmt: skip
    took = []

    def run(op, *args):
        needed = op(*args, None, 0, cpp_pairs.PAUSE_MS)
        assert needed < 0, "it would run whole"
        memory, token = torch.empty(-needed, dtype=torch.uint8), 0
        for _ in range(6):
            start = time.thread_time()
            token = op(*args, memory, token, cpp_pairs.PAUSE_MS)
            took.append(time.thread_time() - start)
            assert token > 0
        raise KeyboardInterrupt

    monkeypatch.setattr(cpp_pairs, "_run", run)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with pytest.raises(KeyboardInterrupt):
            calls[op]()
    finally:
        torch.set_num_threads(before)
    assert max(took) < 1.0, took


def test_every_sweep_can_pause(monkeypatch):
    """Also the one that gathers gradients from kept exponentials: O(N M D), so with wide rows it
    takes seconds."""
    steps = []

    def run(op, *args):
        memory, token = torch.empty(-op(*args, None, 0, 0) or 1 << 28, dtype=torch.uint8), 0
        while token := op(*args, memory, token, 0):
            steps.append(token & (1 << 31) - 1)

    monkeypatch.setattr(cpp_pairs, "_run", run)
    q = torch.randn(1024, 64)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        contrast("nt_xent", q, q + 1, None, 10.0, (True, True, False, True))
    finally:
        torch.set_num_threads(before)
    pauses = [steps.count(step) for step in sorted(set(steps))]
    assert len(pauses) >= 3  # the sums, the turn, the gradients
    assert pauses[-1] > 8
    assert max(pauses) > 60


# ---------------------------------------------------------------------------------- refusals


def test_what_the_operator_itself_refuses():
    assert _extension.load() is None
    op = torch.ops.clae_fast_C.contrast
    q = torch.randn(4, 3)
    none = torch.empty(0)

    def call(q, k, n=None, form=0, loss=None, memory=None, token=0):
        rows = torch.empty(8) if loss is None else loss
        return op(
            q, k, n, 1.0, form, True, 0, rows, torch.empty(8), none, none, none, none, none,
            memory, token, 100,
        )  # fmt: skip

    assert call(q, q) == 0
    memory = torch.zeros(1 << 16, dtype=torch.uint8)
    for message, args in (
        ("q and k must be alike", (q, q[:3])),
        ("q and k must be alike", (q, q.double())),
        ("must have dense rows", (q.T, q.T)),
        ("form must be 0, 1 or 2", (q, q, None, 3)),
        ("negatives must be like q", (q, q, q, 0)),
        ("loss must be contiguous, with 8 elements", (q, q, None, 0, torch.empty(7))),
        ("loss must be contiguous", (q, q, None, 0, torch.empty(8, dtype=torch.float64))),
        ("memory must be contiguous", (q, q, None, 0, None, torch.empty(8, dtype=torch.uint8))),
        ("float32, float64, bfloat16 or float16", (q.int(), q.int())),
        ("token must be 0 without memory", (q, q, None, 0, None, None, 1)),
        ("from an earlier call", (q, q, None, 0, None, memory, 99)),
        ("from an earlier call", (q, q, None, 0, None, memory, (-5 << 31) | 1)),
        ("from an earlier call", (q, q, None, 0, None, memory, (5 << 31) | 1)),
    ):
        with pytest.raises(RuntimeError, match=message):
            call(*args)


def test_other_devices_and_dtypes_are_refused_with_the_reason():
    q = torch.randn(4, 3)
    assert cpp_pairs.refusal(q) is None
    assert "it runs on the CPU, the embeddings are on meta" in cpp_pairs.refusal(q.to("meta"))
    assert "it knows float32" in cpp_pairs.refusal(q.to(torch.int32))


@pytest.mark.parametrize("mode", ["set_default_device('meta')", "inference_mode().__enter__()"])
def test_the_import_may_meet_any_mode(mode):
    code = f"""
import torch
z = torch.randn(2, 6, 4)
mode = torch.{mode}
import clae_fast
torch.set_default_device("cpu")
mode is None or torch.inference_mode(False).__enter__()
x, y = (torch.nn.Parameter(v.clone()) for v in z)
clae_fast.nt_xent_loss(x, y, reduction="none").sum().backward()
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("loss", [nt_xent_loss, functools.partial(info_nce_loss, symmetric=True)])
def test_value_and_grad_is_the_fused_call(loss):
    z = [torch.randn(33, 20) for _ in range(2)]
    value, grads = value_and_grad(loss)(*z, backend="cpp")
    formula = dense.nt_xent if loss is nt_xent_loss else dense.clip
    leaves = [x.double().requires_grad_() for x in z]
    t = 2.0 if loss is nt_xent_loss else 10.0
    truth = formula(*leaves, t, True).mean()
    assert error(value, truth) < 2e-6
    for a, b in zip(grads, torch.autograd.grad(truth, leaves), strict=True):
        assert error(a, b) < 2e-5


# ---------------------------------------------------------------------------- without torch


def test_every_instruction_set(tmp_path):
    assert _extension.load() is None
    isa, _ = compile_and_run(tmp_path, "pairs", "-O2", sources=["cpu/pairs.cpp"])
    assert isa == torch.ops.clae_fast_C.isa()
    switched_off = ("-O2", "-DCLAE_FAST_NO_SIMD")
    assert compile_and_run(tmp_path, "pairs", *switched_off, sources=["cpu/pairs.cpp"])[0] == (
        "baseline"
    )


def test_sanitizers_find_nothing(tmp_path):
    compile_and_run(tmp_path, "pairs", *SANITIZE, sources=["cpu/pairs.cpp"])


def test_the_reference_is_the_truth_of_these_tests():
    """A cross-check that the two are not one piece of code."""
    q = torch.randn(6, 4, dtype=torch.float64)
    s = torch.nn.functional.normalize(q, dim=1) @ torch.nn.functional.normalize(q, dim=1).T
    lse = reference.contrast(q, q.roll(1, 0), None, 1.0, form="one_way").lse_row
    assert error(lse, s.roll(1, 1).fill_diagonal_(-torch.inf).logsumexp(1)) < 1e-12
