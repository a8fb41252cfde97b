"""Scripts run in forks of a process that has transformers imported and no CUDA name replaced.

The tests' own process has Megatron on the CPU, in which transformers' loading would be another; a
fresh interpreter per script would import transformers each time.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

_SERVER = """
import contextlib, json, os, runpy, sys, traceback
import torch, transformers, transformers.models.llama.modeling_llama
torch.set_num_threads(1)
for line in sys.stdin:
    script, arguments, place, output = json.loads(line)
    child = os.fork()
    if child == 0:
        code, sys.argv = 0, [script, *arguments]
        sys.path.insert(0, place)
        with open(output, "w") as out, contextlib.redirect_stdout(out):
            with contextlib.redirect_stderr(out):
                try:
                    runpy.run_path(script, run_name="__main__")
                except SystemExit as end:
                    code = end.code if isinstance(end.code, int) else int(end.code is not None)
                except BaseException:
                    code = 70
                    traceback.print_exc()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
_LOAD = """
import sys, torch, transformers
folder, tokens, out, *adapter = sys.argv[1:]
model = transformers.AutoModelForCausalLM.from_pretrained(
    folder, dtype="auto", attn_implementation="eager"
)
if adapter:
    import peft
    model = peft.PeftModel.from_pretrained(model, adapter[0])
with torch.no_grad():
    torch.save(model(torch.load(tokens)).logits, out)
"""
ROOT = Path(__file__).parents[2]


class Clean:
    """The process; scripts run in it one after the other."""

    def __init__(self, process: "subprocess.Popen[str]", folder: Path) -> None:
        self.process, self.folder = process, folder

    def run(self, script: Path, *arguments: Any) -> tuple[int, str]:
        """Exit code, and what the script printed."""
        output = self.folder / "output.txt"
        words = [str(word) for word in arguments]
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps([str(script), words, str(ROOT), str(output)]) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline()), output.read_text()

    def logits(self, folder: Path, tokens: torch.Tensor, *adapter: Path) -> torch.Tensor:
        """transformers' logits of a checkpoint, with PEFT's adapters from a folder if given."""
        script, asked, out = (self.folder / name for name in ("load.py", "tokens.pt", "logits.pt"))
        script.write_text(_LOAD)
        torch.save(tokens, asked)
        code, said = self.run(script, folder, asked, out, *adapter)
        assert code == 0, said
        found: torch.Tensor = torch.load(out)
        return found


@contextmanager
def clean_process(folder: Path) -> Iterator[Clean]:
    """Start one, and end it."""
    process = subprocess.Popen(
        [sys.executable, "-c", _SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        yield Clean(process, folder)
    finally:
        process.kill()
        process.wait()
