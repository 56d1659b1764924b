"""The command line: `bnjax list` and `bnjax run STUDY`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from bnjax.studies import STUDIES, Options

_FORMAT = argparse.RawDescriptionHelpFormatter


class _Parser(argparse.ArgumentParser):
    """Says in one line what is wrong."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return value


def _sizes(text: str) -> tuple[int, ...]:
    sizes = tuple(_positive(part) for part in text.split(","))
    if len(set(sizes)) != len(sizes):
        raise argparse.ArgumentTypeError(f"expected different batch sizes, got {text!r}")
    return sizes


def _parser() -> _Parser:
    parser = _Parser(prog="bnjax", description="Batch norm in JAX: the classic studies, run end to end.")
    parser.add_argument("--version", action="store_true", help="print the versions of bnjax and jax")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)
    commands.add_parser("list", help="show the studies")
    run = commands.add_parser("run", help="run a study: train, print its tables, save its numbers and figures")
    studies = run.add_subparsers(dest="study", metavar="STUDY", required=True, parser_class=_Parser)
    for study in STUDIES.values():
        one = studies.add_parser(
            study.name,
            help=study.summary,
            formatter_class=_FORMAT,
            description=f"{study.summary}.\nSource: {study.source}.\n\n"
            "Trains every variant from all seeds at once, prints mean ± 95 % interval over seeds and the claims\n"
            "of the source with their verdicts, and saves results.json, curves.npz, summary.md and figures.",
        )
        one.add_argument(
            "--seeds", type=_positive, default=study.seeds, metavar="N", help=f"number of seeds (default {study.seeds})"
        )
        one.add_argument("--epochs", type=_positive, metavar="N", help=f"epochs of training (default {study.epochs})")
        one.add_argument(
            "--out",
            type=Path,
            metavar="DIR",
            default=Path("runs") / study.name,
            help=f"where to save (default runs/{study.name})",
        )
        one.add_argument("--quiet", action="store_true", help="print nothing but errors")
        if study.image_data:
            one.add_argument(
                "--dataset", choices=("mnist", "fashion_mnist"), default="mnist", help="image set (default mnist)"
            )
            one.add_argument(
                "--data-dir",
                metavar="DIR",
                help="where TFDS's prepared sets are (default $TFDS_DATA_DIR or TFDS's own)",
            )
            one.add_argument(
                "--batch-sizes", type=_sizes, metavar="A,B,…", help="batch sizes to sweep (default 16,32,64,128,256)"
            )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
      arguments: without the program's name; those of the process by default.

    Returns:
      0, 2 for bad input (with one line on standard error), 130 after Ctrl-C.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.version:
        return _print_versions()
    if options.command == "list":
        return _print_studies()
    if options.command is None:
        parser.print_help()
        return 0
    try:
        return _run(options)
    except KeyboardInterrupt:
        print("bnjax: interrupted; nothing was saved", file=sys.stderr)
        return 130


def _run(options: argparse.Namespace) -> int:
    from bnjax.data import DataError
    from bnjax.studies import console

    out = options.out
    if out.exists() and not out.is_dir():
        print(f"bnjax: error: --out must be a directory, but {out} is a file", file=sys.stderr)
        return 2
    chosen = {key: getattr(options, key, None) for key in ("dataset", "data_dir", "batch_sizes")}
    try:
        out.mkdir(parents=True, exist_ok=True)
        console.run_study(STUDIES[options.study], Options(options.seeds, options.epochs, **chosen), out, options.quiet)
    except (DataError, ValueError, OSError) as error:
        print(f"bnjax: error: {error}", file=sys.stderr)
        return 2
    return 0


def _print_versions() -> int:
    from importlib.metadata import version

    print(f"bnjax {version('bnjax')}, jax {version('jax')}, flax {version('flax')}")
    return 0


def _print_studies() -> int:
    width = max(map(len, STUDIES))
    for study in STUDIES.values():
        print(
            f"{study.name:{width}}  {study.summary}\n"
            f"{'':{width}}  {study.source}; {study.seeds} seeds, epochs: {study.epochs}"
        )
    print("\nRun one with: bnjax run STUDY (see bnjax run STUDY --help)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
