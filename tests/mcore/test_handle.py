"""attach and step: life cycle, reports, and what they refuse."""

from typing import Any

import pytest
import torch

import megatron_dr
from megatron_dr import DRConfig
from megatron_dr.mcore.attach import Handle, attached
from megatron_dr.mcore.step.schedule import check_number, group_size

from . import _data, _megatron
from ._data import Layout
from ._ranks import run_ranks

WORLD1 = Layout()
CONE = DRConfig(rows="slot", slots=4)


def one(function: Any, *args: Any) -> Any:
    return run_ranks(1, function, *args)[0]


def fresh(layout: Layout = WORLD1) -> tuple[Any, Any, Any]:
    _megatron.initialize(layout)
    return _megatron.build(layout)


def step(handle: Handle, model: Any, layout: Layout = WORLD1, **changes: Any) -> Any:
    from megatron.core.pipeline_parallel import get_forward_backward_func

    kwargs = _megatron.schedule(layout, model, _data.general(layout, 0, 0))
    kwargs.update(changes)
    target = _data.target(layout, 0, 0)
    return handle.step(
        get_forward_backward_func(),
        target_data_iterator=iter(target),
        num_target_microbatches=len(target),
        **kwargs,
    )


def test_attach_is_idempotent_and_reversible() -> None:
    def case() -> None:
        model, optimizer, config = fresh()
        handle = megatron_dr.attach(model, optimizer, config, CONE)
        assert megatron_dr.attach(model, optimizer, config, CONE) is handle
        other = megatron_dr.attach(model, optimizer, config, DRConfig(set="mean"))
        assert other is not handle and attached(model) is other
        other.detach()
        other.detach()
        assert attached(model) is None

    one(case)


def test_step_leaves_megatron_as_it_was() -> None:
    def case() -> None:
        model, optimizer, config = fresh()
        views = [p.main_grad.data_ptr() for p in model[0].parameters()]
        finalize = config.finalize_model_grads_func
        with megatron_dr.attach(model, optimizer, config, CONE) as handle:
            step(handle, model)
            with pytest.raises(ZeroDivisionError):
                step(handle, model, forward_step_func=lambda *a: 1 / 0)
        assert [p.main_grad.data_ptr() for p in model[0].parameters()] == views
        assert config.finalize_model_grads_func is finalize

    one(case)


def test_reports_keep_the_roles_apart() -> None:
    def case() -> tuple[list[dict[str, torch.Tensor]], float, float]:
        model, optimizer, config = fresh()
        losses = {}
        for role, batches in (
            ("general", _data.general(WORLD1, 0, 0)),
            ("target", _data.target(WORLD1, 0, 0)),
        ):
            from megatron.core.pipeline_parallel import get_forward_backward_func

            kwargs = _megatron.schedule(WORLD1, model, batches)
            reports = get_forward_backward_func()(**{**kwargs, "forward_only": True})
            total = torch.stack([r["lm loss"] for r in reports]).sum(0)
            losses[role] = float(total[0] / total[1])
        handle = megatron_dr.attach(model, optimizer, config, CONE)
        for chunk in model:
            chunk.zero_grad_buffer()
        return step(handle, model), losses["general"], losses["target"]

    reports, general, target = one(case)
    assert len(reports) == WORLD1.num_general
    total = {k: torch.stack([r[k] for r in reports]).sum(0) for k in reports[0]}
    mean = {k: float(v[0] / v[1]) for k, v in total.items()}
    assert mean["lm loss"] == pytest.approx(general, rel=1e-6)
    assert mean["target loss"] == pytest.approx(target, rel=1e-6)
    assert -1 <= mean["dr cos update"] <= 1 and 1 <= mean["dr rows"] <= 4
    assert mean["dr combine ms"] > 0 and mean["dr bytes"] == 0  # one rank sends nothing


def test_finalize_must_fire() -> None:
    def case() -> str:
        model, optimizer, config = fresh()
        handle = megatron_dr.attach(model, optimizer, config, CONE)

        def replaces(data: Any, module: Any) -> Any:
            config.finalize_model_grads_func = lambda *args, **kwargs: None
            return _megatron.forward_step(data, module)

        with pytest.raises(RuntimeError) as error:
            step(handle, model, forward_step_func=replaces)
        config.finalize_model_grads_func = None
        with pytest.raises(RuntimeError, match="finalize_model_grads_func is not set"):
            step(handle, model)
        return str(error.value)

    message = one(case)
    assert "ran 0 times" in message and "finalize_model_grads_func" in message


def test_a_second_finalize_is_refused() -> None:
    def case() -> None:
        from megatron.core.pipeline_parallel import get_forward_backward_func

        model, optimizer, config = fresh()
        handle = megatron_dr.attach(model, optimizer, config, CONE)

        def twice(**kwargs: Any) -> Any:
            reports = get_forward_backward_func()(**kwargs)
            config.finalize_model_grads_func([kwargs["model"]], None)
            return reports

        kwargs = _megatron.schedule(WORLD1, model, _data.general(WORLD1, 0, 0))
        with pytest.raises(RuntimeError, match="ran 2 times"):
            handle.step(
                twice,
                target_data_iterator=iter(_data.target(WORLD1, 0, 0)),
                num_target_microbatches=WORLD1.num_target,
                **kwargs,
            )

    one(case)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"use_megatron_fsdp": True}, "use_megatron_fsdp"),
        ({"reuse_grad_buf_for_mxfp8_param_ag": True}, "reuse_grad_buf_for_mxfp8_param_ag"),
    ],
)
def test_unsupported_ddp_is_refused(changes: dict[str, Any], words: str) -> None:
    def case() -> None:
        model, optimizer, config = fresh()
        for name, value in changes.items():
            setattr(model[0].ddp_config, name, value)
        with pytest.raises(ValueError, match=words):
            megatron_dr.attach(model, optimizer, config, CONE)

    one(case)


@pytest.mark.parametrize("name", ["delay_wgrad_compute", "overlap_moe_expert_parallel_comm"])
def test_unsupported_model_is_refused(name: str) -> None:
    def case() -> None:
        model, optimizer, config = fresh()
        setattr(config, name, True)
        with pytest.raises(ValueError, match=name):
            megatron_dr.attach(model, optimizer, config, CONE)

    one(case)


def test_wrong_arguments_are_refused() -> None:
    def case() -> None:
        import copy

        model, optimizer, config = fresh()
        with pytest.raises(ValueError, match="list of model chunks"):
            megatron_dr.attach(model[0], optimizer, config, CONE)
        with pytest.raises(ValueError, match="own configuration"):
            megatron_dr.attach(model, optimizer, copy.copy(config), CONE)
        with pytest.raises(ValueError, match="DistributedDataParallel"):
            megatron_dr.attach([model[0].module], optimizer, config, CONE)

    one(case)


@pytest.mark.parametrize(
    "dr, general, target, words",
    [
        (DRConfig(set="cone", slots=4), 4, 0, "needs target data"),
        (DRConfig(set="cone", slots=4), 6, 4, "can't be divided into 4"),
        (DRConfig(set="topk", fraction=0.1, slots=4), 4, 4, "at least 10 rows"),
        (DRConfig(set="capped", fraction=0.2, slots=4), 4, 4, "at least 5 rows"),
    ],
)
def test_batches_that_make_no_rows(dr: DRConfig, general: int, target: int, words: str) -> None:
    def case() -> None:
        handle = megatron_dr.attach(*fresh(), dr)
        with pytest.raises(ValueError, match=words):
            handle.check_batch(general, target)

    one(case)


INTERLEAVED = [  # target and general microbatches, refused by which flag
    (DRConfig(slots=4), 3, 8, "--dr-target-batch-size"),
    (DRConfig(slots=4), 4, 8, ""),
    (DRConfig(rows="sample"), 1, 2, "--dr-target-batch-size"),
    (DRConfig(rows="sample", target_pass="merged"), 3, 3, "--global-batch-size"),
    (DRConfig(rows="sample", passes=2), 1, 3, ""),
    (DRConfig(rows="sample", passes=2, alpha=0.0), 1, 3, "--global-batch-size"),  # alone in pass 2
    (DRConfig(rows="sample", target_refresh=2, alpha=0.0), 1, 3, "--global-batch-size"),
]


def test_numbers_of_microbatches_that_interleaving_cannot_run() -> None:
    """Of two stages; a last group of one microbatch would leave a stage waiting."""

    def case() -> list[str]:
        said = []
        model, optimizer, config = fresh(Layout(pp=2, vpp=2))
        for dr, target, general, _ in INTERLEAVED:
            try:
                megatron_dr.attach(model, optimizer, config, dr).check_batch(general, target)
                said.append("")
            except ValueError as error:
                said.append(str(error))
        check_number(model, 2, 2)
        config.microbatch_group_size_per_vp_stage = 3
        assert group_size(model) == 3
        check_number(model, 3, 2, "--eval")  # a group of three and one of two
        for target, general in ((2, 2), (1, 1)):
            with pytest.raises(ValueError, match="multiple of 3, or leave .* so change --eval"):
                check_number(model, target, general, "--eval")
        return said

    for said in run_ranks(2, case):
        for sentence, (*_, flag) in zip(said, INTERLEAVED, strict=True):
            assert sentence.endswith(f"so change {flag}." if flag else "")
            assert bool(sentence) == bool(flag)


@pytest.mark.parametrize(
    "dr, words",
    [
        (DRConfig(rows="domain"), "names of at least two general corpora"),
        (DRConfig(rows="rank", target_ranks=1), "below the data-parallel size 1"),
        (DRConfig(alpha_style="linear", slots=4), "'linear' needs alpha_steps"),
        (DRConfig(alpha_style="auto", alpha_steps=9, slots=4), "needs target_size"),
        (DRConfig(alpha_style="auto", target_size=9, slots=4), "'auto' needs alpha_steps"),
    ],
)
def test_rows_and_dials_that_cannot_be(dr: DRConfig, words: str) -> None:
    def case() -> None:
        model, optimizer, config = fresh()
        with pytest.raises(ValueError, match=words):
            megatron_dr.attach(model, optimizer, config, dr)
        assert attached(model) is None

    one(case)


def test_one_row_is_noted(capfd: pytest.CaptureFixture[str]) -> None:
    one(lambda: megatron_dr.attach(*fresh(), DRConfig(rows="rank")).rows.layout.row_map.num_rows)
    assert "note: one row" in capfd.readouterr().out


def test_slot_buffers_in_bf16_are_half_the_bytes_and_close() -> None:
    def case(dtype: str) -> tuple[int, torch.Tensor]:
        dr = DRConfig(rows="slot", slots=4, slot_dtype=dtype, gram="exact")  # type: ignore[arg-type]
        model, optimizer, config = fresh()
        handle = megatron_dr.attach(model, optimizer, config, dr)
        model[0].zero_grad_buffer()
        bytes_of_slots = handle.rows.buffers.extra_bytes
        step(handle, model)
        return bytes_of_slots, torch.cat([p.main_grad.flatten() for p in model[0].parameters()])

    (full, exact), (half, rough) = one(case, "fp32"), one(case, "bf16")
    assert half * 2 == full
    cosine = torch.nn.functional.cosine_similarity(exact, rough, dim=0)
    assert cosine > 0.999 and not torch.equal(exact, rough)


def test_a_host_that_resets_the_hook_is_chained() -> None:
    """Some hosts set finalize_model_grads_func at every step: the one of the step is called."""

    def case() -> list[int]:
        from megatron.core.distributed import finalize_model_grads

        model, optimizer, config = fresh()
        handle = megatron_dr.attach(model, optimizer, config, CONE)
        calls: list[int] = []
        for number in range(3):

            def hosts_own(*args: Any, number: int = number, **kwargs: Any) -> None:
                calls.append(number)
                finalize_model_grads(*args, **kwargs)

            config.finalize_model_grads_func = hosts_own
            model[0].zero_grad_buffer()
            step(handle, model)
            assert config.finalize_model_grads_func is hosts_own
            assert handle.rows.update is not None and handle.steps == number + 1
        return calls

    assert one(case) == [0, 1, 2]
