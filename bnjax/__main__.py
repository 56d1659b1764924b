"""The command `bnjax`, run as `python -m bnjax`."""

import sys

from bnjax.studies.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
