"""What Megatron 0.19 leaves out of a GPT model's configuration, or a CPU needs of it."""

from argparse import Namespace
from typing import Any

from megatron_dr.mcore import cpu


def mend(model: Any, args: Namespace) -> None:
    """Change Megatron's `GPTModelConfig` before the model is built; twice is as once."""
    if hasattr(model, "rope_scaling_factor"):
        model.rope_scaling_factor = args.rope_scaling_factor  # Megatron 0.19 leaves it at 8
    if cpu.is_enabled() and hasattr(model, "transformer_layer_spec"):
        from megatron_dr.mcore.cpu.layers import layer_spec

        if model.transformer_layer_spec is None:  # a script's own stay
            model.transformer_layer_spec = layer_spec
        # gloo may still be sending a stage's output when Megatron frees it
        model.transformer.deallocate_pipeline_outputs = False
