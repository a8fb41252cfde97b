"""`megatron-dr prepare`; docs/data.md."""

import sys

from megatron_dr.cli.prepare import main

if __name__ == "__main__":
    sys.exit(main())
