import pytest
import torch
from lab import tiny_model
from torch import nn

from neo.models.causal_lm import hidden_states
from neo.teachers.online import FrozenTeacher, OnlineTeacher

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
