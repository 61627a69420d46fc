import json
import subprocess
import sys

import pytest
import torch
from fits import fit
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from neo.export import export
from neo.models.causal_lm import CausalLM
from neo.models.student import build_student
from neo.models.variants import lora

PROBE = torch.arange(5, 45)[None]


@pytest.fixture(scope="module")
def run(student_dir, teacher_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    fit(student_dir, teacher_dir, folder, "optim.lr=0.05", "trainer.max_steps=5",
        "trainer.max_epochs=-1", "data.batch_size=1")  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def trained_logits(run, student_dir):
    """What the trained student says, its weights taken from the checkpoint of the run."""
    spec = CausalLM(path=str(student_dir))
    variant = lora(r=4, lora_alpha=8, target_modules="all-linear")
    student = build_student(spec, variant, torch.device("cpu"), 0)
    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    missing = student.load_state_dict(
        {name.removeprefix("student."): value for name, value in state.items()}, strict=False
    )
    assert not missing.unexpected_keys
    with torch.no_grad():
        return student.eval()(input_ids=PROBE).logits


def test_the_adapter_gives_the_trained_students_logits_on_the_untouched_base(
    run, student_dir, trained_logits, tmp_path
):
    export(run, tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(student_dir)
    with torch.no_grad():
        untouched = base(input_ids=PROBE).logits
        logits = (
            PeftModel.from_pretrained(base, tmp_path / "adapter").eval()(input_ids=PROBE).logits
        )
    torch.testing.assert_close(logits, trained_logits, rtol=1e-5, atol=1e-5)
    assert (untouched - trained_logits).abs().max() > 0.01


def test_merged_weights_give_the_trained_students_logits(run, trained_logits, tmp_path):
    export(run, tmp_path / "merged", merge=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        logits = model(input_ids=PROBE).logits
    torch.testing.assert_close(logits, trained_logits, rtol=1e-4, atol=1e-4)
    files = {file.name for file in (tmp_path / "merged").iterdir()}
    assert {"tokenizer.json", "generation_config.json", "config.json"} <= files


@pytest.mark.parametrize("merge", [False, True])
def test_what_is_exported_loads_and_generates_in_a_process_without_neo(run, tmp_path, merge):
    export(run, tmp_path / "out", merge=merge)
    load = "AutoModelForCausalLM" if merge else "AutoPeftModelForCausalLM"
    code = f"""
import sys
from transformers import AutoTokenizer
from {"transformers" if merge else "peft"} import {load}
model = {load}.from_pretrained({str(tmp_path / "out")!r})
tokenizer = AutoTokenizer.from_pretrained({str(tmp_path / "out")!r})
chat = [{{"role": "user", "content": "Add 2 and 3."}}]
inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
ids = inputs["input_ids"]
print(model.generate(input_ids=ids, max_new_tokens=3, do_sample=False).shape[1] > ids.shape[1])
print(any(name == "neo" or name.startswith("neo.") for name in sys.modules))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.stdout.split() == ["True", "False"], done.stderr


def test_a_run_that_trained_all_weights_is_exported_whole(student_dir, tmp_path):
    fit(student_dir, None, tmp_path / "run", "method=sft", "trainer.max_steps=1")
    export(tmp_path / "run", tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    torch.testing.assert_close(written, load_file(tmp_path / "run/model/model.safetensors"))


def test_an_export_never_overwrites_unasked(run, tmp_path):
    (tmp_path / "kept.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty; overwrite=true"):
        export(run, tmp_path)
    assert (tmp_path / "kept.txt").read_text() == "mine"
    export(run, tmp_path, overwrite=True)
    assert not (tmp_path / "kept.txt").exists()


def test_a_run_whose_config_names_foreign_code_is_refused(run, tmp_path):
    folder = tmp_path / "run"
    (folder / "adapter").mkdir(parents=True)
    config = (run / "config.yaml").read_text()
    (folder / "config.yaml").write_text(
        config.replace("neo.models.causal_lm.CausalLM", "os.system")
    )
    with pytest.raises(ValueError, match=r"_target_='os.system' is not allowed"):
        export(folder, tmp_path / "out")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run=nowhere", "out=x"], "holds no config.yaml"),
        (["run=nowhere"], "missing mandatory value: out"),
        (["runn=a", "out=x"], "Key 'runn' not in 'ExportConfig'"),
    ],
)
def test_wrong_arguments_end_with_status_2_and_no_traceback(arguments, message, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "neo.export", *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_the_adapter_names_its_base(run, student_dir, tmp_path):
    export(run, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(student_dir)
