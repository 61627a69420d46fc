"""The LightningModule: it holds student and teacher, and joins data, models and loss."""

import time
from contextlib import nullcontext
from typing import Any, cast

import lightning as L
import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from neo.data.packing import Batch
from neo.losses.distillation import Distillation, TokenSums
from neo.losses.given import Given
from neo.models.causal_lm import CausalLM
from neo.models.head import gathered
from neo.models.hidden import check_packing
from neo.models.sharding import decoder_layers, is_sharded, reshard
from neo.models.start import Start, start_of
from neo.models.student import inner, trained_parameters
from neo.models.variants import Variant
from neo.teachers.online import FrozenTeacher, OnlineTeacher
from neo.training.attaching import attached
from neo.training.cached_targets import CachedTargets, check_all_alike
from neo.training.frozen_linear import speed_up_frozen
from neo.training.loggers import wandb_id
from neo.training.optim import AdamW
from neo.training.peak_memory import PeakMemory
from neo.training.random_state import random_states, restore_random_state
from neo.training.skipped_steps import SkippedSteps, gradient_norm
from neo.training.split import split_student
from neo.training.strategies import local
from neo.training.token_loss import batch_sums


class NeoModule(L.LightningModule):
    """Trains a student against a frozen teacher; checkpoints hold the trained weights only.

    Args:
        student: What is loaded as the student's base.
        teacher: None where no teacher is loaded.
        lora: The branch, or all weights.
        loss: The weighted sum of cross-entropy and divergence.
        optim: Optimizer and schedule.
        vocab: Ids that student and teacher share: [0, vocab). Rows of a head beyond are padding.
        seed: Of the branch's initial weights.
        cached: What it is asked in place of the teacher, which then computes what is lacking.
        start: Of the branch, where a run goes on: it is not computed again.
        memory: Of the run, in which the branch's initialisation is measured.
        compile_layers: Give the decoder layers of both models to `torch.compile`.
        max_skipped_steps: How many steps without a sound gradient a run may skip.
    """

    student: nn.Module
    teacher: FrozenTeacher | None

    def __init__(
        self,
        student: CausalLM,
        teacher: OnlineTeacher | None,
        lora: Variant,
        loss: Distillation,
        optim: AdamW,
        *,
        vocab: int,
        seed: int = 0,
        cached: CachedTargets | None = None,
        start: Start | None = None,
        memory: PeakMemory | None = None,
        compile_layers: bool = False,
        max_skipped_steps: int = 10,
    ) -> None:
        super().__init__()
        self.compile_layers = compile_layers
        self.specs, self.cached = (student, teacher, lora), cached
        self.start, self.memory = start, memory or PeakMemory()
        self.init_metrics: dict[str, float] = {}  # what it took to initialise the branch
        self.loss, self.optim, self.vocab, self.seed = loss, optim, vocab, seed
        self.strict_loading = False
        self.built = False
        self.penalty: Tensor | None = None  # of the last step
        self.num_tokens = torch.tensor(0)  # supervised, trained on by all ranks; on the device
        self.rows_in_epoch = 0  # consumed by all ranks
        self.rows_in_step = 0
        self.step_sums: TokenSums | None = None  # of the optimizer step under way
        self.val_sums: TokenSums | None = None
        self.skipped = SkippedSteps(max_skipped_steps)

    def configure_model(self) -> None:
        """Loads the weights, once."""
        if self.built:
            return
        student, teacher, lora = self.specs
        strategy: Any = self.trainer.strategy if self._trainer else None
        if strategy is not None:
            check_all_alike(self.trainer, teacher is not None, self.cached)
        device = strategy.root_device if strategy else torch.device("cpu")
        split = getattr(strategy, "split_student", False)
        base = None if split else student.load(device, trained=lora.adapter is None, seed=self.seed)
        self.teacher = None
        if teacher is not None:
            mesh = strategy.mesh if getattr(strategy, "split_teacher", False) else None
            self.teacher = teacher.load_frozen(device, mesh)
        began = time.perf_counter()
        with self.memory.part() as measured:
            if base is None:
                self.student = split_student(self)
            else:
                self.student = attached(self, base, lora, device)
        self.init_metrics["perf/init_s"] = time.perf_counter() - began
        if "gib" in measured:
            self.init_metrics["perf/init_peak_mem_gib"] = measured["gib"]
        for name, weight in trained_parameters(self.student).items():
            if weight.dtype in (torch.bfloat16, torch.float16):  # PEFT copies modules as they are
                raise ValueError(
                    f"lora.modules_to_save: {name} would be trained in {weight.dtype}; set "
                    "student.dtype=float32"
                )
        data = getattr(self._trainer, "datamodule", None)
        for model in (inner(self.student), getattr(self.teacher, "model", None)):
            if model is not None:
                if data is not None and data.data.packing:
                    with strategy.precision_plugin.forward_context() if split else nullcontext():
                        check_packing(model)
                if not self.compile_layers:
                    speed_up_frozen(model.get_decoder())
                else:  # which chooses its own products
                    for layer in decoder_layers(model):
                        # not the layer, whose hooks gather and free its weights
                        layer.forward = torch.compile(layer.forward, dynamic=True)
        self.built = True

    def token_sums(
        self, batch: Batch, *, with_teacher: bool, kd_positions: str = "aligned"
    ) -> TokenSums:
        """The loss of a batch, summed over its supervised tokens."""
        student = inner(self.student)
        sums = batch_sums(
            student,
            self.teaching(batch) if with_teacher else None,
            batch,
            self.loss,
            self.vocab,
            kd_positions=kd_positions,
        )
        if not torch.is_grad_enabled():
            reshard(student)
        if self.teacher is not None:
            reshard(self.teacher.model)
        return sums

    def teaching(self, batch: Batch) -> PreTrainedModel | Given | None:
        """The teacher, or what it gives for a batch where that is kept; None without one."""
        model = None if self.teacher is None else self.teacher.model
        if self.cached is None:
            return model
        reduce = self.trainer.strategy.reduce if model is not None and is_sharded(model) else None
        return self.cached.given(batch, model, inner(self.student), reduce=reduce)

    def training_step(self, batch: Batch, batch_idx: int) -> Float[Tensor, ""]:
        """The loss as a sum over tokens; `on_before_optimizer_step` divides, once."""
        distils = self.loss.kd_ratio > 0
        positions = self.loss.kd_positions if distils else "aligned"
        sums = self.token_sums(batch, with_teacher=distils, kd_positions=positions)
        rows = batch.num_rows_all_ranks
        self.rows_in_step = rows + (0 if self.step_sums is None else self.rows_in_step)
        so_far = sums.detach()
        self.skipped.add(batch.row_ids, so_far)
        self.step_sums = so_far if self.step_sums is None else self.step_sums + so_far
        data = cast(Any, self.trainer).datamodule
        data.consume(batch)
        first = data.position[1] == 1
        self.rows_in_epoch = rows + (0 if first else self.rows_in_epoch)
        return sums.loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Makes every gradient the mean over all supervised tokens of this step, before clipping.

        Lightning has divided by the micro-batches (and DDP by the ranks); both are undone here,
        so that neither accumulation nor the number of devices changes what is optimized. A step
        whose loss or gradient is no number loses its gradients, and its tokens are not counted.
        """
        assert self.step_sums is not None
        sums, self.step_sums = self.step_sums, None
        reduce = self.trainer.strategy.reduce
        tokens = cast(Tensor, reduce(sums.tokens.clone(), reduce_op="sum"))  # in place
        undo = self.trainer.accumulate_grad_batches * self.trainer.world_size
        gradients = [p.grad for p in self.student.parameters() if p.grad is not None]
        torch._foreach_mul_([local(g) for g in gradients], undo / tokens.clamp(min=1))
        if (penalty := self.specs[2].penalty) is not None:
            with gathered(self.student, frozen=False):
                value = penalty(self.student)
            self._add_gradient(value)
        lr = self.optim.set_rates(optimizer, self.progress())
        norm = gradient_norm(gradients)
        if self.skipped.must_skip(self.trainer, list(self.student.parameters()), norm):
            return
        self.num_tokens = self.num_tokens.to(tokens.device) + tokens
        if (self.trainer.global_step + 1) % cast(Any, self.trainer).log_every_n_steps == 0:
            self._log_step(sums, tokens, norm, lr)

    def on_train_end(self) -> None:
        """Refuses to end well where nothing was trained."""
        self.skipped.check_end(self.trainer)

    def _add_gradient(self, penalty: Float[Tensor, ""]) -> None:
        """Adds the gradient of what depends on no row, once per optimizer step."""
        weights = [p for p in self.student.parameters() if p.grad is not None]
        found = torch.autograd.grad(penalty, weights, allow_unused=True)
        for weight, gradient in zip(weights, found, strict=True):
            if gradient is not None:
                cast(Tensor, weight.grad).add_(gradient)
        self.penalty = penalty.detach()

    def _log_step(self, sums: TokenSums, tokens: Tensor, norm: Tensor, lr: float) -> None:
        """Logs a step; only every so many, since a call of `log` costs as much as a small step."""
        names = ("loss", "ce", "kd", "student_entropy", "teacher_target")
        own = {name: value for name in names if (value := getattr(sums, name)) is not None}
        # one exchange for all of them
        totals = self.trainer.strategy.reduce(torch.stack(list(own.values())), reduce_op="sum")
        means = {
            f"train/{name}": total / tokens.clamp(min=1)
            for name, total in zip(own, cast(Tensor, totals), strict=True)
        }
        if self.penalty is not None:
            means["train/penalty"] = self.penalty
        if self.skipped.num:
            means["train/skipped_steps"] = torch.tensor(float(self.skipped.num))
        seen = self.num_tokens.float()
        self.log_dict(means | {"train/grad_norm": norm, "train/lr": lr, "train/tokens": seen})

    def progress(self) -> float:
        """How much of the run lies behind the middle of this step, in [0, 1]."""
        trainer = cast(Any, self.trainer)
        shares = []
        if trainer.max_steps > 0:
            shares.append((trainer.global_step + 0.5) / trainer.max_steps)
        if trainer.max_epochs and trainer.max_epochs > 0 and trainer.datamodule.num_rows:
            # The rows of this step are counted already: half of them lie behind its middle.
            # Lightning's own can be one ahead after a resume.
            epoch = trainer.datamodule.position[0]
            rows = self.rows_in_epoch - self.rows_in_step / 2
            shares.append((epoch + rows / trainer.datamodule.num_rows) / trainer.max_epochs)
        return min(1.0, max(shares, default=0.0))

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Adds up the sums; a teacher that is there is measured against, in the loss or not."""
        sums = self.token_sums(batch, with_teacher=True)
        self.val_sums = sums if self.val_sums is None else self.val_sums + sums

    def on_validation_epoch_end(self) -> None:
        """Logs means over all supervised tokens of the validation rows."""
        if self.val_sums is None:
            return
        sums, self.val_sums = self.val_sums, None
        reduce = self.trainer.strategy.reduce
        tokens = cast(Tensor, reduce(sums.tokens, reduce_op="sum")).clamp(min=1)
        named = {
            "val/loss": sums.loss,
            "val/ce": sums.ce,
            "val/kd": sums.kd,
            "val/student_entropy": sums.student_entropy,
            "val/agreement": sums.agree,
            "val/teacher_target": sums.teacher_target,
            "val/teacher_mass_out": sums.teacher_mass_out,
        }
        self.log_dict(
            {
                name: cast(Tensor, reduce(value, reduce_op="sum")) / tokens
                for name, value in named.items()
                if value is not None
            }
        )

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimizer over what is trained; its rate is set at every step from the progress."""
        return self.optim.build(trained_parameters(self.student))

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The trained weights and nothing else."""
        return {f"student.{n}": p.detach() for n, p in trained_parameters(self.student).items()}

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Loads trained weights.

        Raises:
            ValueError: The checkpoint does not hold exactly what this run trains, so that some of
                it would silently stay as it was initialised.
        """
        expected = self.state_dict()
        if expected.keys() != state_dict.keys():
            differing = sorted(expected.keys() ^ state_dict.keys())
            raise ValueError(
                "the checkpoint holds other weights than this run trains: "
                f"{len(differing)} differ, such as {differing[0]}"
            )
        return super().load_state_dict(state_dict, strict=False, assign=assign)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the branch's start, the counters and the random states, which resuming needs."""
        start = start_of(self.student)
        checkpoint["neo"] = {
            "num_tokens": self.num_tokens,
            "rows_in_epoch": self.rows_in_epoch,
            "skipped_steps": self.skipped.num,
            "rng": random_states(),
            "start": None if start is None else start._asdict(),
            "init_metrics": self.init_metrics,
            "wandb_id": wandb_id(self._trainer.loggers) if self._trainer else None,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores what `on_save_checkpoint` added."""
        kept = checkpoint["neo"]
        self.num_tokens, self.rows_in_epoch = kept["num_tokens"], kept["rows_in_epoch"]
        self.restored_rng, self.init_metrics = kept["rng"], kept["init_metrics"]
        self.skipped.num = kept["skipped_steps"]

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Sets the random state last, after everything that set-up has drawn."""
        if (states := getattr(self, "restored_rng", None)) is not None:
            data = cast(Any, self.trainer).datamodule
            restore_random_state(states, self.global_rank, self.seed, data.position)
            del self.restored_rng
