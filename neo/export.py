"""A run -> a PEFT adapter folder, or merged weights for plain transformers.

Usage: python -m neo.export run=DIR out=DIR [merge=true] [overwrite=true] [bound=NUMBER]

`run` is the folder of a finished run. Without `merge` the adapter is written as PEFT reads it; with
it the branch is added into the base's weights, in the dtype in which the base is stored. Both come
with tokenizer and generation config, and load without neo.

What is written is loaded again, an adapter on the base as it was, and compared with what the
trained student said to a few tokens at the end of its run. Where their logits differ by more than
`bound` of the largest logit, nothing is exported. Default: 1e-4 in float32; 5e-2 where student,
base or export are in bfloat16 or float16, whose sums differ by that much.
"""

import dataclasses
import json
import shutil
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM

from neo.config import build
from neo.models.causal_lm import CausalLM
from neo.models.quantization import dequantized
from neo.models.student import PROBE, logits_on
from neo.models.trained import with_adapter
from neo.training.finished_run import run_config

CPU = torch.device("cpu")
BOUNDS = {True: 1e-4, False: 5e-2}  # by whether all is in float32


@dataclass
class ExportConfig:
    """What the command line takes."""

    run: str = MISSING
    out: str = MISSING
    merge: bool = False
    overwrite: bool = False
    bound: float | None = None


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was written, and how far it is from the trained student.

    Args:
        what: In words, with the conversion that made it.
        difference: The largest between two logits on the probe.
        share: The same as a share of the largest logit.
        bound: What `share` may be.
    """

    what: str
    difference: float
    share: float
    bound: float

    @property
    def measured(self) -> str:
        """The comparison in words."""
        return (
            f"its logits differ from the trained student's by at most {self.difference:.1e} "
            f"({self.share:.1e} of the largest; bound={self.bound:g})"
        )


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What the trained student said at the end of its run.

    Args:
        input_ids: To these tokens.
        logits: In float32.
        dtype: Of its frozen weights.
        origin: What the run's adapter was made of.
    """

    input_ids: Tensor
    logits: Tensor
    dtype: str
    origin: str


class OtherLogitsError(ValueError):
    """What was to be exported does not say what the trained student said."""


def main() -> None:
    """The command line.

    Exits with 2 where there is nothing to export, or no room for it; with 1 where the logits are
    not the trained student's.
    """
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    if {"-h", "--help"} & set(sys.argv[1:]):
        console.print(__doc__, markup=False)
        return
    try:
        typed = OmegaConf.merge(
            OmegaConf.structured(ExportConfig), OmegaConf.from_cli(sys.argv[1:])
        )
        wanted = OmegaConf.to_object(typed)
        assert isinstance(wanted, ExportConfig)
        done = export(
            Path(wanted.run),
            Path(wanted.out),
            merge=wanted.merge,
            overwrite=wanted.overwrite,
            bound=wanted.bound,
        )
    except (OmegaConfBaseException, ValueError) as error:
        usage = isinstance(error, OmegaConfBaseException)
        text = f"{str(error).splitlines()[0]}\n{__doc__}" if usage else str(error)
        console.print(text, markup=False)
        sys.exit(1 if isinstance(error, OtherLogitsError) else 2)
    console.print(f"wrote {done.what} to {wanted.out}; {done.measured}", markup=False)


def export(
    run: Path,
    out: Path,
    *,
    merge: bool = False,
    overwrite: bool = False,
    bound: float | int | None = None,
) -> Exported:
    """Writes what a run trained to a folder that loads without neo.

    Raises:
        ValueError: The run holds nothing to export, or `out` is not empty.
        OtherLogitsError: The export does not say what the trained student said; `out` is as it was.
    """
    if bound is not None and not bound > 0:
        raise ValueError(f"bound={bound}: must be a number above 0")
    config = run_config(run)
    if run.resolve().is_relative_to(out.resolve()):
        raise ValueError(f"out={out}: holds the run itself; choose another folder")
    if out.exists() and not out.is_dir():
        raise ValueError(f"out={out}: is a file, not a folder")
    if out.exists() and any(out.iterdir()) and not overwrite:
        raise ValueError(f"out={out}: the folder is not empty; overwrite=true replaces it")
    probe = _probe(run)
    student: CausalLM = build(config["student"])
    is_new = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=out, prefix=".partial-") as partial:
            written = Path(partial)
            if (run / "model").is_dir():
                what = f"the model ({probe.origin})"
                shutil.copytree(run / "model", written, dirs_exist_ok=True)
            elif merge:
                what = _merge(run, student, config["seed"], written, probe)
            else:
                what = _copy_adapter(run, student, written, probe)
            done = _compare(what, _load(written, student, probe), probe, bound)
            _replace(out, written)
    except BaseException:
        if is_new:
            with suppress(OSError):
                out.rmdir()
        raise
    return done


def _copy_adapter(run: Path, student: CausalLM, folder: Path, probe: Probe) -> str:
    if student.random_init:
        raise ValueError(
            "student.random_init=true: the adapter's base was drawn for the run and lies in no "
            "folder; merge=true writes both"
        )
    shutil.copytree(run / "adapter", folder, dirs_exist_ok=True)
    _name_base(folder, student)
    base = "" if student.quantization is None else f", for its base in {student.quantization}"
    return f"a PEFT adapter ({probe.origin}{base})"


def _merge(run: Path, student: CausalLM, seed: int, folder: Path, probe: Probe) -> str:
    # Added in float32, then stored as the base is: adding in bfloat16 would round twice.
    if student.quantization is None:
        base, origin = student.load(CPU, trained=True, seed=seed), probe.origin
    else:  # as it was trained on: the base in full precision says something else with this branch
        rounded = dataclasses.replace(student, dtype=probe.dtype)
        base = dequantized(rounded.load(CPU, trained=False))
        origin = f"{probe.origin}, on the base's {student.quantization} weights, dequantised"
    stored = student.config().dtype or torch.float32
    merged: Any = with_adapter(base, run / "adapter").merge_and_unload(safe_merge=True)
    merged.to(stored).save_pretrained(folder)
    student.tokenizer().save_pretrained(folder)
    return f"merged weights ({origin}; {str(stored).removeprefix('torch.')})"


def _load(folder: Path, student: CausalLM, probe: Probe) -> Any:
    """What was written, as it is loaded without neo; an adapter on the base as it was."""
    if not (folder / "adapter_config.json").is_file():
        return AutoModelForCausalLM.from_pretrained(
            folder, trust_remote_code=student.trust_remote_code
        )
    plain = dataclasses.replace(
        student, dtype=probe.dtype, attn_implementation=None, activation_checkpointing=False
    )
    return with_adapter(plain.load(CPU, trained=False), folder)


def _compare(what: str, model: Any, probe: Probe, bound: float | int | None) -> Exported:
    """The model's logits against the trained student's.

    Raises:
        OtherLogitsError: They differ by more than the bound.
    """
    dtypes = {probe.dtype} | {
        str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.is_floating_point()
    }
    difference = (logits_on(model, probe.input_ids) - probe.logits).abs().max().item()
    done = Exported(
        what=what,
        difference=difference,
        share=difference / probe.logits.abs().max().item(),
        bound=BOUNDS[dtypes == {"float32"}] if bound is None else float(bound),
    )
    if not done.share <= done.bound:  # NaN is past every bound
        raise OtherLogitsError(
            f"nothing was exported: it would be {done.what}, but {done.measured}"
        )
    return done


def _replace(out: Path, written: Path) -> None:
    """Puts what lies in `written`, a folder of `out`, in the place of all else in `out`."""
    for old in out.iterdir():
        if old != written:
            shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()
    for new in written.iterdir():
        new.rename(out / new.name)


def _probe(run: Path) -> Probe:
    file = run / PROBE
    if not file.is_file():
        raise ValueError(
            f"run={run}: holds no {PROBE}, which a run writes at its end; without it there is "
            "nothing to compare an export with (rerun=true trains the run again)"
        )
    try:
        with safe_open(file, "pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in ("input_ids", "logits")}
            return Probe(**tensors, **{k: opened.metadata()[k] for k in ("dtype", "origin")})
    except (SafetensorError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: cannot be read: {str(error).splitlines()[0]}") from error


def _name_base(adapter: Path, student: CausalLM) -> None:
    """Writes into the adapter where its base is: PEFT looks there when it is given no base."""
    file = adapter / "adapter_config.json"
    config = json.loads(file.read_text())
    folder = Path(student.location)
    config["base_model_name_or_path"] = (
        str(folder.resolve()) if folder.is_dir() else student.location
    )
    config["revision"] = student.revision
    file.write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    main()
