"""Where a run of Megatron's loop waits for other ranks: one that is gone is named there."""

from megatron_dr.mcore import stall

_NAMES = (
    "setup_model_and_optimizer", "build_train_valid_test_data_iterators", "train",
    "save_checkpoint", "evaluate_and_print_results", "maybe_finalize_async_save",
)  # fmt: skip


def enable() -> None:
    """Called once, after whatever else wraps them; the innermost says it, once."""
    from megatron.training import training

    for name in _NAMES:
        setattr(training, name, stall.told_who_is_gone()(getattr(training, name)))
