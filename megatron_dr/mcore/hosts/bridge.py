"""Megatron-Bridge (github.com/NVIDIA-NeMo/Megatron-Bridge): one of its training callbacks."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megatron_dr.config.dr import DRConfig
from megatron_dr.mcore import hosts
from megatron_dr.mcore.attach import Handle
from megatron_dr.mcore.hosts import state
from megatron_dr.mcore.refuse import Rule, refuse

Target = Callable[[Any, int], Iterator[Any]]  # (Bridge's CallbackContext, steps done) -> its data


def callback(dr: DRConfig, target: Any, target_batch_size: int) -> Any:
    """For `finetune` and `pretrain`: every training step of theirs is regularised.

        finetune(config, forward_step, callbacks=[bridge.callback(dr, dataset, 8)])

    The target's loss and the `dr ...` values are among the losses that Bridge logs. The handle's
    state is in the folder of each of Bridge's checkpoints. Evaluation is Bridge's own.

    Args:
        target: a dataset configuration of Bridge's, whose training data are the target's and go on
            where a checkpoint ended; or (context, steps done) -> an endless iterator of what the
            run's own training iterator gives: microbatches, or with `dataloader_type="batch"`
            this rank's part of a batch.
        target_batch_size: target samples of a step, over all data-parallel ranks.

    Raises:
        ValueError: when training starts: as `hosts.attach`, or what this loop can't give.
    """
    from megatron.bridge.training.callbacks import Callback

    class Regularised(Callback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.handle: Handle | None = None
            self.steps = 0  # of the handle, when the step began
            # Bridge's step -> the handle's state then, of steps that may be in a checkpoint yet
            self.states: dict[int, dict[str, Any]] = {}
            hosts.hold(self)  # Bridge takes its schedule before on_train_start

        def on_train_start(self, context: Any) -> None:
            config = context.state.cfg
            number = _microbatches(config, target_batch_size)
            refuse("megatron_dr does not support", _REFUSED, config.checkpoint)
            handle = hosts.attach(context.model, context.optimizer, dr)
            self.handle = handle
            step = context.state.train_state.step
            if step > 0 and config.checkpoint.load is not None:
                state.load(handle, _loaded(config.checkpoint.load, step))
            self.states = {step: handle.state_dict()}
            make = target if callable(target) else _data_of(target, target_batch_size)
            data = make(context, handle.steps)

            def regularised(stock: Callable[..., Any], schedule: dict[str, Any]) -> Any:
                iterators, changes = _of_step(data, number, schedule, config)
                hosts.check_shapes(handle, {**schedule, **changes}, schedule)
                return handle.step(
                    stock, target_data_iterator=iterators, num_target_microbatches=number,
                    target_samples=target_batch_size, **schedule,
                )  # fmt: skip

            hosts.always(handle, regularised)

        def on_train_step_start(self, context: Any) -> None:
            assert self.handle is not None
            self.steps = self.handle.steps

        def on_train_step_end(self, context: Any) -> None:
            from megatron.bridge.training.checkpointing import is_empty_async_queue

            assert self.handle is not None
            if self.handle.steps == self.steps:
                raise RuntimeError(hosts.NOT_REACHED)
            if is_empty_async_queue(context.state):  # no earlier step is being saved
                self.states.clear()
            self.states[context.state.train_state.step + 1] = self.handle.state_dict()

        def on_checkpoint_save(self, context: Any) -> None:
            from megatron.bridge.training.utils import checkpoint_utils as names

            if self.handle is None:
                return
            folder = context.state.cfg.checkpoint.save
            tracker = names.get_checkpoint_train_state_filename(folder, prefix=names.TRACKER_PREFIX)
            step = names.read_train_state(tracker).step  # an asynchronous one ends steps later
            done = max(n for n in self.states if n <= step)  # iterations_to_skip are no steps
            state.save(self.handle, _folder(folder, step), self.states[done])
            self.states = {n: s for n, s in self.states.items() if n >= done}

        def on_train_end(self, context: Any) -> None:
            hosts.release(self)
            if self.handle is not None:
                hosts.forget(self.handle)

    return Regularised()


_REFUSED = tuple(
    Rule(
        name,
        says="{who} checkpoint.{name} {value}: its state is in the folders of checkpoint.save "
        "alone, so such a checkpoint would begin anew; drop it.",
    )
    for name in ("non_persistent_save_interval", "non_persistent_ckpt_type")
)


def _folder(checkpoints: str, step: int) -> Path:
    """Of a step's checkpoint."""
    from megatron.bridge.training.utils.checkpoint_utils import get_checkpoint_name

    return Path(get_checkpoint_name(checkpoints, step))


def _loaded(load: str, step: int) -> Path:
    """The checkpoint's folder that Bridge has loaded: `load` may be one, or hold them."""
    from megatron.bridge.training.utils.checkpoint_utils import is_checkpoint_iteration_directory

    return Path(load) if is_checkpoint_iteration_directory(load) else _folder(load, step)


def _microbatches(config: Any, target_batch_size: int) -> int:
    """Target microbatches of a rank.

    Raises:
        ValueError: the batch can't be divided, or a step may be run again on other target data.
    """
    each = config.train.micro_batch_size * config.data_parallel_size
    if target_batch_size <= 0 or target_batch_size % each:
        raise ValueError(
            f"target_batch_size {target_batch_size} must be a multiple of {each}: "
            f"micro_batch_size {config.train.micro_batch_size} times "
            f"{config.data_parallel_size} data-parallel ranks."
        )
    mode = getattr(getattr(config, "rerun_state_machine", None), "rerun_mode", "disabled")
    if mode != "disabled":
        raise ValueError(
            f"rerun_mode {mode!r} runs steps again, and megatron_dr would read other "
            "target data for them: use 'disabled'."
        )
    return int(target_batch_size // each)


def _of_step(
    data: Iterator[Any], number: int, schedule: dict[str, Any], config: Any
) -> tuple[Any, dict[str, Any]]:
    """The target's iterator(s) of a step, and what of the schedule it changes: as `train_step` has
    them."""
    changes: dict[str, Any] = {}
    if config.dataset.dataloader_type == "batch":
        from megatron.bridge.data.batch_utils import prepare_finetuning_batch

        data, length = prepare_finetuning_batch(
            data_iterator=data, num_microbatches=number, default_seq_length=schedule["seq_length"],
            seq_key="tokens",
        )  # fmt: skip
        changes = {"seq_length": length, "decoder_seq_length": length}
    model = schedule["model"]
    if isinstance(model, list) and len(model) > 1:
        from megatron.bridge.data.iterator_utils import make_data_iterator_list

        return make_data_iterator_list(model=model, data_iterator=data), changes
    return data, changes


def _data_of(dataset: Any, batch_size: int) -> Target:
    """Bridge's own training data of another dataset configuration, from the step on."""

    def make(context: Any, steps: int) -> Iterator[Any]:
        from megatron.bridge.data.loaders import build_train_valid_test_data_iterators
        from megatron.bridge.data.utils import get_dataset_provider
        from megatron.bridge.training.setup import _bind_dataset_provider_context
        from megatron.bridge.training.utils.pg_utils import get_pg_collection

        if hasattr(dataset, "finalize"):
            dataset.finalize()
        groups = get_pg_collection(context.model)
        config, train_state = copy.copy(context.state.cfg), copy.copy(context.state.train_state)
        config.dataset, config.train = dataset, copy.copy(config.train)
        config.train.global_batch_size, config.train.train_samples = batch_size, None
        config.validation = copy.copy(config.validation)
        config.validation.eval_iters = 0
        train_state.consumed_train_samples = steps * batch_size
        provider = _bind_dataset_provider_context(
            get_dataset_provider(dataset), tokenizer=context.state.tokenizer, pg_collection=groups
        )
        data: Iterator[Any] = build_train_valid_test_data_iterators(
            cfg=config, train_state=train_state,
            build_train_valid_test_datasets_provider=provider, dp_group=groups.dp,
        )[0]  # fmt: skip
        return data

    return make
