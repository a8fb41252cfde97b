"""`megatron-dr weights`; docs/weights.md."""

import sys

from megatron_dr.cli.weights import main

if __name__ == "__main__":
    sys.exit(main())
