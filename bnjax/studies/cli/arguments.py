"""The arguments of the command line, made of the options of the studies."""

import argparse
import difflib
import re
import typing
from pathlib import Path
from typing import Any, NoReturn

from bnjax.studies import COMPILABLE, LOGS, STUDIES, Options, ParallelOptions, Study, default_text


class _Format(argparse.HelpFormatter):
    """Wraps each paragraph of a description."""

    def _fill_text(self, text, width, indent):
        return "\n\n".join(super(_Format, self)._fill_text(part, width, indent) for part in text.split("\n\n"))


class _Parser(argparse.ArgumentParser):
    """Says in one line what is wrong, and what may have been meant; takes no abbreviations."""

    def __init__(self, **options: Any):
        super().__init__(**options, allow_abbrev=False)

    def parse_known_args(self, args=None, namespace=None):
        # Each parser names what it does not know itself: argparse leaves that to the first, which knows no options.
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return namespace, unknown

    def _get_values(self, action, arg_strings):
        if action.nargs is None and arg_strings == ["--"]:  # of which argparse would make an empty list, unread
            raise argparse.ArgumentError(action, "expected one argument, got '--'")
        return super()._get_values(action, arg_strings)

    def error(self, message: str) -> NoReturn:
        words = re.match(r"unrecognized arguments: ([^ =]+)|.*invalid choice: '([^']+)'", message)
        choices = [choice for action in self._actions for choice in action.choices or ()]
        known = self._option_string_actions if words and words[1] else choices
        meant = difflib.get_close_matches((words[1] or words[2]) if words else "", known, 1)
        hint = f"; did you mean {meant[0]}?" if meant else ""
        message = " ".join(message.splitlines())
        self.exit(2, f"{self.prog}: error: {message}{hint} (see {self.prog} --help)\n")


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


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"expected a number of seconds, got {text!r}")
    return value


def make_parser() -> argparse.ArgumentParser:
    """Makes the parser of `bnjax`."""
    parser = _Parser(
        prog="bnjax",
        description="Batch norm in JAX: the classic studies, run end to end.",
        epilog="With BNJAX_KEEP_MEMORY=1 in the environment the memory of freed arrays is kept for the next ones, "
        "which is faster on CPU (glibc only).",
    )
    parser.add_argument("-V", "--version", action="store_true", help="print the versions of bnjax and jax")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)
    commands.add_parser("list", help="show the studies")
    run = commands.add_parser("run", help="run a study: train, print its tables, save its numbers and figures")
    studies = run.add_subparsers(dest="study", metavar="STUDY", required=True, parser_class=_Parser)
    for study in STUDIES.values():
        command = studies.add_parser(
            study.name,
            help=study.summary,
            formatter_class=_Format,
            description=f"{study.summary}.\n\nSource: {study.source}.\n\n"
            f"{_what_it_does(study)}, and saves results.json, curves.npz, summary.md, figures and report.html.",
        )
        _add_options(command, study.options)
        command.add_argument(
            "--out",
            type=Path,
            metavar="DIR",
            default=Path("runs") / study.name,
            help=f"where to save (default runs/{study.name})",
        )
        command.add_argument("-q", "--quiet", action="store_true", help="print nothing but errors")
        _add_open(command)
        command.add_argument(
            "--force", action="store_true", help="replace what --out holds, such as finished results or another study's"
        )
        command.add_argument(
            "--log",
            action="append",
            choices=LOGS,
            default=[],
            help="log scalars, histograms, figures and tables there too (may be repeated; needs bnjax[tensorboard] or "
            "bnjax[wandb])",
        )
        command.add_argument("--resume", action="store_true", help="continue from the checkpoints in --out")
        command.add_argument(
            "--checkpoint-every",
            type=_seconds,
            default=60.0,
            metavar="SECONDS",
            help="time between two checkpoints of a training (default 60)",
        )
    _add_claims(commands)
    report = commands.add_parser("report", help="make one page (HTML) of a directory of results")
    report.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="a study's directory, or one of such, as runs")
    report.add_argument("--out", type=Path, metavar="FILE", help="the page (default RUN_DIR/report.html)")
    _add_open(report)
    _add_compile(commands)
    return parser


def _add_options(parser: argparse.ArgumentParser, options: type[Options]) -> None:
    """Adds an argument for each option of a study, read as the type of its field says."""
    kinds: dict[Any, Any] = {int: _positive, str: str, tuple[int, ...]: _sizes, tuple[str, ...]: _names}
    groups: dict[str, Any] = {"": parser}
    for field in options.fields().values():
        about = field.metadata
        if about["group"] not in groups:
            groups[about["group"]] = parser.add_argument_group(about["group"])
        default = default_text(field)
        given: dict[str, Any] = {"help": about["help"] + (f" (default {default})" if default else "")}
        if field.type is bool:
            given["action"] = "store_true"
        else:
            kind = next(kind for kind in (field.type, *typing.get_args(field.type)) if kind in kinds)  # of `int | None`
            metavar = about["metavar"] or ("N" if kind is int else None)
            given |= {"type": about["read"] or kinds[kind], "default": field.default, "metavar": metavar}
            given["choices"] = about["choices"] or None
        groups[about["group"]].add_argument(f"--{field.name.replace('_', '-')}", **given)


def _add_claims(commands) -> None:
    claims = commands.add_parser(
        "claims",
        help="judge the claims of the sources: run what is missing, print the ledger",
        description="Prints every claim of the sources beside what was measured and the verdict (reproduced, not "
        "reproduced, compatible with a published number, undecided at this number of seeds, or wrong in the source), "
        "then what was learned, a sentence a study. Runs the studies whose results are missing in --out, continues "
        "what was interrupted, and saves ledger.json, ledger.md and report.html there. All studies at full length take "
        "hours on a CPU.",
    )
    claims.add_argument(
        "--study",
        action="append",
        choices=STUDIES,
        metavar="S",
        help=f"only this one (may be repeated): {', '.join(STUDIES)}",
    )
    claims.add_argument("--seeds", type=_positive, metavar="N", help="number of seeds (default each study's own)")
    claims.add_argument(
        "--fast",
        action="store_true",
        help="few seeds, short trainings, no convolutional networks: five minutes on two cores; leaves more undecided",
    )
    claims.add_argument(
        "--out",
        type=Path,
        default=Path("runs"),
        metavar="DIR",
        help="where the studies' directories are (default runs)",
    )
    claims.add_argument("--data-dir", metavar="DIR", help="where TFDS's prepared sets are")
    claims.add_argument("-q", "--quiet", action="store_true", help="print nothing but the ledger")
    _add_open(claims)


def _add_open(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--open", action="store_true", help="open the report in the browser at the end")


def _what_it_does(study: Study) -> str:
    how = "with each step split over all devices" if issubclass(study.options, ParallelOptions) else "at all seeds"
    return (
        f"Trains every variant, {how}, prints mean ± 95 % interval over seeds, the claims of the source with their "
        "verdicts, and what was learned"
    )


def _add_compile(commands) -> None:
    compile_ = commands.add_parser(
        "compile",
        help="compile a training step for TPU chips that are not at hand, and say what it needs",
        description="Compiles the training step of a study's network (or a residual network) with synchronized batch "
        "norm ahead of time, with TPU's own compiler (pip install 'bnjax[tpu]'), on any machine. Reports whether it "
        "fits, the collectives and their bytes, passes over the largest activation, FLOPs, and a bound on its time.",
    )
    compile_.add_argument("step", choices=COMPILABLE, metavar="STEP", help=f"one of {', '.join(COMPILABLE)}")
    compile_.add_argument(
        "--topology",
        required=True,
        metavar="CHIPS",
        help="generation and shape of the slice, such as v5e:2x4, v6e:16x16 or v5p:16x16x16",
    )
    compile_.add_argument(
        "--parallel", choices=("jit", "shard_map"), default="jit", help="how the step is mapped (default jit)"
    )
    compile_.add_argument(
        "--batch", type=_positive, metavar="N", help="examples on each chip (default the study's, 128 for ResNet-50)"
    )
    compile_.add_argument("--json", type=Path, metavar="FILE", help="save the report")
