"""Several training runs in one `torchrun`: Megatron is imported once, each run is a fork.

    torchrun --nproc-per-node 2 examples/jobs/runs.py PLAN.json

PLAN is a list of {"name", "folder", "flags"}. A run is `python -m megatron_dr.train <flags>` on
every rank; its output goes to <folder>/log.<rank>.txt. The first run that fails ends the plan.
"""

import json
import multiprocessing
import os
import sys
import traceback
from pathlib import Path

from torch.distributed import PrefixStore, TCPStore

from megatron_dr.mcore import cpu
from megatron_dr.mcore.loop import train


def run(number: int, folder: Path, flags: list[str]) -> int:
    """Exit code of one run, in a child process that has this one's imports."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    code = 1
    try:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = PrefixStore(f"run {number}", TCPStore(address, port, is_master=False))
        with open(folder / f"log.{os.environ['RANK']}.txt", "w", buffering=1) as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            sys.argv = ["megatron_dr.train", *flags]
            train.main(store)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        for child in multiprocessing.active_children():  # Megatron's checkpoint writers
            child.terminate()
        sys.stdout.flush()
        os._exit(code)


def main() -> None:
    plan = json.loads(Path(sys.argv[1]).read_text())
    cpu.enable()
    train.import_megatron()
    from transformers import AutoTokenizer  # noqa: F401  two seconds that each run would spend

    for number, job in enumerate(plan):
        folder = Path(job["folder"])
        folder.mkdir(parents=True, exist_ok=True)
        code = run(number, folder, job["flags"])
        if code:
            sys.exit(f"run {job['name']!r} failed: see {folder}/log.{os.environ['RANK']}.txt")
        if os.environ["RANK"] == "0":
            (folder / "done").touch()


if __name__ == "__main__":
    main()
