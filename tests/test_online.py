from types import SimpleNamespace

import pytest
import torch
from fits import fit, history, trained
from lab import tiny_model
from torch import nn

from neo.models.causal_lm import CausalLM
from neo.models.head import head_of
from neo.models.hidden import check_packing, hidden_states
from neo.teachers.online import FrozenTeacher, OnlineTeacher

CPU, META = torch.device("cpu"), torch.device("meta")
IDS, POSITIONS = torch.tensor([[5, 6, 7]]), torch.arange(3)[None]


@pytest.fixture
def teacher(teacher_dir):
    return OnlineTeacher(path=str(teacher_dir)).load_frozen(torch.device("cpu"))


def test_a_teacher_stays_in_eval_mode_whatever_its_parent_does(teacher):
    parent = nn.ModuleDict({"teacher": teacher, "other": nn.Linear(2, 2)}).train()
    assert parent["other"].training
    assert not any(module.training for module in teacher.modules())
    teacher.train()
    assert not any(module.training for module in teacher.modules())


def test_no_weight_of_a_teacher_asks_for_a_gradient(teacher):
    assert not any(p.requires_grad for p in teacher.parameters())
    assert not hidden_states(teacher.model, IDS, POSITIONS).requires_grad


def test_dropout_in_the_teachers_config_has_no_effect(tmp_path):
    folder = tiny_model(tmp_path / "dropout", attention_dropout=0.9)
    teacher = OnlineTeacher(path=str(folder)).load_frozen(torch.device("cpu"))
    nn.ModuleList([teacher]).train()
    assert teacher.model.config.attention_dropout == 0.9
    first, second = (hidden_states(teacher.model, IDS, POSITIONS) for _ in range(2))
    assert torch.equal(first, second)
    teacher.model.train()  # what a teacher that was not held would do
    first, second = (hidden_states(teacher.model, IDS, POSITIONS) for _ in range(2))
    assert not torch.equal(first, second)


def test_a_teacher_has_no_place_in_a_checkpoint(teacher):
    assert teacher.state_dict() == {}
    parent = nn.ModuleDict({"teacher": teacher, "other": nn.Linear(2, 2)})
    assert parent.state_dict().keys() == {"other.weight", "other.bias"}


def test_a_teacher_of_no_path_is_a_spec_that_is_never_loaded():
    spec = OnlineTeacher(path=None)
    with pytest.raises(ValueError, match="path=null: must be a folder or a hub name"):
        spec.load_frozen(torch.device("cpu"))


def test_what_is_held_is_the_model_given(teacher):
    assert FrozenTeacher(teacher.model).model is teacher.model


@pytest.fixture
def apart(teacher_dir):
    """A teacher whose backbone has a device of its own."""
    return OnlineTeacher(path=str(teacher_dir), device="cpu").load_frozen(CPU)


@pytest.mark.parametrize("tie", [False, True])
def test_a_backbone_on_its_own_device_stays_there_and_its_head_is_moved(tie, tmp_path):
    spec = OnlineTeacher(path=str(tiny_model(tmp_path, tie=tie)), device="cpu")
    teacher = spec.load_frozen(CPU)
    expected = hidden_states(teacher.model, IDS, POSITIONS)
    parent = nn.ModuleDict({"teacher": teacher, "other": nn.Linear(2, 2)}).to(META)
    assert {p.device for p in teacher.model.get_decoder().parameters()} == {CPU}
    # what DDP looks at and synchronises
    assert [n for n, _ in parent.named_parameters() if "teacher" in n] == ["teacher.head.weight"]
    assert head_of(teacher.model).weight.device == META
    assert teacher.model.get_input_embeddings().weight.device == CPU
    assert torch.equal(hidden_states(teacher.model, IDS, POSITIONS), expected)
    parent.double()
    assert {p.dtype for p in teacher.model.get_decoder().parameters()} == {torch.float32}


def test_without_a_device_of_its_own_all_of_a_teacher_is_moved(teacher):
    nn.ModuleDict({"teacher": teacher}).to(META)
    assert {p.device for p in teacher.model.parameters()} == {META}


def test_a_teacher_apart_is_brought_to_its_device_and_takes_ids_from_any(teacher, monkeypatch):
    model = FrozenTeacher(teacher.model, META).model
    decoder = model.get_decoder()
    assert {p.device for p in decoder.parameters()} == {META}
    given = {}

    def forward(**keys):
        given.update(keys)
        return SimpleNamespace(last_hidden_state=decoder.embed_tokens(keys["input_ids"]))

    monkeypatch.setattr(decoder, "forward", forward)
    hidden = hidden_states(model, IDS, POSITIONS)
    assert hidden.shape == (1, 3, model.config.hidden_size)
    assert given["input_ids"].device == given["position_ids"].device == hidden.device == META
    assert given["use_cache"] is False


def test_a_teacher_apart_is_a_frozen_teacher_like_any_other(apart):
    parent = nn.ModuleDict({"teacher": apart, "other": nn.Linear(2, 2)}).train()
    assert not any(module.training for module in [apart, *apart.model.modules()])
    assert not any(p.requires_grad for p in apart.model.parameters())
    assert parent.state_dict().keys() == {"other.weight", "other.bias"}
    check_packing(apart.model)


@pytest.mark.parametrize(("tie", "settings"), [
    (False, ["data.packing=true"]),
    (True, ["data.packing=false", "data.batch_size=3", "lora=loraga", "lora.calibration_rows=4"]),
    (True, ["data.batch_size=2", "loss.kd_positions=release", "loss=reverse_kl"]),
])  # fmt: skip
def test_a_run_is_the_same_to_the_bit_with_its_teacher_apart(tie, settings, student_dir, tmp_path):
    teacher = tiny_model(tmp_path / "teacher", hidden=48, tie=tie, seed=2)
    common = [*settings, "trainer.max_steps=3", "trainer.max_epochs=-1", "optim.lr=0.01"]
    for name, own in (("together", "null"), ("apart", "cpu")):
        record = fit(student_dir, teacher, tmp_path / name, *common, f"teacher.device={own}")
        assert record.status == "ok"
    expected, actual = trained(tmp_path / "together"), trained(tmp_path / "apart")
    for name, weight in expected.items():
        assert torch.equal(actual[name], weight), name
    losses = [history(tmp_path / name, "train/kd") for name in ("together", "apart")]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("last_gpu", [False, True])
def test_a_student_on_a_gpu_learns_from_a_teacher_elsewhere(
    last_gpu, student_dir, teacher_dir, tmp_path
):
    own = f"cuda:{torch.cuda.device_count() - 1}" if last_gpu else "cpu"
    common = ["trainer=gpu", "trainer.devices=[0]", "trainer.precision=32-true",
              "trainer.max_steps=2", "trainer.max_epochs=-1", "teacher.dtype=float32"]  # fmt: skip
    for name, device in (("together", "null"), ("apart", own)):
        fit(student_dir, teacher_dir, tmp_path / name, *common, f"teacher.device={device}")
    losses = [history(tmp_path / name, "train/kd") for name in ("together", "apart")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    spec = OnlineTeacher(path=str(teacher_dir), device=own)
    teacher = spec.load_frozen(torch.device("cuda", 0)).to("cuda:0")
    assert {str(p.device) for p in teacher.model.get_decoder().parameters()} == {own}
    assert str(head_of(teacher.model).weight.device) == "cuda:0"


def test_a_teacher_that_stays_is_moved_by_nobody(student_dir):
    model = CausalLM(path=str(student_dir)).load(torch.device("cpu"), trained=False)
    parent = torch.nn.Module()
    parent.teacher = FrozenTeacher(model, stays=True)
    parent.free = torch.nn.Linear(2, 2)
    parent.to(torch.float64)
    assert parent.free.weight.dtype == torch.float64
    assert all(p.dtype == torch.float32 for p in parent.teacher.parameters())
