"""Laws of every file in conf/lora, found in the folder: a new file is held to them unasked."""

import json
import shutil
import subprocess
import sys
from functools import cache
from importlib.util import find_spec

import pytest
import torch
from fits import whole_and_cut
from lab import calibration, compose, tiny_model, tokenizer, write_rows
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora.layer import LoraLayer

from neo.config import build, conf_dir, validate
from neo.models import quantization
from neo.models.causal_lm import CausalLM
from neo.models.lora_fa import freeze_a
from neo.models.quantization import dequantized
from neo.models.start import Start, attach_branch, start_of
from neo.models.student import (
    build_meta_student,
    build_student,
    save_student,
    trained_parameters,
)
from neo.models.variants import Variant
from neo.training.module import NeoModule
from neo.training.random_state import restore_random_state

CPU = torch.device("cpu")
IDS = torch.tensor([[5, 6, 7, 8, 9, 3, 4], [11, 12, 13, 2, 1, 40, 41]])


def variant_files(folder):
    return sorted((folder / "lora").glob("*.yaml"))


FILES = variant_files(conf_dir())
NAMES = [file.stem for file in FILES]
WHOLE = [file.stem for file in FILES if "neo.models.variants.none" in file.read_text()]
BRANCHES = [name for name in NAMES if name not in WHOLE]
QUANTIZED = [file.stem for file in FILES if "quantization:" in file.read_text()]
# The untouched base of the others is one in 4 bits: test_export.
WITHOUT_NEO = [name for name in BRANCHES if name not in QUANTIZED]
CUTTING = [file.stem for file in FILES if "kasa_config:" in file.read_text()]
needs_bitsandbytes = pytest.mark.skipif(
    find_spec("bitsandbytes") is None, reason="needs pip install 'llm-neo[quant]'"
)


def each(names):
    """The names, those on a 4-bit base only where bitsandbytes is."""
    return [pytest.param(n, marks=needs_bitsandbytes if n in QUANTIZED else ()) for n in names]


# in, out of the layers of Llama-3.2-1B: q, k, v, o, gate, up, down; 16 of each
SHAPES = 16 * [(2048, 2048), (2048, 512), (2048, 512), (2048, 2048), (2048, 8192), (2048, 8192),
               (8192, 2048)]  # fmt: skip


def chosen(name):
    """The command line that takes the variant, at a rank that fits the tiny models."""
    return [f"lora={name}", *(["method=sft"] if name in WHOLE else ["method=lora", "lora.r=4"])]


@cache
def composed(name):
    return compose(*chosen(name), "optim.lr=0.02")


def variant_of(name, **keys):
    return build({**composed(name)["lora"], **({} if name in WHOLE else keys)})


def spec_of(name, folder):
    return CausalLM(path=str(folder), quantization=composed(name)["student"].get("quantization"))


def attached(name, folder):
    spec = spec_of(name, folder)
    return build_student(spec, variant_of(name), CPU, 0, calibration=calibration()).eval()


def on_whole_weights(name, student, folder):
    """The student on a base that a branch can be added into: one not in 4 bits."""
    if name not in QUANTIZED:
        return student
    base = dequantized(spec_of(name, folder).load(CPU, trained=False))
    whole = attach_branch(base, variant_of(name), 0)
    set_peft_model_state_dict(whole, get_peft_model_state_dict(student))
    return whole.eval()


def train(name, student, steps=3):
    """A few steps with the optimizer that the file asks for."""
    optimizer = build(composed(name)["optim"]).build(trained_parameters(student))
    step(student, optimizer, steps)
    return student


def step(student, optimizer, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        student(IDS, labels=IDS).loss.backward()
        optimizer.step()


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.fixture
def folder(name, student_dir, tmp_path):
    """The base: in 4 bits, one of whole blocks of 64, for others a CPU multiplies wrongly."""
    return tiny_model(tmp_path / "base", hidden=64, seed=1) if name in QUANTIZED else student_dir


@pytest.fixture
def base_logits(name, folder):
    base = spec_of(name, folder).load(CPU, trained=False)
    if name in CUTTING:  # its paper begins with another base
        for path, layer in attached(name, folder).named_modules():
            if not isinstance(layer, LoraLayer):
                continue
            weight = base.get_submodule(path.removeprefix("base_model.model.")).weight
            u, s, v = torch.linalg.svd(weight.double(), full_matrices=False)
            r = layer.r["default"]
            weight.data = ((u[:, :-r] * s[:-r]) @ v[:-r]).float()
    return logits(base)


def test_the_folder_holds_a_variant_with_a_branch_and_one_without():
    assert BRANCHES
    assert WHOLE


@pytest.mark.parametrize("name", NAMES)
def test_composing_it_builds_a_variant(name):
    config = composed(name)
    validate(config)
    variant = build(config["lora"])
    assert isinstance(variant, Variant)
    assert (variant.adapter is None) == (name in WHOLE)


@pytest.mark.parametrize("name", each(NAMES))
def test_attaching_it_changes_no_output(name, folder, base_logits):
    student = attached(name, folder)
    torch.testing.assert_close(logits(student), base_logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits(student.train()), base_logits, rtol=0, atol=1e-5)


def test_a_wrong_variant_in_the_folder_is_found_and_seen(student_dir, tmp_path, monkeypatch):
    folder = tmp_path / "conf"
    shutil.copytree(conf_dir(), folder)
    wrong = "# B begins at random.\ndefaults: [lora, _self_]\ninit_lora_weights: false\n"
    (folder / "lora" / "wrong.yaml").write_text(wrong)
    assert {file.stem for file in variant_files(folder)} == {*NAMES, "wrong"}
    monkeypatch.setattr("neo.train.conf_dir", lambda: folder)
    test_composing_it_builds_a_variant("wrong")
    base = logits(CausalLM(path=str(student_dir)).load(CPU, trained=False))
    with pytest.raises(AssertionError, match="not close"):
        test_attaching_it_changes_no_output("wrong", student_dir, base)


@pytest.mark.parametrize("name", each(NAMES))
def test_only_its_own_parameters_train_and_all_of_them(name, student_dir):
    student = attached(name, student_dir)
    names = set(trained_parameters(student))
    if name in WHOLE:
        assert names == {name for name, _ in student.named_parameters()}
    else:
        assert names
        assert all("lora_" in parameter for parameter in names)
    before = {n: p.detach().clone() for n, p in student.named_parameters()}
    train(name, student)
    changed = {n for n, p in student.named_parameters() if not torch.equal(p, before[n])}
    assert changed == names


@pytest.mark.parametrize("name", each(BRANCHES))
def test_merged_it_equals_the_branch_after_a_few_steps(name, folder, base_logits):
    student = train(name, attached(name, folder))
    expected = logits(student)
    assert (expected - base_logits).abs().max() > 0.1
    merged = on_whole_weights(name, student, folder).merge_and_unload(safe_merge=True)
    assert not any("lora_" in parameter for parameter, _ in merged.named_parameters())
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-4)


LOADED = """
import json, sys
from pathlib import Path
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
found = {}
for folder in sorted(Path("saved").iterdir()):
    probe = load_file(folder / "checkpoints" / "probe.safetensors")
    base = AutoModelForCausalLM.from_pretrained(sys.argv[1])
    with torch.no_grad():
        untouched = base(probe["input_ids"]).logits
        logits = PeftModel.from_pretrained(base, folder / "adapter")(probe["input_ids"]).logits
    found[folder.name] = [
        (logits - probe["logits"]).abs().max().item(), (untouched - logits).abs().max().item()
    ]
assert not any(name.split(".")[0] in ("neo", "lab", "fits") for name in sys.modules)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def loaded_without_neo(student_dir, tmp_path_factory):
    """By variant: how far plain PEFT's logits are from the student's, and from the base's."""
    folder = tmp_path_factory.mktemp("without_neo")
    for name in WITHOUT_NEO:
        save_student(train(name, attached(name, student_dir)), tokenizer(), folder / "saved" / name)
    done = subprocess.run(
        [sys.executable, "-c", LOADED, str(student_dir)],
        capture_output=True, text=True, cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", WITHOUT_NEO)
def test_saved_it_gives_the_trained_logits_in_a_process_without_neo(name, loaded_without_neo):
    off, moved = loaded_without_neo[name]
    assert off < 1e-4
    assert moved > 0.1


def num_trained(variant, r):
    """The closed form of what a variant trains in Llama-3.2-1B, all linear layers but the head."""
    total = 0
    for width, rows in SHAPES:
        total += 0 if variant.finish is freeze_a else r * width  # A
        total += rows * r  # B
        total += rows if variant.adapter.use_dora else 0  # a magnitude per row
        total += r * r if hasattr(variant.adapter, "mixer") else 0
        total += r if variant.adapter.kasa_config else 0  # singular values
    return total


@pytest.mark.parametrize(
    ("name", "r", "plain"),
    [(name, 64, 45_088_768) for name in NAMES] + [("lora", 128, 90_177_536)],
)
def test_in_llama_3_2_1b_it_trains_what_the_closed_form_says(name, r, plain, llama_1b):
    variant = variant_of(name, r=r)
    student = build_meta_student(llama_1b, variant)
    assert all(p.is_meta for p in student.parameters())
    trains = sum(p.numel() for p in trained_parameters(student).values())
    if name in WHOLE:
        assert trains == 1_235_814_400
    else:
        assert variant.adapter.r == r
        assert trains == num_trained(variant, r)
    if name == "lora":
        assert trains == plain


def module_of(name, folder, start):
    variant, config = variant_of(name, lora_dropout=0.3), composed(name)
    spec, loss, optim = spec_of(name, folder), build(config["loss"]), build(config["optim"])
    module = NeoModule(spec, None, variant, loss, optim, vocab=len(tokenizer()), start=start)
    module.configure_model()
    return module, module.configure_optimizers()


@pytest.mark.parametrize("name", each(NAMES))
def test_it_goes_on_from_a_checkpoint_as_if_it_had_never_stopped(name, student_dir, tmp_path):
    torch.manual_seed(0)
    whole, optimizer = module_of(name, student_dir, start_of(attached(name, student_dir)))
    step(whole.student, optimizer, 2)
    checkpoint = {"state_dict": whole.state_dict(), "optimizer": optimizer.state_dict()}
    whole.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, tmp_path / "last.ckpt")
    step(whole.student, optimizer, 2)

    torch.manual_seed(1)
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    kept = checkpoint["neo"]["start"]
    resumed, optimizer = module_of(name, student_dir, Start(**kept) if kept else None)
    resumed.on_load_checkpoint(checkpoint)
    resumed.load_state_dict(checkpoint["state_dict"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    restore_random_state(resumed.restored_rng, 0, 0, (0, 0))
    step(resumed.student, optimizer, 2)
    weights = dict(resumed.student.named_parameters())
    for parameter, value in whole.student.named_parameters():  # the frozen ones too
        assert torch.equal(weights[parameter], value), parameter


@pytest.mark.slow
@pytest.mark.parametrize("name", each(NAMES))
def test_a_stopped_run_of_it_ends_as_if_it_had_never_stopped(
    name, student_dir, tmp_path, monkeypatch
):
    monkeypatch.setattr(quantization, "_no_device", lambda accelerator: None)  # a CPU will do
    settings = [
        *chosen(name), "trainer.max_steps=4", "trainer.max_epochs=-1", "data.batch_size=2",
        "data.packing=false", f"data.path={write_rows(tmp_path / 'rows.jsonl')}", "optim.lr=0.01",
        "checkpoint_every_n_steps=2",
        *([] if name in WHOLE else ["lora.lora_dropout=0.1"]),
    ]  # fmt: skip
    expected, actual = whole_and_cut(student_dir, None, tmp_path, *settings)
    assert expected.keys() == actual.keys()
    for parameter, value in expected.items():
        torch.testing.assert_close(actual[parameter], value, rtol=0, atol=0)
