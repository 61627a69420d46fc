import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from readers import Remembering, consume, mixed_rows, modules_of, resumed, small_sizes

from neo.data.loader import TooManyBadRows
from neo.data.packing import RowReport
from neo.data.place import Place, consumed_ids
from neo.data.reader import DataChanged

SOURCES = pytest.mark.parametrize("table", [True, False], ids=["table", "stream"])
PACKING = pytest.mark.parametrize("packing", [True, False], ids=["packed", "unpacked"])


@pytest.fixture(scope="module", autouse=True)
def _small_sizes():
    with pytest.MonkeyPatch.context() as monkeypatch:
        small_sizes(monkeypatch)
        yield


def same(expected, actual) -> bool:
    return all(
        torch.equal(getattr(e, name), getattr(a, name))
        for e, a in zip(expected, actual, strict=True)
        for name in ("input_ids", "position_ids", "targets")
    ) and all(
        (e.report, e.row_ids, e.places) == (a.report, a.row_ids, a.places)
        for e, a in zip(expected, actual, strict=True)
    )


def ids_of(batches) -> list[int]:
    """The ids of all rows that lie in batches, and of those reported as bad."""
    bad = [i for b in batches for rows in b.report.shown.values() for i, _ in rows]
    return sorted([i for b in batches for i in b.row_ids] + bad)


def whole_report(batches) -> RowReport:
    return sum((batch.report for batch in batches), start=RowReport())


@SOURCES
@PACKING
@pytest.mark.parametrize("shuffle", [True, False], ids=["shuffled", "in_order"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_stopping_behind_any_batch_equals_never_stopping(table, packing, shuffle, num_workers):
    options = {"table": table, "packing": packing, "shuffle": shuffle, "num_workers": num_workers}
    (whole,) = modules_of(mixed_rows(), **options)
    whole.set_epoch(2)
    through = consume([whole])
    following = consume([whole])
    assert len(through) >= 7
    for stop in range(1, len(through) + 1):
        (stopped,) = modules_of(mixed_rows(), **options)
        stopped.set_epoch(2)
        assert same(through[:stop], consume([stopped], stop, ahead=stop % 3))
        again = resumed([stopped], lambda: modules_of(mixed_rows(), **options))
        rest = []
        if stop % 4 == 1:  # stopped again before anything was consumed, and in the middle
            again = resumed(again, lambda: modules_of(mixed_rows(), **options))
            rest = consume(again, (len(through) - stop) // 2)
            again = resumed(again, lambda: modules_of(mixed_rows(), **options))
        rest += consume(again)
        assert same(through[stop:], rest)
        if stop < len(through):
            assert again[0].report == whole_report(through)
            assert again[0].position == (2, len(through))
        assert same(following, consume(again))


@PACKING
def test_ranks_and_workers_take_up_where_they_stood(packing):
    options = {"packing": packing, "num_workers": 2, "world_size": 2}
    whole = modules_of(mixed_rows(60), **options)
    through = consume(whole)
    per_rank = len(through) // 2
    for stop in range(1, per_rank):
        stopped = modules_of(mixed_rows(60), **options)
        consume(stopped, stop, ahead=1)
        again = resumed(stopped, lambda: modules_of(mixed_rows(60), **options))
        rest = consume(again)
        for rank in range(2):
            expected = through[rank * per_rank + stop : (rank + 1) * per_rank]
            assert same(expected, rest[rank * len(expected) : (rank + 1) * len(expected)])
            assert again[rank].report == whole[rank].report


@SOURCES
@PACKING
def test_what_was_consumed_is_not_encoded_again(table, packing):
    options = {"table": table, "packing": packing}
    (whole,) = modules_of(mixed_rows(), **options)
    through = consume([whole])
    for stop in range(1, len(through)):
        (stopped,) = modules_of(mixed_rows(), **options)
        consume([stopped], stop)
        again = resumed([stopped], lambda: modules_of(mixed_rows(), **options))
        before = Remembering.num_asked
        rest = consume(again)
        left = sum(batch.num_rows + batch.report.bad["nothing_supervised"] for batch in rest)
        assert Remembering.num_asked - before == left < 30


LAYOUTS = [
    # world_size, num_workers, and what else may change
    ({"world_size": 2}, {"world_size": 1}, {"world_size": 2}),
    ({"world_size": 1}, {"world_size": 3}, {"world_size": 3}),
    ({"num_workers": 2}, {"num_workers": 0}, {"num_workers": 3}),
    ({"world_size": 2, "num_workers": 2}, {"world_size": 3}, {"world_size": 3, "num_workers": 0}),
    ({"packing": True}, {"packing": False}, {"packing": True}),
    ({"packing": False}, {"batch_size": 1}, {"packing": False, "world_size": 2}),
    ({"max_length": 64}, {"max_length": 40}, {"max_length": 64}),
]


def go_through(layouts, stops, *, rows=None, epoch=1, ahead=1, **options):
    """An epoch that is stopped and gone on with in every layout; its batches and last modules."""
    rows = mixed_rows() if rows is None else rows
    modules, consumed = None, []
    for layout, stop in zip(layouts, [*stops, None], strict=True):

        def build(changes=options | layout):
            return modules_of(rows, **changes)

        modules = build() if modules is None else resumed(modules, build)
        if not consumed:
            for module in modules:
                module.set_epoch(epoch)
        consumed += consume(modules, stop, ahead=ahead)
        if modules[0].position[0] != epoch:
            break  # nothing was left of it
    return consumed, modules


@SOURCES
@pytest.mark.parametrize("layouts", LAYOUTS, ids=lambda layouts: str(layouts[1]))
@pytest.mark.parametrize("stops", [(1, 1), (4, 2)])
def test_other_readers_go_on_with_each_row_of_the_epoch_once(table, layouts, stops):
    consumed, modules = go_through(layouts, stops, rows=mixed_rows(60), table=table)
    assert ids_of(consumed) == list(range(60))
    (whole,) = modules_of(mixed_rows(60), table=table)
    whole.set_epoch(1)
    consume([whole])
    assert modules[0].position[0] == 1  # each layout had something left to do
    report = sum((module.report for module in modules), start=RowReport())
    assert (report.rows, report.bad) == (whole.report.rows, whole.report.bad)
    assert whole.report.truncated > 5
    if not any("max_length" in layout for layout in layouts):
        assert report.truncated == whole.report.truncated
    # from the next epoch on everything is as if nothing had happened
    fresh = modules_of(mixed_rows(60), table=table, **layouts[-1])
    for module in fresh:
        module.set_epoch(2)
    assert same(consume(fresh), consume(modules))


LAYOUT = st.fixed_dictionaries(
    {
        "world_size": st.integers(1, 3),
        "num_workers": st.sampled_from([0, 2, 3]),
        "batch_size": st.integers(1, 3),
        "packing": st.booleans(),
    }
)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(LAYOUT, min_size=2, max_size=4),
    st.lists(st.integers(0, 12), min_size=3, max_size=3),
    st.integers(1, 40),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2),
)
def test_however_often_and_wherever_it_is_stopped_no_row_is_lost_or_doubled(
    layouts, stops, num_rows, table, shuffle, ahead
):
    rows = [*mixed_rows(num_rows), {"prompt": "q", "completion": "a"}]
    options = {"table": table, "shuffle": shuffle, "max_bad_rows": None}
    consumed, modules = go_through(
        layouts, stops[: len(layouts) - 1], rows=rows, ahead=ahead, **options
    )
    assert Counter(ids_of(consumed)) == Counter(range(len(rows)))
    if modules[0].position[0] == 1:  # otherwise nothing was left, and the next epoch has begun
        assert sum(module.report.rows for module in modules) == len(rows)


def test_rows_of_validation_and_beyond_max_rows_stay_out_after_a_change_of_readers():
    layouts = [{"world_size": 2}, {"world_size": 1, "num_workers": 2}, {"world_size": 3}]
    for table in (True, False):
        options = {"table": table, "val_share": 0.2, "max_rows": 28}
        (whole,) = modules_of(mixed_rows(), **options)
        whole.set_epoch(1)
        wanted = ids_of(consume([whole]))
        assert 15 < len(wanted) < 28
        consumed, _ = go_through(layouts, (3, 4), **options)
        assert ids_of(consumed) == wanted


def test_bad_rows_are_shared_out_so_that_more_readers_stop_no_sooner():
    rows = [{"prompt": "q"} if i % 3 else {"prompt": "q", "completion": "a"} for i in range(30)]
    options = {"max_bad_rows": 12, "packing": False, "batch_size": 1}
    layouts = [{"world_size": 2}, {"world_size": 3}]
    consumed, modules = go_through(layouts, (4,), rows=rows, **options)
    assert [module.report.num_bad for module in modules] == pytest.approx([20 / 3] * 3, abs=1)
    assert ids_of(consumed) == list(range(30))
    with pytest.raises(TooManyBadRows, match=r"data.max_bad_rows=12: \d+ of the"):
        go_through([{"world_size": 2}, {"world_size": 1}], (4,), rows=rows, **options)


@pytest.mark.parametrize(
    ("change", "stop", "told"),
    [
        (lambda rows: rows[:24], 5, r"finds \d+ up to row 24"),
        (lambda rows: rows + rows, 11, "which reached row 30 of .* finds \\d+ up to row 32"),
        (lambda rows: [rows[3] | {"completion": ""}] * 30, 5, "could be .* now it is empty"),
    ],
)
def test_a_stream_that_has_changed_is_refused(change, stop, told):
    (stopped,) = modules_of(mixed_rows(), table=False)
    consume([stopped], stop)
    (changed,) = modules_of(change(mixed_rows()), table=False)
    changed.load_state_dict(stopped.state_dict())
    with pytest.raises(DataChanged, match=f"cannot resume: .*{told}"):
        consume([changed])


def test_a_checkpoint_holds_a_bit_per_row_only_after_a_change_of_readers():
    rows = [row for row in mixed_rows(2000) if len(row) == 2]
    (first,) = modules_of(rows)
    consume([first], 100)
    assert len(pickle.dumps(first.state_dict())) < 2500
    (second,) = resumed([first], lambda: modules_of(rows, batch_size=3))
    consume([second], 10)
    state = second.state_dict()
    assert len(state["done"]) <= 2000 / 8
    assert len(pickle.dumps(state)) < 2750


def test_what_was_consumed_is_what_was_read_and_is_not_held():
    place = Place(worker=1, num_read=4, ready=(((7,), (9,)),), bins=((3,),))
    order = np.array([0, 1, 2, 9, 4, 3, 6, 7, 8, 5])
    assert consumed_ids([(1, place), (0, Place(0, 2))], order, 2).tolist() == [1, 0, 2]
