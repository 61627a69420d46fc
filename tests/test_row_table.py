import numpy as np

from neo.teachers.row_table import RowTable
from neo.teachers.shards import RECORD


def records(numbers, mark):
    """Of rows by their numbers, marked by who added them."""
    found = np.zeros(len(numbers), dtype=RECORD)
    found["row_id"], found["part"] = np.divmod(numbers, 2)
    found["content"] = mark
    return found


def test_a_table_that_grows_is_a_dictionary_whose_first_values_stay():
    random = np.random.default_rng(0)
    table, wanted = RowTable(), {}
    assert len(table) == 0
    assert not table.holds(np.array([3])).any()
    before = []
    for step in range(30):
        added = [random.integers(0, 400, random.integers(0, 30)) for _ in range(2)]
        before.append((table, dict(wanted)))
        table = table.with_more(
            [records(numbers, 2 * step + which) for which, numbers in enumerate(added)],
            [7 * step, 7 * step + 1],
        )
        for which, numbers in enumerate(added):
            for number in numbers.tolist():
                wanted.setdefault(number, (2 * step + which, 7 * step + which))
    before.append((table, wanted))
    for then, expected in before:  # older ones are as they were
        assert len(then) == len(expected)
        for number in range(-1, 401):
            found = then.find(number)
            if number not in expected:
                assert found is None
            else:
                record, shard = found
                assert (record["row_id"], record["part"]) == divmod(number, 2)
                assert (record["content"], shard) == expected[number]
        np.testing.assert_array_equal(
            then.holds(np.arange(401)), [number in expected for number in range(401)]
        )
        in_order = then.in_order()
        assert (2 * in_order["row_id"] + in_order["part"]).tolist() == list(expected)
