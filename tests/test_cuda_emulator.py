"""The host emulator of CUDA kernels: right kernels under it, and bugs that it must see."""

import os
import shutil
import subprocess

import pytest
from native import ROOT, SANITIZE, compile_program
from nvcc import compile_cubin, cuobjdump

RIGHT = [
    *("numbers", "gemm-bf16", "gemm-bf16-trans", "gemm-f16", "gemm-f16-trans", "gemm-tf32"),
    *("twice-bf16", "twice-f16", "swap", "normalise", "total", "gemm-truncating"),
]
SCHEDULES = ["ascending", "descending", "random-1", "random-2", "random-3", "round-robin"]
RACES = [
    *("missing-sync_block", "missing-sync_block-after", "missing-sync_block-in-sum"),
    *("missing-grid-barrier", "missing-sync_warp"),
]
# Seen by every schedule, or where two warps or blocks must meet at the wrong time, by some.
ANY = {
    *(*RACES[2:], "missing-copy-wait", "missing-last-wait", "wrong-fragment", "half-warp"),
    *("two-collectives", "early-exit", "one-past", "read-past", "misaligned", "skipped-barrier"),
    *("dirty-workspace", "not-shared", "large-array", "too-little-shared"),
}
SOME = {*RACES[:2], "wrong-ticket-count"}


def run(binary, *words, expect=0):
    command = [binary, *words]
    env = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "halt_on_error=1"}
    ran = subprocess.run(command, env=env, capture_output=True, text=True)
    if "unexpected memory mapping" in ran.stderr and shutil.which("setarch"):
        # An older ThreadSanitizer, and more random addresses than it knows.
        command = ["setarch", "-R", *command]
        ran = subprocess.run(command, env=env, capture_output=True, text=True)
    if expect is not None:
        assert ran.returncode == expect, ran.stdout + ran.stderr
    return ran.stdout + ran.stderr


def lines_of(output, first):
    return [line.split(None, 1)[1] for line in output.splitlines() if line.startswith(first + " ")]


@pytest.fixture(scope="module")
def asan(tmp_path_factory):
    return compile_program(tmp_path_factory.mktemp("asan"), "emulator", *SANITIZE)


@pytest.fixture(scope="module")
def tsan(tmp_path_factory):
    # Builtins would move memory without telling.
    flags = ("-O1", "-g", "-fsanitize=thread", "-fno-builtin")
    return compile_program(tmp_path_factory.mktemp("tsan"), "emulator", *flags)


@pytest.mark.parametrize("flag", ["-DCLAE_EMULATED_FAST", "-DCLAE_EMULATED_UCONTEXT"])
def test_right_kernels_and_planted_bugs(tmp_path, flag):
    output = run(compile_program(tmp_path, "emulator", "-O2", flag))
    assert lines_of(output, "right") == RIGHT
    caught = {line.split()[0]: line.split()[2].split(",") for line in lines_of(output, "caught")}
    assert set(caught) == {*ANY, *SOME}
    for bug in ANY:
        assert caught[bug] == SCHEDULES, bug
    for bug in SOME:
        assert "ascending" in caught[bug] or "descending" in caught[bug], bug
    print(output)


def test_right_kernels_under_address_sanitizer(asan):
    assert lines_of(run(asan), "right") == RIGHT


def test_address_sanitizer_sees_one_past_a_shared_array(asan):
    for bug in ("one-past", "read-past"):
        assert "use-after-poison" in run(asan, bug, expect=None), bug


def test_right_kernels_under_thread_sanitizer(tsan):
    assert lines_of(run(tsan), "right") == RIGHT


@pytest.mark.parametrize("bug", RACES)
def test_thread_sanitizer_sees(tsan, bug):
    assert "data race" in run(tsan, bug, expect=66)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_the_same_kernels_compile_for(tmp_path, arch):
    cubin = tmp_path / "toy.cubin"
    compile_cubin(ROOT / "csrc" / "tests" / "toy_kernels.cu", cubin, arch)
    sass = subprocess.run(
        [cuobjdump(), "-sass", cubin], capture_output=True, text=True, check=True
    ).stdout
    kernels = dict(part.split("\n", 1) for part in sass.split("Function : ")[1:])
    for format, instruction in {
        "Bf16": "HMMA.16816.F32.BF16",
        "F16": "HMMA.16816.F32 ",
        "Tf32": "HMMA.1688.F32.TF32",
    }.items():
        code = next(code for name, code in kernels.items() if "gemm" in name and format in name)
        assert code.count(instruction) >= 4
        assert "LDGSTS.E.BYPASS.128" in code
        assert "LDSM.16.M88.4" in code
    trans = next(code for name, code in kernels.items() if "Lb1" in name)
    assert "LDSM.16.MT88.4" in trans
