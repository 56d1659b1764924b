"""The command line: `bnjax list`, `bnjax run STUDY`, `bnjax claims`, `bnjax report` and `bnjax compile STEP`."""

import argparse
import errno
import os
import shlex
import shutil
import signal
import sys
import tempfile
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bnjax._extras import MissingExtraError
from bnjax.studies import STUDIES, ParallelOptions
from bnjax.studies.cli.arguments import make_parser
from bnjax.studies.cli.output import safe_output


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
      arguments: without the program's name; those of the process by default.

    Returns:
      0; 1 for a step that does not compile, or where standard output can't be written to; 2 for bad input (with one
      line on standard error); 130 after Ctrl-C, and 143 after SIGTERM.
    """
    with safe_output() as output:
        try:
            status: Any = _main(sys.argv[1:] if arguments is None else list(arguments))
        except SystemExit as end:  # of the parser, as after --help
            status = end
        output.flush()
        is_closed = getattr(output.error, "errno", None) == errno.EPIPE  # as of `| head`
        if output.error is not None and not is_closed:
            reason = getattr(output.error, "strerror", None) or output.error
            print(f"bnjax: output is lost ({reason}); files are written all the same", file=sys.stderr, flush=True)
            status = 1 if isinstance(status, SystemExit) else status or 1
    if isinstance(status, SystemExit):
        raise status
    return status


def _again(options: argparse.Namespace, *more: str) -> str:
    """Returns the command once more, with further arguments in place of those that they exclude."""
    kept, words = [], iter(options.arguments)
    for word in words:
        if "--out" in more and word.startswith("--out"):
            next(words) if word == "--out" else None
        elif word not in more and not (more[:1] in (("--force",), ("--resume",)) and word in ("--force", "--resume")):
            kept.append(word)
    return shlex.join(["bnjax", *kept, *more])


def _say(error: Any) -> None:
    """Prints what is wrong, on one line."""
    from bnjax.studies.evidence.record import plain

    print("bnjax: error:", plain(" ".join(str(error).splitlines())), file=sys.stderr)


def _main(arguments: Sequence[str]) -> int:
    parser = make_parser()
    options = parser.parse_args(arguments)
    options.arguments = arguments
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
    if "matplotlib" not in sys.modules:  # figures are drawn to files, whatever the environment says of windows
        os.environ["MPLBACKEND"] = "agg"
    try:
        return {"compile": _compile, "run": _run, "claims": _claims, "report": _report}[options.command](options)
    except MissingExtraError as error:
        _say(error)
        return 2
    except KeyboardInterrupt as error:
        is_saved = options.command == "run" and any((options.out / "checkpoints").glob("*/*/"))
        again = _again(options, *["--resume"] * is_saved)
        what = "to go on" if is_saved or options.command == "claims" else "nothing was saved yet; to begin anew"
        print(f"bnjax: {str(error) or 'interrupted'}; {what}: {again}", file=sys.stderr)
        return _end(options, 128 + getattr(error, "signal", signal.SIGINT))


def _run(options: argparse.Namespace) -> int:
    import jax

    from bnjax.studies.cli import console, processes
    from bnjax.studies.cli.folder import FolderError
    from bnjax.studies.data import DataError
    from bnjax.studies.data.sets import first_line
    from bnjax.studies.engine.saving import stopping_on_signals
    from bnjax.training.checkpoint import CheckpointError

    if _several_processes(options):
        if processes.WORKER not in os.environ:
            return processes.watch(options.arguments)
        processes.end_with_watcher()
    saving = {name: getattr(options, name) for name in ("resume", "force", "checkpoint_every", "log")}
    study = STUDIES[options.study]
    try:
        values = study.load().Options(**{name: getattr(options, name) for name in study.fields})
        if isinstance(values, ParallelOptions):
            _start_devices(values)
        if _several_processes(options):
            own = ("process_id", "devices", "quiet", "open", "arguments")
            processes.check_equal({name: value for name, value in vars(options).items() if name not in own})
        _check_backend()
        with stopping_on_signals():
            console.run_study(study, values, options.out, options.quiet, **saving)
    except FolderError as error:
        ways = [f"to {what}: {_again(options, *words)}" for what, words in error.ways.items()]
        _say("; ".join([str(error), *ways]))
        return _end(options, 2)
    except (CheckpointError, DataError, RuntimeError, ValueError, OSError) as error:
        if not _several_processes(options) and isinstance(error, RuntimeError):
            raise
        if isinstance(error, jax.errors.JaxRuntimeError):
            lost = f"the other processes of this run are lost ({first_line(error)})"
            error = f"{lost}; to go on: {_again(options, '--resume')}"
        _say(error)
        return _end(options, 2)
    return _open(options) if jax.process_index() == 0 else 0


def _end(options: argparse.Namespace, status: int) -> int:
    """Returns the exit status of a failure, or ends one of several processes with it at once."""
    if _several_processes(options):
        sys.stderr.flush()
        os._exit(status)  # else the exit would wait for the other processes, one of which may be dead
    return status


def _claims(options: argparse.Namespace) -> int:
    from bnjax.studies.cli import console
    from bnjax.studies.engine.saving import stopping_on_signals
    from bnjax.training.checkpoint import CheckpointError

    names = options.study or list(STUDIES)
    try:
        if options.data_dir and not os.path.isdir(options.data_dir):
            raise ValueError(f"--data-dir {options.data_dir} is no directory")
        _check_backend()
        options.out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=options.out):
            pass
        with stopping_on_signals():
            console.print_ledger(names, options.seeds, options.fast, options.out, options.data_dir, options.quiet)
    except (CheckpointError, ValueError, OSError) as error:
        _say(error)
        return 2
    return _open(options)


def _report(options: argparse.Namespace) -> int:
    from bnjax.studies.cli.report import write_report
    from bnjax.studies.evidence.record import plain

    out = options.out or options.run_dir / "report.html"
    try:
        if not options.run_dir.is_dir():
            raise ValueError(f"RUN_DIR {options.run_dir} is no directory")
        if out.suffix not in (".html", ".htm"):
            raise ValueError(f"--out must end with .html, got {out}")
        count, missing = write_report(options.run_dir, out)
    except (ValueError, OSError) as error:
        _say(error)
        return 2
    for text in missing:
        print(f"bnjax: not shown: {plain(text)}", file=sys.stderr)
    print(f"{out}: {count} {'study' if count == 1 else 'studies'}, {out.stat().st_size / 2**20:.1f} MiB")
    return _open(options, out)


def _open(options: argparse.Namespace, page: Path | None = None) -> int:
    """Opens a report, by default the one in --out, where that is asked for; returns 0, with a browser or without."""
    if options.open:
        from bnjax.studies.cli.report import PAGE, open_page

        open_page(page or options.out / PAGE)
    return 0


def _compile(options: argparse.Namespace) -> int:
    import jax

    jax.config.update("jax_platforms", "cpu")
    from bnjax.studies.cli import console

    try:
        if options.json and options.json.suffix != ".json":
            raise ValueError(f"--json must end with .json, got {options.json}")
        fits = console.compile_step(options.step, options.topology, options.parallel, options.batch, options.json)
    except (ImportError, ValueError, OSError) as error:
        _say(error)
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
        report = lambda text: print(f"bnjax: {text}", file=sys.stderr, flush=True)  # noqa: E731
        training.initialize(options.coordinator, options.processes, options.process_id, report=report)
    count = jax.local_device_count()
    if options.devices and count != options.devices:
        raise ValueError(
            f"--devices {options.devices} were asked for, this process has {count} ({jax.default_backend()}); "
            "hide some from it (CUDA_VISIBLE_DEVICES, TPU_VISIBLE_DEVICES) or ask for those."
        )


def _check_backend() -> None:
    """Raises ValueError where JAX can't start on the platforms that it is told to use."""
    import jax

    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        platforms = jax.config.values.get("jax_platforms") or "any"
        reason = str(error).strip().splitlines()[:1]
        raise ValueError(
            f"JAX can't start on the platform {platforms} ({reason[0][:160] if reason else 'it is not there'}). Choose "
            "another: JAX_PLATFORMS=cpu"
        ) from error


def _print_versions() -> int:
    from importlib.metadata import version

    print(f"bnjax {version('bnjax')}, jax {version('jax')}, flax {version('flax')}")
    return 0


def _print_studies() -> int:
    columns, indent = shutil.get_terminal_size().columns, 2 + max(map(len, STUDIES))
    for study in STUDIES.values():
        about = f"{study.source}; {study.fields['seeds'].default} seeds, {study.length}"
        for name, text in ((study.name, study.summary), ("", about)):
            print(textwrap.fill(text, columns, initial_indent=f"{name:{indent}}", subsequent_indent=" " * indent))
    print("\nRun one with: bnjax run STUDY (see bnjax run STUDY --help)")
    return 0
