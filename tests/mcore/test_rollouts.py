"""Rollouts by the Megatron model: the oracle's tokens in every layout, and training undisturbed."""

from functools import cache
from typing import Any

import pytest
import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker

import megatron_dr
from megatron_dr import DRConfig
from megatron_dr.mcore.rollouts.ending import Ending
from megatron_dr.mcore.rollouts.megatron import MegatronRollouts
from megatron_dr.mcore.rollouts.passes import log_probs
from megatron_dr.rl.rollouts import Completion, SamplingParams

from . import _data, _megatron, _rollouts
from ._data import VOCAB, Layout
from ._ranks import run_ranks
from ._rollouts import CONTEXT, PROMPTS, SAMPLINGS, SEED

TOLERANCE = 1e-4


def policy(layout: Layout, learned: bool = False) -> list[Any]:
    """On a rank: the model with room for CONTEXT tokens."""
    _data.LENGTH = CONTEXT
    if learned:
        original = _megatron.GPTModel
        _megatron.GPTModel = lambda *args, **kwargs: original(
            *args, **{**kwargs, "position_embedding_type": "learned_absolute"}
        )
    _megatron.initialize(layout)
    return _megatron.build(layout, _rollouts.initial(layout, learned))[0]


def fields(completions: list[Completion]) -> list[Any]:
    return [(list(c.ids), list(c.log_probs), c.finish_reason) for c in completions]


def roll_out(layout: Layout, learned: bool, batch_size: int) -> Any:
    """On a rank: each sampling's completions, and the training forward's log-probabilities."""
    model = policy(layout, learned)
    rollouts = MegatronRollouts(model, VOCAB, batch_size=batch_size)
    written = [fields(rollouts.generate(PROMPTS, s, SEED)) for s in SAMPLINGS]
    frozen = [chunk.module for chunk in model]  # a reference has no DDP
    forwards = [
        log_probs(model, *_rollouts.padded(written[0])),
        log_probs(frozen, *_rollouts.padded(written[1][:5]), 1 if layout.vpp else 4),
    ]
    return written, forwards


oracle = cache(_rollouts.oracle)

LAYOUTS = {
    "one": Layout(),
    "one_moe": Layout(moe=True),
    "tp2": Layout(tp=2),
    "tp2_sp_tied": Layout(tp=2, sequence_parallel=True, tied=True),
    "pp2_tied": Layout(pp=2, tied=True),
    "pp2_vpp2": Layout(pp=2, vpp=2),
    "dp2_biases": Layout(dp=2, layer_norm=True),
    "tp2_pp2_sp_qk": Layout(tp=2, pp=2, sequence_parallel=True, qk_layernorm=True),
    "tp2_sp_learned": Layout(tp=2, sequence_parallel=True, layer_norm=True),
}


def reduced(layout: Layout) -> Layout:
    """The same model in one process."""
    kept = ("tied", "moe", "layer_norm", "qk_layernorm")
    return Layout(**{name: getattr(layout, name) for name in kept})


@pytest.mark.parametrize("name", LAYOUTS)
def test_tokens_and_log_probabilities_are_the_oracles(name: str) -> None:
    layout, learned = LAYOUTS[name], name.endswith("learned")
    expected = oracle(reduced(layout), learned)
    ranks = run_ranks(layout.world, roll_out, layout, learned, 64 if layout.tp > 1 else 4)
    for written, trained in ranks:
        for got, want in zip(written, expected, strict=True):
            compare(got, want)
        for forward, want in zip(trained, expected, strict=False):
            compare_forward(forward, want)


def compare(got: list[Any], want: list[Any]) -> None:
    assert [(tokens, finish) for tokens, _, finish in got] == [(t, f) for t, _, f in want]
    for (_, found, _), (_, exact, _) in zip(got, want, strict=True):
        torch.testing.assert_close(found, exact, rtol=0, atol=TOLERANCE)


def compare_forward(forward: torch.Tensor, want: list[Any]) -> None:
    """Of the first prompts: as many as there are rows."""
    _, mask = _rollouts.padded(want[: len(forward)])
    for row, (_, exact, _) in enumerate(want[: len(forward)]):
        found = forward[row][mask[row] == 1].tolist()
        torch.testing.assert_close(found, exact, rtol=0, atol=TOLERANCE)
    assert not forward[mask == 0].any()


# -- between training steps ----------------------------------------------------------------------
TRAINED = {
    "overlap": Layout(
        dp=2, targets=0, distributed_optimizer=True, overlap=True, overlap_param_gather=True
    ),
    "regularised_tp2_sp": Layout(tp=2, sequence_parallel=True, sequences=1, targets=1),
    "pp2_vpp2": Layout(pp=2, vpp=2, targets=0),
}


def trained(layout: Layout, rolling: bool) -> list[torch.Tensor]:
    """On a rank: weights, optimizer state and RNGs after three steps with dropout."""

    def with_dropout(layout: Layout) -> Any:
        config = original(layout)
        config.hidden_dropout = config.attention_dropout = 0.1
        return config

    def plugin(model: Any, optimizer: Any, config: Any) -> Any:
        step = optimizer.step

        def step_and_roll_out() -> Any:
            result = step()
            MegatronRollouts(model, VOCAB).generate([[1, 2], [3]], SamplingParams(3), SEED)
            log_probs(model, torch.ones(3, 4, dtype=torch.long), torch.tensor([[0, 1, 1, 1]] * 3))
            return result

        if rolling:
            optimizer.step = step_and_roll_out
        dr = DRConfig(set="cone", rows="slot", slots=layout.slots)
        return megatron_dr.attach(model, optimizer, config, dr) if layout.targets else None

    original = _megatron.transformer_config
    _megatron.transformer_config = with_dropout
    model, optimizer, _, _ = _megatron.train(layout, 3, None, plugin)
    bare = [chunk.module for chunk in model]
    tensors = [x.detach() for chunk in bare for x in (*chunk.parameters(), *chunk.buffers())]
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        for values in part.optimizer.state.values():
            tensors += [v for v in values.values() if torch.is_tensor(v)]
    states = get_cuda_rng_tracker().get_states()
    return [*tensors, torch.get_rng_state(), *(states[name] for name in sorted(states))]


@pytest.mark.parametrize("name", TRAINED)
def test_training_goes_on_bit_for_bit(name: str) -> None:
    layout = TRAINED[name]
    without = run_ranks(layout.world, trained, layout, False)
    for a, b in zip(without, run_ranks(layout.world, trained, layout, True), strict=True):
        assert len(a) == len(b) > 0
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# -- where completions end -----------------------------------------------------------------------
def text(tokens: list[int]) -> str:
    """A vocabulary of words that overlap: 0 is "a0", 1 is "b1", 2 is "c2", ..., 26 is "a26"."""
    return "".join(f"{chr(97 + token % 26)}{token}" for token in tokens)


def ends() -> list[Any]:
    """On a rank: one prompt's completion, as it is and with every way to stop it."""
    model = policy(Layout())

    def first(params: SamplingParams, stop_tokens: tuple[int, ...] = ()) -> Any:
        rollouts = MegatronRollouts(model, VOCAB, stop_tokens, text)
        return fields(rollouts.generate([[7]], params, SEED))[0]

    whole = first(SamplingParams(6))
    token, string = whole[0][3], text(whole[0][1:4])[1:-1]
    stopped = [
        first(SamplingParams(6), (VOCAB - 1, token)),
        first(SamplingParams(6, stop=("nothing", string))),
        first(SamplingParams(99)),
    ]
    return [whole, *stopped]


def test_completions_end() -> None:
    whole, token, string, room = run_ranks(1, ends)[0]
    tokens, found, _ = whole
    assert whole[2] == "length" and len(tokens) == 6
    assert tokens[3] not in tokens[:3]
    assert token == string == (tokens[:4], found[:4], "stop")
    assert len(room[0]) == CONTEXT - 1 and room[0][:6] == tokens and room[2] == "length"


def test_stop_string_is_found_behind_any_text() -> None:
    """A token is a byte here."""
    ending = Ending((), ("é!",), lambda ids: bytes(ids).decode("utf8", "replace"))
    written = list("a é? é!".encode())
    reached = [ending.reached(written[: n + 1]) for n in range(len(written))]
    assert reached.index(True) == len(written) - 1
    assert ending.reached([*b"x" * 50, *written])
    assert not ending.reached([*written, *b" more"])


# -- what is refused -----------------------------------------------------------------------------
def refusals() -> list[str]:
    """On a rank: what each wrong call says."""
    rollouts = MegatronRollouts(policy(Layout()), VOCAB)
    ok, ones = SamplingParams(2), torch.ones(2, 4, dtype=torch.long)
    lines = ["p.jsonl line 3", "p.jsonl line 7"]
    calls = [
        lambda: rollouts.generate([[1], [2] * CONTEXT], ok, 0, lines),
        lambda: rollouts.generate([[1], []], ok, 0),
        lambda: rollouts.generate([[1, VOCAB]], ok, 0),
        lambda: rollouts.generate([[1]], SamplingParams(2, stop=("x",)), 0),
        lambda: rollouts.generate([[1]], SamplingParams(2, stop=("",)), 0),
        lambda: log_probs(rollouts.model, ones, ones[:, 1:]),
        lambda: log_probs(rollouts.model, ones, ones),
        lambda: log_probs(rollouts.model, ones.repeat(1, CONTEXT), 0 * ones.repeat(1, CONTEXT)),
    ]
    with torch.no_grad():
        next(rollouts.model[0].parameters()).fill_(torch.nan)
    calls.append(lambda: rollouts.generate([[1]], ok, 0))
    said = []
    for call in calls:
        with pytest.raises((ValueError, RuntimeError)) as error:
            call()
        said.append(str(error.value))
    modes = {module.training for module in rollouts.model[0].modules()}
    return [*said, str(modes)]


def test_wrong_input_is_refused_in_a_sentence() -> None:
    said = run_ranks(1, refusals)[0]
    parts = (
        "prompt 2 of 2 (p.jsonl line 7) has 16 tokens, but the model's context holds 16",
        "prompt 2 of 2 is empty",
        "token ids outside 0 to 60",
        "need a tokenizer",
        "strings that are not empty",
        "[2, 4] and mask [2, 3]",
        "first token",
        "exceed the model's context of 16",
        "not finite",
        "{True}",
    )
    assert len(said) == len(parts)
    for sentence, part in zip(said, parts, strict=True):
        assert part in sentence


def layout_refusal(layout: Layout) -> str:
    _megatron.initialize(layout)
    with pytest.raises(ValueError) as error:
        MegatronRollouts([], VOCAB)
    return str(error.value)


def test_layouts_that_share_a_pass_over_data_ranks_are_refused() -> None:
    assert "--context-parallel-size 1" in run_ranks(2, layout_refusal, Layout(cp=2))[0]
    experts = Layout(dp=2, ep=2, moe=True)
    assert "--expert-model-parallel-size 1" in run_ranks(2, layout_refusal, experts)[0]
