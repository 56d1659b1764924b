"""Virtual environments for the checks in this directory, which fill them by pip and ask what is in them."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]


class Environment:
    """A virtual environment in a directory, isolated from the caller's environment."""

    def __init__(self, directory: Path, python: str):
        self.directory = directory
        subprocess.run([python, "-m", "venv", str(directory)], check=True)
        self.bin = directory / ("Scripts" if os.name == "nt" else "bin")
        self.variables = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
        self.variables |= {"PATH": f"{self.bin}{os.pathsep}{os.environ['PATH']}", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        self.pip("install", "--upgrade", "pip")

    def run(self, *command: str, **options) -> subprocess.CompletedProcess:
        """Runs a command of the environment and captures its output."""
        options = {"cwd": ROOT, "env": self.variables, "capture_output": True, "text": True} | options
        return subprocess.run([str(self.bin / command[0]), *command[1:]], **options)

    def pip(self, *arguments: str) -> str:
        """Runs pip and returns its output; exits with the output if pip fails."""
        done = self.run("python", "-m", "pip", "-q", *arguments)
        if done.returncode:
            sys.exit(f"pip {' '.join(arguments)} failed:\n{done.stdout}{done.stderr}")
        return done.stdout

    def would_install(self, *arguments: str) -> dict[str, str]:
        """Returns names and versions of the packages that `pip install` would add or change."""
        report = json.loads(self.pip("install", "--dry-run", "--report", "-", *arguments))
        return {_normal(item["metadata"]["name"]): item["metadata"]["version"] for item in report["install"]}

    def versions(self) -> dict[str, str]:
        """Returns names and versions of the packages that are installed."""
        packages = json.loads(self.run("python", "-m", "pip", "list", "--format", "json", check=True).stdout)
        return {_normal(package["name"]): package["version"] for package in packages}

    def size(self) -> int:
        """Returns the bytes of the files that are installed, without compiled bytecode."""
        files = (path for path in self.directory.rglob("*") if path.is_file() and not path.is_symlink())
        return sum(path.stat().st_size for path in files if path.suffix != ".pyc")


@contextlib.contextmanager
def environment(python: str | None = None) -> Iterator[Environment]:
    """Makes an environment of a Python version such as '3.13' (by default the running one); removes it afterwards."""
    with tempfile.TemporaryDirectory(prefix="bnjax-") as directory:
        interpreter = find_python(python) if python else sys.executable
        if interpreter is None:
            sys.exit(f"Python {python} is not installed here; install it first.")
        yield Environment(Path(directory) / "environment", interpreter)


def find_python(version: str) -> str | None:
    """Finds the interpreter of a version such as '3.13', on the PATH or among pyenv's; returns None without one."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    candidates: Sequence[str | None] = (
        shutil.which(f"python{version}"),
        *map(str, sorted(pyenv.glob(f"{version}*/bin/python"))),
        sys.executable,
    )
    code = "import sys; print('.'.join(map(str, sys.version_info[:2])))"
    for candidate in filter(None, candidates):
        done = subprocess.run([candidate, "-c", code], capture_output=True, text=True)
        if done.returncode == 0 and done.stdout.strip() == version:
            return candidate
    return None


def _normal(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")
