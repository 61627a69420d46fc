import copy
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from lab import ROWS, compose, compose_raw, tiny_model, write_rows
from omegaconf import OmegaConf
from transformers import AutoTokenizer

import neo.models.causal_lm
import neo.train
from neo.config import ConfigError, run_id
from neo.models.causal_lm import CausalLM

# What is typed after a command line that runs -> what the refusal must say, piece by piece. {name}
# is a file or folder of the `lab` fixture.
REFUSED = {
    # what Hydra finds while it composes
    "misspelt group": ("lorra=lora", "lorra: no such group or key (did you mean lora?)", "teacher"),
    "misspelt choice": (
        "lora=lorra",
        "Could not find 'lora/lorra'",
        "Available options in 'lora'",
        "none",
    ),
    "misspelt root key": (
        "sedd=1",
        "sedd: no such group or key (did you mean seed?)",
        "eval_split",
    ),
    "root key added by force": ("++sedd=1", "sedd: no such group or key"),
    "group that is null": ("trainer=null", "trainer=null: a group takes the name of a file"),
    "root key of the wrong type": ("seed=abc", "Value 'abc'", "Integer", "full_key: seed"),
    "mandatory value missing": ("data.path=???", "data.path: missing"),
    "group missing": ("~optim", "optim: missing"),
    "text where a number is multiplied": (
        "optim.base_lr=fast",
        "'fast' times 10: both must be numbers",
    ),
    # what binding every key to its target's signature finds
    "misspelt key": ("lora.rr=3", "lora.rr: not a key of", "did you mean r?", "lora_dropout"),
    "misspelt key of a dataclass": (
        "optim.wait_decay=0.1",
        "did you mean weight_decay?",
        "warmup_ratio",
    ),
    "misspelt key of the trainer": (
        "trainer.max_step=3",
        "trainer.max_step: not a key",
        "max_steps",
    ),
    "misspelt key inside a partial": (
        "loss=jsd ++loss.divergence.bta=0.1",
        "loss.divergence.bta: not a key",
        "did you mean beta?",
    ),
    "misspelt key of Hydra's": (
        "loss.divergence._partal_=true",
        "loss.divergence._partal_: not a key",
    ),
    "text for an integer": ("data.batch_size=x", "data.batch_size='x': must be an integer"),
    "fraction for an integer": ("lora.r=2.5", "lora.r=2.5: must be an integer"),
    "text for trainer's integer": (
        "trainer.max_steps=ten",
        "trainer.max_steps='ten': must be an integer",
    ),
    "text for a switch": (
        "lora.use_rslora=maybe",
        "lora.use_rslora='maybe': must be true or false",
    ),
    "number for a path": ("student.path=5", "student.path=5: must be a text or null"),
    "unknown precision": (
        "trainer.precision=bf17",
        "trainer.precision='bf17': must be one of 64, 32, 16",
    ),
    "target that is not ours": (
        "data._target_=os.system",
        "data: _target_='os.system' is not allowed",
    ),
    "target that unpickles": (
        "optim._target_=torch.load",
        "optim: _target_='torch.load' is not allowed",
    ),
    "target by a detour": ("data._target_=neo.train.os.system", "_target_='neo.train.os.system'"),
    "target that a module imported": (
        "data._target_=neo.data.files.load_dataset",
        "not a class or function of its module",
    ),
    "target that is a module's module": (
        "data._target_=neo.data.files.gzip.open",
        "_target_='neo.data.files.gzip.open' does not exist",
    ),
    "target deep inside": (
        "++loss.divergence._target_=os.system",
        "loss.divergence: _target_='os.system' is not allowed",
    ),
    "target that does not exist": ("optim._target_=neo.training.optim.Adam", "does not exist"),
    "target of another group": (
        "logger._target_=neo.models.variants.none",
        "logger._target_=",
        "must be one of neo.training.loggers.",
    ),
    # what building the specs finds
    "r of 0": ("lora.r=0", "lora.r=0: must be an integer of at least 1"),
    "negative alpha": ("lora.lora_alpha=-1", "lora.lora_alpha=-1: must be a number above 0"),
    "dropout of 1": ("lora.lora_dropout=1", "lora.lora_dropout=1", "must lie in [0, 1)"),
    "no target modules": (
        "lora.target_modules=[]",
        "lora.target_modules=[]: must name at least one layer",
    ),
    "kd_ratio above 1": ("loss.kd_ratio=1.5", "loss.kd_ratio=1.5: must lie in [0, 1]"),
    "kd_ratio below 0": ("loss.kd_ratio=-0.1", "loss.kd_ratio=-0.1: must lie in [0, 1]"),
    "negative temperature": (
        "loss.temperature=-1",
        "loss.temperature=-1.0: must be a finite number above 0",
    ),
    "temperature of 0": (
        "loss.temperature=0",
        "loss.temperature=0.0: must be a finite number above 0",
    ),
    "temperature in the divergence": (
        "loss.divergence.temperature=2",
        "loss.divergence.temperature: set loss.temperature",
    ),
    "learning rate of 0": ("optim.lr=0", "optim.lr=0.0: must be a finite number above 0"),
    "unknown schedule": (
        "optim.schedule=cosin",
        "optim.schedule='cosin': must be one of cosine, linear",
    ),
    "unknown dtype": ("student.dtype=fp8", "student.dtype='fp8': must be one of auto, float32"),
    "unknown schema": ("data.schema=chat", "data.schema='chat': must be null or one of messages"),
    "val_share of 1": ("data.val_share=1", "data.val_share=1.0: must be at least 0 and below 1"),
    # what the method asks of the rest
    "teacher on no device of this machine": (
        "teacher.device=cuda:99",
        "teacher.device='cuda:99': this machine has none; it has cpu",
    ),
    "teacher in groups of 48": (
        "teacher.quantization_group_size=48",
        "teacher.quantization_group_size=48: is of quantization=int4, and that is None",
    ),
    "teacher missing": (
        "teacher.path=null",
        "teacher.path=null: loss.kd_ratio=0.5 needs a teacher",
    ),
    "sft with a teacher in the loss": (
        "method=sft loss.kd_ratio=0.5",
        "loss.kd_ratio=0.5: method=sft has no teacher in its loss",
    ),
    "sft with a branch": ("method=sft lora=lora", "lora: method=sft trains all weights"),
    "neo without a branch": ("lora=none", "lora: method=neo trains a LoRA branch"),
    "unknown method": ("method.name=dpo", "method.name='dpo': must be one of sft, lora, kd, neo"),
    "exact answers of one's own rows": ("eval_split=test", "eval_split='test': only data=mini"),
    "unknown split": ("eval_split=dev", "eval_split='dev': must be null, val or test"),
    "negative seed": ("seed=-1", "seed=-1: must lie in [0, 2**32)"),
    "experiment outside runs": ("experiment_name=../x", "experiment_name='../x': must be a name"),
    "no checkpoints": (
        "checkpoint_every_n_steps=0",
        "checkpoint_every_n_steps=0: must be at least 1",
    ),
    "no checkpoint kept": ("keep_last=0", "keep_last=0: must be at least 1"),
    "fewer than no best": ("keep_best=-1", "keep_best=-1: must be at least 0"),
    "fewer than no skipped steps": (
        "max_skipped_steps=-1",
        "max_skipped_steps=-1: must be at least 0",
    ),
    # what Lightning's Trainer refuses, and what it would only trip over
    "accelerator that is not there": (
        "trainer.accelerator=tpu",
        "trainer (accelerator=tpu, devices=1): ",
    ),
    "unknown accelerator": (
        "trainer.accelerator=tpuu",
        "accelerator='tpuu'",
        "Available names are: auto",
    ),
    "no devices": (
        "trainer.devices=0",
        "trainer (accelerator=cpu, devices=0)",
        "not a valid input",
    ),
    "unknown strategy": ("trainer.strategy=ddpp", "strategy='ddpp'", "must be one of auto, ddp"),
    "fp16 on a CPU": ("trainer.precision=16-mixed", "trainer.precision='16-mixed': a CPU has none"),
    "no accumulation": ("trainer.accumulate_grad_batches=0", "must be an integer of at least 1"),
    "never logs": (
        "trainer.log_every_n_steps=0",
        "trainer.log_every_n_steps=0: must be an integer of",
    ),
    "never validates": (
        "trainer.val_check_interval=0",
        "trainer.val_check_interval=0: must be an integer",
    ),
    "negative clipping": (
        "trainer.gradient_clip_val=-1",
        "trainer.gradient_clip_val=-1",
        "or null for none",
    ),
    "endless": (
        "trainer.max_epochs=-1",
        "trainer.max_steps=-1 and trainer.max_epochs=-1: one of them",
    ),
    "no steps": ("trainer.max_steps=0", "trainer.max_steps=0: must be at least 1, or -1"),
    "a callback": ("trainer.callbacks=[]", "trainer.callbacks: is set by the run itself"),
    "trainer without a key": ("~trainer.max_steps", "trainer.max_steps: missing"),
    # what the models and the data are, and are to each other
    "student folder missing": (
        "student.path={lab}/none",
        "student.path=",
        "there is no such folder",
    ),
    "student neither folder nor on the hub": (
        "student.path=models/nome",
        "there is no such folder, and as a model of the hub it cannot be read",
    ),
    "model that is not shipped": ("student.path=neo://mini", "must be one of neo://mini-student"),
    "folder without a config": ("student.path={lab}/empty", "the folder has no config.json"),
    "weights that are a pickle": (
        "student.path={lab}/pickled",
        "only pytorch_model.bin, and a pickle can run code",
        "*.safetensors",
    ),
    "folder without weights": (
        "teacher.path={lab}/no_weights",
        "teacher.path=",
        "holds no weights",
    ),
    "model type unknown": ("student.path={lab}/unknown_type", "model type `llamma`"),
    "model that is no causal LM": (
        "student.path={lab}/t5",
        "cannot be built as a causal LM",
        "T5Config",
    ),
    "config that is not JSON": (
        "student.path={lab}/broken_config",
        "student.path=",
        "not a valid JSON",
    ),
    "tokenizer that is not JSON": ("student.path={lab}/broken_tokenizer", "student.path="),
    "code beside the weights": (
        "student.path={lab}/code",
        "Python code of its own, which is run only with trust_remote_code=true",
    ),
    "unknown attention": (
        "student.attn_implementation=flush",
        "with attn_implementation='flush'",
        "eager",
    ),
    "unequal tokenizers": (
        "teacher.path={lab}/other_ids",
        "teacher.path=",
        "2 tokens have other ids",
        "'!' is 4 and 5",
    ),
    "unequal special tokens": (
        "teacher.path={lab}/other_eos",
        "eos_token is '<|im_end|>' and '<|im_start|>'",
    ),
    "vocabulary larger than the head": (
        "teacher.path={lab}/small_head",
        "its head has 400 rows, the student's tokenizer",
    ),
    "max_length past the models'": (
        "data.max_length=257",
        "data.max_length=257: the student takes at most 256 tokens",
        "the teacher takes at most 256",
    ),
    "target modules that match nothing": (
        "lora.target_modules=[q_prj]",
        "lora.target_modules=['q_prj']: match no layer",
        "q_proj",
    ),
    "pattern that matches nothing": ("lora.target_modules=.*prj", "lora.target_modules=['.*prj']"),
    "LoRA+ over a frozen A": (
        "lora=lora_fa optim.loraplus_lr_ratio=16",
        "optim.loraplus_lr_ratio=16",
        "not both are trained",
    ),
    "DoRA on the head": (
        "lora.target_modules=[lm_head] lora.use_dora=true",
        "lora: the head of LlamaForCausalLM has a LoRA branch of the variant Dora",
        "legal are a plain torch.nn.Linear, one plain LoRA branch",
    ),
    "data file missing": ("data.path={lab}/none.jsonl", "none.jsonl", "no such file or folder"),
    "row that is not JSON": ("data.path={lab}/broken.jsonl", "broken.jsonl, line 3: not JSON"),
    "columns unknown": ("data.path={lab}/columns.csv", "columns", "instruction", "messages"),
    "format unknown": ("data.path={lab}/rows.txt", "rows.txt is of no known format", ".jsonl"),
    "rows none of which can be used": ("data.path={lab}/bad.jsonl", "none of the 4 rows", "empty"),
    "too few rows to hold some out": ("data.path={lab}/one.jsonl", "data.val_share=0.2", "1 rows"),
    "no chat template": ("student.path={lab}/no_template", "data.chat_template=null", "chatml"),
    "unknown chat template": (
        "data.chat_template=chatlm",
        "data.chat_template='chatlm': must be",
        "chatml",
    ),
    "run_dir of another run": (
        "run_dir={lab}/other_run",
        "holds run 0123abcd, this config is run",
        "choose another folder",
    ),
    "run_dir of another run that was killed": (
        "run_dir={lab}/killed_run",
        "holds run",
        "this config is run",
    ),
    "run_dir whose record is damaged": (
        "run_dir={lab}/damaged_run",
        "what it holds cannot be read",
    ),
    "run_dir that is a file": ("run_dir={lab}/rows.jsonl", "rows.jsonl is not a folder"),
}


@pytest.fixture(scope="module")
def lab(tmp_path_factory, student_dir, teacher_dir):
    """Everything that is wrong, each thing in a file or folder of its own."""
    folder = tmp_path_factory.mktemp("lab")

    def copy_of(model, name):
        return shutil.copytree(model, folder / name)

    def edit(file, **changes):
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    write_rows(folder / "rows.jsonl")
    write_rows(folder / "rows.txt")
    write_rows(folder / "one.jsonl", ROWS[:1])
    write_rows(folder / "bad.jsonl", [{"prompt": f"{i}", "completion": ""} for i in range(4)])
    with write_rows(folder / "broken.jsonl", ROWS[:2]).open("a") as file:
        file.write("{'prompt': 1}\n")
    (folder / "columns.csv").write_text("question,reply\na,b\n")
    (folder / "empty").mkdir()
    pickled = copy_of(student_dir, "pickled")
    (pickled / "model.safetensors").unlink()
    torch.save({}, pickled / "pytorch_model.bin")
    (copy_of(teacher_dir, "no_weights") / "model.safetensors").unlink()
    edit(copy_of(student_dir, "unknown_type") / "config.json", model_type="llamma")
    (copy_of(student_dir, "broken_config") / "config.json").write_text("{")
    (copy_of(student_dir, "broken_tokenizer") / "tokenizer.json").write_text("{}")
    t5 = copy_of(student_dir, "t5")
    (t5 / "config.json").write_text('{"model_type": "t5", "vocab_size": 500}')
    code = copy_of(student_dir, "code")
    edit(code / "config.json", model_type="mine", auto_map={"AutoConfig": "mine.Mine"})
    (code / "mine.py").write_text(f"open({str(folder / 'code_was_run')!r}, 'w')")
    other = copy_of(teacher_dir, "other_ids")
    swapped = json.loads((other / "tokenizer.json").read_text())
    vocab = swapped["model"]["vocab"]
    first, second = sorted(vocab, key=vocab.get)[4:6]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (other / "tokenizer.json").write_text(json.dumps(swapped))
    eos = copy_of(teacher_dir, "other_eos")
    changed = AutoTokenizer.from_pretrained(eos)
    changed.eos_token = "<|im_start|>"
    changed.save_pretrained(eos)
    tiny_model(folder / "small_head", rows=400)
    plain = copy_of(student_dir, "no_template")
    (plain / "chat_template.jinja").unlink()
    other_run, damaged = folder / "other_run", folder / "damaged_run"
    other_run.mkdir()
    damaged.mkdir()
    write_run_record(other_run)
    (damaged / "record.json").write_text("{")
    (folder / "killed_run").mkdir()
    (folder / "killed_run" / "config.yaml").write_text("seed: 7\n")
    return folder


def write_run_record(folder):
    from example_runs import example_run

    from neo.results.records import write_record

    write_record(example_run(run_id="0123abcd"), folder)


@pytest.fixture(scope="module")
def base(lab, student_dir, teacher_dir):
    """A command line that runs."""
    return [
        f"student.path={student_dir}", f"teacher.path={teacher_dir}", "data=jsonl",
        f"data.path={lab}/rows.jsonl", "data.max_length=64", "data.val_share=0.2", "trainer=cpu",
        "lora.r=4",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def composed(base):
    return compose_raw(*base)


@pytest.fixture
def nothing_is_read_or_written(monkeypatch, tmp_path, lab):
    """An empty current folder; reading a weight, and asking the network, fails the test."""

    def refuse(*_, **__):
        raise AssertionError("a weight was about to be read")

    def unreachable(*_, **__):
        raise OSError("no network in tests")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(neo.models.causal_lm.AutoModelForCausalLM, "from_pretrained", refuse)
    monkeypatch.setattr(CausalLM, "load", refuse)
    monkeypatch.setattr(neo.models.causal_lm.HfApi, "model_info", unreachable)
    before = sorted(lab.rglob("*"))
    yield
    assert list(tmp_path.rglob("*")) == []
    assert sorted(lab.rglob("*")) == before


def run_main(monkeypatch, capfd, arguments):
    """Exit status and standard error of `python -m neo.train` in this process."""
    monkeypatch.setattr(sys, "argv", ["neo-train", *arguments])
    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(SystemExit) as left:
        neo.train.main()
    return left.value.code, capfd.readouterr().err


def refusal(composed, overrides):
    """What `train` says of a composed config with other values: Hydra takes a third of a second."""
    config = copy.deepcopy(composed)
    for override in OverridesParser.create().parse_overrides(overrides):
        OmegaConf.update(config, override.key_or_group, override.value(), force_add=True)
    with pytest.raises(ConfigError) as refused:
        neo.train.train(config)
    return str(refused.value)


NEED_HYDRA = {
    case
    for case, (given, *_) in REFUSED.items()
    if any(not re.match(r"\w+\.[\w.]+=[^?]|run_dir=", part) for part in given.split(" "))
}


@pytest.mark.usefixtures("nothing_is_read_or_written")
@pytest.mark.parametrize("case", [case for case in REFUSED if case not in NEED_HYDRA])
def test_a_wrong_value_is_refused_with_a_message_that_names_it(case, composed, lab):
    given, *pieces = REFUSED[case]
    said = refusal(composed, given.format(lab=lab).split(" "))
    for piece in pieces:
        assert piece in said


@pytest.mark.usefixtures("nothing_is_read_or_written")
@pytest.mark.parametrize("case", sorted(NEED_HYDRA))
def test_a_wrong_command_line_is_refused_with_a_message_that_names_it(
    case, base, lab, monkeypatch, capfd
):
    given, *pieces = REFUSED[case]
    rest = base[:-1] if re.search("lora=none|method=sft loss", given) else base
    status, said = run_main(monkeypatch, capfd, [*rest, *given.format(lab=lab).split(" ")])
    for piece in pieces:
        assert piece in said
    assert status == 2
    assert "Traceback" not in said


@pytest.mark.usefixtures("nothing_is_read_or_written")
def test_all_problems_of_a_config_come_in_one_message(base, monkeypatch, capfd):
    wrong = ["lora.rr=3", "loss.kd_ratio=1.5", "optim.lr=0", "optim.schedule=x", "seed=-1",
             "data.batch_size=0", "trainer.accumulate_grad_batches=0", "eval_split=x"]  # fmt: skip
    status, said = run_main(monkeypatch, capfd, [*base, *wrong])
    assert status == 2
    assert said.startswith("this config cannot run:\n")
    assert [line.split("=")[0].split(":")[0].strip() for line in said.splitlines()[1:]] == [
        "lora.rr", "loss.kd_ratio", "data.batch_size", "optim.lr", "optim.schedule",
        "trainer.accumulate_grad_batches", "eval_split", "seed",
    ]  # fmt: skip


@pytest.mark.usefixtures("nothing_is_read_or_written")
def test_problems_of_models_and_of_data_come_in_one_message(base, lab, monkeypatch, capfd):
    wrong = [f"teacher.path={lab}/none", f"data.path={lab}/broken.jsonl", "lora.target_modules=[x]"]
    status, said = run_main(monkeypatch, capfd, [*base, *wrong])
    assert status == 2
    for piece in ("none': there is no such folder", "line 3: not JSON", "match no layer"):
        assert piece in said
    status, said = run_main(
        monkeypatch, capfd, [*base, f"student.path={lab}/none", f"data.path={lab}/broken.jsonl"]
    )
    for piece in ("none': there is no such folder", "line 3: not JSON"):
        assert piece in said


@pytest.mark.usefixtures("nothing_is_read_or_written")
def test_code_that_comes_with_a_model_does_not_run(base, lab, monkeypatch, capfd):
    assert run_main(monkeypatch, capfd, [*base, f"student.path={lab}/code"])[0] == 2
    assert not (lab / "code_was_run").exists()


@pytest.mark.usefixtures("nothing_is_read_or_written")
def test_what_the_table_starts_from_is_a_config_that_runs(base, monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["neo-train", *base, "dry_run=true"])
    neo.train.main()
    said = capfd.readouterr().err
    assert "supervised tokens" in said
    assert "deprecated" not in said


def test_a_run_goes_on_in_its_own_folder_after_it_was_killed(base, tmp_path):
    config = compose(*base, f"run_dir={tmp_path}")
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    assert neo.train.recorded_run(tmp_path, run_id(config)) is None


@pytest.mark.slow
def test_the_command_exits_with_2_and_no_traceback(base, lab, tmp_path):
    cases = [
        "misspelt key",
        "seed=abc",
        "unequal tokenizers",
        "row that is not JSON",
        "kd_ratio above 1",
    ]
    arguments = [REFUSED.get(case, (case, "Value 'abc'")) for case in cases]
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "neo.train", *base, *given.format(lab=lab).split(" ")],
            cwd=tmp_path, stderr=subprocess.PIPE, text=True,
            env=os.environ | {"PYTHONPATH": str(neo.config.PACKAGE.parent)},
        )
        for given, *_ in arguments
    ]  # fmt: skip
    for process, (_, *pieces) in zip(running, arguments, strict=True):
        _, said = process.communicate(timeout=300)
        assert process.returncode == 2, said
        assert "Traceback" not in said
        for piece in pieces:
            assert piece in said
    assert list(tmp_path.iterdir()) == []
