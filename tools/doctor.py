"""`megatron-dr doctor`; docs/quickstart.md."""

import sys

from megatron_dr.cli.doctor import main

if __name__ == "__main__":
    sys.exit(main())
