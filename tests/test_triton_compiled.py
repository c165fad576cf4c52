"""The Triton kernels compiled for GPUs that are not here: one configuration each; the committed
table of all is of these very sources."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "bench" / "results" / "triton-compiled.json"
TARGETS = ("sm_80", "sm_90", "sm_100")


def aot(*args):
    return run(ROOT / "bench" / "aot.py", *args)


def run(*args):
    """Python without Triton's interpreter: its exit status and what it prints."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    ran = subprocess.run(
        [sys.executable, *args],
        cwd=ROOT,
        env=env | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    return ran.returncode, ran.stdout + ran.stderr


@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_compiles(target, tmp_path):
    """No spill, shared memory within the device's limit, tensor cores for 16-bit products."""
    path = tmp_path / "table.json"
    code, text = aot("--quick", "--targets", target, "--results", path)
    assert code == 0, text[-3000:]
    rows = json.loads(path.read_text())["rows"]
    assert {row["kernel"] for row in rows} == KERNELS
    for row in rows:
        assert row["spills"] == 0
        assert row["blocks"] >= 1
        if "PRECISION" in row["constants"]:
            assert row["matrix"], row


KERNELS = {
    "rows.pairs", "rows.unit", "rows.turn", "rows.back", "rows.back_negatives", "pair_lse._lse",
    "pair_lse.combine", "two_sided._tiles", "two_sided._add_up", "pair_mean._mean",
    "pair_mean._combine", "pair_grad._grad", "pair_sigmoid._sigmoid", "pair_uel._sums",
    "pair_uel._margins", "pair_uel._losses", "pair_uel._close", "pair_uel._gradient",
    "wide._weights",
}  # fmt: skip


def test_the_names_are_all_there_are():
    """What the host code launches is what was compiled."""
    launched = set()
    for path in (ROOT / "clae_fast" / "kernels").glob("*.py"):
        calls = r"(?:\blaunch|self\._rows)\(\s*(rows\.)?(\w+),"
        for of_rows, name in re.findall(calls, path.read_text()):
            if name != "kernel":
                launched.add(f"rows.{name}" if of_rows else f"{path.stem}.{name}")
    assert launched == KERNELS


def test_a_spill_is_an_error():
    """A tile that cannot fit its threads: the table says so, and the exit status."""
    spoil = """
import sys
sys.path.insert(0, "bench")
import aot
from clae_fast.kernels import _launch
_launch.config = lambda kind, *a: _launch.Config(128, 128, 128, 4, 2)
all_of = aot.launches
aot.launches = lambda *a: [x for x in all_of(*a) if "grad" in x.name][:1]
sys.exit(aot.main(["--quick", "--targets", "sm_90"]))
"""
    code, text = run("-c", spoil)
    assert code == 1, text
    assert re.search(r"WRONG: \d+ spills", text), text


def test_the_committed_table_is_of_these_sources():
    found = json.loads(TABLE.read_text())
    code, text = aot("--sources")
    assert code == 0, text
    assert found["sources"] == json.loads(text), "run bench/aot.py --results"
    assert {row["target"] for row in found["rows"]} == set(TARGETS)
    ours = [row for row in found["rows"] if row["who"] == "clae_fast"]
    assert {row["kernel"] for row in ours} == KERNELS
    assert not [row for row in ours if row["wrong"]]
    assert {row["who"] for row in found["rows"]} == {"clae_fast", "memeff"}
