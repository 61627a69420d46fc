import json

import pytest
from lab import tokenizer
from tokenizers import Regex, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from neo.data.mini_tokenizer import build_tokenizer
from neo.models.tokenizers import num_token_ids, tokenizer_differences


def rebuilt(change, **special):
    """The mini tokenizer after a change to its serialised form."""
    from tokenizers import Tokenizer

    state = json.loads(tokenizer().backend_tokenizer.to_str())
    change(state)
    given = {"eos_token": "<|im_end|>", "bos_token": "<|bos|>", "pad_token": "<|pad|>"} | special
    backend = Tokenizer.from_str(json.dumps(state))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **given)


def swap(state):
    vocab = state["model"]["vocab"]
    first, second = sorted(vocab, key=vocab.get)[10:12]
    vocab[first], vocab[second] = vocab[second], vocab[first]


def test_the_same_tokenizer_does_not_differ_from_itself():
    assert tokenizer_differences(build_tokenizer(), build_tokenizer()) == []
    assert tokenizer_differences(tokenizer(), rebuilt(lambda state: None)) == []


def test_permuted_ids_are_found_and_shown_with_both():
    first, second = sorted(tokenizer().get_vocab(), key=tokenizer().get_vocab().get)[10:12]
    (ids, *_) = tokenizer_differences(tokenizer(), rebuilt(swap))
    size = len(tokenizer().get_vocab())
    assert ids == (
        f"2 tokens have other ids (student {size}, teacher {size} tokens): "
        f"{first!r} is 10 and 11, {second!r} is 11 and 10"
    )


def test_a_token_that_only_one_has_is_found():
    def grow(state):
        state["model"]["vocab"]["newest"] = 5000

    (ids,) = tokenizer_differences(tokenizer(), rebuilt(grow))
    assert "1 tokens have other ids" in ids
    assert "'newest' is absent and 5000" in ids
    (ids,) = tokenizer_differences(rebuilt(grow), tokenizer())
    assert "'newest' is 5000 and absent" in ids


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"eos_token": "<|im_start|>"}, "eos_token is '<|im_end|>' and '<|im_start|>'"),
        ({"bos_token": None}, "bos_token is '<|bos|>' and None"),
    ],
)
def test_other_special_tokens_are_found(changed, expected):
    assert tokenizer_differences(tokenizer(), rebuilt(lambda state: None, **changed)) == [expected]


def test_another_pad_token_is_no_difference_because_padding_is_never_predicted():
    assert tokenizer_differences(tokenizer(), rebuilt(lambda s: None, pad_token="<|bos|>")) == []


def test_the_same_vocabulary_cut_into_other_pieces_is_found_by_the_probe():
    other = build_tokenizer()
    other.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"."), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    assert other.get_vocab() == tokenizer().get_vocab()
    (probe,) = tokenizer_differences(tokenizer(), other)
    assert probe.startswith("a probe text is encoded differently from token ")


def test_a_tokenizer_that_changes_white_space_is_found_by_the_probe():
    from tokenizers import normalizers

    other = build_tokenizer()
    other.backend_tokenizer.normalizer = normalizers.Replace(Regex(r"\s+"), " ")
    assert any("probe text" in d for d in tokenizer_differences(tokenizer(), other))


def test_ids_are_counted_up_to_the_largest_even_where_some_are_missing():
    def grow(state):
        state["model"]["vocab"]["newest"] = 5000

    assert num_token_ids(tokenizer()) == len(tokenizer().get_vocab())
    assert num_token_ids(rebuilt(grow)) == 5001
