"""`megatron-dr compare`; docs/compare.md."""

import sys

from megatron_dr.cli.compare import main

if __name__ == "__main__":
    sys.exit(main())
