"""`python -m onerec_hf COMMAND ...`: the same as `onerec-hf COMMAND ...`."""

import sys

from onerec_hf.cli.main import main

sys.exit(main())
