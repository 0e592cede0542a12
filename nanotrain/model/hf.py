"""Model directories of Hugging Face, in and out: config.json and .safetensors files (families.py says what they mean).

Tensors are mapped into memory and copied one at a time, so a model is never twice in memory. A safetensors file is the length of a
JSON header (8 bytes), the header (name, dtype, shape and place of each tensor), and the tensors' bytes.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import torch

from nanotrain.files import sync
from nanotrain.model.build import empty_model, meta_model
from nanotrain.model.families import FAMILIES, hf_config, model_config
from nanotrain.model.transformer import Transformer


def load_hf(path: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Transformer:
    """The model of a Hugging Face directory, on `device` in `dtype` (None: what config.json names, or the tensors have).

    ValueError naming the file, and the key or tensor, for what is missing, damaged, unknown or of another shape, and for what our model
    has not.
    """
    directory = existing_directory(path)
    config = read_json(directory / "config.json")
    name, c = model_config(config, str(directory / "config.json"))
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {device}: this machine has no usable NVIDIA GPU; load on cpu")
    tensors = open_tensors(directory)
    if name == "gpt2" and not any(n.startswith("transformer.") for n in tensors):  # saved without the head, as OpenAI's own are
        tensors = {n if n == "lm_head.weight" else f"transformer.{n}": stored for n, stored in tensors.items()}
    _check(tensors, places(meta_model(c), name), f"{FAMILIES[name].names['embed']}.weight" if c.tied else None, directory)
    model = empty_model(c, dtype=dtype or _stored_dtype(config, tensors, directory), device=device)
    fill(tensors, places(model, name))
    return model


def save_hf(model: Transformer, path: str | Path, *, tokenizer=None, max_shard_bytes: int = 5_000_000_000) -> None:
    """Write the model as a directory that transformers loads; `path` must be new or empty, and is whole or not there.

    tokenizer        gives the ids of bos, eos, pad, and of what ends a text (its own files are `nanotrain.hf_tokenizer`'s to write)
    max_shard_bytes  size of a file's tensors [bytes]

    ValueError naming the options that no family has, or where `path` is not empty.
    """
    config = hf_config(model.c)
    tensors = places(model, config["model_type"])
    roles = {role: getattr(tokenizer, role, None) for role in ("bos", "eos", "pad")}
    # Those that the model has: with another as pad, as where a tokenizer was given tokens later, transformers cannot build it.
    ids = {f"{role}_token_id": token if token is not None and token < model.c.vocab_size else None for role, token in roles.items()}
    dtype = str(model.head.weight.dtype).removeprefix("torch.")
    shards: list[dict[str, list[torch.Tensor]]] = [{}]
    for name, parts in tensors.items():
        if shards[-1] and _bytes(shards[-1].values()) + _bytes([parts]) > max_shard_bytes:
            shards.append({})
        shards[-1][name] = parts
    files = [f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)] if len(shards) > 1 else ["model.safetensors"]
    with whole_directory(path) as folder:
        _write_json(folder / "config.json", config | ids | {"torch_dtype": dtype, "dtype": dtype})
        _write_json(folder / "generation_config.json", ids | {"eos_token_id": sorted(tokenizer.stop_ids) if tokenizer else None})
        for file, shard in zip(files, shards, strict=True):
            _write_tensors(folder / file, shard)
        if len(shards) > 1:
            weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
            _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": _bytes(tensors.values())}, "weight_map": weight_map})


class Stored(NamedTuple):
    """A tensor in an open, memory-mapped safetensors file."""

    file: Path
    handle: Any
    name: str

    def shape(self) -> tuple[int, ...]:
        """Its shape, read from the header."""
        return tuple(self.handle.get_slice(self.name).get_shape())

    def dtype(self) -> str:
        """Its dtype as the header spells it, such as BF16."""
        return self.handle.get_slice(self.name).get_dtype()

    def value(self) -> torch.Tensor:
        """The tensor; its memory is the file's."""
        return self.handle.get_tensor(self.name)


_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_BUFFERS = re.compile(r".*\.(attn\.bias|attn\.masked_bias|rotary_emb\.inv_freq)")
"""Constants that older files hold besides the parameters."""


def open_tensors(directory: Path) -> dict[str, Stored]:
    """Every tensor of a directory's model.safetensors, or of the shards that its index names. ValueError naming a bad file or tensor."""
    index = directory / "model.safetensors.index.json"
    weight_map: dict[str, str] = {}
    if (directory / "model.safetensors").is_file():
        shards = ["model.safetensors"]
    elif index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
            raise ValueError(f"{index}: weight_map {weight_map!r:.80}: must name a file for each tensor")
        shards = sorted(set(weight_map.values()))
    elif pickles := sorted(p.name for p in directory.glob("*.bin")):
        raise ValueError(f"{directory / pickles[0]}: a pickle, which nanotrain never opens; convert it to safetensors first")
    else:
        others = ", ".join(sorted(p.name for p in directory.glob("*.safetensors"))[:3])
        raise ValueError(f"{directory}: has neither model.safetensors nor {index.name}" + (f", only {others}; fetch all of it" if others else ""))
    found: dict[str, Stored] = {}
    for shard in shards:
        file = directory / shard
        if Path(shard).name != shard or not file.is_file():
            raise ValueError(f"{index}: names the file {shard!r}, which is not there")
        try:
            if file.stat().st_size < 1000 and file.read_bytes().startswith(b"version https://git-lfs"):
                raise ValueError("a git-lfs pointer in its place; git lfs pull fetches the file")
            handle = safetensors.safe_open(file, framework="pt")
        except (OSError, ValueError, safetensors.SafetensorError) as error:
            raise ValueError(f"{file}: not a safetensors file, or damaged or cut short ({error})") from None
        for name in handle.keys():  # noqa: SIM118 (no mapping)
            if name in found:
                raise ValueError(f"{file}: tensor {name!r} is in {found[name].file.name} too")
            found[name] = Stored(file, handle, name)
    for name, shard in weight_map.items():
        if name not in found or found[name].file.name != shard:
            raise ValueError(f"{directory / shard}: tensor {name!r} is missing, though {index.name} names it there")
    return found


def places(model: Transformer, name: str) -> dict[str, list[torch.Tensor]]:
    """Name of each tensor of the family `name` -> views of our parameters that it holds, side by side along its last dimension."""
    family, found = FAMILIES[name], {}
    for ours, parameter in model.named_parameters():
        module, _, kind = ours.rpartition(".")
        layer = re.search(r"(?<=blocks\.)\d+", module)
        theirs = family.names.get(re.sub(r"(?<=blocks\.)\d+", "*", module))
        if theirs is None:
            raise ValueError(f"parameter {ours!r}: a {name} model has no such part; merge what was put on the model first")
        turn = family.transposed and layer and parameter.dim() == 2
        theirs = theirs.replace("*", layer.group() if layer else "")
        found.setdefault(f"{theirs}.{kind}", []).append(parameter.detach().T if turn else parameter.detach())
    return found


@torch.no_grad()
def fill(tensors: dict[str, Stored], places: dict[str, list[torch.Tensor]]) -> None:
    """Copy stored tensors, one at a time, into the parts of each, with their dtype and device. ValueError naming one too large for it."""
    for name, parts in places.items():
        for part, value in zip(parts, tensors[name].value().split([p.shape[-1] for p in parts], -1), strict=True):
            part.copy_(value)
            largest = torch.finfo(part.dtype).max
            if largest < torch.finfo(value.dtype).max and torch.stack(part.aminmax()).isinf().any():
                raise ValueError(f"{tensors[name].file}: tensor {name} goes beyond {largest:g}, the largest of {part.dtype}; take another dtype")


def _shape(parts: list[torch.Tensor]) -> tuple[int, ...]:
    return (*parts[0].shape[:-1], sum(part.shape[-1] for part in parts))


def _bytes(tensors) -> int:
    return sum(part.numel() * part.element_size() for parts in tensors for part in parts)


def _check(tensors: dict[str, Stored], wanted: dict[str, list[torch.Tensor]], tied_to: str | None, directory: Path) -> None:
    """Names, shapes and dtypes against those wanted; a head stored all the same where it is tied must equal the embedding `tied_to`."""
    surplus = {name for name in tensors.keys() - wanted.keys() if not _BUFFERS.fullmatch(name) and not (tied_to and name == "lm_head.weight")}
    for problem, names in (("missing", wanted.keys() - tensors.keys()), ("unknown", surplus)):
        if names:
            listed = ", ".join(sorted(names)[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            raise ValueError(f"{directory}: {problem} tensor{'s'[: len(names) > 1]} {listed}; is config.json of another model?")
    for name, parts in wanted.items():
        stored = tensors[name]
        if stored.shape() != _shape(parts):
            raise ValueError(f"{stored.file}: tensor {name} is {stored.shape()}, config.json makes it {_shape(parts)}")
        if stored.dtype() not in _DTYPES:
            raise ValueError(f"{stored.file}: tensor {name} is {stored.dtype()}; only {', '.join(_DTYPES)} can be read")
    if tied_to and "lm_head.weight" in tensors:
        head, embedding = tensors["lm_head.weight"].value(), tensors[tied_to].value()
        if head.dtype != embedding.dtype or head.shape != embedding.shape or not torch.equal(head.view(torch.uint8), embedding.view(torch.uint8)):
            raise ValueError(f"{directory}: tensor lm_head.weight differs from {tied_to}, though tie_word_embeddings makes them one")


def _stored_dtype(config, tensors: dict[str, Stored], directory: Path) -> torch.dtype:
    given = config.get("dtype") or config.get("torch_dtype")
    if given is None:
        return _DTYPES[next(stored.dtype() for name, stored in tensors.items() if not _BUFFERS.fullmatch(name))]
    names = {str(dtype).removeprefix("torch."): dtype for dtype in _DTYPES.values()}
    if given not in names:
        raise ValueError(f"{directory / 'config.json'}: dtype {given!r}: not one of {', '.join(names)}")
    return names[given]


# Files


def existing_directory(path: str | Path) -> Path:
    """A model's directory. ValueError, with what to do, where it is none, as the name of a model on Hugging Face's hub is none."""
    directory = Path(path)
    if directory.is_file():
        raise ValueError(f"{path}: is a file; name the directory that holds it")
    if not directory.is_dir():
        raise ValueError(f"{path}: no such directory; train a model first, or fetch one, as with `hf download NAME --local-dir DIRECTORY`")
    return directory


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. ValueError naming it where it is missing, or no JSON object."""
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: must hold a JSON object")
    return content


@contextmanager
def whole_directory(path: str | Path) -> Iterator[Path]:
    """A directory to be filled inside the context, which takes the name `path` once all of it is on disk; after an error nothing stays.

    A process killed on the way leaves a hidden .NAME.incomplete beside it, which the next takes away. ValueError where `path` is a file
    or a directory that is not empty.
    """
    final = Path(path).resolve()
    if final.exists() and (not final.is_dir() or any(final.iterdir())):
        raise ValueError(f"{path}: exists and is not an empty directory; name another, or move it away")
    folder = final.with_name(f".{final.name}.incomplete")
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir(parents=True)
        yield folder
        for written in (*folder.rglob("*"), folder):
            sync(written)
        folder.rename(final)
        sync(final.parent)
    except OSError as error:  # by the name it was to have; a failed write names none
        named = Path(error.filename or folder)
        if error.errno and named.is_relative_to(folder):
            raise OSError(error.errno, error.strerror, str(final / named.relative_to(folder))) from None
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _write_tensors(path: Path, tensors: dict[str, list[torch.Tensor]]) -> None:
    spelled = {dtype: name for name, dtype in _DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, parts in tensors.items():
        end = start + _bytes([parts])
        header[name] = {"dtype": spelled[parts[0].dtype], "shape": _shape(parts), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    try:
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for parts in tensors.values():
                value = torch.cat(parts, -1) if len(parts) > 1 else parts[0]
                file.write(memoryview(value.cpu().contiguous().view(-1).view(torch.uint8).numpy()))
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None  # a failed write does not know its file
