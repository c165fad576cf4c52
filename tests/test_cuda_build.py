"""The build of the CUDA kernels, and their machine code."""

import json
import os
import re
import subprocess
import sys

import pytest
from native import ROOT, copy_tree, path_without_nvcc, setup
from nvcc import cuda_root, cuobjdump

from clae_fast._extension import build_facts

needs_nvcc = pytest.mark.skipif(cuda_root() is None, reason="there is no nvcc")
SPILLS = """
__global__ void __launch_bounds__(1024, 2) spills(float* x, int n) {
  float kept[64];
#pragma unroll
  for (int i = 0; i < 64; ++i) kept[i] = x[threadIdx.x + 1024 * i];
  for (int j = 0; j < n; ++j) {
#pragma unroll
    for (int i = 0; i < 64; ++i) kept[i] = kept[i] * kept[(i + 1) % 64] + x[j];
  }
#pragma unroll
  for (int i = 0; i < 64; ++i) x[threadIdx.x + 1024 * i] = kept[i];
}
"""


@needs_nvcc
@pytest.mark.parametrize(
    ("text", "archs", "reason"),
    [
        ("#error broken\n", "9.0", r"failed to build \(csrc/cuda/launch_\w+\.cu: .*broken"),
        (SPILLS, "9.0", r"failed to build \(csrc/cuda/launch_\w+\.cu: .*[Ss]pill"),
        ("", "7.5", r"skipped: nothing in TORCH_CUDA_ARCH_LIST \(7.5\) is 8.0 or more and known"),
        ("", "99.0;7.0", r"skipped: nothing in TORCH_CUDA_ARCH_LIST \(99.0;7.0\) is 8.0 or more"),
        ("", "sm_90", r"skipped: TORCH_CUDA_ARCH_LIST has 'sm_90', expected numbers such as 8.0;9"),
    ],
    ids=["error", "spill", "old", "unknown", "word"],
)
def test_cuda_that_does_not_compile(tree, text, archs, reason):
    """A spill is an error as a wrong word is."""
    for path in (tree / "csrc" / "cuda").glob("*.cu"):
        path.write_text(text)
    built = setup(tree, TORCH_CUDA_ARCH_LIST=archs, CLAE_FAST_BUILD="cuda")
    assert built.returncode != 0
    assert re.search(f"CLAE_FAST_BUILD=cuda: CUDA {reason}", built.stderr)


@needs_nvcc
def test_architectures_as_pytorch_reads_them(tree):
    """Names, features, PTX, older ones beside; kernels of nothing, as only the images count."""
    for path in (tree / "csrc" / "cuda").glob("*.cu"):
        path.write_text("__global__ void nothing() {}\n")
    asked = "7.5 8.6;Hopper,9.0a"
    built = setup(tree, TORCH_CUDA_ARCH_LIST=asked, CLAE_FAST_BUILD="cuda")
    assert "CUDA failed" not in built.stderr  # linking fails: there is no launcher
    library = next((tree / "build").rglob("launch_bf16.o"))
    listed = subprocess.run(
        [cuobjdump(), "-lelf", "-lptx", library], capture_output=True, text=True
    ).stdout
    images = set(re.findall(r"sm_\w+(?=\.cubin|\.ptx)", listed))
    assert images == {"sm_86", "sm_90", "sm_90a"}


@needs_nvcc
@pytest.mark.parametrize("broken", ["not executable", "fails", "wrong home"])
def test_auto_goes_on_without_an_nvcc_that_works(broken, tree, tmp_path):
    """The reason is nvcc's, and the C++ part is there."""
    folder = tmp_path / "toolkit" / "bin"
    folder.mkdir(parents=True)
    (folder / "nvcc").write_text("#!/bin/sh\nexit 1\n")
    (folder / "nvcc").chmod(0o644 if broken == "not executable" else 0o755)
    home = tmp_path / ("nowhere" if broken == "wrong home" else "toolkit")
    (tmp_path / "toolkit" / "lib64").mkdir()
    (tmp_path / "toolkit" / "lib64" / "libcudart_static.a").write_text("")
    built = setup(tree, CUDA_HOME=str(home))
    assert built.returncode == 0, built.stdout + built.stderr
    assert facts(tree)["parts"]["cpp"] == "ok"
    reason = {"not executable": "nvcc does not run", "fails": "does not say which GPUs it knows",
              "wrong home": "has no bin/nvcc"}[broken]  # fmt: skip
    assert reason in facts(tree)["parts"]["cuda"]


@needs_nvcc
def test_auto_goes_on_without_cuda_that_does_not_compile(tree):
    for path in (tree / "csrc" / "cuda").glob("*.cu"):
        path.write_text("#error broken\n")
    built = setup(tree)
    assert built.returncode == 0, built.stdout + built.stderr
    assert facts(tree)["parts"]["cpp"] == "ok"
    assert facts(tree)["parts"]["cuda"].startswith("failed to build (csrc/cuda/launch_")


@needs_nvcc
@pytest.mark.skipif(os.environ.get("CLAE_FAST_BUILD") == "none", reason="CLAE_FAST_BUILD=none")
def test_cuda_is_built_where_there_is_nvcc():
    """Tensor cores in the machine code of this very extension, and no spill."""
    assert build_facts()["parts"]["cuda"] == "ok"
    library = ROOT / "clae_fast" / "_C.abi3.so"
    code, usage = (
        subprocess.run([cuobjdump(), what, library], capture_output=True, text=True).stdout
        for what in ("-sass", "-res-usage")
    )
    kernels = re.findall(r"Function (\w*contrast_kernel\w*):\s+REG:(\d+) STACK:(\d+)", usage)
    assert len(kernels) >= 10
    for _, registers, stack in kernels:
        assert int(registers) <= 255
        assert int(stack) == 0
    for instruction in ("HMMA.16816.F32.BF16", "HMMA.16816.F32 ", "HMMA.1688.F32.TF32", "LDSM"):
        assert instruction in code


@pytest.fixture
def tree(tmp_path):
    return copy_tree(tmp_path / "tree")


def test_the_committed_table_is_of_these_sources():
    """Every target, no spill, no local memory, tensor cores; and room for a batch on each."""
    table = json.loads((ROOT / "bench" / "results" / "cuda-compiled.json").read_text())
    path = [str(ROOT / "bench"), *sys.path]
    code = "import json, cuda_table; print(json.dumps(cuda_table.sources()))"
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path)},
    )  # fmt: skip
    assert table["sources"] == json.loads(ran.stdout), "python bench/cuda_table.py --results ..."
    rows = table["rows"]
    assert {r["target"] for r in rows} == {"sm_80", "sm_90", "sm_100", "sm_120"}
    assert not [r["wrong"] for r in rows if r["wrong"]]
    for r in rows:
        assert r["spills"] == r["stack"] == 0
    most = {}
    for r in rows:
        if r["kernel"] == "contrast":
            key = r["target"], r["dtype"]
            most[key] = max(most.get(key, 0), r["most_rows"])
    assert min(most.values()) >= 1024
    assert most["sm_90", "bfloat16"] == 2048


def facts(tree):
    return json.loads((tree / "clae_fast" / "_build.json").read_text())


def test_cuda_fails_with_the_reason(tree, tmp_path):
    built = setup(tree, CLAE_FAST_BUILD="cuda", path=path_without_nvcc(tmp_path))
    assert built.returncode != 0
    assert "CLAE_FAST_BUILD=cuda: CUDA skipped: no nvcc on PATH, and no CUDA_HOME" in built.stderr
    assert not (tree / "clae_fast" / "_build.json").exists()
