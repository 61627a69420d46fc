import pytest
import torch
from lab import tiny_model, tokenizer
from transformers import LlamaForCausalLM

from neo.data.prompt import PromptEncoder
from neo.models.causal_lm import CausalLM
from neo.models.hidden import hidden_states
from neo.training.exact_match import answers, exact_match

ROWS = [
    {"kind": "sum", "messages": [{"role": "user", "content": "2 + 3"}]},
    {"kind": "sum", "messages": [{"role": "user", "content": "What is 44 + 38, please?"}]},
    {"kind": "word", "messages": [{"role": "user", "content": "Say the word"}]},
    {
        "kind": "word",
        "messages": [
            {"role": "user", "content": "Remember tree."},
            {"role": "assistant", "content": "Yes."},
            {"role": "user", "content": "What was it?"},
        ],
    },
]
ANSWERS = ["5", "82", "house", "a tree"]


def rows(right=ANSWERS):
    return [
        row | {"messages": [*row["messages"], {"role": "assistant", "content": answer}]}
        for row, answer in zip(ROWS, right, strict=True)
    ]


@pytest.fixture(scope="module")
def encoder():
    return PromptEncoder(tokenizer(), 128)


@pytest.fixture(scope="module")
def learned(tmp_path_factory, encoder):
    """A model that has learnt the four answers by heart."""
    folder = tiny_model(tmp_path_factory.mktemp("models"), layers=1)
    model = CausalLM(path=str(folder)).load(torch.device("cpu"), trained=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    examples = [encoder.encode(row["messages"]) for row in rows()]
    for _ in range(30):
        optimizer.zero_grad()
        for example in examples:
            ids = torch.tensor([example.input_ids])
            hidden = hidden_states(model, ids, torch.arange(ids.shape[1])[None])
            logits = model.lm_head(hidden)[0]
            torch.nn.functional.cross_entropy(logits, torch.tensor(example.targets)).backward()
        optimizer.step()
    return model.eval()


def test_a_model_that_answers_right_is_counted_right(learned, encoder):
    assert exact_match(learned, tokenizer(), encoder, rows()) == {
        "eval/mini/exact_match": 1.0,
        "eval/mini/exact_match/sum": 1.0,
        "eval/mini/exact_match/word": 1.0,
    }


def test_an_answer_is_right_only_if_it_is_right_to_the_last_letter(learned, encoder):
    counted = exact_match(learned, tokenizer(), encoder, rows(["5", "8", "houses", "a tree"]))
    assert counted == {
        "eval/mini/exact_match": 0.5,
        "eval/mini/exact_match/sum": 0.5,
        "eval/mini/exact_match/word": 0.5,
    }


def test_padding_on_the_left_changes_no_answer(learned, encoder):
    prompts = [encoder.prompt_ids(row["messages"]) for row in rows()]
    assert len({len(prompt) for prompt in prompts}) > 2
    for size in (1, 2, 3, 4):
        given = answers(learned, tokenizer(), prompts, max_new_tokens=8, batch_size=size)
        assert given == ANSWERS


def test_an_answer_that_does_not_end_is_wrong(learned, encoder):
    endless = [encoder.prompt_ids(row["messages"]) for row in rows()]
    cut = answers(learned, tokenizer(), endless, max_new_tokens=1)
    assert cut[0] == "5"
    assert cut[3] != "a tree"


def test_answering_leaves_the_mode_of_the_model_as_it_was(learned, encoder):
    prompts = [encoder.prompt_ids(rows()[0]["messages"])]
    for mode in (True, False):
        learned.train(mode)
        answers(learned, tokenizer(), prompts, max_new_tokens=2)
        assert learned.training is mode
    learned.eval()


class Parrot(LlamaForCausalLM):
    def generate(self, input_ids, attention_mask, max_new_tokens, **keys):
        assert not self.training
        assert not torch.is_grad_enabled()
        assert keys["do_sample"] is False
        self.asked = (input_ids, attention_mask, max_new_tokens)
        return torch.cat([input_ids, input_ids[:, -1:]], dim=1)


def test_prompts_are_padded_on_the_left_and_the_padding_is_masked(student_dir):
    model = Parrot.from_pretrained(student_dir)
    given = answers(model, tokenizer(), [[10, 11, 12], [13]], max_new_tokens=3)
    ids, mask, longest = model.asked
    pad = tokenizer().pad_token_id
    assert ids.tolist() == [[pad, pad, 13], [10, 11, 12]]
    assert mask.tolist() == [[0, 0, 1], [1, 1, 1]]
    assert longest == 3
    assert given == [tokenizer().decode([12]), tokenizer().decode([13])]
