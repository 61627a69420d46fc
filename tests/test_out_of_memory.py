import gc
import re
import subprocess
import sys
import weakref

import pytest
import torch
from fits import checkpoint, fit, trained
from lab import compose, write_rows

from neo.losses import fused
from neo.results.records import read_record
from neo.training import token_loss
from neo.training.module import NeoModule
from neo.training.out_of_memory import (
    OutOfMemory,
    advice_for,
    explained,
    is_out_of_memory,
    shortage,
)

# torch 2.x's words, c10/cuda/CUDACachingAllocator.cpp
CUDA = (
    "CUDA out of memory. Tried to allocate {asked}. GPU 0 has a total capacity of 79.10 GiB of "
    "which {free} is free. Including non-PyTorch memory, this process has 78.56 GiB memory in use. "
    "Of the allocated memory 70.11 GiB is allocated by PyTorch, and {unused} is reserved by "
    "PyTorch but unallocated. If reserved but unallocated memory is large try setting "
    "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True to avoid fragmentation."
)
SETTINGS = ("method=neo", "data.batch_size=4", "data.packing=false", "checkpoint_every_n_steps=1")


def cuda(asked="2.00 GiB", free="540.00 MiB", unused="100.00 MiB"):
    return torch.OutOfMemoryError(CUDA.format(asked=asked, free=free, unused=unused))


@pytest.fixture
def rows(tmp_path):
    return f"data.path={write_rows(tmp_path / 'rows.jsonl')}"


def allocation_error():
    try:
        torch.empty(2**50)
    except RuntimeError as error:
        return error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (cuda(), True),
        (MemoryError(), True),
        (allocation_error(), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (RuntimeError("the power went out"), False),
        (ValueError("can't allocate memory"), False),
    ],
)
def test_what_torch_and_python_raise_without_memory_is_known(error, expected):
    assert is_out_of_memory(error) is expected


def test_by_how_much_it_was_missed_is_read_from_torchs_words():
    assert shortage(str(cuda())) == (
        "2.00 GiB were asked for, 0.53 GiB of 79.10 GiB were free: 1.47 GiB too little"
    )
    pieces = shortage(str(cuda(asked="1.00 GiB", free="200.00 MiB", unused="7.50 GiB")))
    assert "0.80 GiB too little; 7.50 GiB are held unused in pieces" in pieces
    assert "expandable_segments:True" in pieces
    assert shortage("Unable to allocate") is None
    on_cpu = shortage(str(allocation_error()))
    assert re.match(r"4194304\.00 GiB were asked for, [\d.]+ GiB were free: [\d.]+ GiB too", on_cpu)


def test_what_would_help_fits_the_config_and_the_part():
    config = compose("trainer=cpu", "data.batch_size=6", "trainer.accumulate_grad_batches=2")
    config["data"]["batch_size"] = 6
    everything = "\n".join(advice_for(config, "the loss"))
    for word in (
        "data.batch_size=3 trainer.accumulate_grad_batches=4 (was 6 and 2)", "loss.chunk_gib",
        "student.activation_checkpointing=true", "trainer=fsdp", "sharding=teacher",
        "teacher.quantization",
    ):  # fmt: skip
        assert word in everything
    assert "chunk_gib" not in "\n".join(advice_for(config, "the student's forward pass"))
    of_teacher = "\n".join(advice_for(config, "the teacher's forward pass"))
    assert "activation_checkpointing" not in of_teacher
    loading = "\n".join(advice_for(config, "loading a model"))
    assert "batch_size" not in loading
    assert "teacher.quantization" in loading
    config["data"]["batch_size"], config["teacher"]["path"] = 1, None
    config["student"]["activation_checkpointing"] = True
    alone = "\n".join(advice_for(config, "the backward pass"))
    assert "data.max_length below" in alone
    assert "teacher" not in alone.replace("student and teacher", "")
    assert "activation_checkpointing" not in alone


def raising(error):
    def raise_it(*_, **__):
        raise error

    return raise_it


def in_student(patch):
    patch.setattr(token_loss, "hidden_states", raising(cuda()))


def in_teacher(patch):
    hidden_states = token_loss.hidden_states

    def only_without_gradient(*arguments):
        if not torch.is_grad_enabled():
            raise cuda()
        return hidden_states(*arguments)

    patch.setattr(token_loss, "hidden_states", only_without_gradient)


def in_loss(patch):
    patch.setattr(fused, "differentiate_chunk", raising(cuda()))


def in_backward(patch):
    token_sums = NeoModule.token_sums

    def hooked(self, batch, **keys):
        sums = token_sums(self, batch, **keys)
        sums.loss.register_hook(raising(cuda()))
        return sums

    patch.setattr(NeoModule, "token_sums", hooked)


def in_optimizer(patch):
    from torch.optim import adamw

    patch.setattr(adamw.AdamW, "_init_group", raising(cuda()), raising=False)


@pytest.mark.parametrize(
    ("provoke", "part"),
    [
        (in_student, "the student's forward pass"),
        (in_teacher, "the teacher's forward pass"),
        (in_loss, "the loss"),
        pytest.param(in_backward, "the backward pass", marks=pytest.mark.slow),
        pytest.param(in_optimizer, "the optimizer's step", marks=pytest.mark.slow),
    ],
)
def test_a_run_out_of_memory_says_where_and_by_how_much_and_can_be_started_again(
    provoke, part, rows, student_dir, teacher_dir, tmp_path
):
    with pytest.MonkeyPatch.context() as patch:
        provoke(patch)
        with pytest.raises(OutOfMemory) as error:
            fit(student_dir, teacher_dir, tmp_path / "run", *SETTINGS, rows)
    said = str(error.value).splitlines()
    assert said[0].startswith(f"out of memory in {part}: 2.00 GiB were asked for")
    assert said[1] == "What would help:"
    record = read_record(tmp_path / "run" / "record.json")
    assert record.status == "oom"
    assert record.error == f"OutOfMemory: {said[0]}"
    assert fit(student_dir, teacher_dir, tmp_path / "run", *SETTINGS, rows).status == "ok"


@pytest.mark.slow
def test_a_run_that_ran_out_of_memory_goes_on_from_its_checkpoint(
    rows, student_dir, tmp_path, monkeypatch
):
    settings = ("method=lora", "data.packing=false", "checkpoint_every_n_steps=1", "optim.lr=0.01")
    step = NeoModule.training_step

    def second_fails(self, batch, batch_idx):
        if self.trainer.global_step == 1:
            raise MemoryError
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(NeoModule, "training_step", second_fails)
        with pytest.raises(OutOfMemory, match="out of memory"):
            fit(student_dir, None, tmp_path / "run", *settings, rows, "data.batch_size=2")
    assert checkpoint(tmp_path / "run")["global_step"] == 1
    assert fit(student_dir, None, tmp_path / "run", *settings, rows, "data.batch_size=2")
    assert trained(tmp_path / "run")


def test_an_explained_error_holds_no_tensors():
    class Big:
        pass

    def need():
        big = Big()
        kept.append(weakref.ref(big))
        raise MemoryError

    kept = []
    config = compose("trainer=cpu")
    try:
        need()
    except MemoryError as error:
        found = explained(error, config)
        gc.collect()
        assert kept[0]() is None
    assert str(found).startswith("out of memory")


LIMITED = """
import resource, sys, torch
from neo.training.module import NeoModule
step = NeoModule.training_step
def limited(self, batch, i):
    held = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + 2**28, resource.RLIM_INFINITY))
    kept = torch.ones(2**30)  # 4 GiB
    return step(self, batch, i)
NeoModule.training_step = limited
from neo.train import main
main()
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RLIMIT_AS")
def test_a_process_that_may_not_allocate_ends_with_a_message_and_no_traceback(
    rows, student_dir, tmp_path
):
    command = [
        sys.executable, "-c", LIMITED, "data=jsonl", rows, "trainer=cpu", "data.max_length=128",
        f"student.path={student_dir}", "teacher=none", "method=lora", "lora.r=4",
        f"run_dir={tmp_path / 'run'}", "data.batch_size=2",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert re.search(
        r"out of memory: 4\.00 GiB were asked for, 0\.2\d GiB were free: 3\.7\d GiB too little",
        done.stderr,
    )
    assert "What would help:\n  data.batch_size=" in done.stderr
    assert read_record(tmp_path / "run" / "record.json").status == "oom"
