"""`megatron-dr report`; docs/report.md."""

import sys

from megatron_dr.cli.report import main

if __name__ == "__main__":
    sys.exit(main())
