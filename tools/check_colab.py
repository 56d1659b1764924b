"""Shows that bnjax fits Colab as it is: `python tools/check_colab.py [NOTEBOOK …]`.

It makes an environment like Colab's image (tools/colab.txt), says what `pip install` of bnjax and of its extra
`studies` would add and change there, and fails if JAX, Flax or another package that must stay would change. Then it
installs the studies, and runs the notebooks at their smoke size (all of them, or those named), which takes some minutes
on two cores.
"""

import argparse
import sys

from environments import ROOT, Environment, environment

PINS = ROOT / "tools" / "colab.txt"
STAY = {"jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "scipy", "protobuf", "absl-py"}


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
            packages = colab.would_install(f"bnjax{extra} @ {ROOT.as_uri()}")
            changed = {name for name in packages if name in before}
            print(f"pip install bnjax{extra}")
            print(f"  adds {', '.join(f'{name} {packages[name]}' for name in sorted(packages.keys() - changed))}")
            for name in sorted(changed):
                print(f"  changes {name} from {before[name]} to {packages[name]}")
            if changed & STAY:
                return 1
        if options.no_notebooks:
            return 0
        colab.pip("install", f"bnjax[studies] @ {ROOT.as_uri()}")
        # These packages run the notebooks, beside those that Colab has.
        colab.pip("install", "pytest", "pytest-xdist", "hypothesis", "beartype")
        after = colab.versions()
        if different := {name for name in STAY if after[name] != before[name]}:
            print(f"the installation changed {', '.join(sorted(different))}")
            return 1
        return run_notebooks(colab, options.notebooks)


def run_notebooks(colab: Environment, names: list[str]) -> int:
    """Runs the tests of the notebooks; returns pytest's exit status."""
    selection = ["-m", "", *(["-k", " or ".join(names)] if names else [])]
    # Warnings are no errors here, as Colab's Jupyter is older than its Python and warns.
    options = ["-p", "no:cacheprovider", "-o", "filterwarnings=default"]
    done = colab.run("python", "-m", "pytest", *options, "tests/test_notebooks.py", *selection)
    print(done.stdout + done.stderr)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
