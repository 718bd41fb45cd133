"""`python -m nha_megatron COMMAND ...` is `nha-megatron COMMAND ...`: the form that launchers start."""

import sys

from nha_megatron.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
