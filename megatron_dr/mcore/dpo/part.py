"""DPO as a part of a run: its defaults, and what it refuses."""

from argparse import Namespace
from typing import Any

from megatron_dr.config.dpo import SEQUENCES, PreferenceConfig
from megatron_dr.config.target import TargetConfig
from megatron_dr.mcore.refuse import Rule, rules, single
from megatron_dr.mcore.seams.part import Part
from megatron_dr.mcore.seams.source import Source


class DPOPart(Part):
    """--dr-dpo-beta: steps on preference pairs."""

    name, config, switch, flag = "dpo", PreferenceConfig, "beta", "--dr-dpo-beta"
    who = "--dr-dpo-beta does not go with"
    refused = (
        *rules({
            "dr_rl_algorithm": "a run has one loss",
            "dr_pack": "pairs are not packed",
            "mock_data": "a preference needs real answers",
            **dict.fromkeys(
            ("eod_mask_loss", "reset_position_ids", "reset_attention_mask"),
            "its losses are of answers alone",
        ),
        "skip_train": "validation alone has no reference",
        }),
        single("context_parallel_size"),
        single("expert_model_parallel_size"),
        Rule(
            "num_experts",
            when=lambda number, args: number and args.dr_rows == "sample",
            says="--dr-dpo-beta with --dr-rows sample does not go with {flag}: use --dr-rows slot.",
        ),
    )  # fmt: skip

    def defaults(self, own: PreferenceConfig, given: dict[str, Any]) -> None:
        if not given:
            given["set"] = "mean"

    def known(self, args: Namespace) -> dict[str, Any]:
        return {"sequences": SEQUENCES}

    def source(self, own: PreferenceConfig, args: Namespace, target: TargetConfig) -> Source:
        from megatron_dr.mcore.dpo.source import PairSource

        return PairSource(args, target, own)
