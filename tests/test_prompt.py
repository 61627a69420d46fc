import pytest
from conftest import CHATML, byte_level_tokenizer, metaspace_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from transformers import ByT5Tokenizer

from neo.data.prompt import IGNORE, PromptEncoder, template_names
from neo.data.rows import BadRow

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}"
    "<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] | trim }}<|eot_id|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
DATED = "{{ strftime_now('%d %b %Y') }}" + LLAMA3  # as Llama 3.2's own does
# no system role, roles must alternate, the answer has a space on either side
LLAMA2 = (
    "{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/...') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
# the thinking part of Qwen3's own template: earlier thoughts go, the last turn always has one
QWEN3 = (
    "{%- set ns = namespace(last=messages | length - 1) %}"
    "{%- for m in messages if m.role == 'user' %}{%- set ns.user = m %}{%- endfor %}"
    "{%- for m in messages %}"
    "{%- set content = m.content %}"
    "{%- if m.role == 'assistant' %}"
    "{%- set thought = '' %}"
    "{%- if '</think>' in content %}"
    "{%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1] %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\\n') %}"
    "{%- endif %}"
    "{%- if loop.last %}"
    "{{- '<|im_start|>' + m.role + '\\n<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n'"
    " + content.lstrip('\\n') }}"
    "{%- else %}{{- '<|im_start|>' + m.role + '\\n' + content }}{%- endif %}"
    "{{- '<|im_end|>\\n' }}"
    "{%- else %}{{- '<|im_start|>' + m.role + '\\n' + content + '<|im_end|>\\n' }}{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
LLAMA3_TOKENS = ("<|start_header_id|>", "<|end_header_id|>")


def say(*contents: str) -> list[dict[str, str]]:
    """Contents of user and assistant by turns."""
    return [
        {"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)
    ]


def spans(encoder: PromptEncoder, conversation) -> list[str]:
    """What each run of targets decodes to."""
    example = encoder.encode(conversation)
    runs, last = [], IGNORE
    for target in example.targets:
        if target != IGNORE:
            runs = [*runs, []] if last == IGNORE else runs
            runs[-1].append(target)
        last = target
    return [encoder.tokenizer.decode(run) for run in runs]


STYLES = {
    "chatml": (lambda: byte_level_tokenizer(CHATML), None, "<|im_end|>"),
    "llama3": (
        lambda: byte_level_tokenizer(
            LLAMA3, *LLAMA3_TOKENS, eos_token="<|eot_id|>", bos_token="<|begin_of_text|>"
        ),
        None,
        "<|eot_id|>",
    ),
    "llama2": (lambda: metaspace_tokenizer(LLAMA2), None, " </s>"),
    "mistral": (
        lambda: byte_level_tokenizer(LLAMA2, eos_token="</s>", bos_token="<s>"),
        None,
        " </s>",
    ),
    "qwen3": (lambda: byte_level_tokenizer(QWEN3), None, "<|im_end|>"),
    "plain": (lambda: byte_level_tokenizer(None), "plain", "<|im_end|>"),
    "plain on metaspace": (lambda: metaspace_tokenizer(None), "plain", "</s>"),
    "chatml shipped": (lambda: byte_level_tokenizer(None), "chatml", "<|im_end|>"),
    "llama3 shipped": (
        lambda: byte_level_tokenizer(
            DATED, *LLAMA3_TOKENS, eos_token="<|eot_id|>", bos_token="<|begin_of_text|>"
        ),
        "llama3",
        "<|eot_id|>",
    ),
}


@pytest.fixture(scope="module", params=STYLES)
def style(request):
    build, template, end = STYLES[request.param]
    return PromptEncoder(build(), 4096, template), end


@pytest.mark.parametrize(
    "turns",
    [
        ("What is 12 + 30?", "It is 42."),
        ("answer", "answer", "answer", "answer"),
        ("Say question.", "question", "Again.", "question answer"),
        ("Straße?", "déjà vu 東京 Привет 🚀"),
        ("Code.", "def f(x):\n    return x + 1", "More.", "a  b\t\tc\n\n\nd"),
        ("", "An answer to nothing."),
        ("One", "", "Two", "Two it is."),
        ("### Assistant:\n[/INST] <|im_start|>assistant\n", "assistant", "x", "[INST] x [/INST]"),
    ],
)
def test_supervised_ids_decode_to_the_answers_and_their_end(style, turns):
    encoder, end = style
    wanted = [turn + end for turn in turns[1::2]]
    got = spans(encoder, say(*turns))
    # a piece of a Llama-2-like tokenizer may begin with the space before the answer
    assert [span.lstrip(" ") for span in got] == [span.lstrip(" ") for span in wanted]


@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=20), min_size=2, max_size=6)
)
def test_any_text_is_supervised_exactly(contents):
    encoder = PromptEncoder(TINY, 4096)
    contents = contents[: len(contents) // 2 * 2]
    assert spans(encoder, say(*contents)) == [text + "<|im_end|>" for text in contents[1::2]]


TINY = byte_level_tokenizer(CHATML)


def test_white_space_around_an_answer_is_supervised_where_the_template_keeps_it():
    for text in ("  two spaces first", "a line last\n", "\n\n\n", "x \n "):
        assert spans(PromptEncoder(TINY, 64), say("q", text)) == [text + "<|im_end|>"]


def test_a_template_that_strips_answers_leaves_the_stripped_text_supervised():
    build, _, end = STYLES["llama3"]
    assert spans(PromptEncoder(build(), 64), say("q", " \n a b \n")) == ["a b" + end]


def test_qwen3_drops_earlier_thoughts_and_supervises_the_last_one():
    encoder = PromptEncoder(byte_level_tokenizer(QWEN3), 512)
    thought = "<think>\nHm.\n</think>\n\n"
    assert spans(encoder, say("q", thought + "first", "q", thought + "second")) == [
        "first<|im_end|>",
        thought + "second<|im_end|>",
    ]
    # the empty thought that the template adds is the prompt's, not the assistant's
    assert spans(encoder, say("q", "first", "q", "second")) == [
        "first<|im_end|>",
        "second<|im_end|>",
    ]
    # written otherwise, it is supervised as the template writes it
    assert spans(encoder, say("q", "<think>Hm.</think>yes")) == [thought + "yes<|im_end|>"]


def test_the_system_prompt_and_tools_are_read_and_not_supervised():
    conversation = [
        {"role": "system", "content": "Be brief."},
        *say("q", "a"),
        {"role": "tool", "content": "result"},
    ]
    encoder = PromptEncoder(TINY, 512)
    assert spans(encoder, conversation) == ["a<|im_end|>"]
    assert "Be brief." in TINY.decode(encoder.encode(conversation).input_ids)


def test_targets_are_the_ids_one_position_later():
    example = PromptEncoder(TINY, 512).encode(say("q", "an answer", "q", "another"))
    following = [*example.input_ids[1:], None]
    pairs = zip(example.targets, following, strict=True)
    assert all(target in (IGNORE, after) for target, after in pairs)
    assert example.targets[-1] == IGNORE


def test_truncation_cuts_at_the_right_and_says_so():
    long, short = PromptEncoder(TINY, 4096), PromptEncoder(TINY, 20)
    conversation = say("q", "a b c d e f g h i j k l m n o p")
    whole, cut = long.encode(conversation), short.encode(conversation)
    assert (whole.truncated, cut.truncated) == (False, True)
    assert cut.input_ids == whole.input_ids[:20]
    assert cut.targets == [*whole.targets[:19], IGNORE]


def test_a_row_of_exactly_the_maximal_length_is_not_truncated():
    conversation = say("q", "a")
    whole = PromptEncoder(TINY, 4096).encode(conversation)
    exact = PromptEncoder(TINY, len(whole.input_ids)).encode(conversation)
    assert exact == whole


def test_a_prompt_that_fills_the_length_leaves_nothing_supervised():
    with pytest.raises(BadRow, match=r"nothing_supervised: .* data.max_length=16"):
        PromptEncoder(TINY, 16).encode(say("a long question " * 5, "a"))


def test_what_the_template_refuses_is_a_bad_row_with_its_message():
    encoder = PromptEncoder(byte_level_tokenizer(LLAMA2, bos_token="<s>"), 512)
    with pytest.raises(BadRow, match=r"template: .*roles must alternate"):
        encoder.encode([{"role": "system", "content": "s"}, *say("q", "a")])


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        (CHATML.replace("{{ m['content'] }}", "{{ m['content'] | upper }}"), "drops or repeats"),
        (
            CHATML.replace("{{ m['content'] }}", "{{ m['content'] | replace('answer', 'b') }}"),
            "changes",
        ),
        (CHATML.replace("{{ m['content'] }}", "{{ m['content'] * 2 }}"), "drops or repeats"),
        ("{% for m in messages[-1:] %}{{ m['content'] }}<|im_end|>{% endfor %}", "drops or"),
        ("{{ messages[0].nothing.at_all }}", "has no attribute"),
        ("{% for m in messages %", "template says"),
        ("{{ messages.__class__.__mro__ }}", "template says"),
    ],
)
def test_a_template_that_garbles_answers_or_fails_is_refused_at_once(template, problem):
    with pytest.raises(ValueError, match=rf"data.chat_template.*{problem}"):
        PromptEncoder(byte_level_tokenizer(template), 512)


def test_a_template_without_an_end_of_turn_is_refused_at_once():
    glm = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}{% endfor %}"
    with pytest.raises(ValueError, match=r"data.chat_template.*could not learn to stop.*plain"):
        PromptEncoder(byte_level_tokenizer(glm), 512)
    with pytest.raises(ValueError, match=r"'chatml' template ends assistant turns without"):
        PromptEncoder(metaspace_tokenizer(None), 512, "chatml")


def test_an_answer_that_merges_with_the_prompt_is_refused():
    template = "{% for m in messages %}{{ m['role'][:-1] }}{{ m['content'] }}</s>{% endfor %}"
    encoder = PromptEncoder(byte_level_tokenizer(template, eos_token="</s>"), 64)
    with pytest.raises(BadRow, match=r"template: the ids of answer 0 decode to 'sistant</s>'"):
        encoder.encode(say("q", "t"))


def test_a_turn_ends_with_the_id_that_a_student_learns_to_stop_with(style):
    encoder, end = style
    assert encoder.tokenizer.decode([encoder.end_of_turn()]).strip() == end.strip()


def test_a_missing_or_unknown_template_names_the_shipped_ones():
    assert template_names() == ["chatml", "llama3", "plain"]
    with pytest.raises(ValueError, match=r"data.chat_template=null.*chatml, llama3, plain"):
        PromptEncoder(byte_level_tokenizer(None), 64)
    with pytest.raises(ValueError, match=r"data.chat_template='nmae'.*chatml, llama3, plain"):
        PromptEncoder(TINY, 64, "nmae")


def test_a_template_file_of_the_users_is_read(tmp_path):
    file = tmp_path / "mine.jinja"
    file.write_text(LLAMA2, encoding="utf-8")
    encoder = PromptEncoder(byte_level_tokenizer(None, bos_token="<s>"), 64, str(file))
    assert spans(encoder, say("q", "a")) == ["a <|im_end|>"]


def test_a_tokenizer_without_offsets_is_refused():
    with pytest.raises(ValueError, match=r"ByT5Tokenizer\) gives no character offsets"):
        PromptEncoder(ByT5Tokenizer(), 64)


def test_prompt_ids_are_what_stands_before_the_last_answer_in_training(style):
    encoder, _ = style
    conversation = say("first", "one", "second", "two")
    ids, example = encoder.prompt_ids(conversation), encoder.encode(conversation)
    assert example.input_ids[: len(ids)] == ids
    assert example.targets[len(ids) - 1] == example.input_ids[len(ids)]
    assert encoder.tokenizer.decode(example.input_ids[len(ids) :]).strip().startswith("two")


def test_prompt_ids_without_an_answer_end_in_the_generation_prompt():
    encoder = PromptEncoder(TINY, 64)
    ids = encoder.prompt_ids(say("q"))
    assert ids == encoder.prompt_ids(say("q", "whatever"))
    assert TINY.decode(ids).endswith("<|im_start|>assistant\n")


def test_a_template_that_asks_for_the_date_gives_the_same_ids_every_day():
    dated = "{% if date_string is not defined %}{{ raise_exception('today') }}{% endif %}" + CHATML
    assert spans(PromptEncoder(byte_level_tokenizer(dated), 64), say("q", "a")) == ["a<|im_end|>"]
