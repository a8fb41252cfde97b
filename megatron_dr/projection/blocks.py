"""Which parameters are projected together: a partition of parameter names into blocks.

The value head of PPO is a block that is not projected: it is no direction of the policy, the
target's loss does not see it, and it always gets the rows' mean.
"""

import re

UNPROJECTED = "value_head"
_LAYER = re.compile(r".*?\blayers\.\d+(?=\.)")


def block_of(name: str, kind: str) -> str:
    """The block of a parameter.

    :param name: the global name, such as `decoder.layers.3.self_attention.linear_qkv.weight`.
    :param kind: `model`: one block. `layer`: `decoder.layers.3`; outside the layers the module,
        named by at most two components (`embedding.word_embeddings`, `output_layer`).
        `matrix`: every parameter is a block of its own. `UNPROJECTED` is one with every kind.
    """
    if name.split(".")[0] == UNPROJECTED:
        return UNPROJECTED
    if kind == "model":
        return "model"
    if kind == "matrix":
        return name
    if kind == "layer":
        layer = _LAYER.match(name)
        return layer.group() if layer else ".".join(name.split(".")[:-1][:2]) or name
    raise ValueError(f"block kind is {kind!r}; it must be 'model', 'layer' or 'matrix'.")
