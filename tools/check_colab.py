"""Shows that bnjax fits Colab as it is: `python tools/check_colab.py [NOTEBOOK …]`.

Makes an environment like Colab's image (tools/colab.txt), says what `pip install` of bnjax and of its extra `studies`
would add there, fails if that would change anything that the image has, installs the studies, and runs the notebooks at
their smoke size (all of them, or those named; ten minutes on two cores).
"""

import argparse
import sys

from environments import ROOT, Environment, environment

PINS = ROOT / "tools" / "colab.txt"


def main() -> int:
    """Makes the environment, checks it, runs the notebooks; returns 1 if anything fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", metavar="NOTEBOOK", help="names such as circles (default all)")
    parser.add_argument("--no-notebooks", action="store_true", help="only check what would be installed")
    options = parser.parse_args()
    with environment("3.13") as colab:
        colab.pip("install", "-r", str(PINS))
        before = colab.versions()
        for extra in ("", "[studies]"):
            added = colab.would_install(f"bnjax{extra} @ {ROOT.as_uri()}")
            changed = sorted(set(added) & set(before))
            print(f"pip install bnjax{extra} adds {', '.join(f'{n} {v}' for n, v in sorted(added.items()))}")
            if changed:
                print(f"and changes {', '.join(f'{n} {before[n]} to {added[n]}' for n in changed)}")
                return 1
        if options.no_notebooks:
            return 0
        colab.pip("install", f"bnjax[studies] @ {ROOT.as_uri()}")
        # What runs the notebooks, beside what Colab has; nothing of that may change for it.
        colab.pip("install", "-c", str(PINS), "pytest", "pytest-xdist", "hypothesis", "beartype")
        after = colab.versions()
        if changed := {name: (version, after[name]) for name, version in before.items() if after[name] != version}:
            print(f"installing changed {changed}")
            return 1
        return run_notebooks(colab, options.notebooks)


def run_notebooks(colab: Environment, names: list[str]) -> int:
    """Runs the tests of the notebooks; returns pytest's exit status."""
    chosen = ["-k", " or ".join(names)] if names else []
    done = colab.run("python", "-m", "pytest", "-p", "no:cacheprovider", "tests/test_notebooks.py", *chosen)
    print(done.stdout + done.stderr)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
