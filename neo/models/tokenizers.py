"""Do two models share a tokenizer: token ids, special tokens, and what a probe text becomes."""

from typing import Any

# Several scripts, code, white space, digits, an emoji: where look-alike tokenizers part ways.
PROBE = (
    "The quick brown fox, 12345 + 6.78e-9!\n\n\tdef f(x):\n\t\treturn x ** 2  # comment\n"
    "Größe naïve façade. Привет, мир. 你好，世界。"  # noqa: RUF001
    " こんにちは 안녕하세요 مرحبا नमस्ते שלום 🙂👩‍🔬  \r\n end "
)
SPECIAL = ("bos_token", "eos_token")


def tokenizer_differences(student: Any, teacher: Any) -> list[str]:
    """What differs between two tokenizers, in words; empty where they are the same."""
    differences = []
    ids, other = student.get_vocab(), teacher.get_vocab()
    changed = sorted(
        (token for token in ids.keys() | other.keys() if ids.get(token) != other.get(token)),
        key=lambda token: (min(ids.get(token, 1 << 62), other.get(token, 1 << 62)), token),
    )
    if changed:
        shown = ", ".join(
            f"{token!r} is {ids.get(token, 'absent')} and {other.get(token, 'absent')}"
            for token in changed[:3]
        )
        differences.append(
            f"{len(changed)} tokens have other ids (student {len(ids)}, "
            f"teacher {len(other)} tokens): "
            f"{shown}"
        )
    for name in SPECIAL:
        mine, theirs = getattr(student, name), getattr(teacher, name)
        if mine != theirs:
            differences.append(f"{name} is {mine!r} and {theirs!r}")
    mine, theirs = (t(PROBE, add_special_tokens=False)["input_ids"] for t in (student, teacher))
    if mine != theirs:
        at = next((i for i, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b),
                  min(len(mine), len(theirs)))  # fmt: skip
        one, two = mine[at : at + 4], theirs[at : at + 4]
        differences.append(
            f"a probe text is encoded differently from token {at} on: "
            f"{student.decode(one)!r} {one} and {teacher.decode(two)!r} {two}"
        )
    return differences


def num_token_ids(tokenizer: Any) -> int:
    """How many ids, counted from 0, the tokenizer can give; rows of a head beyond are padding."""
    return max(tokenizer.get_vocab().values()) + 1
