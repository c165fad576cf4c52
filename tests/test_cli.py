"""`clae-fast` and `python -m clae_fast`: info, help, wrong commands."""

import os
import subprocess
import sys

import pytest

import clae_fast
from clae_fast import _extension, backends
from clae_fast.__main__ import main


def test_info(capsys):
    """Versions, build facts, and each operator on each backend with "ok" or the reason."""
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    for word in (
        clae_fast.__version__,
        "torch",
        "triton",
        "cuda devices",
        "build: cpp",
        "build: cuda",
    ):
        assert word in out
    lines = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line.strip()}
    for op, row in clae_fast.available_backends().items():
        assert lines[op] == ["ok" if state == "ok" else "-" for state in row.values()]
        for backend, state in row.items():
            assert state == "ok" or f"- {backend}: {state}" in out
    assert lines["operator"] == list(backends.BACKENDS)
    for part, state in _extension.build_facts()["parts"].items():
        assert f"build: {part}" in out
        assert state in out


def test_info_without_a_build(capsys, monkeypatch):
    reason = "not built: no C++ compiler"
    monkeypatch.setattr(_extension, "load", lambda: reason)
    monkeypatch.setattr(_extension, "build_facts", dict)
    backends._candidates.cache_clear()
    try:
        assert main(["info"]) == 0
    finally:
        backends._candidates.cache_clear()
    out = capsys.readouterr().out
    assert f"- cpp: {reason} (contrast, pair_grad, " in out
    assert "pip install -e ." in out


@pytest.mark.parametrize(
    "argv", [[], ["train"], ["info", "--verbose"], ["pretrain", "--epoch", "x"]]
)
def test_wrong_commands(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    assert "usage: clae-fast" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["gpu", "cuda"])
def test_a_wrong_environment(value, capsys, monkeypatch, tmp_path):
    """info still tells what there is; pretrain says it in one line."""
    monkeypatch.setattr(backends, "_active", value)
    assert main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (line,) = [line for line in lines if line.startswith("backend ")]
    assert line.split()[1] == ("wrong:" if value == "gpu" else "cuda")
    assert main(["pretrain", "--epochs", "1", "--output", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert "CLAE_FAST_BACKEND" in err


def test_ctrl_c_is_one_line(capsys, monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr("clae_fast.info.report", interrupted)
    assert main(["info"]) == 130
    assert capsys.readouterr().err == "clae-fast: interrupted\n"


def test_entry_points():
    """The console script and the module, from another folder."""
    script = os.path.join(os.path.dirname(sys.executable), "clae-fast")
    for command in ([sys.executable, "-m", "clae_fast"], [script]):
        out = subprocess.run(
            [*command, "--version"], cwd="/", capture_output=True, text=True, check=True
        )
        assert out.stdout.strip() == f"clae-fast {clae_fast.__version__}"
    text = subprocess.run([script, "--help"], capture_output=True, text=True, check=True).stdout
    assert "pretrain" in text
    assert "info" in text
