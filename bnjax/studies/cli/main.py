"""The command line: `bnjax list`, `bnjax run STUDY`, `bnjax claims`, `bnjax report` and `bnjax compile STEP`."""

import argparse
import os
import sys
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from bnjax._extras import MissingExtraError
from bnjax.studies import COMPILABLE, LOGS, STUDIES, Options, ParallelOptions, Study, default_text

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


def _parser() -> _Parser:
    parser = _Parser(
        prog="bnjax",
        description="Batch norm in JAX: the classic studies, run end to end.",
        epilog="With BNJAX_KEEP_MEMORY=1 in the environment the memory of freed arrays is kept for the next ones, "
        "which is faster on CPU (glibc only).",
    )
    parser.add_argument("--version", action="store_true", help="print the versions of bnjax and jax")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)
    commands.add_parser("list", help="show the studies")
    run = commands.add_parser("run", help="run a study: train, print its tables, save its numbers and figures")
    studies = run.add_subparsers(dest="study", metavar="STUDY", required=True, parser_class=_Parser)
    for study in STUDIES.values():
        command = studies.add_parser(
            study.name,
            help=study.summary,
            formatter_class=_FORMAT,
            description=f"{study.summary}.\nSource: {study.source}.\n\n"
            f"{_what_it_does(study)},\nand saves results.json, curves.npz, summary.md and figures.",
        )
        _add_options(command, study.options)
        command.add_argument(
            "--out",
            type=Path,
            metavar="DIR",
            default=Path("runs") / study.name,
            help=f"where to save (default runs/{study.name})",
        )
        command.add_argument("--quiet", action="store_true", help="print nothing but errors")
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
        formatter_class=_FORMAT,
        description="Prints every claim of the sources beside what was measured and the verdict: reproduced, not\n"
        "reproduced, undecided (at this number of seeds), or wrong in the source. Runs the studies whose results are\n"
        "missing in --out, continues what was interrupted, and saves ledger.json and ledger.md there. All studies at\n"
        "full length take hours on a CPU.",
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
    claims.add_argument("--quiet", action="store_true", help="print nothing but the ledger")


def _what_it_does(study: Study) -> str:
    how = "with each step split over all devices" if issubclass(study.options, ParallelOptions) else "at all seeds"
    return (
        f"Trains every variant, {how}, prints mean ± 95 % interval over seeds and the claims of the source\n"
        "with their verdicts"
    )


def _add_compile(commands) -> None:
    compile_ = commands.add_parser(
        "compile",
        help="compile a training step for TPU chips that are not at hand, and say what it needs",
        formatter_class=_FORMAT,
        description="Compiles the training step of a study's network (or a residual network) with synchronized batch\n"
        "norm ahead of time, with TPU's own compiler (pip install 'bnjax[tpu]'), on any machine. Reports whether it\n"
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
      arguments: without the program's name; those of the process by default.

    Returns:
      0, 1 for a step that does not compile, 2 for bad input (with one line on standard error), 130 after Ctrl-C.
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
    if os.environ.get("BNJAX_KEEP_MEMORY", "0") not in ("", "0"):
        from bnjax.training.host import keep_freed_memory

        keep_freed_memory()
    try:
        return {"compile": _compile, "run": _run, "claims": _claims, "report": _report}[options.command](options)
    except MissingExtraError as error:
        print(f"bnjax: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        hint = {
            "run": "; --resume continues from the last checkpoint, if there is one",
            "claims": "; the same command continues",
        }
        print(f"bnjax: interrupted{hint.get(options.command, '')}", file=sys.stderr)
        return 130


def _run(options: argparse.Namespace) -> int:
    from bnjax.studies.cli import console
    from bnjax.studies.data import DataError
    from bnjax.training.checkpoint import CheckpointError

    out = options.out
    if out.exists() and not out.is_dir():
        print(f"bnjax: error: --out must be a directory, but {out} is a file", file=sys.stderr)
        return 2
    saving = {"resume": options.resume, "checkpoint_every": options.checkpoint_every, "log": options.log}
    study = STUDIES[options.study]
    try:
        values = study.load().Options(**{name: getattr(options, name) for name in study.fields})
        if isinstance(values, ParallelOptions):
            _start_devices(values)
        out.mkdir(parents=True, exist_ok=True)
        console.run_study(study, values, out, options.quiet, **saving)
    except (CheckpointError, DataError, RuntimeError, ValueError, OSError) as error:
        if not _several_processes(options) and isinstance(error, RuntimeError):
            raise
        text = str(error).strip().splitlines()[0] if isinstance(error, RuntimeError) else error
        print(f"bnjax: error: {text}", file=sys.stderr)
        if _several_processes(options):
            sys.stderr.flush()
            os._exit(2)  # else the exit would wait for the other processes, one of which may be dead
        return 2
    return 0


def _claims(options: argparse.Namespace) -> int:
    from bnjax.studies.cli import console
    from bnjax.training.checkpoint import CheckpointError

    names = options.study or list(STUDIES)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        console.print_ledger(names, options.seeds, options.fast, options.out, options.data_dir, options.quiet)
    except (CheckpointError, ValueError, OSError) as error:
        print(f"bnjax: error: {error}", file=sys.stderr)
        return 2
    return 0


def _report(options: argparse.Namespace) -> int:
    from bnjax.studies.cli.report import write_report

    out = options.out or options.run_dir / "report.html"
    try:
        count = write_report(options.run_dir, out)
    except (ValueError, OSError) as error:
        print(f"bnjax: error: {error}", file=sys.stderr)
        return 2
    print(f"{out}: {count} {'study' if count == 1 else 'studies'}, {out.stat().st_size / 2**20:.1f} MiB")
    return 0


def _compile(options: argparse.Namespace) -> int:
    import jax

    jax.config.update("jax_platforms", "cpu")
    from bnjax.studies.cli import console

    try:
        fits = console.compile_step(options.step, options.topology, options.parallel, options.batch, options.json)
    except (ImportError, ValueError, OSError) as error:
        print(f"bnjax: error: {error}", file=sys.stderr)
        return 2
    return 0 if fits else 1


def _several_processes(options: Any) -> bool:
    return getattr(options, "distributed", False) or getattr(options, "coordinator", None) is not None


def _start_devices(options: ParallelOptions) -> None:
    """Starts the distributed runtime, and checks that there are as many devices as asked for."""
    import jax

    from bnjax import training

    if len({value is None for value in (options.coordinator, options.processes, options.process_id)}) > 1:
        raise ValueError("--coordinator, --processes and --process-id go together.")
    if options.devices:
        jax.config.update("jax_num_cpu_devices", options.devices)
    if _several_processes(options):
        training.initialize(options.coordinator, options.processes, options.process_id)
    count = jax.local_device_count()
    if options.devices and count != options.devices:
        raise ValueError(
            f"--devices {options.devices} were asked for, this process has {count} ({jax.default_backend()}); "
            "hide some from it (CUDA_VISIBLE_DEVICES, TPU_VISIBLE_DEVICES) or ask for those."
        )


def _print_versions() -> int:
    from importlib.metadata import version

    print(f"bnjax {version('bnjax')}, jax {version('jax')}, flax {version('flax')}")
    return 0


def _print_studies() -> int:
    width = max(map(len, STUDIES))
    for study in STUDIES.values():
        seeds = study.fields["seeds"].default
        print(f"{study.name:{width}}  {study.summary}\n{'':{width}}  {study.source}; {seeds} seeds, {study.length}")
    print("\nRun one with: bnjax run STUDY (see bnjax run STUDY --help)")
    return 0
