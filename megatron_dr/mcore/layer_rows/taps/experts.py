"""Mixture of experts: whose token is whose inside an expert, and which samples it sees.

Before the tokens of a layer are dispatched, a column of sample numbers [tokens, 1] goes the same
way: through a copy of the layer's own dispatcher, so that dropping, padding, exchange and sorting
are Megatron's. An expert's X [T, I] and dY [T, O] then become [L, N, .] by an index of tokens
[L, N], L the most tokens that a sample has there, padded with rows of zeros. The cost per layer is
one more exchange, of a number per token, and one wait for the host per expert.

With e = expert parallel x expert tensor parallel ranks and s = tensor x context parallel ranks,
which share their samples, an expert on this rank sees

| e | samples | a sample's tokens |
|---|---|---|
| 1 | this rank's | spread over tensor- and context-parallel ranks |
| tensor parallel size | this rank's | spread over context-parallel ranks |
| a multiple of s | those of e / s peers' microbatches, which compete together | all here |

Auxiliary losses (load balancing, z-loss) are attached to the router's scores token by token, so
their gradient arrives in the gradient of each token's logits: it counts as that token's sample's,
in scores and in the update, as in the input's gradient. TE's and fused permutations and the flex
dispatcher have not run.
"""

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_dr.config.dr import DRConfig
from megatron_dr.mcore import collectives, compat
from megatron_dr.mcore.layer_rows.taps.hooks import Undo, Written, put, trained, watch
from megatron_dr.projection import per_sample

# a linear layer -> of each of its experts, tokens [L, N], -1: none
Routes = dict[torch.nn.Module, list[torch.Tensor]]


# -- where experts are ---------------------------------------------------------------------------
peers = compat.data_ranks_per_row  # sets of samples that an expert sees: e / s of the table, or 1


def token_groups() -> list[Any]:
    """Ranks over which a sample's tokens for one expert are spread (the table's last column)."""
    spread, tp = compat.expert_ranks(), parallel_state.get_tensor_model_parallel_group()
    cp = parallel_state.get_context_parallel_group()
    return [tp, cp] if spread == 1 else [cp] if spread == dist.get_world_size(tp) else []


def data_group() -> collectives.Group:
    """Ranks that hold the same expert and see other samples of the target."""
    if compat.expert_ranks() in (1, parallel_state.get_tensor_model_parallel_world_size()):
        return compat.data_group()
    return parallel_state.get_expert_data_parallel_group()


def is_first() -> bool:
    """Whether this rank speaks for those that know the same of an expert."""
    if compat.expert_ranks() == 1:
        return bool(parallel_state.get_tensor_model_parallel_rank() == 0)
    return bool(parallel_state.get_expert_tensor_parallel_rank() == 0)


def windows(tokens: torch.Tensor, ratio: list[float]) -> tuple[torch.Tensor, list[float]]:
    """Tokens [n, peers b] and the target's ratio by microbatch, of all peers together (collective).

    Args:
        tokens: [n, b] of this rank's general samples.
    """
    if peers() == 1:
        return tokens, ratio
    group = parallel_state.get_expert_tensor_and_model_parallel_group()
    own = torch.cat([tokens, tokens.new_tensor(ratio)[:, None]], 1)
    every = collectives.gathered(own, group)
    parts = every.view(peers(), -1, *own.shape)[:, 0]  # the ranks of a peer have the same samples
    tokens = parts[..., :-1].transpose(0, 1).flatten(1)
    return tokens, parts[..., -1].sum(0).tolist()


def data_ranks() -> list[int]:
    """Data ranks of the peers, which are neighbours, in their order."""
    first = parallel_state.get_data_parallel_rank() // peers() * peers()
    return [*range(first, first + peers())]


def check(dr: DRConfig, config: Any) -> None:
    """Raise ValueError where samples can't be followed into experts."""
    if not config.num_moe_experts:
        return
    if config.moe_token_dispatcher_type == "flex" or config.moe_shared_expert_overlap:
        raise ValueError(
            "sample rows can't follow tokens through the flex dispatcher or beside overlapped "
            "shared experts: use --moe-token-dispatcher-type alltoall without "
            "--moe-shared-expert-overlap."
        )
    balanced = _balanced(config)
    if dr.target_pass == "merged" and balanced:
        raise ValueError(
            f"a router can't tell the target's tokens of a merged microbatch from the general ones "
            f"that it balances ({balanced}): use --dr-target-pass own, or drop that."
        )
    tp = parallel_state.get_tensor_model_parallel_world_size()
    shared = tp * parallel_state.get_context_parallel_world_size()
    if compat.expert_ranks() not in (1, tp) and compat.expert_ranks() % shared:
        raise ValueError(
            f"sample rows can't follow tokens to experts over {compat.expert_ranks()} ranks: "
            f"expert model x expert tensor parallelism must be 1, {tp} or a multiple of {shared}."
        )
    if peers() > 1 and (dr.target_pass == "merged" or dr.window == "streaming"):
        _refuse(f"--dr-target-pass {dr.target_pass} with --dr-window {dr.window}")


def _balanced(config: Any) -> str:
    """The flag by which routers balance all tokens of a microbatch; empty: none."""
    coefficients = config.moe_aux_loss_coeff
    if not isinstance(coefficients, list):
        coefficients = [coefficients]
    quantiles = config.moe_router_load_balancing_type == "quantile_balancing"
    flags = {
        "--moe-aux-loss-coeff": any(coefficients),
        "--moe-z-loss-coeff": config.moe_z_loss_coeff,
        "--moe-router-enable-expert-bias": config.moe_router_enable_expert_bias,
        "--moe-router-load-balancing-type quantile_balancing": quantiles,
    }
    return next((flag for flag, given in flags.items() if given), "")


def are_near() -> bool:
    """Whether an expert sees samples of its own rank's microbatches alone."""
    near = (1, parallel_state.get_tensor_model_parallel_world_size())
    return compat.expert_ranks() in near


def check_deferred(dr: DRConfig) -> None:
    """Raise ValueError where experts are spread too far for weights found at a step's end."""
    if not are_near():
        _refuse(
            f"--dr-blocks {dr.blocks}, --dr-window {dr.window} and --dr-passes {dr.passes} (or an "
            "embedding that is tied over pipeline stages)"
        )


def _refuse(what: str) -> None:
    raise ValueError(
        f"sample rows with experts over {compat.expert_ranks()} ranks, which see other ranks' "
        f"samples, can't have {what}: use --dr-blocks matrix --dr-window microbatch --dr-passes 1 "
        "--dr-target-pass own, or no more expert parallelism than tensor parallelism."
    )


# -- taps ----------------------------------------------------------------------------------------
def tap_dispatcher(layer: Any, observer: Any, routes: Routes) -> list[Undo]:
    """Follow the tokens of a `MoELayer` into its experts' linear layers.

    Args:
        routes: gets the indices of the local experts' layers, before they run.
    """
    dispatcher, experts = layer.token_dispatcher, layer.experts
    each = getattr(experts, "local_experts", None)
    if each is None and not hasattr(experts, "linear_fc1"):
        return []  # of another kind: their parameters are covered by no tap
    stock = dispatcher.dispatch_preprocess

    def preprocess(
        hidden_states: torch.Tensor, routing_map: torch.Tensor, probs: torch.Tensor
    ) -> Any:
        if observer.active and torch.is_grad_enabled():
            indices = _indices(dispatcher, hidden_states, routing_map, probs)
            if each is None:  # one layer for all
                routes[experts.linear_fc1] = routes[experts.linear_fc2] = indices
            for expert, index_LN in zip(each or (), indices, strict=each is not None):
                routes[expert.linear_fc1] = routes[expert.linear_fc2] = [index_LN]
        return stock(hidden_states, routing_map, probs)

    return [put(dispatcher, "dispatch_preprocess", preprocess), routes.clear]


@torch.no_grad()
def _indices(
    dispatcher: Any, hidden: torch.Tensor, routing_map: torch.Tensor, probs: torch.Tensor
) -> list[torch.Tensor]:
    """Of each local expert: which of its tokens [L, N] are whose, -1 for none.

    Args:
        hidden: [s, b, H].
    """
    stock, shadow = type(dispatcher), copy.copy(dispatcher)  # its state stays as it is
    length, samples = hidden.shape[:2]
    first = 0
    if peers() > 1:
        shared = compat.expert_ranks() // peers()
        first = dist.get_rank(dispatcher.tp_ep_group) // shared * samples
    number_N = torch.arange(first, first + samples, device=hidden.device, dtype=torch.float32)
    number_T1 = number_N.repeat(length).view(length, samples, 1)
    number_T1, probs = stock.dispatch_preprocess(shadow, number_T1, routing_map, probs)
    number_T1, probs = stock.token_dispatch(shadow, number_T1, probs)
    number_T1, counts, _ = stock.dispatch_postprocess(shadow, number_T1, probs)
    parts = number_T1.flatten().long().split(counts.tolist())
    token = functools.partial(torch.arange, device=hidden.device)
    return [per_sample.by_sample(token(len(p)), p, samples * peers(), pad=-1) for p in parts]


def by_sample(weigh: Callable[..., Any], index_LN: torch.Tensor) -> Callable[..., Any]:
    """`weigh` of [L, N, I] and [L, N, O], for tokens [T, I] and [T, O]."""
    return lambda x_TI, dy_TO: weigh(rows(x_TI, index_LN), rows(dy_TO, index_LN))


def rows(x_TI: torch.Tensor, index_LN: torch.Tensor) -> torch.Tensor:
    """Rows by number; -1 is the row of zeros behind the last."""
    return torch.nn.functional.pad(x_TI, (0, 0, 0, 1))[index_LN]


def tap_router(router: Any, observer: Any) -> list[Undo]:
    """A router's weight and bias: X is its input, dY the gradient of the logits."""
    own = trained(router, observer)
    if not own:
        return []
    gradients = Written(own.values())

    def observe(x: torch.Tensor, dy: torch.Tensor) -> None:
        for name, parameter in own.items():
            if name == "weight":
                weighted = observer.linear(parameter, x.to(dy.dtype), dy)
                grad = None if weighted is None else weighted.product()
            else:
                grad = observer.vector(parameter, observer.per_sample(parameter, dy.float()))
            gradients.put(parameter, grad)

    return [watch(router, "gating", observer, observe), *gradients.undo]
