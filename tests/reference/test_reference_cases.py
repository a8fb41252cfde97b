"""The authors' numbers, computed again from factors that a plain model's backward leaves.

Tolerances: scores 1e-5 of the largest, gradients 1e-5 relative, the same choices. `cases/README.md`
says what the numbers are and where ours differ on purpose.

Shape suffixes: L tokens of a sample, N samples (8 general, 2 target), M rows, I in, O out,
B blocks, R = M + 1 (rows plus target).
"""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _llama import NO_LABEL, Factors, Llama
from torch import Tensor

from megatron_dr.projection import Filter, Greedy, TopK, norm_scale, per_sample, split

CASES = Path(__file__).parent / "cases"
LAYERWISE = "lws_merged_reduced_ghost_topk05"
WHOLE_MODEL = "gs1_separate_reduced_ghost_topk05"
SKETCHED = "lws_merged_compress16_topk05"


@cache
def numbers(name: str) -> dict[str, Any]:
    """All arrays of a file; those that hold numbers, as tensors."""
    with np.load(CASES / f"{name}.npz") as file:
        arrays = {key: file[key] for key in file.files}
    return {k: torch.from_numpy(a) if a.dtype.kind in "fib" else a for k, a in arrays.items()}


def weights() -> dict[str, Tensor]:
    given = numbers("model_and_batches")
    return {k[2:]: v.clone().requires_grad_() for k, v in given.items() if k.startswith("w/")}


def batch(name: str) -> tuple[Tensor, Tensor]:
    given = numbers("model_and_batches")
    return given[f"{name}/input_ids"].long(), given[f"{name}/labels"].long()


def tokens(labels_NL: Tensor) -> Tensor:
    """Labelled tokens of each sample, [N] in float64; the first label has no token before it."""
    return (labels_NL[:, 1:] != NO_LABEL).sum(1).double()


@cache
def backward(name: str) -> tuple[Tensor, Factors]:
    return Llama(weights()).factors(*batch(name))


def matrices() -> list[str]:
    return [str(name) for name in numbers("model_and_batches")["layer_names"]]


def share() -> Tensor:
    tokens_M = tokens(batch("train")[1])
    return tokens_M / tokens_M.sum()


def rows_map() -> Tensor:
    """map [R, N]: the rows M U_i / T and the target, of the merged batch's U."""
    train, val = tokens(batch("train")[1]), tokens(batch("val")[1])
    map_RN = torch.zeros(len(train) + 1, len(train) + len(val), dtype=torch.float64)
    map_RN[:-1, : len(train)] = len(train) / train.sum() * torch.eye(len(train))
    map_RN[-1, len(train) :] = 1 / val.sum()
    return map_RN


def out_of(name: str) -> int:
    return len(numbers("model_and_batches")[f"w/{name}.weight"])


def merged_gram(name: str) -> Tensor:
    """[R, R] of one matrix, the target in the same batch."""
    map_RN = rows_map()
    return map_RN @ per_sample.ghost_gram([backward("merged")[1][name]]).double() @ map_RN.t()


def separate_gram(name: str) -> Tensor:
    """[R, R] of one matrix, the target in a pass of its own."""
    val, general = backward("val")[1][name], [backward("train")[1][name]]
    target_OI = per_sample.gradients(*val, out_of(name)).sum(0) / tokens(batch("val")[1]).sum()
    unit = 8 / tokens(batch("train")[1]).sum()
    gram_RR = torch.empty(9, 9, dtype=torch.float64)
    gram_RR[:-1, :-1] = unit**2 * per_sample.ghost_gram(general)
    gram_RR[-1, :-1] = gram_RR[:-1, -1] = unit * per_sample.ghost_cross(general, target_OI)
    gram_RR[-1, -1] = (target_OI**2).sum()
    return gram_RR


def sketched_gram(name: str) -> Tensor:
    """[R, R] of one matrix's sketches; of the embedding's gradients."""
    if name == "model.embed_tokens":
        return merged_gram(name)
    given = numbers("compress16_projections")
    p_out, p_in = given[f"proj_out/{name}"].t(), given[f"proj_in/{name}"].t()
    identity = torch.equal(p_out, torch.eye(16))
    assert identity == (out_of(name) == 16)
    pair = backward("merged")[1][name]
    c_NK = per_sample.sketch([pair], None if identity else p_out, p_in)
    rows_RK = rows_map() @ c_NK.double()
    return rows_RK @ rows_RK.t()


GRAM_OF = {LAYERWISE: merged_gram, WHOLE_MODEL: separate_gram, SKETCHED: sketched_gram}


def grams(case: str) -> Tensor:
    """[B, R, R]: a block is a matrix, or the 16 together."""
    gram_BRR = torch.stack([GRAM_OF[case](name) for name in matrices()])
    return gram_BRR.sum(0, keepdim=True) if case == WHOLE_MODEL else gram_BRR


def coefficients(gram_BRR: Tensor, direction_BR: Tensor) -> Tensor:
    """What each sample's U is multiplied by, [B, M]: the rule `tokens`, in rows M U_i / T."""
    scale_B = norm_scale("tokens", gram_BRR, direction_BR, share())
    unit = 8 / tokens(batch("train")[1]).sum()
    return scale_B[:, None] * direction_BR[:, :-1] * unit


def topk(gram_BRR: Tensor) -> Tensor:
    """Half of the rows: coefficients of rows and target, [B, R]."""
    w_BM = TopK(0.5).weights(*split(gram_BRR)[:2])
    return torch.cat([w_BM, torch.zeros_like(w_BM[:, :1])], 1)


def gradient(name: str, general: Factors, a_M: Tensor, samples: int) -> Tensor:
    """sum_i a_i U_i of a parameter over the general samples of a batch."""
    x_LNI, dy = general[name]
    a_N = torch.cat([a_M, a_M.new_zeros(samples - len(a_M))])  # target samples: 0
    if "norm" in name:
        return torch.einsum("lnh,lnh,n->h", x_LNI, dy, a_N.float())
    if not dy.is_floating_point():
        dy = torch.nn.functional.one_hot(dy, out_of(name)).float()
    x_TI, dy_TO = per_sample.Weighted(x_LNI, dy, a_N, a_N.nonzero().flatten())
    return dy_TO.t() @ x_TI


def chosen_gradient(chosen_M: Tensor) -> dict[str, Tensor]:
    """By autograd: of the mean token loss on the chosen samples, as a batch of their own."""
    ids_NL, labels_NL = batch("train")
    ids_NL, labels_NL = ids_NL[chosen_M], labels_NL[chosen_M]
    model = Llama(weights())
    (model.loss(ids_NL, labels_NL) / tokens(labels_NL).sum()).backward()
    return {name.removesuffix(".weight"): w.grad for name, w in model.weights.items()}


def assert_close(got: Tensor, expected: Tensor, rtol: float = 1e-5) -> None:
    assert (got - expected).norm() <= rtol * expected.norm()


def test_scores_of_autograd() -> None:
    """Of the authors' oracle, in both ways to have the target."""
    given = numbers("model_and_batches")
    assert torch.equal(tokens(batch("train")[1]), given["tokens_train"].double())
    assert torch.equal(tokens(batch("val")[1]), given["tokens_val"].double())
    expected = given["oracle_layer_scores"]
    for gram_of_matrix in (merged_gram, separate_gram):
        got = torch.stack([gram_of_matrix(name)[:-1, -1] / 8 for name in matrices()])
        assert ((got - expected).abs().amax(1) <= 1e-5 * expected.abs().amax(1)).all()


@pytest.mark.parametrize("case", GRAM_OF)
def test_scores_and_choices(case: str) -> None:
    gram_BRR, given = grams(case), numbers(case)
    expected, score_BM = given["scores"].reshape(-1, 8), gram_BRR[:, :-1, -1] / 8
    assert ((score_BM - expected).abs().amax(1) <= 1e-5 * expected.abs().amax(1)).all()
    chosen_BM = topk(gram_BRR)[:, :-1] > 0
    assert torch.equal(chosen_BM, given["selected"].reshape(-1, 8))


def test_sketches_choose_otherwise() -> None:
    """So that a test that sketches do as they should cannot pass by exact products."""
    assert (numbers(SKETCHED)["selected"] != numbers(LAYERWISE)["selected"]).any(1).sum() >= 4


@pytest.mark.parametrize("case", GRAM_OF)
def test_loss(case: str) -> None:
    name = "train" if case == WHOLE_MODEL else "merged"
    loss = backward(name)[0] / tokens(batch(name)[1]).sum()
    assert_close(loss, numbers(case)["loss"], 1e-6)


@pytest.mark.parametrize("case", GRAM_OF)
def test_gradients(case: str) -> None:
    """Of every parameter: theirs, but for the norms of a whole model's selection."""
    gram_BRR, given = grams(case), numbers(case)
    a_BM = coefficients(gram_BRR, topk(gram_BRR)).expand(16, 8)
    name = "train" if case == WHOLE_MODEL else "merged"
    general = backward(name)[1]
    samples = len(batch(name)[0])
    every_M = torch.full((8,), 1 / tokens(batch("train")[1]).sum().item(), dtype=torch.float64)
    assert len(general) == 21 == sum(key.startswith("grad/") for key in given)
    for block, matrix in enumerate(matrices()):
        got = gradient(matrix, general, a_BM[block], samples)
        assert_close(got, given[f"grad/{matrix}.weight"])
    for norm in (n for n in general if "norm" in n):
        assert_close(gradient(norm, general, every_M, samples), given[f"grad/{norm}.weight"])


def test_norms_follow_a_selection_of_the_whole_model() -> None:
    """All 21 parameters have the gradient of the mean token loss on the chosen samples."""
    gram_BRR = grams(WHOLE_MODEL)
    a_M = coefficients(gram_BRR, topk(gram_BRR))[0]
    expected = chosen_gradient(numbers(WHOLE_MODEL)["selected"])
    for name, of_chosen in expected.items():
        got = gradient(name, backward("train")[1], a_M, 8)
        assert_close(got, of_chosen)
        if "norm" in name:
            theirs = numbers(WHOLE_MODEL)[f"grad/{name}.weight"]
            assert (got - theirs).norm() > 0.1 * theirs.norm()


def test_second_order_terms_do_not_depend_on_where_the_target_is() -> None:
    """Rows and target are in one unit in a merged batch too; theirs are not."""
    merged = torch.stack([merged_gram(name) for name in matrices()])
    separate = torch.stack([separate_gram(name) for name in matrices()])
    for m, s in zip(merged, separate, strict=True):
        assert_close(m, s)
        assert_close(m[:-1, :-1], s[:-1, :-1])
    picks = [Greedy(0.5).weights(*split(gram)[:2]) for gram in (merged, separate)]
    assert torch.equal(*picks)
    assert not torch.equal(picks[0] > 0, topk(merged)[:, :-1] > 0)  # the terms matter


def test_nothing_chosen_is_no_update() -> None:
    """All rows against the target: weights, scale and so all gradients are zero, norms' too."""
    gram_BRR = grams(WHOLE_MODEL)
    gram_BRR[:, -1, :-1] = gram_BRR[:, :-1, -1] = -gram_BRR[:, :-1, -1].abs()
    w_BM = Filter(1.0).weights(*split(gram_BRR)[:2])
    a_M = coefficients(gram_BRR, torch.cat([w_BM, torch.zeros_like(w_BM[:, :1])], 1))[0]
    for name in backward("train")[1]:
        assert torch.equal(a_M, torch.zeros(8).double())
        assert not gradient(name, backward("train")[1], a_M, 8).any()
