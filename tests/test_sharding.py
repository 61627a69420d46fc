import json
import subprocess
import sys

import pytest
import torch
from devices import environment
from lab import tiny_model
from torch import nn

from neo.models.causal_lm import CausalLM
from neo.models.head import gathered, whole
from neo.models.sharding import decoder_layers, is_sharded, reshard

LOAD = """
import json, re, sys, threading
from pathlib import Path
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from neo.models.causal_lm import CausalLM
from neo.models.sharding import sharded_student, sharded_teacher
from neo.models.variants import lora

highest, done = 0, threading.Event()

def anonymous():
    return int(re.search(r"RssAnon:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

def watch():
    global highest
    while not done.wait(0.002):
        highest = max(highest, anonymous())

def load(path):
    spec = CausalLM(path=path)
    yield sharded_student(spec, lora(r=2), mesh, 0, None)
    yield sharded_teacher(spec, mesh, offload=False)

dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))
list(load(sys.argv[2]))
threading.Thread(target=watch).start()
peaks, before = [], anonymous()
for model in load(sys.argv[3]):
    peaks.append(highest - before)
    del model
    before = highest = anonymous()
done.set()
Path(f"{sys.argv[1]}/{dist.get_rank()}.json").write_text(json.dumps(peaks))
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_no_process_ever_holds_a_whole_model(tmp_path):
    warm = tiny_model(tmp_path / "warm")
    folder = tiny_model(tmp_path / "model", hidden=512, layers=24)
    num_bytes = CausalLM(path=str(folder)).meta().num_parameters() * 4
    (tmp_path / "load.py").write_text(LOAD)
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    done = subprocess.run(
        [sys.executable, *torchrun, tmp_path / "load.py", tmp_path, warm, folder],
        capture_output=True,
        text=True,
        env=environment(MALLOC_MMAP_THRESHOLD_="65536"),  # what is freed goes back
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    for rank in (0, 1):
        for peak in json.loads((tmp_path / f"{rank}.json").read_text()):
            # its half, and what is gathered of a layer or two when the head is checked
            assert 0.45 < peak / num_bytes < 0.75, peak / num_bytes


def test_a_model_that_is_not_split_is_told_from_one_that_is(student_dir):
    model = CausalLM(path=str(student_dir)).meta()
    assert not is_sharded(model)
    reshard(model)
    assert len(decoder_layers(model)) == model.config.num_hidden_layers


def test_a_model_without_decoder_layers_cannot_be_split(student_dir):
    model = CausalLM(path=str(student_dir)).meta()
    model.get_decoder().layers = nn.ModuleList()
    with pytest.raises(ValueError, match="no decoder layers"):
        decoder_layers(model)


def test_what_is_not_split_is_whole_as_it_is():
    linear = nn.Linear(2, 3)
    assert whole(linear.weight) is linear.weight
    with gathered(linear):
        assert linear(torch.zeros(1, 2)).shape == (1, 3)
    assert isinstance(linear.weight, nn.Parameter)
