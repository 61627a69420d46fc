import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from weakref import WeakSet

import lightning as L
import pytest
import torch
from lab import ROWS, compose, compose_raw, tiny_model, write_rows

import neo.plan
from neo.config import SPECS, ConfigError, build, run_id
from neo.data.peek import peek
from neo.models.causal_lm import CausalLM
from neo.models.student import inner
from neo.plan import plan, show
from neo.training import preflight
from neo.training.device_plan import Placement, placed, placement_of
from neo.training.devices import num_devices
from neo.training.meet import meet_all
from neo.training.module import NeoModule
from neo.training.preflight import plan_run, sample_of, single_changes, workload_of
from neo.training.step_cost import count_step, planned_dtype
from neo.training.token_loss import batch_sums
from neo.training.workload import Workload

CPU = torch.device("cpu")
WEIGHTS = ("student", "adapter", "teacher")


@pytest.fixture
def typed(student_dir, teacher_dir, tmp_path):
    def typed(*overrides):
        return [
            f"student.path={student_dir}", f"teacher.path={teacher_dir}", "data=jsonl",
            f"data.path={write_rows(tmp_path / 'rows.jsonl', ROWS * 10)}", "data.max_length=64",
            "data.val_share=0", "trainer=cpu", *([] if "method=kd" in overrides else ["lora.r=4"]),
            *overrides,
        ]  # fmt: skip

    return typed


def specs_of(config):
    specs = {key: build(config[key]) for key in SPECS}
    return specs if specs["teacher"].path else specs | {"teacher": None}


def planned(config):
    specs = specs_of(config)
    sample, meeting, _ = sample_of(config, specs)
    work = workload_of(specs["data"], config["trainer"], meeting.vocab, sample)
    return plan_run(config, specs, work)


def sizes(tensors):
    """Bytes of the storages under some tensors, each once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


@pytest.mark.parametrize(
    "overrides",
    [
        ("data.batch_size=2",),
        ("data.batch_size=2", "student.dtype=bfloat16", "teacher.dtype=bfloat16", "lora=dora"),
        ("lora=lora_fa", "student.dtype=bfloat16"),
        ("method=kd", "trainer.accumulate_grad_batches=2"),
    ],
)
def test_weights_gradients_and_moments_are_those_of_a_run(overrides, typed, tmp_path, monkeypatch):
    found = {}
    before_step = NeoModule.on_before_optimizer_step

    def look(self, optimizer):
        student = list(self.student.parameters())
        found["weights"] = sizes([*student, *self.teacher.parameters()])
        found["buffers"] = sizes([*self.student.buffers(), *self.teacher.buffers()])
        found["teacher"] = sizes(self.teacher.parameters())
        found["gradients"] = sizes([p.grad for p in student if p.grad is not None])
        state = [t for held in optimizer.state.values() for t in held.values()]
        found["optimizer"] = sizes(state)
        before_step(self, optimizer)

    monkeypatch.setattr(NeoModule, "on_before_optimizer_step", look)
    words = typed("trainer.max_steps=2", "trainer.max_epochs=-1", f"run_dir={tmp_path}", *overrides)
    from neo.train import train

    assert train(compose_raw(*words, "trainer.enable_progress_bar=false")).status == "ok"
    plan = planned(compose(*words))
    held = sum(plan.most.get(part, 0) for part in WEIGHTS)
    assert held == found["weights"] + found["buffers"]
    assert plan.most["gradients"] == found["gradients"]
    assert plan.most["optimizer"] == found["optimizer"]
    assert found["teacher"] <= plan.most["teacher"] <= found["teacher"] + found["buffers"]


@pytest.mark.parametrize(
    "overrides",
    [
        ("data.batch_size=2",),
        ("data.batch_size=2", "data.packing=false"),
        ("data.batch_size=2", "student.dtype=bfloat16", "teacher.dtype=bfloat16", "lora=dora"),
        ("data.batch_size=2", "student.activation_checkpointing=true"),
        ("data.batch_size=2", "lora=moslora", "trainer.precision=bf16-mixed"),
        ("data.batch_size=2", "student.attn_implementation=eager"),
        ("method=kd", "loss=jsd"),
    ],
)
def test_activations_are_what_autograd_keeps_in_a_real_step(overrides, typed):
    config = compose(*typed(*overrides))
    specs = specs_of(config)
    meeting, data = meet_all(config, specs)
    (batch,) = peek(data, 1)
    module = NeoModule(
        **{key: specs[key] for key in ("student", "teacher", "lora", "loss", "optim")},
        vocab=meeting.vocab,
    )
    module.configure_model()
    model, saved = inner(module.student), WeakSet()

    class Kept:  # alive as long as autograd keeps it
        def __init__(self, tensor):
            self.tensor = tensor
            saved.add(self)

    precision = config["trainer"]["precision"]
    with (
        torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"),
    ):
        loss = batch_sums(model, module.teacher.model, batch, specs["loss"], meeting.vocab).loss
    known = [*module.parameters(), *module.buffers(), batch.input_ids, batch.position_ids,
             batch.targets]  # fmt: skip
    addresses = {t.untyped_storage().data_ptr() for t in known}
    tensors = [held.tensor for held in saved]
    kept = sizes([t for t in tensors if t.untyped_storage().data_ptr() not in addresses])
    rows, length = batch.input_ids.shape
    work = Workload(
        rows, length, batch.num_supervised, config["data"].get("packing", True), meeting.vocab
    )
    cost = count_step(specs, work, device_type="cpu", precision=precision)
    counted = cost.kept["activations"] + cost.kept["loss chunk"]
    if specs["student"].activation_checkpointing:
        # torch keeps inputs of a layer where its hooks do not see them
        assert counted < 0.2 * _without_checkpointing(specs, work)
        return
    # the loss itself, and a few numbers beside it, are kept by whoever asked for them
    assert loss.nbytes <= counted - kept + loss.nbytes <= 128


def _without_checkpointing(specs, work):
    from dataclasses import replace

    student = replace(specs["student"], activation_checkpointing=False)
    return count_step(specs | {"student": student}, work, device_type="cpu").kept["activations"]


def test_flops_are_three_products_with_the_heads_and_no_gradient_of_frozen_weights(typed):
    config = compose(*typed("data.packing=false"))
    specs = specs_of(config)
    meeting, _ = meet_all(config, specs)
    work = Workload(2, 16, 10, False, meeting.vocab)
    cost = count_step(specs, work, device_type="cpu")
    heads = 2 * 10 * meeting.vocab * (32 + 32 + 48)
    assert cost.flops["loss"] == heads
    full = count_step(specs | {"lora": build({"_target_": "neo.models.variants.none"})}, work,
                      device_type="cpu")  # fmt: skip
    assert full.flops["loss"] == heads + 2 * 10 * meeting.vocab * 32  # the head's own gradient
    layer = 2 * 32 * (32 + 16 + 16 + 32 + 3 * 64)  # a token's forward pass through a layer
    attention = 2 * 2 * 2 * 4 * 16 * 16 * 8
    assert full.flops["student forward"] == 2 * (32 * layer + attention)
    # nothing is needed of the first layer's input but where the embedding is trained, as here
    assert full.flops["backward"] == 2 * (2 * 32 * layer + 5 * attention // 2)
    assert cost.flops["backward"] < full.flops["backward"]


def test_recomputed_activations_are_in_the_flops_but_not_in_those_of_the_model(typed):
    config = compose(*typed())
    once = planned(config)
    again = planned(compose(*typed("student.activation_checkpointing=true")))
    recomputed = again.flops["recomputation"]
    assert 0.8 * once.flops["student forward"] < recomputed <= once.flops["student forward"]
    assert again.flops_per_step == again.model_flops + recomputed
    assert again.gib < once.gib


def test_a_step_of_several_micro_batches_takes_as_many_times_the_flops(typed):
    one, three = (planned(compose(*typed(f"trainer.accumulate_grad_batches={n}"))) for n in (1, 3))
    assert three.flops_per_step == 3 * one.flops_per_step
    assert three.model_flops_per_token == one.model_flops_per_token


def test_gradients_of_the_step_before_lie_there_until_the_backward_pass(typed):
    # Lightning lets go of them between forward and backward; micro-batches add to them
    for accumulate, there in ((1, False), (2, True)):
        plan = planned(compose(*typed(f"trainer.accumulate_grad_batches={accumulate}")))
        assert "gradients" in plan.phases["student forward"]
        assert ("gradients" in plan.phases["loss"]) is True
        begin = plan.phases["backward"].get("gradients", 0)
        assert (begin == plan.most["gradients"]) is there


@pytest.fixture
def cost(typed):
    config = compose(*typed())
    specs = specs_of(config)
    meeting, _ = meet_all(config, specs)
    work = Workload(2, 16, 10, True, meeting.vocab)
    return count_step(specs, work, device_type="cuda", precision="bf16-mixed"), work


def test_a_gpu_has_half_precision_weights_and_all_of_the_optimizer_at_once(cost):
    step, _ = cost
    (head,) = step.student.head.weights
    assert head.row_bytes == 2 * 32
    temporaries = step.peaks["optimizer step"]["temporaries"]
    assert temporaries >= step.student.gradient()
    spec = CausalLM(path="x")
    assert planned_dtype(spec, "cuda") == torch.bfloat16
    assert planned_dtype(spec, "cpu") == torch.float32
    assert planned_dtype(CausalLM(path="x", dtype="float16"), "cpu") == torch.float16


def test_ddp_has_everything_on_every_device_and_never_gives_its_gradients_back(cost):
    step, work = cost
    one = placed(step, Placement("cuda"), work)
    ddp = placed(step, Placement("cuda", 8), work)
    for part in (*WEIGHTS, "gradients", "optimizer", "activations"):
        assert ddp.most[part] == one.most[part]
    assert all(p["gradients"] == step.student.gradient() for p in ddp.phases.values())
    assert one.phases["backward"].get("gradients", 0) < step.student.gradient()
    assert ddp.traffic.step.all_reduce == step.student.gradient()


def test_fsdp_has_its_share_of_weights_gradients_and_moments_and_two_layers_whole(cost):
    step, work = cost
    one = placed(step, Placement("cuda"), work)
    plan = placed(step, Placement("cuda", 4, fsdp=True, sharded_teacher=True), work)
    for part in (*WEIGHTS, "gradients", "optimizer"):
        assert plan.most[part] == -(-one.most[part] // 4)
    assert plan.most["activations"] == one.most["activations"]
    student, teacher = step.student, step.teacher
    gathered = {name: parts.get("gathered units", 0) for name, parts in plan.phases.items()}
    assert gathered["student forward"] == student.backbone.gathered() + 2 * student.largest_layer
    assert gathered["teacher forward"] == (
        student.backbone.gathered() + teacher.backbone.gathered() + 2 * teacher.largest_layer
    )
    assert gathered["loss"] == (
        student.backbone.gathered() + student.head.gathered() + teacher.head.gathered()
    )
    assert gathered["optimizer step"] == 0


def test_a_sharded_teacher_is_all_that_is_split_and_may_lie_elsewhere(cost):
    step, work = cost
    ddp = placed(step, Placement("cuda", 4), work)
    split = placed(step, Placement("cuda", 4, sharded_teacher=True), work)
    assert split.most["teacher"] == -(-ddp.most["teacher"] // 4)
    for part in ("student", "adapter", "optimizer", "gradients"):
        assert split.most[part] == ddp.most[part]
    assert split.phases["student forward"].get("gathered units") is None
    away = placed(step, Placement("cuda", 4, sharded_teacher=True, offload=True), work)
    assert "teacher" not in away.most
    assert split.traffic.step.all_gather == step.teacher.gathered(4)
    apart = placed(step, Placement("cuda", teacher_elsewhere=True), work)
    assert apart.most["teacher"] == step.teacher.head.gathered()
    assert "teacher activations" not in apart.most


def test_full_training_under_fsdp_keeps_float32_and_gathers_half_precision(typed):
    config = compose(*typed("method=kd"))
    specs = specs_of(config)
    meeting, _ = meet_all(config, specs)
    work = Workload(2, 16, 10, True, meeting.vocab)
    keys = {"device_type": "cuda", "precision": "bf16-mixed"}
    whole = placed(count_step(specs, work, **keys), Placement("cuda", 2), work)
    half = count_step(specs, work, **keys, gathered=torch.bfloat16)
    split = placed(half, Placement("cuda", 2, fsdp=True, sharded_teacher=True), work)
    buffers = 1024
    for part in ("student", "gradients", "optimizer"):
        assert abs(split.most[part] - whole.most[part] / 2) < buffers, part
    assert half.student.gathered() * 2 == half.student.gradient()


def test_devices_are_counted_as_lightning_counts_them(typed):
    config = compose(*typed("trainer.devices=2"))
    trainer = config["trainer"] | {"num_nodes": 3, "strategy": "ddp"}
    assert placement_of(config | {"trainer": trainer}, {}) == Placement("cpu", 6)
    trainer = trainer | {"strategy": "fsdp", "accelerator": "gpu"}
    found = placement_of(config | {"trainer": trainer}, specs_of(config))
    assert found == Placement("cuda", 6, fsdp=True, sharded_teacher=True)
    found = placement_of(config | {"sharding": "teacher"}, specs_of(config))
    assert found == Placement("cpu", 2, sharded_teacher=True)
    for devices in (2, "3", "auto"):
        given = {"devices": devices, "accelerator": "cpu"}
        lightning = L.Trainer(**given, logger=False, barebones=True).num_devices
        assert num_devices(given) == max(1, lightning)


def test_a_run_that_does_not_fit_is_refused_before_a_weight_is_read(typed, tmp_path, monkeypatch):
    from neo.train import train

    def load(*_, **__):
        raise AssertionError("a weight was read")

    monkeypatch.setattr(CausalLM, "load", load)
    gib = planned(compose(*typed("data.batch_size=4"))).gib
    words = typed("data.batch_size=4", f"run_dir={tmp_path / 'run'}")
    with pytest.raises(ConfigError) as refused:
        train(compose_raw(*words, f"trainer.device_memory_gib={gib * 0.8}"))
    (problem,) = refused.value.problems
    assert problem.startswith("trainer.device_memory_gib=0.")
    assert "Any one of these makes it fit: " in problem
    assert "data.batch_size=2 trainer.accumulate_grad_batches=2 takes " in problem
    assert "data.batch_size=1" not in problem
    assert not (tmp_path / "run").exists()
    with pytest.raises(
        ConfigError, match=r"No single change makes it fit; nearest are: data.batch"
    ):
        train(compose_raw(*words, "trainer.device_memory_gib=1e-6"))
    assert train(compose_raw(*words, f"trainer.device_memory_gib={gib}", "dry_run=true")) is None


def test_each_change_takes_what_the_plan_of_that_change_says(typed):
    words = typed("data.batch_size=2", "loss.chunk_gib=0.004", "data.packing=false")
    config = compose(*words)
    specs, plan = specs_of(config), planned(compose(*words))
    changes = single_changes(
        specs, config["trainer"], plan.workload, plan.placement, 0.6 * plan.gib
    )
    assert len(changes) == 3
    for change in changes:
        changed = planned(compose(*words, *change.what.split()))
        assert changed.gib == pytest.approx(change.gib, rel=0.02), change.what
    assert [c.gib for c in changes] == sorted(c.gib for c in changes)


def test_on_several_gpus_splitting_and_quantising_are_among_the_changes(typed, monkeypatch):
    monkeypatch.setattr(preflight, "make_plan", lambda *_: SimpleNamespace(gib=1.0))
    config = compose(*typed())
    specs, work = specs_of(config), Workload(1, 16, 10, True, 300)
    found = single_changes(specs, config["trainer"], work, Placement("cuda", 8), 0.0)
    what = {change.what for change in found}
    assert {"sharding=teacher", "trainer=fsdp", "teacher.quantization=nf4"} <= what
    split = Placement("cuda", 8, sharded_teacher=True)
    found = single_changes(specs, config["trainer"], work, split, 0.0)
    assert {"teacher.offload=true", "trainer=fsdp"} <= {change.what for change in found}


@pytest.mark.parametrize("value", ["-1", "0", "much", "inf"])
def test_memory_that_no_device_has_is_refused(value, typed):
    from neo.training.consistency import check_config

    config = compose(*typed())
    config["trainer"]["device_memory_gib"] = json.loads(value) if value[-1].isdigit() else value
    with pytest.raises(ConfigError, match=r"trainer.device_memory_gib=.*: must be above 0"):
        check_config(config)


def test_the_memory_of_a_device_is_no_part_of_what_a_run_is(typed):
    plain, given = (compose(*typed(*w)) for w in ((), ("trainer.device_memory_gib=80",)))
    assert run_id(plain) == run_id(given)


def test_a_model_that_cannot_be_planned_is_trained_unless_it_must_fit(typed, monkeypatch, tmp_path):
    from neo.train import train

    def make_plan(*_, **__):
        raise RuntimeError("it looks at values")

    monkeypatch.setattr(preflight, "make_plan", make_plan)
    words = typed("data.max_length=48", f"run_dir={tmp_path}", "dry_run=true")
    assert train(compose_raw(*words)) is None
    with pytest.raises(ConfigError, match=r"cannot be planned \(RuntimeError: it looks at values"):
        train(compose_raw(*words, "trainer.device_memory_gib=80"))
    assert show([plan(compose_raw(*words))]) == 2


def test_planning_needs_neither_the_devices_nor_the_rows(typed, capsys):
    words = [w for w in typed() if w != "trainer=cpu" and not w.startswith("data.path")]
    run = plan(compose_raw(*words, "trainer=gpu", "trainer.devices=8", "data.path=nowhere.jsonl"))
    assert run.plan is not None
    assert run.plan.placement == Placement("cuda", 8)
    assert run.plan.workload.num_supervised == run.plan.workload.num_tokens
    assert show([run]) == 0
    said = capsys.readouterr().out
    assert "all tokens are counted as supervised" in said
    assert "traffic: " in said
    assert "one device" not in said


def test_a_sweep_is_one_table_that_says_which_runs_do_not_fit(typed, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    words = typed()
    gib = [planned(compose(*words, f"data.batch_size={n}")).gib for n in (1, 2)]
    limit = f"trainer.device_memory_gib={sum(gib) / 2}"
    monkeypatch.setattr(sys, "argv", ["neo.plan", "-m", *words, limit, "data.batch_size=1,2"])
    with pytest.raises(SystemExit) as left:
        neo.plan.main()
    assert left.value.code == 1
    printed = capsys.readouterr()
    table = [line for line in printed.out.splitlines() if re.search(" (yes|no), of ", line)]
    assert [" yes, of " in line for line in table] == [True, False]
    assert [" no, of " in line for line in table] == [False, True]
    (problem,) = [line for line in printed.err.splitlines() if "GiB more" in line]
    assert "data.batch_size=2" in problem
    assert not (tmp_path / "runs").exists()


def test_a_config_that_cannot_run_is_refused_with_its_problems(typed, capsys):
    run = plan(compose_raw(*typed("lora.rank=3", "optim.lr=-1")))
    assert show([run]) == 2
    said = capsys.readouterr().err
    assert "lora.rank: not a key" in said
    assert "optim.lr=-1" in said


def test_a_start_that_is_computed_is_said_not_to_be_planned(typed, capsys):
    run = plan(compose_raw(*typed("lora=pissa", "lora.r=4")))
    assert show([run]) == 0
    assert "what computing the branch's start takes" in capsys.readouterr().out


def test_planning_draws_no_random_number(typed):
    before = torch.get_rng_state()
    planned(compose(*typed("lora.lora_dropout=0.1", "data.batch_size=3")))
    assert torch.equal(torch.get_rng_state(), before)


def test_every_family_of_models_can_be_planned(tmp_path, teacher_dir):
    for family in ("qwen2", "gemma2"):
        folder = tiny_model(tmp_path / family, family=family, rows=512)
        rows = write_rows(tmp_path / "rows.jsonl")
        words = [
            f"student.path={folder}", "method=lora", "lora.r=2", "data=jsonl",
            f"data.path={rows}", "data.max_length=32", "data.val_share=0", "trainer=cpu",
        ]  # fmt: skip
        assert planned(compose(*words)).num_bytes > 0


@pytest.mark.slow
@pytest.mark.parametrize("case", ["mini, lora", "mini, none"])
def test_the_plan_is_within_a_tenth_of_what_is_measured(case):
    benchmark = Path(__file__).parents[1] / "benchmarks" / "plan.py"
    sys.path.insert(0, str(benchmark.parent))
    try:
        from plan import GIVEN_BACK, child

        found = child(case, 1, GIVEN_BACK)
    finally:
        sys.path.remove(str(benchmark.parent))
    assert found["planned_gib"] == pytest.approx(found["measured_gib"], rel=0.1)
