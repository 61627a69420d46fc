import pytest

from neo.data.datamodule import DataModule
from neo.data.mini_data import MiniData
from neo.data.mini_tokenizer import build_tokenizer


def test_the_rows_are_those_of_the_mini_lab():
    data = MiniData(num_rows=40, num_val_rows=16, num_test_rows=24, label_noise=0.5)
    rows = data.rows()
    assert [len(part) for part in (rows, data.val_rows(), data.test_rows())] == [40, 16, 24]
    assert sum(row["noisy"] for row in rows) == pytest.approx(20, abs=4)
    assert not any(row["noisy"] for row in [*data.val_rows(), *data.test_rows()])
    assert [row["messages"] for row in MiniData(num_rows=40, rows_seed=1).rows()] != [
        row["messages"] for row in rows
    ]


def test_right_rows_are_the_rows_with_all_answers_right():
    data = MiniData(num_rows=40, label_noise=0.5)
    for row, right in zip(data.rows(), data.right_rows(), strict=True):
        assert not right["noisy"]
        assert row["messages"][:-1] == right["messages"][:-1]
        assert (row["messages"][-1] != right["messages"][-1]) == row["noisy"]


def test_training_and_validation_use_all_rows_of_either():
    data = MiniData(num_rows=40, num_val_rows=16, max_length=256)
    module = DataModule(data, build_tokenizer(), seed=0)
    for loader, num in ((module.train_dataloader(), 40), (module.val_dataloader(), 16)):
        reports = [batch.report for batch in loader]
        assert sum(report.rows for report in reports) == num
        assert not any(report.num_bad + report.truncated for report in reports)


def test_no_validation_rows_mean_no_validation():
    module = DataModule(MiniData(num_rows=8, num_val_rows=0), build_tokenizer(), seed=0)
    assert module.val_dataloader() == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split": "trian"}, "data.split='trian': must be one of train, val"),
        ({"num_rows": 0}, "data.num_rows=0: must be at least 1"),
        ({"num_val_rows": -1}, "data.num_val_rows=-1: must be at least 0"),
        ({"num_test_rows": 0}, "data.num_test_rows=0: must be at least 1"),
        ({"label_noise": 1.5}, r"data.label_noise=1.5: must lie in \[0, 1\]"),
        ({"rows_seed": -1}, "data.rows_seed=-1: must be at least 0"),
        ({"val_share": 0.1}, "data.val_share=0.1: must be 0 here"),
        ({"batch_size": 0}, "data.batch_size=0: must be at least 1"),
    ],
)
def test_values_out_of_range_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        MiniData(**changes)
