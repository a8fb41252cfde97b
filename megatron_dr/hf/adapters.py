"""LoRA adapters of a Megatron checkpoint: their product, and as PEFT's checkpoint.

An adapter of Megatron's weight W [out, in] is A [r, in] and B [out, r], saved as `lora_a` and
`lora_b` beside W. W's rows are rows of several Hugging Face matrices (families.py), and so are B's:

    W + (alpha / r) B A     rows i of it are     W_i + (alpha / r) B_i A

So q_proj, k_proj and v_proj get their own rows of B and a copy of the A that they share.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_dr.hf.mapping import Mapped, split
from megatron_dr.hf.output import complete, rank, write_tensors
from megatron_dr.hf.torch_dist import Reader

_MARKS = (".lora_a.weight", ".lora_b.weight")
DEFAULT_ALPHA = 16.0  # of --dr-lora-alpha, for arguments that don't name it


@dataclass(frozen=True)
class Adapters:
    """The adapters of one checkpoint, all of rank `rank` and scaled by alpha / rank."""

    reader: Reader
    rank: int
    alpha: float

    def layers(self, count: int) -> list[str]:
        """Names in the whole model, of `count` layers, of Megatron's layers that have adapters."""
        keys = [key for key in self.reader.tensors if key.endswith(_MARKS[0])]
        return [
            key.removesuffix(_MARKS[0]).replace(".layers.", f".layers.{layer}.")
            for key in keys
            for layer in range(count)
            if self.reader.has(key, (layer,))
        ]

    def pair(self, tensor: Mapped) -> tuple[torch.Tensor, torch.Tensor] | None:
        """A [r, in] and B [out, r] of a tensor, as they were saved; None: it has no adapter."""
        keys = [tensor.key.removesuffix(".weight") + mark for mark in _MARKS]
        if len(tensor.shape) != 2 or not all(self.reader.has(k, tensor.index) for k in keys):
            return None
        rows, columns = tensor.shape
        shapes = ((self.rank, columns), (rows, self.rank))
        a, b = (self.reader.read(k, tensor.index, s) for k, s in zip(keys, shapes, strict=True))
        return a, b

    def merged(self, tensor: Mapped, weight: torch.Tensor) -> torch.Tensor:
        """W + (alpha / r) B A, computed in fp32 and rounded once to W's type."""
        pair = self.pair(tensor)
        if pair is None:
            return weight
        a, b = pair
        product = self.alpha / self.rank * (b.float() @ a.float())
        return (weight.float() + product).to(weight.dtype)

    def peft(self, tensor: Mapped) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """A and B of each Hugging Face matrix of a weight, by the module's name."""
        pair = self.pair(tensor)
        if pair is None:
            return {}
        a, b = pair
        parts = split(tensor, b)
        return {name.removesuffix(".weight"): (a.clone(), rows) for name, rows in parts.items()}


def find(reader: Reader, alpha: float | None = None) -> Adapters | None:
    """The checkpoint's adapters; None where it has none.

    Args:
        reader: the checkpoint.
        alpha: of a checkpoint whose arguments don't say it.

    Raises:
        ValueError: adapters of several ranks, or an alpha that nobody says.
    """
    sizes = {found.size for key, found in reader.tensors.items() if key.endswith(_MARKS[0])}
    ranks = {size[-2] for size in sizes if len(size) > 1}
    if not ranks:
        return None
    if len(ranks) > 1:
        raise ValueError(f"{reader.folder}: adapters of several ranks, {sorted(ranks)}.")
    arguments = reader.arguments()
    if alpha is None and arguments.get("dr_lora_rank") is not None:
        alpha = arguments.get("dr_lora_alpha") or DEFAULT_ALPHA
    if alpha is None:
        raise ValueError(
            f"{reader.folder}: it has adapters, but its arguments don't say their alpha; give "
            "--lora-alpha."
        )
    is_number = isinstance(alpha, int | float) and not isinstance(alpha, bool)
    if not is_number or not 0 < alpha <= sys.float_info.max:
        raise ValueError(
            f"{reader.folder}: the adapters' alpha is {alpha!r:.50}, and must be a number above 0: "
            "give --lora-alpha."
        )
    return Adapters(reader, ranks.pop(), float(alpha))


def write(
    adapters: Adapters, tensors: list[Mapped], dtype: torch.dtype, base: str, out: Path
) -> None:
    """Write adapter_config.json and adapter_model.safetensors (collective; one process writes).

    `base`: the model that they belong to, by a name or folder that transformers finds.

    Raises:
        ValueError: the output exists.
    """
    with complete(out) as folder:
        if rank()[0] == 0:
            found = {name: p for tensor in tensors for name, p in adapters.peft(tensor).items()}
            values = {}
            for name, pair in found.items():
                for mark, value in zip(("lora_A", "lora_B"), pair, strict=True):
                    key = f"base_model.model.{name}.{mark}.weight"
                    values[key] = value.to(dtype).contiguous()
            write_tensors(values, folder / "adapter_model.safetensors")
            text = json.dumps(_config(adapters, base, list(found), tensors), indent=2)
            (folder / "adapter_config.json").write_text(text + "\n", encoding="utf-8")


def _config(
    adapters: Adapters, base: str, names: list[str], tensors: list[Mapped]
) -> dict[str, object]:
    """adapter_config.json, as peft.LoraConfig reads it."""
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base,
        "inference_mode": True, "r": adapters.rank, "lora_alpha": adapters.alpha,
        "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False, "use_rslora": False,
        "target_modules": _targets(names, tensors),
    }  # fmt: skip


def _targets(names: list[str], tensors: list[Mapped]) -> list[str]:
    """The ends of the modules' names where every layer has them, else their whole names."""
    ends = {name.rsplit(".", 1)[-1] for name in names}
    modules = {part.name.removesuffix(".weight") for tensor in tensors for part in tensor.parts}
    everywhere = {module for module in modules if module.rsplit(".", 1)[-1] in ends}
    return sorted(ends) if everywhere == set(names) else sorted(names)
