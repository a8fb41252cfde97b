"""Reinforcement learning's configuration: rollouts, rewards, the policy's loss, the target's."""

from dataclasses import dataclass, fields
from typing import Literal

from megatron_dr.config.fields import flag, must_be

_OF_PPO = ("kl_target", "kl_horizon", "discount", "gae_decay", "value_weight", "value_clip")


@dataclass(frozen=True)
class RLConfig:
    """GRPO (arXiv 2402.03300) or PPO (arXiv 1707.06347, as RLHF uses it: arXiv 1909.08593) with
    data regularisation; flags `--dr-rl-*`.

    A cycle is one rollout of `prompts` x `group` completions, and `epochs` passes over them.

    Raises:
        ValueError: a dial out of range, in one sentence that says what is allowed.
    """

    algorithm: Literal["grpo", "ppo"] = flag(
        "grpo",
        "train by rewards, relative to a prompt's group or to a value head; switches it on",
        "name",
    )
    reward: str | None = flag(
        None, "reward function: module:function of (prompt, completion, answer)", "name"
    )
    reward_model: str | None = flag(
        None,
        "in place of --dr-rl-reward: a Hugging Face sequence-classification checkpoint",
        "folder",
    )
    reward_label: str | None = flag(
        None,
        "of a reward model with several labels, the one whose logit is the reward: name or number",
        "name",
    )
    reward_text: Literal["whole", "completion"] = flag(
        "whole", "what a reward model reads: prompt and completion, or the completion alone", "name"
    )
    reward_workers: int = flag(1, "processes that evaluate rewards, on each rank", "count")
    reward_timeout: float = flag(20.0, "time for a completion's reward", "seconds, > 0")
    unsafe_sandbox: bool = flag(
        False,
        "let the reward unit_tests run models' code as the user, where the machine can't keep it "
        "from the user's files",
        "flag",
    )
    engine: str | None = flag(
        None,
        "what answers in place of the model itself: module:function of (model, arguments)",
        "name",
    )
    prompts: int = flag(8, "general prompts in a rollout", "count")
    group: int = flag(8, "completions of each prompt, among which rewards compete", "count")
    epochs: int = flag(1, "passes over a rollout", "count")
    temperature: float = flag(1.0, "of sampling", "factor, > 0")
    top_p: float = flag(1.0, "probability of the tokens to choose from", "share, 0 < p <= 1")
    top_k: int = flag(
        0, "tokens to choose from, the likeliest, before --dr-rl-top-p; 0: all", "count"
    )
    max_tokens: int = flag(256, "length of a completion, at most", "tokens")
    min_tokens: int = flag(
        0, "length of a completion before its end of text, at least; held-out ones too", "tokens"
    )
    stop: str | None = flag(None, "text that ends a completion", "text")
    clip: float = flag(0.2, "how far the ratio may move from 1", "factor, > 0")
    kl: float = flag(
        0.04,
        "weight of the KL to the policy of the run's start, in the loss (grpo) or in the tokens' "
        "rewards (ppo); 0: none",
        "factor, >= 0",
    )
    kl_estimator: Literal["auto", "k1", "k2", "k3"] = flag(
        "auto",
        "estimate of that KL by token: log-ratio, half its square, or GRPO's; auto: k1 with ppo, "
        "k3 with grpo",
        "name",
    )
    kl_target: float | None = flag(
        None, "ppo: KL that --dr-rl-kl is steered to after each rollout", "nats per completion, > 0"
    )
    kl_horizon: int = flag(
        10000, "ppo: completions over which --dr-rl-kl moves by up to a fifth", "count"
    )
    discount: float = flag(1.0, "ppo: gamma of the returns", "factor, 0 to 1")
    gae_decay: float = flag(0.95, "ppo: lambda of the advantage estimates", "factor, 0 to 1")
    value_weight: float = flag(0.1, "ppo: weight of the value loss", "factor, > 0")
    value_clip: float = flag(
        0.2, "ppo: how far a value may move from that of the rollout", "units of reward, > 0"
    )
    aggregation: Literal["token", "sequence"] = flag(
        "token",
        "the loss is a mean over tokens, or over completions of their tokens' means",
        "name",
    )
    target: Literal["prompts", "self"] = flag(
        "prompts", "the target's completions: of --dr-target-data, or the whole rollout", "name"
    )
    target_loss: Literal["reward", "token-pg", "train-loss"] = flag(
        "reward",
        "the target's loss: -(normalised reward) x log-prob, -(advantage) x log-prob with "
        "training's advantages, or that of training",
        "name",
    )
    target_reward: str | None = flag(
        None, "the target's own reward function, as --dr-rl-reward; by default the same", "name"
    )
    target_prompts: int = flag(4, "target prompts in a target rollout", "count")
    target_refresh: int = flag(1, "rollouts between two target rollouts", "count")
    filter: Literal["none", "once"] = flag(
        "none",
        "once: before a cycle's steps, drop the completions whose gradient opposes the "
        "target's (IIF); the set is then mean",
        "name",
    )
    offload: bool = flag(False, "free the gradient buffers during rollouts", "flag")
    valid_data: str | None = flag(
        None, "held-out general prompts, answered greedily at Megatron's validation", "path"
    )

    def __post_init__(self) -> None:
        if (self.reward is None) == (self.reward_model is None):
            raise ValueError(
                "--dr-rl-algorithm needs --dr-rl-reward module:function, such as "
                "megatron_dr.rl.rewards:numeric, or --dr-rl-reward-model DIR, and not both."
            )
        if self.reward_model is None:
            for name, default in (("reward_label", None), ("reward_text", "whole")):
                if getattr(self, name) != default:
                    raise ValueError(
                        f"{_flag(name)} is of a reward model, and --dr-rl-reward is a function: "
                        "drop it."
                    )
        if self.target_reward is not None and self.target == "self":
            raise ValueError(
                f"{_flag('target_reward')} needs completions of the target's own: drop "
                "--dr-rl-target self, or the reward."
            )
        for name in ("reward_workers", "prompts", "group", "epochs", "max_tokens",
                     "target_prompts", "target_refresh", "kl_horizon"):  # fmt: skip
            must_be("at least 1", getattr(self, name) >= 1, _flag(name), getattr(self, name))
        for name in ("reward_timeout", "temperature", "clip", "value_weight", "value_clip"):
            value = getattr(self, name)
            must_be("finite and above 0", 0.0 < value < float("inf"), _flag(name), value)
        must_be("finite and at least 0", 0.0 <= self.kl < float("inf"), _flag("kl"), self.kl)
        self._check_sampling()
        self._check_estimator()
        if self.algorithm == "ppo":
            self._check_ppo()
        else:
            self._check_grpo()

    def _check_sampling(self) -> None:
        must_be("in (0, 1]", 0.0 < self.top_p <= 1.0, _flag("top_p"), self.top_p)
        must_be("at least 0", self.top_k >= 0, _flag("top_k"), self.top_k)
        if self.stop == "":
            raise ValueError(f"{_flag('stop')} must not be empty.")
        most = f"from 0 to {_flag('max_tokens')} {self.max_tokens}"
        is_possible = 0 <= self.min_tokens <= self.max_tokens
        must_be(most, is_possible, _flag("min_tokens"), self.min_tokens)
        if self.min_tokens and self.stop is not None:
            raise ValueError(
                f"{_flag('min_tokens')} keeps the end of text from being drawn, and can't keep a "
                f"text from being written: drop it, or {_flag('stop')}."
            )

    def _check_estimator(self) -> None:
        if self.kl_estimator == "auto":
            return
        if self.kl == 0:
            raise ValueError(
                f"{_flag('kl_estimator')} has no meaning with {_flag('kl')} 0: drop it."
            )
        if self.algorithm == "grpo" and self.kl_estimator == "k1":
            raise ValueError(
                f"{_flag('kl_estimator')} k1 has on average no gradient, and so no effect in the "
                "loss of --dr-rl-algorithm grpo: give k2 or k3."
            )

    def _check_grpo(self) -> None:
        if self.group == 1:
            raise ValueError(
                f"{_flag('group')} must be at least 2: a completion's advantage is its reward "
                "relative to the others of its prompt."
            )
        for field in fields(self):
            if field.name in _OF_PPO and getattr(self, field.name) != field.default:
                raise ValueError(
                    f"{_flag(field.name)} has no meaning with --dr-rl-algorithm grpo: drop it, or "
                    "use ppo."
                )

    def _check_ppo(self) -> None:
        for name in ("discount", "gae_decay"):
            share = getattr(self, name)
            must_be("in [0, 1]", 0.0 <= share <= 1.0, _flag(name), share)
        wanted = self.kl_target
        if wanted is None:
            return
        must_be("finite and above 0", 0.0 < wanted < float("inf"), _flag("kl_target"), wanted)
        if self.kl == 0:
            raise ValueError(
                f"{_flag('kl_target')} steers {_flag('kl')}, which must then be above 0."
            )

    @property
    def kl_of_loss(self) -> float:
        """Weight of the KL in the loss; PPO has it in the rewards."""
        return self.kl if self.algorithm == "grpo" else 0.0

    @property
    def estimator(self) -> Literal["k1", "k2", "k3"]:
        """Of the KL that `kl` weighs."""
        if self.kl_estimator != "auto":
            return self.kl_estimator
        return "k1" if self.algorithm == "ppo" else "k3"

    @property
    def target_by_reward(self) -> bool:
        """Whether the target's log-probabilities are multiplied by rewards, not by advantages."""
        return self.target_loss == "reward"

    @property
    def target_has_ratio(self) -> bool:
        """Whether the target's loss is training's, with its ratio and clip."""
        return self.target_loss == "train-loss"

    @property
    def completions(self) -> int:
        """N, completions in a rollout."""
        return self.prompts * self.group

    def steps_per_cycle(self, global_batch_size: int) -> int:
        """Training steps between two rollouts.

        Raises:
            ValueError: the steps don't come out even.
        """
        rows = self.completions * self.epochs
        if rows % global_batch_size:
            raise ValueError(
                f"--dr-rl-prompts x --dr-rl-group x --dr-rl-epochs = {rows} is not a multiple of "
                f"--global-batch-size {global_batch_size}: change one of them."
            )
        return rows // global_batch_size


def _flag(name: str) -> str:
    return f"--dr-rl-{name.replace('_', '-')}"
