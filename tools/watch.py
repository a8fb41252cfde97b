"""`megatron-dr watch`; docs/report.md."""

import sys

from megatron_dr.cli.watch import main

if __name__ == "__main__":
    sys.exit(main())
