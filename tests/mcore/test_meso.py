"""MeSO in Megatron's optimizers: the same run in every layout, and over a checkpoint."""

import io
import math
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.optimizer import OptimizerConfig
from megatron.core.pipeline_parallel import get_forward_backward_func

import megatron_dr
from megatron_dr.mcore.model.meso import MesoPart, note, use_meso
from megatron_dr.optim import MesoAdamW, MesoSGD, Subspaces

from . import _data, _megatron, _oracle, _problem
from ._data import Layout
from ._layouts import config as dr_config
from ._pairs import some
from ._problem import Problem
from ._ranks import run_ranks

STEPS, SIZE, REFRESH, SEED, DECAY, CLIP = 5, 12, 2, 4, 0.1, 0.5
MEAN = Problem(set="mean", norm="none", alpha=0.0)
RATE = {"adam": 3e-3, "sgd": 0.3}
SGD = {"optimizer": "sgd", "sgd_momentum": 0.9}


def configure(form: str) -> None:
    """On a rank: what `_megatron.build` asks Megatron for."""
    more = {"lr": RATE[form], "clip_grad": CLIP, **(SGD if form == "sgd" else {})}
    _megatron.OptimizerConfig = lambda **kwargs: OptimizerConfig(**{**kwargs, **more})


def with_meso(problem: Problem, layout: Layout, model: Any, optimizer: Any, config: Any) -> Any:
    for meso in use_meso(optimizer, model, config, size=SIZE, refresh=REFRESH, seed=SEED):
        for group in meso.param_groups:
            group["weight_decay"] = DECAY  # the scheduler's to set: for all parameters alike
    if problem is not MEAN:
        return megatron_dr.attach(model, optimizer, config, dr_config(layout, problem))
    return None


def run(layout: Layout, initial: Any, form: str, problem: Problem) -> Any:
    configure(form)
    plugin = partial(with_meso, problem, layout)
    model, _, config, _ = _megatron.train(layout, STEPS, initial, plugin)
    return _megatron.pieces(model, config)


def oracle(layout: Layout, form: str, problem: Problem) -> dict[str, torch.Tensor]:
    """One process, whole matrices, float64; every step is clipped."""
    p = {k: v.double().requires_grad_() for k, v in _oracle.initial(layout).items()}
    sizes = {"size_out": SIZE, "size_in": SIZE, "refresh": REFRESH, "subspaces": Subspaces(SEED)}
    common = {"lr": RATE[form], "weight_decay": DECAY, **sizes}
    if form == "adam":
        optimizer = MesoAdamW(p.values(), eps=_megatron.EPS, **common)
    else:
        optimizer = MesoSGD(p.values(), momentum=0.9, **common)
    for step in range(STEPS):
        update, _ = _problem.project(problem, *_oracle.rows(layout, p, step), step)
        norm = math.sqrt(sum(float(u.square().sum()) for u in update.values()))
        assert norm > CLIP
        for name, value in p.items():
            value.grad = update[name] * CLIP / (norm + 1e-6)
        optimizer.step()
    return {name: value.detach() for name, value in p.items()}


def assert_oracles(layout: Layout, form: str, problem: Problem = MEAN) -> None:
    initial, expected = _oracle.initial(layout), oracle(layout, form, problem)
    found = _megatron.whole(run_ranks(layout.world, run, layout, initial, form, problem))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error = float((found[name].double() - value.reshape(-1)).abs().max())
        assert error <= 2e-5, f"{name}: {error}"
        moved = float((initial[name].double() - value).abs().max())
        assert moved > 100 * error, f"{name} moved by {moved}"


LAYOUTS = {
    "world1": Layout(),
    "world1-tied": Layout(tied=True),
    "dp2": Layout(dp=2),
    "tp2": Layout(tp=2),
    "tp2-layernorm-biases": Layout(tp=2, layer_norm=True),
    "tp2-sp-qk-norm": Layout(tp=2, sequence_parallel=True, qk_layernorm=True),
    "tp2-dp2-tied": Layout(tp=2, dp=2, tied=True),
    "pp2": Layout(pp=2),
    "pp2-tied": Layout(pp=2, tied=True),
    "pp2-vpp2": Layout(pp=2, vpp=2),
    "tp2-pp2-sp-tied": Layout(tp=2, pp=2, sequence_parallel=True, tied=True),
    "cp2-token": Layout(cp=2, per_token=True),
    "moe": Layout(moe=True),
    "moe-tp2-sp-ep2": Layout(moe=True, tp=2, sequence_parallel=True, ep=2),
    "moe-tp2-sp-etp2-ep2-dp2": Layout(moe=True, tp=2, sequence_parallel=True, etp=2, ep=2, dp=2),
}


ADAM = ("pp2-vpp2", "tp2-sp-qk-norm", "tp2-pp2-sp-tied", "cp2-token", "moe-tp2-sp-etp2-ep2-dp2")


@pytest.mark.parametrize("layout", some(LAYOUTS, *ADAM))
def test_adam_equals_oracle(layout: Layout) -> None:
    assert_oracles(layout, "adam")


@pytest.mark.parametrize(
    "name", ["world1", "tp2-pp2-sp-tied", pytest.param("moe-tp2-sp-ep2", marks=pytest.mark.soak)]
)
def test_sgd_equals_oracle(name: str) -> None:
    assert_oracles(LAYOUTS[name], "sgd")


def test_projected_gradients_are_compressed() -> None:
    """The plugin's combined gradient is what MeSO gets."""
    assert_oracles(Layout(tp=2, dp=2), "adam", Problem())


def steps(layout: Layout, model: Any, optimizer: Any, first: int, last: int) -> None:
    """On a rank: training steps first .. last - 1."""
    rank, function = parallel_state.get_data_parallel_rank(), get_forward_backward_func()
    for step in range(first, last):
        for chunk in model:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        function(**_megatron.schedule(layout, model, _data.general(layout, step, rank)))
        optimizer.step()


def start(layout: Layout, initial: Any) -> Any:
    configure("adam")
    _megatron.initialize(layout)
    model, optimizer, config = _megatron.build(layout, initial)
    with_meso(MEAN, layout, model, optimizer, config)
    return model, optimizer, config


def sharded(model: Any, optimizer: Any, is_loading: bool) -> dict[str, Any]:
    """As Megatron's checkpointing does it."""
    names = ["model"] if len(model) == 1 else [f"model{n}" for n in range(len(model))]
    state = {
        name: chunk.module.sharded_state_dict() for name, chunk in zip(names, model, strict=True)
    }
    metadata = {"chained_optim_avoid_prefix": True}
    own = optimizer.sharded_state_dict(state, is_loading=is_loading, metadata=metadata)
    return {**state, "optimizer": own}


def save_at(layout: Layout, initial: Any, folder: str, at: int) -> Any:
    """On a rank: save after `at` steps, and train on to the end."""
    model, optimizer, config = start(layout, initial)
    steps(layout, model, optimizer, 0, at)
    dist_checkpointing.save(sharded(model, optimizer, False), folder)
    steps(layout, model, optimizer, at, STEPS)
    return _megatron.pieces(model, config)


def load_at(layout: Layout, folder: str, at: int) -> Any:
    """On a rank: load and train to the end."""
    initial = {k: torch.zeros_like(v) for k, v in _oracle.initial(layout).items()}
    model, optimizer, config = start(layout, initial)
    loaded = dist_checkpointing.load(sharded(model, optimizer, True), folder)
    for name, chunk in zip([n for n in loaded if n.startswith("model")], model, strict=True):
        chunk.module.load_state_dict(loaded[name], strict=False)
    optimizer.load_state_dict(loaded["optimizer"])
    steps(layout, model, optimizer, at, STEPS)
    return _megatron.pieces(model, config)


CHECKPOINTS = {
    "world1": (Layout(), Layout(), 0.0),
    "pp2-vpp2": (Layout(pp=2, vpp=2),) * 2 + (0.0,),
    "tp2-dp2-bf16": (Layout(tp=2, dp=2, bf16=True),) * 2 + (0.0,),
    "tp2-sp-to-world1": (Layout(tp=2, sequence_parallel=True), Layout(), 2e-5),
    "pp2-tied-to-tp2-tied": (Layout(pp=2, tied=True), Layout(tp=2, tied=True), 2e-5),
    "moe-ep2-to-tp2-ep2": (
        Layout(moe=True, ep=2, dp=2),
        Layout(moe=True, tp=2, sequence_parallel=True, ep=2),
        2e-5,
    ),  # fmt: skip
}


@pytest.mark.parametrize("first, second, error", some(CHECKPOINTS, "world1"))
def test_resumed_run_equals_uninterrupted_one(
    first: Layout, second: Layout, error: float, tmp_path: Path
) -> None:
    """Megatron's sharded checkpoint, saved just before a refresh; in another layout too."""
    initial, at = _oracle.initial(first), 2 * REFRESH
    expected = run_ranks(first.world, save_at, first, initial, str(tmp_path), at)
    found = run_ranks(second.world, load_at, second, str(tmp_path), at)
    expected, found = _megatron.whole(expected), _megatron.whole(found)
    assert expected.keys() == found.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=error)


def own_format(layout: Layout, initial: Any) -> Any:
    """On a rank: the state of one run, through torch's own format, in a second optimizer."""
    model, optimizer, config = start(layout, initial)
    steps(layout, model, optimizer, 0, 3)
    state = {k: v.clone() for k, v in model[0].state_dict().items() if torch.is_tensor(v)}
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    saved = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    steps(layout, model, optimizer, 3, STEPS)
    expected = _megatron.pieces(model, config)
    model, optimizer, config = _megatron.build(layout, initial)
    with_meso(MEAN, layout, model, optimizer, config)
    model[0].load_state_dict(state, strict=False)
    optimizer.load_state_dict(saved)
    steps(layout, model, optimizer, 3, STEPS)
    return expected, _megatron.pieces(model, config)


@pytest.mark.parametrize("layout", [Layout(tp=2), Layout(tp=2, bf16=True)], ids=["fp32", "bf16"])
def test_torch_format_resumes(layout: Layout) -> None:
    for expected, found in run_ranks(2, own_format, layout, _oracle.initial(layout)):
        for a, b in zip(expected, found, strict=True):
            assert a[0] == b[0] and torch.equal(a[3], b[3])


def states(layout: Layout, initial: Any) -> Any:
    """On a rank: second moments by the parameter's name in the whole model."""
    model, optimizer, config = start(layout, initial)
    steps(layout, model, optimizer, 0, 3)
    owned = megatron_dr.mcore.ownership.owned_parameters(model, config)
    found = {}
    for o in owned:
        main = getattr(o.parameter, "main_param", o.parameter)
        found[o.name] = optimizer.chained_optimizers[0].optimizer.state[main]["exp_avg_sq"]
    return found


@pytest.mark.parametrize("bf16", [False, True])
def test_moments_are_small_and_the_same_on_all_ranks(bf16: bool) -> None:
    """Those of sharded matrices too, bit for bit; those of a tied embedding on both stages."""
    layout = Layout(tp=2, pp=2, tied=True, bf16=bf16)
    ranks = run_ranks(4, states, layout, _oracle.initial(layout))
    for name, shape in _oracle.shapes(layout).items():
        holders = [rank[name] for rank in ranks if name in rank]
        assert len(holders) == (4 if "word_embeddings" in name else 2)
        small = tuple(min(SIZE, n) for n in shape) if len(shape) == 2 else shape
        assert all(tuple(h.shape) == small and h.dtype == torch.float32 for h in holders)
        assert all(torch.equal(holders[0], other) for other in holders[1:])
        assert holders[0].abs().sum() > 0


def noted(layout: Layout) -> tuple[str, int, int]:
    configure("adam")
    _megatron.initialize(layout)
    model, optimizer, config = _megatron.build(layout)
    made = use_meso(optimizer, model, config, size=SIZE, refresh=REFRESH, seed=SEED)
    steps(layout, model, optimizer, 0, 1)
    held = [state for meso in made for state in meso.state.values()]
    moments = sum(s["exp_avg"].nbytes + s["exp_avg_sq"].nbytes for s in held)
    kept = made[0].subspaces._kept.values()
    return note(made), moments, sum(p.nbytes for p in kept)


@pytest.mark.parametrize("name", ["world1", "tp2", "moe-tp2-sp-ep2"])
def test_what_is_kept_is_noted(name: str) -> None:
    """As counted after a step."""
    text, moments, projections = run_ranks(LAYOUTS[name].world, noted, LAYOUTS[name])[-1]
    found = [float(size) for size in re.findall(r"([\d.]+) kB", text)]
    assert found[:2] == [round(size / 1e3, 1) for size in (moments, projections)]
    assert found[2] > found[0]


OPTIONS = {"optimizer": "adam", "use_distributed_optimizer": False}


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"use_distributed_optimizer": True}, "--use-distributed-optimizer.*drop it"),
        ({"optimizer_cpu_offload": True}, "--optimizer-cpu-offload.*drop it"),
        ({"use_precision_aware_optimizer": True}, "--use-precision-aware-optimizer.*drop it"),
        ({"optimizer": "muon"}, "not --optimizer muon"),
        ({"decoupled_weight_decay": False}, "decoupled_weight_decay=True"),
    ],
)
def test_what_cannot_be_compressed_is_refused(changes: dict[str, Any], words: str) -> None:
    MesoPart().refuse(SimpleNamespace(**OPTIONS))
    with pytest.raises(ValueError, match=words):
        MesoPart().refuse(SimpleNamespace(**{**OPTIONS, **changes}))
