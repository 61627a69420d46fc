import pytest
import torch
from lab import tiny_model
from peft import LoraConfig, VeraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    CohereConfig,
    FalconH1Config,
    Gemma2Config,
    Gemma3TextConfig,
    GPTJConfig,
    GraniteConfig,
    GraniteMoeConfig,
    HyperCLOVAXConfig,
    InklingTextConfig,
    LlamaConfig,
    MiniCPM3Config,
    NanoChatConfig,
    PhiConfig,
    RecurrentGemmaConfig,
    xLSTMConfig,
)  # fmt: skip

from neo.models import head as head_module
from neo.models.causal_lm import CausalLM
from neo.models.head import head_of
from neo.models.hidden import check_head, check_packing, hidden_states

IDS = torch.arange(4, 13)[None]
POSITIONS = torch.arange(9)[None]

# config, what differs from the others, and what it does to its logits: factor, cap, whether a bias
FAMILIES = {
    "llama": (LlamaConfig, {}, (1.0, None, False)),
    "phi": (PhiConfig, {}, (1.0, None, True)),
    "gptj": (GPTJConfig, {"n_embd": 32, "n_head": 4, "n_layer": 2, "rotary_dim": 4},
             (1.0, None, True)),
    "cohere": (CohereConfig, {"logit_scale": 0.0625}, (0.0625, None, False)),
    "cohere2": (Cohere2Config, {"logit_scale": 0.25}, (0.25, None, False)),
    "granite": (GraniteConfig, {"logits_scaling": 8.0}, (0.125, None, False)),
    "granitemoe": (GraniteMoeConfig, {"logits_scaling": 4.0}, (0.25, None, False)),
    "hyperclovax": (HyperCLOVAXConfig, {"logits_scaling": 4.0}, (4.0, None, False)),
    "falcon_h1": (FalconH1Config, {"lm_head_multiplier": 0.25, "mamba_d_ssm": 32,
                                   "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8},
                  (0.25, None, False)),
    "minicpm3": (MiniCPM3Config, {"dim_model_base": 8, "q_lora_rank": 8, "kv_lora_rank": 8,
                                  "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
                                  "num_key_value_heads": 4}, (0.25, None, False)),
    "inkling": (InklingTextConfig, {"logits_mup_width_multiplier": 5.0}, (0.2, None, False)),
    "gemma2": (Gemma2Config, {"head_dim": 8, "final_logit_softcapping": 30.0},
               (1.0, 30.0, False)),
    "gemma3": (Gemma3TextConfig, {"head_dim": 8, "final_logit_softcapping": 0.5},
               (1.0, 0.5, False)),
    "nanochat": (NanoChatConfig, {"final_logit_softcapping": 15.0}, (1.0, 15.0, False)),
    "recurrent_gemma": (RecurrentGemmaConfig, {"logits_soft_cap": 30.0, "lru_width": 32,
                                               "attention_window_size": 16,
                                               "block_types": ["recurrent", "attention"]},
                        (1.0, 30.0, False)),
    "xlstm": (xLSTMConfig, {"output_logit_soft_cap": 0.5, "num_heads": 4, "num_blocks": 2},
              (1.0, 0.5, False)),
}  # fmt: skip


def build(family, seed=0, **keys):
    config, extra, _ = FAMILIES[family]
    built = config(
        **{
            "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
            "initializer_range": 0.2, "tie_word_embeddings": False, "pad_token_id": 0,
            "bos_token_id": 1, "eos_token_id": 2, **extra, **keys,
        }
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(built).eval()
        bias = model.get_output_embeddings().bias
        if bias is not None:
            nn.init.normal_(bias)
    return model


@torch.no_grad()
def logits_of(model):
    head = head_of(model)
    return head.bounded(head.products(hidden_states(model, IDS, POSITIONS)))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_made_of_hidden_states_are_the_models_own(family):
    model = build(family)
    check_head(model)
    with torch.no_grad():
        expected = model(input_ids=IDS, position_ids=POSITIONS, use_cache=False).logits
    torch.testing.assert_close(logits_of(model), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_family_does_to_its_logits_is_read_from_its_config(family):
    head = head_of(build(family))
    scale, softcap, bias = FAMILIES[family][2]
    assert head.logit_scale == pytest.approx(scale)
    assert head.softcap == softcap
    assert (head.bias is not None) == bias


@pytest.mark.parametrize(
    ("known", "family"),
    [
        ("FACTORS", "cohere"),
        ("FACTORS", "falcon_h1"),
        ("DIVISORS", "granite"),
        ("DIVISORS", "minicpm3"),
        ("SOFTCAPS", "recurrent_gemma"),
        ("SOFTCAPS", "gemma2"),
    ],
)
def test_a_model_whose_key_is_not_known_is_refused(known, family, monkeypatch):
    # small weights: without enlarging them, a cap of 30 would not show
    model = build(family, initializer_range=0.02)
    monkeypatch.setattr(head_module, known, ())
    with pytest.raises(ValueError, match="does more to its logits than"):
        check_head(model)


def test_a_factor_taken_for_a_divisor_is_refused(monkeypatch):
    monkeypatch.setattr(head_module, "MULTIPLIES_BY", {})
    with pytest.raises(ValueError, match="HyperCLOVAXForCausalLM does more to its logits"):
        check_head(build("hyperclovax"))


def test_checking_a_head_leaves_no_trace_in_the_model():
    model = build("gemma2")
    before = logits_of(model)
    check_head(model)
    torch.testing.assert_close(logits_of(model), before, rtol=0, atol=0)
    assert not model.get_output_embeddings()._forward_hooks


ADAPTED = {
    "plain": {"r": 3, "lora_alpha": 5},
    "rslora": {"r": 4, "lora_alpha": 5, "use_rslora": True},
    "ranks": {"r": 4, "rank_pattern": {"lm_head": 2}, "alpha_pattern": {"lm_head": 7}},
}


@pytest.mark.parametrize("family", ["llama", "phi", "granite", "gemma2"])
@pytest.mark.parametrize("keys", ADAPTED.values(), ids=ADAPTED)
def test_a_branch_on_the_head_gives_pefts_logits(family, keys):
    model = build(family)
    config = LoraConfig(target_modules=["q_proj", "lm_head"], init_lora_weights=False, **keys)
    student = get_peft_model(model, config).eval()
    with torch.no_grad():
        expected = student(input_ids=IDS, position_ids=POSITIONS, use_cache=False).logits
    torch.testing.assert_close(logits_of(model), expected)
    head = head_of(model)
    assert head.lora is not None
    assert head.lora.up.requires_grad
    assert not head.weight.requires_grad


def test_a_branch_is_computed_in_its_own_dtype_beside_a_head_of_another():
    model = build("llama").to(torch.bfloat16)
    student = get_peft_model(model, LoraConfig(target_modules=["lm_head"], init_lora_weights=False))
    lora = head_of(model).lora
    hidden = torch.randn(5, 32, dtype=torch.bfloat16)
    assert lora.states(hidden).dtype == lora.up.dtype == torch.float32
    with torch.no_grad():
        branch = lora.states(hidden) @ lora.up.T
        expected = student.base_model.model.lm_head(hidden)
        plain = student.base_model.model.lm_head.base_layer(hidden)
    torch.testing.assert_close((plain + branch).to(torch.bfloat16), expected)


def test_a_trained_copy_is_the_head():
    model = build("llama")
    get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    copy = model.lm_head.modules_to_save["default"]
    assert head_of(model).weight is copy.weight
    assert copy.weight.requires_grad
    assert head_of(model).weight is not model.lm_head.original_module.weight


def attached(**keys):
    model = build("llama")
    return model, get_peft_model(model, LoraConfig(**{"target_modules": ["lm_head"], **keys}))


def dora():
    return attached(use_dora=True)[0]


def branch_with_bias():
    model = build("phi")
    get_peft_model(model, LoraConfig(target_modules=["lm_head"], lora_bias=True))
    return model


def two_adapters():
    model, student = attached()
    student.add_adapter("other", LoraConfig(target_modules=["lm_head"]))
    student.base_model.set_adapter(["default", "other"])
    return model


def merged():
    model, student = attached()
    student.merge_adapter()
    return model


def switched_off():
    model, student = attached()
    student.base_model.disable_adapter_layers()
    return model


def copy_switched_off():
    model, student = attached(target_modules=["q_proj"], modules_to_save=["lm_head"])
    student.base_model.disable_adapter_layers()
    return model


def another_tuner():
    model = build("llama")
    get_peft_model(model, VeraConfig(target_modules=["lm_head"]))
    return model


def trained_tokens():
    model = build("llama", tie_word_embeddings=True)
    get_peft_model(model, LoraConfig(target_modules=["q_proj"], trainable_token_indices=[5]))
    return model


def layers():
    model = build("llama")
    model.lm_head = nn.Sequential(nn.Linear(32, 64))
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (dora, "has a LoRA branch of the variant Dora"),
        (branch_with_bias, r"has a LoRA branch with a bias of its own \(lora.lora_bias=true\)"),
        (two_adapters, r"has 2 active adapters \(default, other\)"),
        (merged, "has a LoRA branch that is merged into it"),
        (switched_off, "has a LoRA branch that is switched off"),
        (copy_switched_off, "has a trained copy that is switched off"),
        (another_tuner, "is a peft.tuners.vera.layer.Linear"),
        (trained_tokens, "is a peft.utils.other.TrainableTokensWrapper"),
        (layers, "is a torch.nn.modules.container.Sequential"),
    ],
)
def test_any_other_head_is_refused_by_what_it_is_and_what_would_be_legal(make, message):
    model = make()
    with pytest.raises(ValueError, match=f"the head of .*ForCausalLM {message}; legal are a plain"):
        head_of(model)


@pytest.mark.filterwarnings("ignore:Model (has|with) `tie_word_embeddings=True`")
@pytest.mark.parametrize(
    "keys",
    [
        {"target_modules": ["lm_head"]},
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["lm_head"], "ensure_weight_tying": True},
    ],
    ids=["head", "embedding", "both"],
)
def test_a_branch_on_a_tied_weight_which_peft_would_merge_into_both_layers_is_refused(keys):
    model = build("llama", tie_word_embeddings=True)
    student = get_peft_model(model, LoraConfig(init_lora_weights=False, **keys)).eval()
    with pytest.raises(ValueError, match="is tied to its embedding, and a branch on either"):
        head_of(model)
    with torch.no_grad():
        adapted = student(input_ids=IDS).logits
        merged = student.merge_and_unload()(input_ids=IDS).logits
    assert (merged - adapted).abs().max() > 0.1  # where this fails, PEFT has learned it


@pytest.mark.filterwarnings("ignore:Model (has|with) `tie_word_embeddings=True`")
@pytest.mark.parametrize("saved", [["lm_head"], ["embed_tokens"]])
@pytest.mark.parametrize("tying", [False, True])
def test_a_trained_copy_of_a_tied_weight_gives_pefts_logits_and_merges(saved, tying):
    model = build("llama", tie_word_embeddings=True)
    config = LoraConfig(
        target_modules=["q_proj"], modules_to_save=saved, ensure_weight_tying=tying,
        init_lora_weights=False,
    )  # fmt: skip
    student = get_peft_model(model, config).eval()
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
        expected = student(input_ids=IDS, position_ids=POSITIONS, use_cache=False).logits
        torch.testing.assert_close(logits_of(model), expected)
        if not tying:
            with pytest.warns(UserWarning, match="no longer tied after merging"):
                merged = student.merge_and_unload()
        else:
            merged = student.merge_and_unload()
        torch.testing.assert_close(merged(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_branch_on_the_embedding_of_an_untied_model_leaves_the_head_alone(student_dir):
    model = CausalLM(path=str(student_dir)).load(torch.device("cpu"), trained=False)
    get_peft_model(model, LoraConfig(target_modules=["embed_tokens"]))
    assert head_of(model).weight is model.lm_head.weight
    assert head_of(model).lora is None


def test_heads_are_told_apart_without_weights(tmp_path):
    folder = tiny_model(tmp_path / "model")
    meta = CausalLM(path=str(folder)).meta()
    with torch.device("meta"):
        get_peft_model(meta, LoraConfig(target_modules=["lm_head"]))
    assert head_of(meta).lora.up.is_meta


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_that_carries_state_between_packed_examples_is_refused(family):
    model = build(family, attention_dropout=0.5 if family == "llama" else 0.0).train()
    if family in ("falcon_h1", "inkling", "recurrent_gemma", "xlstm"):
        with pytest.raises(
            ValueError, match=r"data\.packing=true: .* carries state from one packed"
        ):
            check_packing(model)
    else:
        check_packing(model)
    assert model.training
