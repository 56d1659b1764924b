"""Shows that what is published is whole: `python tools/check_distribution.py [PYTEST ARGUMENTS …]`.

It builds wheel and source distribution, passes them to `twine check --strict`, unpacks the source distribution,
installs it with the extra `test` in a new environment, and runs its tests there.
"""

import sys
import tarfile
import tempfile
from pathlib import Path

from environments import ROOT, environment


def main(arguments: list[str]) -> int:
    """Builds, checks and tests; returns pytest's exit status, or 1."""
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0
    with environment() as made, tempfile.TemporaryDirectory() as directory:
        constraints = str(ROOT / "constraints.txt")
        made.pip("install", "-c", constraints, "build", "twine")
        for command in (("-m", "build", "-o", directory), ("-m", "twine", "check", "--strict", f"{directory}/*")):
            parts = [str(path) for path in Path(directory).iterdir()] if "twine" in command else []
            done = made.run("python", *(command[:-1] if parts else command), *parts)
            print(
                *(line for line in done.stdout.splitlines() if "Successfully" in line or "Checking" in line), sep="\n"
            )
            if done.returncode:
                print(done.stdout + done.stderr)
                return 1
        (source,) = Path(directory).glob("*.tar.gz")
        with tarfile.open(source) as archive:
            archive.extractall(directory, filter="data")
        unpacked = Path(directory) / source.name.removesuffix(".tar.gz")
        made.pip("install", "-c", constraints, "-e", f"{unpacked}[test]")
        return made.run("python", "-m", "pytest", *arguments, cwd=unpacked, capture_output=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
