import re
import sys

import pytest
from lab import compose, compose_raw, tiny_model

import neo.plan
from neo.config import ConfigError
from neo.models.architectures import ARCHITECTURES, Architecture
from neo.models.causal_lm import CausalLM
from neo.models.variants import lora
from neo.plan import plan, show, split_offline, split_out
from neo.teachers.online import OnlineTeacher
from neo.training import meet, offline, preflight
from neo.training.device_plan import Placement
from neo.training.meet import build_specs
from neo.training.offline import OfflineTeacher, offline_specs

PAIR = ("student=llama3_2_1b", "teacher=llama3_1_8b", "data=infinity_instruct", "trainer=gpu",
        "trainer.max_steps=10")  # fmt: skip
ALONE = ("student=llama3_2_1b", "method=lora", "data=infinity_instruct", "trainer=gpu",
         "trainer.max_steps=10", "data.max_length=32")  # fmt: skip


pytestmark = pytest.mark.usefixtures("no_network")


def planned(*words):
    return plan(compose_raw(*words), offline=True)


def test_a_name_is_planned_by_its_numbers(monkeypatch, capsys):
    keys = {
        "vocab_size": 300, "hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": False,
    }  # fmt: skip
    base = 2 * 300 * 16 + 16 * (16 + 8 + 8 + 16) + 3 * 16 * 40 + 3 * 16
    known = {"a/small": Architecture(keys, base), "a/wide": Architecture(keys, base)}
    monkeypatch.setattr(offline, "ARCHITECTURES", known)
    words = ("student.path=a/small", "teacher.path=a/wide", "data=infinity_instruct", "lora.r=2",
             "data.max_length=16", "trainer=gpu", "trainer.max_steps=1")  # fmt: skip
    run = planned(*words)
    assert run.plan.placement.device_type == "cuda"  # on a machine with a GPU or without
    assert run.plan.workload.num_supervised == run.plan.workload.num_tokens == 16
    assert run.plan.workload.vocab == 300
    branch = 2 * (32 + 24 + 24 + 32 + 3 * 56)
    assert run.plan.most["adapter"] == run.plan.most["gradients"] == 4 * branch
    assert show([run]) == 0
    said = " ".join(capsys.readouterr().out.split())
    share = f"{100 * branch / (base + branch):.3g} %"
    assert (
        f"parameters: student {base:,} and {branch:,} of its branch; "
        f"trained {branch:,} ({share}); teacher {base:,}" in said
    )
    assert "offline: all tokens are counted as supervised, and 300 ids as shared" in said
    assert "fits: " in said


@pytest.mark.slow
def test_a_model_of_the_hub_is_planned_without_it(capsys):
    run = planned(*ALONE)
    assert run.problem is None
    assert run.plan.placement.device_type == "cuda"  # on a machine with a GPU or without
    assert run.plan.workload.num_supervised == run.plan.workload.num_tokens == 32
    assert run.plan.workload.vocab == 128_256
    # bfloat16 of the base; float32 of the branch, its gradients, and its two moments
    assert run.plan.most["student"] == pytest.approx(2 * 1_235_814_400, rel=1e-6)
    assert run.plan.most["adapter"] == run.plan.most["gradients"] == 4 * 45_088_768
    assert run.plan.most["optimizer"] == pytest.approx(8 * 45_088_768, rel=1e-4)
    assert show([run]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert (
        "parameters: student 1,235,814,400 and 45,088,768 of its branch; "
        "trained 45,088,768 (3.52 %); teacher none" in said
    )
    assert "offline: all tokens are counted as supervised, and 128,256 ids as shared" in said
    assert "fits: " in said


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sft", "lora", "kd", "neo"])
def test_the_pair_of_the_paper_is_planned_by_every_method(method):
    run = planned(*PAIR, f"method={method}")
    trained = 45_088_768 if method in ("lora", "neo") else 1_235_814_400
    assert run.meeting.num_trainable_parameters == trained
    assert run.meeting.num_teacher_parameters == 8_030_261_248
    assert run.plan.most["gradients"] == pytest.approx(4 * trained, rel=1e-6)
    assert run.plan.most["teacher"] == pytest.approx(2 * 8_030_261_248, rel=1e-6)
    assert ("teacher forward" in run.plan.flops) is (method in ("kd", "neo"))


def specs(student, teacher=None):
    return {"student": student, "teacher": teacher, "lora": lora(r=2)}


def test_folders_and_shipped_models_stay_what_they_are(student_dir, tmp_path, monkeypatch):
    kept = specs(CausalLM(path=str(student_dir)), OnlineTeacher(path="neo://mini-teacher"))
    assert offline_specs(kept) == kept
    # as everywhere, a folder comes before a name of the hub
    monkeypatch.chdir(tmp_path)
    name = "meta-llama/Llama-3.2-1B"
    tiny_model(tmp_path / name, hidden=16)
    kept = specs(CausalLM(path=name))
    assert offline_specs(kept)["student"].config().hidden_size == 16


def test_a_spec_keeps_its_other_keys():
    spec = OnlineTeacher(path="meta-llama/Llama-3.1-8B", quantization="nf4", offload=True)
    found = offline_specs(specs(CausalLM(path="neo://mini-student"), spec))["teacher"]
    assert isinstance(found, OfflineTeacher)
    assert vars(found) == vars(spec)
    with pytest.raises(ValueError, match="an architecture has no tokenizer"):
        found.tokenizer()


def test_a_model_that_is_not_known_is_refused_with_those_that_are(capsys):
    run = planned(*ALONE, "student.path=meta-llama/Llama-3.2-1b", "teacher.path=my/own")
    assert show([run]) == 2
    said = capsys.readouterr().err
    assert "student.path='meta-llama/Llama-3.2-1b': there is no such folder" in said
    assert "did you mean meta-llama/Llama-3.2-1B" in said
    assert "teacher.path='my/own': " in said
    assert all(name in said for name in ARCHITECTURES)


def test_a_folder_that_is_not_there_is_no_name(tmp_path):
    run = planned(*ALONE, f"student.path={tmp_path / 'nowhere'}")
    assert run.refused
    assert "there is no such folder" in run.problem
    assert "known are" not in run.problem


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (("lora.target_modules=[wq]",), "lora"),
        (("data.max_length=200000",), "data.max_length=200000: the student takes at most 131072"),
        (("optim.loraplus_lr_ratio=4", "optim.loraplus_lr_embedding=1e-4"),
         "optim.loraplus_lr_embedding=0.0001: no branch"),
        (("student.path=TinyLlama/TinyLlama_v1.1", "data.max_length=4096"), "at most 2048"),
    ],
)  # fmt: skip
def test_what_no_tokenizer_is_needed_for_is_checked(words, problem):
    run = planned(*ALONE, *words)
    assert run.refused
    assert run.problem.startswith("this config cannot run:")  # and not only its plan
    assert problem in run.problem


def test_the_shorter_of_two_heads_says_how_many_ids_are_shared(tmp_path):
    folders = [tiny_model(tmp_path / str(n), rows=n) for n in (510, 500)]
    words = ("data=infinity_instruct", "data.max_length=16", "trainer=cpu", "lora.r=2",
             "trainer.max_steps=1")  # fmt: skip
    run = planned(*words, f"student.path={folders[0]}", f"teacher.path={folders[1]}")
    assert run.plan.workload.vocab == 500
    assert "the student's head has 510 rows, of which the first 500 are used" in run.notes


def test_a_run_of_another_rate_and_seed_has_the_same_plan(student_dir, teacher_dir, monkeypatch):
    words = (
        f"student.path={student_dir}", f"teacher.path={teacher_dir}", "trainer=cpu", "lora.r=3",
        "data=infinity_instruct", "data.max_length=8", "trainer.max_steps=1",
    )  # fmt: skip
    first = planned(*words)
    for function in ("build_meta_student", "meet"):
        monkeypatch.delattr(meet, function)  # nothing is built again
    again = planned(*words, "seed=1", "optim.lr=1e-5")
    assert again.plan is first.plan
    assert again.meeting is first.meeting
    assert again.name != first.name


@pytest.mark.slow
def test_runs_of_other_rates_and_seeds_build_and_count_nothing_again(
    student_dir, teacher_dir, monkeypatch, capsys
):
    num = {"met": 0, "counted": 0}

    def counting(module, function, key):
        real = getattr(module, function)

        def called(*arguments, **keys):
            num[key] += 1
            return real(*arguments, **keys)

        monkeypatch.setattr(module, function, called)

    for cache in ("_met", "_made", "_refused"):
        monkeypatch.setattr(preflight, cache, {})
    counting(meet, "build_meta_student", "met")
    counting(preflight, "make_plan", "counted")
    words = [f"student.path={student_dir}", f"teacher.path={teacher_dir}", "trainer=cpu",
             "data=infinity_instruct", "data.max_length=16", "trainer.max_steps=1",
             "trainer.device_memory_gib=1e-5", "offline=true"]  # fmt: skip
    swept = ["seed=0,1", "optim.lr=1e-3,1e-4", "lora.r=2,4"]
    monkeypatch.setattr(sys, "argv", ["neo.plan", "-m", *words, *swept])
    with pytest.raises(SystemExit) as left:
        neo.plan.main()
    assert left.value.code == 1
    printed = capsys.readouterr()
    lines = [line for line in printed.out.splitlines() if " no, of " in line]
    assert len(lines) == 8
    assert all("lora.r=" in line and "data.max_length" not in line for line in lines)
    assert re.search("M parameters +M trained +M teacher", printed.out)
    assert num["met"] == 2  # ranks
    changes = 2  # activation checkpointing, smaller chunks of the loss
    assert num["counted"] == 2 * (1 + changes)


@pytest.mark.parametrize(
    ("words", "same"),
    [
        (("loss.kd_ratio=0.9", "loss.temperature=1"), True),
        (("loss.kd_ratio=0", "method=lora"), False),
        (("loss.temperature=2",), False),
        (("loss=jsd",), False),
        (("data.batch_size=3",), False),
        (("student.dtype=float16",), False),
    ],
)
def test_a_plan_depends_on_what_changes_the_operators_of_a_step(words, same):
    def key(*words):
        config = compose(*words)
        specs = build_specs(config)
        work = preflight.workload_of(specs["data"], config["trainer"], 300, [])
        return preflight._what_counts(config, specs, work, Placement("cpu"))

    assert (key() == key(*words)) is same


def test_offline_is_true_or_false():
    assert split_offline(["-m", "seed=1,2"]) == (["-m", "seed=1,2"], False)
    assert split_offline(["offline=false", "offline=True", "seed=1"]) == (["seed=1"], True)
    with pytest.raises(ConfigError, match="offline=maybe: must be true or false"):
        split_offline(["offline=maybe"])


def test_where_the_hub_cannot_be_asked_the_way_without_it_is_told(monkeypatch, capsys):
    monkeypatch.setattr(neo.plan, "_plan", lambda *_, **__: _unreached())
    run = plan(compose_raw(*ALONE))
    assert run.refused
    assert "offline=true plans" in run.problem


def _unreached():
    name = "meta-llama/Llama-3.2-1B"
    why = "there is no such folder, and as a model of the hub it cannot be read: no route"
    raise ConfigError([f"student.path={name!r}: {why}"])


def test_plans_are_kept_as_a_table_with_the_command_that_makes_them(
    student_dir, teacher_dir, tmp_path, monkeypatch, capsys
):
    words = [
        f"student.path={student_dir}", f"teacher.path={teacher_dir}", "method=lora,neo",
        "data.max_length=32", "lora.r=2", "offline=true", f"out={tmp_path}/plan.md",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["neo-plan", "-m", *words])
    with pytest.raises(SystemExit, match="0"):
        neo.plan.main()
    head, rule, *rows = [
        line for line in (tmp_path / "plan.md").read_text().splitlines() if line[:1] == "|"
    ]
    assert head.count("|") == rule.count("|") == rows[0].count("|")
    assert [row.rsplit("|", 2)[1].strip() for row in rows] == ["method=lora", "method=neo"]
    printed = capsys.readouterr().out
    for row in rows:
        assert row.split("|")[1].strip() in printed
    assert "- Command: `neo-plan -m " in (tmp_path / "plan.md").read_text()


@pytest.mark.parametrize("name", ["plan.txt", "nowhere/plan.md", "."])
def test_a_place_that_cannot_hold_the_plans_is_refused_before_them(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"must be a \.md file in a folder that is there"):
        split_out([f"out={name}"])
