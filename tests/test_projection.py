"""The projection of a large batch: its arithmetic, and that the docs hold what was measured."""

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def projection():
    spec = importlib.util.spec_from_file_location("projection", ROOT / "bench" / "projection.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_arithmetic(projection):
    got = projection.project({"sums": 0.5, "gradient": 1.0}, 131072, 100)
    assert got["seconds_of_a_block"] == {"sums": 0.5, "gradient": 1.0}
    assert got["seconds"] == 8 * 1.5
    assert got["bytes_of_a_block"] == {"sums": 131072 * 400, "gradient": 131072 * 408}
    assert got["bytes_received"] == 7 * 131072 * 808  # (W-1) 2b (2D + 2) e of the docs
    assert got["slowest_hidden_link"] == 131072 * 400 / 0.5
    assert got["share_of_hop_in_sweep"]["10 Gbit/s"] == pytest.approx(131072 * 400 / 1.25e9 / 0.5)
    smaller = projection.project({"sums": 0.5, "gradient": 1.0}, 65536, 100)
    assert smaller["seconds"] == 4 * got["seconds"]


def test_it_measures(projection, capsys):
    assert projection.main(["--rows", "64", "--rounds", "1", "--widths", "8"]) == 0
    assert "| 8 |" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        projection.main(["--rows", "0"])


def test_docs_hold_the_committed_figures(projection):
    result = json.loads((ROOT / "bench" / "results" / "projection-cpu.json").read_text())
    inside = projection.DOCS.read_text().split(projection.BEGIN)[1].split(projection.END)[0]
    assert inside.strip() == projection.table(result).strip()
    assert not result["provenance"]["commit"].endswith("+")
