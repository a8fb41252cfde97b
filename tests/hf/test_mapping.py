"""The table is a bijection: rows are neither lost nor doubled, in any family, shape and layout."""

import pytest
import torch

from megatron_dr.hf.config import padded_vocabulary, parse
from megatron_dr.hf.families import FAMILIES
from megatron_dr.hf.mapping import Box, Mapped, hf_shapes, mapped_tensors, split, take

from ._shapes import config, tensors

CASES = [(name, seed) for name in FAMILIES for seed in range(6)]


def sliced(values: dict[str, torch.Tensor]):  # type: ignore[no-untyped-def]
    def read(name: str, box: Box) -> torch.Tensor:
        return values[name][tuple(slice(first, end) for first, end in box)]

    return read


def whole(tensor: Mapped, values: dict[str, torch.Tensor], tp: int = 1) -> torch.Tensor:
    """Megatron's tensor put together from what each tensor-parallel rank reads."""
    dtype = next(iter(values.values())).dtype
    out = torch.full(tensor.shape, float("nan"), dtype=dtype)
    for rank in range(tp):
        for box in tensor.shards(rank, tp):
            place = tuple(slice(first, end) for first, end in box)
            assert out[place].isnan().all()  # nobody else wrote it
            out[place] = take(tensor, box, dtype, sliced(values))
    return out


@pytest.mark.parametrize("name, seed", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_there_and_back_is_bit_exact(name: str, seed: int, dtype: torch.dtype) -> None:
    model = parse(config(name, seed))
    mapped = mapped_tensors(model, padded_vocabulary(model, 1))
    values = tensors(hf_shapes(mapped), dtype)
    back: dict[str, torch.Tensor] = {}
    for tensor in mapped:
        for key, found in split(tensor, whole(tensor, values)).items():
            assert key not in back
            back[key] = found
    assert back.keys() == values.keys()
    assert all(back[key].equal(values[key]) for key in values)


@pytest.mark.parametrize("name, seed", CASES)
def test_tensor_parallel_ranks_read_what_one_reads(name: str, seed: int) -> None:
    drawn = config(name, seed)
    model = parse(drawn | {"num_attention_heads": 4, "num_key_value_heads": 2})
    mapped = mapped_tensors(model, padded_vocabulary(model, 2))
    values = tensors(hf_shapes(mapped), torch.float32)
    for tensor in mapped:
        assert whole(tensor, values, 2).equal(whole(tensor, values))


@pytest.mark.parametrize("seed", range(4))
def test_heads_lie_group_by_group(seed: int) -> None:
    """Megatron's attention views linear_qkv's rows as [groups, heads of a group + 2, head]."""
    model = parse(config("Qwen2ForCausalLM", seed))
    mapped = mapped_tensors(model, 256)
    values = tensors(hf_shapes(mapped), torch.float32)
    for kind in ("weight", "bias"):
        (tensor,) = [t for t in mapped if t.key.endswith(f"linear_qkv.{kind}") and t.index == (0,)]
        queries = model.heads // model.groups
        rows = whole(tensor, values)
        shape = (model.groups, queries + 2, model.head_size, *rows.shape[1:])
        for number, letter in enumerate("qkv"):
            first = 0 if letter == "q" else queries + number - 1
            last = queries if letter == "q" else first + 1
            expected = values[f"model.layers.0.self_attn.{letter}_proj.{kind}"]
            assert rows.view(shape)[:, first:last].reshape(expected.shape).equal(expected)


def test_gate_and_up_of_a_rank_are_its_own_rows_of_each() -> None:
    model = parse(config("LlamaForCausalLM", 0, intermediate_size=12))
    mapped = mapped_tensors(model, 128)
    values = tensors(hf_shapes(mapped), torch.float32)
    tensor = next(t for t in mapped if t.key.endswith("linear_fc1.weight"))
    boxes = tensor.shards(1, 3)
    assert [box[0] for box in boxes] == [(4, 8), (16, 20)]
    for box, name in zip(boxes, ("gate", "up"), strict=True):
        expected = values[f"model.layers.0.mlp.{name}_proj.weight"][4:8]
        assert take(tensor, box, torch.float32, sliced(values)).equal(expected)


@pytest.mark.parametrize("vocabulary", [7, 128, 129])
def test_vocabulary_is_padded_with_zeros_and_stripped(vocabulary: int) -> None:
    model = parse(config("LlamaForCausalLM", 1, vocab_size=vocabulary, tie_word_embeddings=False))
    padded = padded_vocabulary(model, 2)
    assert padded % 256 == 0 and vocabulary <= padded < vocabulary + 256
    mapped = mapped_tensors(model, padded)
    values = tensors(hf_shapes(mapped), torch.float32)
    ends = [t for t in mapped if not t.index and len(t.shape) == 2]
    assert [t.key for t in ends] == ["embedding.word_embeddings.weight", "output_layer.weight"]
    for tensor in ends:
        found = whole(tensor, values, 2)
        assert found.shape[0] == padded and not found[vocabulary:].any()
        assert {k: tuple(v.shape) for k, v in split(tensor, found).items()} == {
            tensor.parts[0].name: (vocabulary, model.hidden_size)
        }


def test_a_tied_model_has_no_output_layer() -> None:
    for tied in (True, False):
        model = parse(config("Qwen3ForCausalLM", 2, tie_word_embeddings=tied))
        names = hf_shapes(mapped_tensors(model, 256))
        assert ("lm_head.weight" in names) is not tied


def test_a_size_that_cannot_be_divided_is_named() -> None:
    model = parse(config("LlamaForCausalLM", 0, intermediate_size=22))
    tensor = next(t for t in mapped_tensors(model, 384) if "linear_fc2" in t.key)
    with pytest.raises(ValueError, match=r"linear_fc2.weight: size 22 can't be .* --tp 3"):
        tensor.shards(0, 3)
