"""One block is held at a time, in fp32; the model keeps its own type."""

from __future__ import annotations

import gc
import importlib.util

import pytest
import torch
from tiny_models import tiny_model, token_ids
from torch import nn

from wandapp_kernels.models.load import load_model
from wandapp_kernels.pruning import walk
from wandapp_kernels.pruning.methods import METHODS, build_settings
from wandapp_kernels.pruning.statistics import PROBE_TOKENS, InputRecorder
from wandapp_kernels.pruning.stream import Stream
from wandapp_kernels.sparsity import Pattern, satisfies

needs_glass = pytest.mark.skipif(importlib.util.find_spec("glassllm") is None, reason="glassllm is not installed")
BLOCKS = 30
LARGE = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def live_bytes() -> int:
    """Bytes of all tensors that Python can reach, each storage once.

    Other subclasses are left out: the fake tensors that an earlier test's compilation left behind have no storage.
    """
    storages = {}
    for found in gc.get_objects():
        if type(found) in (torch.Tensor, torch.nn.Parameter) and not found.is_meta:
            storages[found.untyped_storage().data_ptr()] = found.untyped_storage().nbytes()
    return sum(storages.values())


def test_memory_does_not_grow_with_the_blocks() -> None:
    model = tiny_model("llama", **LARGE)
    block_bytes = sum(p.numel() * 4 for p in model.model.layers[0].parameters())
    held: dict[int, int] = {}

    def watch(progress: walk.Progress) -> None:
        if progress.done in (1, 2, BLOCKS - 1, BLOCKS):
            held[progress.done] = live_bytes()

    settings = build_settings("wanda", "2:4")
    gc.disable()  # what waits for the collector is held too
    try:
        report = walk.prune_blocks(model, token_ids(4, 48), settings, progress=watch)
    finally:
        gc.enable()
    assert held[BLOCKS] - held[1] < 0.1 * block_bytes
    assert held[BLOCKS - 1] - held[2] < 0.1 * block_bytes
    peaks = [block.peak_memory_bytes for block in report.blocks]
    assert max(peaks[-BLOCKS // 3 :]) - max(peaks[: BLOCKS // 3]) < 3 * block_bytes


def test_the_first_blocks_inputs_are_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    real = walk.capture

    def watch(*arguments):
        seen.append(real(*arguments))
        assert len(seen[0].hidden) == 3
        return seen[0]

    monkeypatch.setattr(walk, "capture", watch)
    walk.prune_blocks(tiny_model("llama"), token_ids(3, 8), build_settings("wanda", "2:4"))
    assert seen[0].hidden == []


def test_probes_do_not_hold_the_whole_batch() -> None:
    linear = nn.Linear(8, 4)
    with torch.no_grad(), InputRecorder({"x": linear}) as recorder:
        linear(torch.randn(2, 4 * PROBE_TOKENS, 8))
        recorder.end_batch(2)
    assert recorder.probes["x"].untyped_storage().nbytes() == PROBE_TOKENS * 8 * 4


class _Falling:
    """A memory meter whose readings fall: the first lap of a block is its highest."""

    def __init__(self, _device: torch.device):
        self.next = 10**6

    def lap(self) -> int:
        self.next -= 1
        return self.next


def test_a_blocks_peak_includes_the_passes_before_the_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walk, "PeakMemory", _Falling)
    settings = build_settings("wanda++", "2:4", optimizer={"rounds": 3, "samples": 2})
    report = walk.prune_blocks(tiny_model("llama", num_hidden_layers=1), token_ids(3, 8), settings)
    assert report.peak_memory_bytes == 10**6 - 1  # capturing
    assert report.blocks[0].peak_memory_bytes == 10**6 - 2  # the regional gradient, before the first mask
    assert report.blocks[0].layers[0].peak_memory_bytes == 10**6 - 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("method", METHODS)
def test_weights_keep_their_type_and_the_pattern_in_it(method: str, dtype: torch.dtype) -> None:
    model = tiny_model("llama", num_hidden_layers=1).to(dtype)
    few = {"optimizer": {"rounds": 2, "samples": 2}} if METHODS[method].optimizer else {}
    if METHODS[method].self_calibration:
        few["self_calibration"] = 40  # of which 24 are given
    report = walk.prune_blocks(model, token_ids(3, 8), build_settings(method, "2:4", **few))
    assert {p.dtype for p in model.parameters()} == {dtype}
    for layer in report.blocks[0].layers:
        weight = model.get_submodule(layer.name).weight
        assert satisfies(weight != 0, Pattern.parse("2:4"))
        assert layer.sparsity == pytest.approx(0.5, abs=0.01)  # a kept weight may round to zero


def test_half_precision_masks_are_those_of_the_same_weights_in_fp32() -> None:
    half = tiny_model("llama").bfloat16()
    full = tiny_model("llama").bfloat16().float()
    for model in (half, full):
        walk.prune_blocks(model, token_ids(3, 8), build_settings("wanda", "2:4"))
    names = [name for name, p in half.named_parameters() if "layers.0." in name and p.dim() == 2]
    same = [(half.get_parameter(name) != 0).eq(full.get_parameter(name) != 0).float().mean().item() for name in names]
    assert min(same) > 0.98  # the stream between the embedding and the block is rounded, the arithmetic is not


def test_the_next_block_and_the_report_see_the_weights_as_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    used: dict[str, torch.Tensor] = {}

    class Watched(walk.BlockWorkspace):
        def run(self, *arguments, **keywords):
            used.update({name: linear.weight.detach().clone() for name, linear in self.linears.items()})
            return super().run(*arguments, **keywords)

    monkeypatch.setattr(walk, "BlockWorkspace", Watched)
    model = tiny_model("llama", num_hidden_layers=2).bfloat16()
    walk.prune_blocks(model, token_ids(3, 8), build_settings("sparsegpt", "2:4"))  # repairs need more than 8 bits
    assert len(used) == 14
    for name, weight in used.items():
        assert torch.equal(weight, model.get_submodule(name).weight.float()), name


def test_dense_outputs_for_the_optimizer_are_not_rounded() -> None:
    stream = Stream([torch.ones(1, 2, 3, dtype=torch.bfloat16)] * 2, torch.device("cpu"))
    value = torch.full((1, 2, 3), 1.0 + 2.0**-20)
    outputs = stream.empty_like()
    outputs.put([1], value)
    stream.put([0], value)
    assert torch.equal(outputs.batch([1]), value)
    assert torch.equal(stream.batch([0]), torch.ones(1, 2, 3))
    assert len(outputs) == 2 and outputs.tokens_per_sample == 2


@needs_glass
@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_rows_that_do_not_divide_keep_the_tail_of_a_group(method: str) -> None:
    model = load_model("glass-0.9m", tokenizer=False).model
    walk.prune_blocks(model, token_ids(4, 32), build_settings(method, "2:4"))
    found = 0
    for name, parameter in model.named_parameters():
        if name.endswith("down_proj.weight"):
            found += 1
            assert parameter.shape[1] == 341
            groups = (parameter[:, :340] == 0).view(len(parameter), -1, 4).sum(-1)
            assert (groups == 2).all()
            assert (parameter[:, 340] != 0).all()  # one of a group of one is kept
    assert found == model.config.num_hidden_layers
