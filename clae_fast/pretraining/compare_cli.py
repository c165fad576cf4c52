"""`clae-fast compare`: the variants of a method side by side. Imports torch only to run."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from .cli import answer, fail, missing_extras
from .config import VARIANTS, ConfigError, PretrainConfig
from .options import add_command, add_settings, given_settings
from .presets import PRESETS, preset

PROG = "clae-fast compare"
DESCRIPTION = """\
Train the baseline, CLAE at its published cost, exact CLAE and shared CLAE with the same seeds,
weights and batches, and set side by side: kNN and linear-probe accuracy with their spread, time
and encoder forwards per step, memory. A comparison that was stopped goes on where it was."""
EPILOG = """\
files in the output folder:
  <variant>-seed<N>/   each run, as `clae-fast pretrain` writes it
  compare.json         all figures, settings, machine, versions, commit
  compare.md           the table
  compare.png          the figure

examples:
  clae-fast compare
  clae-fast compare --method uel --epochs 3 --seeds 0 1
  clae-fast compare --preset simclr-cifar10 --data-dir data --device cuda
"""


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> argparse.ArgumentParser:
    """Register `compare`; `args.run(args)` then returns the exit code."""
    parser = add_command(
        subparsers,
        PROG,
        "train and time the baseline and every kind of CLAE step side by side",
        DESCRIPTION,
        EPILOG,
    )
    group = parser.add_argument_group("comparison")
    add = group.add_argument
    add("--preset", default=None, metavar="NAME", help="published settings: " + ", ".join(PRESETS))
    add(
        "--seeds",
        type=int,
        nargs="+",
        default=[0, 1, 2],
        metavar="N",
        help="one run a variant and seed (default: 0 1 2)",
    )
    add(
        "--variants",
        nargs="+",
        default=list(VARIANTS),
        metavar="NAME",
        help="of " + ", ".join(VARIANTS) + "; time ratios refer to the first (default: all)",
    )
    add(
        "--rounds",
        type=int,
        default=15,
        metavar="N",
        help="steps of each variant that are timed, interleaved (default: 15)",
    )
    add(
        "--output",
        type=Path,
        default=None,
        metavar="DIR",
        help="folder for runs and results (default: runs/compare-<method>-<data>)",
    )
    add_settings(parser, leave_out=("seed", "clae", "attack"))
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """Train, measure, write, report. Exit codes: 0; 1 failed; 2 wrong option; 130 Ctrl-C."""
    return answer(PROG, lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    given = given_settings(args)
    config = preset(args.preset, **given) if args.preset else PretrainConfig(**given)
    if args.rounds < 1:
        raise ConfigError("rounds", args.rounds, "a whole number of at least 1")
    folder: Path = args.output or Path("runs") / f"compare-{config.method}-{config.data}"
    if reason := missing_extras():
        return fail(PROG, 1, reason)

    from .checkpoint import CheckpointError
    from .compare import compare
    from .compare_report import figure, table
    from .files import unwritable_reason, write_whole
    from .monitor import NonFiniteLossError

    if reason := unwritable_reason(folder):
        raise ConfigError("output", folder, f"a folder that can be written ({reason})")
    try:
        comparison = compare(
            config,
            args.seeds,
            variants=args.variants,
            folder=folder,
            rounds=args.rounds,
            progress=True,
        )
        text = table(comparison)
        figure(comparison, folder / "compare.png")
        write_whole(folder / "compare.md", text.encode())
        write_whole(folder / "compare.json", (json.dumps(comparison, indent=2) + "\n").encode())
    except (NonFiniteLossError, CheckpointError, OSError, ImportError) as error:
        return fail(PROG, 1, str(error))
    print(text)
    for name in ("compare.png", "compare.md", "compare.json"):
        print(folder / name)
    return 0
