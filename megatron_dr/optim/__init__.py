"""Optimizers with their moments in a compressed space. Imports torch and `projection` alone."""

from megatron_dr.optim.forms import MesoAdamW, MesoSGD
from megatron_dr.optim.meso import Meso, Shard
from megatron_dr.optim.subspaces import Subspaces

__all__ = ["Meso", "MesoAdamW", "MesoSGD", "Shard", "Subspaces"]
