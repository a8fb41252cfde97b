"""`megatron-dr verify`; docs/convert.md."""

import sys

from megatron_dr.cli.verify import main

if __name__ == "__main__":
    sys.exit(main())
