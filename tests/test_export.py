import json
import shutil
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from fits import checkpoint, fit, whole_and_cut
from lab import tiny_model
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from neo.export import OtherLogitsError, export, main
from neo.models import quantization
from neo.models.causal_lm import CausalLM
from neo.models.student import PROBE, build_student
from neo.models.variants import lora

IDS = torch.arange(5, 45)[None]


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
    state = checkpoint(run)["state_dict"]
    missing = student.load_state_dict(
        {name.removeprefix("student."): value for name, value in state.items()}, strict=False
    )
    assert not missing.unexpected_keys
    with torch.no_grad():
        return student.eval()(input_ids=IDS).logits


def test_the_adapter_gives_the_trained_students_logits_on_the_untouched_base(
    run, student_dir, trained_logits, tmp_path
):
    export(run, tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(student_dir)
    with torch.no_grad():
        untouched = base(input_ids=IDS).logits
        logits = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()(input_ids=IDS).logits
    torch.testing.assert_close(logits, trained_logits, rtol=1e-5, atol=1e-5)
    assert (untouched - trained_logits).abs().max() > 0.01


def test_merged_weights_give_the_trained_students_logits(run, trained_logits, tmp_path):
    export(run, tmp_path / "merged", merge=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        logits = model(input_ids=IDS).logits
    torch.testing.assert_close(logits, trained_logits, rtol=1e-4, atol=1e-4)
    files = {file.name for file in (tmp_path / "merged").iterdir()}
    assert {"tokenizer.json", "generation_config.json", "config.json"} <= files


def test_what_is_exported_loads_and_generates_in_a_process_without_neo(run, tmp_path):
    for merge in (False, True):
        export(run, tmp_path / str(merge), merge=merge)
    code = """
import sys
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer
chat = [{"role": "user", "content": "Add 2 and 3."}]
for folder, auto in (("False", AutoPeftModelForCausalLM), ("True", AutoModelForCausalLM)):
    model, tokenizer = auto.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
    ids = inputs["input_ids"]
    answered = model.generate(input_ids=ids, max_new_tokens=3, do_sample=False)
    print(answered.shape[1] > ids.shape[1])
print(any(name == "neo" or name.startswith("neo.") for name in sys.modules))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.stdout.split() == ["True", "True", "False"], done.stderr


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
        (["run=nowhere", "out=x", "bound=0"], "bound=0.0: must be a number above 0"),
    ],
)
def test_wrong_arguments_end_with_status_2_and_a_message(
    arguments, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["neo.export", *arguments])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_adapter_names_its_base(run, student_dir, tmp_path):
    export(run, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(student_dir)


VARIANTS = {
    "pissa": (["lora=pissa"], "pissa, converted to plain LoRA of rank 2r"),
    "olora": (["lora=olora", "lora.use_rslora=true", "lora.lora_alpha=5"],
              "olora, converted to plain LoRA of rank 2r"),
    "pissa with dora": (["lora=pissa", "lora.use_dora=true"], "pissa, converted to plain LoRA"),
    "moslora": (["lora=moslora"], "MoSLoRA, folded into plain LoRA"),
}  # fmt: skip
SETTINGS = ("optim.lr=0.02", "trainer.max_steps=3", "trainer.max_epochs=-1", "data.batch_size=1")


@pytest.fixture(scope="module", params=VARIANTS)
def variant_run(request, student_dir, tmp_path_factory):
    choices, said = VARIANTS[request.param]
    folder = tmp_path_factory.mktemp("variant")
    fit(student_dir, None, folder, "method=lora", *choices, *SETTINGS)
    return folder, said


@pytest.mark.parametrize("merge", [False, True])
def test_the_export_of_every_variant_says_its_conversion_and_the_difference_it_measured(
    variant_run, student_dir, tmp_path, merge
):
    run, said = variant_run
    done = export(run, tmp_path / "out", merge=merge)
    assert said in done.what
    assert done.bound == 1e-4
    assert done.share < 1e-5
    probe = load_file(run / PROBE)
    if merge:
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    else:
        base = AutoModelForCausalLM.from_pretrained(student_dir)
        with torch.no_grad():
            untouched = base(input_ids=probe["input_ids"]).logits
        assert (untouched - probe["logits"]).abs().max() > 100 * done.difference
        model = PeftModel.from_pretrained(base, tmp_path / "out").eval()
    with torch.no_grad():
        logits = model(input_ids=probe["input_ids"]).logits
    difference = (logits - probe["logits"]).abs().max().item()
    assert done.difference == pytest.approx(difference, rel=0.2, abs=1e-6)


@pytest.mark.parametrize("choice", ["pissa_fast", "olora"])
def test_a_stopped_run_goes_on_from_the_same_base_and_exports_the_same_adapter(
    student_dir, tmp_path, choice
):
    settings = ["method=lora", f"lora={choice}", "trainer.max_steps=4", "trainer.max_epochs=-1",
                "data.batch_size=2", "data.packing=false", "optim.lr=0.01",
                "checkpoint_every_n_steps=2"]  # fmt: skip
    expected, actual = whole_and_cut(student_dir, None, tmp_path, *settings)
    assert expected.keys() == actual.keys()
    assert all(torch.equal(value, actual[name]) for name, value in expected.items())
    probes = [load_file(tmp_path / name / PROBE)["logits"] for name in ("whole", "cut")]
    assert torch.equal(*probes)
    assert export(tmp_path / "cut", tmp_path / "out").share < 1e-5


@pytest.fixture
def corrupted(run, tmp_path):
    """A run, one weight of whose adapter is wrong."""
    folder = shutil.copytree(run, tmp_path / "corrupted")
    file = folder / "adapter" / "adapter_model.safetensors"
    state = load_file(file)
    next(value for name, value in state.items() if "lora_B" in name)[0, 0] += 1
    save_file(state, file, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("merge", ["false", "true"])
def test_a_corrupted_export_fails_with_the_bound_and_leaves_nothing(
    corrupted, tmp_path, monkeypatch, capsys, merge
):
    out = tmp_path / "out"
    arguments = ["neo.export", f"run={corrupted}", f"out={out}", f"merge={merge}"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 1
    said = capsys.readouterr().err
    assert "nothing was exported" in said
    assert "of the largest; bound=0.0001)" in said
    assert not out.exists()
    out.mkdir()
    (out / "kept.txt").write_text("of the export before")
    with pytest.raises(OtherLogitsError):
        export(corrupted, out, merge=merge == "true", overwrite=True)
    assert [file.name for file in out.iterdir()] == ["kept.txt"]
    assert export(corrupted, out, overwrite=True, bound=10).share > 1e-4
    assert (out / "adapter_config.json").is_file()


def test_an_adapter_on_another_base_than_the_runs_is_not_exported(run, student_dir, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run")
    base = shutil.copytree(student_dir, tmp_path / "base")
    state = load_file(base / "model.safetensors")
    state["model.norm.weight"] *= 1.01
    save_file(state, base / "model.safetensors", metadata={"format": "pt"})
    config = (folder / "config.yaml").read_text().replace(str(student_dir), str(base))
    (folder / "config.yaml").write_text(config)
    with pytest.raises(OtherLogitsError, match="nothing was exported"):
        export(folder, tmp_path / "out")


def test_a_run_in_bfloat16_is_measured_in_bfloat16(student_dir, tmp_path):
    for choice in ("lora", "pissa"):
        folder = tmp_path / choice
        fit(student_dir, None, folder, "method=lora", f"lora={choice}", "student.dtype=bfloat16",
            *SETTINGS, "optim.lr=0.002")  # fmt: skip
        done = export(folder, folder / "out")
        assert done.bound == 5e-2
        assert (done.share == 0) == (choice == "lora")


def test_a_run_without_a_probe_is_refused(run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run")
    (folder / PROBE).unlink()
    with pytest.raises(ValueError, match=r"holds no checkpoints/probe.safetensors"):
        export(folder, tmp_path / "out")
    (folder / PROBE).write_text("no tensors")
    with pytest.raises(ValueError, match=r"probe.safetensors: cannot be read"):
        export(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_export_never_replaces_the_run_itself(run):
    for out in (run, run.parent):
        with pytest.raises(ValueError, match="holds the run itself"):
            export(run, out, overwrite=True)
    assert (run / "adapter").is_dir()


def test_a_branch_on_a_base_that_was_drawn_is_exported_merged(student_dir, tmp_path):
    fit(student_dir, None, tmp_path / "run", "method=lora", "student.random_init=true",
        "seed=3", *SETTINGS)  # fmt: skip
    with pytest.raises(ValueError, match=r"student.random_init=true: .*merge=true writes both"):
        export(tmp_path / "run", tmp_path / "out")
    assert export(tmp_path / "run", tmp_path / "out", merge=True).share < 1e-5


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs pip install 'llm-neo[quant]'")
def test_a_branch_on_4_bits_is_merged_into_the_weights_it_was_trained_on(tmp_path, monkeypatch):
    base = tiny_model(tmp_path / "base", hidden=64, seed=1)  # rows of whole blocks, for a CPU
    monkeypatch.setattr(quantization, "_no_device", lambda accelerator: None)  # a CPU will do
    run = tmp_path / "run"
    fit(base, None, run, "lora=qlora", "method=lora", "optim.lr=0.05",
        "trainer.max_steps=5", "trainer.max_epochs=-1", "data.batch_size=1")  # fmt: skip
    adapter = export(run, tmp_path / "adapter")
    assert adapter.what == "a PEFT adapter (as trained, for its base in nf4)"
    merged = export(run, tmp_path / "merged", merge=True)
    assert "dequantised" in merged.what
    assert max(adapter.share, merged.share) < 1e-4
    probe = load_file(run / PROBE)
    full = AutoModelForCausalLM.from_pretrained(base)
    elsewhere = PeftModel.from_pretrained(full, tmp_path / "adapter").eval()
    with torch.no_grad():
        assert (elsewhere(input_ids=probe["input_ids"]).logits - probe["logits"]).abs().max() > 0.1
