"""`python -m bnjax` is the command `bnjax`."""

import sys

from bnjax.studies.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
