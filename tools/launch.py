"""`megatron-dr launch`; docs/cluster.md."""

import sys

from megatron_dr.cli.launch import main

if __name__ == "__main__":
    sys.exit(main())
