import dataclasses

import pytest

from neo.models.architectures import ARCHITECTURES
from neo.models.variants import lora
from neo.training.meet import meet
from neo.training.offline import OfflineStudent

# Known of each model: Llama 3 and DeepSeek's from their weights' index, the others from the sizes
# of their files; of the two shortened ones the 8B's embedding and head and as many of its layers.
KNOWN = {
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.2-1B-Instruct": 1_235_814_400,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": 8_030_261_248,
    "nvidia/Llama-3.1-Minitron-4B-Depth-Base": 4_540_469_248,
    "llama3_1_4_layers": 1_923_125_248,
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "meta-llama/Llama-2-7b-chat-hf": 6_738_415_616,
    "TinyLlama/TinyLlama_v1.1": 1_100_048_384,
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": 1_100_048_384,
}


def layer_shapes(config):
    """(in, out) of q, k, v, o, gate, up and down of one layer."""
    d, wide = config.hidden_size, config.intermediate_size
    kv = d // config.num_attention_heads * config.num_key_value_heads
    return [(d, d), (d, kv), (d, kv), (d, d), (d, wide), (d, wide), (wide, d)]


def built_once():
    """One name of each architecture."""
    return list({id(shape): name for name, shape in ARCHITECTURES.items()}.values())


def test_every_model_of_the_paper_is_known():
    assert {name: shape.num_parameters for name, shape in ARCHITECTURES.items()} == KNOWN


@pytest.mark.parametrize("name", built_once())
def test_a_model_built_without_weights_has_the_parameters_it_is_known_by(name):
    model = OfflineStudent(path=name).meta()
    assert {p.device.type for p in model.parameters()} == {"meta"}
    config = model.config
    d, tied = config.hidden_size, config.tie_word_embeddings
    embeddings = config.vocab_size * d * (1 if tied else 2)
    layer = sum(a * b for a, b in layer_shapes(config)) + 2 * d
    by_hand = embeddings + config.num_hidden_layers * layer + d
    assert sum(p.numel() for p in model.parameters()) == by_hand == KNOWN[name]


@pytest.mark.parametrize("name", ["meta-llama/Llama-3.2-1B", "TinyLlama/TinyLlama_v1.1"])
@pytest.mark.parametrize("r", [64, 128])
def test_a_branch_trains_rank_times_inputs_and_outputs_of_every_linear_layer(name, r):
    student = OfflineStudent(path=name)
    meeting = meet(student, None, lora(r=r, target_modules="all-linear"), 2048, tokenizers=False)
    config = student.config()
    each = r * sum(a + b for a, b in layer_shapes(config))
    assert meeting.num_trainable_parameters == config.num_hidden_layers * each
    assert meeting.num_base_parameters == KNOWN[name]
    assert meeting.num_parameters == KNOWN[name] + meeting.num_trainable_parameters
    if name.startswith("meta-llama"):  # 45.1 M and 90.2 M, as the authors' settings give
        assert meeting.num_trainable_parameters == {64: 45_088_768, 128: 90_177_536}[r]


def test_a_configuration_may_be_changed_without_changing_the_architecture():
    shape = ARCHITECTURES["meta-llama/Llama-3.2-1B"]
    shape.config().num_hidden_layers = 1
    shape.config().rope_parameters["factor"] = 1.0
    assert shape.config().num_hidden_layers == 16
    assert shape.config().rope_parameters["factor"] == 32.0
    with pytest.raises(dataclasses.FrozenInstanceError):
        shape.num_parameters = 1
