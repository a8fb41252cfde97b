"""A Llama in a page, in fp32, which leaves the factors of every weight's gradient.

Rotary positions over a head's halves, grouped key-value heads, RMSNorm, SiLU gates. No mask but
the causal one is needed: padding is on the right and has no label, so that no labelled token
sees it and its own rows of dY are zero.

Shape suffixes: L tokens of a sample, N samples, H hidden, A heads, D a head's length, V vocabulary.
"""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear, scaled_dot_product_attention, silu

HEADS, HEAD = 4, 8
EPSILON, THETA = 1e-6, 1e4
NO_LABEL = -100

Factors = dict[str, tuple[Tensor, Tensor]]


class Llama:
    """The sum of a batch's token losses, and what its backward leaves.

    Args:
        weights: by Hugging Face's names.
    """

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self.weights = weights
        self.layers = 1 + max(int(name.split(".")[2]) for name in weights if ".layers." in name)
        self._factors: Factors = {}

    def factors(self, ids_NL: Tensor, labels_NL: Tensor) -> tuple[Tensor, Factors]:
        """Summed loss, and by parameter (x, dy) of the pairs [L, N, .] of a matrix, (x, index)
        of the embedding, and of a norm its normalised input and its output's gradient."""
        self._factors = {}
        loss = self.loss(ids_NL, labels_NL)
        loss.backward()
        return loss.detach(), self._factors

    def loss(self, ids_NL: Tensor, labels_NL: Tensor) -> Tensor:
        x_NLH = self._embedding("model.embed_tokens", ids_NL)
        for n in range(self.layers):
            at = f"model.layers.{n}"
            x_NLH = x_NLH + self._attention(
                f"{at}.self_attn", self._norm(f"{at}.input_layernorm", x_NLH)
            )
            x_NLH = x_NLH + self._mlp(
                f"{at}.mlp", self._norm(f"{at}.post_attention_layernorm", x_NLH)
            )
        logits_NLV = self._linear("lm_head", self._norm("model.norm", x_NLH))
        return cross_entropy(
            logits_NLV[:, :-1].flatten(0, 1),
            labels_NL[:, 1:].flatten(),
            ignore_index=NO_LABEL,
            reduction="sum",
        )

    def _attention(self, at: str, x_NLH: Tensor) -> Tensor:
        q, k, v = (
            self._linear(f"{at}.{name}_proj", x_NLH).unflatten(2, (-1, HEAD)).transpose(1, 2)
            for name in "qkv"
        )
        k, v = (t.repeat_interleave(HEADS // t.shape[1], dim=1) for t in (k, v))
        y_NALD = scaled_dot_product_attention(_rotated(q), _rotated(k), v, is_causal=True)
        return self._linear(f"{at}.o_proj", y_NALD.transpose(1, 2).flatten(2))

    def _mlp(self, at: str, x_NLH: Tensor) -> Tensor:
        gate, up = (self._linear(f"{at}.{name}_proj", x_NLH) for name in ("gate", "up"))
        return self._linear(f"{at}.down_proj", silu(gate) * up)

    def _linear(self, at: str, x: Tensor) -> Tensor:
        return self._kept(at, x, linear(x, self.weights[f"{at}.weight"]))

    def _norm(self, at: str, x_NLH: Tensor) -> Tensor:
        unit = x_NLH * (x_NLH.square().mean(2, keepdim=True) + EPSILON).rsqrt()
        return self._kept(at, unit, unit * self.weights[f"{at}.weight"])

    def _kept(self, at: str, x: Tensor, y: Tensor) -> Tensor:
        def keep(dy: Tensor) -> None:
            self._factors[at] = (x.detach().transpose(0, 1), dy.transpose(0, 1))

        if y.requires_grad:
            y.register_hook(keep)
        return y

    def _embedding(self, at: str, ids_NL: Tensor) -> Tensor:
        def keep(x: Tensor) -> None:
            self._factors[at] = (x.transpose(0, 1), ids_NL.t())

        y_NLH = self.weights[f"{at}.weight"][ids_NL]
        if y_NLH.requires_grad:
            y_NLH.register_hook(keep)
        return y_NLH


def _rotated(x_NALD: Tensor) -> Tensor:
    """Dimension d and d + D/2 turned together, by position * theta^(-2d/D)."""
    half = HEAD // 2
    frequency_D = THETA ** -(torch.arange(half) / half)
    angle_LD = torch.arange(x_NALD.shape[2])[:, None] * frequency_D
    cos, sin = angle_LD.cos(), angle_LD.sin()
    first, second = x_NALD[..., :half], x_NALD[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
