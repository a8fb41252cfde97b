"""What `attach` is given: Megatron's model in its DDP, of a version and with options that go."""

import dataclasses
from typing import Any

from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.utils import get_model_config

from megatron_dr.mcore.compat import listed, refusals, versions
from megatron_dr.mcore.compat.names import expert_ranks
from megatron_dr.mcore.refuse import SWITCH_OFF, refuse
from megatron_dr.mcore.say import say


def check_contract(model: Any, config: Any) -> None:
    """Raise ValueError, in one sentence that says what to change, where the plugin can't work."""
    if not isinstance(model, (list, tuple)) or not model:
        raise ValueError("attach(model, ...) needs Megatron's list of model chunks, e.g. [model].")
    for module in model:
        if not isinstance(module, DistributedDataParallel):
            raise ValueError(
                f"attach needs model chunks wrapped in Megatron-Core's DistributedDataParallel, "
                f"not {type(module).__name__}; Megatron-FSDP and torch FSDP2 are not supported: "
                "drop --use-megatron-fsdp or --use-torch-fsdp2."
            )
    if config is not get_model_config(model[0]):
        raise ValueError(
            "attach(config=...) must be the model's own configuration, "
            "get_model_config(model[0]): a copy's finalize_model_grads_func is never called."
        )
    versions.check()
    refuse(refusals.WHO, refusals.OF_MODEL, config, SWITCH_OFF)
    refuse(refusals.WHO, refusals.OF_DDP, model[0].ddp_config, SWITCH_OFF)
    _check_experts()


def warn(*configurations: Any) -> None:
    """Say which fields of these configurations of Megatron's nobody has looked at."""
    sentence = listed.unknown_fields(*filter(dataclasses.is_dataclass, configurations))
    if sentence:
        say(sentence)


def _check_experts() -> None:
    tp = parallel_state.get_tensor_model_parallel_world_size()
    cp = parallel_state.get_context_parallel_world_size()
    together = expert_ranks()
    if max(together, tp) % min(together, tp) or max(together, tp * cp) % min(together, tp * cp):
        raise ValueError(
            f"expert parallelism over {together} ranks must divide, or be divided by, tensor x "
            f"context parallelism ({tp} x {cp}): ranks that share experts or a sequence form one "
            "row; change --expert-model-parallel-size or --expert-tensor-parallel-size."
        )
