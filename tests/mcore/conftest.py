"""Megatron is imported once, here; tests fork their ranks from this process."""

import warnings

warnings.filterwarnings("ignore", module="megatron")

from megatron_dr.mcore import cpu  # noqa: E402

cpu.enable()

import torch  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402, F401

torch.set_num_threads(1)
