"""Tries hostile input: `python tools/fuzz.py [commands|records|weights …] [--count N] [--seed S]`.

- commands: lines for the command line, made of the options of all studies with values good and bad. Each has to end
  with status 0, 1 or 2, and with one line on standard error where it fails. Nothing is trained: what stands for a
  study's run makes its networks.
- records: a `results.json` with a field or a byte changed, beside an intact run. The page has to be made, with the
  intact run, and a record that can't be read has to be named with its file, and its field where that is at fault.
- weights: safetensors files and state dicts, changed; a conversion has to end with the arrays or with a ValueError.

Prints what does not hold, and returns how many. By default 500 commands, 400 records and 200 weights, which takes a
quarter of a minute on two cores.
"""

import argparse
import contextlib
import copy
import io
import json
import os
import random
import shutil
import sys
import tempfile
import types
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
COUNTS = {"commands": 500, "records": 400, "weights": 200}
TEXTS = (
    "",
    " ",
    "-",
    "--",
    "x",
    "0",
    "-1",
    "1",
    "2",
    "1.5",
    "1e9",
    "99999999999999999999",
    "nan",
    "inf",
    "True",
    "None",
)
TEXTS += ("ünïcode", "a b", "[/x]", "[bold]", "{0}", "%s", "$(true)", "a,b", "1,2", ",", "1,,2", "\x00", "\n", "é" * 50)


def main() -> int:
    """Runs the parts that are named, all by default, and prints what does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(COUNTS)} (default all)")
    parser.add_argument("--count", type=int, metavar="N", help="how many of each")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draws (default 0)")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(COUNTS):
        parser.error(f"there are {', '.join(COUNTS)}; got {', '.join(sorted(unknown))}")
    os.environ["JAX_PLATFORMS"] = "cpu"
    failures = 0
    for part in options.parts or COUNTS:
        found: list[str] = []
        with tempfile.TemporaryDirectory() as directory, contextlib.chdir(directory):
            outcomes = Counter(PARTS[part](options.count or COUNTS[part], options.seed, found))
        print(f"{part}: {sum(outcomes.values())} tried ({', '.join(f'{n} {what}' for what, n in outcomes.items())})")
        for text in found:
            print(f"  {text}")
        failures += len(found)
    return failures


# --- commands ---------------------------------------------------------------------------------------------------------


def commands(count: int, seed: int, found: list[str]) -> Iterator[str]:
    """Tries command lines in the working directory; yields each one's outcome, and adds what does not hold."""
    from bnjax.studies.cli import console
    from bnjax.studies.cli.main import main as bnjax

    rng, load = random.Random(seed), console.Study.load
    console.Study.load = lambda self: _without_training(load(self))
    before = os.environ.get("BNJAX_CACHE")
    try:
        for _ in range(count):
            words = _command(rng)
            out, err = io.StringIO(), io.StringIO()
            try:
                with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                    status = bnjax(words)
            except SystemExit as end:
                status = end.code
            except BaseException as error:
                status = f"{type(error).__name__}: {error}"
            error = err.getvalue()
            is_quiet = error.count("\n") == (status in (1, 2)) and "Traceback" not in error
            if status not in (0, 1, 2, None) or not is_quiet:
                found.append(f"bnjax {words}: {status!r:.300} {error[:300]!r}")
            yield f"with status {status}" if status in (0, 1, 2, None) else "failed"
    finally:
        console.Study.load = load
        if before is not None:
            os.environ["BNJAX_CACHE"] = before


def _without_training(module: Any) -> Any:
    """Returns what a study's module has for the command line, with a run that only makes its networks."""
    networks = getattr(module, "networks", lambda options: {})

    def run(options, report):
        from bnjax.studies import data
        from bnjax.studies.evidence.results import Results

        report.expect(1)
        images = (data.blank(options.dataset),) if hasattr(options, "dataset") else ()
        with contextlib.suppress(TypeError) if not images else contextlib.nullcontext():
            networks(options, *images)
        return Results(options.__class__.__module__.rpartition(".")[2], {}, range(min(options.seeds, 100))), {}

    return types.SimpleNamespace(Options=module.Options, CLAIMS=(), networks=networks, run=run)


def _command(rng: random.Random) -> list[str]:
    """Draws a command line."""
    from bnjax.studies import STUDIES

    name = rng.choice([*STUDIES, *STUDIES, rng.choice(TEXTS), "circle"])
    if rng.random() < 0.15:
        rest = [rng.choice(("--out", "--seeds", "--fast", "--study", "--version", "-V", "-q", "--help", *TEXTS))]
        return [rng.choice(("list", "run", "report", "lst", "", "--versio", "compile", "report")), *rest]
    words = ["run", name]
    fields = STUDIES[name].fields if name in STUDIES else STUDIES["circles"].fields
    known = {
        f"--{field.replace('_', '-')}": fields[field] for field in fields if field not in ("processes", "coordinator")
    }
    known = {
        option: field for option, field in known.items() if field.name not in ("distributed", "process_id", "devices")
    }
    for option in rng.sample(sorted(known), min(len(known), rng.randrange(4))):
        field = known[option]
        values = [*(field.metadata["choices"] or ("1", "3", str(rng.randrange(-2, 20)))) * 3, rng.choice(TEXTS)]
        spelled = rng.choice([option] * 30 + [option[:-1], option.replace("-", "_"), option.upper(), option + "x"])
        words += (
            [spelled]
            if field.type is bool
            else rng.choice(([spelled, rng.choice(values)], [f"{spelled}={rng.choice(values)}"]))
        )
    more = ([], ["-q"], ["--quiet"], ["--resume"], ["--force"], ["--force", "--resume"]) * 3
    words += rng.choice((*more, [rng.choice(TEXTS)]))
    return [*words, "--out", rng.choice(("a", "b", "c/d", "file/x", "[x]", *TEXTS))] if rng.random() < 0.8 else words


# --- records ----------------------------------------------------------------------------------------------------------

WRONG = (
    None,
    True,
    -1,
    0.5,
    "x",
    "",
    [],
    {},
    [[]],
    {"a": []},
    "../../etc/passwd",
    "ü" * 10_000,
    2**63,
    -(2**70),
    [None, 1, "2"],
)


def records(count: int, seed: int, found: list[str]) -> Iterator[str]:
    """Tries records in the working directory; yields each one's outcome, and adds what does not hold."""
    from bnjax.studies.cli.report import write_report

    rng, runs = random.Random(seed), Path("runs")
    source = (ROOT / "docs" / "results" / "circles.json").read_bytes()
    figure = ROOT / "docs" / "figures" / "circles_learning_curves.png"
    for changed, field in _changed_records(source, rng, count):
        shutil.rmtree(runs, ignore_errors=True)
        for name, content in (("intact", source), ("changed", changed)):
            (runs / name).mkdir(parents=True)
            (runs / name / "results.json").write_bytes(content)
            shutil.copy(figure, runs / name / "learning_curves.png")
        try:
            shown, missing = write_report(runs, Path("page.html"))
        except Exception as error:
            found.append(f"{field}: {type(error).__name__}: {error!s:.300}")
            yield "failed"
            continue
        named = [text for text in missing if text.startswith(f"{runs / 'changed' / 'results.json'}")]
        if shown == 1 and len(named) == 1 and "\n" not in named[0]:
            place = named[0].partition("results.json: ")[2]
            if field and not place.startswith(field):
                found.append(f"{field}: its message names another field: {named[0]:.300}")
            yield "named"
        elif shown == 2:
            yield "harmless"
        else:
            found.append(f"{field}: {shown} shown, missing {missing!s:.300}")
            yield "failed"


def _changed_records(source: bytes, rng: random.Random, count: int) -> Iterator[tuple[bytes, str]]:
    """Yields changed records, each with the field that its message has to name, if it is not harmless."""
    document = json.loads(source)
    paths = list(_paths(document))
    whole = [b"", b"[]", b"null", b"{", b"\xff\xfe{}", b"\xef\xbb\xbf" + source, source.decode().encode("utf-16")]
    whole += [
        b"[" * 100_000,
        b'{"a":' * 100_000,
        source[:-2] + b"1" * 10**4,
        source.replace(b"0.", b"0." + b"9" * 400, 1),
    ]
    whole += [
        source.replace(b'"seconds":', b'"seconds": 1e400, "x":'),
        source.replace(b'"seconds":', b'"seconds": NaN, "x":'),
    ]
    whole += [source.replace(b'"seconds":', b'"seconds": ' + b"9" * 400 + b', "x":')]
    for content in whole[:count]:
        yield content, ""
    for number in range(max(0, count - len(whole))):
        kind = number % 8
        if kind == 6:
            end = rng.randrange(len(source))
            yield source[:end], ""
            continue
        if kind == 7:
            place = rng.randrange(len(source))
            yield source[:place] + bytes([rng.randrange(256)]) + source[place + 1 :], ""
            continue
        changed, path = copy.deepcopy(document), paths[rng.randrange(len(paths))]
        holder = changed
        for key in path[:-1]:
            holder = holder[key]
        if kind == 5:
            del holder[path[-1]]
            yield json.dumps(changed).encode(), ""
        else:
            old, new = holder[path[-1]], rng.choice(WRONG)
            holder[path[-1]] = new
            # Where the kind of a value changes, its own name or that of what holds it stands in the message.
            yield json.dumps(changed).encode(), path[0] if type(old) is not type(new) else ""


def _paths(value: Any, before: tuple = ()) -> Iterator[tuple]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*before, key)
        yield from _paths(inner, (*before, key))


# --- weights ----------------------------------------------------------------------------------------------------------


def weights(count: int, seed: int, found: list[str]) -> Iterator[str]:
    """Tries safetensors files and state dicts; yields each one's outcome, and adds what does not hold."""
    import numpy as np

    from bnjax.convert import save_safetensors
    from bnjax.convert.torch import batch_norm_from_torch, variables_from_torch

    rng, path = random.Random(seed), Path("model.safetensors")
    names = ("weight", "bias", "running_mean", "running_var")
    arrays = {f"bn.{name}": np.ones(3, np.float32) for name in names}
    like = {
        "params": {"bn": {name: np.ones(3, np.float32) for name in ("scale", "bias")}},
        "batch_stats": {"bn": {name: np.ones(3, np.float32) for name in ("mean", "var")}},
    }
    save_safetensors(arrays, path)
    content = path.read_bytes()
    wrong = [
        None,
        "x",
        object(),
        [1, "a", None],
        {},
        np.array([object()] * 3),
        np.array(["a"] * 3),
        -np.ones(3),
        1e400,
        b"x",
    ]
    wrong += [
        np.ones((3, 3)),
        np.ones(0),
        np.ones(3, complex),
        np.ones(3, bool),
        np.zeros(3, "M8[s]"),
        np.full(3, np.nan),
    ]
    for number in range(count):
        source: Any = path
        if number % 2:
            source = dict(arrays)
            source[rng.choice(list(source))] = rng.choice(wrong)
        elif number % 4:
            header = content.replace(
                b'"F32"', b'"%s"' % rng.choice((b"F4", b"F6_E2M3", b"F8_E8M0", b"X", b"U64", b"BOOL"))
            )
            path.write_bytes(rng.choice((header, header.replace(b"[3]", b"[%d]" % rng.randrange(-1, 10**9)))))
        else:
            place = rng.randrange(len(content))
            path.write_bytes(content[:place] + bytes([rng.randrange(256)]) * rng.randrange(3) + content[place + 1 :])
        for convert in (lambda s: batch_norm_from_torch(s, "bn"), lambda s: variables_from_torch(s, like)):
            try:
                convert(source)
            except ValueError:
                yield "refused"
            except Exception as error:
                found.append(f"weights {number}: {type(error).__name__}: {error!s:.200}")
                yield "failed"
            else:
                yield "converted"


PARTS = {"commands": commands, "records": records, "weights": weights}

if __name__ == "__main__":
    sys.exit(main() > 0)
