"""The document of the format says how a cache is read without neo: that is done here."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from small_cache import D_STUDENT, EACH, KEYS, NAMES, stored, write

from neo.teachers import store
from neo.teachers.fields import DTYPES
from neo.teachers.shards import RECORD
from neo.teachers.store import CacheFolder
from neo.teachers.unpack import unpacked

README = Path(store.__file__).with_name("README.md").read_text(encoding="utf-8")
(CODE,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def reader():
    names = {}
    exec(CODE, names)
    return names["read_row"]


@pytest.mark.parametrize("kept", EACH, ids=NAMES)
def test_every_kind_is_read_with_numpy_alone(kept, tmp_path):
    write(tmp_path, kept)
    cache = CacheFolder.open(tmp_path)
    read_row = reader()
    for key, num_tokens in KEYS:
        found = read_row(tmp_path, *key)
        wanted = unpacked([cache.read(key)], kept, cache.manifest.shapes)
        assert list(found) == [field.name for field in cache.manifest.fields]
        for name, column in wanted.items():
            if name == "log_p":
                values = column.numpy()[:, :] * -1
                listed = found["count"] if "count" in found else [values.shape[1]] * num_tokens
                flat = [row[:n] for row, n in zip(values, listed, strict=True)]
                np.testing.assert_array_equal(found["nats"], np.concatenate(flat))
            elif name == "ids":
                listed = found["count"] if "count" in found else [column.shape[1]] * num_tokens
                flat = [row[:n] for row, n in zip(column.numpy(), listed, strict=True)]
                np.testing.assert_array_equal(found["ids"], np.concatenate(flat))
            else:
                column = column.float() if column.is_floating_point() else column
                np.testing.assert_array_equal(found[name], column.numpy().reshape(-1))


def test_the_reader_is_short_and_needs_nothing_but_numpy(tmp_path):
    body = [line for line in CODE.splitlines() if line and not line.startswith(("import", "from"))]
    assert len(body) <= 22
    kept = stored("projected", "float32")
    write(tmp_path, kept)
    code = f"{CODE}\nimport sys\nrow = read_row({str(tmp_path)!r}, 0, 2)\n"
    code += f"print(row['mean_row'].reshape(-1, {D_STUDENT}).shape, 'torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"(7, {D_STUDENT}) False\n"


def test_a_damaged_row_is_seen_without_neo_as_well(tmp_path):
    write(tmp_path, stored("top_p"))
    file = tmp_path / "rows-00000.bin"
    content = bytearray(file.read_bytes())
    content[5] ^= 4
    file.write_bytes(content)
    with pytest.raises(AssertionError, match="damaged"):
        reader()(tmp_path, *KEYS[0][0])


def test_the_document_knows_every_field_and_dtype():
    table = README[README.index("| bytes |") : README.index("Blobs lie")]
    for name in RECORD.names:
        assert name == "reserved" or f"`{name}`" in table
        dtype, offset = RECORD.fields[name][:2]
        assert f"| {offset}-{offset + dtype.itemsize - 1} |" in table
    for name in set(DTYPES) - {"uint8"}:
        assert f"`{name}`" in README
