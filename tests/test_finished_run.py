import shutil

import pytest
import torch
from fits import checkpoint, fit
from lab import tokenizer
from safetensors.torch import load_file

from neo.data.prompt import read_template
from neo.models.causal_lm import CausalLM
from neo.models.student import PROBE, logits_on
from neo.models.trained import load_trained
from neo.training.finished_run import FinishedRun

CPU = torch.device("cpu")
SETTINGS = ("optim.lr=0.05", "trainer.max_steps=3", "trainer.max_epochs=-1", "data.batch_size=2")
ADAPTER = ["method=neo", "data.chat_template=plain", "loss.kd_ratio=0.3"]
OTHERS = {
    "moslora": ["lora=moslora"],
    "pissa": ["lora=pissa"],
    "drawn base": ["student.random_init=true", "seed=3"],
}


@pytest.fixture(scope="module")
def adapter_run(student_dir, teacher_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    fit(student_dir, teacher_dir, folder, *ADAPTER, *SETTINGS)
    return folder


@pytest.fixture(scope="module")
def model_run(student_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    fit(student_dir, None, folder, "method=sft", *SETTINGS)
    return folder


def check_students(folder):
    """A run gives the student that it ended with, and another that it began with."""
    run = FinishedRun.open(folder)
    probe = load_file(folder / PROBE)
    student = run.student()
    logits = logits_on(student, probe["input_ids"])
    torch.testing.assert_close(logits, probe["logits"], rtol=1e-4, atol=1e-4)
    assert not student.training
    gap = (logits_on(run.base(), probe["input_ids"]) - probe["logits"]).abs().max()
    assert gap > 0.01


def test_a_run_gives_the_student_it_ended_with_and_the_one_it_began_with(adapter_run, model_run):
    check_students(adapter_run)
    check_students(model_run)


@pytest.mark.slow
@pytest.mark.parametrize("choice", OTHERS)
def test_so_does_a_run_of_every_other_kind(student_dir, tmp_path, choice):
    fit(student_dir, None, tmp_path, "method=lora", *OTHERS[choice], *SETTINGS)
    check_students(tmp_path)


def test_all_trained_weights_are_loaded_as_they_were_trained(model_run, student_dir):
    model = load_trained(CausalLM(path=str(student_dir), dtype="bfloat16"), model_run, CPU)
    state, own = checkpoint(model_run)["state_dict"], model.state_dict()
    assert state.keys() == {f"student.{name}" for name in own}
    assert all(torch.equal(own[name.removeprefix("student.")], state[name]) for name in state)


def test_an_adapter_of_another_base_is_refused(adapter_run, teacher_dir):
    with pytest.raises(ValueError, match="adapter: PEFT cannot load it"):
        load_trained(CausalLM(path=str(teacher_dir)), adapter_run, CPU)


def test_what_is_no_finished_run_is_refused(model_run, student_dir, tmp_path):
    with pytest.raises(ValueError, match=r"holds no config\.yaml"):
        FinishedRun.open(tmp_path)
    shutil.copy(model_run / "config.yaml", tmp_path)
    missing = r"holds neither adapter/ nor model/; did the run finish"
    with pytest.raises(ValueError, match=missing):
        FinishedRun.open(tmp_path)
    with pytest.raises(ValueError, match=missing):
        load_trained(CausalLM(path=str(student_dir)), tmp_path, CPU)
    with pytest.raises(ValueError, match=r"had no teacher \(teacher\.path=null\)"):
        FinishedRun.open(model_run).teacher()


def test_teacher_prompts_and_loss_are_those_of_the_run(adapter_run, teacher_dir):
    run = FinishedRun.open(adapter_run)
    teacher, expected = run.teacher(), load_file(teacher_dir / "model.safetensors")
    own = teacher.state_dict()
    assert all(torch.equal(own[name], value) for name, value in expected.items())
    assert not any(weight.requires_grad for weight in teacher.parameters())
    assert (run.encoder.max_length, run.loss.kd_ratio) == (128, 0.3)
    assert run.encoder.template == read_template(tokenizer(), "plain")
    assert run.encoder.template != read_template(tokenizer(), None)
