"""Changes the core in small ways, one at a time, and tells which changes no test notices.

`pip install cosmic-ray coverage && python tools/check_mutations.py [--sample N] [--seed S] [--only NAME …]`

The core is the function, moments, synchronization, variants and layers. Each change ("mutant"), such as another
operator or number, meets the tests of these that ran its line, the quickest and the most noticing first, until one
fails or they have taken `--seconds`. A mutant that all of them pass has survived: it is to be killed by a test, or
explained in tools/equivalent_mutants.toml; what is explained there is not tried. Of the many operators that cosmic-ray
puts in place of another the most alike counts.

All of the some 1,200 mutants take hours on two cores. What was noticed is kept in a record, which a later call goes on
from: it tries again what survived, and what stands in functions that have changed since.
"""

import argparse
import ast
import contextlib
import difflib
import functools
import hashlib
import importlib.machinery
import itertools
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import tomllib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
CORE = ("norm.py", "_moments.py", "_sync.py", "_layers.py", "linen.py", "nnx.py", "variants")
TESTS = ("moments", "norm", "renorm", "statistics_variants", "variants", "linen", "nnx", "compiled", "conformance")
TESTS += ("parallel", "functional", "accumulation", "sync", "compositions", "inference", "losses")
# They look at signatures, whose lines are run when a module is imported.
OF_SIGNATURES = ("test_every_argument_can_be_named_and_options_must_be", "test_an_argument_has_one_default_everywhere")
EXPLAINED = ROOT / "tools" / "equivalent_mutants.toml"
RECORD = ROOT / "tools" / "mutations.jsonl"
COVERED = ROOT / "runs" / "covered.json"
TIMEOUT = 300, 1200  # seconds of processor time, and of waiting
FIRST = 10  # tests that a mutant meets before all others
# Others of a kind are noticed where these are, or are no operation of the values.
PAIRS = {
    *("Add_Sub", "Sub_Add", "Mul_Div", "Div_Mul", "FloorDiv_Mul", "Mod_Mul", "Pow_Mul", "BitAnd_BitOr", "BitOr_BitAnd"),
    *("Eq_NotEq", "NotEq_Eq", "Lt_LtE", "LtE_Lt", "Gt_GtE", "GtE_Gt", "Is_IsNot", "IsNot_Is", "In_NotIn", "NotIn_In"),
    *("USub_UAdd", "Delete_Not"),
}

_FORKING = Lock()


class Mutant(NamedTuple):
    """A change: the module, an operator of cosmic-ray and which of its places, and that place's lines.

    Its name in the record, `key`, holds as long as the function around it stays as it is.
    """

    module: str
    operator: str
    occurrence: int
    first: int
    last: int
    text: str
    key: str

    def __str__(self) -> str:
        return f"{self.module}:{self.first}: {self.operator}, occurrence {self.occurrence}: {self.text}"


class Covered(NamedTuple):
    """Which tests run a line of a module, and how long each test takes."""

    tests: dict[str, dict[int, list[str]]]
    seconds: dict[str, float]


def main() -> int:
    """Tries the mutants and prints the survivors; returns how many are not explained."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, metavar="N", help="try so many mutants, drawn at random (default all)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draw (default 0)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"parts of the core (default {' '.join(CORE)})")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), metavar="N", help="mutants at a time")
    parser.add_argument(
        "--seconds", type=float, default=100, metavar="N", help="how long a mutant's tests may take (default 100)"
    )
    parser.add_argument("--record", type=Path, default=RECORD, help=f"default {RECORD.relative_to(ROOT)}")
    options = parser.parse_args()
    if unknown := set(options.only or ()) - set(CORE):
        parser.error(f"the core has no {', '.join(sorted(unknown))}; there are {', '.join(CORE)}")
    options.record = options.record.absolute()
    options.record.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as directory:
        copy = Path(directory) / "bnjax"
        ignored = shutil.ignore_patterns(".git", ".venv*", "site", "__pycache__", ".pytest_cache", "runs")
        shutil.copytree(ROOT, copy, ignore=ignored)
        os.chdir(copy)
        mutants = drawn(list(find(options.only or CORE)), options.sample, options.seed)
        explained = [mutant for mutant in mutants if is_explained(mutant)]
        tried = [mutant for mutant in mutants if mutant not in explained]
        survivors = try_all(tried, options.record, options.processes, options.seconds)
        for mutant in sorted(survivors):
            removed, added = changes(mutant)
            print(f"{mutant.module}:{mutant.first}:", f"  - {removed}", f"  + {added}", sep="\n")
        print(f"Of {len(mutants)} mutants {len(tried) - len(survivors)} were noticed, {len(explained)} are explained")
        return len(survivors)


def try_all(mutants: Sequence[Mutant], record: Path, processes: int, limit: float) -> list[Mutant]:
    """Tries the mutants that a record has not as noticed, adds to it, and returns those that survive."""
    lines = record.read_text().splitlines() if record.exists() else []
    noticed = {entry["key"] for entry in map(json.loads, lines) if entry["noticed"]}
    wanted = [mutant for mutant in mutants if mutant.key not in noticed]
    print(f"{len(mutants)} mutants, {len(mutants) - len(wanted)} of them noticed before", flush=True)
    if not wanted:
        return []
    load()
    covered = cover(COVERED)
    print(f"{len(covered.seconds)} tests of {sum(covered.seconds.values()):.0f} s", flush=True)
    survivors = []
    for done, (mutant, by) in enumerate(run(wanted, covered, processes, limit), 1):
        with record.open("a") as file:
            file.write(json.dumps({"key": mutant.key, "noticed": by}) + "\n")
        print(f"{done}/{len(wanted)} {by or 'SURVIVED'}: {mutant}", flush=True)
        survivors += [] if by else [mutant]
    return survivors


def digest(paths: Iterable[str | Path]) -> str:
    """Returns a text that changes with the content of any of some files."""
    return hashlib.sha256(b"".join(Path(path).read_bytes() for path in paths)).hexdigest()[:16]


def find(names: Sequence[str]) -> Iterator[Mutant]:
    """Finds the mutants of some parts of the core."""
    for module in modules_of(names):
        yield from mutants_of(str(module), module.read_text())


def mutants_of(module: str, source: str) -> Iterator[Mutant]:
    """Finds the mutants of a module."""
    from cosmic_ray import plugins
    from cosmic_ray.ast import ast_nodes, get_ast

    lines, nodes = source.splitlines(), list(ast_nodes(get_ast(source)))
    pieces = dict(pieces_of(source))
    for operator in plugins.operator_names():
        kind, before = plugins.get_operator(operator), Counter()
        if kind.arguments() or ("Operator_" in operator and operator.rpartition("Operator_")[2] not in PAIRS):
            continue
        name = operator.partition("/")[2]
        places = (place for node in nodes for place in kind().mutation_positions(node))
        for occurrence, ((first, column), (last, _)) in enumerate(places):
            piece = pieces.get(first, "")
            before[piece] += 1
            if lines[first - 1][:column].endswith("strict="):
                continue  # `zip` of equally many, where it makes no difference
            key = f"{module} {piece} {name} {before[piece]}"
            yield Mutant(module, name, occurrence, first, last, lines[first - 1].strip(), key)


def pieces_of(source: str) -> Iterator[tuple[int, str]]:
    """Yields each line of a module with the name and a digest of the function, method or statement that it is in."""
    lines = source.splitlines()
    statements = [("", node) for node in ast.parse(source).body]
    for name, node in statements:
        if isinstance(node, ast.ClassDef):
            statements += [(f"{node.name}.", inner) for inner in node.body]
        first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", ()))])
        text = "\n".join(lines[first - 1 : node.end_lineno])
        of = hashlib.sha256(text.encode()).hexdigest()[:16]
        for line in range(first, node.end_lineno + 1):
            yield line, f"{name}{getattr(node, 'name', '')} {of}"


def modules_of(names: Sequence[str]) -> list[Path]:
    """Returns the modules of some parts of the core."""
    paths = [Path("bnjax") / name for name in names]
    return [module for path in paths for module in (sorted(path.glob("*.py")) if path.is_dir() else [path])]


def drawn(mutants: list[Mutant], count: int | None, seed: int) -> list[Mutant]:
    """Draws some mutants, in a random order, so that a part of a run is a sample."""
    return random.Random(seed).sample(mutants, min(count or len(mutants), len(mutants)))


def load() -> None:
    """Imports what the tests need of others, which each process that tries a mutant then has."""
    sys.path[:0] = ["tests", "."]
    importlib.import_module("conftest")  # its settings come before those imports
    for name in ("jax", "flax.linen", "flax.nnx", "optax", "chex", "hypothesis", "beartype", "pytest"):
        importlib.import_module(name)


class Plugin:
    """Runs tests in the order in which they are named, and takes down which failed."""

    def __init__(self, names: Sequence[str] = ()):
        self.place, self.failed = {name: i for i, name in enumerate(names)}, ""

    def pytest_collection_modifyitems(self, items):
        """Keeps the named tests, in their order."""
        if self.place:
            items[:] = sorted((i for i in items if i.nodeid in self.place), key=lambda i: self.place[i.nodeid])

    def pytest_runtest_logreport(self, report):
        """Takes down a failure."""
        if report.failed:
            self.failed = report.nodeid

    def pytest_collectreport(self, report):
        """Takes down a file that cannot be imported."""
        if report.failed:
            self.failed = report.nodeid or "collection"


class Measuring(Plugin):
    """Takes down which lines each test runs, and how long it takes."""

    def __init__(self, coverage: Any):
        super().__init__()
        self.coverage, self.seconds, self.started = coverage, {}, 0.0

    def pytest_runtest_logstart(self, nodeid):
        """Begins a test."""
        self.coverage.switch_context(nodeid)
        self.started = time.process_time()

    def pytest_runtest_logfinish(self, nodeid):
        """Takes down the time that the processor took, whatever else it does."""
        self.seconds[nodeid] = time.process_time() - self.started


def run_tests(arguments: Sequence[str], plugin: Any) -> int:
    """Runs pytest in this process, without a word."""
    import pytest

    with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing), contextlib.redirect_stderr(nothing):
        quick = ["-q", "-n", "0", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
        return int(pytest.main([*quick, *arguments], plugins=[plugin]))


def in_child(function: Any, *arguments: Any, timeout: float | None = None) -> Any:
    """Returns what a function returns in a process that is forked for it; None where that takes too long or dies."""
    context = multiprocessing.get_context("fork")

    def work():
        os.setpgrp()
        sender.send(function(*arguments))

    child = context.Process(target=work)
    with _FORKING:  # else another child keeps the sender open
        receiver, sender = context.Pipe(duplex=False)
        child.start()
        sender.close()
    try:
        return receiver.recv() if receiver.poll(timeout) else None
    except EOFError:
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.join()


def cover(kept: Path) -> Covered:
    """Runs all tests on the core as it is, each file in a process of its own; what it finds is kept in a file."""
    found = json.loads(kept.read_text()) if kept.exists() else {}
    common = [*modules_of(CORE), *sorted(path for path in Path("tests").glob("*.py") if "test_" not in path.name)]
    for stem in TESTS:
        path = f"tests/test_{stem}.py"
        of = digest([*common, path])
        if found.get(stem, {}).get("digest") != of:
            result = in_child(_cover, path)
            if result is None or result[0]:
                sys.exit(f"{path} fails without a mutant: {result and result[0]}")
            found[stem] = {"digest": of, "lines": result[1], "seconds": result[2]}
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps(found))
    covered = Covered(defaultdict(lambda: defaultdict(list)), {})
    for stem in TESTS:
        covered.seconds.update(found[stem]["seconds"])
        for module, lines in found[stem]["lines"].items():
            for line, names in lines.items():
                covered.tests[module][int(line)] += names
    return covered


def _cover(path: str) -> tuple[str, dict[str, dict[int, list[str]]], dict[str, float]]:
    import coverage

    measured = coverage.Coverage(data_file=None, include=[f"bnjax/{name}" for name in CORE] + ["bnjax/variants/*"])
    measured.start()
    plugin = Measuring(measured)
    code = run_tests([path], plugin)
    measured.stop()
    data, lines = measured.get_data(), {}
    for file in data.measured_files():
        of_lines = data.contexts_by_lineno(file)
        lines[os.path.relpath(file)] = {line: [name for name in names if name] for line, names in of_lines.items()}
    return plugin.failed or ("it ends with an error" if code else ""), lines, dict(plugin.seconds)


def tests_of(mutant: Mutant, covered: Covered) -> list[str]:
    """Returns the tests that run the lines of a mutant; where only the import does, those that run what is around."""
    lines = covered.tests.get(mutant.module, {})
    around = [(mutant.first, mutant.last)]
    for node in ast.walk(ast.parse(Path(mutant.module).read_text())):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            if first <= mutant.first and mutant.last <= node.end_lineno:
                around.append((first, node.end_lineno))
    for first, last in sorted(around, key=lambda ends: ends[1] - ends[0]):
        if found := {test for line in range(first, last + 1) for test in lines.get(line, ())}:
            return sorted(found | {test for test in covered.seconds if test.endswith(OF_SIGNATURES)})
    return sorted(covered.seconds)


def run(mutants: Sequence[Mutant], covered: Covered, processes: int, limit: float) -> Iterator[tuple[Mutant, str]]:
    """Tries mutants, some at a time; yields each with the test that noticed it, or an empty text."""
    noticing: Counter[str] = Counter()

    def one(mutant: Mutant) -> tuple[Mutant, str]:
        names = sorted(tests_of(mutant, covered), key=lambda name: covered.seconds[name] / (1 + noticing[name]))
        ends = itertools.accumulate(covered.seconds[name] for name in names)
        names = [name for name, end in zip(names, ends, strict=True) if end <= limit]
        by = in_child(_try, mutant, names, timeout=TIMEOUT[1])
        noticing[by or ""] += 1
        return mutant, "a time limit or a crash" if by is None else by

    with ThreadPoolExecutor(processes) as pool:
        yield from pool.map(one, mutants)


def _try(mutant: Mutant, names: Sequence[str]) -> str:
    resource.setrlimit(resource.RLIMIT_CPU, (TIMEOUT[0], TIMEOUT[0]))
    path, source = os.path.abspath(mutant.module), mutated(mutant).encode()
    loader = importlib.machinery.SourceFileLoader
    get_data, path_stats = loader.get_data, loader.path_stats

    def stats(self, of):  # without them no compiled file is read or written
        if of == path:
            raise OSError
        return path_stats(self, of)

    loader.get_data = lambda self, of: source if of == path else get_data(self, of)
    loader.path_stats = stats
    for part in (names[:FIRST], names[FIRST:]):  # collecting takes longer than most first failures
        plugin = Plugin(part)
        code = run_tests(["-x", *sorted({name.partition("::")[0] for name in part})], plugin) if part else 0
        if plugin.failed or code:
            return plugin.failed or f"exit code {code}"
    return ""


def mutated(mutant: Mutant) -> str:
    """Returns the module's source with the change."""
    from cosmic_ray import plugins
    from cosmic_ray.mutating import mutate_code

    operator = plugins.get_operator(f"core/{mutant.operator}")()
    return mutate_code(Path(mutant.module).read_text(), operator, mutant.occurrence)


def changes(mutant: Mutant) -> tuple[str, str]:
    """Returns the lines that a mutant changes, and what they become."""
    found = [[], []]
    for line in difflib.ndiff(Path(mutant.module).read_text().splitlines(), mutated(mutant).splitlines()):
        if line[:2] in ("- ", "+ "):
            found[line[0] == "+"].append(line[2:].strip())
    return " ".join(found[0]), " ".join(found[1])


def is_explained(mutant: Mutant) -> bool:
    """Tells whether a mutant makes no difference, by tools/equivalent_mutants.toml."""
    within = mutant.key.split(" ")[1]
    of_line = [
        entry
        for entry in explanations()
        if entry["module"] == mutant.module and mutant.text in entry["line"] and entry.get("within", within) == within
    ]
    removed, added = changes(mutant) if of_line else ("", "")
    return any(removed == entry["line"] and added in entry["becomes"] for entry in of_line)


@functools.cache
def explanations() -> list[dict[str, Any]]:
    """Reads tools/equivalent_mutants.toml."""
    return tomllib.loads(EXPLAINED.read_text())["mutant"]


if __name__ == "__main__":
    started = time.monotonic()
    status = main()
    print(f"{(time.monotonic() - started) / 60:.0f} minutes")
    sys.exit(status > 0)
