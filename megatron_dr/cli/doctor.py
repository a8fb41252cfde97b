"""What is installed and works, and the line that mends what does not.

Each package is tried in an interpreter of its own, as a run would import it: one that crashes, or
that breaks another's import, is seen and stops nothing.
"""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from megatron_dr.cli.main import parser_of

_SECONDS = 120  # for one import; more is taken for a hang


@dataclass(frozen=True)
class Check:
    """One thing to try.

    Attributes:
        module: what is imported; without it nothing is tried.
        needed: whether no run works without it.
        code: prints what it found as its last line, exits with a sentence where it does not do.
        mend: the line that installs or mends it.
    """

    name: str
    module: str
    needed: bool
    code: str
    mend: str
    absent: str = "not installed"


@dataclass(frozen=True)
class Finding:
    """What a check found; `state` is one of ok, absent, MISSING, BROKEN."""

    name: str
    state: str
    found: str
    mend: str = ""

    @property
    def bad(self) -> bool:
        return self.state in ("MISSING", "BROKEN")


def _version(module: str) -> str:
    return f"import {module} as found\nprint(found.__version__)"


def _installed(modules: str, package: str) -> str:
    return f"import {modules}\nfrom importlib.metadata import version\nprint(version('{package}'))"


_TORCH = """
import torch
print(torch.__version__)
if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6):
    raise SystemExit(f"{torch.__version__} is older than 2.6")
"""
_CUDA = """
import torch
if torch.version.cuda is None:
    print("ABSENT this torch is built without CUDA; add --dr-device cpu")
elif not torch.cuda.is_available():
    print(f"ABSENT torch is built for CUDA {torch.version.cuda}, but there is no usable GPU; "
          "see nvidia-smi, or add --dr-device cpu")
else:
    torch.ones(1, device="cuda").item()
    names = {torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())}
    print(f"{torch.version.cuda}, {torch.cuda.device_count()} x {', '.join(sorted(names))}")
"""
_NCCL = """
import torch.distributed as dist
if not dist.is_nccl_available():
    print("ABSENT this torch is built without NCCL; ranks talk by gloo, with --dr-device cpu")
else:
    import torch.cuda.nccl
    print(".".join(map(str, torch.cuda.nccl.version())))
"""
_MEGATRON = """
from importlib.metadata import version
found = version("megatron-core")
print(found, flush=True)
import megatron.core
from megatron_dr.mcore.compat import versions
installed, oldest, loop, newest = (
    tuple(map(int, found.split(".")[:2])), versions.OLDEST, versions.OLDEST_LOOP, versions.NEWEST
)
if not oldest <= installed <= newest:
    known = [".".join(map(str, v)) for v in (oldest, newest)]
    raise SystemExit(f"{found} was not tested; tested are {known[0]} to {known[1]}")
if installed < loop:
    print(f"{found}; attach and hosts alone: megatron_dr.train needs {loop[0]}.{loop[1]}")
else:
    import megatron.training.arguments
"""
_OPTIONS = """
from megatron_dr.mcore.compat import listed, versions
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.transformer_config import MLATransformerConfig
kinds = MLATransformerConfig, DistributedDataParallelConfig, OptimizerConfig
said = [listed.unknown_fields(*kinds)]
names = {name for kind in kinds for name in listed.fields(kind)}
for kind, of_kind in listed.kinds(listed.OPTIONS).items():
    said.append(f"{len(names & set(of_kind))} fields {kind}")
if versions.INSTALLED >= versions.OLDEST_LOOP:
    said[:0] = [listed.unknown_flags()]
    flags = set(listed.kinds(listed.FLAGS)["refused"]) - listed.absent(listed.FLAGS)
    said.append(f"{len(flags)} flags refused")
print("; ".join(filter(None, said)))
"""

CHECKS = (
    Check("torch", "torch", True, _TORCH, "pip install 'torch>=2.6'"),
    Check("CUDA", "torch", False, _CUDA,
          "install NVIDIA's driver, and a torch that is built for its CUDA version"),
    Check("NCCL", "torch", False, _NCCL, "pip install --force-reinstall torch"),
    Check("megatron-core", "megatron", True, _MEGATRON,
          "pip install 'megatron-core[training]>=0.16,<0.21'"),
    Check("its options", "megatron", True, _OPTIONS, "see megatron-core above"),
    Check("Transformer Engine", "transformer_engine", False,
          _installed("transformer_engine.pytorch", "transformer-engine"),
          "pip uninstall transformer-engine   (with a GPU, then: pip install "
          "--no-build-isolation 'transformer-engine[core_cu13,pytorch]')",
          "not installed; Megatron's local layers run instead: --transformer-impl local"),
    Check("NVIDIA apex", "apex", False, _installed("amp_C, apex.multi_tensor_apply", "apex"), "",
          "not installed; Megatron uses torch's: --no-gradient-accumulation-fusion, "
          "--no-persist-layer-norm"),
    Check("psutil", "psutil", True, _version("psutil"), "pip install psutil"),
    Check("numpy", "numpy", True, _version("numpy"), "pip install numpy"),
    Check("safetensors", "safetensors", True, _version("safetensors.torch, safetensors"),
          "pip install safetensors"),
    Check("tokenizers", "tokenizers", False, _version("tokenizers"), "pip install tokenizers",
          "not installed; --tokenizer-type HuggingFaceTokenizer needs it"),
    Check("transformers", "transformers", False,
          "import transformers\ntransformers.AutoTokenizer\nprint(transformers.__version__)",
          "pip install transformers",
          "not installed; --tokenizer-type HuggingFaceTokenizer and megatron-dr verify need it"),
    Check("rich", "rich", False, _installed("rich", "rich"), "pip install rich",
          "not installed; megatron-dr prepare, compare, plan and watch need it"),
    Check("matplotlib", "matplotlib", False, _version("matplotlib"), "pip install matplotlib",
          "not installed; megatron-dr compare and report need it"),
)  # fmt: skip


def examine(check: Check) -> Finding:
    """Try one thing."""
    try:
        there = importlib.util.find_spec(check.module) is not None
    except (ImportError, ValueError):
        there = True  # and its import says what is wrong
    if not there and check.needed:
        return Finding(check.name, "MISSING", "not installed", check.mend)
    if not there:
        return Finding(check.name, "absent", check.absent)
    try:
        done = subprocess.run(
            [sys.executable, "-c", check.code], capture_output=True, text=True, timeout=_SECONDS,
            env=os.environ | {"PYTHONWARNINGS": "ignore"},
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return Finding(check.name, "BROKEN", f"its import hangs ({_SECONDS} s)", check.mend)
    said = done.stdout.strip().splitlines()[-1:] or [""]
    if done.returncode == 0:
        absent = said[0].startswith("ABSENT ")
        return Finding(check.name, "absent" if absent else "ok", said[0].removeprefix("ABSENT "))
    wrong = (done.stderr.strip().splitlines() or [f"its import ends with {done.returncode}"])[-1]
    return Finding(check.name, "BROKEN", wrong, check.mend or _mend_apex())


def _mend_apex() -> str:
    """What to do about a package or a folder called apex that isn't NVIDIA's.

    Megatron takes anything that can be imported by this name for it, and then its norms fail.
    """
    spec = importlib.util.find_spec("apex")
    if spec is not None and spec.origin is None:
        places = dict.fromkeys(os.path.abspath(p) for p in spec.submodule_search_locations or ())
        folders = ", ".join(places)
        return f"rename the folder {folders}: Megatron takes it for NVIDIA's apex"
    return "pip uninstall apex   (the one on PyPI is not NVIDIA's, which is built from its source)"


def examine_all() -> list[Finding]:
    """Every check, the interpreter first."""
    python = Finding("Python", "ok", ".".join(map(str, sys.version_info[:3])))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return [python, *pool.map(examine, CHECKS)]


def show(findings: Sequence[Finding]) -> None:
    """Print a table, by rich where it is there, and the lines that mend."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        for f in findings:
            print(f"{f.name:20}{f.state:9}{f.found}")
    else:
        table = Table(box=None, padding=(0, 2, 0, 0))
        for column in ("", "state", "found"):
            table.add_column(column, overflow="fold")
        for f in findings:
            colour = {"ok": "green", "absent": "dim"}.get(f.state, "bold red")
            table.add_row(f.name, f"[{colour}]{f.state}[/]", f.found.replace("[", r"\["))
        Console().print(table)
    for f in findings:
        if f.bad:
            print(f"mend {f.name}: {f.mend}")


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 1 where something is missing or broken."""
    parser_of("doctor", __doc__).parse_args(argv)
    sys.path.insert(0, os.getcwd())  # as `torchrun -m` has it: a folder here can hide a package
    findings = examine_all()
    show(findings)
    return int(any(f.bad for f in findings))
