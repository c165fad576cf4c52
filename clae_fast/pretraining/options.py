"""The settings as command-line options: one option a field of PretrainConfig."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import fields
from typing import Any, get_args, get_type_hints

from .config import ConfigError, Milestones, PretrainConfig


def add_settings(parser: argparse.ArgumentParser, leave_out: tuple[str, ...] = ()) -> None:
    """Add every field; the namespace then holds only those that were given."""
    hints = get_type_hints(PretrainConfig)
    groups: dict[str, Any] = {}
    for field in fields(PretrainConfig):
        if field.name in leave_out:
            continue
        name = field.metadata["group"]
        group = groups.setdefault(name, None) or parser.add_argument_group(name)
        groups[name] = group
        hint, text = hints[field.name], field.metadata["help"]
        if hint is not bool and field.default not in (None, ()):
            shown = field.default
            shown = f"{shown:g}" if isinstance(shown, float) else shown
            text = f"{text} (default: {shown})"
        common: dict[str, Any] = {
            "dest": field.name,
            "default": argparse.SUPPRESS,
            "help": text.replace("%", "%%"),
        }
        option = "--" + field.name.replace("_", "-")
        if hint is bool:
            on = f"{'' if field.default else 'no-'}{option[2:]}"
            common["help"] += f" (default: --{on})"
            group.add_argument(option, action=argparse.BooleanOptionalAction, **common)
        else:
            kind = next(k for k in (hint, *get_args(hint)) if k in (int, float, str, Milestones))
            kind = {float: number, Milestones: milestones}.get(kind, kind)
            group.add_argument(option, type=kind, metavar=field.metadata["metavar"], **common)


def add_command(
    subparsers: argparse._SubParsersAction[Any],
    prog: str,
    summary: str,
    description: str,
    epilog: str,
    arguments: str = "",
) -> argparse.ArgumentParser:
    """The parser of one command; its options must be written out in full."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        prog.rpartition(" ")[2],
        help=summary,
        usage=f"{prog} {arguments}[options]",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    return parser


def given_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The fields that the command line gave."""
    return {f.name: getattr(args, f.name) for f in fields(PretrainConfig) if hasattr(args, f.name)}


def option_name(field: str) -> str:
    """`--batch-size` of `batch_size`."""
    return "--" + field.replace("_", "-")


def without_effect(config: PretrainConfig, names: Iterable[str]) -> dict[str, str]:
    """Those of the settings that change nothing in this run, each with the reason."""
    attack = ("attack", "eps", "eps_pixels", "alpha", "aux_momentum", "clamp")
    reasons = dict.fromkeys(attack, "" if config.clae else "without CLAE")
    reasons["momentum"] = "" if config.optimizer == "sgd" else f"with {config.optimizer}"
    reasons["hidden"] = "" if config.projector == "mlp" else f"with projector {config.projector}"
    reasons["projection"] = "" if config.projector != "none" else "without a projector"
    late = config.milestones and all(epoch >= config.epochs for epoch, _ in config.milestones)
    reasons["milestones"] = f"in {config.epochs} epochs" if late else ""
    fetched = config.data.startswith(("cifar", "tiny"))
    reasons["download"] = "" if fetched else f"with data {config.data}"
    return {name: reasons[name] for name in names if reasons.get(name)}


def option_of(error: ConfigError) -> str:
    """The error in the words of the command line."""
    option = "RUN" if error.field == "run" else option_name(error.field)
    value = error.value
    if error.field == "eps_pixels" and isinstance(value, float):
        value = f"{value * 255:.6g}/255"
    if isinstance(value, tuple):
        pairs = all(isinstance(item, tuple) for item in value)
        texts = [":".join(map(str, item)) if pairs else str(item) for item in value]
        value = ("," if pairs else " ").join(texts) or "none"
    shown = "" if value is True else f" {value}"
    return f"{option}{shown}: expected {error.expected}"


def number(text: str) -> float:
    """A number or a fraction such as 8/255."""
    above, slash, below = text.partition("/")
    try:
        return float(above) / float(below) if slash else float(above)
    except (ValueError, ZeroDivisionError) as error:
        raise argparse.ArgumentTypeError(
            f"expected a number such as 0.03 or 8/255, got {text!r}"
        ) from error


def milestones(text: str) -> Milestones:
    """120:0.1,160:0.05 -> ((120, 0.1), (160, 0.05))."""
    try:
        pairs = [pair.split(":") for pair in text.split(",") if pair]
        return tuple((int(epoch), float(factor)) for epoch, factor in pairs)
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"expected epochs and factors such as 120:0.1,160:0.05, got {text!r}"
        ) from error
