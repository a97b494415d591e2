"""Gradients of the whole dense model's loss (GBLM-Pruner, arXiv 2311.04902, section 3; Pruner-Zero reads the same).

``‖G‖_1 = Σ_n |g_n|`` and ``‖G‖_2 = sqrt(Σ_n g_n²)`` with ``g_n`` the gradient of the causal-LM cross-entropy (labels
are the inputs) of sample n. This is the one statistic that needs every block at once: weights, gradients and the
accumulators of all blocks are in memory, as in the published methods.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import nn

from wandapp_kernels.errors import NonFiniteError
from wandapp_kernels.models.blocks import Decoder
from wandapp_kernels.models.capture import evaluating
from wandapp_kernels.models.workspace import BlockWorkspace
from wandapp_kernels.pruning.statistics import MODEL_GRADIENT_L1

# Half-precision gradients of single weights underflow; a power of two is exactly removed again in fp32.
LOSS_SCALE = 1024.0


class ModelGradients:
    """Per block and parameter: ``norm -> accumulated gradient`` on the CPU, fp32."""

    def __init__(self, decoder: Decoder, norms: Collection[str], ignore: Sequence[str] = ()):
        self._decoder, self._norms, self._ignore = decoder, tuple(norms), ignore
        self._parameters = [
            {name: p for name, p in block.named_parameters() if p.dim() > 1} for block in decoder.blocks
        ]
        self._sums = [
            {
                norm: {name: torch.zeros(p.shape, dtype=torch.float32, device="cpu") for name, p in parameters.items()}
                for norm in self._norms
            }
            for parameters in self._parameters
        ]

    def collect(
        self, model: nn.Module, token_ids: torch.Tensor, device: torch.device, progress: Callable[[int, int], None]
    ) -> None:
        """One forward and backward of the whole model per sample of ``token_ids [samples, tokens]``."""
        home = next(model.parameters()).device
        model.to(device)
        frozen = {p: p.requires_grad for p in model.parameters()}
        wanted = [(i, name, p) for i, block in enumerate(self._parameters) for name, p in block.items()]
        try:
            for p in frozen:
                p.requires_grad_(False)
            for _, _, p in wanted:
                p.requires_grad_(True)
            with evaluating(model):
                for sample in range(len(token_ids)):
                    self._add(model, token_ids[sample : sample + 1].to(device), wanted)
                    progress(sample + 1, len(token_ids))
        finally:
            for p, trainable in frozen.items():
                p.requires_grad_(trainable)
            model.to(home)

    def _add(self, model: nn.Module, ids: torch.Tensor, wanted: list[tuple[int, str, nn.Parameter]]) -> None:
        with torch.enable_grad():
            logits = model(input_ids=ids, use_cache=False).logits.float()
            loss = nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:]) * LOSS_SCALE
            gradients = torch.autograd.grad(loss, [p for _, _, p in wanted], allow_unused=True)
        for (block, name, _), gradient in zip(wanted, gradients, strict=True):
            if gradient is None:  # an expert that no token reached
                continue
            g = gradient.float().div_(LOSS_SCALE).cpu()
            bad = int((~torch.isfinite(g)).sum())
            if bad:
                raise NonFiniteError(
                    f"{bad} of {g.numel()} gradients of {self._decoder.name}.{block}.{name} are NaN or infinite; "
                    "load the model in float32 or bfloat16"
                )
            for norm in self._norms:
                sums = self._sums[block][norm][name]
                sums += g.abs() if norm == MODEL_GRADIENT_L1 else g.square()

    def of_block(self, index: int, device: torch.device) -> dict[str, dict[str, torch.Tensor]]:
        """Full name of each Linear of block ``index`` -> norm -> ``[out, in]`` on ``device``.

        A gradient has its weight's layout, so a working copy of the block that holds gradients in place of weights
        hands them out under the Linears' names, transposed and split exactly as the weights are.
        """
        block, parameters = self._decoder.blocks[index], self._parameters[index]
        weights = {name: p.data for name, p in parameters.items()}
        found: dict[str, dict[str, torch.Tensor]] = {}
        for norm in self._norms:
            try:
                for name, p in parameters.items():
                    sums = self._sums[index][norm][name]
                    p.data = sums if norm == MODEL_GRADIENT_L1 else sums.sqrt()
                copy = BlockWorkspace(block, f"{self._decoder.name}.{index}", device, ignore=self._ignore)
            finally:
                for name, p in parameters.items():
                    p.data = weights[name]
            for name, linear in copy.linears.items():
                found.setdefault(name, {})[norm] = linear.weight.data
        return found
