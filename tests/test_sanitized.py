"""The extension built with AddressSanitizer and UBSan, under the tests of the operators."""

import os
import shlex
import subprocess
import sys

import pytest
from native import CXX, ROOT, SANITIZE, copy_tree, setup

FILES = ("test_operators.py", "test_cpp_pairs.py", "test_build.py")
# What builds or times anew, starts processes of its own, or compiles.
LEFT_OUT = (
    "memory_grows or ctrl_c or workers_of or instruction_set or sanitizers or opcheck or builds or "
    "tree or auto_ or cpu_fails or none_ or unknown_word or cuda_ or reasons_of or importing or "
    "sdist or derivatives or two_python_threads or never_far"
)


def runtime(name):
    found = subprocess.run(
        [*shlex.split(CXX), f"-print-file-name={name}"], capture_output=True, text=True
    ).stdout.strip()
    return found if os.path.isabs(found) else None


@pytest.mark.skipif(os.environ.get("CLAE_FAST_BUILD") == "none", reason="CLAE_FAST_BUILD=none")
def test_the_operators_under_sanitizers(tmp_path):
    # The C++ runtime comes with it: it must be there before the sanitizer looks for its throw.
    libraries = [runtime("libasan.so"), runtime("libstdc++.so")]
    if None in libraries:
        pytest.skip("the sanitizer's library is not installed")
    tree = copy_tree(tmp_path / "tree")
    flags = " ".join(SANITIZE)
    built = setup(tree, CLAE_FAST_BUILD="cpu", CFLAGS=flags, CXXFLAGS=flags, LDFLAGS=flags)
    assert built.returncode == 0, built.stdout[-2000:] + built.stderr[-2000:]
    ran = subprocess.run(
        [
            sys.executable, "-m", "pytest", "-q", "-x", "-s", "-p", "no:cacheprovider",
            "-c", os.devnull, "--rootdir", ROOT / "tests", "-k", f"not ({LEFT_OUT})",
            *(ROOT / "tests" / name for name in FILES),
        ],
        cwd=tree,
        # Python's own memory is not ours to judge; leaks at exit are PyTorch's.
        env=os.environ
        | {
            "PYTHONPATH": str(tree),
            "PYTHONMALLOC": "malloc",
            "LD_PRELOAD": " ".join(libraries),
            "ASAN_OPTIONS": "detect_leaks=0:verify_asan_link_order=0",
            "OMP_NUM_THREADS": "2",
        },
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    passed = int(ran.stdout.split(" passed")[0].split()[-1])
    assert passed > 600, ran.stdout[-500:]
    print(f"{passed} tests passed under AddressSanitizer and UBSan")
