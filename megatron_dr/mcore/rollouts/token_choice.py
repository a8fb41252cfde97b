"""Choosing a token: a counter-based draw and the inverse of the cumulative distribution."""

import numpy
import torch

TIE = 1e-5  # logits, or relative probabilities, this close count as equal


def uniform(seed: int, prompt: int, position: int) -> float:
    """The draw in [0, 1) for a completion's token `position`: a function of its arguments alone.

    Philox (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) maps a key and a
    counter to random bits, so a token's draw depends neither on the batch nor on the rank.
    """
    # as lists, numpy may round large words to float64
    key = numpy.array([seed, prompt], dtype=numpy.uint64)
    counter = numpy.array([0, 0, 0, position], dtype=numpy.uint64)
    return float(numpy.random.Generator(numpy.random.Philox(key=key, counter=counter)).random())


def choose(
    logits: torch.Tensor, draws: torch.Tensor, temperature: float, top_p: float, top_k: int = 0
) -> torch.Tensor:
    """Token ids [b] for logits [b, v] and draws [b] in [0, 1).

    Temperature 0 takes the best token: of those within TIE of the maximum, the lowest id.
    Otherwise token k is taken where C_{k-1} <= u < C_k for the cumulative probabilities C of
    softmax(logits / temperature), after top-k and then top-p, in float64 and in the order of ids.

    A different layout of the model changes logits by rounding, about 1e-6. The token then changes
    only if the draw lies within that distance of a C_k, so about once in a million tokens; equal
    logits and probabilities are treated alike by TIE and don't depend on rounding.
    """
    if temperature == 0.0:
        best = logits.max(-1, keepdim=True).values
        return (logits >= best - TIE).int().argmax(-1)
    likeliest = _likeliest(torch.softmax(logits.double() / temperature, -1), top_k)
    weights = _nucleus(likeliest, top_p)
    cumulative = weights.cumsum(-1)
    total = cumulative[:, -1]
    point = torch.minimum(draws.double() * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, point[:, None], right=True).squeeze(-1)


def _likeliest(probabilities: torch.Tensor, top_k: int) -> torch.Tensor:
    """Probabilities [b, v], 0 but for the top_k largest, which sum to 1; all with 0.

    Tokens as likely as the last one of them belong to them.
    """
    if not 0 < top_k < probabilities.shape[-1]:
        return probabilities
    smallest = probabilities.topk(top_k, -1).values[:, -1:]
    kept = probabilities.masked_fill(probabilities < smallest * (1 - TIE), 0.0)
    return kept / kept.sum(-1, keepdim=True)


def _nucleus(probabilities: torch.Tensor, top_p: float) -> torch.Tensor:
    """Probabilities [b, v], 0 outside the smallest set of likeliest tokens with sum >= top_p.

    Tokens as likely as the last one of the set belong to it.
    """
    if top_p >= 1.0:
        return probabilities
    ranked = probabilities.sort(-1, descending=True).values
    before = ranked.cumsum(-1) - ranked
    smallest = ranked.masked_fill(before >= top_p, torch.inf).min(-1, keepdim=True).values
    return probabilities.masked_fill(probabilities < smallest * (1 - TIE), 0.0)
