"""A run's line on Transformer Engine and NVIDIA's apex: which are there, and what is used."""

import importlib.util
from argparse import Namespace
from importlib.machinery import ModuleSpec
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

# modules of NVIDIA's apex that its build compiles: of its optimizers, and of fused accumulation
_COMPILED, _FUSION = "amp_C", "fused_weight_gradient_mlp_cuda"


def used(args: Namespace) -> str:
    """The line; of Megatron's arguments, validated."""
    from megatron.core import optimizer

    whose = optimizer.Adam.__module__.partition(".")[0]
    fused = args.gradient_accumulation_fusion
    return (
        f"{transformer_engine()}; {apex()}; used are layers of {args.transformer_impl}, Adam of "
        f"{whose}, and gradient accumulation {'fused' if fused else 'in torch'}"
    )


def transformer_engine() -> str:
    """Whether Megatron has it: it is installed, and can be imported."""
    from megatron.core.extensions.transformer_engine import HAVE_TE

    if HAVE_TE:
        return f"Transformer Engine {_version('transformer-engine')} found"
    if _spec("transformer_engine") is not None:
        return "Transformer Engine is installed but can't be imported (megatron-dr doctor)"
    return "no Transformer Engine"


def apex() -> str:
    """Whether NVIDIA's is there: by what it has, as PyPI's package of this name is another."""
    spec = _spec("apex")
    if spec is None:
        return "no NVIDIA apex"
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    if not any((folder / "multi_tensor_apply").is_dir() for folder in folders):
        where = ", ".join(map(str, folders)) or spec.origin
        return (
            f"the package apex at {where} is not NVIDIA's, though Megatron takes it for that: "
            "remove it"
        )
    if _spec(_COMPILED) is None:
        return "NVIDIA apex found without its CUDA extensions"
    fusion = "" if _spec(_FUSION) else ", without fused gradient accumulation"
    return f"NVIDIA apex found{fusion}"


def _spec(module: str) -> ModuleSpec | None:
    """Where a module is; None also of a stand-in that says nothing of itself."""
    try:
        return importlib.util.find_spec(module)
    except ValueError:
        return None


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # built from its source
        return "of unknown version"
