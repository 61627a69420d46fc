"""Rows as examples, kept from one epoch to the next where there is room."""

from array import array
from dataclasses import replace
from typing import Any

from neo.data.prompt import Example, PromptEncoder
from neo.data.rows import BadRow, to_conversation

# Encoded rows are kept for the next epoch up to so many tokens (16 bytes each) per worker.
NUM_KEPT_TOKENS = 4_000_000


class EncodedRows:
    """What rows become, by their ids.

    Args:
        encoder: Turns a conversation into ids and targets.
        schema: One of `SCHEMAS`.
        keep: Rows are asked for again, so that it pays to keep them.
    """

    def __init__(self, encoder: PromptEncoder, schema: str, *, keep: bool) -> None:
        self.encoder, self.schema, self.keep = encoder, schema, keep
        self._kept: dict[int, tuple[array[int], array[int], bool] | BadRow] = {}
        self._num_tokens = 0

    def __contains__(self, row_id: int) -> bool:
        return row_id in self._kept

    def __len__(self) -> int:
        return len(self._kept)

    def encode(self, row_id: int, row: Any) -> Example:
        """The row as an example; one that is kept may be given as None.

        Raises:
            BadRow: It cannot be trained on.
        """
        kept = self._kept.get(row_id)
        if isinstance(kept, BadRow):
            raise BadRow(kept.reason, kept.detail)
        if kept is not None:
            return Example(kept[0].tolist(), kept[1].tolist(), kept[2], row_id)
        keep = self.keep and self._num_tokens < NUM_KEPT_TOKENS
        try:
            example = self.encoder.encode(to_conversation(row, self.schema))
        except BadRow as error:
            if keep:
                self._kept[row_id] = BadRow(error.reason, error.detail)
            raise
        if keep:
            ids, targets = array("i", example.input_ids), array("i", example.targets)
            self._kept[row_id] = (ids, targets, example.truncated)
            self._num_tokens += len(ids)
        return replace(example, row_id=row_id)
