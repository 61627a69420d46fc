"""What a cache says of itself: its manifest, and what stands in its place until it is finished."""

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from neo.teachers.durable import PARTIAL, CacheError, sync_folder, write_whole
from neo.teachers.fields import Field, Shapes, fields_of
from neo.teachers.identity import differences, name_of
from neo.teachers.shards import GROWING, ShardEntry, whole_shard
from neo.teachers.stored import Stored

FORMAT, VERSION = "neo.cache", 1
MANIFEST, GROWS, UNFINISHED = "manifest.json", "growing.json", "unfinished.json"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a cache is.

    Args:
        name: By which it is found, of the identity.
        identity: What it was made of.
        stored: What is kept of each token.
        shapes: Of the models.
        fields: The arrays of a blob.
        finished: Whether it is a whole pass over its rows; else runs fill it as they need them.
        counts: "rows", "tokens", and "bad_rows" by reason; empty while it grows.
        shards: Those of the pass, in their order.
        files: What lies beside, by name: "bytes" and "sha256".
        certificate: How far its loss and gradient are from the online teacher's.
        neo_version: That wrote it.
    """

    name: str
    identity: Mapping[str, Any]
    stored: Stored
    shapes: Shapes
    fields: Sequence[Field]
    finished: bool
    counts: Mapping[str, Any] = field(default_factory=dict)
    shards: Sequence[ShardEntry] = ()
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    certificate: Mapping[str, Any] = field(default_factory=dict)
    neo_version: str = field(default_factory=lambda: importlib.metadata.version("llm-neo"))

    def content(self) -> bytes:
        """Of the file, with its checksum."""
        plain: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "neo_version": self.neo_version,
            "name": self.name,
            "identity": self.identity,
            "stored": self.stored.as_dict(),
            "shapes": self.shapes.as_dict(),
            "fields": [asdict(each) for each in self.fields],
        }
        if self.finished:
            plain |= {
                "counts": self.counts,
                "shards": [shard._asdict() for shard in self.shards],
                "files": self.files,
                "certificate": self.certificate,
            }
        return _text({**plain, "checksum": _checksum(plain)})


def read_manifest(file: Path) -> Manifest:
    """The manifest in a file, whichever of the three it is.

    Raises:
        CacheError: It is damaged, or of another version.
    """
    again = "restore it, or remove the folder and write the cache again"
    try:
        content = file.read_bytes()
        plain = json.loads(content)
        checksum = plain.pop("checksum")
        # a byte that means nothing to JSON counts as well
        whole = checksum == _checksum(plain) and content == _text({**plain, "checksum": checksum})
    except OSError as error:
        raise CacheError(f"{file}: cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CacheError(f"{file}: is damaged, it is no manifest; {again}") from error
    if not whole:
        raise CacheError(f"{file}: is damaged, its checksum is another; {again}")
    if (plain.get("format"), plain.get("version")) != (FORMAT, VERSION):
        raise CacheError(
            f"{file}: is of format {plain.get('format')!r} version {plain.get('version')!r}; this "
            f"neo reads {FORMAT!r} version {VERSION}. Read it with the neo that wrote it, or write "
            "the cache again"
        )
    try:
        stored, shapes = Stored(**plain["stored"]), Shapes(**plain["shapes"])
        fields = [Field(**each) for each in plain["fields"]]
        if fields != fields_of(stored, shapes):
            raise ValueError("fields: are not those of what is stored")
        finished = "counts" in plain
        rest: dict[str, Any] = {}
        if finished:
            rest = {key: plain[key] for key in ("counts", "files", "certificate")}
            rest["shards"] = tuple(ShardEntry(**each) for each in plain["shards"])
        return Manifest(
            name=plain["name"],
            identity=plain["identity"],
            stored=stored,
            shapes=shapes,
            fields=fields,
            finished=finished,
            neo_version=plain["neo_version"],
            **rest,
        )
    except (ValueError, KeyError, TypeError) as error:
        raise CacheError(f"{file}: was written by another neo: {error}; {again}") from error


def begin(
    path: Path | str,
    stored: Stored,
    shapes: Shapes,
    identity: Mapping[str, Any],
    *,
    growing: bool,
) -> None:
    """Makes the folder of a cache and says in it what it is to be; does nothing where that stands.

    Args:
        path: Of the folder.
        stored: What is to be kept, resolved.
        shapes: Of the models.
        identity: What it is made of.
        growing: Runs fill it as they need rows, instead of `neo.cache` in one pass.

    Raises:
        CacheError: There is another cache, or no room.
        ValueError: These shapes cannot give what is to be kept.
    """
    path = Path(path)
    manifest = Manifest(
        name=name_of(identity),
        identity=identity,
        stored=stored,
        shapes=shapes,
        fields=fields_of(stored, shapes),
        finished=False,
    )
    path.mkdir(parents=True, exist_ok=True)
    for name in (MANIFEST, UNFINISHED, GROWS):
        if not (path / name).exists():
            continue
        there = read_manifest(path / name)
        if differing := differences(there.identity, _plain(identity)):
            raise CacheError(
                f"{path / name}: this is another cache; give another folder, or remove it. "
                "What differs:\n" + "\n".join(f"  {line}" for line in differing)
            )
        if (there.stored, there.shapes) != (stored, shapes):
            raise CacheError(
                f"{path / name}: this cache keeps {there.stored} of {there.shapes}, and {stored} "
                f"of {shapes} is asked for; give another folder, or remove it"
            )
        # What one pass makes may begin where runs have left rows, but not the other way round.
        if name == MANIFEST:
            (path / UNFINISHED).unlink(missing_ok=True)  # of a process that died between the two
        if name != GROWS or growing:
            return
    write_whole(path / (GROWS if growing else UNFINISHED), manifest.content())


def finish(
    path: Path | str,
    shards: Sequence[ShardEntry],
    counts: Mapping[str, Any],
    certificate: Mapping[str, Any],
    files: Sequence[str] = (),
) -> Manifest:
    """Writes the manifest: from here on the cache is finished.

    Args:
        path: Of a folder that `begin` made.
        shards: All that lie there, in the order in which they are to be read.
        counts: "rows", "tokens" and "bad_rows".
        certificate: As plain data.
        files: Names of what else lies there, such as teacher_head.safetensors.

    Raises:
        CacheError: A shard or file is missing or is not whole.
    """
    path = Path(path)
    unfinished = path / UNFINISHED
    if not unfinished.exists():
        raise CacheError(f"{path}: has no {UNFINISHED}: nothing was begun here")
    begun = read_manifest(unfinished)
    for shard in shards:
        if whole_shard(path, shard.name) != shard:
            raise CacheError(
                f"{path / shard.name}: this shard is not what was written; remove its .bin and "
                ".index, and run neo.cache again"
            )
    beside: dict[str, dict[str, Any]] = {}
    for name in files:
        if not (path / name).is_file():
            raise CacheError(f"{path / name}: is missing; run neo.cache again")
        beside[name] = {"bytes": (path / name).stat().st_size, "sha256": sha256_of(path / name)}
    manifest = Manifest(
        name=begun.name,
        identity=begun.identity,
        stored=begun.stored,
        shapes=begun.shapes,
        fields=begun.fields,
        finished=True,
        counts=_plain(counts),
        shards=tuple(shards),
        files=beside,
        certificate=_plain(certificate),
        neo_version=begun.neo_version,
    )
    write_whole(path / MANIFEST, manifest.content())
    for name in (UNFINISHED, GROWS):
        (path / name).unlink(missing_ok=True)
    for left in path.glob(f".*{PARTIAL}"):  # by processes that were killed
        left.unlink(missing_ok=True)
    sync_folder(path)
    return manifest


def is_begun(path: Path) -> bool:
    """Whether there is anything of a cache in a folder; it may be about to be written."""
    known = any((path / name).exists() for name in (MANIFEST, UNFINISHED, GROWS))
    return known or any(path.glob("*.index"))


def find_manifest(path: Path) -> Manifest:
    """The manifest of a cache that can be read.

    Raises:
        CacheError: It is damaged, is not finished, or there is none.
    """
    if not path.is_dir():
        raise CacheError(
            f"{path}: there is no such folder; python -m neo.cache out={path} makes it"
        )
    for name in (MANIFEST, GROWS):
        if (path / name).exists():
            return read_manifest(path / name)
    if (path / UNFINISHED).exists():
        raise CacheError(
            f"{path}: this cache is not finished ({UNFINISHED}); run neo.cache again with the same "
            "settings, and it goes on where it stopped"
        )
    shards = sorted(file.name for file in path.glob("*.index"))
    if shards:
        wanted = GROWS if all(name.startswith(GROWING) for name in shards) else MANIFEST
        raise CacheError(
            f"{path}: there are shards ({shards[0]}) but no {wanted}; restore it, or remove the "
            "folder and write the cache again"
        )
    raise CacheError(f"{path}: this folder holds no cache: it has no {MANIFEST}")


def sha256_of(file: Path) -> str:
    """Of the file's content, in hex."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _plain(nested: Mapping[str, Any]) -> dict[str, Any]:
    """As it comes back from JSON."""
    return json.loads(json.dumps(nested))


def _text(plain: Mapping[str, Any]) -> bytes:
    return (json.dumps(plain, indent=1, sort_keys=True) + "\n").encode()


def _checksum(plain: Mapping[str, Any]) -> str:
    canonical = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
