"""Shows what an installation of bnjax weighs and where it is possible: `python tools/check_install.py`.

It says what `pip install` adds to an environment that has Flax and optax, in packages and bytes, for the base
and for each extra that the studies need, and fails if the base adds more than three packages or 3 MB. Then it lets pip
resolve the base for other platforms and versions of Python, and fails where that is not possible.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

from environments import ROOT, Environment, environment

EXTRAS = ("", "[plots]", "[data]", "[studies]")
LARGEST = 3, 3_000_000  # packages and bytes that the base may add
PLATFORMS = {
    "Windows": (("win_amd64",), {"sys_platform": "win32", "platform_system": "Windows", "os_name": "nt"}, "AMD64"),
    "macOS": (
        ("macosx_14_0_arm64",),
        {"sys_platform": "darwin", "platform_system": "Darwin", "os_name": "posix"},
        "arm64",
    ),
    "Linux": (
        tuple(
            f"manylinux{version}_x86_64" for version in ("_2_28", "_2_27", "_2_24", "_2_17", "2014", "2010", "_2_12")
        ),
        {"sys_platform": "linux", "platform_system": "Linux", "os_name": "posix"},
        "x86_64",
    ),
}
PYTHONS = ("3.11", "3.12", "3.13", "3.14")

# pip chooses files for another platform, but reads requirements' markers as those of the running interpreter.
RESOLVE = """
import json, sys
from pip._internal.cli.main import main
from pip._vendor.packaging import markers

here = markers.default_environment()
there = json.loads(sys.argv[1])
markers.default_environment = lambda: {**here, **there}
sys.exit(main(sys.argv[2:]))
"""


def main() -> int:
    """Prints both tables; returns 1 if the base is too heavy or can't be installed somewhere."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    with environment() as made, tempfile.TemporaryDirectory() as wheels:
        made.pip("wheel", "--no-deps", "--wheel-dir", wheels, str(ROOT))
        (wheel,) = Path(wheels).glob("*.whl")
        failed = weigh(wheel)
        for platform in PLATFORMS:
            for python in PYTHONS:
                problem = resolve(made, wheel, platform, python)
                failed |= bool(problem)
                print(f"{platform}, Python {python}: {problem or 'resolves'}")
    return int(failed)


def weigh(wheel: Path) -> bool:
    """Prints what each extra adds to an environment with Flax and optax; returns whether the base adds too much."""
    failed = False
    for extra in EXTRAS:
        with environment() as made:
            made.pip("install", "flax", "optax")
            before, size = made.versions(), made.size()
            made.pip("install", f"bnjax{extra} @ {wheel.as_uri()}")
            added, size = sorted(made.versions().keys() - before.keys()), made.size() - size
        print(f"bnjax{extra}: {len(added)} packages, {size / 1e6:.1f} MB: {', '.join(added)}")
        failed |= not extra and (len(added) > LARGEST[0] or size > LARGEST[1])
    return failed


def resolve(made: Environment, wheel: Path, platform: str, python: str) -> str:
    """Resolves the base for a platform; returns pip's error, or '' without one."""
    tags, markers, machine = PLATFORMS[platform]
    markers = {**markers, "platform_machine": machine, "python_version": python, "python_full_version": f"{python}.0"}
    arguments = ["install", "--dry-run", "--ignore-installed", "--only-binary", ":all:", "--target", "nowhere", "-q"]
    arguments += [part for tag in tags for part in ("--platform", tag)]
    arguments += ["--python-version", python, str(wheel)]
    done = made.run("python", "-c", RESOLVE, json.dumps(markers), *arguments)
    lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
    return "" if done.returncode == 0 else " ".join(lines) or done.stderr


if __name__ == "__main__":
    sys.exit(main())
