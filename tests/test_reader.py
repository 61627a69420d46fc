from collections import Counter

import numpy as np
import pytest
from conftest import CHATML, byte_level_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from neo.data import encoded
from neo.data.packing import RowReport
from neo.data.prompt import IGNORE, PromptEncoder
from neo.data.reader import RowStream

TOKENIZER = byte_level_tokenizer(CHATML)


def row(number: int, words: int = 1) -> dict[str, str]:
    """A row whose answer is its number, said a few times."""
    return {"prompt": "q", "completion": " ".join([f"[{number}]"] * words)}


class Streamed:
    """Rows that can only be read from the beginning."""

    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


def stream_of(rows, *, max_length=64, table=True, **changes) -> RowStream:
    settings = {"batch_size": 2, "packing": True, "shuffle": True, "seed": 1} | changes
    encoder = PromptEncoder(TOKENIZER, max_length)
    indices = np.arange(len(rows)) if table else None
    rows = rows if table else Streamed(rows)
    return RowStream(rows, indices, encoder, "prompt_completion", **settings)


def supervised(batches) -> list[str]:
    """The answers of all batches, in their order."""
    ids = [t for b in batches for t in b.targets.flatten().tolist() if t != IGNORE]
    return TOKENIZER.decode(ids).split("<|im_end|>")[:-1]


def test_without_shuffling_rows_come_as_they_stand():
    for table in (True, False):
        stream = stream_of(
            [row(i, 1 + i % 5) for i in range(20)],
            table=table,
            shuffle=False,
            packing=False,
            sort_window=1,
        )
        assert [a.split()[0] for a in supervised(stream)] == [f"[{i}]" for i in range(20)]


@settings(max_examples=25)
@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=30),
    st.integers(1, 3),
    st.booleans(),
    st.booleans(),
    st.integers(1, 4),
)
def test_every_supervised_token_appears_in_one_batch(lengths, ranks, packing, table, batch_size):
    rows = [row(i, words) for i, words in enumerate(lengths)]
    answers = [
        answer
        for rank in range(ranks)
        for answer in supervised(
            stream_of(
                rows,
                max_length=128,
                table=table,
                packing=packing,
                batch_size=batch_size,
                rank=rank,
                world_size=ranks,
            )
        )
    ]
    assert Counter(answers) == Counter(r["completion"] for r in rows)


def test_an_epoch_is_the_same_when_it_is_read_again_and_differs_from_the_next():
    for table in (True, False):
        stream = stream_of([row(i) for i in range(30)], table=table)
        first = supervised(stream)
        assert supervised(stream) == first
        stream.set_epoch(1)
        second = supervised(stream)
        assert second != first
        assert sorted(second) == sorted(first)
        stream.set_epoch(0)
        assert supervised(stream) == first


def test_reports_of_all_batches_add_up_to_every_row_read():
    rows = [row(i, 1 + 30 * (i % 3 == 0)) for i in range(12)] + [{"prompt": "q"}, row(12)]
    for packing in (True, False):
        batches = list(stream_of(rows, packing=packing, max_length=40))
        total = sum((b.report for b in batches[1:]), batches[0].report)
        assert (total.rows, total.truncated) == (14, 4)
        assert total.bad == {"malformed": 1}
        assert total.shown["malformed"][0][0] == 12


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("table", [True, False])
def test_batches_name_their_rows_by_index_or_number(packing, table):
    rows = [*(row(i, 1 + i % 5) for i in range(20)), {"prompt": "q"}]
    stream = stream_of(rows, packing=packing, table=table)
    if table:
        stream.indices = stream.indices[::2]
    for _ in range(2):  # the second time from the rows that were kept
        for batch in stream:
            said = [int(answer.split()[0][1:-1]) for answer in supervised([batch])]
            assert batch.row_ids == tuple(said)
        assert sorted(i for b in stream for i in b.row_ids) == list(range(0, 20, 2 if table else 1))


def test_rows_that_are_all_bad_still_report():
    batches = list(stream_of([{"prompt": "q"}] * 5))
    assert len(batches) == 1
    assert batches[0].num_supervised == 0
    assert batches[0].report.rows == batches[0].report.num_bad == 5
    assert len(batches[0].report.shown["malformed"]) == 3


def test_no_rows_give_no_batch():
    assert list(stream_of([], table=False)) == []


def test_sorting_by_length_cuts_the_padding_and_shuffles_the_batches():
    rows = [row(i, 1 + i * 7 % 10) for i in range(64)]
    padded = {}
    for window in (1, 16):
        batches = list(stream_of(rows, packing=False, batch_size=4, sort_window=window))
        padded[window] = sum(b.input_ids.numel() for b in batches)
    assert padded[16] < 0.85 * padded[1]
    lengths = [b.input_ids.shape[1] for b in batches]
    assert lengths != sorted(lengths)


def test_encoded_rows_are_kept_for_the_next_epoch(monkeypatch):
    stream = stream_of([*(row(i) for i in range(10)), {"prompt": "q"}])
    first, report = supervised(stream), sum((b.report for b in stream), start=RowReport())

    def forbidden(conversation):
        raise AssertionError("encoded twice")

    monkeypatch.setattr(stream.encoder, "encode", forbidden)
    assert supervised(stream) == first
    assert sum((b.report for b in stream), start=RowReport()) == report


def test_only_so_many_tokens_are_kept(monkeypatch):
    monkeypatch.setattr(encoded, "NUM_KEPT_TOKENS", 30)
    stream = stream_of([row(i) for i in range(10)])
    assert supervised(stream) == supervised(stream)
    assert 0 < len(stream.encoded) < 10


def test_a_stream_ends_after_its_first_max_rows():
    answers = supervised(stream_of([row(i) for i in range(30)], table=False, max_rows=7))
    assert sorted(answers) == sorted(f"[{i}]" for i in range(7))


@pytest.mark.parametrize("pad", ["<|pad|>", None])
def test_padding_uses_the_pad_token_or_the_first_id(pad):
    tokenizer = byte_level_tokenizer(CHATML)
    tokenizer.pad_token = pad
    stream = stream_of([row(0), row(1, 5)], packing=False)
    stream = RowStream(
        stream.rows,
        stream.indices,
        PromptEncoder(tokenizer, 64),
        "prompt_completion",
        batch_size=2,
        packing=False,
        shuffle=False,
        seed=0,
    )
    batch = next(iter(stream))
    assert batch.input_ids[0, -1] == (0 if pad is None else tokenizer.pad_token_id)
