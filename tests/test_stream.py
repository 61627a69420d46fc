import json
from pathlib import Path

import pytest
from datasets import Dataset

from neo.data.datamodule import DataModule
from neo.data.stream import FileData, HubData

ROWS = Path(__file__).parent / "rows"


@pytest.fixture
def hub_folder(tmp_path, monkeypatch):
    """A data set of 500 rows in two files that `datasets` streams as it would stream the hub's."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "hub"
    for part in range(2):
        # every conversation stands twice
        rows = [{"prompt": f"q {i // 2}", "completion": f"[{i // 2}]"} for i in range(250)]
        rows = [{**row, "prompt": f"{part} {row['prompt']}"} for row in rows]
        Dataset.from_list(rows).to_parquet(folder / f"train-{part}.parquet")
    return str(folder)


def read(loader) -> tuple[list[tuple[int, ...]], int]:
    """Every example's ids, sorted, and how many rows were read."""
    examples, rows = [], 0
    for batch in loader:
        rows += batch.report.rows
        for ids, targets in zip(batch.input_ids, batch.targets, strict=True):
            if (targets >= 0).any():
                examples.append(tuple(ids[: int((targets >= 0).nonzero()[-1]) + 2].tolist()))
    return examples, rows


@pytest.mark.parametrize(
    ("name", "schema", "rows", "bad"),
    [
        ("alpaca.json", "alpaca", 12, {"empty": 1}),
        (
            "sharegpt.jsonl",
            "sharegpt",
            12,
            {"empty": 2, "no_assistant_turn": 1, "malformed": 1, "nothing_supervised": 1},
        ),
        ("messages.jsonl", "messages", 10, {"empty": 1, "malformed": 1}),
        ("prompt_completion.csv", "prompt_completion", 10, {"empty": 1, "nothing_supervised": 1}),
    ],
)
def test_a_file_of_each_kind_is_read_and_its_bad_rows_are_counted(
    tiny_tokenizer, name, schema, rows, bad
):
    data = FileData(path=str(ROWS / name), max_length=128, batch_size=2, val_share=0.0)
    module = DataModule(data, tiny_tokenizer, seed=0)
    for batch in module.train_dataloader():
        module.consume(batch)
    assert module.schema == schema
    assert module.num_rows == module.report.rows == rows
    assert module.report.bad == bad
    assert module.report.truncated >= (name in ("alpaca.json", "messages.jsonl"))


def test_a_missing_path_and_an_empty_file_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"data.path='.*none.jsonl': no such file or folder"):
        FileData(path=str(tmp_path / "none.jsonl")).rows()
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ValueError, match=r"data.path='.*empty.jsonl': there are no rows"):
        FileData(path=str(tmp_path / "empty.jsonl")).rows()


def test_a_stream_gives_every_row_once_and_none_of_validation(tiny_tokenizer, hub_folder):
    data = HubData(path=hub_folder, val_share=0.1, packing=False, batch_size=4)
    module = DataModule(data, tiny_tokenizer, seed=0)
    train, num_train = read(module.train_dataloader())
    val, num_val = read(module.val_dataloader())
    assert num_train + num_val == 500
    assert module.num_rows is None
    assert module.num_val_rows == num_val > 10
    assert not set(train) & set(val)
    assert len(set(train) | set(val)) == 250
    everything = DataModule(HubData(path=hub_folder, val_share=0.0), tiny_tokenizer, seed=0)
    assert read(everything.train_dataloader())[1] == 500


def test_a_stream_of_max_rows_validates_within_them(tiny_tokenizer, hub_folder):
    data = HubData(path=hub_folder, val_share=0.1, max_rows=100, max_val_rows=3, packing=False)
    module = DataModule(data, tiny_tokenizer, seed=0)
    _, num_train = read(module.train_dataloader())
    assert 70 < num_train < 98
    assert module.num_val_rows == 3


def test_workers_share_a_stream(tiny_tokenizer, hub_folder):
    data = HubData(path=hub_folder, val_share=0.0, packing=False, num_workers=2)
    module = DataModule(data, tiny_tokenizer, seed=0)
    examples, rows = read(module.train_dataloader())
    module.teardown("fit")
    assert rows == len(examples) == 500
    assert len(set(examples)) == 250


def test_a_hub_name_that_cannot_be_reached_is_named(monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    message = r"data.path='no/such': the hub's data set, subset 'x', split 'train' cannot be read"
    with pytest.raises(ValueError, match=message):
        HubData(path="no/such", name="x").rows()


def test_a_stream_that_breaks_off_is_named(hub_folder, monkeypatch):
    rows = HubData(path=hub_folder).rows()
    texts = iter(['{"prompt": ["q"]}', "broken"])
    monkeypatch.setattr(rows.dataset, "iter", lambda batch_size: map(json.loads, texts))
    with pytest.raises(ValueError, match=r"data.path='.*hub': .* cannot be read: JSONDecodeError"):
        list(rows)


def test_a_stream_needs_a_bound_on_validation():
    with pytest.raises(ValueError, match=r"data.max_val_rows=null: must be a number for a stream"):
        HubData(path="x/y", max_val_rows=None)
    HubData(path="x/y", max_val_rows=None, val_share=0.0)
