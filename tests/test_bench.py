"""The bench: its quick subset runs, its gate finds a wrong gradient, its report inserts tables."""

import importlib
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import clae_fast

ROOT = Path(__file__).resolve().parent.parent
BENCH = ROOT / "bench"


@pytest.fixture(scope="module")
def bench():
    """The modules of bench/, which import each other by their bare names."""
    sys.path.insert(0, str(BENCH))
    names = (
        "shapes", "written_out", "own", "gate", "providers", "timing", "replay", "goals",
        "results_file", "plots", "report",
    )  # fmt: skip
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
    losses = [r for r in result["records"] if r["kind"] == "loss"]
    shapes = bench["shapes"].SHAPES
    assert {r["shape"] for r in losses} == {s.name for s in shapes if s.quick}
    assert {s.loss for s in shapes} == {s.loss for s in shapes if s.quick}
    functions = {name.removesuffix("_loss") for name in clae_fast.__all__ if name.endswith("_loss")}
    assert {s.loss for s in shapes} == functions
    steps = [(r["dtype"], r["layout"]) for r in result["records"] if r["kind"] == "sign_step"]
    assert tuple(steps) == bench["shapes"].SIGN_STEPS
    ours = [r for r in losses if r["provider"] == "clae_fast-cpp"]
    assert {r["mode"] for r in ours} == {"forward", "forward+backward", "value_and_grad"}
    for record in losses:
        assert "wrong" not in record, record
        assert record["loss_error"] < 2e-6
        assert record["dtype"] == "float32"
        assert (record["gradient_error"] is None) is (record["mode"] == "forward")
        assert record["seconds"] > 0
        assert record["gemm_gflops"] > 1
    assert result["quick"]
    assert "Mean" not in text  # times of --quick say nothing
    for name in ("torch", "commit", "machine", "threads"):
        assert result["provenance"][name]
    for name, why in result["missing"].items():
        assert f"not measured: {name}: {why}" in text  # one line each


def test_a_package_is_there_or_named(bench, tmp_path, monkeypatch):
    providers = bench["providers"]
    assert providers.module("json") is json
    (tmp_path / "broken_peer.py").write_text("raise OSError('no driver')")
    monkeypatch.syspath_prepend(tmp_path)
    for name, why in (("broken_peer", "OSError: no driver"), ("nowhere", "No module named")):
        with pytest.raises(providers.NotHere, match=why):
            providers.module(name)


def test_what_is_called_compiled_was_compiled(bench):
    """PyTorch compiles a function 8 times at most: every shape begins anew, and past the limit it
    is an error."""
    code = """
import sys
sys.path.insert(0, "bench")
import conftest, torch
given = {"--device": "cpu", "--seconds": 5.0}
config = type("Config", (), {"getoption": lambda self, name: given.get(name)})
conftest.pytest_configure(config())
from torch._dynamo.utils import counters
import providers, gate, shapes
for rows in range(4, 24):
    shape = shapes.Shape("small", "nt_xent", rows, 8)
    if sys.argv[1] == "anew":
        torch.compiler.reset()
    torch._dynamo.config.recompile_limit = 3
    gate.gradients(providers.available(shape, "cpu")["compiled"], gate.inputs(shape))
"""
    assert "torch.compiler.reset()" in (BENCH / "bench_losses.py").read_text()
    for how, fails in (("anew", False), ("on", True)):
        ran = subprocess.run(
            [sys.executable, "-c", code, how], cwd=ROOT, capture_output=True, text=True
        )
        assert ("recompile_limit" in ran.stderr and ran.returncode != 0) is fails, ran.stderr


def kinds(bench):
    """A small shape of each function that is measured."""
    small = {}
    for shape in bench["shapes"].SHAPES:
        small[shape.kind] = shape._replace(
            name=f"small {shape.kind}", pairs=20, width=8, temperature=max(shape.temperature, 0.1),
            noise=1.0, queue=min(shape.queue, 30), extra=min(shape.extra, 25),
            classes=min(shape.classes, 10), dtype=torch.float32,
        )  # fmt: skip
    return small


KINDS = (
    "nt_xent", "nt_xent, ids", "info_nce", "info_nce, queue", "info_nce, extra negatives", "uel",
    "clip", "siglip", "sup_con", "dcl", "dcl, weighted", "hard_negative",
)  # fmt: skip


def test_the_kinds(bench):
    """Each is measured, in the truth of the gate by one way, and has a table of the report."""
    assert kinds(bench).keys() == set(KINDS)
    fused = bench["shapes"].FUSED_KINDS
    assert set(KINDS) >= set(fused) >= set(bench["gate"].BY_SWEEPS)
    for kind, shape in kinds(bench).items():
        assert (bench["own"].operator(shape) in ("contrast", "pair_uel")) is (kind in fused)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_wrong(kind, bench):
    gate, shape = bench["gate"], kinds(bench)[kind]
    truth, good = gate.Truth(shape), bench["providers"].dense(shape)

    def verdict(loss):
        return truth.of(*gate.gradients(loss, truth.inputs, shape.learned)).wrong(shape)

    assert verdict(good) is None
    for i in range(shape.learned):
        assert "gradient error" in verdict(
            lambda *xs, i=i: good(*xs) + 1e-4 * (xs[i] - xs[i].detach()).sum()
        )
        assert (
            "gradient error inf"
            in verdict(  # no gradient of that one at all
                lambda *xs, i=i: good(*xs[:i], xs[i].detach(), *xs[i + 1 :])
            )
        )
    assert "loss error" in verdict(lambda *xs: good(*xs) + 1e-4 * float(truth.loss + 5))
    assert "loss error nan" in verdict(lambda *xs: good(*xs) * torch.nan)
    assert "loss error" in truth.of_loss(good(*truth.inputs) + 1e-4 * float(truth.loss + 5)).wrong(
        shape
    )


@pytest.mark.parametrize("kind", KINDS)
def test_all_who_have_a_loss_mean_the_same(kind, bench):
    """Those that are installed, in float64 against the truth: no scale or mean is another."""
    gate, shape = bench["gate"], kinds(bench)[kind]
    truth = gate.Truth(shape)
    found = bench["providers"].available(shape, "cpu")
    assert {"clae_fast-cpp", "clae_fast-reference", "eager", "compiled"} <= found.keys()
    for name, loss in found.items():
        if name == "compiled":
            continue
        xs = [x.double() for x in truth.inputs]
        errors = truth.of(*gate.gradients(loss, xs, shape.learned))
        assert errors.loss < 1e-6, name  # some say 0.1 in float32
        assert errors.gradient < 1e-5, name


PEERS = {  # who has what, but for those that need a GPU
    "lightly": {"nt_xent", "dcl", "dcl, weighted"},
    "pytorch-metric-learning": {"nt_xent", "sup_con"},
    "info-nce-pytorch": {"info_nce", "info_nce, queue"},
    "infonce": {"nt_xent"},
    "open_clip": {"clip", "siglip"},
    "sentence-transformers": {"info_nce", "info_nce, extra negatives"},
    "linear_cross_entropy": {"info_nce", "info_nce, extra negatives"},
}


def test_who_is_measured(bench):
    """Of those that are installed here."""
    providers, small = bench["providers"], kinds(bench)
    for provider in providers.PROVIDERS:
        if provider.name not in PEERS:
            continue
        try:
            losses = {kind: provider.make(shape, "cpu") for kind, shape in small.items()}
        except providers.NotHere:
            continue
        assert {kind for kind, loss in losses.items() if loss is not None} == PEERS[provider.name]


def test_a_gpu_kernel_of_someone_else_gets_what_it_asks_for(bench):
    """siglip-kernel's function by its definition: the logarithm of the scale, rows of length 1."""
    shape = kinds(bench)["siglip"]
    truth = bench["gate"].Truth(shape)

    class Module:
        @staticmethod
        def fused_siglip_loss(x, y, log_scale, bias):
            s = log_scale.exp() * x @ y.T + bias
            return -torch.nn.functional.logsigmoid((2 * torch.eye(len(x)) - 1) * s).sum() / len(x)

    loss = bench["providers"]._siglip_kernel(Module, shape, "cpu")
    assert truth.of(*bench["gate"].gradients(loss, truth.inputs)).wrong(shape) is None
    assert bench["providers"]._siglip_kernel(Module, kinds(bench)["clip"], "cpu") is None


def test_pairs_of_every_shape_are_hard_enough(bench):
    """Dense float64 passes the gate: a shape whose gradient vanishes would call it wrong."""
    for shape in bench["shapes"].SHAPES:
        if shape.rows * shape.columns > 2**21:
            continue
        truth = bench["gate"].Truth(shape)
        xs = [x.double() for x in truth.inputs]
        got = bench["gate"].gradients(bench["providers"].dense(shape), xs, shape.learned)
        errors = truth.of(*got)
        assert errors.loss < 1e-12, shape
        assert errors.gradient < 1e-9, shape


BROKEN = """
import providers, clae_fast, gate, torch
real = providers._ours
def ours(backend, shape, device):
    loss = real(backend, shape, device)
    return None if loss is None else (lambda *xs: {ours})
if {patch!r}:
    providers.PROVIDERS = tuple(
        p._replace(make=lambda s, d, n=p.name: ours(n[10:], s, d)) if p.ours else p
        for p in providers.PROVIDERS
    )
def explode(shape, device):
    def loss(*xs):
        raise RuntimeError("peer exploded")
    return loss
providers.PROVIDERS += (providers.Provider("exploding", explode),)
if {fused!r}:
    def value_and_grad(loss, argnums=None):
        return lambda *xs: (loss(*xs).detach(), tuple(torch.zeros_like(x) for x in xs[:2]))
    clae_fast.value_and_grad = value_and_grad
"""


def run_broken(tmp_path, patch, ours="loss(*xs)", fused=False):
    (tmp_path / "broken.py").write_text(BROKEN.format(patch=patch, ours=ours, fused=fused))
    path = tmp_path / "out.json"
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", BENCH, "--benchmark-only", "-p", "broken",
         "-k", "simclr-128 and (cpp or eager or exploding)", "--quick", "--results", path],
        cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join((str(BENCH), str(tmp_path), str(ROOT)))},
    )  # fmt: skip
    return ran, json.loads(path.read_text())


def test_a_peer_that_raises_drops_out_alone(tmp_path):
    ran, result = run_broken(tmp_path, patch=False)
    assert ran.returncode == 0, ran.stdout[-2000:]
    line = "exploding is wrong on simclr-128, forward: raises RuntimeError: peer exploded"
    assert line in ran.stdout
    for record in result["records"]:
        assert ("wrong" in record) is (record["provider"] == "exploding")


@pytest.mark.parametrize(
    ("ours", "fused", "mode"),
    [("loss(*xs) + 5", False, "forward"), ("loss(*xs)", True, "value_and_grad")],
)
def test_ours_is_held_to_the_same(ours, fused, mode, tmp_path, bench):
    """A wrong loss, or fused call beside a right backward, fails and stays in the report."""
    ran, result = run_broken(tmp_path, patch=not fused, ours=ours, fused=fused)
    assert ran.returncode == 1, ran.stdout[-2000:]
    mine = {r["mode"]: r for r in result["records"] if r["provider"] == "clae_fast-cpp"}
    assert "wrong" in mine[mode]
    assert "seconds" not in mine[mode]
    assert ("wrong" in mine["forward+backward"]) is not fused
    table = "\n".join(bench["report"].loss_table(result))
    assert "| simclr-128 | 128 x 128, 128 | wrong |" in table or fused
    assert f"clae_fast-cpp is wrong on simclr-128, {mode}" in "\n".join(
        bench["report"].wrong(result)
    )


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--device", "tpu"], "--device tpu: expected cpu or cuda"),
        (["--threads", "0"], "--threads 0: expected a number from 1 to 1024"),
        (["--threads", "100000"], "--threads 100000: expected a number from 1 to 1024"),
        (["--results", "/proc/nope/x.json"], "--results /proc/nope/x.json: expected a file"),
        (["--results", "README.md/x.json"], "--results README.md/x.json: expected a file"),
    ],
)
def test_wrong_options_are_one_line(words, says):
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", BENCH, "--benchmark-only", "--quick", *words],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 4
    assert [line for line in ran.stderr.splitlines() if line] == [f"ERROR: {says}"] or (
        ran.stderr.startswith(f"ERROR: {says}") and "Traceback" not in ran.stderr
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sampled", [False, True])
def test_the_truth_of_the_gate(kind, sampled, bench, monkeypatch):
    """Against autograd of the dense formula in float64, whole and by sampled rows."""
    gate, providers = bench["gate"], bench["providers"]
    if sampled:
        monkeypatch.setattr(gate, "FULL_UP_TO", 10)
        monkeypatch.setattr(gate, "SAMPLE", 7)
    shape = kinds(bench)[kind]._replace(pairs=40)
    truth = gate.Truth(shape)
    xs = [x.double().requires_grad_() for x in truth.inputs]
    loss = providers.dense(shape)(*xs)
    expected = torch.autograd.grad(loss, xs[: shape.learned])
    assert abs(truth.loss - float(loss.detach())) < 1e-12
    for got, grad in zip(truth.gradients, expected, strict=True):
        assert len(got) == (7 if sampled else len(grad))
        torch.testing.assert_close(got, grad[truth.rows], rtol=1e-9, atol=1e-12)


def test_interleaving(bench):
    """Every call once a round, in an order drawn anew, on what was prepared for the round."""
    seen = []
    calls = {name: (lambda name=name: seen.append(name)) for name in "abc"}
    times = bench["timing"].interleaved(calls, lambda seed: seen.append(seed), rounds=20)
    rounds = [seen[-80:][4 * i : 4 * i + 4] for i in range(20)]
    assert [r[0] for r in rounds] == list(range(2, 22))
    assert all(sorted(r[1:]) == ["a", "b", "c"] for r in rounds)
    assert len({tuple(r[1:]) for r in rounds}) > 3
    assert all(len(t) == 20 and min(t) >= 0 for t in times.values())
    quartiles = bench["timing"].ratios([1.0, 2.0, 1.0, 1.0, 1.0], [3.0, 2.0, 4.0, 3.0, 5.0])
    assert quartiles == (3.0, 3.0, 4.0)


def test_report(quick, bench, tmp_path):
    _, result = quick
    report = bench["report"]
    text = f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n"
    new = report.insert(text, result)
    assert new.startswith("before\n")
    assert new.endswith("after\n")
    assert "old" not in new
    assert "| cifar-simclr-512 | 512 x 512, 128 |" in new
    first, second = report.loss_table(result), report.family_table(result)
    assert second[0] == first[0]
    assert any(line.startswith("| supcon-256: sup_con | 256 x 256, 128 |") for line in second)
    assert any(line.startswith("| mnrl-512-d768: info_nce, extra negatives |") for line in second)
    assert all(line in new for line in (*first, *second, report.family_words(result)))
    assert len(first) + len(second) - 4 == len({s for s in bench["shapes"].SHAPES if s.quick})
    fused = [r for r in result["records"] if r.get("loss", "uel") in bench["shapes"].FUSED_KINDS]
    old = report.block({**result, "records": fused}, [])  # as results before the family
    assert "The family" not in old
    assert "a 512 x 512 product reached" in new
    assert "bench-time.svg" in new
    assert "bench-memory.svg" not in new  # no memory was measured
    assert report.insert(new, result) == new
    report.draw(result, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["bench-time.svg"]
    svg = (tmp_path / "bench-time.svg").read_text()
    assert svg.startswith("<?xml")
    assert "clae_fast-cpp" in svg


def test_what_the_report_refuses(quick, bench, tmp_path):
    report, (_, result) = bench["report"], quick
    with pytest.raises(report.ReportError, match="expected the lines"):
        report.insert("no markers", result)
    path = tmp_path / "x.json"
    for text in ("{", "[]", "{}", (BENCH / "results" / "compare-mnist5k.json").read_text()):
        path.write_text(text)
        with pytest.raises(report.ReportError, match=f"^{path}: expected results of"):
            report.load(path)
    path.write_text(json.dumps(result))
    with pytest.raises(report.ReportError, match="expected a whole run; --quick"):
        report.load(path)
    for damage, says in (
        (lambda r: r.pop("gemm_n"), "no gemm_n"),
        (lambda r: r.update(records={}), "records must be a list"),
        (lambda r: r["provenance"].pop("commit"), "provenance has no commit"),
        (lambda r: r["records"].append(3), r"record \d+ is of no known kind"),
        (lambda r: r["records"][0].pop("rows"), r"record 0 \(loss\) has no rows"),
        (lambda r: r["records"][0].pop("seconds"), r"record 0 \(loss\) has no seconds"),
        (lambda r: r["records"][0].update(seconds="1"), r"record 0 \(loss\) has seconds '1'"),
        (lambda r: r["records"][0].update(seconds=0), r"record 0 \(loss\) has seconds 0"),
        (lambda r: r["records"][0].update(seconds=math.nan), r"record 0 .* has seconds nan"),
        (lambda r: r["records"][0].update(rows=True), r"record 0 \(loss\) has rows True"),
        (lambda r: r["records"][0].update(gradient_error="x"), r"has gradient_error 'x'"),
        (lambda r: r["records"][0].update(times_as_fast_as={"a": [1, 2]}), "has times_as_fast_as"),
        (lambda r: r["records"].append(r["records"][0]), r"\(loss\) is there twice"),
        (lambda r: r["provenance"].update(machine="<!-- x"), "provenance has machine '<!-- x'"),
    ):
        damaged = json.loads(json.dumps(result))
        damage(damaged)
        path.write_text(json.dumps(damaged))
        with pytest.raises(report.ReportError, match=rf"^{path}: expected results of .*{says}"):
            report.load(path)
    path.write_text(json.dumps(result | {"quick": False}))  # as `-k` leaves it
    before = (ROOT / "README.md").read_bytes()
    ran = subprocess.run(
        [sys.executable, BENCH / "report.py", path], capture_output=True, text=True
    )
    assert ran.returncode == 2
    assert "expected a whole run (it lacks loss simclr-64 forward clae_fast-cpp," in ran.stderr
    assert re.search(r" and \d+ more\)", ran.stderr)
    assert (ROOT / "README.md").read_bytes() == before
    ran = subprocess.run(
        [sys.executable, BENCH / "report.py", tmp_path / "nope.json"],
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 2
    assert ran.stderr.startswith("report.py: error: ")
    assert ran.stderr.count("\n") == 1


def test_goals_are_met_or_missed_by_so_much(bench):
    def loss(shape, mode, provider, seconds, **more):
        record = {"kind": "loss", "shape": shape, "mode": mode, "provider": provider}
        return record | {"seconds": seconds, "times_as_fast_as": {}} | more

    ours, way = "clae_fast-cpp", "forward+backward"
    against = {
        "eager": [1, 2.4, 3],
        "peer": [0.5, 0.9, 1],
        "slow": [0.9, 0.95, 1],
        "clae_fast-reference": [0, 0.1, 1],
    }
    records = [
        loss("simclr-128", way, ours, 1.0, times_as_fast_as=against),
        loss("simclr-128", way, "eager", 2.4),
        loss("simclr-128", way, "compiled", 2.0),
        loss("simclr-8192", way, ours, 1.0),
        loss("simclr-8192", way, "eager", 3.0),
        loss("simclr-64", "value_and_grad", ours, 1.0, share_of_forward_backward=0.7),
        loss("clip", "value_and_grad", ours, 1.0, share_of_forward_backward=1.004),
        {"kind": "growth", "peak_bytes_65536": 200e6},
        {"kind": "step", "method": "plain", "variant": "exact", "times_as_fast_as_published": 1.2},
    ]
    found = {goal.what: f"{goal.wish()}: {goal}" for goal in bench["goals"].goals(records, ours)}
    own = "`value_and_grad` against our own forward + backward"
    assert found == {
        "simclr-128, against the better of eager and compiled": (
            "at least 2.5x: **2.00x, missed by 20 %**"
        ),
        "simclr-8192, against the better of eager and compiled": "at least 3x: 3.00x, met",
        "never slower than another; least: simclr-128, peer (also simclr-128, slow 0.95x)": (
            "at least 1x: **0.90x, missed by 10 %**"
        ),
        f"{own}, simclr-64": "at most 0.8x: 0.70x, met",
        f"{own}; most: clip": "at most 1x: **1.00x, missed by 0.4 %**",
        "65,536 rows, memory beyond the inputs": "at most 300 MB: 200 MB, met",
        "exact training step against the published one, plain": (
            "at least 1.5x: **1.20x, missed by 20 %**"
        ),
    }


def test_goals_on_a_gpu(bench):
    """The products alone are no other loss, and are compared where a goal asks for them."""
    record = {
        "kind": "loss", "shape": "simclr-8192", "mode": "forward+backward",
        "provider": "clae_fast-triton", "seconds": 1.0,
        "times_as_fast_as": {"compiled": [2, 4.0, 5], "bare products": [0.8, 0.9, 1]},
    }  # fmt: skip
    update = {"kind": "sign_step", "dtype": "float32", "layout": "any", "share_of_copy": 0.9}
    found = bench["goals"].goals([record, update], "clae_fast-triton")
    assert {goal.what: str(goal) for goal in found} == {
        "simclr-8192, forward+backward, against compiled": "4.00x, met",
        "simclr-8192, forward+backward, against bare products": "**0.90x, missed by 10 %**",
        "sign_step, float32, any, bandwidth of a copy": "90 %, met",
        "never slower than another; least: simclr-8192, compiled": "4.00x, met",
    }


@pytest.mark.parametrize("name", ["simclr-64", "clae-plain-128", "queue-65536", "mnrl-512-d768"])
def test_bare_products_are_the_three_of_a_loss(bench, name):
    shape = bench["shapes"].BY_NAME[name]
    if shape.queue:
        shape = shape._replace(queue=500)
    with FlopCounterMode(display=False) as counter:
        dq, dk = bench["timing"].bare_products(shape, bench["gate"].inputs(shape))
    assert counter.get_total_flops() == 3 * shape.gemm_flops
    assert dq.shape == (shape.rows, shape.width)
    assert dk.shape == (shape.columns, shape.width)


def test_needed_products(bench):
    """S, and what each set of rows that gets a gradient cannot do without."""
    needed = {kind: shape.gemms for kind, shape in kinds(bench).items()}
    of_two_sets = ("info_nce", "info_nce, extra negatives", "clip", "siglip")
    assert needed == {kind: 3 if kind in of_two_sets else 2 for kind in KINDS}


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
