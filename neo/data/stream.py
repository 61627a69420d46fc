"""Where rows of the user's come from: local files, and data sets of the hub by streaming."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from datasets import load_dataset
from huggingface_hub import HfApi

from neo.data.datamodule import Data
from neo.data.files import content_hash, read_files
from neo.data.order import RowTable


@dataclass(frozen=True, kw_only=True)
class FileData(Data):
    """Rows of local files.

    Args:
        path: A file, a glob or a folder of JSON, JSONL, CSV, TSV or Parquet files, all but Parquet
            also compressed (.gz, .bz2, .xz, .zst).
    """

    path: str

    def rows(self) -> RowTable:
        """The rows of all files, in the order of names and lines."""
        rows = read_files(self.path)
        if not len(rows):
            raise ValueError(f"data.path={self.path!r}: there are no rows in it")
        return rows

    def identity(self) -> dict[str, str]:
        """The hash of the files' content."""
        return {"hash": content_hash(self.path)}


@dataclass(frozen=True, kw_only=True)
class HubData(Data):
    """Rows of a data set of the Hugging Face hub, streamed, never downloaded whole.

    Args:
        path: The data set, such as "BAAI/Infinity-Instruct".
        name: The subset, where it has several.
        split: Which of its splits to train on.
        revision: A commit, branch or tag; None is the newest, which may change between runs.
    """

    path: str
    name: str | None = None
    split: str = "train"
    revision: str | None = None

    def problems(self) -> list[str]:
        """What is wrong with these values, each with what would be legal."""
        problems = super().problems()
        if self.val_share and self.max_val_rows is None:
            problems.append(
                "data.max_val_rows=null: must be a number for a stream, which would be read to its "
                "end for validation otherwise (or set data.val_share=0)"
            )
        return problems

    def rows(self) -> "HubRows":
        """The rows in the order of the data set."""
        return HubRows(self)

    def identity(self) -> dict[str, str]:
        """The hub's commit; where the hub cannot be asked, the revision as it was given."""
        try:
            commit = HfApi().dataset_info(self.path, revision=self.revision).sha
        except Exception:  # whatever a network may do; the rows themselves came from there
            commit = None
        return {"revision": str(commit or self.revision or "main")}


class HubRows:
    """A streamed data set that names itself when it cannot be read."""

    def __init__(self, data: HubData) -> None:
        self.data = data
        self.dataset: Any = self._tell(
            lambda: load_dataset(
                data.path, data.name, split=data.split, revision=data.revision, streaming=True
            )
        )

    @property
    def column_names(self) -> list[str] | None:
        """Its columns, where the data set states them."""
        return self.dataset.column_names

    def __iter__(self) -> Iterator[Any]:
        # `iter(dataset)` would give each worker files of its own, and what is read here is shared
        # out among them once more: half of the rows would be lost to two workers.
        rows = self.dataset.iter(batch_size=1)
        while (row := self._tell(lambda: next(rows, None))) is not None:
            yield {name: values[0] for name, values in row.items()}

    def _tell(self, read: Any) -> Any:
        try:
            return read()
        except Exception as error:
            data = self.data
            subset = f", subset {data.name!r}" if data.name else ""
            cause = f" ({error.__cause__})" if error.__cause__ else ""
            raise ValueError(
                f"data.path={data.path!r}: the hub's data set{subset}, split {data.split!r} cannot "
                f"be read: {type(error).__name__}: {error}{cause}. Is there a "
                "network, is the name right, and does it need `hf auth login`? For local files "
                "use data=jsonl"
            ) from error
