"""verl (github.com/verl-project/verl): its Megatron engine, by the registry of engines."""

from collections.abc import Callable
from typing import Any

from megatron_dr.config.dr import DRConfig
from megatron_dr.mcore import hosts
from megatron_dr.mcore.attach import attached
from megatron_dr.mcore.hosts import state

# (the engine, the general mini-batch) -> this rank's target mini-batch, in the same form
TargetBatch = Callable[[Any, Any], Any]


def register(dr: DRConfig, target_batch: TargetBatch, vendor: str = "nvidia") -> None:
    """Let verl take `engine_class` for actors of `strategy: megatron`. Once in each process.

    verl asks its registry for an engine of the device's vendor first; its own is registered for the
    device alone.
    """
    from verl.workers.engine import EngineRegistry

    EngineRegistry.register(
        model_type="language_model", backend="megatron", device="cuda", vendor=vendor
    )(engine_class(dr, target_batch))


def engine_class(dr: DRConfig, target_batch: TargetBatch) -> type:
    """verl's Megatron engine, whose training calls are regularised.

    One `forward_backward_batch` is one step: `train_batch` calls it once before `optimizer_step`.
    Calls without gradients (log-probabilities, the reference policy) are verl's own. The handle's
    state is in verl's checkpoints; where verl moves the model to the CPU, the rows' buffers are
    freed until the next step.
    """
    from verl.workers.engine.megatron import MegatronEngineWithLMHead

    class RegularisedEngine(MegatronEngineWithLMHead):  # type: ignore[misc]
        def initialize(self) -> None:
            super().initialize()
            if self.optimizer is not None:
                _check(self.engine_config)
                handle = hosts.attach(self.module, self.optimizer, dr)  # or refused here
                if self._is_offload_param:
                    handle.offload()

        def forward_backward_batch(
            self, data: Any, loss_function: Any, forward_only: bool = False
        ) -> Any:
            call = super().forward_backward_batch
            if forward_only:
                return call(data, loss_function, forward_only=True)
            handle = hosts.attach(self.module, self.optimizer, dr)

            def target() -> None:
                batch = target_batch(self, data)
                if dr.alpha_style == "auto":
                    training.samples = hosts.of_data_ranks(len(batch))
                call(batch, loss_function)

            with hosts.regularised(handle, target) as training:
                output = call(data, loss_function)
            if output:  # the last stage's
                losses = [report["loss"] for report in training.target_reports]
                output["metrics"]["target loss"] = sum(losses)
                output["metrics"].update({n: v.item() for n, v in handle.metrics.items()})
            return output

        def to(
            self, device: str, model: bool = True, optimizer: bool = True, grad: bool = True
        ) -> None:
            super().to(device=device, model=model, optimizer=optimizer, grad=grad)
            handle = attached(self.module)
            if device == "cpu" and model and handle is not None:
                handle.offload()

        def save_checkpoint(self, local_path: str, *args: Any, **kwargs: Any) -> None:
            handle = attached(self.module)
            if handle is not None:
                state.save(handle, local_path)
            super().save_checkpoint(local_path, *args, **kwargs)

        def load_checkpoint(self, local_path: str | None, *args: Any, **kwargs: Any) -> None:
            handle = attached(self.module)
            # before verl, which may delete the folder
            if handle is not None and local_path is not None:
                state.load(handle, local_path)
            super().load_checkpoint(local_path, *args, **kwargs)

    return RegularisedEngine


def _check(config: Any) -> None:
    """What of an engine's configuration the target's microbatches do not go with."""
    if getattr(getattr(config, "router_replay", None), "mode", "disabled") != "disabled":
        raise ValueError(hosts.REPLAY.format("verl"))
    if getattr(config, "dynamic_context_parallel", False):
        raise ValueError(
            "megatron_dr does not support verl's dynamic_context_parallel, which deals samples out "
            "to data and context ranks together, so that no rank has a row: set it false."
        )
