"""A run -> a PEFT adapter folder, or merged weights for plain transformers.

Usage: python -m neo.export run=DIR out=DIR [merge=true] [overwrite=true]

`run` is the folder of a finished run. Without `merge` the adapter is written as PEFT reads it; with
it the branch is added into the base's weights, in the dtype in which the base is stored. Both come
with tokenizer and generation config, and load without neo.
"""

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from peft import PeftModel
from rich.console import Console
from transformers import AutoModelForCausalLM

from neo.config import ConfigError, build, validate
from neo.models.causal_lm import CausalLM


@dataclass
class ExportConfig:
    """What the command line takes."""

    run: str = MISSING
    out: str = MISSING
    merge: bool = False
    overwrite: bool = False


def main() -> None:
    """The command line; exits with 2 where there is nothing to export, or no room for it."""
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
        written = export(
            Path(wanted.run), Path(wanted.out), merge=wanted.merge, overwrite=wanted.overwrite
        )
    except (OmegaConfBaseException, ValueError) as error:
        usage = isinstance(error, OmegaConfBaseException)
        text = f"{str(error).splitlines()[0]}\n{__doc__}" if usage else str(error)
        console.print(text, markup=False)
        sys.exit(2)
    console.print(f"wrote {written} to {wanted.out}", markup=False)


def export(run: Path, out: Path, *, merge: bool = False, overwrite: bool = False) -> str:
    """Writes what a run trained to a folder that loads without neo.

    Returns:
        What was written, in words.

    Raises:
        ValueError: The run holds nothing to export, or `out` is not empty.
    """
    config = _run_config(run)
    if out.exists() and any(out.iterdir()):
        if not overwrite:
            raise ValueError(f"out={out}: the folder is not empty; overwrite=true replaces it")
        shutil.rmtree(out)
    if (run / "model").is_dir():
        shutil.copytree(run / "model", out, dirs_exist_ok=True)
        return "the model (all weights were trained)"
    student: CausalLM = build(config["student"])
    if not merge:
        shutil.copytree(run / "adapter", out, dirs_exist_ok=True)
        _name_base(out, student)
        return "a PEFT adapter"
    # Added in float32, then stored as the base is: adding in bfloat16 would round twice.
    base = student.load(torch.device("cpu"), trained=True)
    stored = student.config().dtype or torch.float32
    merged: Any = PeftModel.from_pretrained(base, run / "adapter").merge_and_unload(safe_merge=True)
    merged.to(stored).save_pretrained(out)
    student.tokenizer().save_pretrained(out)
    AutoModelForCausalLM.from_pretrained(out)  # what was written can be read
    return f"merged weights ({str(stored).removeprefix('torch.')})"


def _run_config(run: Path) -> dict[str, Any]:
    """The config of a run, checked as any other: it names code that will be called."""
    file = run / "config.yaml"
    if not file.is_file():
        raise ValueError(f"run={run}: holds no config.yaml, it is not the folder of a run")
    if not (run / "adapter").is_dir() and not (run / "model").is_dir():
        raise ValueError(f"run={run}: holds neither adapter/ nor model/; did the run finish?")
    config = OmegaConf.to_container(OmegaConf.load(file))
    if not isinstance(config, dict) or "student" not in config:
        raise ConfigError([f"{file}: has no student"])
    validate(config)  # type: ignore[arg-type]
    return config  # type: ignore[return-value]


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
