"""The paper's models as numbers: what of them can be known without their weights or the hub.

The numbers are those of each model's published `config.json`, as `transformers.LlamaConfig` takes
them. Of the weights they say the shapes, so that a model can be built on the meta device and its
parameters counted.
"""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from transformers import LlamaConfig


@dataclass(frozen=True)
class Architecture:
    """A Llama without weights.

    Args:
        keys: Of `LlamaConfig`.
        num_parameters: That the model is known to have, tied weights once.
    """

    keys: Mapping[str, Any]
    num_parameters: int

    def config(self) -> LlamaConfig:
        """A configuration of its own, which the caller may change."""
        return LlamaConfig(**deepcopy(dict(self.keys)))


_ROPE_3 = {
    "rope_type": "llama3", "rope_theta": 500_000.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
}  # fmt: skip
_LLAMA_3: dict[str, Any] = {
    "vocab_size": 128_256, "num_attention_heads": 32, "num_key_value_heads": 8,
    "max_position_embeddings": 131_072, "rms_norm_eps": 1e-5,
    "bos_token_id": 128_000, "eos_token_id": 128_001,
}  # fmt: skip
_LLAMA_3_2_1B = _LLAMA_3 | {
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64,
    "tie_word_embeddings": True, "rope_parameters": _ROPE_3 | {"factor": 32.0},
}  # fmt: skip
_LLAMA_3_1_8B = _LLAMA_3 | {
    "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32, "head_dim": 128,
    "tie_word_embeddings": False, "rope_parameters": _ROPE_3 | {"factor": 8.0},
}  # fmt: skip
_LLAMA_2: dict[str, Any] = {
    "vocab_size": 32_000, "num_attention_heads": 32, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
}  # fmt: skip
_LLAMA_2_7B = _LLAMA_2 | {
    "hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32,
    "num_key_value_heads": 32, "max_position_embeddings": 4096,
}  # fmt: skip
_TINYLLAMA = _LLAMA_2 | {
    "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
    "num_key_value_heads": 4, "max_position_embeddings": 2048,
}  # fmt: skip

_1B = Architecture(_LLAMA_3_2_1B, 1_235_814_400)
_8B = Architecture(_LLAMA_3_1_8B, 8_030_261_248)
_7B = Architecture(_LLAMA_2_7B, 6_738_415_616)
_TINY = Architecture(_TINYLLAMA, 1_100_048_384)

# By the name on the hub. The pruned student is on none as a base: Llama-3.1-8B with four of its
# layers, inferred from the size of the weights that its authors released.
ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        "meta-llama/Llama-3.2-1B": _1B,
        "meta-llama/Llama-3.2-1B-Instruct": _1B,
        "meta-llama/Llama-3.1-8B": _8B,
        "meta-llama/Llama-3.1-8B-Instruct": _8B,
        "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": _8B,
        "nvidia/Llama-3.1-Minitron-4B-Depth-Base": Architecture(
            _LLAMA_3_1_8B | {"num_hidden_layers": 16}, 4_540_469_248
        ),
        "llama3_1_4_layers": Architecture(_LLAMA_3_1_8B | {"num_hidden_layers": 4}, 1_923_125_248),
        "meta-llama/Llama-2-7b-hf": _7B,
        "meta-llama/Llama-2-7b-chat-hf": _7B,
        "TinyLlama/TinyLlama_v1.1": _TINY,
        "TinyLlama/TinyLlama-1.1B-Chat-v1.0": _TINY,
    }
)
