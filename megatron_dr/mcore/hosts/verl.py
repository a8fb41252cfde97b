"""verl (github.com/verl-project/verl): its Megatron engine, by the registry of engines."""

from collections.abc import Callable
from typing import Any

from megatron_dr.config.dr import DRConfig
from megatron_dr.mcore import hosts

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
    Calls without gradients (log-probabilities, the reference policy) are verl's own.
    """
    from verl.workers.engine.megatron import MegatronEngineWithLMHead

    class RegularisedEngine(MegatronEngineWithLMHead):  # type: ignore[misc]
        def initialize(self) -> None:
            super().initialize()
            if self.optimizer is not None:
                hosts.attach(self.module, self.optimizer, dr)  # what is refused, is refused here

        def forward_backward_batch(
            self, data: Any, loss_function: Any, forward_only: bool = False
        ) -> Any:
            call = super().forward_backward_batch
            if forward_only:
                return call(data, loss_function, forward_only=True)
            handle = hosts.attach(self.module, self.optimizer, dr)

            def target() -> None:
                call(target_batch(self, data), loss_function)

            with hosts.regularised(handle, target) as training:
                output = call(data, loss_function)
            if output:  # the last stage's
                losses = [report["loss"] for report in training.target_reports]
                output["metrics"]["target loss"] = sum(losses)
                output["metrics"].update({n: v.item() for n, v in handle.metrics.items()})
            return output

    return RegularisedEngine
