"""The plain way: transformers' Trainer, PEFT, padded batches, full logits of both models.

The cross-entropy is the model's own loss, as in Trainer and in the code released with the paper.
With `--gathered` it is computed on the supervised rows of the logits alone, which is less work.

Run by `step.py` in a process of its own; prints one line of JSON.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from workload import MAX_LENGTH

from neo.data.prompt import PromptEncoder
from neo.training.peak_memory import PeakMemory

KD_RATIO = 0.5


class DistillationTrainer(Trainer):
    """Trainer with `(1 - r) * ce + r * KL(teacher || student)` over supervised tokens."""

    teacher: PreTrainedModel
    gathered: bool
    num_tokens = 0

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, **_: Any
    ) -> Any:
        """Loss per supervised token of the batch."""
        labels = inputs.pop("labels")
        keep = labels[:, 1:] != -100
        self.num_tokens += int(keep.sum())
        outputs = model(**inputs, labels=None if self.gathered else labels)
        student = outputs.logits[:, :-1][keep]
        with torch.no_grad():
            teacher = self.teacher(**inputs).logits[:, :-1][keep]
        ce = F.cross_entropy(student, labels[:, 1:][keep]) if self.gathered else outputs.loss
        kd = F.kl_div(
            F.log_softmax(student, -1),
            F.log_softmax(teacher, -1),
            log_target=True,
            reduction="batchmean",
        )
        return (1 - KD_RATIO) * ce + KD_RATIO * kd


class Clock(TrainerCallback):
    """Seconds from the beginning of training to the end of its last step."""

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Starts."""
        self.began = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Is as far as the last step."""
        self.seconds = time.perf_counter() - self.began


def pad(rows: list[dict[str, list[int]]], pad_id: int) -> dict[str, Tensor]:
    """A batch padded at the right to the longest of its rows."""
    length = max(len(row["input_ids"]) for row in rows)

    def stack(key: str, fill: int) -> Tensor:
        return torch.tensor([row[key] + [fill] * (length - len(row[key])) for row in rows])

    ids = stack("input_ids", pad_id)
    sizes = torch.tensor([len(row["input_ids"]) for row in rows])
    mask = (torch.arange(length) < sizes[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": stack("labels", -100)}


def examples(folder: Path, tokenizer: Any) -> list[dict[str, list[int]]]:
    """The rows of the file with labels as Hugging Face has them: at their own position."""
    encoder = PromptEncoder(tokenizer, MAX_LENGTH)
    lines = (folder / "rows.jsonl").read_text().splitlines()
    encoded = [encoder.encode(json.loads(line)["messages"]) for line in lines]
    return [{"input_ids": e.input_ids, "labels": [-100, *e.targets[:-1]]} for e in encoded]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--gathered", action="store_true")
    arguments = parser.parse_args()
    folder = arguments.folder
    tokenizer = AutoTokenizer.from_pretrained(folder / "student")
    rows = examples(folder, tokenizer)
    memory = PeakMemory()  # from here on, the weights of both models included
    student = AutoModelForCausalLM.from_pretrained(folder / "student")
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=arguments.r,
        lora_alpha=2 * arguments.r,
        target_modules="all-linear",
    )
    clock = Clock()
    trainer = DistillationTrainer(
        model=get_peft_model(student, lora),
        args=TrainingArguments(
            output_dir=str(folder / "plain"),
            per_device_train_batch_size=arguments.batch,
            num_train_epochs=1,
            learning_rate=arguments.lr,
            lr_scheduler_type="cosine",
            remove_unused_columns=False,
            report_to="none",
            save_strategy="no",
            logging_steps=10,
            disable_tqdm=True,
            use_cpu=True,
            seed=arguments.seed,
        ),
        train_dataset=rows,
        data_collator=lambda batch: pad(batch, tokenizer.pad_token_id),
        callbacks=[clock],
    )
    teacher = AutoModelForCausalLM.from_pretrained(folder / "teacher")
    trainer.gathered = arguments.gathered
    trainer.teacher = teacher.requires_grad_(False).eval()
    loss = trainer.train().training_loss
    result = {
        "tokens": trainer.num_tokens,
        "tokens_per_s": trainer.num_tokens / clock.seconds,
        "peak_gib": memory.gib(),
        "loss": loss,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
