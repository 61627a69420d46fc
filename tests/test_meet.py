import pytest
from lab import tiny_model, tokenizer, write_rows

from neo.config import ConfigError
from neo.data.stream import FileData
from neo.models.causal_lm import CausalLM
from neo.models.student import build_student, trained_parameters
from neo.models.tokenizers import num_token_ids
from neo.models.variants import lora, none
from neo.teachers.online import OnlineTeacher
from neo.training.meet import meet, meet_all
from neo.training.optim import AdamW


def specs(student, teacher):
    return CausalLM(path=str(student)), OnlineTeacher(path=str(teacher))


def test_counts_before_loading_are_the_counts_after(student_dir, teacher_dir, tmp_path):
    import torch

    tied = tiny_model(tmp_path / "tied", tie=True)
    for folder in (student_dir, tied):
        for variant in (lora(r=3), none()):
            student, teacher = specs(folder, teacher_dir)
            meeting = meet(student, teacher, variant, 64)
            real = build_student(student, variant, torch.device("cpu"), 0)
            assert meeting.num_parameters == sum(p.numel() for p in real.parameters())
            trained = trained_parameters(real)
            assert meeting.trained_tensors == {n: tuple(p.shape) for n, p in trained.items()}
            assert meeting.num_trainable_parameters == sum(p.numel() for p in trained.values())
            loaded = teacher.load(torch.device("cpu"), trained=False)
            assert meeting.num_teacher_parameters == loaded.num_parameters()


@pytest.mark.parametrize(("r", "trained"), [(64, 45_088_768), (128, 90_177_536)])
def test_llama_3_2_1b_has_the_sizes_of_the_paper(llama_1b, r, trained):
    # r * (in + out) over q, k, v, o, gate, up, down of 16 layers, as on the model's card
    shapes = [(2048, 2048), (2048, 512), (2048, 512), (2048, 2048), (2048, 8192), (2048, 8192),
              (8192, 2048)]  # fmt: skip
    assert 16 * r * sum(map(sum, shapes)) == trained
    meeting = meet(llama_1b, None, lora(r=r, target_modules="all-linear"), 2048)
    assert meeting.num_trainable_parameters == trained
    assert meeting.num_parameters - trained == 1_235_814_400
    assert meeting.num_teacher_parameters == 0


def test_heads_padded_to_different_sizes_meet_over_the_tokenizers_ids(tmp_path, student_dir):
    ids = num_token_ids(tokenizer())
    student = tiny_model(tmp_path / "student", rows=ids + 5)
    teacher = tiny_model(tmp_path / "teacher", hidden=48, rows=ids + 69)
    meeting = meet(*specs(student, teacher), lora(r=2), 64)
    assert meeting.vocab == ids
    assert meeting.notes == [
        f"the student's head has {ids + 5} rows, of which the first {ids} are used",
        f"the teacher's head has {ids + 69} rows, of which the first {ids} are used",
    ]
    assert meet(*specs(student_dir, student_dir), lora(r=2), 64).notes == []


def test_a_head_smaller_than_the_tokenizer_is_refused(tmp_path, student_dir):
    small = tiny_model(tmp_path / "small", rows=300)
    with pytest.raises(ConfigError, match=r"teacher.path=.*its head has 300 rows, the student's"):
        meet(*specs(student_dir, small), lora(r=2), 64)
    with pytest.raises(ConfigError, match=r"student.path=.*its head has 300 rows"):
        meet(*specs(small, student_dir), lora(r=2), 64)


def test_tokenizers_that_differ_meet_where_that_is_allowed_and_it_is_noted(tmp_path, student_dir):
    other = tiny_model(tmp_path / "other")
    changed = OnlineTeacher(path=str(other)).tokenizer()
    changed.eos_token = "<|im_start|>"
    changed.save_pretrained(other)
    student, teacher = specs(student_dir, other)
    with pytest.raises(ConfigError, match=r"tokenizers of student and teacher differ: eos_token"):
        meet(student, teacher, lora(r=2), 64)
    allowed = OnlineTeacher(path=str(other), allow_tokenizer_differences=True)
    (note,) = meet(student, allowed, lora(r=2), 64).notes
    assert note.startswith("the tokenizers of student and teacher differ: eos_token is")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"use_dora": True}, "has a LoRA branch of the variant Dora; legal are a plain torch"),
        ({"lora_bias": True}, "has a LoRA branch with a bias of its own"),
    ],
)
@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
def test_an_adapter_on_the_head_whose_gradient_is_not_known_is_refused(student_dir, keys, message):
    student = CausalLM(path=str(student_dir))
    variant = lora(r=2, target_modules=["q_proj", "lm_head"], **keys)
    with pytest.raises(ConfigError, match=f" lora: the head of LlamaForCausalLM {message}"):
        meet(student, None, variant, 64)
    meet(student, None, lora(r=2, target_modules=["q_proj"], use_dora=True), 64)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_a_branch_on_a_tied_weight_is_refused(tmp_path, target):
    student = CausalLM(path=str(tiny_model(tmp_path / "tied", tie=True)))
    with pytest.raises(ConfigError, match=r" lora: the head of .* is tied to its embedding"):
        meet(student, None, lora(r=2, target_modules=[target]), 64)


@pytest.mark.parametrize(
    "keys", [{"target_modules": ["q_proj", "lm_head"]}, {"modules_to_save": ["lm_head"]}]
)
def test_a_trained_head_is_counted_before_a_weight_is_read(student_dir, keys):
    student = CausalLM(path=str(student_dir))
    meeting = meet(student, None, lora(r=2, **keys), 64)
    assert any("lm_head" in name for name in meeting.trained_tensors)


def test_a_length_that_is_just_as_long_as_the_models_take_is_legal(student_dir, teacher_dir):
    meet(*specs(student_dir, teacher_dir), lora(r=2), 256)
    with pytest.raises(ConfigError, match=r"data.max_length=257: the student takes at most 256"):
        meet(*specs(student_dir, teacher_dir), lora(r=2), 257)


def test_all_problems_are_named_at_once(tmp_path, student_dir):
    small = tiny_model(tmp_path / "small", rows=300)
    with pytest.raises(ConfigError) as refused:
        meet(*specs(student_dir, small), lora(r=2, target_modules=["wq"]), 300)
    assert len(refused.value.problems) == 4


def test_models_and_rows_meet_without_a_weight_being_read(
    student_dir, teacher_dir, tmp_path, monkeypatch
):
    import safetensors
    import transformers.modeling_utils

    def refuse(*_, **__):
        raise AssertionError("weights were read")

    monkeypatch.setattr(safetensors, "safe_open", refuse)
    monkeypatch.setattr(transformers.modeling_utils, "safe_open", refuse)
    student, teacher = specs(student_dir, teacher_dir)
    rows = FileData(path=str(write_rows(tmp_path / "rows.jsonl")), max_length=64, val_share=0.25)
    config = {"seed": 0, "keep_best": 0, "trainer": {"max_steps": -1}}
    meeting, data = meet_all(
        config,
        {
            "student": student,
            "teacher": teacher,
            "lora": lora(r=2),
            "data": rows,
            "optim": AdamW(lr=1.0),
        },
    )
    assert meeting.vocab == num_token_ids(tokenizer())
    assert (data.num_rows, data.num_val_rows) == (6, 2)
