"""What quantising a teacher does to its targets, to its memory and to its time.

The targets are those of the mini-lab: the divergence of the quantised teacher from the full one
over the supervised tokens of the validation rows. Unless `--seeds 0`, students are trained against
both, and all measured against the full teacher. Times are those of a wider teacher with random
weights, since a forward pass of the mini teacher is mostly overhead. nf4 and fp4 are measured by
the weights that their codes stand for: bitsandbytes' CPU kernels are wrong for the mini teacher's
shapes, and a run takes them on a GPU only. Kinds whose library is not installed are left out.
Results go to `benchmarks/results/quantization.{json,md}`.

Usage: python benchmarks/quantization.py [--seeds 3] [--steps 250] [--rounds 9] [--threads N]
"""

import argparse
import json
import logging
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import reduce
from importlib.util import find_spec
from operator import add
from pathlib import Path
from typing import Any

import torch
from machine import describe_machine
from peft import PeftModel
from rich.console import Console
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from neo.config import build, resolve
from neo.data.datamodule import DataModule
from neo.data.packing import Batch
from neo.losses.distillation import Distillation, TokenSums
from neo.models.causal_lm import CausalLM
from neo.models.hidden import hidden_states
from neo.models.quantization import KINDS, dequantized
from neo.models.student import inner
from neo.models.tokenizers import num_token_ids
from neo.teachers.online import OnlineTeacher
from neo.train import compose, train
from neo.training.frozen_linear import speed_up_frozen
from neo.training.token_loss import batch_sums

RESULTS = Path(__file__).parent / "results"
CPU = torch.device("cpu")
MINI = "neo://mini-teacher"
LIBRARIES = {"int8": "torchao", "int4": "torchao", "nf4": "bitsandbytes", "fp4": "bitsandbytes"}
WIDE = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 512,
}
MEASURED = ("kl_nats", "agreement", "ce_nats")
TOKENS = (4, 128)  # of the wide teacher's forward pass


@dataclass(frozen=True)
class Way:
    """A way to hold a teacher's weights."""

    kind: str | None
    dtype: str
    group_size: int | None = None

    @property
    def name(self) -> str:
        """As tables have it."""
        group = f", groups of {self.group_size}" if self.group_size else ""
        return f"{self.kind or 'full'}{group}, {self.dtype}"

    def spec(self, path: str) -> OnlineTeacher:
        """The teacher held so."""
        return OnlineTeacher(
            path=path,
            dtype=self.dtype,
            quantization=self.kind,
            quantization_group_size=self.group_size,
        )


FULL = Way(None, "float32")
TRAINED = (FULL, Way("int8", "float32"), Way("int4", "bfloat16", 32))
WAYS = [
    FULL,
    Way(None, "bfloat16"),
    *(Way("int8", dtype) for dtype in ("float32", "bfloat16")),
    *(Way("int4", "bfloat16", size) for size in (32, 64, 128)),
    *(Way("nf4", dtype) for dtype in ("float32", "bfloat16")),
    *(Way("fp4", dtype) for dtype in ("float32", "bfloat16")),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="students trained for each way")
    parser.add_argument("--steps", type=int, default=250, help="of a student's training")
    parser.add_argument("--rounds", type=int, default=9, help="of timing")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--name", default="quantization", help="of the two files of results")
    arguments = parser.parse_args()
    if arguments.rounds < 2 or arguments.seeds < 0 or arguments.steps < 1:
        parser.error("--rounds must be at least 2, --steps at least 1, --seeds not negative")
    torch.set_num_threads(arguments.threads)
    _quiet()
    ways = [w for w in WAYS if w.kind is None or find_spec(LIBRARIES[w.kind]) is not None]
    packages = ["torch", "transformers", *sorted({LIBRARIES[w.kind] for w in ways if w.kind})]
    report: dict[str, Any] = {
        "machine": describe_machine(arguments.threads, *packages),
        "settings": {k: v for k, v in vars(arguments).items() if k != "name"},
        "left_out": sorted({*LIBRARIES} - {str(w.kind) for w in ways}),
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        wide = str(folder / "wide")
        write_wide(wide)
        batches, vocab = validation()
        report["supervised_tokens"] = sum(batch.num_supervised for batch in batches)
        report["targets"] = targets(ways, batches, vocab)
        report["memory"] = {"mini": memory(MINI, ways), "wide": memory(wide, ways)}
        report["seconds"] = forward_times(wide, ways, arguments.rounds)
        write(report, arguments.name)  # students take long
        if arguments.seeds:
            trained = [way for way in TRAINED if way in ways]
            report["students"] = students(trained, batches, vocab, arguments, folder)
            write(report, arguments.name)
    Console(width=160).print(as_markdown(report), markup=False)


def write(report: dict[str, Any], name: str) -> None:
    """Writes the two files of results."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(report, indent=2) + "\n")
    (RESULTS / f"{name}.md").write_text(as_markdown(report))


def mini_config(*overrides: str) -> Any:
    """The config of `neo-train experiment=mini` on a CPU."""
    return compose("experiment=mini", "trainer=cpu", "eval_split=null", *overrides)


def validation() -> tuple[list[Batch], int]:
    """The mini-lab's validation rows in batches, and how many ids its models share."""
    config = resolve(mini_config())
    tokenizer = CausalLM(path="neo://mini-student").tokenizer()
    data = DataModule(build(config["data"]), tokenizer, seed=0)
    data.setup("fit")
    return list(data.val_dataloader()), num_token_ids(tokenizer)


def write_wide(folder: str) -> None:
    """A teacher of layers wide enough for their products to take the time."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LlamaConfig(**WIDE)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(CausalLM(path=MINI).location).save_pretrained(folder)


def fitting(path: str, ways: Iterable[Way]) -> Iterator[tuple[Way, PreTrainedModel]]:
    """The teacher held in every way that its shapes allow."""
    for way in ways:
        try:
            model = way.spec(path).load_frozen(CPU).model
        except ValueError as error:
            if "no multiple of a group" not in str(error):
                raise
            continue
        speed_up_frozen(model.get_decoder())
        yield way, model


def memory(path: str, ways: Iterable[Way]) -> dict[str, Any]:
    """Bytes of the backbone's linear layers and of the whole model."""
    models = dict(fitting(path, ways))
    held = {way: linear_bytes(model) for way, model in models.items()}
    return {
        way.name: {
            **asdict(way),
            "bits_per_weight": 8 * held[way] / (held[FULL] / 4),
            "linear_bytes": held[way],
            "model_bytes": sum(stored_bytes(p) for p in models[way].parameters()),
        }
        for way in models
    }


def forward_times(path: str, ways: Iterable[Way], rounds: int) -> dict[str, list[float]]:
    """Seconds of a forward pass, the ways taking turns.

    Each round has an order of its own; the first warms up and does not count.
    """
    models = dict(fitting(path, ways))
    ids = torch.randint(3, WIDE["vocab_size"], TOKENS, generator=torch.Generator())
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    seconds: dict[Way, list[float]] = {way: [] for way in models}
    with torch.no_grad():
        for number in range(rounds + 1):
            for way in random.Random(number).sample(list(models), len(models)):
                began = time.perf_counter()
                hidden_states(models[way], ids, positions)
                if number:
                    seconds[way].append(time.perf_counter() - began)
    return {way.name: values for way, values in seconds.items()}


def linear_bytes(model: PreTrainedModel) -> int:
    """Of all weights of the backbone's linear layers, with what their quantisation keeps."""
    layers = (m for m in model.get_decoder().modules() if isinstance(m, torch.nn.Linear))
    return sum(stored_bytes(layer.weight) for layer in layers)


def stored_bytes(weight: Tensor) -> int:
    """Of a weight and its scales, whatever holds them."""
    if is_traceable_wrapper_subclass(weight):  # torchao's
        names, _ = weight.__tensor_flatten__()
        return sum(stored_bytes(getattr(weight, name)) for name in names)
    state = getattr(weight, "quant_state", None)  # bitsandbytes'
    parts = () if state is None else state.as_dict(packed=False).values()
    return weight.numel() * weight.element_size() + sum(
        part.numel() * part.element_size() for part in parts if isinstance(part, Tensor)
    )


@torch.no_grad()
def against_full(
    model: PreTrainedModel, full: PreTrainedModel, batches: Iterable[Batch], vocab: int
) -> dict[str, float]:
    """Means over supervised tokens: KL(full || model) and cross-entropy in nats, agreement."""
    spec = Distillation(kd_ratio=1.0)  # forward KL at temperature 1
    each = [batch_sums(model, full, batch, spec, vocab) for batch in batches]
    sums: TokenSums = reduce(add, each)
    assert sums.kd is not None
    assert sums.agree is not None
    tokens = sums.tokens.item()
    return {
        "kl_nats": sums.kd.item() / tokens,
        "agreement": sums.agree.item() / tokens,
        "ce_nats": sums.ce.item() / tokens,
    }


def targets(ways: Iterable[Way], batches: list[Batch], vocab: int) -> dict[str, Any]:
    """How far each way's targets are from the full teacher's, on the mini-lab."""
    full = FULL.spec(MINI).load_frozen(CPU).model
    found = {}
    for way, model in fitting(MINI, ways):
        exact = dequantized(model) if way.kind in KINDS else model
        if way.kind in KINDS and way.dtype == "bfloat16":
            exact = exact.to(torch.bfloat16)
        found[way.name] = against_full(exact, full, batches, vocab)
    return found


def students(
    ways: Iterable[Way],
    batches: list[Batch],
    vocab: int,
    arguments: argparse.Namespace,
    folder: Path,
) -> dict[str, Any]:
    """Students trained against each teacher that a CPU run takes, measured against the full one."""
    full = FULL.spec(MINI).load_frozen(CPU).model
    found: dict[str, Any] = {}
    for way in ways:
        keys = [f"teacher.dtype={way.dtype}", f"trainer.max_steps={arguments.steps}"]
        if way.kind:
            keys.append(f"teacher.quantization={way.kind}")
        if way.group_size:
            keys.append(f"teacher.quantization_group_size={way.group_size}")
        found[way.name] = []
        for seed in range(arguments.seeds):
            run = folder / f"{way.kind}-{seed}"
            own = [f"seed={seed}", f"run_dir={run}", "trainer.enable_progress_bar=false"]
            config = mini_config("method=neo", *keys, *own)
            if (record := train(config)) is None or record.status != "ok":
                raise RuntimeError(f"{way.name}, seed {seed}: the run did not end")
            base = CausalLM(path="neo://mini-student").load(CPU, trained=False)
            student = inner(PeftModel.from_pretrained(base, run / "adapter")).eval()
            found[way.name].append(against_full(student, full, batches, vocab))
    return found


def spread(values: list[float], digits: int) -> str:
    """Mean and sample standard deviation."""
    if len(values) < 2:
        return f"{values[0]:.{digits}f}"
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def quartiles(values: list[float]) -> str:
    """Median, with quartiles."""
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def table(headings: list[str], rows: Iterable[list[str]]) -> str:
    """As Markdown has it."""
    lines = [headings, ["---", *["--:"] * (len(headings) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def as_markdown(report: dict[str, Any]) -> str:
    """The tables for readers, with workload and machine."""
    mini, wide = report["memory"]["mini"], report["memory"]["wide"]
    full = report["seconds"][FULL.name]
    targets_headings = [
        "weights, dtype",
        "KL(full, quantised), nats/token",
        "same top token",
        "own ce, nats/token",
        "bits/weight",
        "linear layers, MiB",
    ]
    of_targets = [
        [
            name,
            f"{found['kl_nats']:.2e}",
            f"{found['agreement']:.2%}",
            f"{found['ce_nats']:.4f}",
            f"{mini[name]['bits_per_weight']:.2f}",
            f"{mini[name]['linear_bytes'] / 2**20:.2f}",
        ]
        for name, found in report["targets"].items()
    ]
    of_time = [
        [
            name,
            f"{wide[name]['bits_per_weight']:.2f}",
            f"{wide[name]['linear_bytes'] / 2**20:.1f}",
            f"{1000 * statistics.median(seconds):.0f}",
            quartiles([s / f for s, f in zip(seconds, full, strict=True)]),
        ]
        for name, seconds in report["seconds"].items()
    ]
    parts = [
        "## A quantised teacher against the full one",
        table(targets_headings, of_targets),
        f"The mini teacher on the mini-lab's validation rows: {report['supervised_tokens']:,} "
        "supervised tokens, temperature 1; own ce is against the right answers. Head and "
        "embedding are never quantised. Its layers have 96 and 288 columns, which groups of 64 "
        "and 128 do not divide. nf4 and fp4: by the weights that their codes stand for.",
        "## A wider teacher: memory and time",
        table(
            ["weights, dtype", "bits/weight", "linear layers, MiB", "forward, ms", "of full"],
            of_time,
        ),
        f"{WIDE['num_hidden_layers']} layers of {WIDE['hidden_size']} x "
        f"{WIDE['intermediate_size']}, random weights; a forward pass of {TOKENS[0]} x {TOKENS[1]} "
        "tokens on a CPU. Ratios are of the same round: medians, with quartiles, of "
        f"{len(full)} rounds in which the ways take turns.",
    ]
    if found := report.get("students"):
        parts += [
            "## Students of either",
            table(
                [
                    "teacher",
                    "KL(full teacher, student), nats/token",
                    "same top token",
                    "ce, nats/token",
                ],
                [
                    [name, *(spread([run[key] for run in runs], 4) for key in MEASURED)]
                    for name, runs in found.items()
                ],
            ),
            f"`experiment=mini method=neo` over {report['settings']['seeds']} seeds, "
            f"{report['settings']['steps']} steps; mean ± sample standard deviation. All are "
            "measured against the full teacher, whichever they learned from.",
        ]
    if report["left_out"]:
        parts.append(f"Left out, not installed: {', '.join(report['left_out'])}.")
    parts.append(f"{report['machine']}.")
    return "\n\n".join(parts) + "\n"


def _quiet() -> None:
    """Silences what libraries say to each other."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    disable_progress_bar()
    warnings.filterwarnings("ignore", ".is_gradient_checkpointing. is deprecated", FutureWarning)


if __name__ == "__main__":
    main()
