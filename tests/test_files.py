import bz2
import gzip
import json
import lzma
import shutil
from pathlib import Path

import pytest
import zstandard
from datasets import Dataset

from neo.data import files
from neo.data.files import UnreadableFile, find_files, read_files

ROWS = Path(__file__).parent / "rows"
COMPRESSORS = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.compress,
}


@pytest.fixture
def datasets_cache(tmp_path, monkeypatch):
    """The cache of `datasets`, in a folder of the test's own."""
    cache = tmp_path / "cache"
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(cache))
    return cache


def rows_of(path) -> list:
    rows = read_files(str(path))
    return [rows[i] for i in range(len(rows))]


def test_a_json_list_and_json_lines_give_their_rows_word_for_word():
    alpaca = rows_of(ROWS / "alpaca.json")
    assert alpaca == json.loads((ROWS / "alpaca.json").read_text(encoding="utf-8"))
    lines = (ROWS / "sharegpt.jsonl").read_text(encoding="utf-8").splitlines()
    assert rows_of(ROWS / "sharegpt.jsonl") == [json.loads(line) for line in lines]


def test_values_that_look_like_numbers_dates_or_nothing_stay_text():
    answers = [row["completion"] for row in rows_of(ROWS / "prompt_completion.csv")]
    assert [answers[i] for i in (1, 2, 3, 4, 6, 7, 8)] == [
        "05",
        "first\nsecond",
        "NA",
        'She said "yes", and left.',
        "",
        "None",
        "2024-02-29",
    ]


@pytest.mark.parametrize("suffix", COMPRESSORS)
@pytest.mark.parametrize("name", ["messages.jsonl", "alpaca.json", "prompt_completion.csv"])
def test_compressed_files_give_the_same_rows(tmp_path, name, suffix):
    file = tmp_path / (name + suffix)
    file.write_bytes(COMPRESSORS[suffix]((ROWS / name).read_bytes()))
    assert rows_of(file) == rows_of(ROWS / name)


def test_tabs_separate_the_cells_of_tsv(tmp_path):
    (tmp_path / "a.tsv").write_text("prompt\tcompletion\na, b\tc\n", encoding="utf-8")
    assert rows_of(tmp_path / "a.tsv") == [{"prompt": "a, b", "completion": "c"}]


def test_parquet_is_read_and_read_again_when_it_changes(tmp_path, datasets_cache):
    file = tmp_path / "data" / "a.parquet"
    for text in ("first", "second"):
        Dataset.from_list([{"prompt": "q", "completion": text}]).to_parquet(file)
        assert rows_of(file) == [{"prompt": "q", "completion": text}]
    assert [f.name for f in file.parent.iterdir()] == ["a.parquet"]


def test_large_files_go_through_the_cache_and_are_read_again_when_they_change(
    tmp_path, datasets_cache, monkeypatch
):
    monkeypatch.setattr(files, "MEMORY_BYTES", 10)
    file = tmp_path / "data" / "a.jsonl"
    file.parent.mkdir()
    shutil.copy(ROWS / "messages.jsonl", file)
    assert rows_of(file) == rows_of(ROWS / "messages.jsonl")
    assert list(datasets_cache.iterdir())
    file.write_text('{"prompt": "q", "completion": "new"}\n', encoding="utf-8")
    assert rows_of(file) == [{"prompt": "q", "completion": "new"}]
    file.write_text('{"prompt": "q"}\n{"prompt": \n', encoding="utf-8")
    with pytest.raises(UnreadableFile, match=r"a.jsonl, line 2: not JSON"):
        rows_of(file)
    assert [f.name for f in file.parent.iterdir()] == ["a.jsonl"]


def test_a_folder_and_a_glob_give_all_files_in_the_order_of_names(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "deep/c.json"):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps([{"name": name}])[1:-1] + "\n", encoding="utf-8")
    (tmp_path / "README.md").write_text("about", encoding="utf-8")
    (tmp_path / ".hidden.jsonl").write_text("no", encoding="utf-8")
    names = ["a.jsonl", "b.jsonl", "deep/c.json"]
    assert [row["name"] for row in rows_of(tmp_path)] == names
    assert [row["name"] for row in rows_of(tmp_path / "*.jsonl")] == names[:2]


@pytest.mark.parametrize("suffix", ["", *COMPRESSORS])
def test_a_malformed_line_is_named(tmp_path, suffix):
    text = b'{"prompt": "a"}\n\n{"prompt": "b"\n{"prompt": "c"}\n'
    file = tmp_path / f"broken.jsonl{suffix}"
    file.write_bytes(COMPRESSORS[suffix](text) if suffix else text)
    with pytest.raises(UnreadableFile, match=rf"broken.jsonl{suffix}, line 3: not JSON: .*column"):
        rows_of(file)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"p": 1}\n7\n', r"a.jsonl, line 2: a row must be a JSON object, got '7'"),
        ("a.json", '[\n{"p": 1},\n{"p": }\n]', r"a.json, line 3: not JSON"),
        ("a.json", '\n[\n{"p": 1},\n{"p": }\n]', r"a.json, line 4: not JSON"),
        ("a.json", '[{"p": 1}, 2]', r"a.json, row 1: a row must be a JSON object, got 2"),
        ("a.json", '{\n"data": []\n}', r"one JSON object with the keys \['data'\].* list of rows"),
        ("a.csv", "p,c\n1,2\n3\n", r"a.csv, line 3: 1 cells where the header has 2 \(p, c\)"),
        ("a.csv", 'p,c\n1,2\n3,"4\n', r"a.csv, line 3: not a table: unexpected end"),
        ("a.csv", "p,p\n1,2\n", r"a.csv, line 1: column names repeat"),
        ("a.jsonl.gz", "not gzip", r"a.jsonl.gz, after line 0: cannot be read: Not a gzipped"),
        ("a.jsonl.zst", "not zstd", r"a.jsonl.zst, after line 0: cannot be read"),
        ("a.txt", "text", r"a.txt is of no known format; legal are .json"),
        ("a.parquet", "not parquet", r"a.parquet'?: cannot be read as Parquet"),
        ("a.parquet.gz", "x", r"a.parquet.gz is of no known format"),
    ],
)
def test_an_unreadable_file_is_named_with_the_place(tmp_path, datasets_cache, name, text, message):
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(UnreadableFile, match=message):
        rows_of(tmp_path / name)


def test_a_file_that_is_not_utf_8_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_bytes('{"p": "é"}\n'.encode("latin-1"))
    with pytest.raises(UnreadableFile, match=r"a.jsonl, after line 0: not UTF-8"):
        rows_of(tmp_path / "a.jsonl")


def test_a_byte_order_mark_and_windows_line_ends_are_no_part_of_the_rows(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"p": "a"}\r\n{"p": "b"}\r\n')
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbfp,c\r\n1,2\r\n")
    assert rows_of(tmp_path / "a.jsonl") == [{"p": "a"}, {"p": "b"}]
    assert rows_of(tmp_path / "a.csv") == [{"p": "1", "c": "2"}]


def test_a_truncated_gzip_file_is_named(tmp_path):
    whole = gzip.compress(b'{"p": "a"}\n' * 1000)
    (tmp_path / "a.jsonl.gz").write_bytes(whole[:-20])
    with pytest.raises(UnreadableFile, match=r"a.jsonl.gz, after line \d+: cannot be read"):
        rows_of(tmp_path / "a.jsonl.gz")


def test_what_is_not_there_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UnreadableFile, match=r"data.path='.*nothing': no such file or folder"):
        find_files(str(tmp_path / "nothing"))
    with pytest.raises(UnreadableFile, match=r"data.path='.*empty': the folder holds no data"):
        find_files(str(tmp_path / "empty"))


def test_parquet_beside_text_files_is_refused(tmp_path):
    Dataset.from_list([{"p": "a"}]).to_parquet(tmp_path / "a.parquet")
    (tmp_path / "b.jsonl").write_text('{"p": "a"}', encoding="utf-8")
    with pytest.raises(UnreadableFile, match=r"holds Parquet and text files"):
        rows_of(tmp_path)
