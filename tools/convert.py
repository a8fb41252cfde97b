"""`megatron-dr convert`; docs/convert.md."""

import sys

from megatron_dr.cli.convert import main

if __name__ == "__main__":
    sys.exit(main())
