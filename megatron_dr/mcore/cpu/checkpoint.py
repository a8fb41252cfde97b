"""Distributed-optimizer checkpoints with torch's AdamW (no Transformer Engine, no apex)."""

from typing import Any

import torch


def mend_loading() -> None:
    """Replace what fails, or is silently wrong, when such a checkpoint is loaded.

    torch makes a parameter's state at its first step, and Megatron asserts that it is there when
    a load is prepared. torch keeps a tensor `step` per parameter that Megatron does not save per
    parameter: skip it when states are copied (a KeyError or, silently, a wrong step without), and
    give each parameter its own after load_state_dict (silent without: one shared tensor advances
    once per parameter).
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    original_set = DistributedOptimizer._set_main_param_and_optimizer_states
    original_load = DistributedOptimizer.load_state_dict
    original_sharded = DistributedOptimizer.sharded_state_dict

    def set_states(self: Any, model_param: Any, tensors: dict[str, Any]) -> None:
        tensors = {**tensors, "step": None}  # not a tensor: load_state_dict has set it
        with torch.no_grad():  # fp32 main parameters are views of the model's own
            original_set(self, model_param, tensors)

    def load_state_dict(self: Any, state_dict: dict[str, Any]) -> None:
        original_load(self, state_dict)
        for state in self.optimizer.state.values():
            if torch.is_tensor(state.get("step")):
                state["step"] = state["step"].clone()

    def sharded_state_dict(self: Any, model: Any, is_loading: bool = False, **kwargs: Any) -> Any:
        if is_loading and not self.optimizer.state:
            self._init_optimizer_states_with_dummy_values()
        return original_sharded(self, model, is_loading=is_loading, **kwargs)

    DistributedOptimizer.sharded_state_dict = sharded_state_dict
    DistributedOptimizer._set_main_param_and_optimizer_states = set_states
    DistributedOptimizer.load_state_dict = load_state_dict
