"""The compressed checkpoint: canonical tensors in safetensors, their form in config.json (``docs/format.md``).

Reading is strict: files, headers, names, types and shapes are checked when the folder is opened, checksums and contents
when a weight is read, and nothing is used before. Every error names the tensor.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from safetensors.torch import save_file

from wandapp_kernels.checkpoint.files import INDEX, read_json, reading, unique_keys, weight_files
from wandapp_kernels.checkpoint.format import DTYPE_NAMES, UNSTRUCTURED, from_tensors, tensor_names, tensor_shapes
from wandapp_kernels.errors import CheckpointError, NonFiniteError, SparsityError, UsageError
from wandapp_kernels.ops.layouts import CompressedWeight
from wandapp_kernels.sparsity import Pattern

METHOD = "wandapp"
VERSION = 1

# Beside the weights; a folder that transformers' save_pretrained wrote has none.
CHECKSUMS = "model.sha256.json"

# As safetensors does.
_LONGEST_HEADER = 100_000_000

_STORED = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class LayerForm:
    """How one layer is stored: ``pattern`` (n:m or ``"unstructured"``), ``(out, in)``, and the type of its values."""

    pattern: str
    shape: tuple[int, int]
    dtype: str


@dataclass(frozen=True)
class _Place:
    """Where the bytes of a tensor are, and what they should be."""

    path: Path
    start: int
    stop: int
    dtype: torch.dtype
    shape: tuple[int, ...]


# Writing


def quantization_config(layers: Mapping[str, LayerForm]) -> dict[str, Any]:
    """The entry of config.json that says which layers are compressed, and how."""
    return {
        "quant_method": METHOD,
        "format_version": VERSION,
        "layers": {name: {**asdict(form), "shape": list(form.shape)} for name, form in layers.items()},
    }


def write_tensors(state: Mapping[str, torch.Tensor], folder: Path, shard_bytes: int = 5 * 10**9) -> None:
    """Write a state dict as ``model.safetensors``, or as shards and their index, and a SHA-256 of every tensor beside.

    Tensors that are the same memory are all written: leave out what loading ties again.
    """
    tensors: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in state.items():
        held = tensor.detach().cpu().contiguous()
        # safetensors refuses memory that it has seen before.
        tensors[name] = held.clone() if held.data_ptr() in seen else held
        seen.add(held.data_ptr())
    split = split_torch_state_dict_into_shards(
        tensors, filename_pattern="model{suffix}.safetensors", max_shard_size=shard_bytes
    )
    for file, names in split.filename_to_tensors.items():
        save_file({name: tensors[name] for name in names}, folder / file, {"format": "pt"})
    _write_json(folder / CHECKSUMS, {name: _sha256(tensor) for name, tensor in tensors.items()})
    if split.is_sharded:
        _write_json(folder / INDEX, {"metadata": split.metadata, "weight_map": split.tensor_to_filename})


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _sha256(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy().data).hexdigest()


# Reading


def is_compressed(config: Mapping[str, Any]) -> bool:
    """Whether a config.json, as a dict, says that the folder is in this format."""
    settings = config.get("quantization_config")
    return isinstance(settings, dict) and settings.get("quant_method") == METHOD


class CompressedFolder:
    """A compressed checkpoint whose files, names, types and shapes have been checked; weights are read one by one.

    Attributes:
        config: config.json.
        layers: module name -> form.
        other: names of the tensors that belong to no compressed weight.
    """

    def __init__(self, folder: str | Path):
        """
        Raises:
            CheckpointError: the folder is not in this format, a file is missing or damaged, an index points outside
                or contradicts its files, a tensor is missing, unexpected, stored twice, or has a wrong type or shape.
        """
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise CheckpointError(f"{folder} is not a folder; give the folder of a compressed model")
        self.config = read_json(self.folder / "config.json")
        if not is_compressed(self.config):
            raise CheckpointError(
                f"config.json in {folder} has no quantization_config with quant_method {METHOD!r}; "
                "it is no compressed model of wandapp"
            )
        self.layers = _forms(self.folder, self.config["quantization_config"])
        self._places = _places(self.folder)
        self._checksums = _checksums(self.folder, self._places)
        expected = {f"{name}.{own}" for name, form in self.layers.items() for own in tensor_names(form.pattern)}
        for name, form in self.layers.items():
            self._check_layer(name, form)
        self.other = tuple(name for name in self._places if name not in expected)
        for name in self.other:
            layer, _, own = name.rpartition(".")
            if own.startswith("weight_") or (own == "weight" and layer in self.layers):
                raise CheckpointError(f"{self._at(name)} is not asked for by config.json; get matching files")

    def weight(self, layer: str) -> CompressedWeight:
        """The checked weight of a compressed layer.

        Raises:
            CheckpointError: a checksum differs; an index is out of range or out of order; the bitmap, the offsets and
                the number of values disagree; a value is NaN or infinite.
        """
        form = self.layers[layer]
        tensors = {own: self.tensor(f"{layer}.{own}") for own in tensor_names(form.pattern)}
        weight = from_tensors(tensors, form.shape, form.pattern)
        try:
            weight.validate()
        except (SparsityError, NonFiniteError) as error:
            raise CheckpointError(f"{self._at(f'{layer}.weight')} is not what it claims to be: {error}") from error
        return weight

    def kind(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """Type and shape of one tensor, by its file's header."""
        return self._places[name].dtype, self._places[name].shape

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor in memory of its own. Raises CheckpointError if its file is cut short or its checksum differs."""
        place = self._places[name]
        raw = torch.empty(place.stop - place.start, dtype=torch.uint8, device="cpu")  # whatever the default device is
        with reading(place.path), place.path.open("rb") as stream:
            stream.seek(place.start)
            if stream.readinto(raw.numpy().data) != raw.numel():
                raise CheckpointError(f"{self._at(name)} is cut short; copy or download the file again")
        if self._checksums is not None and _sha256(raw) != self._checksums[name]:
            raise CheckpointError(f"{self._at(name)} is damaged: its SHA-256 differs; copy or download the file again")
        return raw.view(place.dtype).reshape(place.shape)

    def _check_layer(self, layer: str, form: LayerForm) -> None:
        dtypes = {"weight_values": DTYPE_NAMES[form.dtype], "weight_row_offsets": torch.int64}
        values = self._places.get(f"{layer}.weight_values")
        stored = math.prod(values.shape) if values is not None else 0
        for own, shape in tensor_shapes(form.shape, form.pattern, stored).items():
            name = f"{layer}.{own}"
            place = self._places.get(name)
            if place is None:
                raise CheckpointError(f"{self._at(name)} is missing; get the complete checkpoint")
            dtype = dtypes.get(own, torch.uint8)
            if place.dtype != dtype or place.shape != shape:
                raise CheckpointError(
                    f"{self._at(name)} is {place.dtype} {list(place.shape)}, but config.json asks for "
                    f"{dtype} {list(shape)}; get matching files"
                )

    def _at(self, name: str) -> str:
        return f"the tensor {name} of {self.folder}"


def _forms(folder: Path, settings: dict[str, Any]) -> dict[str, LayerForm]:
    def refuse(what: str) -> CheckpointError:
        return CheckpointError(f"quantization_config in {folder / 'config.json'} {what}; do not trust it")

    if settings.get("format_version") != VERSION:
        raise CheckpointError(
            f"{folder} is a compressed model of format version {settings.get('format_version')!r}, and this "
            f"wandapp_kernels reads version {VERSION}; use the version that wrote it"
        )
    if odd := sorted(settings.keys() - {"quant_method", "format_version", "layers"}):
        raise refuse(f"has the unknown key {odd[0]!r}")
    layers = settings.get("layers")
    if not isinstance(layers, dict) or not layers:
        raise refuse("lists no layers")
    forms = {}
    for name, entry in layers.items():
        if not isinstance(entry, dict) or entry.keys() != {"pattern", "shape", "dtype"}:
            raise refuse(f"must give pattern, shape and dtype of {name}")
        pattern, shape, dtype = entry["pattern"], entry["shape"], entry["dtype"]
        if not (isinstance(shape, list) and len(shape) == 2 and all(type(size) is int and size > 0 for size in shape)):
            raise refuse(f"gives {name} the shape {shape!r}, which is not [out, in]")
        if not isinstance(dtype, str) or dtype not in DTYPE_NAMES:
            raise refuse(f"gives {name} the type {dtype!r}, not one of {', '.join(DTYPE_NAMES)}")
        if not isinstance(pattern, str) or not _is_form(pattern):
            raise refuse(f"gives {name} the pattern {pattern!r}, which is neither n:m nor {UNSTRUCTURED!r}")
        forms[name] = LayerForm(pattern, (shape[0], shape[1]), dtype)
    return forms


def _is_form(pattern: str) -> bool:
    if pattern == UNSTRUCTURED:
        return True
    try:
        return Pattern.parse(pattern).is_nm and str(Pattern.parse(pattern)) == pattern
    except UsageError:
        return False


def _places(folder: Path) -> dict[str, _Place]:
    places: dict[str, _Place] = {}
    for path, listed in weight_files(folder).items():
        found = _read_header(path)
        if listed and (odd := sorted(found.keys() ^ listed)):
            where = f"is listed for {path.name} but not in it" if odd[0] in listed else f"is in {path.name} unlisted"
            raise CheckpointError(f"the tensor {odd[0]} of {folder} {where}; get the complete checkpoint")
        if twice := sorted(found.keys() & places.keys()):
            other = places[twice[0]].path.name
            raise CheckpointError(f"the tensor {twice[0]} of {folder} is in both {other} and {path.name}")
        places |= found
    return places


def _read_header(path: Path) -> dict[str, _Place]:
    """Every tensor of a file. safetensors checks the header first, all but what it lets pass: a key given twice."""
    with reading(path):
        with safe_open(path, framework="pt"):
            pass
        with path.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            text = stream.read(min(length, _LONGEST_HEADER))
    try:
        header = json.loads(text, object_pairs_hook=unique_keys)
        header.pop("__metadata__", None)
        return {name: _place(path, 8 + length, name, entry) for name, entry in header.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"the header of {path} cannot be used ({error}); copy or download it again") from error


def _place(path: Path, data: int, name: str, entry: Any) -> _Place:
    if entry["dtype"] not in _STORED:
        raise CheckpointError(f"the tensor {name} of {path.parent} is of type {entry['dtype']}, which is not used here")
    start, stop = entry["data_offsets"]
    return _Place(path, data + start, data + stop, _STORED[entry["dtype"]], tuple(entry["shape"]))


def _checksums(folder: Path, places: Mapping[str, _Place]) -> dict[str, Any] | None:
    if not (folder / CHECKSUMS).exists():
        return None
    sums = read_json(folder / CHECKSUMS)
    if odd := sorted(sums.keys() ^ places.keys()):
        raise CheckpointError(f"{CHECKSUMS} in {folder} does not list the tensors there: {odd[0]}; get matching files")
    return sums
