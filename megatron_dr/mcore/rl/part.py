"""Training by rewards as parts of a run: what it sets of Megatron's flags, and what it refuses."""

import dataclasses
from argparse import Namespace
from collections.abc import Callable
from typing import Any

from megatron_dr.config.dr import DRConfig
from megatron_dr.config.rl import RLConfig
from megatron_dr.config.target import NAMED, WATCHING, TargetConfig
from megatron_dr.config.target_sets import parsed
from megatron_dr.data.files import SUFFIXES
from megatron_dr.mcore.data.samples import is_file
from megatron_dr.mcore.refuse import Rule, rules
from megatron_dr.mcore.rl.saved import other_run
from megatron_dr.mcore.seams.part import Part
from megatron_dr.mcore.seams.source import Source
from megatron_dr.projection import UNPROJECTED

_FIXED = ("algorithm", "prompts", "group", "epochs")  # what a cycle and its steps depend on
# what nothing of a rollout and its losses depends on
_FREE = ("reward_workers", "reward_timeout", "engine", "offload", "valid_data")

_REFUSED = (
    *rules({
        "train_data_path": "general prompts go to --data-path",
        "valid_data_path": "held-out general prompts go to --dr-rl-valid-data",
        "test_data_path": "held-out general prompts go to --dr-rl-valid-data",
        "mock_data": "a reward function needs real prompts",
        "dr_pack": "completions are not packed",
        "full_validation": "every validation answers all held-out prompts",
        "non_persistent_save_interval": "rollouts are saved with persistent checkpoints",
        "perform_rl_step": "it is Megatron's own loop for rewards",
        **dict.fromkeys(
            ("eod_mask_loss", "reset_position_ids", "reset_attention_mask"),
            "its losses are of completions alone",
        ),
        "skip_train": "validation alone has no rollouts",
        "iterations_to_skip": "its data are made as it trains, not by iterations",
    }),
    Rule("dr_target_ranks", says="{who} {flag}: drop it."),
    Rule("dr_rows", when=lambda rows, _: rows == "domain", says="{who} {flag} {value}: drop it."),
    Rule(
        "dataloader_type",
        when=lambda kind, _: kind not in (None, "external"),
        says="--dr-rl-algorithm makes its own batches: drop {flag} {value}.",
    ),
    Rule(
        "num_experts",
        "routers would count the tokens that it scores",
        when=lambda number, args: number and args.dr_rl_filter == "once",
        says="--dr-rl-filter once does not go with {flag} ({why}): drop one of them.",
    ),
    Rule(
        "use_layer_wise_distributed_optimizer",
        when=lambda used, args: used and args.dr_rl_offload,
        says="--dr-rl-offload does not go with --optimizer {options.optimizer}, which gathers "
        "parameters in the gradient buffers: drop the flag.",
    ),
)  # fmt: skip


class RLPart(Part):
    """--dr-rl-algorithm: steps on rollouts."""

    name, config, switch, flag = "rl", RLConfig, "algorithm", "--dr-rl-algorithm"
    who = "--dr-rl-algorithm does not go with"
    refused = _REFUSED

    def defaults(self, own: RLConfig, given: dict[str, Any]) -> None:
        """The set of the paper (arXiv 2605.07063) where there is a target; a constant alpha, as the
        rule that chooses it counts passes over samples, and rollouts are new at each; steps on a
        filtered rollout have no target in them at all."""
        if own.target == "self":
            names = ("target_data", "target_batch_size")
            _refuse_given(names, given, "--dr-rl-target self: drop one of them.")
        if own.filter == "once":
            _add_filter_defaults(own, given)
        has_target = own.target == "self" or "target_data" in given
        if has_target:
            given.setdefault("alpha_style", DRConfig.alpha_style)
        if "set" in given:
            return
        if has_target:
            given.update({"set": "filter", "fraction": 1.0, "alpha": 0.0} | given)
        elif not given.keys() - WATCHING:
            given["set"] = "mean"

    def is_target(self, own: RLConfig) -> bool:
        return own.target == "self"

    def step_target(
        self, own: RLConfig, dr: DRConfig, target: TargetConfig | None
    ) -> TargetConfig | None:
        """A filtered rollout's steps are plain; a target that is the rollout is all of it."""
        if own.filter == "once" or (own.target == "self" and not dr.needs_target):
            return None
        return TargetConfig(target_batch_size=own.completions) if own.target == "self" else target

    def prepare(self, own: RLConfig, args: Namespace) -> None:
        _check_prompts(args.data_path)
        _check_one_target(args)
        args.dataloader_type = "external"
        args.calculate_per_token_loss = True  # a mean over all tokens, however they are split
        validates = own.valid_data is not None or args.dr_target_valid_data is not None
        args.eval_iters = 1 if validates else 0  # one call answers all held-out prompts
        if args.eval_interval is None:
            if validates:
                raise ValueError(
                    "held-out prompts need --eval-interval, the steps between two looks."
                )
            args.eval_interval = 1  # Megatron divides by it also where nothing is held out

    def settle(self, own: RLConfig, args: Namespace) -> None:
        """Refuse batches that don't come out even, and completions that don't fit."""
        own.steps_per_cycle(args.global_batch_size)
        if own.max_tokens >= args.seq_length:
            raise ValueError(
                f"--dr-rl-max-tokens {own.max_tokens} leaves no room for a prompt in --seq-length "
                f"{args.seq_length}: lower it or raise --seq-length."
            )

    def resume(self, own: RLConfig, args: Namespace, before: Namespace) -> None:
        """A cycle that is under way goes on only with the flags on which it depends."""
        saved = self.of(before)
        if saved is None:
            raise ValueError(other_run(f"{args.load}: it was saved without that flag"))
        pairs = {f"--dr-rl-{name}": (getattr(saved, name), getattr(own, name)) for name in _FIXED}
        for name in ("global_batch_size", "seq_length"):
            pairs["--" + name.replace("_", "-")] = (getattr(before, name), getattr(args, name))
        for flag, (then, now) in pairs.items():
            if then != now:
                raise ValueError(
                    f"{args.load}: the checkpoint is of a run with {flag} {then}, and a cycle that "
                    f"is under way can't go on with {now}: give {flag} {then}, or --finetune to "
                    "begin a new run from it."
                )

    def kept(self, own: RLConfig, before: Namespace) -> dict[str, str]:
        """In the middle of a cycle, all of its rollouts and losses; `resume` has the others."""
        saved, steps = self.of(before), getattr(before, "megatron_dr_steps", 0)
        if saved is None or steps % saved.steps_per_cycle(before.global_batch_size) == 0:
            return {}
        names = [f.name for f in dataclasses.fields(own) if f.name not in (*_FREE, *_FIXED)]
        flags = ["data-path", *(f"dr-rl-{name.replace('_', '-')}" for name in names)]
        return dict.fromkeys(flags, "the steps on a rollout of that run are not all done")

    def source(self, own: RLConfig, args: Namespace, target: TargetConfig) -> Source:
        from megatron_dr.mcore.rl.source import RolloutSource

        return RolloutSource(args, target, own)


class ValuePart(Part):
    """--dr-rl-algorithm ppo: a value head."""

    flag = "--dr-rl-algorithm ppo"

    def of(self, args: Namespace) -> bool | None:
        return getattr(args, "dr_rl_algorithm", None) == "ppo" or None

    def on_model(self, own: Any, args: Namespace) -> Callable[..., Any]:
        from megatron_dr.mcore.model.value_head import add_value_head

        return add_value_head

    def owns(self, key: Any) -> bool:
        return isinstance(key, str) and key.startswith(f"{UNPROJECTED}.")


def _add_filter_defaults(own: RLConfig, given: dict[str, Any]) -> None:
    """A rollout that is filtered once: its steps are plain."""
    flag = "--dr-rl-filter once"
    if own.target != "self" and "target_data" not in given:
        raise ValueError(f"{flag} needs a target: give --dr-target-data, or --dr-rl-target self.")
    if given.setdefault("set", "mean") != "mean":
        raise ValueError(
            f"{flag} is followed by plain training, and does not go with --dr-set {given['set']}: "
            "drop one of them."
        )
    names = ("alpha", "alpha_style", "target_batch_size")
    _refuse_given(names, given, f"{flag}, whose steps have no target in them: drop it.")


def _refuse_given(names: tuple[str, ...], given: dict[str, Any], beside: str) -> None:
    for name in names:
        if name in given:
            raise ValueError(f"--dr-{name.replace('_', '-')} has no meaning with {beside}")


def _check_one_target(args: Namespace) -> None:
    """Raise ValueError where there are several target sets."""
    for name in NAMED:
        value, flag = getattr(args, f"dr_{name}", None), f"--dr-{name.replace('_', '-')}"
        if value is not None and isinstance(parsed(flag, value), tuple):
            raise ValueError(
                f"--dr-rl-algorithm takes one target set, of prompts, without a name: give {flag} "
                "one value."
            )


def _check_prompts(paths: list[str] | None) -> None:
    """Raise ValueError where the general prompts are not given as files."""
    if not paths:
        raise ValueError("--dr-rl-algorithm needs general prompts: give --data-path prompts.jsonl.")
    for path in paths:
        if not is_file(path):
            raise ValueError(
                f"--data-path {path}: with --dr-rl-algorithm prompts are files that end in "
                f"{', '.join(SUFFIXES)}, or folders of them, without weights between them."
            )
