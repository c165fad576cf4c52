"""`clae-fast` or `python -m clae_fast`: pretrain, evaluate, compare, info."""

import argparse
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code (2: wrong arguments)."""
    from . import __version__
    from .info import add_parser as add_info
    from .pretraining.cli import add_parser as add_pretrain
    from .pretraining.compare_cli import add_parser as add_compare
    from .pretraining.evaluate_cli import add_parser as add_evaluate

    parser = argparse.ArgumentParser(
        prog="clae-fast",
        description="Contrastive learning with adversarial examples (CLAE).",
    )
    parser.add_argument("--version", action="version", version=f"clae-fast {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    add_pretrain(commands)
    add_evaluate(commands)
    add_compare(commands)
    add_info(commands)
    args = parser.parse_args(argv)
    try:
        code: int = args.run(args)
    except KeyboardInterrupt:
        print("clae-fast: interrupted", file=sys.stderr)
        return 130
    return code


if __name__ == "__main__":
    sys.exit(main())
