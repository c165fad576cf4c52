"""Bytes and memory of an exchange, as docs/several-processes.md says."""

import re
from pathlib import Path

import pytest
from group_losses import measured_exchange

DOCS = (Path(__file__).parents[1] / "docs" / "several-processes.md").read_text()


def table(name):
    """{loss: cells} of the table after a marker."""
    rows = DOCS.split(f"<!-- {name}:")[1].split("\n\n")[0].splitlines()[3:]
    cells = [[c.strip(" `") for c in row.strip("|").split("|")] for row in rows]
    return {loss: formulas for loss, *formulas in cells}


@pytest.mark.parametrize("exchange", ["gather", "ring"])
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("name", table("traffic"))
def test_bytes(four, name, gradients, exchange):
    column = 2 * gradients + (exchange == "ring")
    expected = eval(table("traffic")[name][column], {"W": 4, "b": 8, "D": 24, "e": 4})
    for received, sent, _, of_meetings in four.run(measured_exchange, name, 8, exchange, gradients):
        assert received == sent == expected
        assert of_meetings
        assert all(n == 32 for n in of_meetings)


@pytest.mark.parametrize("exchange", ["gather", "ring"])
@pytest.mark.parametrize("name", table("memory"))
def test_memory(four, name, exchange):
    formula = table("memory")[name][exchange == "ring"]
    expected = eval(formula, {"W": 4, "b": 8, "D": 24, "e": 4})
    for *_, peak, _ in four.run(measured_exchange, name, 8, exchange, True):
        assert peak == expected


def test_every_loss_is_in_the_tables():
    from group_losses import LOSSES

    assert set(table("traffic")) == set(LOSSES)
    assert re.search(r"256 MiB", DOCS)
