"""The build, the extension it makes, and the C++ sign_step by itself."""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import tarfile

import pytest
import torch
from native import SANITIZE, compile_and_run, copy_tree, path_without_nvcc, setup

from clae_fast import _extension

REASON = _extension.load()
NOT_BUILT = os.environ.get("CLAE_FAST_BUILD") == "none"
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
BITS = {torch.float32: torch.int32, torch.float64: torch.int64, torch.bfloat16: torch.int16}
INF, NAN = math.inf, math.nan

needs_extension = pytest.mark.skipif(NOT_BUILT, reason="CLAE_FAST_BUILD=none")


@needs_extension
def test_the_installed_extension_loads():
    assert REASON is None
    assert _extension.build_facts()["parts"]["cpp"] == "ok"
    assert torch.ops.clae_fast_C.isa() in ("baseline", "avx2", "avx512")


# ---------------------------------------------------------------------------------- sign_step


def compute_dtype(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def oracle(x, grad, x0, step, eps, low, high):
    """The specification in PyTorch; the numbers are tensors that broadcast to x."""
    compute = compute_dtype(x.dtype)
    dtype, (x, grad, x0) = x.dtype, (t.to(compute) for t in (x, grad, x0))
    v = x + step * torch.where(grad.isnan(), grad, grad.sign())
    v = torch.minimum(torch.maximum(v, x0 - eps), x0 + eps)
    return torch.minimum(torch.maximum(v, low), high).to(dtype)


def run(x, grad, x0, numbers, channels=None, channels_last=False):
    out = torch.empty_like(x).fill_(NAN)
    torch.ops.clae_fast_C.sign_step(x, grad, x0, out, *numbers, channels, channels_last)
    return out


def assert_same(actual, expected):
    """The same bits; of a NaN only that it is one."""
    assert torch.equal(actual.isnan(), expected.isnan())
    bits = BITS[actual.dtype]
    actual, expected = (t.nan_to_num(7.0).contiguous().view(bits) for t in (actual, expected))
    assert torch.equal(actual, expected)


def inputs(shape, dtype, seed=0, memory_format=torch.contiguous_format):
    generator = torch.Generator().manual_seed(seed)
    x, grad, x0 = torch.randn(3, *shape, generator=generator, dtype=torch.float64)
    x0 = x + 0.05 * x0
    grad[torch.rand(shape, generator=generator) < 0.2] = 0.0
    grad[torch.rand(shape, generator=generator) < 0.2] = -0.0
    return [t.to(dtype).contiguous(memory_format=memory_format) for t in (x, grad, x0)]


def numbers_like(x, values):
    return [torch.tensor(v, dtype=compute_dtype(x.dtype)) for v in values]


def per_channel(x):
    """(4, C), and the same as tensors that broadcast to x."""
    c = x.shape[1]
    generator = torch.Generator().manual_seed(c)
    table = torch.rand(4, c, generator=generator, dtype=torch.float64).to(compute_dtype(x.dtype))
    table[2] -= 1.0
    if c > 2:
        table[2, 1], table[3, 2] = -INF, INF
    return table, [row.view(1, c, *[1] * (x.dim() - 2)) for row in table]


SHAPES = [(), (0,), (1,), (2,), (127,), (100_003,), (3, 0, 5), (252, 127), (2, 3, 5), (1, 1, 1, 1)]
SHAPES += [(5, 3, 7, 9), (3, 5, 33, 31), (2, 3, 4, 5, 7)]


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_numbers(shape, dtype):
    ties = (2.0**-8, INF, -INF, INF)  # x + step lies half way between two bfloat16 of [1, 2)
    for values in [(0.03, 0.04, -0.5, 0.5), (0.1, INF, -INF, INF), (-0.2, 0.1, 0.0, 1.0), ties]:
        x, grad, x0 = inputs(shape, dtype)
        expected = oracle(x, grad, x0, *numbers_like(x, values))
        assert_same(run(x, grad, x0, values), expected)
        assert_same(run(x, grad, x, values), oracle(x, grad, x, *numbers_like(x, values)))


# The table is repeated, read as it is (more than 512 channels), or read once per run of a channel.
CHANNEL_SHAPES = [(0, 3), (4, 0), (1, 1), (9, 3), (3, 700), (40_000, 2), (2, 5, 3), (4, 64, 3, 3)]
CHANNEL_SHAPES += [(2, 600, 2, 1), (7, 3, 33, 31), (3, 17, 11, 1), (5, 1, 9, 9), (2, 3, 4, 5, 7)]


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", CHANNEL_SHAPES)
def test_per_channel(shape, dtype):
    x, grad, x0 = inputs(shape, dtype)
    table, rows = per_channel(x)
    assert_same(run(x, grad, x0, [NAN] * 4, table), oracle(x, grad, x0, *rows))


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [s for s in SHAPES + CHANNEL_SHAPES if len(s) in (4, 5)])
def test_channels_last(shape, dtype):
    memory_format = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    x, grad, x0 = inputs(shape, dtype, memory_format=memory_format)
    table, rows = per_channel(x)
    out = run(x, grad, x0, [NAN] * 4, table, True)
    assert out.is_contiguous(memory_format=memory_format)
    assert_same(out, oracle(x, grad, x0, *rows))
    values = (0.03, 0.04, -0.5, 0.5)
    expected = oracle(x, grad, x0, *numbers_like(x, values))
    assert_same(run(x, grad, x0, values, None, True), expected)


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 67])
def test_special_values(n, dtype):
    """Every mix of NaN, infinities and ordinary values, in a vector and in its tail."""
    values = [0.25, -1.5, INF, -INF, NAN]
    for x, grad, x0 in itertools.product(values, values, values):
        tensors = [torch.full((n,), v, dtype=dtype) for v in (x, grad, x0)]
        for numbers in [(0.1, 0.2, -1.0, 1.0), (INF, INF, -INF, INF), (0.1, INF, -INF, 0.5)]:
            expected = oracle(*tensors, *numbers_like(tensors[0], numbers))
            assert_same(run(*tensors, numbers), expected)


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("place", range(7))
def test_nan_stays_where_it_is(place, dtype):
    tensors = inputs((6, 3, 11, 7), dtype)
    table, _ = per_channel(tensors[0])
    if place < 3:
        tensors[place].view(-1)[::5] = NAN
        expected = tensors[place].isnan()
    else:
        table[place - 3, 1] = NAN
        expected = torch.zeros(6, 3, 11, 7, dtype=torch.bool)
        expected[:, 1] = True
        numbers = [0.1, 0.2, -1.0, 1.0]
        numbers[place - 3] = NAN
        assert run(*tensors, numbers).isnan().all()
    assert torch.equal(run(*tensors, [NAN] * 4, table).isnan(), expected)
    if place < 3:
        assert torch.equal(run(*tensors, (0.1, 0.2, -1.0, 1.0)).isnan(), expected)


@needs_extension
@pytest.mark.parametrize("n", [1, 67])
def test_a_bound_of_zero_wins_over_minus_zero(n):
    x, grad = torch.full((n,), -0.0), torch.full((n,), -1.0)
    out = run(x, grad, x, (0.0, INF, 0.0, INF))
    assert_same(out, torch.zeros(n))


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_for_any_number_of_threads(dtype):
    x, grad, x0 = inputs((11, 3, 101, 103), dtype, memory_format=torch.channels_last)
    table, _ = per_channel(x)
    threads = torch.get_num_threads()
    outputs = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            outputs.append(run(x, grad, x0, [NAN] * 4, table, True))
            outputs.append(run(x, grad, x0, [NAN] * 4, table, True))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(out, outputs[0]) for out in outputs)


@needs_extension
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grad": torch.zeros(2, 3, 4, 5, dtype=torch.float64)}, "grad must have the dtype of x"),
        ({"x0": torch.zeros(2, 3, 5, 4)}, "x0 must have the sizes of x"),
        ({"grad": torch.zeros(2, 3, 4)}, "grad must have the sizes of x"),
        ({"out": torch.zeros(2, 3, 4, 10)[..., ::2]}, "out must be dense in contiguous order"),
        ({"grad": torch.zeros(1, 3, 4, 5).expand(2, 3, 4, 5)}, "grad must be dense"),
        ({"x0": torch.zeros(2, 4, 5, 3).permute(0, 3, 1, 2)}, "x0 must be dense in contiguous"),
        ({"channels_last": True}, "x must be dense in channels_last order"),
        ({"channels": torch.zeros(4, 5)}, r"channels must be contiguous, \(4, 3\)"),
        ({"channels": torch.zeros(3, 3)}, r"channels must be contiguous, \(4, 3\)"),
        ({"channels": torch.zeros(3, 4).t()}, r"channels must be contiguous, \(4, 3\)"),
        ({"channels": torch.zeros(4, 3).double()}, "channels must have the dtype of the arith"),
    ],
)
def test_refusals(change, message):
    names = ("x", "grad", "x0", "out")
    arguments = {name: torch.zeros(2, 3, 4, 5) for name in names}
    arguments |= {"step": 0.1, "eps": 0.1, "low": -INF, "high": INF}
    arguments |= {"channels": None, "channels_last": False} | change
    with pytest.raises(RuntimeError, match=message):
        torch.ops.clae_fast_C.sign_step(**arguments)


@needs_extension
def test_more_refusals():
    op, numbers = torch.ops.clae_fast_C.sign_step, (0.1, 0.1, -INF, INF)
    x = torch.zeros(6)
    with pytest.raises(RuntimeError, match="out must not overlap"):
        op(x, x, x, x, *numbers, None, False)
    with pytest.raises(RuntimeError, match="two dimensions or more"):
        op(x, x, x, x.clone(), *numbers, torch.zeros(4, 1), False)
    with pytest.raises(RuntimeError, match="four or five dimensions"):
        op(x, x, x, x.clone(), *numbers, None, True)
    half = x.half()
    with pytest.raises(RuntimeError, match="float32, float64 or bfloat16"):
        op(half, half, half, half.clone(), *numbers, None, False)
    with pytest.raises(NotImplementedError):
        op(x, x, x, x.to("meta"), *numbers, None, False)


# ------------------------------------------------------------- the header, without torch


@needs_extension
def test_same_bits_on_every_instruction_set(tmp_path):
    isa, bits = compile_and_run(tmp_path, "sign_step", "-O3")
    assert isa == torch.ops.clae_fast_C.isa()
    assert compile_and_run(tmp_path, "sign_step", "-O3", "-DCLAE_FAST_NO_SIMD") == [
        "baseline",
        bits,
    ]
    assert compile_and_run(tmp_path, "sign_step", "-O1", "-ffp-contract=off") == [isa, bits]


@needs_extension
def test_sanitizers_find_nothing(tmp_path):
    compile_and_run(tmp_path, "sign_step", *SANITIZE)


# ---------------------------------------------------------------------------------- the build


@pytest.fixture
def tree(tmp_path):
    return copy_tree(tmp_path / "tree")


def facts(tree):
    return json.loads((tree / "clae_fast" / "_build.json").read_text())


def fresh_extension(tree):
    """The tree's own _extension.py, apart from the installed package."""
    spec = importlib.util.spec_from_file_location("tree", tree / "clae_fast" / "_extension.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_none_builds_nothing_and_removes_a_stale_extension(tree):
    (tree / "clae_fast" / "_C.abi3.so").write_text("stale")
    assert setup(tree, CLAE_FAST_BUILD="none").returncode == 0
    assert not list(tree.rglob("*.so"))
    reason = "skipped: CLAE_FAST_BUILD=none"
    assert facts(tree)["requested"] == "none"
    assert facts(tree)["parts"]["cpp"] == reason
    assert fresh_extension(tree).load() == f"not built: {reason}"


def test_an_unknown_word_is_named(tree):
    built = setup(tree, CLAE_FAST_BUILD="bogus")
    assert built.returncode != 0
    assert built.stderr == "CLAE_FAST_BUILD='bogus': expected one of auto, cpu, cuda, none\n"


def path_with_nvcc(folder):
    """Where nvcc is a wrapper script, PyTorch takes its folder for a toolkit."""
    folder.mkdir()
    (folder / "nvcc").write_text("#!/bin/sh\nexit 1\n")
    (folder / "nvcc").chmod(0o755)
    return os.pathsep.join([str(folder), os.environ["PATH"]])


def test_auto_goes_on_without_a_compiler(tree, tmp_path):
    (tree / "clae_fast" / "_C.abi3.so").write_text("stale")
    built = setup(tree, CXX="/nonexistent", path=path_with_nvcc(tmp_path / "bin"))
    assert built.returncode == 0, built.stderr
    assert "CUDA_HOME" not in built.stdout + built.stderr
    reason = facts(tree)["parts"]["cpp"]
    assert reason.startswith("skipped: no C++ compiler (")
    assert "/nonexistent" in reason
    assert f"clae_fast: C++ {reason}\n" in built.stdout
    assert not list(tree.rglob("*.so"))
    assert fresh_extension(tree).load() == f"not built: {reason}"


def test_cpu_fails_without_a_compiler(tree):
    built = setup(tree, CXX="/nonexistent", CLAE_FAST_BUILD="cpu")
    assert built.returncode != 0
    assert "CLAE_FAST_BUILD=cpu: C++ skipped: no C++ compiler" in built.stderr


def test_auto_goes_on_and_cpu_fails_when_compiling_fails(tree, tmp_path):
    (tree / "csrc" / "clae_fast.cpp").write_text("#error broken\n")
    assert setup(tree, path=path_without_nvcc(tmp_path)).returncode == 0
    assert facts(tree)["parts"]["cpp"].startswith("failed to build (")
    assert setup(tree, CLAE_FAST_BUILD="cpu").returncode != 0


def test_auto_goes_on_without_torch(tree):
    (tree / "torch.py").write_text("raise ImportError('none here')\n")
    assert setup(tree, PYTHONPATH=str(tree)).returncode == 0
    assert facts(tree)["parts"]["cpp"] == "skipped: torch cannot be imported (none here)"


@needs_extension
def test_it_builds_without_nvcc(tree, tmp_path):
    path = path_without_nvcc(tmp_path)
    assert shutil.which("nvcc", path=path) is None
    built = setup(tree, path=path, CLAE_FAST_BUILD="cpu")
    assert built.returncode == 0, built.stdout + built.stderr
    assert facts(tree)["parts"]["cpp"] == "ok"
    assert facts(tree)["parts"]["cuda"] == "skipped: CLAE_FAST_BUILD=cpu"
    assert facts(tree)["torch"] == str(torch.__version__)
    assert (tree / "clae_fast" / "_C.abi3.so").exists()
    code = "import _extension, torch; print(_extension.load(), torch.ops.clae_fast_C.isa())"
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=tree / "clae_fast", capture_output=True, text=True
    )
    assert ran.stdout.split() == ["None", torch.ops.clae_fast_C.isa()], ran.stderr


def test_the_reasons_of_load(tree):
    package = tree / "clae_fast"
    assert fresh_extension(tree).load() == "not built: install with `pip install -e .`"
    (package / "_build.json").write_text("{")
    assert fresh_extension(tree).load() == "not built: install with `pip install -e .`"
    (package / "_build.json").write_text('{"parts": {"cpp": "ok"}}')
    assert "_C.abi3.so is missing" in fresh_extension(tree).load()
    (package / "_C.abi3.so").write_text("no library")
    assert fresh_extension(tree).load().startswith("cannot be loaded: ")


def test_importing_the_loader_loads_nothing(tree):
    code = "import sys, _extension; print('torch' in sys.modules)"
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=tree / "clae_fast", capture_output=True, text=True
    )
    assert ran.stdout == "False\n", ran.stderr


def test_an_sdist_holds_what_a_build_needs(tree):
    (tree / "clae_fast" / "_C.abi3.so").write_text("stale")
    (tree / "clae_fast" / "_build.json").write_text("{}")
    built = setup(tree, "sdist", CLAE_FAST_BUILD="cpu")
    assert built.returncode == 0, built.stdout + built.stderr
    with tarfile.open(next((tree / "dist").glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {p.relative_to(tree).as_posix() for p in (tree / "csrc").rglob("*") if p.is_file()}
    assert sources | {"setup.py", "kernels/README.md", "clae_fast/kernels/README.md"} <= names
    assert not {name for name in names if name.endswith((".so", "_build.json"))}
