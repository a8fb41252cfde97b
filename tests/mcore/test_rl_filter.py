"""A rollout filtered once: scores against plain loops in float64, and what it leaves behind."""

import argparse
import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from safetensors.torch import load_file

from megatron_dr.config.rl import RLConfig
from megatron_dr.mcore.loop import parts
from megatron_dr.mcore.rl import filter_once
from megatron_dr.mcore.rl.forward import policy_step
from megatron_dr.report import metrics
from megatron_dr.rl.experience import Experience, ExperienceStream

from . import _data, _megatron, _oracle, _rl
from . import _ppo_step as ppo
from . import _rl_step as plain
from ._data import Layout
from ._oracle import Parameters
from ._ranks import run_ranks
from ._rl_flags import configs, parsed

LENGTH, ROWS = plain.LENGTH, len(plain.ROWS)
START = {k: v.double() for k, v in _oracle.initial(Layout()).items()}
TIED = {k: v.double() for k, v in _oracle.initial(Layout(tied=True, qk_layernorm=True)).items()}


# -- the oracle ----------------------------------------------------------------------------------
def part(p: Parameters, known: Experience, n: int, rl: RLConfig, by_reward: bool) -> Any:
    """(sum, count) of completion n's losses, one token after the other."""
    log_prob = plain.log_probs(p, known.tokens_NT[n : n + 1])[0]
    losses, a = [], float(known.advantage_NA[n, 0])
    for t in known.mask_NT[n].nonzero().flatten().tolist():
        if by_reward:
            losses.append(-a * log_prob[t])
            continue
        ratio = (log_prob[t] - float(known.old_NT[n, t])).exp()
        best = min(ratio * a, ratio.clamp(1 - rl.clip, 1 + rl.clip) * a, key=float)
        d = float(known.reference_NT[n, t]) - log_prob[t]
        losses.append(-best + rl.kl * (d.exp() - d - 1))
    sequence = rl.aggregation == "sequence"
    total = sum(losses, torch.zeros([]).double()) / (max(len(losses), 1) if sequence else 1)
    return total, min(len(losses), 1) if sequence else len(losses)


def flat(p: Parameters, loss: torch.Tensor) -> torch.Tensor:
    if not loss.requires_grad:
        return torch.zeros(sum(v.numel() for v in p.values()), dtype=torch.float64)
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(p.values()))])


def expected(start: Parameters, rl: RLConfig, by_reward: bool) -> Any:
    """Scores, and the mean gradient of what is kept."""
    p = {k: v.clone().requires_grad_() for k, v in start.items()}
    general, target = plain.experience(p), of_target(start)
    parts = [part(p, target, n, rl, by_reward) for n in range(len(target))]
    t = flat(p, sum(loss for loss, _ in parts) / sum(count for _, count in parts))
    parts = [part(p, general, n, rl, False) for n in range(ROWS)]
    gradients = [flat(p, loss) for loss, _ in parts]
    score_N = torch.stack([g @ t for g in gradients])
    kept = [n for n in range(ROWS) if score_N[n] >= 0]
    mean = sum(gradients[n] for n in kept) / sum(parts[n][1] for n in kept)
    split = mean.split([v.numel() for v in p.values()])
    return score_N, dict(zip(p, split, strict=True))


def of_target(start: Parameters) -> Experience:
    """Five completions of another rollout: no number of ranks divides it."""
    known = plain.experience(start)
    choice = [7, 6, 1, 0, 4]
    names = ("tokens_NT", "mask_NT", "old_NT", "reference_NT", "reward_N", "advantage_NA")
    rows = {name: getattr(known, name)[choice] for name in names}
    rows["tokens_NT"] = rows["tokens_NT"].roll(1, 0)
    rows["advantage_NA"] = torch.tensor([0.7, -1.1, 0.4, 1.3, -0.5])[:, None]
    return dataclasses.replace(known, **rows)


# -- Megatron ------------------------------------------------------------------------------------
def schedule(model: list[Any], known: Experience, rl: RLConfig) -> dict[str, Any]:
    """A plain step on an experience."""
    rank, size = (f() for f in (parallel_state.get_data_parallel_rank,
                                parallel_state.get_data_parallel_world_size))  # fmt: skip
    streams = [
        ExperienceStream(micro_batch_size=2, rank=rank, size=size, batch_size=ROWS,
                         plain=False, aggregation=rl.aggregation) for _ in model
    ]  # fmt: skip
    for stream in streams:
        stream.show(known, 3)
    return {
        "forward_step_func": partial(policy_step, rl),
        "data_iterator": streams if model[1:] else streams[0],
        "model": model if model[1:] else model[0], "num_microbatches": ROWS // 2 // size,
        "seq_length": LENGTH, "micro_batch_size": 2, "forward_only": False,
    }  # fmt: skip


def state(model: list[Any], optimizer: Any, config: Any) -> list[Any]:
    """What a scoring pass could disturb."""
    groups = [g for chunk in model for g in chunk.bucket_groups]
    return [
        *[p.detach().clone() for chunk in model for p in chunk.parameters()],
        *[b.grad_data.clone() for chunk in model for b in chunk.buffers],
        *[p.main_grad.data_ptr() for chunk in model for p in chunk.parameters()],
        *[m.training for chunk in model for m in chunk.modules()],
        torch.get_rng_state(), *get_cuda_rng_tracker().get_states().values(),
        *[(g.is_first_batch, g.is_last_microbatch, g.grad_reduce_finished, g.grad_reduce_handle,
           dict(g.golden_per_param_grad_ready_counts), dict(g.per_param_grad_ready_counts))
          for g in groups],
        config.finalize_model_grads_func, config.no_sync_func, config.grad_sync_func,
        *[p.clone() for o in getattr(optimizer, "chained_optimizers", [optimizer])
          for g in o.optimizer.param_groups for p in g["params"]],
        [dict(o.optimizer.state) for o in getattr(optimizer, "chained_optimizers", [optimizer])],
    ]  # fmt: skip


def same(first: list[Any], second: list[Any]) -> bool:
    pairs = zip(first, second, strict=True)
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


def gradient(model: list[Any], config: Any, known: Experience, rl: RLConfig) -> Any:
    for chunk in model:
        chunk.zero_grad_buffer()
    get_forward_backward_func()(**schedule(model, known, rl))
    return [p.main_grad.clone() for c in model for p in c.parameters()], _megatron.pieces(
        model, config, "main_grad"
    )


def on_rank(layout: Layout, rl: RLConfig, start: Parameters) -> Any:
    """Scores, the gradient on what is kept, and whether all else is as it was."""
    _data.LENGTH = LENGTH
    _megatron.initialize(layout)
    initial = {k: v.float() for k, v in start.items()}
    model, optimizer, config = _megatron.build(layout, initial)
    function, known, target = get_forward_backward_func(), plain.experience(start), of_target(start)
    before, _ = gradient(model, config, known, rl)  # overlap: learns when gradients are ready
    for chunk in model:
        chunk.zero_grad_buffer()
    was = state(model, optimizer, config)
    arguments = (target, rl, model, function, schedule(model, known, rl))
    score_N = filter_once.scores(known, *arguments)
    unchanged = same(was, state(model, optimizer, config))
    after, _ = gradient(model, config, known, rl)
    unchanged = unchanged and same(before, after)
    kept = filter_once.filtered(known, *arguments)
    other = dataclasses.replace(kept, tokens_NT=torch.where(
        kept.mask_NT.any(1, keepdim=True), kept.tokens_NT, 9))  # fmt: skip
    mean, pieces = gradient(model, config, kept, rl)
    unseen = same(mean, gradient(model, config, other, rl)[0])
    pieces = [(*rest, values.clone()) for *rest, values in pieces]
    with_dropout(model)
    for chunk in model:
        chunk.zero_grad_buffer()
    was = state(model, optimizer, config)
    dropped = filter_once.scores(known, *arguments)
    unchanged = unchanged and same(was, state(model, optimizer, config))
    parallel_state.destroy_model_parallel()
    return score_N, dropped, pieces, kept, unchanged, unseen


def with_dropout(model: list[Any]) -> None:
    for module in (m for chunk in model for m in chunk.modules()):
        if hasattr(module, "hidden_dropout"):
            module.hidden_dropout = 0.2


def layouts(cases: dict[str, Any]) -> dict[str, Any]:
    return {name: on_rank(*case) for name, case in cases.items()}


TOKEN = RLConfig(reward="a:b", clip=plain.CLIP, kl=plain.KL)
SEQUENCE = dataclasses.replace(TOKEN, aggregation="sequence", target_loss="train-loss")
ONE = {"one": (Layout(per_token=True), SEQUENCE, START)}
TWO = {
    "dp2": (Layout(dp=2, per_token=True, distributed_optimizer=True, overlap=True,
                   overlap_param_gather=True), SEQUENCE, START),
    "tp2 sp": (Layout(tp=2, sequence_parallel=True, per_token=True, tied=True,
                      qk_layernorm=True), TOKEN, TIED),
    "pp2": (Layout(pp=2, per_token=True, tied=True, qk_layernorm=True), TOKEN, TIED),
    "tp2": (Layout(tp=2, per_token=True), SEQUENCE, START),
    "vpp2": (Layout(pp=2, vpp=2, per_token=True, distributed_optimizer=True), TOKEN, START),
}  # fmt: skip


def test_scores_and_what_is_kept_are_those_of_plain_loops_in_every_layout() -> None:
    wanted = {}
    for world, cases in ((1, ONE), (2, TWO)):
        ranks = run_ranks(world, layouts, cases)
        for name, (layout, rl, start) in cases.items():
            key = (rl, layout.tied)
            if key not in wanted:
                wanted[key] = expected(start, rl, rl.target_loss == "reward")
            check([rank[name] for rank in ranks], *wanted[key], name, layout)


def check(found: Any, score_N: Any, mean: Parameters, name: str, layout: Layout) -> None:
    assert (score_N < 0).any() and (score_N > 0).any(), "the case must filter"
    for got, dropped, _, kept, unchanged, unseen in found:
        torch.testing.assert_close(got, score_N, rtol=1e-3, atol=1e-6, msg=name)
        assert torch.equal(got, found[0][0]) and unchanged and unseen, name
        assert (dropped - score_N).abs().max() > 1e-3, name  # dropout was there
        has_tokens = plain.experience(START).mask_NT.any(1)
        assert torch.equal(kept.mask_NT.any(1), (score_N >= 0) & has_tokens), name
        assert kept.statistics["kept"] == float((score_N >= 0).double().mean())
    if not layout.distributed_optimizer:  # else a rank has only its shard of the reduced gradient
        whole = _megatron.whole([pieces for _, _, pieces, *_ in found])
        for parameter, value in mean.items():
            torch.testing.assert_close(
                whole[parameter], value.float(), rtol=1e-3, atol=3e-6, msg=f"{name}: {parameter}"
            )


def with_a_value_head(layout: Layout) -> torch.Tensor:
    ppo.with_head()
    _megatron.initialize(layout)
    model, _, _ = _megatron.build(layout, ppo.initial())
    return filter_once.scores(
        ppo.GENERAL, ppo.TARGET, ppo.RL, model, get_forward_backward_func(),
        schedule(model, ppo.GENERAL, ppo.RL),
    )  # fmt: skip


def test_a_value_loss_has_no_part_in_scores() -> None:
    p = {k: v.double().requires_grad_() for k, v in ppo.initial().items()}
    policy = dataclasses.replace(ppo.GENERAL, reward_N=torch.full([len(ppo.ROWS)], torch.nan))
    t = ppo.gradient(p, ppo.TARGET, [*range(len(ppo.TARGETS))], True, int(ppo.TARGET.mask_NT.sum()))
    rows = [ppo.gradient(p, policy, [n], False, 1.0) for n in range(len(ppo.ROWS))]
    wanted_N = torch.stack([sum((g[k] * t[k]).sum() for k in p) for g in rows])
    for found_N in run_ranks(2, with_a_value_head, Layout(tp=2, sequence_parallel=True,
                                                          per_token=True)):  # fmt: skip
        torch.testing.assert_close(found_N, wanted_N, rtol=1e-3, atol=1e-6)


# -- in Megatron's loop --------------------------------------------------------------------------
@pytest.mark.soak
def test_a_run_keeps_its_choice_for_a_cycle_and_over_a_resume(tmp_path: Path) -> None:
    """Stopped in the middle of the first cycle; it goes on to the second one in another layout."""
    data, folder = _rl.write_prompts(tmp_path), tmp_path / "save"
    common = f"--dr-rl-filter once --dr-target-data {data['target']} --save-interval 3"
    logs = [tmp_path / f"{name}.jsonl" for name in ("whole", "resumed")]
    whole = _rl.parameters(_rl.run(data, f"{common} --save {folder} --dr-metrics {logs[0]}", 5))
    more = f"""{common} --load {folder} --ckpt-step 3 --dr-metrics {logs[1]}
        --tensor-model-parallel-size 2 --sequence-parallel"""
    resumed = _rl.parameters(_rl.run(data, more, 5, 2))
    for name, value in whole.items():
        torch.testing.assert_close(resumed[name], value, rtol=1e-3, atol=1e-4, msg=name)
    lines = metrics.read(logs[0], "train")
    for got, want in zip(metrics.read(logs[1], "train"), lines[3:], strict=True):
        for name in ("policy loss", "kept", "reward", "target reward"):
            assert got[name] == pytest.approx(want[name], rel=2e-3, abs=2e-5), (got, want)
    assert len({line["kept"] for line in lines[:4]}) == 1 and 0 < lines[0]["kept"] < 1
    assert not any(name.startswith("target policy") for name in lines[0]), "the steps are plain"
    saved = load_file(folder / "dr_rollouts" / "iter_0000003.safetensors")
    kept_N = saved["general.mask_NT"].any(1)
    assert float(kept_N.double().mean()) == lines[0]["kept"]


WRONG = {
    "": "--dr-rl-filter once needs a target: give --dr-target-data, or --dr-rl-target self.",
    "--dr-rl-target self --dr-set cone": "plain training, and does not go with --dr-set cone",
    "--dr-rl-target self --dr-alpha 0.1": "--dr-alpha has no meaning with --dr-rl-filter once",
    "--dr-target-data t.jsonl --dr-target-batch-size 8": "--dr-target-batch-size has no meaning",
}


@pytest.mark.parametrize("more, sentence", WRONG.items())
def test_contradictions_are_refused(more: str, sentence: str) -> None:
    with pytest.raises(ValueError) as caught:
        configs("--dr-rl-filter once " + more)
    assert sentence in str(caught.value)


def test_the_set_is_mean() -> None:
    for more in ("--dr-target-data t.jsonl", "--dr-rl-target self --dr-set mean"):
        dr, _ = configs("--dr-rl-filter once " + more)
        assert (dr.set, dr.alpha_style, dr.needs_target) == ("mean", "constant", False)
    with pytest.raises(ValueError, match="does not go with --num-experts"):
        parts.prepare(argparse.Namespace(**vars(parsed("--dr-rl-filter once")), num_experts=4))
