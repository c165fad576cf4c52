"""`clae-fast compare`: what is compared is comparable, and the report says what was measured."""

import argparse
import dataclasses
import json
from pathlib import Path

import pytest
import torch

from clae_fast.pretraining import ConfigError, PretrainConfig, compare_cli
from clae_fast.pretraining import compare as compare_module
from clae_fast.pretraining.checkpoint import checkpoints, load_checkpoint
from clae_fast.pretraining.compare import VARIANTS, compare
from clae_fast.pretraining.compare_report import BEGIN, END, figure, insert, spread, table
from clae_fast.pretraining.step_cost import step_costs

ROOT = Path(__file__).parent.parent
SMALL = {"epochs": 1, "batch_size": 32, "workers": 0, "threads": 1}


@pytest.fixture(scope="module")
def compared(subset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    return folder, compare(PretrainConfig(**SMALL), (0, 1), folder=folder, data=subset, rounds=3)


def test_the_work_is_that_of_the_method(compared):
    _, comparison = compared
    forwards = {n: v["forwards_per_step"] for n, v in comparison["variants"].items()}
    # The loss and the projector's input gradients are what the fractions are.
    for name, expected in (("baseline", 6), ("published", 15), ("exact", 11), ("shared", 10)):
        assert forwards[name] == pytest.approx(expected, abs=0.35), forwards
    for v in comparison["variants"].values():
        assert v["seconds_per_step"] > 0
        assert v["memory_bytes"] > 2**20
        assert len(v["knn"]) == len(v["linear_probe"]) == 2
        assert all(0.1 < a <= 1 for a in (*v["knn"], *v["linear_probe"]))
    assert comparison["variants"]["baseline"]["ratio"] == 1
    json.dumps(comparison)


def test_published_and_exact_agree(compared):
    """The exact step is the published one: one epoch of four steps gives the same weights."""
    folder, _ = compared
    weights = [
        load_checkpoint(checkpoints(folder / f"{name}-seed0")[-1])[0]
        for name in ("published", "exact")
    ]
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-5, atol=1e-6)


def test_the_same_weights_and_batches_for_all(subset, tmp_path, monkeypatch):
    seen = {}
    from clae_fast.pretraining import loop

    real = loop.TrainingStep.__call__

    def step(self, x_i, x_j):
        key = (self.config.clae, self.config.attack, self.config.seed)
        weights = next(p for p in self.encoder.parameters()).detach().clone()
        seen.setdefault(key, (weights, []))[1].append((x_i.clone(), x_j.clone()))
        return real(self, x_i, x_j)

    monkeypatch.setattr(loop.TrainingStep, "__call__", step)
    monkeypatch.setattr(compare_module, "step_costs", lambda configs, *a, **k: {
        name: compare_module_cost() for name in configs
    })  # fmt: skip
    compare(PretrainConfig(**SMALL), (0, 1), folder=tmp_path, data=subset)
    assert len(seen) == 8
    for seed in (0, 1):
        first, *others = (v for (_, _, s), v in seen.items() if s == seed)
        for weights, views in others:
            assert torch.equal(weights, first[0])
            for (a, b), (c, d) in zip(views, first[1], strict=True):
                assert torch.equal(a, c)
                assert torch.equal(b, d)


def compare_module_cost():
    from clae_fast.pretraining.step_cost import StepCost

    return StepCost(1.0, 1.0, 6.0, None)


def test_a_finished_run_is_taken_and_a_stopped_one_goes_on(compared, subset, monkeypatch):
    folder, before = compared
    config = PretrainConfig(**SMALL)
    trained = []
    real = compare_module.pretrain

    def counted(config, **options):
        trained.append((config.attack, config.seed, options["resume"]))
        return real(config, **options)

    monkeypatch.setattr(compare_module, "pretrain", counted)
    for name in ("accuracies.json", "result.json"):
        (folder / "shared-seed1" / name).unlink()
    after = compare(config, (0, 1), folder=folder, data=subset, rounds=1)
    assert trained == [("shared", 1, True)]
    for name in VARIANTS:
        assert after["variants"][name]["knn"] == before["variants"][name]["knn"]
    with pytest.raises(ConfigError, match="expected runs made with these settings"):
        compare(dataclasses.replace(config, lr=0.1), (0,), folder=folder, data=subset)


def test_wrong_arguments_are_named(subset, tmp_path):
    config = PretrainConfig(**SMALL)
    bare = dataclasses.replace(subset, train_labels=None, test_labels=None)
    for arguments, message in (
        ({"seeds": ()}, "seeds=.*: expected at least one seed, each once"),
        ({"seeds": (1, 1)}, "seeds=.*: expected at least one seed, each once"),
        ({"seeds": (-1,)}, "seed=-1: expected"),
        ({"variants": ("fast",)}, "variants='fast': expected one of baseline, published"),
        ({"variants": ()}, "variants=.*: expected at least one"),
        ({"data": bare}, "expected images with labels"),
    ):
        with pytest.raises(ConfigError, match=message):
            compare(config, **({"seeds": (0,), "data": subset, "folder": tmp_path} | arguments))
    assert list(tmp_path.iterdir()) == []


def test_costs_rotate_the_order(subset, monkeypatch):
    from clae_fast.pretraining import step_cost

    order = []
    real = step_cost._Stepper.__call__

    def call(self, x_i, x_j):
        order.append(self.step.config.attack if self.step.config.clae else "baseline")
        real(self, x_i, x_j)

    monkeypatch.setattr(step_cost._Stepper, "__call__", call)
    monkeypatch.setattr(step_cost, "_peak_memory", lambda *a: None)
    config = PretrainConfig(**SMALL)
    configs = {n: dataclasses.replace(config, **VARIANTS[n]) for n in ("baseline", "exact")}
    costs = step_costs(configs, subset, rounds=2)
    assert order[:8] == ["baseline", "exact", "exact", "baseline"] * 2
    assert costs["exact"].memory_bytes is None


# --- report ---


def test_table_and_figure(compared, tmp_path):
    from matplotlib.image import imread

    _, comparison = compared
    text = table(comparison)
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(rows) == 2 + 4
    exact = comparison["variants"]["exact"]
    assert f"| {spread(exact['knn'])} | {spread(exact['linear_probe'])} |" in text
    assert f"| {exact['ratio']:.2f} | {exact['forwards_per_step']:.1f} |" in text
    for value in comparison["provenance"].values():
        assert value in text or value in (comparison["provenance"]["python"],
                                          comparison["provenance"]["clae_fast"])  # fmt: skip
    figure(comparison, tmp_path / "c.png")
    pixels = imread(tmp_path / "c.png")
    assert pixels.shape[1] > 1000
    assert pixels.std() > 0.05


def test_spread():
    assert spread([0.9]) == "90.0"
    assert spread([0.9, 0.92, 0.94]) == "92.0 \u00b1 2.0"


def test_insert_replaces_between_the_markers(compared):
    _, comparison = compared
    text = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    new = insert(text, comparison, "c.png")
    assert new.startswith("before\n")
    assert new.endswith(f"{END}\nafter\n")
    assert "old" not in new
    assert table(comparison) in new
    assert insert(new, comparison, "c.png") == new
    with pytest.raises(ValueError, match="expected the lines"):
        insert("nothing", comparison, "c.png")


def test_the_readme_shows_the_committed_results():
    readme = (ROOT / "README.md").read_text()
    comparison = json.loads((ROOT / "bench" / "results" / "compare-mnist5k.json").read_text())
    assert insert(readme, comparison, "docs/compare-mnist5k.png") == readme
    assert len(comparison["seeds"]) == 3
    assert comparison["provenance"]["commit"] not in ("", "unknown")


# --- the command ---


def run(*words):
    parser = argparse.ArgumentParser(prog="clae-fast")
    compare_cli.add_parser(parser.add_subparsers(required=True))
    args = parser.parse_args(["compare", *map(str, words)])
    return args.run(args)


def test_the_command(capsys, tmp_path, monkeypatch, subset):
    monkeypatch.setattr(compare_module, "load_data", lambda *a, **k: subset)
    words = ["--epochs", 1, "--workers", 0, "--threads", 1, "--output", tmp_path, "--rounds", 1]
    assert run(*words, "--seeds", 3, "--variants", "baseline", "exact") == 0
    printed = capsys.readouterr().out
    written = json.loads((tmp_path / "compare.json").read_text())
    assert written["seeds"] == [3]
    assert table(written) in printed
    assert (tmp_path / "compare.md").read_text() == table(written)
    assert (tmp_path / "compare.png").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rounds", "0"], "--rounds 0: expected a whole number of at least 1"),
        (["--seeds", "1", "1"], "--seeds 1 1: expected at least one seed, each once"),
        (["--variants", "x"], "--variants x: expected one of baseline, published"),
        (["--preset", "x"], "--preset x: expected one of plain-cifar10"),
        (
            ["--accumulate", "2"],
            "--variants published: expected others with these settings (accumulate=2",
        ),
    ],
)
def test_wrong_options(words, message, capsys, tmp_path, monkeypatch, subset):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compare_module, "load_data", lambda *a, **k: subset)
    assert run(*words) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"clae-fast compare: error: {message}")
    assert error.count("\n") == 1
