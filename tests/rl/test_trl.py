"""Our losses beside those of TRL's own trainers, on the same tiny model and the same samples.

Equal in TRL 1.16: the group's advantages (both divide by the sample deviation, over n - 1, plus
1e-4, and leave samples without a reward out), the clipped loss, the k3 estimate of the KL, DPO.

Different:
- GRPO's loss. TRL's `grpo` is the mean over the completions of a microbatch, and microbatches are
  averaged; ours (`sequence`) is the mean over those of the global batch, without completions that
  have no tokens. TRL's `bnpo` is the mean over the tokens of a microbatch; ours (`token`) is over
  those of the global batch, as is TRL's default, `dapo`. In one microbatch they agree.
- The KL. TRL multiplies k3 by the ratio unless `use_bias_correction_kl=False`, as here; ours is
  GRPO's, without the ratio.
- Advantages. Rewards that are equal give exactly 0 here; in TRL a mean off by rounding may stay.
- DPO. Label smoothing is in TRL a matter of other losses: `robust` divides by 1 - 2 s and turns the
  sign of the second term. Ours (conservative DPO) is TRL's `aot_unpaired` on a single pair.
- TRL 1.16 has no PPO trainer and so no GAE; see test_advantages for that.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

trl = pytest.importorskip("trl")
transformers = pytest.importorskip("transformers")

from megatron_dr.rl import advantages, losses, preference  # noqa: E402
from megatron_dr.rl.weights import token_weights  # noqa: E402

from . import _reward_model as made  # noqa: E402

PROMPTS, GROUP, LENGTH = ["a", "what is it", "1+1="], 4, 6
COMMON = dict(use_cpu=True, report_to=[], bf16=False, fp16=False, max_steps=1, seed=3,
              gradient_checkpointing=False, disable_tqdm=True)  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("policy")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**made.SIZES, pad_token_id=0, eos_token_id=2)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer = made.tokenizer(False)
    tokenizer.pad_token = "<pad>"
    tokenizer.save_pretrained(folder)
    return folder


def shifted(model: Any) -> None:
    """A policy that has moved, so that ratios and the KL differ from 1 and 0."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)


def log_probs(model: Any, ids_BT: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """Of each token but the first, given those before it."""
    logits = model(input_ids=ids_BT, attention_mask=mask_BT).logits[:, :-1]
    return logits.log_softmax(-1).gather(2, ids_BT[:, 1:, None])[..., 0]


def compare(model: Any, theirs: torch.Tensor, ours: torch.Tensor) -> None:
    """Losses and gradients."""
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    parameters = list(model.parameters())
    expected = torch.autograd.grad(theirs, parameters)
    for found, wanted in zip(torch.autograd.grad(ours, parameters), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)
    assert max(gradient.abs().max() for gradient in expected) > 1e-2


def rewards(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
    """By the text; one sample has none; a prompt's are all equal."""
    found: list[float | None] = [sum(ids) % 17 / 4 for ids in completion_ids]
    found[1] = None
    return found[: 2 * GROUP] + [0.7] * GROUP


@pytest.fixture
def grpo(checkpoint: Path, tmp_path: Path) -> tuple[Any, Any]:
    """TRL's trainer, and a rollout of it."""
    from datasets import Dataset  # imported late, as it takes a second

    args = trl.GRPOConfig(
        tmp_path, per_device_train_batch_size=len(PROMPTS) * GROUP, num_generations=GROUP,
        max_completion_length=LENGTH, beta=0.3, epsilon=0.1, use_bias_correction_kl=False, **COMMON,
    )  # fmt: skip
    prompts = [{"prompt": prompt} for prompt in PROMPTS]
    trainer = trl.GRPOTrainer(str(checkpoint), rewards, args, Dataset.from_list(prompts))
    return trainer, trainer._generate_and_score_completions(
        [prompt for prompt in prompts for _ in range(GROUP)]
    )


def test_advantages_of_groups(grpo: tuple[Any, Any]) -> None:
    batch = grpo[1]
    found = rewards(batch["completion_ids"].tolist())  # padding is 0 and adds nothing
    reward_B = torch.tensor([float("nan") if reward is None else reward for reward in found])
    group_B = torch.arange(len(PROMPTS)).repeat_interleave(GROUP)
    advantage_B = advantages.group_advantages(reward_B, group_B)
    differ = slice(2 * GROUP)  # in these groups rewards do
    torch.testing.assert_close(
        advantage_B[differ], batch["advantages"][differ], rtol=1e-5, atol=1e-6
    )
    assert advantage_B[1] == 0 and advantage_B[:GROUP].std() > 0.5
    equal = slice(2 * GROUP, None)
    assert batch["advantages"][equal].abs().max() < 1e-2 and not advantage_B[equal].any()


def test_grpo_loss(grpo: tuple[Any, Any]) -> None:
    trainer, batch = grpo
    model, of_completion_BT = trainer.model, batch["completion_mask"]
    for row, mask_T in enumerate(of_completion_BT):
        mask_T[1 + row % LENGTH :] = 0  # lengths differ
    ids_BT = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask_BT = torch.cat([batch["prompt_mask"], of_completion_BT], 1)

    def own() -> torch.Tensor:
        return log_probs(model, ids_BT, mask_BT)[:, -LENGTH:]

    old_BT = batch["old_per_token_logps"] = own().detach()
    reference_BT = batch["ref_per_token_logps"]
    torch.testing.assert_close(
        reference_BT * of_completion_BT, old_BT * of_completion_BT, rtol=1e-4, atol=1e-4
    )
    shifted(model)
    trainer.current_gradient_accumulation_steps = 1
    for loss_type, aggregation in (("grpo", "sequence"), ("bnpo", "token")):
        trainer.loss_type = loss_type
        own_BT, weights = own(), token_weights(of_completion_BT, aggregation)
        total, count = losses.policy_loss(
            own_BT, old_BT, batch["advantages"][:, None], weights, trainer.args.epsilon
        )
        total = total + trainer.beta * losses.kl_loss(own_BT, reference_BT, weights)[0]
        compare(model, trainer._compute_loss(model, batch), total / count)
    logged = trainer._metrics["eval"]  # the model is not set to train
    assert logged["clip_ratio/region_mean"][-1] > 0.1 and logged["kl"][-1] > 0.01


@pytest.mark.parametrize(
    "loss_type, smoothing, pairs", [("sigmoid", 0.0, 3), ("aot_unpaired", 0.2, 1)]
)
def test_dpo(
    checkpoint: Path, tmp_path: Path, loss_type: str, smoothing: float, pairs: int
) -> None:
    from datasets import Dataset

    args = trl.DPOConfig(
        tmp_path, per_device_train_batch_size=pairs, beta=0.4, loss_type=loss_type,
        label_smoothing=smoothing, **COMMON,
    )  # fmt: skip
    rows = {"prompt": PROMPTS, "chosen": [" yes", "a cat", "2"], "rejected": ["no", "a", " three"]}
    trainer = trl.DPOTrainer(str(checkpoint), args=args, train_dataset=Dataset.from_dict(rows))
    batch = next(iter(trainer.get_train_dataloader()))
    model, ids_BT = trainer.model, batch["input_ids"]

    def both() -> tuple[torch.Tensor, torch.Tensor]:
        log_prob_BT = log_probs(model, ids_BT, batch["attention_mask"])
        chosen, rejected = preference.completion_log_prob(
            log_prob_BT, batch["completion_mask"][:, 1:]
        ).chunk(2)
        return chosen, rejected

    with torch.no_grad():
        reference = both()
    shifted(model)
    total, count = preference.dpo_loss(*both(), *reference, args.beta, smoothing)
    theirs = trainer._compute_loss(model, batch, return_outputs=False)
    compare(model, theirs, total / count)
