"""The bench: its quick subset runs, its gate finds a wrong gradient, its report inserts tables."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
BENCH = ROOT / "bench"


@pytest.fixture(scope="module")
def bench():
    """The modules of bench/, which import each other by their bare names."""
    sys.path.insert(0, str(BENCH))
    names = ("shapes", "gate", "providers", "timing", "report", "replay")
    yield {name: importlib.import_module(name) for name in names}
    sys.path.remove(str(BENCH))
    for name in names:
        del sys.modules[name]


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "quick.json"
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", BENCH, "--benchmark-only", "--quick", "--results", path],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-2000:]
    return ran.stdout, json.loads(path.read_text())


def test_quick_runs_and_every_gradient_is_right(quick, bench):
    text, result = quick
    shapes = {r["shape"] for r in result["records"]}
    assert shapes == {s.name for s in bench["shapes"].SHAPES if s.quick}
    ours = [r for r in result["records"] if r["provider"] == "clae_fast-cpp"]
    assert {r["mode"] for r in ours} == {"forward", "forward+backward", "value_and_grad"}
    for record in result["records"]:
        assert record["error"] < 2e-5, record
        assert record["seconds"] > 0
    assert result["gemm_gflops"] > 1
    for name in ("torch", "commit", "machine", "threads"):
        assert result["provenance"][name]
    for name, why in result["missing"].items():
        assert f"not measured: {name}: {why}" in text  # one line each


def test_a_wrong_gradient_is_wrong_never_fast(bench):
    gate, shapes, providers = bench["gate"], bench["shapes"], bench["providers"]
    shape = shapes.Shape("small", "nt_xent", 20, 8)
    truth = gate.Truth(shape)
    good = providers.dense(shape)
    assert truth.error(good) < 2e-6
    assert truth.error(lambda a, b: 1.0001 * good(a, b)) > gate.tolerance(torch.float32)
    assert truth.error(lambda a, b: good(a, b.detach())) == float("inf")  # no dk
    assert truth.error(lambda a, b: good(a, b) + 1e-3 * b.sum()) > gate.tolerance(torch.float32)


@pytest.mark.parametrize("loss", ["nt_xent", "info_nce", "clip", "queue"])
@pytest.mark.parametrize("sampled", [False, True])
def test_the_truth_of_the_gate(loss, sampled, bench, monkeypatch):
    """Against autograd of the dense formula in float64, whole and by sampled rows."""
    gate, shapes, providers = bench["gate"], bench["shapes"], bench["providers"]
    if sampled:
        monkeypatch.setattr(gate, "FULL_UP_TO", 10)
        monkeypatch.setattr(gate, "SAMPLE", 7)
    kind = "info_nce" if loss == "queue" else loss
    shape = shapes.Shape("small", kind, 40, 8, queue=30 if loss == "queue" else 0)
    truth = gate.Truth(shape)
    xs = [x.double().requires_grad_() for x in truth.inputs]
    expected = torch.autograd.grad(providers.dense(shape)(*xs), xs[:2])
    for got, grad in zip(truth.gradients, expected, strict=True):
        assert len(got) == (7 if sampled else 40)
        rows = grad[truth.begin : truth.begin + truth.count]
        torch.testing.assert_close(got, rows, rtol=1e-9, atol=1e-12)


def test_interleaving(bench):
    """Every call once a round, in an order that rotates, on what was prepared for the round."""
    seen = []
    calls = {name: (lambda name=name: seen.append(name)) for name in "abc"}
    times = bench["timing"].interleaved(calls, lambda seed: seen.append(seed), rounds=3)
    assert seen[-12:] == [2, "a", "b", "c", 3, "b", "c", "a", 4, "c", "a", "b"]
    assert all(len(t) == 3 and min(t) >= 0 for t in times.values())
    assert bench["timing"].ratio([1.0, 2.0, 1.0], [3.0, 2.0, 3.0]) == 3.0


def test_report(quick, bench, tmp_path):
    _, result = quick
    report = bench["report"]
    text = f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n"
    new = report.insert(text, result)
    assert new.startswith("before\n")
    assert new.endswith("after\n")
    assert "old" not in new
    assert "| cifar-simclr-512 | 512 x 512, 128 |" in new
    assert report.insert(new, result) == new
    with pytest.raises(ValueError, match="expected the lines"):
        report.insert("no markers", result)
    report.plots(result, tmp_path)
    assert (tmp_path / "bench-time.svg").read_text().startswith("<?xml")


def test_the_readme_holds_the_committed_results(bench):
    report = bench["report"]
    readme = (ROOT / "README.md").read_text()
    between = readme.partition(report.BEGIN)[2].partition(report.END)[0]
    results = sorted((BENCH / "results").glob("cpu-*.json"))
    if not between.strip():
        assert not results, "results that the README does not show: run bench/report.py"
        return
    commit = re.search(r"threads, torch \S+, commit (\S+),", between).group(1)
    made = [path for path in results if report.load(path)["provenance"]["commit"] == commit]
    assert made, f"no results of commit {commit}"
    assert report.insert(readme, report.load(made[0])) == readme
