"""`clae-fast pretrain`: options, one-line errors, closing table. Imports torch only to run."""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from .config import METHOD_NAMES, RESUME_MAY_CHANGE, ConfigError, PretrainConfig
from .files import RESULT, holds_run
from .launch import launch
from .options import (
    add_command,
    add_settings,
    given_settings,
    option_name,
    option_of,
    without_effect,
)
from .presets import PRESETS, preset

if TYPE_CHECKING:
    from .processes import Processes
    from .result import PretrainResult

PROG = "clae-fast pretrain"
EXTRAS = ("torchvision", "mlxtend", "sklearn", "tqdm", "matplotlib", "safetensors")
DESCRIPTION = """\
Train an encoder by contrast, with adversarial examples (CLAE) unless --no-clae is given, then
compare its weighted kNN accuracy with raw pixels and with the untrained encoder. With the
defaults, a small encoder on mnist5k, it ends within three minutes on two CPU cores."""
EPILOG = """\
files in the output folder, each written whole:
  config.json          the settings
  metrics.jsonl        loss, learning rate, images/s, kNN accuracy, a line at a time
  checkpoints/         the last two; --resume goes on from the newest
  curves.png           the metrics
  adversarial.png      views, adversarial images, amplified perturbation (only with CLAE)
  encoder.safetensors  the trained encoder, main BatchNorm; the settings are its metadata
  result.json          settings, loss per epoch, kNN accuracies, seconds, versions

examples:
  clae-fast pretrain
  clae-fast pretrain --method plain --no-clae --epochs 5
  clae-fast pretrain --preset simclr-cifar10 --data-dir data --download --device cuda
  clae-fast pretrain --data folder --data-dir photos --encoder resnet18 --image-size 96
  clae-fast pretrain --resume runs/simclr-clae-mnist5k
  torchrun --nproc-per-node=4 -m clae_fast pretrain --data folder --data-dir photos

Under torchrun every process takes its share of each batch; the first one writes and prints.
"""


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> argparse.ArgumentParser:
    """Register `pretrain`; `args.run(args)` then returns the exit code."""
    parser = add_command(
        subparsers,
        PROG,
        "train an encoder with or without CLAE and evaluate it by kNN",
        DESCRIPTION,
        EPILOG,
    )
    run_group = parser.add_argument_group("run")
    run_group.add_argument(
        "--preset",
        default=None,
        metavar="NAME",
        help="published settings, each of which another option may override: " + ", ".join(PRESETS),
    )
    run_group.add_argument(
        "--output",
        type=Path,
        default=None,
        metavar="DIR",
        help="folder for the results (default: runs/<method>[-clae]-<data>, numbered on where "
        "that holds a run)",
    )
    run_group.add_argument(
        "--overwrite", action="store_true", help="replace the run that --output holds"
    )
    run_group.add_argument(
        "--resume",
        type=Path,
        default=None,
        metavar="DIR",
        help="go on with the run in DIR, with its settings, to the same numbers as without the "
        "break; beside it only "
        + ", ".join("--" + name.replace("_", "-") for name in RESUME_MAY_CHANGE),
    )
    add_settings(parser)
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """Train, write, report. Exit codes: 0; 1 failed; 2 wrong option; 130 Ctrl-C."""
    return answer(PROG, lambda: _run(args))


def answer(prog: str, job: Callable[[], int]) -> int:
    """Run a command; what users can cause becomes one line on stderr and an exit code.

    Of several processes the first prints what all of them meet.
    """

    if launch().size > 1 and prog != PROG:
        return fail(prog, 2, f"torchrun: expected one process, only {PROG} takes several")

    def one_line(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if launch().rank == 0:
            print(f"{prog}: warning: {' '.join(str(message).split())}", file=sys.stderr)

    try:
        with warnings.catch_warnings():
            warnings.showwarning = one_line
            return job()
    except ConfigError as error:
        return fail(prog, 2, option_of(error))
    except KeyboardInterrupt as error:
        if launch().rank == 0:
            print(f"{prog}: {getattr(error, 'message', 'interrupted')}", file=sys.stderr)
        return 130


def fail(prog: str, code: int, message: str, *, of_all: bool = True) -> int:
    """Print one line; returns the code. What is not `of_all` processes each prints for itself."""
    here = launch()
    if not of_all and here.size > 1:
        message = f"process {here.rank} of {here.size}: {message}"
    if not of_all or here.rank == 0:
        print(f"{prog}: error: {' '.join(message.split())}", file=sys.stderr)
    return code


def missing_extras() -> str | None:
    """What to install for the commands that train and evaluate, or None."""
    missing = [name for name in EXTRAS if importlib.util.find_spec(name) is None]
    return f'needs {", ".join(missing)}: pip install "clae-fast[train]"' if missing else None


def _run(args: argparse.Namespace) -> int:
    given = given_settings(args)
    if args.resume is None:
        config = preset(args.preset, **given) if args.preset else PretrainConfig(**given)
        folder = _output_folder(args, config)
        for name, why in without_effect(config, given).items():
            warnings.warn(f"{option_name(name)} has no effect {why}", stacklevel=2)
    if reason := missing_extras():
        return fail(PROG, 1, reason)
    if args.resume is not None:
        folder, config = args.resume, _resumed(args, given)

    from .processes import is_known_to_all, is_loss_of_another, run_processes

    try:
        with run_processes(config) as processes:
            return _train(args, config, folder, processes)
    except ConfigError:
        raise
    except RuntimeError as error:
        if launch().size == 1 or not (is_known_to_all(error) or is_loss_of_another(error)):
            raise
        reason = str(error) if is_known_to_all(error) else f"another process ended ({error})"
        return fail(PROG, 1, reason)


def _train(
    args: argparse.Namespace, config: PretrainConfig, folder: Path, processes: Processes
) -> int:
    from .checkpoint import CheckpointError, checkpoints
    from .files import unwritable_reason
    from .loop import pretrain
    from .monitor import NonFiniteLossError
    from .output import write_result
    from .processes import is_known_to_all

    def check_folder() -> Path:
        if reason := unwritable_reason(folder):
            raise ConfigError("output", folder, f"a folder that can be written ({reason})")
        if args.resume is not None and not checkpoints(folder):
            print(f"{PROG}: {folder} has no checkpoint yet, starting anew", file=sys.stderr)
        return folder

    folder = processes.first_alone(check_folder)  # the others may see runs in other places
    try:
        result = pretrain(
            config,
            progress=True,
            folder=folder,
            resume=args.resume is not None,
            overwrite=args.overwrite,
        )
        paths = processes.first_alone(lambda: write_result(result, folder))
    except (NonFiniteLossError, CheckpointError) as error:
        return fail(PROG, 1, str(error))
    except (OSError, ImportError) as error:
        return fail(PROG, 1, str(error), of_all=is_known_to_all(error))
    if processes.first:
        _report(result, paths)
    return 0


def _output_folder(args: argparse.Namespace, config: PretrainConfig) -> Path:
    first = launch().rank == 0  # which says where
    if args.output is not None:
        folder: Path = args.output
        if first and holds_run(folder) and not args.overwrite:
            raise ConfigError(
                "output", folder, "a folder without a run (--overwrite replaces it, --resume DIR "
                "goes on with it)",
            )  # fmt: skip
        return folder
    name = f"{config.method}{'-clae' if config.clae else ''}-{config.data}"
    if args.overwrite or not first:
        return Path("runs") / name
    numbered = (Path("runs") / (name + (f"-{n}" if n > 1 else "")) for n in itertools.count(1))
    return next(folder for folder in numbered if not holds_run(folder))


def _resumed(args: argparse.Namespace, given: dict[str, Any]) -> PretrainConfig:
    from .runs import read_config

    folder: Path = args.resume
    for option in ("preset", "output"):
        if getattr(args, option) is not None:
            raise ConfigError(option, getattr(args, option), "no such option beside --resume")
    for name, value in given.items():
        if name not in RESUME_MAY_CHANGE:
            raise ConfigError(
                name, value, "no such option beside --resume: the run's settings hold"
            )
    try:
        config = read_config(folder)
    except ConfigError as error:
        raise ConfigError("resume", folder, error.expected) from error
    if (folder / RESULT).exists():
        raise ConfigError(
            "resume", folder, "a run that is not finished (to train longer, start one with more "
            "epochs)",
        )  # fmt: skip
    return replace(config, **given)


def _report(result: PretrainResult, paths: list[Path]) -> None:
    config = result.config
    name = METHOD_NAMES[config.method] + (" with CLAE" if config.clae else "")
    epochs = f"{config.epochs} epoch{'s' * (config.epochs > 1)}"
    print(
        f"{name} on {result.data}: {epochs} in {result.train_seconds:.0f} s, "
        f"{result.images_per_second:,.0f} images/s\n"
    )
    if result.knn_trained is None:
        print("no kNN accuracy: the images have no labels\n")
    else:
        print(
            "weighted kNN accuracy (k = 200, test split)\n"
            f"  raw pixels         {result.knn_pixels:6.1%}\n"
            f"  untrained encoder  {result.knn_untrained:6.1%}\n"
            f"  trained encoder    {result.knn_trained:6.1%}"
        )
        if result.best_knn is not None:
            epoch, best = result.best_knn
            print(f"  best epoch         {best:6.1%}  (epoch {epoch}: chosen on the test images)")
        print()
    for path in paths:
        print(path)
    if not config.clae:
        print("adversarial.png is only made with --clae: without it there are no attacks")
