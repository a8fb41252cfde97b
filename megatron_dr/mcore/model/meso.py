"""MeSO inside Megatron's optimizers: after `get_megatron_optimizer`, before a checkpoint is loaded.

Megatron wraps a torch optimizer: FP32Optimizer, or Float16OptimizerWithFloat16Params with its fp32
main parameters; one for dense parameters and one for experts, chained. `use_meso` puts MeSO in the
wrapped optimizer's place, with the same parameter groups (learning rates and weight decays are the
scheduler's, by group), and the rest of Megatron goes on as it was: `step()` copies or points to the
reduced gradients, clips them by the norm of the whole model's, and calls MeSO's step on what is
left. So what is compressed is the clipped gradient.

Layouts. Over tensor-parallel ranks a compressed gradient is the sum of the shards' shares: one
all-reduce per step, of K_out K_in numbers per sharded matrix, after which all ranks have the same
moments. Data-parallel ranks, and the two copies of a tied embedding, get the same gradients from
Megatron and so move alike. Nothing depends on the pipeline.

Checkpoints. Megatron saves an optimizer's state as shards of the parameters' shapes. Compressed
moments have their own: they are taken out while Megatron makes its sharded state, and put beside
it, whole, by the parameter's name in the whole model (so that another layout can load them).
"""

from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.utils import get_model_config

from megatron_dr.config.meso import MesoConfig
from megatron_dr.mcore.ownership import OwnedParameter, number_of_copy, owned_parameters
from megatron_dr.mcore.refuse import Rule, rules
from megatron_dr.mcore.say import say
from megatron_dr.mcore.seams.part import Part
from megatron_dr.optim import Meso, MesoAdamW, MesoSGD, Shard, Subspaces

_REFUSED = (
    *rules({
        "use_distributed_optimizer": "it cuts matrices into flat shards, to save the moments' "
        "memory, which MeSO does already",
        "use_megatron_fsdp": "it cuts matrices into flat shards",
        "use_torch_fsdp2": "it cuts matrices into shards of its own",
        "optimizer_cpu_offload": "it has optimizers of its own for the host's part",
        "use_precision_aware_optimizer": "it keeps moments of the parameters' shapes",
        "optimizer_cuda_graph": "projections are drawn on the host",
        "overlap_param_gather_with_optimizer_step": "it needs the distributed optimizer",
    }),
    Rule(
        "optimizer",
        when=lambda name, _: name not in ("adam", "sgd"),
        says="MeSO has the forms adam and sgd, not {flag} {value}.",
    ),
    Rule(
        "decoupled_weight_decay",
        when=lambda decoupled, _: decoupled is False,
        says="MeSO's weight decay is decoupled: set decoupled_weight_decay=True.",
    ),
)  # fmt: skip


class MesoPart(Part):
    """--dr-meso-size: an optimizer with compressed moments."""

    name, config, switch, flag = "meso", MesoConfig, "size", "--dr-meso-size"
    who = "MeSO does not support"
    refused = _REFUSED

    def kept(self, own: MesoConfig, before: Namespace) -> dict[str, str]:
        why = "its moments are of that space"
        return {f"dr-meso-{name}": why for name in ("size", "refresh")}

    def on_optimizer(
        self, own: MesoConfig, args: Namespace, optimizer: Any, model: list[Any]
    ) -> None:
        made = use_meso(
            optimizer, model, get_model_config(model[0]), size=own.size, refresh=own.refresh,
            seed=args.seed,
        )  # fmt: skip
        say(note(made))


def use_meso(
    optimizer: Any, model: list[Any], model_config: Any, *, size: int, refresh: int, seed: int
) -> list[Meso]:
    """Replace what Megatron's optimizer wraps by MeSO; the new optimizers, dense then experts.

    :param optimizer: what `get_megatron_optimizer` returned, before its first step or load.
    :param size: K_out and K_in.
    :param refresh: steps between two subspaces; 0: never.

    Raises:
        ValueError: the optimizer's configuration is one that MeSO doesn't work with.
    """
    MesoPart().refuse(optimizer.config)
    subspaces, made = Subspaces(seed), []
    owned = {_main(o.parameter): o for o in owned_parameters(model, model_config)}
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if part.optimizer is not None:  # a rank without parameters has none
            meso = _instead_of(part.optimizer, size, refresh, subspaces)
            parameters = [p for group in meso.param_groups for p in group["params"]]
            meso.shards |= {p: _shard(owned[p]) for p in parameters if owned[p].shards > 1}
            part.optimizer = meso
            part.init_state_fn = lambda inner, _=None: inner.init_state()
            part.sharded_state_dict = _sharded_state_dict(part.sharded_state_dict, meso, owned)
            made.append(meso)
    return made


def note(made: list[Meso]) -> str:
    """What a rank keeps, in one sentence."""
    own, stock = (sum(sizes) for sizes in zip(*[meso.moment_bytes() for meso in made], strict=True))
    kept: dict[Any, int] = {}
    for meso in made:
        kept |= meso.projection_bytes()
    moments, projections, instead = (_size(n) for n in (own, sum(kept.values()), stock))
    return (
        f"MeSO keeps {moments} of moments and {projections} of projections on this rank, in "
        f"place of {instead} of moments"
    )


def _size(number: int) -> str:
    return f"{number / 1e6:,.1f} MB" if number >= 1e7 else f"{number / 1e3:,.1f} kB"


def _main(parameter: torch.nn.Parameter) -> torch.Tensor:
    """The fp32 parameter that is trained: Megatron's copy of a 16-bit one, or itself."""
    main: torch.Tensor = getattr(parameter, "main_param", parameter)
    return main


def _instead_of(
    stock: torch.optim.Optimizer, size: int, refresh: int, subspaces: Subspaces
) -> Meso:
    """MeSO with the groups of torch's, Transformer Engine's or apex's Adam or SGD."""
    form = MesoAdamW if "betas" in stock.defaults else MesoSGD
    own = ("lr", "weight_decay") + (("betas", "eps") if form is MesoAdamW else ("momentum",))
    groups = [
        {key: value for key, value in group.items() if key in own or key not in stock.defaults}
        for group in stock.param_groups
    ]
    return form(groups, size_out=size, size_in=size, refresh=refresh, subspaces=subspaces)


def _shard(owned: OwnedParameter) -> Shard:
    """Each of the `stride` stacked matrices (gate and up) is sharded by itself."""
    if owned.is_expert:
        group = parallel_state.get_expert_tensor_parallel_group()
    else:
        group = parallel_state.get_tensor_model_parallel_group()
    part = owned.parameter.shape[owned.dim] // owned.stride
    starts = [(n * owned.shards + owned.shard) * part for n in range(owned.stride)]
    columns = tuple((start, start + part) for start in starts)
    return Shard(owned.dim, owned.whole_shape[owned.dim], columns, group)


def _sharded_state_dict(
    stock: Callable[..., Any], meso: Meso, owned: dict[torch.Tensor, OwnedParameter]
) -> Callable[..., Any]:
    """Megatron's method `stock`, which sees only the moments that have their parameter's shape."""

    def sharded_state_dict(model: Any, is_loading: bool = False, **kwargs: Any) -> Any:
        if is_loading:
            meso.init_state()
        taken = {
            parameter: {name: state.pop(name) for name in meso.moments}
            for parameter, state in meso.state.items()
            if meso.is_compressed(parameter)
        }
        try:
            result = stock(model, is_loading, **kwargs)
        finally:
            for parameter, moments in taken.items():
                meso.state[parameter].update(moments)
        states = result.get("optimizer", result)["state"]
        order = [p for group in meso.param_groups for p in group["params"]]
        for number, parameter in enumerate(order):
            for name, moment in taken.get(parameter, {}).items():
                states[number][name] = _sharded(name, moment, owned[parameter])
        return result

    return sharded_state_dict


def _sharded(name: str, moment: torch.Tensor, owned: OwnedParameter) -> ShardedTensor:
    """Whole on every rank that has a piece of the parameter; the first of them writes it.

    The key has the sides' lengths: a vocabulary padded otherwise has other subspaces.
    """
    tensor, data = number_of_copy(owned)
    copy = int(getattr(owned.parameter, "shared", False))  # of the embedding, on the last stage
    key = f"optimizer.state.meso.{name}.{owned.name}.{'x'.join(map(str, owned.whole_shape))}"
    return ShardedTensor.from_rank_offsets(key, moment, replica_id=(copy, tensor, data))
