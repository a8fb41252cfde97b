"""`megatron-dr plan`; docs/plan.md."""

import sys

from megatron_dr.cli.plan import main

if __name__ == "__main__":
    sys.exit(main())
