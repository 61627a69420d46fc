"""The mini-lab's tokenizer: bytes, the words of the tasks, and a chat template."""

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from neo.data.mini_wordings import PHRASINGS, WORDS

PAD, BOS, START, END = "<|pad|>", "<|bos|>", "<|im_start|>", "<|im_end|>"
MAX_LENGTH = 256

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# a digit, a word or a run of signs with the space after it, or one space or line break; a space
# before would make a name at the beginning of an answer another token than the name in the question
PIECE = r"\p{N}|\p{L}+ ?|[^\s\p{L}\p{N}]+ ?|\s"


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer in which every word of the phrasings is one token.

    All 256 bytes are in the vocabulary, so that any text survives; digits, and letters that form
    no word of the tasks, stay single.
    """
    split = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECE), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    specials = [PAD, BOS, START, END]
    tokens = dict.fromkeys(specials + sorted(pre_tokenizers.ByteLevel.alphabet()))
    for text in _texts():
        tokens.update(dict.fromkeys(piece for piece, _ in split.pre_tokenize_str(text)))
    # without merges a piece is one token where the vocabulary has it whole, and else its bytes
    vocabulary = {token: i for i, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    backend.pre_tokenizer = split
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in specials])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=END,
        additional_special_tokens=[START],
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )


def _texts() -> list[str]:
    """The wordings with a digit for every operand, and what operands spell out, sorted."""
    texts = {"user", "assistant", "system", "tool"}
    for wordings in PHRASINGS.values():
        for wording in wordings:
            pieces = wording.replace("}", "{").split("{")
            texts.add("0".join(pieces[::2]))
    for word in WORDS:
        texts |= {word, f"{word} "}
    return sorted(texts)
