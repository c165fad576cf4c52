"""The table of backends: what is chosen, what is forced, and what a refusal says."""

import os
import subprocess
import sys
import types

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import clae_fast
from clae_fast import available_backends, backends, nt_xent_loss, ops, use_backend
from clae_fast.ops import SCHEMAS, raw


def test_every_operator_has_a_specification():
    assert set(backends.OPERATORS) == set(SCHEMAS)
    table = available_backends()
    assert set(table) == set(SCHEMAS)
    for row in table.values():
        assert tuple(row) == backends.BACKENDS
        assert row["reference"] == "ok"
        assert all(row.values()), "a refusal has a reason"


@pytest.fixture
def fake(monkeypatch):
    """A table with two kernels for pair_lse: one is missing a library, one refuses 3 columns."""
    calls = []

    def missing():
        raise backends.Unavailable("libfast.so is not there")

    def kernel(q, k, *args, **kwargs):
        calls.append("cpp")
        return torch.zeros(q.shape[0])

    def can_run(q, k, *args, **kwargs):
        return "it cannot do 3 columns" if k.shape[0] == 3 else None

    rows = (
        *(r for r in backends.TABLE if (r.op, r.backend) != ("pair_lse", "cpp")),
        backends.Row("pair_lse", "cuda", 30, missing, lambda *a, **k: None),
        backends.Row("pair_lse", "cpp", 20, lambda: kernel, can_run),
    )
    monkeypatch.setattr(backends, "TABLE", rows)
    backends._candidates.cache_clear()
    yield calls
    monkeypatch.undo()
    backends._candidates.cache_clear()


def test_the_best_that_can_run_is_chosen(fake):
    q = torch.randn(4, 2)
    assert (raw.pair_lse(q, q, 1.0) == 0).all()
    assert fake == ["cpp"]
    expected = raw.pair_lse(q, q[:3], 1.0, backend="reference")
    assert torch.equal(raw.pair_lse(q, q[:3], 1.0), expected)
    assert (raw.pair_lse(q, q, 1.0, backend="reference") != 0).all()
    assert fake == ["cpp"]
    row = available_backends()["pair_lse"]
    assert row["cpp"] == "ok"
    assert row["cuda"] == "libfast.so is not there"
    assert available_backends()["sign_step"]["triton"] == "no kernel in this version"


def test_a_forced_backend_says_why_not(fake):
    q = torch.randn(4, 2)
    for backend, reason in (
        ("cuda", "libfast.so is not there"),
        ("cpp", "cannot do 3 columns"),
    ):
        with pytest.raises(
            RuntimeError, match=f"backend='{backend}' cannot run pair_lse: .*{reason}"
        ):
            raw.pair_lse(q, q[:3], 1.0, backend=backend)
    with pytest.raises(
        RuntimeError, match="'triton' cannot run sign_step: it has no kernel for this"
    ):
        raw.sign_step(q, q, q, 0.1, 0.1, backend="triton")


def test_use_backend_nests_and_comes_back():
    assert backends.requested(None) == "auto"
    with use_backend("reference"):
        assert backends.requested(None) == "reference"
        with use_backend("auto"):
            assert backends.requested(None) == "auto"
            assert backends.requested("cpp") == "cpp"
        assert backends.requested(None) == "reference"
    assert backends.requested(None) == "auto"


def test_use_backend_needs_a_word():
    with pytest.raises(ValueError, match="backend must be 'auto' or one of .*got None"):
        use_backend(None).__enter__()


def test_argument_wins_over_context():
    x = torch.randn(4, 3)
    with use_backend("cuda"):
        with pytest.raises(RuntimeError, match="cannot run contrast"):
            nt_xent_loss(x, x)
        assert nt_xent_loss(x, x, backend="reference").isfinite()
        with pytest.raises(RuntimeError, match="cannot run sign_step"):
            clae_fast.fgsm(lambda v: v.sum(), x, 0.1)


@pytest.mark.parametrize(
    ("value", "expected"),
    [("reference", "fine"), ("cuda", "backend='cuda' cannot run contrast"),
     ("gpu", "CLAE_FAST_BACKEND must be 'auto' or one of"), ("", "double backward")],
)  # fmt: skip
def test_environment(value, expected):
    code = (
        "import torch, clae_fast\n"
        "x = torch.randn(4, 3, requires_grad=True)\n"
        "try:\n"
        "  g, = torch.autograd.grad(clae_fast.nt_xent_loss(x, x), x, create_graph=True)\n"
        "  g.sum().backward(); print('fine')\n"
        "except Exception as error: print(error)\n"
    )
    out = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "CLAE_FAST_BACKEND": value},
        capture_output=True,
        text=True,
        check=True,
    )
    assert expected in out.stdout


# ------------------------------------------------------------- the dispatcher, where it is wanted


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def pairs():
    return torch.randn(4, 8, requires_grad=True), torch.randn(4, 8)


def test_an_operator_nobody_watches_takes_the_short_way(monkeypatch):
    monkeypatch.setattr(ops, "_OPERATORS", {})
    clae_fast.nt_xent_loss(*pairs()).backward()
    clae_fast.uel_loss(*pairs(), reduction="none").sum().backward()


def test_modes_and_profilers_see_the_operators():
    with Seen() as seen:
        clae_fast.nt_xent_loss(*pairs())
    assert "clae_fast::contrast" in seen.names
    with torch.profiler.profile() as profiler:
        clae_fast.nt_xent_loss(*pairs())
    assert "clae_fast::contrast" in {event.name for event in profiler.events()}


def test_meta_and_subclasses_take_the_dispatcher():
    z = torch.randn(4, 8, device="meta")
    assert clae_fast.nt_xent_loss(z, z, reduction="none").shape == (8,)
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(torch.randn(4, 8))
    assert ops.watched(fake)
    assert ops.watched(torch.randn(2), z)
    assert not ops.watched(torch.nn.Parameter(torch.randn(2)), None, "mean", 1.0)


def test_the_attack_runs_whatever_backend_the_losses_are_forced_to():
    """There is no Triton kernel for the update: it is not what a loss's backend is about."""
    x = torch.rand(2, 3, 4, 4)
    with use_backend("triton"):
        x_adv = clae_fast.fgsm(lambda x: x.square().sum(), x, 0.1)
    assert (x_adv - x).abs().max() <= 0.1 + 1e-6
    with use_backend("cuda"), pytest.raises(RuntimeError, match="cannot run sign_step"):
        clae_fast.fgsm(lambda x: x.square().sum(), x, 0.1)


def test_a_wrong_word_in_the_environment_breaks_no_import(tmp_path):
    code = "import clae_fast; print(clae_fast.__version__); clae_fast.NTXentLoss(0.5)"
    ran = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"CLAE_FAST_BACKEND": "Triton"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert ran.stdout.strip() == clae_fast.__version__
    assert "CLAE_FAST_BACKEND must be 'auto' or one of" in ran.stderr


def test_the_interpreter_asked_for_too_late_is_named():
    code = (
        "import clae_fast, triton, os, torch; os.environ['TRITON_INTERPRET'] = '1'; "
        "clae_fast.nt_xent_loss(torch.randn(4, 8), torch.randn(4, 8), backend='triton')"
    )
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    ran = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert "set after triton had been imported, which is too late" in ran.stderr


def test_gpu_kernels_are_chosen_where_they_have_run(monkeypatch):
    """On GPUs of capability 9.0; elsewhere, and pair_sigmoid of Triton, by name alone."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (device.index, 0))
    rows = {(r.op, r.backend): r for r in backends.TABLE}
    backends._capability.cache_clear()
    for generation, chosen in ((8, False), (9, True), (10, False)):
        x = types.SimpleNamespace(device=torch.device("cuda", generation))
        assert rows["contrast", "cuda"].unasked(x) is chosen
        assert rows["sign_step", "cuda"].unasked(x) is chosen
        assert rows["pair_lse", "triton"].unasked(x) is chosen
        assert not rows["pair_sigmoid", "triton"].unasked(x)
    backends._capability.cache_clear()
    assert not rows["pair_lse", "triton"].unasked(torch.empty(4, 8))  # the interpreter's
    assert rows["pair_lse", "cpp"].unasked(torch.empty(4, 8))
