"""The walk-through's options; nothing here needs the packages that the walk-through itself does."""

from __future__ import annotations

import argparse

from .network import HIDDEN


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m fused_ops demo``."""
    parser.add_argument("--names", metavar="FILE", help="text file with one name per line (default: US first names)")
    parser.add_argument("--steps", type=_positive, default=20000, help="training steps (default 20000)")
    parser.add_argument("--hidden", type=_positive, default=HIDDEN, help=f"hidden units (default {HIDDEN})")
    parser.add_argument("--start", default="", metavar="TEXT", help="what every sampled name begins with")
    parser.add_argument("--out", default="demo", metavar="DIR", help="where the figures go (default ./demo)")


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
    return value
