"""Flags that a run on preference pairs refuses."""

from argparse import Namespace

from megatron_dr.mcore.arguments import part_from_args

_REFUSED = {
    "dr_rl_algorithm": "a run has one loss",
    "dr_pack": "pairs are not packed",
    "mock_data": "a preference needs real answers",
    "skip_train": "validation alone has no reference",
}
_SINGLE = ("context_parallel_size", "expert_model_parallel_size")


def check(args: Namespace) -> None:
    """Raise ValueError where flags contradict DPO; without it do nothing."""
    if part_from_args(args, "dpo") is None:
        return
    for name, why in _REFUSED.items():
        if getattr(args, name, None):
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"--dr-dpo-beta does not go with {flag} ({why}): drop it.")
    for name in _SINGLE:
        size = getattr(args, name, None) or 1
        if size > 1:
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"--dr-dpo-beta does not go with {flag} {size}: set {flag} 1.")
    if args.dr_rows == "sample" and args.num_experts:
        raise ValueError(
            "--dr-dpo-beta with --dr-rows sample does not go with --num-experts: use --dr-rows "
            "slot."
        )
