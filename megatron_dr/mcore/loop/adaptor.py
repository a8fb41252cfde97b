"""`enable()`: the plugin in Megatron's own training loop, switched on by its `--dr-*` flags.

One line in a copy of Megatron's pretrain_gpt.py, before the arguments are parsed:

    import megatron_dr; megatron_dr.enable()

What is wrapped, and who calls it:
    megatron.training.arguments.add_megatron_arguments    parse_args: the flags, --dr-config
    megatron.training.arguments.validate_args             parse_and_validate_args: bad flags
    megatron.training.yaml_arguments.load_yaml            parse_args: no command line, no flags
    what writes a checkpoint, what waits for others       `writers`, `waits`
    megatron.training.training.setup_model_and_optimizer  pretrain: LoRA, PPO's head, attach, data
    megatron.training.training.get_megatron_optimizer     setup_model_and_optimizer: MeSO
    megatron.training.training.get_optimizer_param_scheduler   the same: another rate on a resume
    megatron.training.checkpointing.load_args_from_checkpoint  parse_args: --use-checkpoint-args
    megatron.training.checkpointing.check_checkpoint_args load_checkpoint: the streams' place
    megatron.training.checkpointing.read_metadata         load_checkpoint: an empty tracker file
    megatron.training.training.load_checkpoint            setup_model_and_optimizer: exit codes
    megatron.core.dist_checkpointing.load                 load_checkpoint: one without adapters
    megatron.training.training.build_train_valid_test_data_iterators
                                                          pretrain: files of samples
    megatron.training.training.build_train_valid_test_datasets
                                  build_train_valid_test_data_loaders: microbatches of one domain
    megatron.training.training.dummy_train_step           train: --iterations-to-skip
    megatron.training.training.{training_log, evaluate, evaluate_and_print_results}
                                  train: --dr-metrics, --dr-record, the second line (`first_line`),
                                  the target's test set
    megatron.training.training.checkpoint_and_decide_exit   train: --dr-keep-best
    megatron.training.training.save_checkpoint            train: the rollouts of a checkpoint
    megatron.training.training.{train, maybe_finalize_async_save}  pretrain: --dr-generate, -record
    the three schedules of megatron.core.pipeline_parallel.schedules
                                  get_forward_backward_func: handle.step
Without the plugin's flags each wrapper calls Megatron's function and changes nothing of a run that
goes well, but for a checkpoint's pickles: they are read without running what they name
(mcore/unpickling.py).
"""

import contextlib
import dataclasses
import functools
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from megatron_dr.mcore import compat, cpu, errors, stall, unpickling
from megatron_dr.mcore.data import datasets, domain_sampling, vocabulary
from megatron_dr.mcore.loop import (
    begin,
    changes,
    config_file,
    first_line,
    forward,
    kernels,
    model_config,
    parts,
    rate,
    validation,
    waits,
    writers,
)  # fmt: skip
from megatron_dr.mcore.loop.arguments import configs_from_args
from megatron_dr.mcore.loop.evaluations import Evaluations
from megatron_dr.mcore.loop.generation import Generation
from megatron_dr.mcore.loop.run import START, TrainingRun
from megatron_dr.mcore.say import say
from megatron_dr.mcore.step import log
from megatron_dr.mcore.step.bad import BadGradient

_run: TrainingRun | None = None
_evaluations: Evaluations | None = None
_generation: Generation | None = None
_packed = False  # --dr-pack
_enabled = False


def enable() -> None:
    """Wrap Megatron's training loop; call it before Megatron's arguments are parsed. Idempotent."""
    global _enabled
    if _enabled:
        return
    _enabled = True
    cpu.enable_if_asked()
    from megatron.core import dist_checkpointing
    from megatron.core.pipeline_parallel import schedules
    from megatron.training import arguments, checkpointing, training, yaml_arguments

    from megatron_dr.mcore.loop import partial_checkpoint

    unpickling.restrict()
    writers.enable()
    _wrap(checkpointing, "load_args_from_checkpoint", validation.load_args)
    _wrap(arguments, "add_megatron_arguments", config_file.add_flags)
    _wrap(arguments, "validate_args", validation.validate)
    _wrap(yaml_arguments, "load_yaml", validation.load_yaml)
    _wrap(checkpointing, "check_checkpoint_args", _restore)
    _wrap(checkpointing, "read_metadata", begin.read_tracker)
    _wrap(training, "load_checkpoint", begin.load)
    _wrap(dist_checkpointing, "load", partial_checkpoint.load)
    _wrap(training, "setup_model_and_optimizer", _set_up)
    _wrap(training, "get_megatron_optimizer", _build_optimizer)
    _wrap(training, "get_optimizer_param_scheduler", rate.build)
    _wrap(training, "build_train_valid_test_data_iterators", _build_iterators)
    _wrap(training, "build_train_valid_test_datasets", _build_datasets)
    _wrap(training, "dummy_train_step", _skip)
    _wrap(training, "training_log", _log_training)
    _wrap(training, "evaluate_and_print_results", _validate_sets)
    _wrap(training, "evaluate", _log_validation)
    _wrap(training, "checkpoint_and_decide_exit", _end_step)
    _wrap(training, "save_checkpoint", _save)
    _wrap(training, "train", _train)
    _wrap(training, "maybe_finalize_async_save", _finalize)
    for name in compat.SCHEDULES:
        _wrap(schedules, name, _schedule)
    waits.enable()


def _wrap(module: Any, name: str, function: Callable[..., Any]) -> None:
    stock = getattr(module, name)
    setattr(module, name, functools.wraps(stock)(functools.partial(function, stock)))


def _build_optimizer(
    stock: Callable[..., Any], config: Any, model: list[Any], *rest: Any, **kwargs: Any
) -> Any:
    """Before setup_model_and_optimizer loads a checkpoint: what a part adds is loaded too."""
    from megatron.training import get_args

    optimizer, args = stock(config, model, *rest, **kwargs), get_args()
    with errors.refused():
        for part, own in parts.on(args):
            part.on_optimizer(own, args, optimizer, model)
    return optimizer


def _restore(stock: Callable[..., Any], checkpoint_args: Namespace, *rest: Any, **kw: Any) -> Any:
    """Called when a run resumes, not with --finetune. A checkpoint without our values is at 0."""
    from megatron.training import get_args

    result, args = stock(checkpoint_args, *rest, **kw), get_args()
    with errors.refused():
        for part, own in parts.on(args):
            part.resume(own, args, checkpoint_args)
        changes.check(args, checkpoint_args, speak=True)
    for name, start in START.items():
        if hasattr(args, name):
            setattr(args, name, getattr(checkpoint_args, name, start))
    return result


def _set_up(stock: Callable[..., Any], *rest: Any, **kwargs: Any) -> Any:
    global _run, _evaluations, _generation, _packed
    from megatron.core.utils import get_model_config
    from megatron.training import get_args, get_tokenizer

    args = get_args()
    _packed = bool(getattr(args, "dr_pack", None))
    configs = configs_from_args(args)
    stall.begin(0.0 if configs is None else configs[0].stall_seconds)  # attach comes late
    with errors.refused(), errors.agreed():
        begin.check_folders(args)
        if dist.get_rank() == 0:
            unpickling.check_loaded(args)
    begin.carry_assets(args)
    with errors.refused():
        mend = functools.partial(model_config.mend, args=args)
        rest = compat.change_model(rest, kwargs, mend, parts.hooks(args))
    if configs is not None:
        for sentence in filter(None, [kernels.used(args), compat.unknown_flags()]):
            say(sentence)
        for name, start in START.items():
            setattr(args, name, start)
    model, optimizer, scheduler = stock(*rest, **kwargs)  # loads a checkpoint
    begin.leave_if_complete(args)
    _run = _evaluations = _generation = None
    if configs is not None and optimizer is not None:
        with errors.refused(), errors.agreed():
            vocabulary.check(args, get_tokenizer())
            dr, target = configs
            source = parts.source(args, target)
            dr = dataclasses.replace(dr, **parts.known(args))
            _run = TrainingRun(
                model, optimizer, get_model_config(model[0]), args, dr,
                parts.step_target(args, dr, target), source, scheduler, target,
            )  # fmt: skip
            _evaluations = Evaluations.of(_run, target.keep_best)
    if configs is not None and configs[1].generate is not None:
        with errors.refused(), errors.agreed():
            _generation = Generation(model, args, configs[1])
    return model, optimizer, scheduler


def _build_iterators(stock: Callable[..., Any], provider: Any, *rest: Any, **kwargs: Any) -> Any:
    """A script's own provider knows indexed datasets alone, and nothing of rewards and pairs."""
    from megatron.training import get_args

    if _run is not None and _run.source.forward_step or datasets.names_samples(get_args()):
        stage = getattr(provider, "keywords", {}).get("vp_stage")
        provider = functools.partial(datasets_provider, vp_stage=stage)
        provider.is_distributed = True
    return stock(domain_sampling.with_room(get_args(), provider), *rest, **kwargs)


def datasets_provider(num_samples: list[int], vp_stage: int | None = None) -> tuple[Any, Any, Any]:
    """General train, validation and test sets; called by Megatron on every rank."""
    from megatron.training import get_args, get_tokenizer

    with errors.refused():
        vocabulary.check(get_args(), get_tokenizer())
        if _run is not None:
            return _run.source.datasets(num_samples, vp_stage)
        return datasets.general_datasets(get_args(), num_samples, vp_stage)


datasets_provider.is_distributed = True  # type: ignore[attr-defined]


def _build_datasets(stock: Callable[..., Any], *rest: Any, **kwargs: Any) -> Any:
    from megatron.training import get_args

    train, *others = stock(*rest, **kwargs)
    with errors.refused():
        for part, _ in parts.on(get_args()):
            train = part.on_data(get_args(), train)
    return train if _run is None else _run.of_data(train), *others


def _skip(stock: Callable[..., Any], data_iterator: Any) -> None:
    if _run is None:
        stock(data_iterator)
    else:
        _run.skip(data_iterator)


def _log_training(stock: Callable[..., Any], loss_dict: Any, total: Any, rate: Any, iteration: int,
                  *rest: Any, **kwargs: Any) -> Any:  # fmt: skip
    if _run is not None:
        loss_dict = _run.log(iteration, loss_dict, rate)
        stock = functools.partial(first_line.log, stock)
    result = stock(loss_dict, total, rate, iteration, *rest, **kwargs)
    if _run is not None and _run.handle.log is not None and _run.handle.dr.log_blocks:
        from megatron.training.global_vars import get_tensorboard_writer, get_wandb_writer

        boards = get_tensorboard_writer(), get_wandb_writer()
        log.write_blocks(_run.handle.log, iteration, _run.args, *boards)
    return result


def _validate_sets(stock: Callable[..., Any], *rest: Any, **kwargs: Any) -> Any:
    if _evaluations is None:
        return stock(*rest, **kwargs)
    return _evaluations.of_sets(stock, *rest, **kwargs)


def _log_validation(stock: Callable[..., Any], *rest: Any, **kwargs: Any) -> Any:
    if _evaluations is None:
        return stock(*rest, **kwargs)
    return _evaluations.of_one(stock, *rest, **kwargs)


def _end_step(stock: Callable[..., Any], *state: Any, **kwargs: Any) -> Any:
    if _evaluations is None:
        return stock(*state, **kwargs)
    return _evaluations.step_is_done(stock, *state, **kwargs)


def _save(stock: Callable[..., Any], iteration: int, *rest: Any, **kwargs: Any) -> Any:
    if _run is not None:
        _run.save(iteration)
    return stock(iteration, *rest, **kwargs)


def _train(stock: Callable[..., Any], *rest: Any, **kwargs: Any) -> Any:
    if _generation is not None:
        stock = functools.partial(_generation.train, stock)
    inside = contextlib.nullcontext() if _run is None else _run.training()
    try:
        with inside:
            return stock(*rest, **kwargs)
    except BadGradient as error:  # of every rank
        errors.leave(str(error), code=1)


def _finalize(stock: Callable[..., Any], *rest: Any, **kwargs: Any) -> None:
    stock(*rest, **kwargs)
    if not kwargs.get("terminate"):
        return
    if _generation is not None:
        _generation.all_is_saved()
    if _run is not None:
        _run.all_is_done()


def _schedule(stock: Callable[..., Any], **schedule: Any) -> Any:
    if _packed:  # a script's own forward step knows nothing of where samples begin
        schedule["forward_step_func"] = forward.forward_step
    if _run is None or not _run.is_for(schedule["model"]):
        return stock(**schedule)
    return _run.call(stock, schedule)
