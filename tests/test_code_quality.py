"""Lint, format and types: the same tools and settings for everyone."""

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def run(*command):
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_ruff():
    run(sys.executable, "-m", "ruff", "check", ".")


def test_format():
    run(sys.executable, "-m", "ruff", "format", "--check", ".")


def test_types():
    run(sys.executable, "-m", "mypy")


def test_clang_format():
    tool = shutil.which("clang-format", path=str(Path(sys.executable).parent)) or "clang-format"
    sources = [str(p) for s in ("cpp", "h", "cu", "cuh") for p in (ROOT / "csrc").rglob(f"*.{s}")]
    assert sources
    run(tool, "--dry-run", "--Werror", *sources)


def test_files_stay_short():
    """About 400 lines, one idea each."""
    for folder in ("clae_fast", "csrc", "kernels"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh") and path.is_file():
                assert len(path.read_text().splitlines()) <= 420, path
