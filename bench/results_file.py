"""A results file of `pytest bench --results`, refused where a table could not be made of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from shapes import SHAPES

OURS = ("clae_fast-cuda", "clae_fast-triton", "clae_fast-cpp")  # the first that was measured
Result = dict[str, Any]
NEEDED = {  # of a record by its kind
    "loss": ("shape", "mode", "provider", "loss", "rows", "columns", "width", "dtype"),
    "memory": ("shape", "provider", "rows", "bytes"),
    "step": (
        "method", "variant", "seconds", "times_baseline", "times_as_fast_as_published", "forwards",
        "encoder", "batch", "pixels", "rounds",
    ),
    "growth": ("rows", "exponent", "peak_bytes_65536"),
}  # fmt: skip
OF_A_TIME = ("seconds", "rounds", "times_as_fast_as", "gemm_gflops", "share_of_gemm_ceiling")
OF_THE_RUN = ("machine", "threads", "torch", "commit", "date")


class ReportError(ValueError):
    """What is wrong with a results file or the README, in one sentence."""


def load(path: Path) -> Result:
    """A file of `pytest bench --results`.

    Raises:
        ReportError: it cannot be read, is of something else, or of a --quick run.
    """
    try:
        found: Result = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ReportError(f"{path}: expected results of `pytest bench --results` ({error})") from (
            error
        )
    if not isinstance(found, dict) or not {"records", "provenance", "quick"} <= found.keys():
        raise ReportError(f"{path}: expected results of `pytest bench --results`")
    if lack := _lacks(found):
        raise ReportError(f"{path}: expected results of `pytest bench --results` ({lack})")
    if found["quick"]:
        raise ReportError(f"{path}: expected a whole run; --quick looks at correctness, not time")
    return found


def _lacks(found: Result) -> str | None:
    """The first thing that the tables need and the file has not."""
    records, facts = found["records"], found["provenance"]
    if not isinstance(records, list) or not isinstance(facts, dict):
        return "records must be a list, provenance an object"
    if not isinstance(found.get("gemm_n"), int):
        return "no gemm_n"
    for name in OF_THE_RUN:
        if name not in facts:
            return f"provenance has no {name}"
    for i, record in enumerate(records):
        kind = record.get("kind") if isinstance(record, dict) else None
        if kind not in NEEDED:
            return f"record {i} is of no known kind"
        timed = OF_A_TIME if kind == "loss" and "wrong" not in record else ()
        for name in (*NEEDED[kind], *timed):
            if name not in record:
                return f"record {i} ({kind}) has no {name}"
    return None


def incomplete(result: Result) -> str | None:
    """What a run left out, as `-k` or an interrupt does: its tables would replace whole ones."""
    there = losses(result, "forward+backward")
    lack = [s.name for s in SHAPES if ours_of(result) not in there.get(s.name, {})]
    lack += [
        kind for kind in ("step", "memory") if all(r["kind"] != kind for r in result["records"])
    ]
    return f"it lacks {', '.join(lack)}" if lack else None


def losses(result: Result, mode: str) -> dict[str, dict[str, dict[str, Any]]]:
    """{shape: {provider: record}} of one mode, in the order they were measured."""
    shapes: dict[str, dict[str, dict[str, Any]]] = {}
    for record in result["records"]:
        if record["kind"] == "loss" and record["mode"] == mode:
            shapes.setdefault(record["shape"], {})[record["provider"]] = record
    return shapes


def ours_of(result: Result) -> str:
    """The backend of ours that the tables are about."""
    there = {r.get("provider") for r in result["records"]}
    return next((name for name in OURS if name in there), OURS[-1])
