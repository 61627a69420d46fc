from dataclasses import dataclass, field
from itertools import islice

import lightning as L
import pytest
import torch
from conftest import CHATML, byte_level_tokenizer

from neo.data.datamodule import Data, DataModule
from neo.data.loader import TooManyBadRows
from neo.data.prompt import IGNORE

TOKENIZER = byte_level_tokenizer(CHATML)


@dataclass(frozen=True, kw_only=True)
class ListData(Data):
    """Rows given by the test."""

    given: list = field(default_factory=list)
    max_length: int = 128
    val_share: float = 0.0

    def rows(self) -> list:
        return self.given


def numbered(num: int) -> list[dict[str, str]]:
    return [{"prompt": "q", "completion": f"[{i}] " * (1 + i % 3)} for i in range(num)]


def module_of(rows, *, seed: int = 0, **changes) -> DataModule:
    return DataModule(ListData(given=rows, **changes), TOKENIZER, seed)


def answers(batches) -> list[str]:
    ids = [t for b in batches for t in b.targets.flatten().tolist() if t != IGNORE]
    return TOKENIZER.decode(ids).split("<|im_end|>")[:-1]


def test_training_and_validation_share_no_conversation_and_lose_no_row():
    rows = numbered(50) * 2
    module = module_of(rows, val_share=0.2)
    train, val = answers(module.train_dataloader()), answers(module.val_dataloader())
    assert not set(train) & set(val)
    assert sorted(train + val) == sorted(row["completion"] for row in rows)
    assert (module.num_rows, module.num_val_rows) == (len(train), len(val)) == (80, 20)


def test_validation_is_the_same_whatever_the_seed_and_whenever_it_is_read():
    loaders = [
        module_of(numbered(50), val_share=0.2, seed=seed).val_dataloader() for seed in (0, 1)
    ]
    assert answers(loaders[0]) == answers(loaders[0]) == answers(loaders[1])


def test_no_share_means_no_validation():
    assert module_of(numbered(5)).val_dataloader() == []


def test_max_rows_are_drawn_with_the_seed():
    read = [
        sorted(answers(module_of(numbered(50), max_rows=10, seed=seed).train_dataloader()))
        for seed in (0, 0, 1)
    ]
    assert read[0] == read[1] != read[2]
    assert [len(rows) for rows in read] == [10, 10, 10]
    assert read[0] != sorted(row["completion"] for row in numbered(10))


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("packing", [True, False])
def test_resuming_in_the_middle_of_an_epoch_equals_never_stopping(num_workers, packing):
    options = {"num_workers": num_workers, "packing": packing, "batch_size": 2, "max_length": 64}
    whole = module_of(numbered(40), **options)
    first = next(iter(whole.train_dataloader()))
    whole.set_epoch(1)
    through = list(whole.train_dataloader())
    for batch in through:
        whole.consume(batch)
    assert len(through) > 6

    stopped = module_of(numbered(40), **options)
    stopped.set_epoch(1)
    consumed = list(islice(stopped.train_dataloader(), 5))
    for batch in consumed[:3]:  # two batches were read and not consumed
        stopped.consume(batch)
    resumed = module_of(numbered(40), **options)
    loader = resumed.train_dataloader()
    assert torch.equal(next(iter(loader)).input_ids, first.input_ids)  # workers are at work
    resumed.load_state_dict(stopped.state_dict())
    rest = list(loader)
    for batch in rest:
        resumed.consume(batch)
    assert resumed.report == whole.report
    for expected, actual in zip(through, [*consumed[:3], *rest], strict=True):
        for name in ("input_ids", "position_ids", "targets"):
            assert torch.equal(getattr(expected, name), getattr(actual, name))
    assert resumed.position == whole.position == (1, len(through))
    assert answers(resumed.train_dataloader()) == answers(whole.train_dataloader())
    for module in (whole, stopped, resumed):
        module.teardown("fit")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"seed": 1}, "seed was 0 and is 1"),
        ({"shuffle": False}, "data.shuffle was True and is False"),
        ({"max_rows": 9}, "the number of rows was 40 and is 9; data.max_rows was None and is 9"),
        ({"val_share": 0.2}, "the number of rows was 40 and is 32; data.val_share was 0.0 and is"),
    ],
)
def test_what_would_change_the_rows_of_an_epoch_forbids_resuming_in_its_middle(changes, told):
    saved = module_of(numbered(40))
    batch = next(iter(saved.train_dataloader()))
    fresh = saved.state_dict()
    saved.consume(batch)
    with pytest.raises(ValueError, match=f"cannot resume in the middle of an epoch.*{told}"):
        module_of(numbered(40), **changes).load_state_dict(saved.state_dict())
    with pytest.raises(ValueError, match="the number of rows was 40 and is 41"):
        module_of(numbered(41)).load_state_dict(saved.state_dict())
    module_of(numbered(40), **changes).load_state_dict(fresh)


def test_a_pass_counts_its_rows_anew_and_stops_past_max_bad_rows():
    rows = [*numbered(6), {"prompt": "q"}, {"prompt": "q", "completion": ""}]
    module = module_of(rows, max_bad_rows=2, batch_size=1, packing=False)
    loader = module.train_dataloader()
    for _ in range(2):
        for batch in loader:
            module.consume(batch)
        assert (module.report.rows, module.report.bad) == (8, {"malformed": 1, "empty": 1})
    strict = module_of(rows, max_bad_rows=1, batch_size=1, packing=False)
    batches = list(strict.train_dataloader())
    with pytest.raises(TooManyBadRows, match=r"data.max_bad_rows=1: 2 of the 8 rows"):
        list(map(strict.consume, batches))


def test_every_pass_is_another_epoch_unless_nothing_was_consumed_of_it():
    module = module_of(numbered(20), batch_size=2, packing=False)
    loader = module.train_dataloader()
    orders = []
    for consumed in (10, 10, 0, 4, 10):
        batches = list(islice(loader, max(consumed, 1)))
        orders.append((module.position[0], answers(batches[:1])))
        for batch in batches[:consumed]:
            module.consume(batch)
    assert [epoch for epoch, _ in orders] == [0, 1, 2, 2, 3]
    for epoch, first in orders:
        module.set_epoch(epoch)
        assert answers(islice(loader, 1)) == first


def test_no_rows_and_unknown_columns_are_refused():
    with pytest.raises(ValueError, match="there are no rows in"):
        module_of([]).setup()
    with pytest.raises(ValueError, match=r"data.schema: the columns \['text'\] fit none"):
        module_of([{"text": "x"}]).setup()
    module_of([{"text": "x"}], schema="messages").setup()


def test_all_problems_of_the_values_are_told_at_once():
    with pytest.raises(ValueError, match=r"data.max_length=0: must be at least 2") as caught:
        Data(
            max_length=0,
            batch_size=0,
            val_share=1.0,
            schema="other",
            num_workers=-1,
            max_bad_rows=-1,
            max_rows=0,
            max_val_rows=0,
        )
    for key in ("batch_size", "val_share", "schema", "num_workers", "max_bad_rows", "max_rows"):
        assert f"data.{key}=" in str(caught.value)
    assert "messages, sharegpt" in str(caught.value)
    Data(max_rows=None, max_val_rows=None, max_bad_rows=None)


class Recorder(L.LightningModule):
    """Records what it is fed, and saves a checkpoint at every sixth step."""

    def __init__(self, folder):
        super().__init__()
        self.folder = folder
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen, self.validated = [], []

    def training_step(self, batch, batch_idx):
        data = self.trainer.datamodule
        self.seen.append((data.position[0], *answers([batch])))
        data.consume(batch)
        return self.weight

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if self.folder and self.global_step % 6 == 0:
            self.trainer.save_checkpoint(self.folder / f"{self.global_step}.ckpt")

    def validation_step(self, batch, batch_idx):
        self.validated += answers([batch])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(max_steps, folder=None, resume=None, **options):
    """A run over 18 batches per epoch."""
    recorder = Recorder(folder)
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=max_steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=1,
    )
    module = module_of(numbered(40), val_share=0.1, batch_size=2, packing=False, **options)
    trainer.fit(recorder, datamodule=module, ckpt_path=resume, weights_only=True)
    return recorder


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_trainer_resumes_at_the_next_batch(tmp_path, num_workers):
    through = fit(50, tmp_path, num_workers=num_workers).seen
    assert [epoch for epoch, *_ in through] == [i // 18 for i in range(50)]
    assert [answers for _, *answers in through[:18]] != [a for _, *a in through[18:36]]
    for step in (12, 18, 24, 36) if num_workers == 0 else (18, 24):
        resume = tmp_path / f"{step}.ckpt"
        assert fit(50, resume=resume, num_workers=num_workers).seen == through[step:]


def test_a_trainer_validates_on_all_rows_held_out():
    recorder = fit(18)
    trained = {answer for _, *answers in recorder.seen for answer in answers}
    validated = recorder.validated[2:]  # without the batch of the sanity check
    assert len(validated) == 4
    assert not trained & set(validated)
