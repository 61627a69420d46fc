"""What a plan is made for: how much one process is given at a time."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Workload:
    """What one process is given at a time.

    Args:
        batch_size: Sequences of a micro-batch.
        length: Tokens of a sequence.
        num_supervised: Of the tokens of a micro-batch.
        packing: Whether sequences hold several examples, which takes an attention mask.
        vocab: Ids that the models share.
        accumulate: Micro-batches of an optimizer step.
    """

    batch_size: int
    length: int
    num_supervised: int
    packing: bool
    vocab: int
    accumulate: int = 1

    @property
    def num_tokens(self) -> int:
        """Of a micro-batch, padding included."""
        return self.batch_size * self.length
