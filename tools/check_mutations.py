"""Changes the core in small ways, one at a time, and tells which changes no test notices.

`pip install cosmic-ray && python tools/check_mutations.py [--sample N] [--seed S] [--only NAME …]`

The core is the function, moments, synchronization, variants and layers. Each change ("mutant"), such as another
operator or number, is made in a copy of the project, whose tests of the function, moments, variants, layers and devices
then run until one fails. Of the many operators that cosmic-ray puts in place of another the most alike counts. All of
the some 1,000 mutants take about half a day on two cores; `--sample` draws some of them. What survived is printed with
its line, to be killed by a test or explained.
"""

import argparse
import random
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
CORE = ("norm.py", "_moments.py", "_sync.py", "_layers.py", "linen.py", "nnx.py", "variants")
# What notices most comes first, and compiles least.
TESTS = (
    "moments",
    "norm",
    "renorm",
    "statistics_variants",
    "variants",
    "linen",
    "nnx",
    "compiled",
    "layers",
    "parallel",
)
# Others of a kind are noticed where these are, or are no operation of the values.
PAIRS = {
    *("Add_Sub", "Sub_Add", "Mul_Div", "Div_Mul", "FloorDiv_Mul", "Mod_Mul", "Pow_Mul", "BitAnd_BitOr", "BitOr_BitAnd"),
    *("Eq_NotEq", "NotEq_Eq", "Lt_LtE", "LtE_Lt", "Gt_GtE", "GtE_Gt", "Is_IsNot", "IsNot_Is", "In_NotIn", "NotIn_In"),
    *("USub_UAdd", "Delete_Not"),
}
CONFIGURATION = """
[cosmic-ray]
module-path = [{modules}]
timeout = 900.0
excluded-modules = []
test-command = "{python} -m pytest -x -q -n 0 {tests}"

[cosmic-ray.distributor]
name = "local"
"""


def main() -> int:
    """Runs the mutants and prints the survivors; returns how many there are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, metavar="N", help="run so many mutants, drawn at random (default all)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draw (default 0)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"parts of the core (default {' '.join(CORE)})")
    options = parser.parse_args()
    if unknown := set(options.only or ()) - set(CORE):
        parser.error(f"the core has no {', '.join(sorted(unknown))}; there are {', '.join(CORE)}")
    with tempfile.TemporaryDirectory() as directory:
        copy, session = Path(directory) / "bnjax", Path(directory) / "session.sqlite"
        ignored = shutil.ignore_patterns(".git", ".venv", "site", "__pycache__", ".pytest_cache", "results")
        shutil.copytree(ROOT, copy, ignore=ignored)
        configuration = copy / "mutations.toml"
        configuration.write_text(
            CONFIGURATION.format(
                modules=", ".join(f'"bnjax/{name}"' for name in options.only or CORE),
                python=sys.executable,
                tests=" ".join(f"tests/test_{name}.py" for name in TESTS),
            )
        )
        command = [sys.executable, "-m", "cosmic_ray.cli"]
        subprocess.run([*command, "init", str(configuration), str(session)], cwd=copy, check=True)
        with sqlite3.connect(session) as database:
            sample(database, copy, options.sample, options.seed)
        subprocess.run([*command, "exec", str(configuration), str(session)], cwd=copy, check=True)
        with sqlite3.connect(session) as database:
            return report(database, copy)


def sample(database: sqlite3.Connection, copy: Path, count: int | None, seed: int) -> None:
    """Leaves so many mutants in a session, of those that count."""
    place = "module_path, start_pos_row, start_pos_col, operator_name, occurrence"
    specs = database.execute(f"SELECT job_id, {place} FROM mutation_specs ORDER BY {place}").fetchall()

    def counts(path: str, row: int, column: int, operator: str) -> bool:
        if (copy / path).read_text().splitlines()[row - 1][:column].endswith("strict="):
            return False  # `zip` of equally many, where it makes no difference
        return operator.rpartition("Operator_")[2] in PAIRS or "Operator_" not in operator

    wanted = [job for job, *spec, _ in specs if counts(*spec)]
    kept = set(wanted if count is None or count >= len(wanted) else random.Random(seed).sample(wanted, count))
    for job in {job for job, *_ in specs} - kept:
        database.execute("DELETE FROM mutation_specs WHERE job_id = ?", (job,))
        database.execute("DELETE FROM work_items WHERE job_id = ?", (job,))


def report(database: sqlite3.Connection, copy: Path) -> int:
    """Prints the surviving mutants and returns their number."""
    rows = database.execute(
        "SELECT module_path, start_pos_row, operator_name, occurrence, test_outcome FROM mutation_specs "
        "JOIN work_results USING (job_id) ORDER BY module_path, start_pos_row"
    ).fetchall()
    survivors = [row for row in rows if row[4] == "SURVIVED"]
    for path, line, operator, occurrence, _ in survivors:
        text = (copy / path).read_text().splitlines()[line - 1].strip()
        print(f"{path}:{line}: {operator.partition('/')[2]}, occurrence {occurrence}: {text}")
    print(f"{len(rows) - len(survivors)} of {len(rows)} mutants were noticed")
    return len(survivors)


if __name__ == "__main__":
    sys.exit(main())
