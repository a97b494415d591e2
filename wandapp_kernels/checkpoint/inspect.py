"""What a model folder holds: the sparsity of every weight, the patterns it satisfies, its size, and who wrote it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from wandapp_kernels.checkpoint.compressed import CompressedFolder, is_compressed
from wandapp_kernels.checkpoint.files import INDEX, read_json, reading, weight_files
from wandapp_kernels.checkpoint.save import RECORD
from wandapp_kernels.errors import CheckpointError, UsageError
from wandapp_kernels.sparsity import Pattern, satisfies

PATTERNS = (Pattern.parse("2:4"), Pattern.parse("4:8"), Pattern.parse("1:4"))

_STORED_NAMES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}

# Elements held in memory at once.
_CHUNK = 2**24

_IN_A_BLOCK = re.compile(r"(^|\.)\d+\.")
_NOT_A_LINEAR = re.compile(r"embed|lm_head|norm|vision|visual|audio")
_EXPERT = re.compile(r"(^|\.)experts?(\.|$)")
# Where the stored matrix is [in, out]: transformers' Conv1D, and experts that multiply x @ W.
_CONV1D_TYPES = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer"}
_CONV1D_NAMES = re.compile(r"\.(c_attn|c_fc|c_proj|q_attn)\.weight$")
_TRANSPOSED_EXPERTS = {"gpt_oss", "llama4", "llama4_text", "aria", "aria_text"}


def inspect_folder(folder: str | Path) -> dict[str, Any]:
    """Read a Hugging Face folder, dense or compressed, without building the model, a part of one tensor at a time.

    The linear weights of the decoder blocks are looked at one by one, as ``[out, in]`` whichever way they are stored;
    fused expert weights ``[experts, out, in]`` are one entry each. ``-0.0`` counts as zero. Bytes that a weight of R
    rows and K columns with z non-zeros of b bytes *would take* compressed (nothing is compressed here)::

        2:4     R * (k * b + ceil(2 k / 8)),  k = 2 * floor(K / 4) + min(K mod 4, 2)      9/16 of dense at 16 bit
        bitmap  z * b + R * ceil(K / 8) + 8 * (R + 1)

    Returns:
        A dict that fits into JSON:

        - ``folder``, ``model_type``, ``files`` (``name``, ``bytes``);
        - ``layers``: ``name``, ``shape`` as stored, ``input_dim``, ``dtype``, ``sparsity`` (fraction of zeros),
          ``patterns`` (of 2:4, 4:8 and 1:4 those it satisfies along the input), ``zeros_per_row`` (least, most),
          ``row_uniform``, ``bytes`` as stored, ``dense_bytes``, ``stored`` (the form, in a compressed folder only),
          ``would_take`` (bytes as ``2:4`` or None, as ``bitmap``, and the ``smallest`` of these and dense);
        - ``totals``: ``parameters``, ``bytes_on_disk`` (weight files), ``dense_bytes`` (their tensors),
          ``would_take_bytes`` (each layer in its smallest form; experts dense, as ``convert`` leaves them),
          ``layer_parameters``, ``layer_sparsity``;
        - ``written_by``: ``method``, ``pattern``, ``seed``, ``versions`` of wandapp.json and how often the model was
          ``finetuned``, or None without one;
        - ``problems``: sentences, such as a layer that lacks the pattern wandapp.json claims for it; ``unchecked``:
          layers that wandapp.json names and that are stored under another name.

    Raises:
        CheckpointError: no folder, no config.json, no safetensors, a damaged or missing file, an index that points
            outside the folder or contradicts its files.
    """
    folder = Path(folder)
    if not os.path.isdir(folder):
        raise CheckpointError(f"{folder} is not a folder; give the folder that holds config.json and the weights")
    config = read_json(folder / "config.json")
    record = read_json(folder / RECORD) if (folder / RECORD).exists() else None
    claims = _claims(record or {})
    files = weight_files(folder)
    layers: list[dict[str, Any]] = []
    problems: list[str] = []
    seen: dict[str, str] = {}
    checked: set[str] = set()
    parameters = dense_bits = 0
    compressed = CompressedFolder(folder) if is_compressed(config) else None
    others = None if compressed is None else set(compressed.other)
    for path, expected in files.items():
        for tensor in _tensors(path, expected):
            if others is not None and tensor.name not in others:
                continue
            if tensor.name in seen:
                raise CheckpointError(f"{tensor.name} is in both {seen[tensor.name]} and {path.name} of {folder}")
            seen[tensor.name] = path.name
            parameters += tensor.elements
            dense_bits += tensor.elements * tensor.bits
            recorded = [name for name in _recorded_names(tensor) if name in claims]
            checked.update(recorded)
            if recorded or _is_block_linear(tensor):
                claim = claims[recorded[0]] if recorded else None
                with reading(path):
                    layer, found = _look_at(tensor, _input_dim(tensor, config), claim)
                layers.append(layer)
                problems += found
    for tensor, pattern, stored in _compressed_layers(compressed) if compressed is not None else ():
        claim = next((claims[own] for own in _recorded_names(tensor) if own in claims), None)
        checked.update(own for own in _recorded_names(tensor) if own in claims)
        layer, found = _look_at(tensor, 1, claim)
        layers.append({**layer, "stored": pattern, "bytes": stored})
        problems += found
        parameters += tensor.elements
        dense_bits += tensor.elements * tensor.bits
    if any(name.endswith((".bitmask", ".compressed")) for name in seen):
        problems.append(
            "the weights are in the retired compressed-tensors sparse format (.compressed, .bitmask), which "
            "transformers loads as random values"
        )
    dense_bytes = dense_bits // 8
    held = [layer for layer in layers if not _EXPERT.search(layer["name"])]  # experts stay dense
    saved = sum(layer["dense_bytes"] - layer["would_take"]["smallest"] for layer in held)
    inside = sum(_elements(layer["shape"]) for layer in layers)
    zeros = sum(_elements(layer["shape"]) * layer["sparsity"] for layer in layers)
    return {
        "folder": str(folder),
        "model_type": config.get("model_type"),
        "files": [{"name": path.name, "bytes": path.stat().st_size} for path in files],
        "layers": layers,
        "totals": {
            "parameters": parameters,
            "bytes_on_disk": sum(path.stat().st_size for path in files),
            "dense_bytes": dense_bytes,
            "would_take_bytes": dense_bytes - saved,
            "layer_parameters": inside,
            "layer_sparsity": zeros / inside if inside else 0.0,
        },
        "written_by": None if record is None else _writer(record),
        "problems": problems,
        "unchecked": sorted(claims.keys() - checked),
    }


# Tensors


@dataclass(frozen=True)
class _Tensor:
    name: str
    shape: tuple[int, ...]
    dtype: str
    slices: Any

    @property
    def elements(self) -> int:
        return _elements(self.shape)

    @property
    def bits(self) -> int:
        """Of one element: 16 for BF16, 8 for F8_E4M3 and BOOL."""
        digits = re.search(r"\d+", self.dtype)
        return int(digits[0]) if digits else 8


def _tensors(path: Path, expected: set[str]) -> Iterator[_Tensor]:
    with reading(path):
        file = safe_open(path, framework="pt")
    with file:
        names = set(file.keys())
        if missing := sorted(expected - names):
            raise CheckpointError(f"{path.name} in {path.parent} lacks {missing[0]}, which {INDEX} places there")
        for name in sorted(names):
            slices = file.get_slice(name)
            yield _Tensor(name, tuple(slices.get_shape()), slices.get_dtype(), slices)


def _compressed_layers(folder: CompressedFolder) -> Iterator[tuple[_Tensor, str, int]]:
    """Every compressed weight, decompressed; the form it is stored in, and the bytes it takes there."""
    for name, form in folder.layers.items():
        weight = folder.weight(name)
        dense = weight.decompress()
        yield _Tensor(f"{name}.weight", form.shape, _STORED_NAMES[form.dtype], dense), form.pattern, weight.nbytes


# Layers


def _is_block_linear(tensor: _Tensor) -> bool:
    if not _IN_A_BLOCK.search(tensor.name) or _NOT_A_LINEAR.search(tensor.name):
        return False
    if len(tensor.shape) == 2:
        return tensor.name.endswith(".weight")
    return len(tensor.shape) == 3 and ("expert" in tensor.name or "moe" in tensor.name)


def _input_dim(tensor: _Tensor, config: dict[str, Any]) -> int:
    text = config.get("text_config")
    types = {str(part.get("model_type")) for part in (config, text) if isinstance(part, dict)}
    if len(tensor.shape) == 3:
        return 1 if types & _TRANSPOSED_EXPERTS else 2
    return 0 if types & _CONV1D_TYPES and _CONV1D_NAMES.search(tensor.name) else 1


def _matrices(tensor: _Tensor, input_dim: int) -> Iterator[torch.Tensor]:
    """All rows ``[rows, in]`` of a weight, a chunk at a time, experts one after another."""
    if not tensor.elements:  # also where a damaged header gives an empty weight 10^12 experts
        return
    *experts, _, _ = tensor.shape
    rows_first = input_dim == len(tensor.shape) - 1
    columns = tensor.shape[input_dim]
    rows = tensor.shape[-2 if rows_first else -1]
    step = max(1, _CHUNK // columns)
    for expert in range(experts[0]) if experts else [None]:
        at = () if expert is None else (expert,)
        for start in range(0, rows, step):
            part = slice(start, min(start + step, rows))
            yield tensor.slices[(*at, part)] if rows_first else tensor.slices[(*at, slice(None), part)].T


def _look_at(tensor: _Tensor, input_dim: int, claim: str | None) -> tuple[dict[str, Any], list[str]]:
    columns = tensor.shape[input_dim]
    rows = tensor.elements // columns if columns else 0
    claimed = None if claim is None else _parse(claim)
    satisfied = {pattern: True for pattern in (*PATTERNS, claimed) if pattern is not None and pattern.is_nm}
    kept = not_finite = 0
    least, most = columns, 0
    for matrix in _matrices(tensor, input_dim):
        mask = matrix != 0  # NaN differs from zero, -0.0 does not
        for pattern in satisfied:
            satisfied[pattern] = satisfied[pattern] and satisfies(mask, pattern)
        kept_per_row = mask.sum(1)
        kept += int(kept_per_row.sum())
        least = min(least, columns - int(kept_per_row.max()))
        most = max(most, columns - int(kept_per_row.min()))
        if matrix.is_floating_point() and matrix.element_size() > 1:
            not_finite += matrix.numel() - int(torch.isfinite(matrix).sum())
    bytes_each = tensor.bits / 8
    row_kept = columns // 4 * 2 + min(columns % 4, 2)
    matrices = tensor.shape[0] if len(tensor.shape) == 3 else 1
    dense = int(tensor.elements * bytes_each)
    as_24 = int(rows * (row_kept * bytes_each + -(-row_kept // 4))) if satisfied[PATTERNS[0]] else None
    as_bitmap = int(kept * bytes_each) + rows * -(-columns // 8) + 8 * (rows + matrices)
    smallest = min(size for size in (dense, as_24, as_bitmap) if size is not None)
    layer = {
        "name": tensor.name,
        "shape": list(tensor.shape),
        "input_dim": input_dim,
        "dtype": tensor.dtype,
        "sparsity": 1 - kept / tensor.elements if tensor.elements else 0.0,
        "patterns": [str(pattern) for pattern in PATTERNS if satisfied[pattern]],
        "zeros_per_row": [least, most] if rows else [0, 0],
        "row_uniform": not rows or least == most,
        "bytes": dense,
        "dense_bytes": dense,
        "would_take": {"2:4": as_24, "bitmap": as_bitmap, "smallest": smallest},
    }
    problems = []
    if not_finite:
        problems.append(f"{tensor.name} has {not_finite} values that are NaN or infinite")
    if claim is not None and claimed is None:
        problems.append(f"{RECORD} claims the pattern {claim!r} for {tensor.name}, which is no pattern")
    elif claimed is not None:
        # A ratio may have been shared out over the whole layer rather than row by row: only the total is held to it.
        held = satisfied[claimed] if claimed.is_nm else kept <= rows * (columns - claimed.removed_per_row(columns))
        if not held:
            problems.append(f"{RECORD} claims {claim} for {tensor.name}, but its zeros do not follow that pattern")
    return layer, problems


def _elements(shape: Any) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


# wandapp.json


def _parse(claim: str) -> Pattern | None:
    try:
        return Pattern.parse(claim)
    except UsageError:
        return None


def _writer(record: dict[str, Any]) -> dict[str, Any]:
    finetuning = record.get("finetuning")
    return {
        "method": record.get("method"),
        "pattern": record.get("pattern", record.get("sparsity")),
        "seed": record.get("seed"),
        "versions": record.get("versions"),
        "finetuned": len(finetuning) if isinstance(finetuning, list) else 0,
    }


def _recorded_names(tensor: _Tensor) -> list[str]:
    """Names wandapp.json may have for a weight: an expert's ``gate_up_proj`` is stored halved, or with all experts."""
    stem = tensor.name.removesuffix(".weight")
    if len(tensor.shape) == 2:
        return [stem, tensor.name, re.sub(r"\.(gate|up)_proj$", ".gate_up_proj", stem)]
    if len(tensor.shape) == 3 and tensor.elements:
        holder, _, own = stem.rpartition(".")
        return [f"{holder}.{expert}.{own}" for expert in range(tensor.shape[0])]
    return []


def _claims(record: dict[str, Any]) -> dict[str, str]:
    """Which pattern the record claims for which layer.

    Layers are listed as ``layers`` of the record or of its ``blocks``; an entry is a name or an object with a ``name``
    and perhaps its own ``pattern``. An entry whose own ``sparsity`` is 0 says that the layer was left dense.
    """
    overall = _writer(record)["pattern"]
    claims = {}
    blocks = record.get("blocks")
    for holder in (record, *(blocks if isinstance(blocks, list) else ())):
        layers = holder.get("layers") if isinstance(holder, dict) else None
        for entry in layers if isinstance(layers, list) else ():
            named = entry if isinstance(entry, dict) else {"name": entry}
            pattern = named.get("pattern", overall)
            if isinstance(named.get("name"), str) and pattern is not None and named.get("sparsity") != 0:
                claims[named["name"]] = str(pattern)
    return claims
