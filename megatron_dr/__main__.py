"""`python -m megatron_dr`, `torchrun ... -m megatron_dr`: the command `megatron-dr`."""

import sys

from megatron_dr.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
