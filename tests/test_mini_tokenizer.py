import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from neo.data.mini import mini_rows
from neo.data.mini_tokenizer import build_tokenizer
from neo.data.mini_wordings import UNITS

TOKENIZER = build_tokenizer()

MESSAGES = [
    {"role": "user", "content": "Add 12 and 30."},
    {"role": "assistant", "content": "42"},
    {"role": "user", "content": "Now add 5."},
]


def ids(text):
    return TOKENIZER.encode(text, add_special_tokens=False)


def test_the_vocabulary_holds_the_specials_all_bytes_and_little_else():
    assert TOKENIZER.convert_tokens_to_ids(
        ["<|pad|>", "<|bos|>", "<|im_start|>", "<|im_end|>"]
    ) == [
        0,
        1,
        2,
        3,
    ]
    assert (TOKENIZER.pad_token_id, TOKENIZER.bos_token_id, TOKENIZER.eos_token_id) == (0, 1, 3)
    assert 260 < len(TOKENIZER) <= 512
    assert sorted(TOKENIZER.get_vocab().values()) == list(range(len(TOKENIZER)))
    assert TOKENIZER.model_max_length == 256


def test_building_it_twice_gives_the_same_ids():
    assert build_tokenizer().get_vocab() == TOKENIZER.get_vocab()


@given(st.text())
def test_any_text_survives(text):
    assert TOKENIZER.decode(ids(text), skip_special_tokens=False) == text


@pytest.mark.parametrize(
    "text",
    ["Grüße, 世界! 👩‍👧", "def f(x):\n\treturn  x ** 2  # ok", " a , b . c ? ", "e\u0301\r\n\n"],
)
def test_scripts_code_and_white_space_survive(text):
    assert TOKENIZER.decode(ids(text)) == text


def test_digits_and_operand_letters_are_single_tokens():
    assert TOKENIZER.convert_ids_to_tokens(ids("1234")) == list("1234")
    assert TOKENIZER.convert_ids_to_tokens(ids("What is KNAB")) == ["WhatĠ", "isĠ", *"KNAB"]


def test_a_name_is_the_same_token_in_the_middle_and_at_the_beginning():
    assert ids("find Mia?")[1] == ids("Mia, Bob")[0]


def test_every_word_of_the_tasks_is_one_token():
    for row in mini_rows("val", 300, seed=0):
        for message in row["messages"]:
            tokens = TOKENIZER.convert_ids_to_tokens(ids(message["content"]))
            # single characters are left to digits, signs, units and the capitals of operands
            assert not [t for t in tokens if len(t) == 1 and t.islower() and t not in UNITS]


def test_a_conversation_is_written_as_chatml():
    text = TOKENIZER.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>user\nAdd 12 and 30.<|im_end|>\n"
        "<|im_start|>assistant\n42<|im_end|>\n"
        "<|im_start|>user\nNow add 5.<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    tokens = TOKENIZER.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
    assert tokens == ids(text)
    assert tokens.count(TOKENIZER.eos_token_id) == 3


def test_the_prompt_of_a_row_is_the_beginning_of_the_whole_row():
    for row in mini_rows("val", 100, seed=0):
        whole = TOKENIZER.apply_chat_template(row["messages"], return_dict=False)
        prompt = TOKENIZER.apply_chat_template(
            row["messages"][:-1], add_generation_prompt=True, return_dict=False
        )
        assert whole[: len(prompt)] == prompt
        answer = TOKENIZER.decode(whole[len(prompt) :])
        assert answer == row["messages"][-1]["content"] + "<|im_end|>\n"


def test_saved_and_read_again_it_is_the_same(tmp_path):
    TOKENIZER.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.get_vocab() == TOKENIZER.get_vocab()
    assert again.all_special_ids == TOKENIZER.all_special_ids
    assert again.eos_token_id == TOKENIZER.eos_token_id
    assert again.model_max_length == TOKENIZER.model_max_length
    assert again.chat_template == TOKENIZER.chat_template
    text = "Reverse KQZB.  Grüße 世界\n<|im_end|>42"
    assert again.encode(text) == TOKENIZER.encode(text)
    assert again.apply_chat_template(MESSAGES) == TOKENIZER.apply_chat_template(MESSAGES)
