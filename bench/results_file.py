"""A results file of `pytest bench --results`, refused where a table could not be made of it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shapes import (
    GRAPH,
    MEMORY_PROVIDERS,
    MEMORY_SHAPES,
    SIGN_STEPS,
    STEP_METHODS,
    replays,
    shapes_for,
)

from clae_fast.pretraining.config import VARIANTS

OURS = ("clae_fast-cuda", "clae_fast-triton", "clae_fast-cpp")  # the first that was measured
Result = dict[str, Any]
OF_THE_RUN = ("machine", "threads", "torch", "commit", "date")


def _count(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and x > 0


def _positive(x: Any) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool) and 0 < x < math.inf


def _error(x: Any) -> bool:
    return x is None or (isinstance(x, (int, float)) and x >= 0)  # inf: no gradient at all


def _text(x: Any) -> bool:
    return isinstance(x, str) and x.isprintable() and "<!--" not in x and "|" not in x


def _ratios(x: Any) -> bool:
    return isinstance(x, dict) and all(
        isinstance(three, list) and len(three) == 3 and all(map(_positive, three))
        for three in x.values()
    )


def _counts(x: Any) -> bool:
    return isinstance(x, list) and len(x) > 0 and all(map(_count, x))


Fields = dict[str, Callable[[Any], bool]]
FIELDS: dict[str, Fields] = {  # of a record by its kind
    "loss": {
        "shape": _text, "mode": _text, "provider": _text, "loss": _text, "dtype": _text,
        "rows": _count, "columns": _count, "width": _count,
    },
    "memory": {"shape": _text, "provider": _text, "rows": _count, "bytes": _count},
    "step": {
        "method": _text, "variant": _text, "encoder": _text, "batch": _count, "pixels": _count,
        "rounds": _count, "seconds": _positive, "times_baseline": _positive,
        "times_as_fast_as_published": _positive, "forwards": _positive,
    },
    "sign_step": {
        "dtype": _text, "layout": _text, "seconds": _positive, "rounds": _count,
        "gbytes_per_second": _positive, "copy_gbytes_per_second": _positive,
        "share_of_copy": _positive, "times_as_fast_as": _ratios,
    },
    "growth": {"rows": _counts, "exponent": _positive, "peak_bytes_65536": _count},
}  # fmt: skip
OF_A_TIME: Fields = {
    "seconds": _positive, "rounds": _count, "times_as_fast_as": _ratios, "gemm_gflops": _positive,
    "share_of_gemm_ceiling": _positive, "loss_error": _error, "gradient_error": _error,
}  # fmt: skip
Key = tuple[str, ...]


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
    if found.get("device", "cpu") not in ("cpu", "cuda"):
        return f"device {found['device']!r}"
    for name in OF_THE_RUN:
        if name not in facts:
            return f"provenance has no {name}"
    for name, value in facts.items():
        if not _text(value):
            return f"provenance has {name} {value!r}"
    seen: set[Key] = set()
    for i, record in enumerate(records):
        kind = record.get("kind") if isinstance(record, dict) else None
        if kind not in FIELDS:
            return f"record {i} is of no known kind"
        timed = OF_A_TIME if kind == "loss" and "wrong" not in record else {}
        for name, right in (FIELDS[kind] | timed).items():
            if name not in record:
                return f"record {i} ({kind}) has no {name}"
            if not right(record[name]):
                return f"record {i} ({kind}) has {name} {record[name]!r}"
        if key(record) in seen:
            return f"record {i} ({kind}) is there twice"
        seen.add(key(record))
    return None


def key(record: dict[str, Any]) -> Key:
    """What a record is of."""
    names = ("kind", "shape", "mode", "provider", "method", "variant")
    names = ("kind", "dtype", "layout") if record["kind"] == "sign_step" else names
    return tuple(str(record[name]) for name in names if name in record)


def whole(mine: str, device: str) -> list[Key]:
    """What the tables and goals are made of."""
    found: list[Key] = []
    for shape in shapes_for(device):
        for mode in ("forward", "forward+backward"):
            found += [("loss", shape.name, mode, name) for name in (mine, "eager", "compiled")]
        found.append(("loss", shape.name, "value_and_grad", mine))
        if replays(shape, device):
            found += [("loss", shape.name, GRAPH, name) for name in (mine, "eager", "compiled")]
    found += [("step", method, variant) for method in STEP_METHODS for variant in VARIANTS]
    if device == "cuda":
        found += [("sign_step", *case) for case in SIGN_STEPS]
    if device == "cpu":
        found.append(("growth",))
        found += [("memory", shape, name) for shape in MEMORY_SHAPES for name in MEMORY_PROVIDERS]
    return found


def incomplete(result: Result) -> str | None:
    """What a run left out, as `-k` or an interrupt does: its tables would replace whole ones."""
    there = {key(record) for record in result["records"]}
    needed = whole(ours_of(result), result.get("device", "cpu"))
    lack = [" ".join(what) for what in needed if what not in there]
    if not lack:
        return None
    return f"it lacks {', '.join(lack[:3])}" + (f" and {len(lack) - 3} more" if lack[3:] else "")


def losses(result: Result, mode: str) -> dict[str, dict[str, dict[str, Any]]]:
    """{shape: {provider: record}} of one mode, in the order they were measured."""
    shapes: dict[str, dict[str, dict[str, Any]]] = {}
    for record in result["records"]:
        if record["kind"] == "loss" and record["mode"] == mode:
            shapes.setdefault(record["shape"], {})[record["provider"]] = record
    return shapes


def ours_of(result: Result) -> str:
    """The backend of ours that the run is about: the one with the most figures."""
    names = [r.get("provider") for r in result["records"]]
    there = [name for name in OURS if name in names]
    return max(there, key=names.count, default=OURS[-1])


def own(by_name: dict[str, dict[str, Any]]) -> str:
    """The backend of ours that a shape is about: the one that is chosen first."""
    return next((name for name in OURS if name in by_name), OURS[-1])
