"""Models of the hub: out of reach, downloaded before, and checked as a folder is."""

from __future__ import annotations

import os
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from model_folders import edit_config, edit_weights, llama, refused, same_weights, shard

from wandapp_kernels.models.load import load_model


@pytest.mark.parametrize("name", ["organisation/model", "gpt9", "not a name!", "organisation/"])
def test_hub_out_of_reach(offline: Path, name: str) -> None:
    refused(name, r"give a local folder or a bundled model \(smollm2-135m, glass-0\.9m, glass-0\.9m-pt\)")


def in_hub_cache(hub: Path, original: Path, shards: bool = False) -> Path:
    """Lay `original` out as the hub's cache does for organisation/tiny: links from a snapshot to blobs."""
    repository = hub / "models--organisation--tiny"
    commit = "0123456789" * 4
    snapshot = repository / "snapshots" / commit
    shutil.copytree(original, snapshot)
    if shards:
        shard(snapshot)
    (repository / "blobs").mkdir()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    for number, file in enumerate(sorted(snapshot.iterdir())):
        blob = repository / "blobs" / str(number)
        shutil.move(file, blob)
        file.symlink_to(os.path.relpath(blob, snapshot))
    return snapshot


@pytest.mark.parametrize("shards", [False, True])
def test_hub_id_already_downloaded(offline: Path, original: Path, shards: bool) -> None:
    snapshot = in_hub_cache(offline, original, shards)
    loaded = load_model("organisation/tiny", revision="main")
    assert (loaded.name, loaded.folder) == ("organisation/tiny", None)
    assert same_weights(loaded.model, llama().to(torch.bfloat16))
    assert loaded.tokenizer is not None and loaded.tokenizer("one").input_ids == [1]
    # The same files given as a folder: their links lead out of it, to the cache's own blobs.
    assert load_model(str(snapshot)).folder == snapshot
    refused("organisation/tiny", "not found on the model hub", revision="another")


def test_hub_model_is_checked_too(offline: Path, original: Path) -> None:
    snapshot = in_hub_cache(offline, original)
    edit_weights(snapshot, lambda weights: weights.pop("model.norm.weight"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        refused("organisation/tiny", r"lacks 1 weight \(model\.norm\.weight\)")
    edit_config(snapshot, quantization_config={"quant_method": "awq"})
    refused("organisation/tiny", r"already quantised \(awq\)")


def test_a_folder_in_the_current_one_wins_over_the_hub(
    offline: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    loaded = load_model(folder.name)
    assert loaded.folder == Path(folder.name)
    assert same_weights(loaded.model, llama().to(torch.bfloat16))
