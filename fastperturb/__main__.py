"""`python -m fastperturb`: the command line where no script was installed."""

import sys

from fastperturb.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
