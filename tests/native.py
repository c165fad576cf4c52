"""Native builds: programs of csrc/tests, compiled without torch, and copies of the whole tree."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CXX = os.environ.get("CXX", "c++")
SETTINGS = ("CLAE_FAST_BUILD", "CUDA_HOME", "CUDA_PATH", "PYTHONPATH", "TORCH_CUDA_ARCH_LIST")
SANITIZE = ("-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


def compile_program(folder, name, *flags, sources=()):
    """csrc/tests/<name>.cpp as a program; `sources` of csrc are linked to it."""
    binary = folder / "main"
    files = [ROOT / "csrc" / "tests" / f"{name}.cpp", *(ROOT / "csrc" / s for s in sources)]
    command = [*shlex.split(CXX), "-std=c++17", "-Wall", "-Wextra", "-Werror", *flags]
    built = subprocess.run([*command, *files, "-o", binary], capture_output=True, text=True)
    if built.returncode and "sanitize" in " ".join(flags) and "cannot find" in built.stderr:
        pytest.skip("the sanitizer's library is not installed")
    assert built.returncode == 0, built.stderr
    return binary


def compile_and_run(folder, name, *flags, sources=()):
    """The words that the program prints."""
    binary = compile_program(folder, name, *flags, sources=sources)
    ran = subprocess.run(
        [binary], env={"ASAN_OPTIONS": "detect_leaks=0"}, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout.split()


def copy_tree(copy):
    """A copy of what a build reads."""
    copy.mkdir()
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, copy)
    ignore = shutil.ignore_patterns("*.so", "_build.json*", "__pycache__")
    for name in ("csrc", "kernels", "clae_fast"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignore)
    return copy


def path_without_nvcc(folder):
    """PATH, where each folder that holds nvcc is replaced by links to all else in it."""
    folders = []
    for number, entry in enumerate(os.environ["PATH"].split(os.pathsep)):
        if not os.path.exists(os.path.join(entry, "nvcc")):
            folders.append(entry)
            continue
        links = folder / str(number)
        links.mkdir()
        for tool in Path(entry).iterdir():
            if tool.name != "nvcc":
                (links / tool.name).symlink_to(tool)
        folders.append(str(links))
    return os.pathsep.join(folders)


def setup(tree, *command, path=None, **env):
    """`setup.py build_ext --inplace`, or another command, in the tree."""
    kept = {k: v for k, v in os.environ.items() if k not in SETTINGS}
    path = path or os.environ["PATH"]
    kept["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), path])
    return subprocess.run(
        [sys.executable, "setup.py", *(command or ("build_ext", "--inplace"))],
        cwd=tree,
        env=kept | env,
        capture_output=True,
        text=True,
    )
