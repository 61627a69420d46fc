"""Two processes on gloo: every way to use them trains what one process trains."""

import json

import pytest
import torch
from devices import IN_ORDER, assert_same, train_in_processes
from fits import fit, history, settings, trained
from lab import compose, tiny_model

from neo.config import build
from neo.models.causal_lm import CausalLM
from neo.models.student import build_meta_student, inner
from neo.models.traffic import (
    ddp_traffic,
    fsdp_traffic,
    sharded_teacher_traffic,
    units_of,
)

VARIANTS = {v: f"lora={v}" for v in ("lora", "dora", "pissa", "moslora")} | {"all": "method=kd"}
WAYS = {
    "ddp": ("trainer.strategy=ddp",),
    "fsdp": ("trainer.strategy=fsdp",),
    "teacher": ("trainer.strategy=ddp", "sharding=teacher"),
}
# What else may differ between a model that is whole and one that is split, one job each.
ODDS = {
    "kasa": ("lora=kasa",),
    "branch on the head": ("lora.target_modules=[q_proj,lm_head]",),
    "copy of the head": ("lora.modules_to_save=[lm_head]",),
    "branch on the embedding": ("lora.target_modules=[q_proj,embed_tokens]",),
    "pissa with magnitudes": ("lora=pissa", "lora.use_dora=true"),
    "accumulated and clipped": (
        "trainer.accumulate_grad_batches=2", "trainer.gradient_clip_val=0.1",
    ),
    "checkpointed activations": ("student.activation_checkpointing=true",),
    "validated": ("data.val_share=0.2", "trainer.val_check_interval=2"),
}  # fmt: skip
SHORT = "trainer.max_steps=6"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {
        "student": tiny_model(folder / "student", hidden=32, seed=1),
        "tied": tiny_model(folder / "tied", hidden=32, seed=1, tie=True),
        "teacher": tiny_model(folder / "teacher", hidden=48, seed=2),
    }


def alone(models, folder, *overrides, student="student"):
    fit(models[student], models["teacher"], folder, *IN_ORDER, "data.batch_size=4", *overrides)
    return trained(folder)


def job(models, folder, *overrides, student="student"):
    two = ("trainer.devices=2", "data.batch_size=2")
    return settings(models[student], models["teacher"], folder, *IN_ORDER, *two, *overrides)


@pytest.fixture(scope="module")
def runs(models, tmp_path_factory):
    """All runs of two processes, in one pair of them."""
    folder = tmp_path_factory.mktemp("runs")
    jobs = [
        job(models, folder / way / variant, choice, *overrides, student=student(variant))
        for way, overrides in WAYS.items()
        for variant, choice in VARIANTS.items()
    ]
    jobs += [
        job(models, folder / "odd" / name, "trainer.strategy=fsdp", SHORT, *overrides)
        for name, overrides in ODDS.items()
    ]
    for way, overrides in WAYS.items():
        half = ("student.dtype=bfloat16", "teacher.dtype=bfloat16", "trainer.precision=bf16-mixed")
        jobs.append(job(models, folder / "half" / way, SHORT, *half, *overrides))
    tied_copy = ("trainer.strategy=fsdp", SHORT, "lora.modules_to_save=[lm_head]")
    jobs.append(job(models, folder / "tied copy", *tied_copy, student="tied"))
    offloaded = ("trainer.strategy=ddp", "sharding=teacher", "teacher.offload=true")
    jobs.append(job(models, folder / "offloaded", SHORT, *offloaded))
    for name in ("filled", "read"):  # one after the other, the second without a teacher
        cache = ("trainer.strategy=fsdp", SHORT, f"teacher.cache={folder / 'caches'}")
        jobs.append(job(models, folder / name, *cache, student="tied"))
    train_in_processes(jobs, folder)
    return folder


def student(variant):
    """Some of the variants are tried with a head that is tied to the embedding."""
    return "tied" if variant in ("dora", "all") else "student"


@pytest.fixture(scope="module")
def one_process(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    return {
        variant: alone(models, folder / variant, choice, student=student(variant))
        for variant, choice in VARIANTS.items()
    }


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("way", WAYS)
def test_two_processes_train_what_one_trains(runs, one_process, way, variant):
    assert_same(trained(runs / way / variant), one_process[variant])


@pytest.mark.parametrize("name", ODDS)
def test_a_split_student_trains_what_a_whole_one_trains(runs, models, tmp_path, name):
    assert_same(trained(runs / "odd" / name), alone(models, tmp_path, SHORT, *ODDS[name]))


@pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings=True.")
def test_a_copy_of_a_tied_head_leaves_the_embedding_alone(runs, models, tmp_path):
    expected = alone(models, tmp_path, SHORT, "lora.modules_to_save=[lm_head]", student="tied")
    assert_same(trained(runs / "tied copy"), expected)


def test_a_teacher_in_the_cpus_memory_teaches_the_same(runs, models, tmp_path):
    assert_same(trained(runs / "offloaded"), alone(models, tmp_path, SHORT))


def test_what_is_split_over_processes_fills_a_cache_and_measures_it(runs, models, tmp_path):
    expected = alone(models, tmp_path, SHORT, student="tied")
    for name, computes in (("filled", True), ("read", False)):
        assert_same(trained(runs / name), expected)
        metrics = json.loads((runs / name / "record.json").read_text())["metrics"]
        assert (metrics["cache/rows_computed"] > 0) is computes
        assert metrics["cache/gradient_error"] < 1e-4


@pytest.mark.parametrize("way", ["fsdp", "teacher"])
def test_half_precision_is_the_same_in_all_ways(runs, way):
    assert_same(trained(runs / "half" / way), trained(runs / "half" / "ddp"), atol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_process_holds_half_of_both_models(runs, variant):
    held = [
        json.loads((runs / "fsdp" / variant / f"held-{rank}.json").read_text()) for rank in (0, 1)
    ]
    for role in ("student", "teacher"):
        (here, in_all), (there, also) = (h[role] for h in held)
        assert here + there == in_all == also  # nothing twice, nothing nowhere
        assert max(here, there) <= 0.51 * in_all  # rows of odd number go to the first


def test_a_split_teacher_leaves_the_student_whole(runs):
    for rank in (0, 1):
        held = json.loads((runs / "teacher" / "lora" / f"held-{rank}.json").read_text())
        assert held["student"][0] == held["student"][1]
        assert held["teacher"][0] <= 0.51 * held["teacher"][1]


def test_what_is_logged_is_the_same_for_two_processes(runs, models, tmp_path):
    alone(models, tmp_path, "lora=lora")
    for way in WAYS:
        for name in ("train/loss", "train/ce", "train/kd", "train/grad_norm", "train/tokens"):
            expected, actual = history(tmp_path, name), history(runs / way / "lora", name)
            assert actual == pytest.approx(expected, rel=1e-4)


def units(models, variant, role, **keys):
    if role == "teacher":
        return units_of(CausalLM(path=str(models["teacher"])).meta(), torch.float32)
    spec = CausalLM(path=str(models[student(variant)]))
    choice = [] if variant == "all" else ["lora.r=4"]
    lora = build(compose(VARIANTS[variant], *choice)["lora"])
    return units_of(inner(build_meta_student(spec, lora)), torch.float32, **keys)


def expected_traffic(models, way, variant, num_micro_batches=1):
    of_student, of_teacher = (units(models, variant, role) for role in ("student", "teacher"))
    if way == "ddp":
        return ddp_traffic(of_student, 2, num_micro_batches).step
    if way == "teacher":
        return sharded_teacher_traffic(of_student, of_teacher, 2, num_micro_batches).step
    once = variant != "all"
    return fsdp_traffic(of_student, of_teacher, 2, num_micro_batches, reduces_once=once).step


def sent(folder, step=1):
    """What the processes sent each other in a step, by kind, in bytes; the same from each."""
    both = [json.loads((folder / f"sent-{rank}.json").read_text()) for rank in (0, 1)]
    assert both[0]["steps"] == both[1]["steps"]
    return both[0]["steps"][step]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("way", WAYS)
def test_processes_send_each_other_what_the_plan_says_and_nothing_frozen_is_reduced(
    runs, models, way, variant
):
    plan = expected_traffic(models, way, variant)
    counted = sent(runs / way / variant)
    kinds = ("all_gather", "reduce_scatter", "all_reduce")
    assert {kind: counted.get(kind, 0) for kind in kinds} == {k: getattr(plan, k) for k in kinds}


def test_gradients_of_a_branch_are_reduced_once_a_step_however_many_micro_batches(runs, models):
    counted = sent(runs / "odd" / "accumulated and clipped")
    plan = expected_traffic(models, "fsdp", "lora", num_micro_batches=2)
    assert counted == {"all_gather": plan.all_gather, "reduce_scatter": plan.reduce_scatter}
