"""Checkpoints that exist whole or not at all, in safetensors and JSON.

    checkpoints/step-00000500/
        model.safetensors  optimizer.safetensors    tensors by name
        state.json                                  step, cursor, counters, fingerprints, configuration
        manifest.json                               bytes and SHA-256 of each file; written last

A save writes into a hidden temporary directory, syncs files and directory, and renames once. "Latest" is the newest
directory that verifies: there is no pointer file. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch

from nanotrain.files import sync

FORMAT = 1
_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64", torch.int32: "I32",
    torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save and what to keep."""

    every: int = 500
    """Between checkpoints [steps]; 0 saves only at the end and when stopped."""
    keep: int = 2
    """Newest ones to keep [checkpoints]; of those that a validation preceded at the same step, the best is kept besides."""


class Damaged(Exception):
    """A checkpoint that does not verify; the text names file and reason."""


def save(parent: Path, step: int, tensors: dict[str, dict[str, torch.Tensor]], state: dict[str, Any]) -> Path:
    """Write a checkpoint of `step`: a .safetensors file for each entry of `tensors`, and `state` as JSON.

    One of the same step is replaced. Raises OSError (full disk, read-only directory) with nothing changed but a temporary
    directory removed.
    """
    final = parent / f"step-{step:08d}"
    temporary, replaced = parent / f".tmp-{final.name}-{os.getpid()}", parent / f".replaced-{final.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        files = {f"{name}.safetensors": write_tensors(temporary / f"{name}.safetensors", group) for name, group in tensors.items()}
        files["state.json"] = _write(temporary / "state.json", [json.dumps(state, indent=1).encode()])
        manifest = dict(format=FORMAT, step=step, val_bpb=state.get("val_bpb"), files=files)
        _write(temporary / "manifest.json", [json.dumps(manifest, indent=1).encode()])
        sync(temporary)
        if final.exists():
            final.rename(replaced)
        temporary.rename(final)
        sync(parent)
        shutil.rmtree(replaced, ignore_errors=True)
    except OSError as error:
        older = [d.name for d in directories(parent)[-1:]]
        kept = f"{older[0]} stands" if older else "there is none yet"
        text = f"{error.strerror}: checkpoint of step {step} not saved, {kept}; make room, then go on with --resume auto"
        raise OSError(error.errno, text, error.filename) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return final


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Write a safetensors file, hashing on the way; returns its entry of the manifest."""
    header, offset = {}, 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    def parts():
        yield len(text).to_bytes(8, "little") + text
        for tensor in tensors.values():
            flat = tensor.detach().to("cpu").contiguous().reshape(-1)
            if flat.numel():
                yield memoryview(flat.view(torch.uint8).numpy())

    return _write(path, parts())


_UNHASHED = 1 << 30
"""Bytes written but not yet hashed that a save holds on to at most."""


def _write(path: Path, parts) -> dict[str, Any]:
    digest, size, hashed = hashlib.sha256(), 0, 0

    def update(part):
        nonlocal hashed
        digest.update(part)
        hashed += memoryview(part).nbytes

    try:
        # Hashing takes about as long as writing and syncing, so it runs beside them; neither holds the interpreter.
        with path.open("xb", buffering=0) as file, ThreadPoolExecutor(1) as hasher:
            for part in parts:
                last = hasher.submit(update, part)
                view = memoryview(part)
                while view:  # a short write goes on where it stopped; a full disk raises
                    written = file.write(view[: 1 << 24])
                    view, size = view[written:], size + written
                if size - hashed > _UNHASHED:
                    last.result()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None  # a failed write does not know its file
    return {"bytes": size, "sha256": digest.hexdigest()}


def _remove(path: Path) -> None:
    """Remove a checkpoint so that a kill half-way leaves nothing that looks like one."""
    hidden = path.with_name(f".old-{path.name}-{os.getpid()}")
    path.rename(hidden)
    shutil.rmtree(hidden)


def clean(parent: Path) -> None:
    """Remove what a killed save or removal left behind, and put back what was about to be replaced; only the owner of the run may call it."""
    for replaced in parent.glob(".replaced-step-*"):
        if not (final := parent / replaced.name.removeprefix(".replaced-")).exists():
            replaced.rename(final)
        shutil.rmtree(replaced, ignore_errors=True)
    for leftover in (*parent.glob(".tmp-step-*"), *parent.glob(".old-step-*")):
        shutil.rmtree(leftover, ignore_errors=True)


def directories(parent: Path) -> list[Path]:
    """Checkpoint directories, oldest first, verified or not."""
    return sorted(p for p in parent.glob("step-*") if p.name.removeprefix("step-").isdigit())


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest; Damaged where it is missing, unreadable or of another format."""
    try:
        manifest = json.loads((path / "manifest.json").read_bytes())
        if manifest["format"] != FORMAT:
            raise Damaged(f"{path / 'manifest.json'}: format {manifest['format']}, this version reads {FORMAT}")
        if not {"model.safetensors", "state.json"} <= manifest["files"].keys():
            raise Damaged(f"{path / 'manifest.json'}: does not list model.safetensors and state.json")
        for name, entry in manifest["files"].items():
            if Path(name).name != name:
                raise Damaged(f"{path / 'manifest.json'}: names a file outside the checkpoint: {name!r}")
            if not isinstance(entry["bytes"], int) or not isinstance(entry["sha256"], str):
                raise TypeError(f"bytes or sha256 of {name}")
        return manifest
    except FileNotFoundError:
        raise Damaged(f"{path / 'manifest.json'}: missing") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"{path / 'manifest.json'}: cannot be read ({type(error).__name__}: {error})") from None


def verify(path: Path) -> dict[str, Any]:
    """Check sizes and SHA-256 of every file; returns the manifest, or raises Damaged naming the first bad file."""
    manifest = read_manifest(path)
    with ThreadPoolExecutor() as pool:  # the files' hashes side by side
        for _ in pool.map(lambda item: _verify_file(path / item[0], item[1]), manifest["files"].items()):
            pass
    return manifest


def _verify_file(file: Path, entry: dict[str, Any]) -> None:
    try:
        size = file.stat().st_size
        if size != entry["bytes"]:
            raise Damaged(f"{file}: {size} bytes, the manifest says {entry['bytes']} (truncated?)")
        with file.open("rb") as opened:
            if hashlib.file_digest(opened, "sha256").hexdigest() != entry["sha256"]:
                raise Damaged(f"{file}: its SHA-256 is not the manifest's {entry['sha256'][:12]}... (a bit flipped?)")
    except OSError as error:
        raise Damaged(f"{file}: {error.strerror}") from None


def latest(parent: Path, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that verifies, or None; each damaged one passed over is told to `say`."""
    for path in reversed(directories(parent)):
        try:
            verify(path)
            return path
        except Damaged as damage:
            say(f"damaged checkpoint passed over: {damage}")
    return None


def load_state(path: Path) -> dict[str, Any]:
    """The state.json of a verified checkpoint."""
    return json.loads((path / "state.json").read_bytes())


def load_tensors(path: Path, targets: dict[str, torch.Tensor]) -> None:
    """Copy a safetensors file into `targets` of the same names, shapes and dtypes, a tensor at a time.

    Raises ValueError naming the file and the first tensor that is missing, unknown, or of another shape or dtype.
    """
    with _open(path) as file:
        names = set(file.keys())
        for problem, which in (("missing", targets.keys() - names), ("unknown", names - targets.keys())):
            if which:
                raise ValueError(f"{path}: tensor {min(which)!r} is {problem}: the checkpoint is of another model or optimizer")
        for name, target in targets.items():
            held = file.get_tensor(name)
            if held.shape != target.shape or held.dtype != target.dtype:
                raise ValueError(f"{path}: tensor {name!r} is {tuple(held.shape)} {held.dtype}, expected {tuple(target.shape)} {target.dtype}")
            with torch.no_grad():
                target.copy_(held)


def _open(path: Path):
    try:
        return safetensors.safe_open(path, framework="pt")
    except (OSError, safetensors.SafetensorError, ValueError) as error:
        raise ValueError(f"{path}: no readable safetensors file ({error})") from None


def retain(parent: Path, keep: int, good: Path) -> Iterator[Path]:
    """Remove all but `good`, the newest `keep` checkpoints and the best; yields what it removes.

    `good` was just written without an error, or verified: it stays whatever else is damaged, so the only good one never goes.
    """
    paths = directories(parent)
    spare = [path for path in paths[: -max(1, keep)] if path != good]
    losses = {}
    for path in paths:
        try:
            loss = read_manifest(path).get("val_bpb")
        except Damaged:
            continue
        if isinstance(loss, (int, float)) and math.isfinite(loss):
            losses[path] = loss
    best = min(losses, key=losses.get) if losses else None
    for path in spare:
        if path != best:
            yield path
            _remove(path)


def fingerprint(tensors: dict[str, dict[str, torch.Tensor]], state: dict[str, Any]) -> str:
    """SHA-256 of a complete training state, for comparing runs: names, shapes, bits, and the state's JSON."""
    digest = hashlib.sha256(json.dumps(state, sort_keys=True).encode())
    for group, members in sorted(tensors.items()):
        for name, tensor in sorted(members.items()):
            digest.update(f"{group}/{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy() if flat.numel() else np.empty(0, np.uint8))
    return digest.hexdigest()
