"""A causal LM of transformers: where it lies, and how it is loaded."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from huggingface_hub import HfApi, try_to_load_from_cache
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from neo.models.hidden import check_head
from neo.models.integer_weights import INTEGERS
from neo.models.quantization import KINDS, four_bit, keep_layout

MINI = Path(__file__).parent / "mini"
SHIPPED = ("neo://mini-student", "neo://mini-teacher")
LARGE = 64 * 2**20  # bytes of a file that is not hashed whole
NUM_SLICES = 1024  # of such a file
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class CausalLM:
    """A causal LM by folder or hub name; building it from a config reads nothing.

    Args:
        path: A folder, a hub name, or `neo://mini-student` and `neo://mini-teacher`, which are
            shipped with the package.
        revision: A branch, tag or commit of the hub.
        dtype: Of the frozen weights. `auto`: bfloat16 on a GPU that has it, else float32. Trained
            weights are always float32.
        quantization: nf4 or fp4: linear layers but the head are frozen in 4 bits, and multiplied in
            `dtype`. Needs a CUDA device and bitsandbytes.
        attn_implementation: As in transformers; None lets it choose.
        activation_checkpointing: Recompute activations in the backward pass to save memory.
        trust_remote_code: Run Python that comes with the weights.
        random_init: Take the architecture and tokenizer of `path` but fresh weights.
    """

    quantizations: ClassVar[tuple[str, ...]] = KINDS  # that may be asked for

    path: str | None
    revision: str | None = None
    dtype: str = "auto"
    quantization: str | None = None
    attn_implementation: str | None = None
    activation_checkpointing: bool = False
    trust_remote_code: bool = False
    random_init: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r}: must be one of {', '.join(DTYPES)}")
        if self.quantization is not None and self.quantization not in self.quantizations:
            why = (
                "; integers are for teachers: 4-bit ones have no gradient, and that of 8-bit ones "
                "keeps each weight in full"
            ) * (self.quantization in INTEGERS)
            raise ValueError(
                f"quantization={self.quantization!r}: must be null or one of "
                f"{', '.join(self.quantizations)}{why}"
            )
        if self.quantization is not None and self.random_init:
            raise ValueError(
                f"quantization={self.quantization!r}: random_init=true draws weights, which a "
                "frozen quantised base would keep; use quantization=null or random_init=false"
            )

    @property
    def location(self) -> str:
        """What transformers is given as the model's name: a folder or a hub name."""
        if self.path is None:
            raise ValueError("path=null: must be a folder or a hub name")
        if not self.path.startswith("neo://"):
            return str(Path(self.path).expanduser()) if self.path.startswith("~") else self.path
        if self.path not in SHIPPED:
            raise ValueError(f"path={self.path!r}: must be one of {', '.join(SHIPPED)}")
        return str(MINI / self.path.removeprefix("neo://mini-"))

    def config(self) -> Any:
        """The model's configuration, without its weights.

        Raises:
            ValueError: There is no model at `path`, or it cannot be read.
        """
        return self._read(AutoConfig)

    def tokenizer(self) -> Any:
        """The model's tokenizer.

        Raises:
            ValueError: There is no tokenizer at `path`, or it cannot be read.
        """
        return self._read(AutoTokenizer)

    def _read(self, auto: Any) -> Any:
        path = Path(self.location)
        if path.is_absolute() or self.location.startswith(".") or path.is_dir():
            _check_folder(path, str(self.path), with_weights=not self.random_init)
        else:
            _check_hub(self.location, self.revision)
        try:
            return auto.from_pretrained(self.location, **self._source())
        except Exception as error:  # a folder of the user's may make any parser raise anything
            if "trust_remote_code" in str(error):
                raise ValueError(
                    f"path={self.path!r}: comes with Python code of its own, which is run only "
                    "with trust_remote_code=true"
                ) from error
            raise ValueError(f"path={self.path!r}: {_first_line(error)}") from error

    def meta(self) -> PreTrainedModel:
        """The model on the meta device: all shapes, no weights.

        Raises:
            ValueError: It cannot be built of its configuration, or its weights were to be
                quantised and are so already.
        """
        config = self.config()
        stored = getattr(config, "quantization_config", None)
        if self.quantization is not None and stored is not None:
            method = stored.get("quant_method") if isinstance(stored, dict) else stored.quant_method
            raise ValueError(
                f"path={self.path!r}: its weights are stored quantised ({method}); "
                f"quantization={self.quantization!r} takes those of a model in full precision"
            )
        try:
            with torch.device("meta"):
                return self._fresh(config)
        except (ValueError, ImportError) as error:
            wanted = f" with attn_implementation={self.attn_implementation!r}" * bool(
                self.attn_implementation
            )
            raise ValueError(
                f"path={self.path!r}: cannot be built as a causal LM{wanted}: {_first_line(error)}"
            ) from error

    def _fresh(self, config: Any, **keys: Any) -> PreTrainedModel:
        return AutoModelForCausalLM.from_config(
            config, trust_remote_code=self.trust_remote_code, **keys, **self._attention()
        )

    def load(self, device: torch.device, *, trained: bool, seed: int = 0) -> PreTrainedModel:
        """The model with its weights, in eval mode.

        Args:
            device: Decides what `dtype="auto"` means. The weights stay on the CPU, but for those
                of a quantised model, which come to lie here.
            trained: All of its weights will be trained, so they are float32.
            seed: Of the weights, where they are fresh.

        Raises:
            ValueError: The weights are missing or not in safetensors, the head is unknown, or
                quantised weights would be trained.
        """
        if trained and self.quantization is not None:
            raise ValueError(
                f"quantization={self.quantization!r}: 4-bit weights are frozen, and all weights "
                "would be trained; use quantization=null"
            )
        model = self.load_weights(device, trained=trained, seed=seed)
        if self.activation_checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        check_head(model)
        return model

    def load_weights(
        self, device: torch.device, *, trained: bool, seed: int = 0, **source: Any
    ) -> PreTrainedModel:
        """As `load`, but the head is not looked at; `source` goes to `from_pretrained`."""
        transformers_logging.disable_progress_bar()
        dtype = torch.float32 if trained else self.weight_dtype(device)
        if self.random_init:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                return self._fresh(self.config(), dtype=dtype).eval()
        return self._with_weights(dtype, device, **source)

    def _with_weights(
        self, dtype: torch.dtype, device: torch.device, **source: Any
    ) -> PreTrainedModel:
        quantized = self._quantized(dtype, device)
        try:
            # use_safetensors: unpickling a .bin can run code.
            model, info = AutoModelForCausalLM.from_pretrained(
                self.location,
                dtype=dtype,
                use_safetensors=True,
                output_loading_info=True,
                **quantized,
                **source,
                **self._attention(),
                **self._source(),
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise ValueError(f"path={self.path!r}: {_first_line(error)}") from error
        if missing := sorted(info["missing_keys"]):
            # transformers would only warn, and go on with random weights in their place
            raise ValueError(
                f"path={self.path!r}: the weights of {len(missing)} tensors are missing, "
                f"such as {missing[0]}"
            )
        keep_layout(model)
        return model

    def _quantized(self, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
        """What makes `from_pretrained` quantise weights as it reads them; nothing where all stay.

        Raises:
            ValueError: What that needs is missing, or the model does not fit.
        """
        kind = self.quantization
        return {} if kind is None else four_bit(kind, dtype, device)

    def identity(self) -> dict[str, str]:
        """What the weights are: the hub's commit, or a hash of the folder's files.

        Files past 64 MiB count by size, first and last MiB: telling two models apart does not need
        every byte of them.
        """
        folder = Path(self.location)
        if not folder.is_dir():
            commit = getattr(self.config(), "_commit_hash", None)
            return {"revision": str(commit or self.revision or "main")}
        digest = hashlib.sha256()
        for file in sorted(folder.glob("*.*")):
            if file.suffix in (".json", ".safetensors", ".jinja", ".model"):
                digest.update(f"{file.name} {file.stat().st_size}\n".encode())
                with file.open("rb") as opened:
                    if file.stat().st_size <= LARGE:
                        digest.update(opened.read())
                    else:
                        digest.update(opened.read(2**20))
                        opened.seek(-(2**20), 2)
                        digest.update(opened.read())
        return {"hash": digest.hexdigest()[:16]}

    def slices(self) -> str | None:
        """A hash of slices of the folder's large files, of which `identity` sees the ends alone.

        It tells a model from one with other weights in some of its layers. None without such files.
        """
        folder = Path(self.location)
        large = [f for f in sorted(folder.glob("*.safetensors")) if f.stat().st_size > LARGE]
        if not large:
            return None
        digest = hashlib.sha256()
        for file in large:
            with file.open("rb") as opened:
                for number in range(NUM_SLICES):
                    opened.seek(number * file.stat().st_size // NUM_SLICES)
                    digest.update(opened.read(2**12))
        return digest.hexdigest()[:16]

    def weight_dtype(self, device: torch.device) -> torch.dtype:
        """Of frozen weights, for a device: what `dtype` says, or what it means if it is `auto`."""
        if self.dtype != "auto":
            return getattr(torch, self.dtype)
        bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if bf16 else torch.float32

    def _attention(self) -> dict[str, Any]:
        wanted = self.attn_implementation
        return {} if wanted is None else {"attn_implementation": wanted}

    def _source(self) -> dict[str, Any]:
        return {"revision": self.revision, "trust_remote_code": self.trust_remote_code}


def _check_folder(folder: Path, path: str, *, with_weights: bool) -> None:
    if not folder.is_dir():
        raise ValueError(f"path={path!r}: there is no such folder")
    if not (folder / "config.json").is_file():
        raise ValueError(f"path={path!r}: the folder has no config.json, it holds no model")
    if with_weights and not any(folder.glob("*.safetensors")):
        pickled = sorted(file.name for file in folder.glob("*.bin"))
        found = f"only {', '.join(pickled)}, and a pickle can run code" if pickled else "no weights"
        raise ValueError(f"path={path!r}: the folder holds {found}; weights must be *.safetensors")


def _check_hub(name: str, revision: str | None) -> None:
    """Asks the hub once for a model not in the cache; transformers would ask for a minute."""
    if try_to_load_from_cache(name, "config.json", revision=revision) is not None:
        return
    try:
        HfApi().model_info(name, revision=revision, timeout=20)
    except Exception as error:  # whatever the network raises
        raise ValueError(
            f"path={name!r}: there is no such folder, and as a model of the hub it cannot be read: "
            f"{_first_line(error)}"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
