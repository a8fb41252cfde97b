"""Megatron, its training loop and its tokenizer are imported once, here: tests fork their ranks
from this process, and each rank would spend longer on importing them than on most tests."""

import gc
import warnings

warnings.filterwarnings("ignore", module="megatron")

from megatron_dr.mcore import cpu  # noqa: E402

cpu.enable()

import torch  # noqa: E402
import transformers  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402, F401
from megatron.core.tokenizers.text.libraries import huggingface_tokenizer  # noqa: E402, F401

from megatron_dr.mcore.compat import versions  # noqa: E402

if versions.INSTALLED >= versions.OLDEST_LOOP:
    from megatron_dr.mcore.loop import adaptor  # noqa: F401

transformers.AutoTokenizer, transformers.PreTrainedTokenizerFast  # noqa: B018 - imported when named

torch.set_num_threads(1)

# else a rank's collector writes to, and so copies, every page that it shares with this process
gc.collect()
gc.freeze()
