"""What both sides of `step.py` train on: two Llamas with random weights, a tokenizer, rows.

Usage: python benchmarks/workload.py FOLDER [--rows 400]     those of experiment=cost
"""

import argparse
import json
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCAB = 32_000
MAX_LENGTH = 256
# (hidden size, layers, heads) and a SwiGLU of 8/3 the width, as Llama has it.
STUDENT, TEACHER = (256, 4, 4), (512, 8, 8)
# Of experiment=cost: a teacher five times the size of the student.
COST_TEACHER = (768, 8, 12)
SPECIAL = ["<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"]
TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=400)
    arguments = parser.parse_args()
    write_workload(arguments.folder, arguments.rows, teacher=COST_TEACHER)


def write_workload(
    folder: Path, num_rows: int, seed: int = 0, teacher: tuple[int, int, int] = TEACHER
) -> None:
    """Write `student/`, `teacher/` and `rows.jsonl` into the folder."""
    tokenizer = _tokenizer()
    for name, shape in (("student", STUDENT), ("teacher", teacher)):
        torch.manual_seed(seed + len(name))
        LlamaForCausalLM(llama_config(*shape)).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    rows = _rows(num_rows, random.Random(seed))
    lines = (json.dumps({"messages": messages}) + "\n" for messages in rows)
    (folder / "rows.jsonl").write_text("".join(lines))


def llama_config(d: int, num_layers: int, num_heads: int) -> LlamaConfig:
    """A Llama of the given shape over the benchmark's vocabulary."""
    return LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=d,
        intermediate_size=(8 * d // 3 + 63) // 64 * 64,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=SPECIAL.index("<|end|>"),
        pad_token_id=SPECIAL.index("<|pad|>"),
    )


def _tokenizer() -> PreTrainedTokenizerFast:
    """Bytes and words, one token each: `" w17"` is a token, any text can be encoded."""
    tokens = SPECIAL + sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens += [f"Ġw{number}" for number in range(VOCAB - len(tokens))]
    split = Regex(r" ?[A-Za-z]+\d*| ?[^\sA-Za-z]+|\s")
    backend = Tokenizer(
        models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=[], ignore_merges=True)
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(split, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def _rows(num_rows: int, chance: random.Random) -> list[list[dict[str, str]]]:
    """Rows of Alpaca's lengths: short questions, answers of very unequal length.

    Cut at 256 tokens they have some 160 on average, of which some 140 are supervised.
    """
    num_words = VOCAB - len(SPECIAL) - 256

    def text(length: int) -> str:
        return "".join(f" w{chance.randrange(num_words)}" for _ in range(length))

    rows: list[list[dict[str, str]]] = []
    for _ in range(num_rows):
        question = min(64, max(4, round(chance.lognormvariate(2.72, 0.5))))
        answer = max(2, round(chance.lognormvariate(4.82, 0.85)))
        rows.append(
            [
                {"role": "user", "content": text(question)},
                {"role": "assistant", "content": text(answer)},
            ]
        )
    return rows


def describe(examples: list[Any]) -> dict[str, float]:
    """Rows, and mean tokens and supervised tokens of a row."""
    lengths = [len(example.input_ids) for example in examples]
    supervised = [sum(t >= 0 for t in example.targets) for example in examples]
    return {
        "rows": len(examples),
        "mean_tokens": sum(lengths) / len(lengths),
        "mean_supervised_tokens": sum(supervised) / len(supervised),
        "tokens": sum(lengths),
        "supervised_tokens": sum(supervised),
    }


if __name__ == "__main__":
    main()
