"""Greedy answers to rows whose right answer is known, and the share that is exactly right."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from neo.data.prompt import PromptEncoder


@torch.no_grad()
def answers(
    model: PreTrainedModel,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int = 256,
) -> list[str]:
    """The model's greedy continuation of each prompt, without special tokens."""
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    texts = [""] * len(prompts)
    # Prompts of like length stand together, so that little is padded.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        width = max(len(prompts[i]) for i in chosen)
        ids = torch.tensor([[pad] * (width - len(prompts[i])) + list(prompts[i]) for i in chosen])
        mask = torch.tensor(
            [[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in chosen]
        )
        output = model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=pad,
            eos_token_id=tokenizer.eos_token_id,
        )
        for i, row in zip(chosen, output[:, width:].tolist(), strict=True):
            texts[i] = tokenizer.decode(row, skip_special_tokens=True)
    model.train(was_training)
    return texts


def exact_match(
    model: PreTrainedModel,
    tokenizer: Any,
    encoder: PromptEncoder,
    rows: Sequence[Mapping[str, Any]],
) -> dict[str, float]:
    """The share of rows answered exactly, overall and by kind.

    Args:
        model: Generates.
        tokenizer: Of the model.
        encoder: Makes prompts of conversations.
        rows: `{"messages": [...], "kind": str}`; the last message is the right answer.

    Returns:
        `eval/mini/exact_match` and `eval/mini/exact_match/<kind>`, in [0, 1].
    """
    right_answers = [row["messages"][-1]["content"] for row in rows]
    longest = max(len(tokenizer(a, add_special_tokens=False)["input_ids"]) for a in right_answers)
    prompts = [encoder.prompt_ids(row["messages"]) for row in rows]
    given = answers(model, tokenizer, prompts, max_new_tokens=longest + 1)
    hits: dict[str, list[bool]] = defaultdict(list)
    for row, answer, right in zip(rows, given, right_answers, strict=True):
        hits[row["kind"]].append(answer.strip() == right.strip())
    name = "eval/mini/exact_match"
    by_kind = {f"{name}/{kind}": sum(h) / len(h) for kind, h in sorted(hits.items())}
    return {name: sum(map(sum, hits.values())) / len(rows)} | by_kind
