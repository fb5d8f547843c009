"""`python -m onerec_hf`: the command line, as `onerec-hf`."""

import sys

from onerec_hf.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
