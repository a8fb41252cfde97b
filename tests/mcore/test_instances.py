"""Several instances of the distributed optimizer: each has every shard, of the same gradient."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state

import megatron_dr
from megatron_dr import DRConfig
from megatron_dr.mcore.compat import refusals
from megatron_dr.mcore.refuse import refuse

from . import _megatron, _oracle, _sample_check, test_wire
from ._data import Layout
from ._layouts import check
from ._pairs import some
from ._problem import Problem
from ._ranks import run_ranks

TWO = {"instances": 2, "distributed_optimizer": True}
LAYOUTS = {
    "rows-of-1": Layout(dp=4, row_ranks=1, **TWO),
    "rows-of-1-overlap": Layout(dp=4, row_ranks=1, overlap=True, overlap_param_gather=True, **TWO),
    "an-instance-a-row": Layout(dp=4, **TWO),
    "an-instance-a-row-overlap": Layout(dp=4, overlap=True, average=True, **TWO),
    "a-row-of-both": Layout(dp=4, row_ranks=4, sequences=4, overlap=True, **TWO),
    "target-ranks": Layout(dp=4, row_ranks=1, target_ranks=1, overlap=True, **TWO),
    "domains": Layout(dp=4, domains=2, **TWO),
    "token": Layout(dp=4, per_token=True, overlap=True, **TWO),
    "cp2": Layout(dp=2, cp=2, full_masks=True, overlap=True, **TWO),
    "pp2-tied": Layout(pp=2, dp=2, tied=True, **TWO),
    "experts": Layout(moe=True, ep=2, dp=4, overlap=True, **TWO),
    "four-instances": Layout(dp=4, instances=4, distributed_optimizer=True, overlap=True),
    "tp2-sp": Layout(tp=2, dp=4, sequence_parallel=True, overlap=True, **TWO),
}


SOAK = ("token", "cp2", "pp2-tied")  # each goes through what another one has, too
KEPT = [name for name in LAYOUTS if name not in SOAK]


@pytest.mark.parametrize("layout", some(LAYOUTS, *KEPT))
def test_exact_equals_oracle(layout: Layout) -> None:
    check(layout)


@pytest.mark.parametrize("name", ["an-instance-a-row", "rows-of-1-overlap", "experts"])
def test_sketched_equals_sketching_oracle(name: str) -> None:
    check(LAYOUTS[name], Problem(gram="sketch"))


def test_sample_rows() -> None:
    layout = Layout(dp=4, per_token=True, overlap=True, **TWO)
    _sample_check.check(layout, _sample_check.MODES["exact"])


# -- the instances are alike -----------------------------------------------------------------------
def shards(layout: Layout, initial: Any) -> list[torch.Tensor]:
    """This rank's shards of the reduced gradient, after a step."""
    dr = DRConfig(rows="rank", gram="exact", row_ranks=layout.row_ranks)
    model = _megatron.train(layout, 1, initial, lambda m, o, c: megatron_dr.attach(m, o, c, dr))[0]
    group = parallel_state.get_data_parallel_group(True, partial_data_parallel=True)
    found = []
    for bucket in (bucket for one in model[0].bucket_groups for bucket in one.buckets):
        whole = bucket.grad_data.view(dist.get_world_size(group), -1)
        found.append(whole[dist.get_rank(group)].clone())
    return found


@pytest.mark.parametrize("name", ["rows-of-1", "an-instance-a-row-overlap"])
def test_every_instance_has_the_same_gradient(name: str) -> None:
    """Bit for bit: the ranks of an instance keep what those of equal place in the other keep."""
    ranks = run_ranks(4, shards, LAYOUTS[name], _oracle.initial(LAYOUTS[name]))
    for one, other in ((ranks[0], ranks[2]), (ranks[1], ranks[3])):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True)) and one
    assert not torch.equal(ranks[0][0], ranks[1][0])


# -- what is sent ----------------------------------------------------------------------------------
def between(layout: Layout, dr: DRConfig | None, initial: Any) -> tuple[int, float]:
    """What a rank sends in two steps but for parameters: all, and that to the other instance."""
    found = [0.0]
    size = layout.dp // layout.instances
    instance = lambda rank: rank // size  # noqa: E731  # nothing else is parallel

    def watch(name: str, share: Any) -> None:
        stock = getattr(dist, name)

        def watched(*args: Any, **kw: Any) -> Any:
            ranks = dist.get_process_group_ranks(kw.get("group"))
            number = len({instance(rank) for rank in ranks})
            others = sum(instance(rank) != instance(dist.get_rank()) for rank in ranks)
            tensors = [t for t in (*args, *kw.values()) if torch.is_tensor(t)]
            found[0] += share(max(t.nbytes for t in tensors), len(ranks), number, others)
            return stock(*args, **kw)

        setattr(dist, name, watched)

    # a reduction that spans instances is as good as one inside each and then between them
    watch("all_reduce", lambda size, n, instances, others: 2 * (instances - 1) / n * size)
    for name in ("reduce_scatter_tensor", "all_gather_into_tensor"):
        watch(name, lambda size, n, instances, others: (instances - 1) / n * size)
    watch("all_to_all_single", lambda size, n, instances, others: others / n * size)
    return test_wire.sent(layout, dr, initial), found[0]


@pytest.mark.parametrize(
    "target_ranks, row_ranks, all_times, times",
    [
        (2, 0, 1.0, 1.0),  # an instance is a row: as plain Megatron, in all and between
        (2, 1, 1.0, 1.5),  # rows of 1 cross between instances one by one
        (0, 0, 1.75, 1.5),  # the target's reduction too, which ends at its shards
        (0, 4, 1.75, 1.5),  # all ranks are one row
    ],
)
def test_between_instances_goes_what_megatron_sends_there(
    target_ranks: int, row_ranks: int, all_times: float, times: float
) -> None:
    layout = Layout(dp=4, target_ranks=target_ranks, **TWO)
    initial = _oracle.initial(layout)
    dr = DRConfig(rows="rank", gram="exact", target_ranks=target_ranks, row_ranks=row_ranks)
    plain = run_ranks(4, between, layout, None, initial)
    ours = run_ranks(4, between, layout, dr, initial)
    for (all_stock, stock), (all_found, found) in zip(plain, ours, strict=True):
        assert all_found == pytest.approx(all_times * all_stock, rel=0.02)
        assert found == pytest.approx(times * stock, rel=0.02) and stock > 10_000


# -- refused ---------------------------------------------------------------------------------------
def refusal(layout: Layout, dr: DRConfig) -> str:
    """What attach says."""
    _megatron.initialize(layout)
    try:
        megatron_dr.attach(*_megatron.build(layout), dr)
    except ValueError as error:
        return str(error)
    return ""


THREE = {"instances": 3, "distributed_optimizer": True, "overlap": True}


@pytest.mark.parametrize(
    "layout, dr, words",
    [
        (
            Layout(dp=3, **THREE), DRConfig(rows="rank", gram="exact"),
            "into 3 equal parts, one for each data rank: add --ddp-pad-buckets-for-high-nccl-busbw",
        ),
        (Layout(dp=3, **THREE), DRConfig(rows="rank", gram="sketch"), ""),
        (
            Layout(dp=6, **THREE), DRConfig(rows="rank", row_ranks=3),
            "--dr-row-ranks 3 must divide, or be a multiple of, the 2 data x context ranks of an",
        ),
    ],
    ids=["uneven", "uneven-sketched", "rows-across"],
)  # fmt: skip
def test_refused(layout: Layout, dr: DRConfig, words: str) -> None:
    for said in run_ranks(layout.world, refusal, layout, dr):
        assert words in said and bool(said) == bool(words)


def test_without_einops_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refusals, "find_spec", lambda name: None)
    args = SimpleNamespace(num_distributed_optimizer_instances=2)
    with pytest.raises(ValueError, match="^--num-distributed-optimizer-instances 2 needs the pack"):
        refuse(refusals.WHO, [refusals.EINOPS], args)
    args.num_distributed_optimizer_instances = 1
    refuse(refusals.WHO, [refusals.EINOPS], args)
