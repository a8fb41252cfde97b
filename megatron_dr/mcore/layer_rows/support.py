"""What sample rows refuse, and what they say at attach."""

from typing import Any

from megatron.core import parallel_state

from megatron_dr.config.dr import DRConfig
from megatron_dr.mcore import collectives
from megatron_dr.mcore.layer_rows import window
from megatron_dr.mcore.layer_rows.places import Place
from megatron_dr.mcore.layer_rows.taps import experts
from megatron_dr.mcore.layer_rows.weigh import needs_rows
from megatron_dr.mcore.ownership import OwnedParameter
from megatron_dr.mcore.say import say


def check(dr: DRConfig, config: Any, owned: list[OwnedParameter]) -> None:
    """Raise ValueError, in one sentence that says what to change, where sample rows can't work."""
    experts.check(dr, config)
    if dr.packed:
        _check_packed(dr, config)
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    two_copies = any(o.partial == "embedding" for o in owned)
    if two_copies and dr.score == "ghost":
        raise ValueError(
            f"--dr-score ghost can't score an embedding that is tied over {stages} pipeline "
            "stages: use sketched or exact, or --untie-embeddings-and-output-weights."
        )
    if two_copies and dr.window == "streaming":
        raise ValueError(
            f"--dr-window streaming can't weigh an embedding that is tied over {stages} pipeline "
            "stages: use --dr-window microbatch, or --untie-embeddings-and-output-weights."
        )
    if dr.window == "step" and dr.score == "ghost" and needs_rows(dr):
        raise ValueError(
            f"--dr-score ghost keeps no samples to the end of a step, as --dr-window step with "
            f"--dr-set {dr.set} and --dr-norm {dr.norm} needs: use --dr-score sketched or exact, "
            "or --dr-set topk or filter with --dr-norm tokens."
        )


def _check_packed(dr: DRConfig, config: Any) -> None:
    """What can't be done with samples in packs."""
    if config.num_moe_experts:
        raise ValueError(
            "sample rows can't follow the samples of a pack into experts: drop --dr-pack, or use "
            "--dr-rows slot."
        )
    if config.context_parallel_size > 1 or dr.target_pass == "merged":
        raise ValueError(
            "sample rows with --dr-pack need --context-parallel-size 1 and --dr-target-pass own: "
            "a pack is one role's, on one rank."
        )


def alphas(dr: DRConfig) -> set[float]:
    """Those that a run begins and ends with."""
    fixed = dr.feasible_set().alpha
    if fixed is not None:
        return {fixed}
    return {dr.alpha} if dr.alpha_style == "constant" else {dr.alpha, dr.end_alpha}


def is_immediate(dr: DRConfig, owned: list[OwnedParameter]) -> bool:
    """Whether weights are found inside the backward: on every rank alike (collective)."""
    here = dr.passes == 1 and dr.blocks == "matrix" and dr.window != "step"
    two_copies = any(o.partial == "embedding" for o in owned)
    everywhere = all(collectives.of_all_ranks(here and not two_copies))
    if not everywhere:
        experts.check_deferred(dr)
    return everywhere


def announce(
    dr: DRConfig, places: list[Place], names: tuple[str, ...], samples: int, immediate: bool
) -> None:
    """What will be projected and how, on rank 0, when the microbatches' shape is known: so many
    general samples each."""
    scores = sorted({p.score for p in places if not p.is_vector})
    how = "in the backward" if immediate else f"at the step's end, {dr.passes} pass(es)"
    say(
        f"set {dr.set}, sample rows of a {dr.window}, {len(names)} block(s) ({dr.blocks}), norm "
        f"{dr.norm}; scored {' and '.join(scores) or 'exact'}; weights {how}"
    )
    few = window.note(dr, samples)
    if few:
        say(few)
    if not immediate and dr.passes == 1:
        say(
            "note: every layer's input and output gradient of a step are kept to its end; "
            "--dr-passes 2 keeps scores alone and runs each microbatch twice"
        )
