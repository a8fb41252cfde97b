"""`megatron-dr gpu-check`; docs/gpu.md."""

import sys

from megatron_dr.cli.gpu_check import main

if __name__ == "__main__":
    sys.exit(main())
