"""The mini-lab's models before training: architecture and tokenizer, as folders without weights.

Usage: python -m neo.mini DIR

Writes DIR/teacher and DIR/student. `neo.train` with `student.random_init=true` takes them from
there; `make mini-models` does both.
"""

import sys
from pathlib import Path

from transformers import LlamaConfig

from neo.data.mini_tokenizer import MAX_LENGTH, build_tokenizer

# hidden size, layers, heads
SIZES = {"teacher": (96, 3, 4), "student": (64, 2, 4)}


def main() -> None:
    """The command line; exits with 2 where it is not given one folder."""
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        print(__doc__, file=sys.stderr)
        sys.exit(0 if {"-h", "--help"} & set(sys.argv[1:]) else 2)
    write_architectures(Path(sys.argv[1]))


def write_architectures(folder: Path) -> None:
    """Writes config.json and the tokenizer's files of both models."""
    tokenizer = build_tokenizer()
    for role, (hidden, layers, heads) in SIZES.items():
        config = LlamaConfig(
            architectures=["LlamaForCausalLM"],
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            intermediate_size=3 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=MAX_LENGTH,
            initializer_range=0.05,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        config.save_pretrained(folder / role)
        tokenizer.save_pretrained(folder / role)


if __name__ == "__main__":
    main()
