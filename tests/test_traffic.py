import pytest
import torch
from lab import tiny_model

from neo.models.causal_lm import CausalLM
from neo.models.student import build_meta_student, inner
from neo.models.traffic import (
    Traffic,
    Unit,
    Units,
    Weight,
    ddp_traffic,
    fsdp_traffic,
    sharded_teacher_traffic,
    units_of,
)
from neo.models.variants import lora, none

BF16, FP32 = torch.bfloat16, torch.float32


def student_units(folder, variant, **keys):
    student = build_meta_student(CausalLM(path=str(folder)), variant)
    return units_of(inner(student), BF16, **keys), student


def unit(*weights):
    return Unit(tuple(Weight(rows, bytes_, 1, trained) for rows, bytes_, trained in weights))


def test_the_units_of_a_model_hold_every_weight_once(student_dir, tmp_path):
    for folder in (student_dir, tiny_model(tmp_path / "tied", tie=True)):
        for variant in (lora(r=3), lora(r=3, use_dora=True), none()):
            units, student = student_units(folder, variant)
            numbers = sum(w.rows * w.row_numbers for u in units.all for w in u.weights)
            assert numbers == sum(p.numel() for p in student.parameters())
            trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
            assert units.gradient() == 4 * trained
            frozen = sum(p.numel() for p in student.parameters()) - trained
            assert units.gathered() == 4 * trained + 2 * frozen
            assert len(units.layers) == 2


def test_an_untied_head_is_a_unit_and_a_tied_one_lies_in_the_backbone(student_dir, tmp_path):
    untied, student = student_units(student_dir, lora(r=3))
    head = inner(student).get_output_embeddings().weight
    assert untied.head is not None
    assert untied.head.gathered() == 2 * head.numel()
    tied, _ = student_units(tiny_model(tmp_path / "tied", tie=True), lora(r=3))
    assert tied.head is None
    assert tied.backbone.gathered() == untied.backbone.gathered()


def test_weights_trained_in_full_may_be_gathered_in_half_precision(student_dir):
    whole, _ = student_units(student_dir, none())
    half, _ = student_units(student_dir, none(), trained=BF16)
    assert whole.gathered() == 2 * half.gathered()
    assert whole.gradient() == half.gradient()  # reduced in float32 all the same


def test_a_weight_is_padded_to_rows_that_all_processes_share_alike():
    weight = Weight(rows=5, row_bytes=6.0, row_numbers=3, trained=True)
    assert (weight.gathered(), weight.gathered(2), weight.gathered(4)) == (30, 36, 48)
    assert (weight.gradient(1), weight.gradient(4)) == (60, 96)
    assert Weight(rows=5, row_bytes=6.0, row_numbers=3, trained=False).gradient(4) == 0


def test_a_ring_moves_all_but_one_of_n_parts_and_an_all_reduce_twice_that():
    assert Traffic(4, all_gather=80).moved == 60
    assert Traffic(4, reduce_scatter=80).moved == 60
    assert Traffic(4, all_reduce=80).moved == 120
    assert Traffic(1, all_gather=80, reduce_scatter=80, all_reduce=80).moved == 0


LAYER = unit((8, 2.0, False), (4, 4.0, True))  # 16 frozen bytes, 16 of a branch
BACKBONE, HEAD = unit((8, 4.0, False)), unit((8, 2.0, False))
STUDENT = Units((LAYER, LAYER), BACKBONE, HEAD)
TEACHER = Units((unit((16, 4.0, False)),) * 3, unit((8, 2.0, False)), None)


def test_ddp_reduces_what_is_trained_once_a_step_and_nothing_frozen_travels():
    traffic = ddp_traffic(STUDENT, 2, num_micro_batches=3)
    assert traffic.step == Traffic(2, all_reduce=2 * 4 * 4)
    assert traffic.micro_batch == Traffic(2)
    assert ddp_traffic(STUDENT, 1).step == Traffic(1)


def test_a_sharded_teacher_is_gathered_for_every_micro_batch():
    traffic = sharded_teacher_traffic(STUDENT, TEACHER, 2, num_micro_batches=3)
    teacher = 3 * 64 + 16
    assert traffic.micro_batch == Traffic(2, all_gather=teacher)
    assert traffic.step == Traffic(2, all_gather=3 * teacher, all_reduce=32)


def test_fsdp_gathers_layers_twice_and_the_rest_once_a_micro_batch():
    gathered = 2 * (16 + 16) * 2 + 32 + 16 + (3 * 64 + 16)
    traffic = fsdp_traffic(STUDENT, TEACHER, 2, num_micro_batches=3)
    assert traffic.micro_batch == Traffic(2, all_gather=gathered, reduce_scatter=32)
    assert traffic.step == traffic.micro_batch * 3
    once = fsdp_traffic(STUDENT, TEACHER, 2, num_micro_batches=3, reduces_once=True)
    assert once.step == Traffic(2, all_gather=3 * gathered, reduce_scatter=32)
    alone = fsdp_traffic(STUDENT, None, 2)
    assert alone.micro_batch.all_gather == gathered - (3 * 64 + 16)


def test_llama_3_2_1b_sends_its_branch_under_ddp_and_twice_its_layers_under_fsdp(llama_1b):
    student = build_meta_student(llama_1b, lora(r=64, target_modules="all-linear"))
    units = units_of(inner(student), BF16)
    branch = 45_088_768
    assert ddp_traffic(units, 8).step.moved == 2 * 4 * branch * 7 // 8
    base, embedding = 1_235_814_400, 128_256 * 2048 + 2048
    gathered = 2 * (2 * (base - embedding) + 4 * branch) + 2 * embedding
    assert fsdp_traffic(units, None, 8).micro_batch.all_gather == gathered
    full = units_of(inner(build_meta_student(llama_1b, none())), BF16)
    # what LoRA saves on the wire under DDP
    ratio = ddp_traffic(full, 8).step.moved / ddp_traffic(units, 8).step.moved
    assert ratio == pytest.approx(base / branch)
