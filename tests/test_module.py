import lightning as L
import pytest
import torch
from lab import tiny_model, tokenizer, write_rows
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from neo.data.datamodule import DataModule
from neo.data.peek import peek
from neo.data.stream import FileData
from neo.losses.distillation import Distillation
from neo.models import hidden
from neo.models.causal_lm import CausalLM
from neo.models.hidden import hidden_states
from neo.models.student import save_student, trained_parameters
from neo.models.tokenizers import num_token_ids
from neo.models.variants import lora, none
from neo.teachers.online import OnlineTeacher
from neo.training.module import NeoModule
from neo.training.optim import AdamW
from neo.training.trainer import OURS

# as neo.train does
pytestmark = pytest.mark.filterwarnings(
    "ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning"
)


class Watch(L.Callback):
    """Keeps what a run does at every step."""

    def __init__(self):
        self.progress, self.rates, self.gradients, self.logged = [], [], [], []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.progress.append(module.progress())

    def on_train_batch_end(self, trainer, module, *_):
        if trainer.global_step == len(self.gradients):
            return  # gradients are still being accumulated
        named = trained_parameters(module.student).items()
        self.gradients.append({n: p.grad.clone() for n, p in named})
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])
        self.logged.append({k: float(v) for k, v in trainer.callback_metrics.items()})


@pytest.fixture
def build(student_dir, teacher_dir):
    def build(variant=None, teacher=True, kd_ratio=0.5, lr=1e-2, seed=0, student=None, **loss):
        return NeoModule(
            student or CausalLM(path=str(student_dir)),
            OnlineTeacher(path=str(teacher_dir)) if teacher else None,
            lora(r=4, target_modules="all-linear") if variant is None else variant,
            Distillation(kd_ratio=kd_ratio, **loss),
            AdamW(lr=lr),
            vocab=num_token_ids(tokenizer()),
            seed=seed,
        )

    return build


@pytest.fixture
def data(tmp_path):
    file = write_rows(tmp_path / "rows.jsonl")

    def data(batch_size=2, val_share=0.0, packing=False):
        spec = FileData(path=str(file), max_length=64, batch_size=batch_size, packing=packing,
                        val_share=val_share)  # fmt: skip
        return DataModule(spec, tokenizer(), seed=0)

    return data


def fit(module, data, watch=None, **keys):
    trainer = L.Trainer(
        **{
            "accelerator": "cpu", "devices": 1, "max_epochs": 1, "logger": False,
            "enable_checkpointing": False, "enable_progress_bar": False, "log_every_n_steps": 1,
            "val_check_interval": 1, "limit_val_batches": None if data.num_val_rows else 0,
            "callbacks": [watch] if watch else [], **OURS, **keys,
        }
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    return trainer


def test_building_a_module_reads_no_weight():
    module = NeoModule(
        CausalLM(path="/nowhere"), None, none(), Distillation(kd_ratio=0), AdamW(lr=1.0), vocab=5
    )
    assert not list(module.parameters())


def test_weights_are_loaded_once(build):
    module = build()
    module.configure_model()
    student = module.student
    module.configure_model()
    assert module.student is student


def test_a_model_that_carries_state_between_packed_examples_does_not_train_on_them(
    build, data, monkeypatch
):
    def leaking(model, input_ids, position_ids):
        everywhere = torch.arange(input_ids.shape[1]).expand_as(input_ids)
        return hidden_states(model, input_ids, everywhere)

    monkeypatch.setattr(hidden, "hidden_states", leaking)
    with pytest.raises(ValueError, match=r"carries state .*; set data\.packing=false"):
        fit(build(), data(packing=True))
    fit(build(), data(packing=False))


@pytest.mark.parametrize(("batch_size", "accumulate"), [(8, 1), (4, 2), (2, 4), (1, 8), (3, 3)])
def test_a_gradient_is_the_mean_over_all_supervised_tokens_of_the_step(
    build, data, batch_size, accumulate
):
    module = build()
    module.configure_model()
    (whole,) = peek(data(8), 1)
    sums = module.token_sums(whole, with_teacher=True)
    (sums.loss / sums.tokens).backward()
    expected = {n: p.grad.clone() for n, p in trained_parameters(module.student).items()}

    watch = Watch()
    fit(build(), data(batch_size), watch, accumulate_grad_batches=accumulate)
    (actual,) = watch.gradients
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-4, atol=1e-7)


def test_clipping_sees_the_gradient_of_the_mean(build, data):
    whole = Watch()
    fit(build(), data(8), whole)
    norm = whole.logged[0]["train/grad_norm"]
    for accumulate, size in ((1, 8), (4, 2)):
        clipped = Watch()
        fit(build(), data(size), clipped, accumulate_grad_batches=accumulate,
            gradient_clip_val=norm / 2)  # fmt: skip
        for name, gradient in whole.gradients[0].items():
            torch.testing.assert_close(
                clipped.gradients[0][name], gradient / 2, rtol=1e-3, atol=1e-7
            )


def test_what_is_logged_is_per_token_and_agrees_with_the_loss(build, data):
    module = build(kd_ratio=0.3)
    module.configure_model()
    (whole,) = peek(data(8), 1)
    sums = module.token_sums(whole, with_teacher=True)
    watch = Watch()
    fit(build(kd_ratio=0.3), data(2), watch, accumulate_grad_batches=4)
    logged = watch.logged[-1]
    assert logged["train/ce"] == pytest.approx(float(sums.ce / sums.tokens), rel=1e-5)
    assert logged["train/kd"] == pytest.approx(float(sums.kd / sums.tokens), rel=1e-5)
    assert logged["train/loss"] == pytest.approx(
        0.7 * logged["train/ce"] + 0.3 * logged["train/kd"]
    )
    assert logged["train/tokens"] == whole.num_supervised
    for name in ("student_entropy", "teacher_target"):
        expected = float(getattr(sums, name) / sums.tokens)
        assert logged[f"train/{name}"] == pytest.approx(expected, rel=1e-5)


def test_without_kd_the_teacher_is_left_out_of_training_and_measured_in_validation(build, data):
    watch = Watch()
    trainer = fit(build(kd_ratio=0.0), data(2, val_share=0.25), watch)
    assert "train/student_entropy" in watch.logged[-1]
    assert not {"train/kd", "train/teacher_target"} & watch.logged[-1].keys()
    assert "val/kd" in trainer.callback_metrics
    trainer = fit(build(kd_ratio=0.0, teacher=False), data(2, val_share=0.25))
    assert "val/ce" in trainer.callback_metrics
    assert "val/kd" not in trainer.callback_metrics


def test_validation_is_the_mean_over_all_tokens_whatever_the_batches(build, data):
    means = []
    for size in (1, 2, 8):
        trainer = fit(build(lr=1e-9), data(size, val_share=0.5), max_epochs=1)
        means.append({k: v for k, v in trainer.callback_metrics.items() if k.startswith("val/")})
    assert len(means[0]) == 7
    for other in means[1:]:
        for name, value in means[0].items():
            torch.testing.assert_close(other[name], value, rtol=1e-4, atol=1e-6)


def test_release_changes_the_positions_of_training_and_never_those_of_validation(build, data):
    logged = {}
    for positions in ("aligned", "release"):
        watch = Watch()
        module = build(lr=1e-9, kd_positions=positions)
        trainer = fit(module, data(8, val_share=0.5), watch, max_epochs=1)
        logged[positions] = {k: float(v) for k, v in trainer.callback_metrics.items()}
    aligned, release = logged["aligned"], logged["release"]
    for name, value in aligned.items():
        if name.startswith("val/") or name == "train/ce":
            assert release[name] == pytest.approx(value, rel=1e-5)
    assert abs(release["train/kd"] - aligned["train/kd"]) > 1e-3
    assert release["train/loss"] == pytest.approx((release["train/ce"] + release["train/kd"]) / 2)


def test_release_without_kd_is_plain_training(build, data):
    aligned, release = Watch(), Watch()
    fit(build(kd_ratio=0.0), data(8), aligned)
    fit(build(kd_ratio=0.0, kd_positions="release"), data(8), release)
    assert release.logged == aligned.logged


@pytest.mark.parametrize(
    "keys",
    [
        {"max_epochs": 3},
        {"max_epochs": -1, "max_steps": 6},
        {"max_epochs": 5, "max_steps": 6},
        {"max_epochs": 2, "max_steps": 100},
        {"max_epochs": 2, "accumulate_grad_batches": 2},
    ],
)
def test_progress_rises_from_0_to_1_and_the_rate_follows_it(build, data, keys):
    watch = Watch()
    module = build(lr=1.0)
    fit(module, data(2), watch, **keys)
    progress = [*watch.progress, module.progress()]
    assert all(0 <= p <= 1 for p in progress)
    assert progress == sorted(progress)
    assert progress[0] < 0.2
    assert progress[-1] > 0.8
    assert max(watch.rates) > 0.7  # the warm-up came to its end ...
    assert watch.rates[-1] < 0.3  # ... and so did the decay


def test_only_what_is_trained_is_in_the_state_dict(build):
    for variant in (None, none()):
        module = build(variant)
        module.configure_model()
        state = module.state_dict()
        trained = trained_parameters(module.student)
        assert state.keys() == {f"student.{name}" for name in trained}
        assert not any(name.startswith("teacher") for name in state)


def test_a_state_dict_is_loaded_to_the_bit(build):
    module, other = build(seed=1), build(seed=2)
    module.configure_model()
    other.configure_model()
    state = {name: torch.randn_like(value) for name, value in module.state_dict().items()}
    other.load_state_dict(state)
    for name, value in other.state_dict().items():
        assert torch.equal(value, state[name])


@pytest.mark.parametrize("change", ["a key too few", "a key too many", "another branch"])
def test_a_state_dict_of_another_set_of_weights_is_refused(build, change):
    module = build()
    module.configure_model()
    state = dict(module.state_dict())
    first = next(iter(state))
    if change == "a key too few":
        del state[first]
    elif change == "a key too many":
        state["student.other"] = state[first]
    else:
        other = build(lora(r=4, target_modules=["q_proj"]))
        other.configure_model()
        state = other.state_dict()
    with pytest.raises(ValueError, match="the checkpoint holds other weights than this run trains"):
        module.load_state_dict(state)


def test_a_checkpoint_holds_neither_teacher_nor_frozen_weights(build, data, tmp_path):
    module = build()
    trainer = fit(module, data())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    names = {f"student.{name}" for name in trained_parameters(module.student)}
    assert checkpoint["state_dict"].keys() == names
    everything = sum(p.numel() for p in module.parameters())
    trained = sum(p.numel() for p in trained_parameters(module.student).values())
    # weights and two moments each, in float32, and little besides
    assert (tmp_path / "last.ckpt").stat().st_size < 3 * 4 * trained + 100_000
    assert everything > trained
    assert checkpoint["neo"]["num_tokens"] == module.num_tokens


def test_training_changes_what_is_trained_and_nothing_else(build, data):
    module = build()
    module.configure_model()
    before = {name: p.clone() for name, p in module.named_parameters()}
    fit(module, data(), max_epochs=2)
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name


# PEFT warns of a tied weight that is copied.
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied")
@pytest.mark.parametrize(
    ("tie", "keys"),
    [
        (False, {"target_modules": ["q_proj", "lm_head"], "use_rslora": True}),
        (False, {"target_modules": ["lm_head"], "lora_dropout": 0.2}),
        (False, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
        (True, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    ],
    ids=["branch", "branch alone", "copy", "copy of a tied head"],
)
def test_a_trained_head_is_what_plain_peft_loads_and_merges(build, data, tmp_path, tie, keys):
    spec = CausalLM(path=str(tiny_model(tmp_path / "base", tie=tie)))
    module = build(lora(r=4, **keys), student=spec, lr=0.05)
    fit(module, data(8), max_epochs=2)
    ids = torch.arange(5, 30)[None]
    with torch.no_grad():
        expected = module.student.eval()(input_ids=ids).logits
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        untrained = base(input_ids=ids).logits
        assert (expected - untrained).abs().max() > 0.01
        adapter = save_student(module.student, tokenizer(), tmp_path)
        written = load_file(adapter / "adapter_model.safetensors")
        assert not any("embed_tokens" in name for name in written)  # of the frozen base
        loaded = PeftModel.from_pretrained(base, adapter).eval()
        torch.testing.assert_close(loaded(input_ids=ids).logits, expected)
        merged = loaded.merge_and_unload(safe_merge=True)
        merged.save_pretrained(tmp_path / "merged")
        whole = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        torch.testing.assert_close(whole(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_checkpoint_of_a_trained_head_is_loaded_to_the_bit(build):
    for keys in ({"target_modules": ["lm_head"]}, {"modules_to_save": ["lm_head"]}):
        module, other = (build(lora(r=4, **keys), seed=seed) for seed in (1, 2))
        module.configure_model()
        other.configure_model()
        state = {name: torch.randn_like(value) for name, value in module.state_dict().items()}
        assert any("lm_head" in name for name in state)
        other.load_state_dict(state)
        for name, value in other.state_dict().items():
            assert torch.equal(value, state[name])


def test_a_copy_that_would_be_trained_in_half_precision_is_refused(build, student_dir):
    spec = CausalLM(path=str(student_dir), dtype="bfloat16")
    module = build(lora(r=4, modules_to_save=["lm_head"]), student=spec)
    with pytest.raises(ValueError, match=r"lm_head.*would be trained in torch.bfloat16; set stud"):
        module.configure_model()
    build(lora(r=4, target_modules=["lm_head"]), student=spec).configure_model()


def test_a_branch_on_a_head_of_half_precision_learns(build, data, student_dir):
    spec = CausalLM(path=str(student_dir), dtype="bfloat16")
    module = build(lora(r=4, target_modules=["lm_head"]), student=spec, lr=0.01)
    watch = Watch()
    fit(module, data(8), watch, max_epochs=8)
    assert watch.logged[-1]["train/loss"] < watch.logged[0]["train/loss"]
