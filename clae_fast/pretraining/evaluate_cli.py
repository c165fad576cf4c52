"""`clae-fast evaluate`: probes and export of a run's encoder. Imports torch only to run."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .cli import answer, fail, missing_extras
from .config import ConfigError
from .options import add_command

if TYPE_CHECKING:
    from .config import PretrainConfig
    from .data import ImageData
    from .evaluate import Evaluation
    from .runs import LoadedRun

PROG = "clae-fast evaluate"
DESCRIPTION = """\
Measure the encoder of a run: weighted kNN, scikit-learn's logistic regression, and the published
linear probe (Adam). Every image is encoded once. A run that is not finished is measured at its
last checkpoint."""
EPILOG = """\
examples:
  clae-fast evaluate runs/simclr-clae-mnist5k
  clae-fast evaluate runs/simclr-clae-mnist5k --probes knn --features z
  clae-fast evaluate runs/simclr-clae-mnist5k --probes knn --export encoder.pt2
"""


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> argparse.ArgumentParser:
    """Register `evaluate`; `args.run(args)` then returns the exit code."""
    parser = add_command(
        subparsers,
        PROG,
        "kNN, linear probes and export of a trained encoder",
        DESCRIPTION,
        EPILOG,
        arguments="RUN ",
    )
    add = parser.add_argument
    add("folder", type=Path, metavar="RUN", help="folder of a run of `clae-fast pretrain`")
    add(
        "--probes",
        nargs="+",
        default=["knn", "logistic", "adam"],
        metavar="NAME",
        help="of knn, logistic, adam (default: all)",
    )
    add(
        "--features",
        default=None,
        metavar="NAME",
        help="what the linear probes see: h, before the projector, or z, after it (default: as "
        "published, h for simclr, z for plain and uel)",
    )
    add("--k", type=int, default=200, metavar="N", help="neighbours (default: 200)")
    add(
        "--sigma",
        type=float,
        default=None,
        metavar="X",
        help="temperature of the kNN vote (default: 0.1; for z as published, 0.5 with simclr)",
    )
    add(
        "--probe-epochs",
        type=int,
        default=None,
        metavar="N",
        help="epochs of the Adam probe (default: as published, 1000, or 200 for plain and uel on "
        "tiny-imagenet)",
    )
    add(
        "--probe-batch-size",
        type=int,
        default=None,
        metavar="N",
        help="of the Adam probe (default: as published, 256 for simclr, else 128)",
    )
    add("--seed", type=int, default=0, metavar="N", help="of the Adam probe (default: 0)")
    add("--data-dir", default=None, metavar="DIR", help="of the images (default: as in the run)")
    add("--device", default=None, metavar="NAME", help="cpu, cuda or auto (default: as in the run)")
    add(
        "--export",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="write the plain encoder: .safetensors, .pt2 (torch.export) or .onnx; may be repeated",
    )
    add(
        "--export-what",
        default="h",
        metavar="NAME",
        help="what the exported model returns: h or z (default: h)",
    )
    add(
        "--output",
        type=Path,
        default=None,
        metavar="FILE",
        help="where the figures go (default: RUN/evaluation.json)",
    )
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """Measure, export, report. Exit codes: 0; 1 failed; 2 wrong option; 130 Ctrl-C."""
    return answer(PROG, lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    if reason := missing_extras():
        return fail(PROG, 1, reason)

    from .checkpoint import CheckpointError
    from .data import load_data
    from .evaluate import evaluate
    from .export import WHAT, check_export, export_encoder
    from .files import unwritable_reason, write_whole
    from .runs import load_run

    if args.export_what not in WHAT:
        raise ConfigError("export_what", args.export_what, "h or z")
    for path in args.export:
        check_export(path)
    output: Path = args.output or args.folder / "evaluation.json"
    try:
        loaded = load_run(args.folder)
        for option, folder in (
            ("output", output.parent),
            *(("export", p.parent) for p in args.export),
        ):
            if reason := unwritable_reason(folder):
                raise ConfigError(option, folder, f"a folder that can be written ({reason})")
        changes = {"data_dir": args.data_dir, "device": args.device}
        config = replace(loaded.config, **{k: v for k, v in changes.items() if v is not None})
        data = load_data(
            config.data, config.data_dir, download=config.download, memory_gib=config.memory_gib
        )
        _same_images(loaded, config, data)
        evaluation = evaluate(
            loaded.model,
            data,
            config,
            probes=args.probes,
            features=args.features,
            k=args.k,
            sigma=args.sigma,
            probe_epochs=args.probe_epochs,
            probe_batch_size=args.probe_batch_size,
            seed=args.seed,
            progress=True,
        )
        facts = {
            "run": str(args.folder),
            "epoch": loaded.epoch,
            "finished": loaded.finished,
            "config": config.to_dict(),
        }
        text = json.dumps(facts | evaluation.to_dict(), indent=2) + "\n"
        output.parent.mkdir(parents=True, exist_ok=True)
        write_whole(output, text.encode())
        for path in args.export:
            export_encoder(
                loaded.model,
                path,
                in_channels=loaded.in_channels,
                image_size=loaded.image_size,
                what=args.export_what,
                metadata=facts,
            )
    except (CheckpointError, OSError, ImportError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        return fail(PROG, 1, str(error))
    _report(evaluation, loaded)
    for path in (output, *args.export):
        print(path)
    return 0


def _same_images(loaded: LoadedRun, config: PretrainConfig, data: ImageData) -> None:
    """The run was trained on images of this data set, seen in this way."""
    from .augmentation import normalization, view_size

    mean, std = normalization(config, data)
    for name, before, now in (
        ("name", loaded.data, data.name),
        ("mean", loaded.mean, tuple(mean)),
        ("std", loaded.std, tuple(std)),
        ("size", loaded.image_size, view_size(config, data)),
    ):
        if before != now:
            raise ConfigError(
                "data",
                config.data,
                f"the images that the run was trained on, of {name} {before}, not {now}; images "
                "of one's own are measured by clae_fast.pretraining.evaluate.evaluate",
            )


def _report(e: Evaluation, loaded: LoadedRun) -> None:
    state = "finished" if loaded.finished else "not finished"
    print(
        f"epoch {loaded.epoch} of {loaded.config.epochs} ({state}); {e.num_train:,} training and "
        f"{e.num_test:,} test images, encoded once in {e.encode_seconds:.1f} s\n"
    )
    if e.knn_h is not None:
        print(
            f"weighted kNN accuracy (k = {e.k}, sigma = {e.sigma:g}; for z {e.sigma_z:g})\n"
            f"  raw pixels           {e.knn_pixels:6.1%}\n"
            f"  h, the features      {e.knn_h:6.1%}\n"
            f"  z, the projection    {e.knn_z:6.1%}"
        )
    if e.logistic is not None or e.adam is not None:
        print(f"linear probe accuracy on {e.features}")
    if e.logistic is not None:
        note = "" if e.logistic.converged else "  (stopped before it converged)"
        print(f"  logistic regression  {e.logistic.accuracy:6.1%}{note}")
    if e.adam is not None:
        print(
            f"  Adam, last epoch     {e.adam.accuracy:6.1%}\n"
            f"  Adam, best epoch     {e.adam.best:6.1%}  (epoch {e.adam.best_epoch}: chosen on the "
            "test images, as published results are)"
        )
    print()
