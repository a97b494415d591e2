"""The first two of SmolLM2-135M's thirty blocks, pruned for real: a few seconds instead of minutes."""

import pytest
import torch

from wandapp_kernels import api
from wandapp_kernels.data.calibration import calibration_tokens, evaluation_tokens
from wandapp_kernels.errors import ModelError, TextError
from wandapp_kernels.evaluation.perplexity import perplexity
from wandapp_kernels.sparsity import Pattern, satisfies

LEFT_DENSE = r"re:^model\.layers\.([2-9]|\d\d)\."


@pytest.fixture(scope="module")
def smollm2():
    try:
        loaded = api.load("smollm2-135m", dtype=torch.float32)
        tokens = calibration_tokens(loaded.tokenizer, "wiki", samples=8, seqlen=64)
        text, _ = evaluation_tokens(loaded.tokenizer, "wiki", "evaluation", 768)
    except (ModelError, TextError) as error:
        pytest.skip(str(error))
    return loaded.model, tokens, text, {name: p.detach().clone() for name, p in loaded.model.named_parameters()}


def pruned_perplexity(smollm2, method: str, **changes) -> float:
    model, tokens, text, dense = smollm2
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(dense[name])
    report = api.prune(model, tokens, method, "2:4", ignore=[LEFT_DENSE], **changes)
    assert len(report.blocks) == 30
    pruned = {layer.name for block in report.blocks for layer in block.layers}
    assert len(pruned) == 14
    for name, p in model.named_parameters():
        if name.removesuffix(".weight") in pruned:
            assert satisfies(p != 0, Pattern.parse("2:4")), name
            assert float((p == 0).float().mean()) == pytest.approx(0.5, abs=1e-3), name
        elif method != "best":
            assert torch.equal(p, dense[name]), name
    return perplexity(model, text, seqlen=256, bos_token_id=1).value


def test_better_methods_cost_less_on_held_out_text(smollm2):
    model, _, text, _ = smollm2
    before = perplexity(model, text, seqlen=256, bos_token_id=1).value
    magnitude, wanda = pruned_perplexity(smollm2, "magnitude"), pruned_perplexity(smollm2, "wanda")
    repaired = pruned_perplexity(smollm2, "wanda++", optimizer={"samples": 4, "rounds": 3})
    assert before < repaired < 0.95 * wanda
    assert wanda < 0.9 * magnitude
