"""Wrong options of the commands that run and measure models: exit code 2 and one sentence, before anything is done."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from pruned_models import pruned_model

from wandapp_kernels.cli import checks, main
from wandapp_kernels.cli.arguments import parser
from wandapp_kernels.errors import CheckpointError, UsageError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checks") / "model"
    pruned_model("llama", ("2:4",), num_hidden_layers=1).save_pretrained(folder)
    return folder


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1 and printed.err.startswith("wandapp: ") and "unexpected" not in printed.err
    return printed.err


LINEAR = ["bench", "linear", "--quiet", "--shapes", "8x8", "--sparsity", "2:4", "--m", "1"]
MODEL = ["bench", "model", "MODEL", "--quiet"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tune", "MODEL", "--device", "abacus"], "device 'abacus' is unknown"),
        (["tune", "MODEL", "--device", "meta"], "device 'meta' has no kernels"),
        (["tune", "MODEL", "--seconds", "-1"], "--seconds is -1"),
        (["tune", "MODEL", "--seconds", "nan"], "--seconds is nan"),
        (["tune", "MODEL", "--m", "0"], "--m '0'"),
        (["tune", "MODEL", "--sparsity", "7"], "sparsity '7'"),
        ([*LINEAR, "--shapes", "0x0"], "--shapes '0x0'"),
        ([*LINEAR, "--m", "0"], "--m '0'"),
        ([*LINEAR, "--device", "abacus"], "device 'abacus' is unknown"),
        ([*LINEAR, "--seconds", "inf"], "--seconds is inf"),
        ([*LINEAR, "--plot", "plot.doc"], "--plot is plot.doc, but must end in .png"),
        ([*MODEL, "--batch", "0"], "--batch is '0'"),
        ([*MODEL, "--new-tokens", "1"], "--new-tokens must be at least 2"),
        ([*MODEL, "--prompts", "60"], "exceed the context of 64"),
        ([*MODEL, "--dtype", "int8"], "'int8' is none of float64"),
        ([*MODEL, "--dtype", "float32,"], "'' is none of float64"),
        (["bench", "model", "--random", "llama-1b", "--dtype", "nonsense"], "'nonsense' is none of"),
        ([*MODEL, "--device", "abacus"], "device 'abacus' is unknown"),
        (["generate", "MODEL", "--prompt", "x", "--device", "abacus"], "device 'abacus' is unknown"),
        (["generate", "MODEL", "--prompt", "x", "--backend", "abacus"], "--backend is 'abacus', but what runs on"),
        (
            ["generate", "MODEL", "--prompt", "x", "--backend", "cuda", "--device", "cpu"],
            "cpu is auto, dense, cpu, refe",
        ),
        (["convert", "MODEL", "OUT", "--min-sparsity", "7"], "--min-sparsity is 7, but must be between 0 and 1"),
        (["convert", "MODEL", "OUT", "--min-sparsity", "nan"], "--min-sparsity is nan"),
        (["convert", "MODEL", "OUT", "--pattern", "9:4"], "'9:4' is not possible"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_options_give_2(arguments: list[str], message: str, folder: Path, tmp_path: Path, capsys) -> None:
    places = {"MODEL": str(folder), "OUT": str(tmp_path / "out")}
    assert main([places.get(argument, argument) for argument in arguments]) == 2
    assert message in one_line(capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    "command",
    [["tune", "MODEL"], LINEAR, MODEL, ["generate", "MODEL", "--prompt", "x"]],
    ids=["tune", "bench linear", "bench model", "generate"],
)
def test_a_gpu_that_is_not_there(command: list[str], folder: Path, capsys) -> None:
    assert main([str(folder) if part == "MODEL" else part for part in command] + ["--device", "cuda"]) == 2
    assert "torch finds no GPU; use --device cpu" in one_line(capsys)


def test_a_gpu_number_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert checks.device("cuda:1") == torch.device("cuda:1") and checks.device(None) == torch.device("cuda")
    assert checks.device("cpu:3") == torch.device("cpu")
    with pytest.raises(UsageError, match="finds 2 GPUs"):
        checks.device("cuda:2")


class _Runs:
    """A backend that runs 2:4 at one token on one kind of device."""

    def __init__(self, name: str, place: str):
        self.name, self._place = name, place

    def supports(self, problem) -> str | None:
        takes = problem.pattern == "2:4" and problem.tokens == 1 and problem.device.startswith(self._place)
        return None if takes else "no"


def test_kernels_of_another_device_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    backends = [_Runs("cpu-nm", "cpu"), _Runs("cuda-nm", "cuda"), _Runs("triton-nm-dot", "cuda")]
    monkeypatch.setattr(checks, "BACKENDS", {one.name: one for one in backends})
    gpu, cpu = torch.device("cuda:0"), torch.device("cpu")
    for family in ("auto", "dense", "reference", "cuda", "triton"):
        checks.backend(family, gpu)
    for family in ("auto", "dense", "reference", "cpu"):
        checks.backend(family, cpu)
    with pytest.raises(UsageError, match=r"'cpu', but what runs on cuda:0 is auto, dense, cuda, triton, reference$"):
        checks.backend("cpu", gpu)
    with pytest.raises(UsageError, match=r"'cuda', but what runs on cpu is auto, dense, cpu, reference$"):
        checks.backend("cuda", cpu)


def test_a_folder_that_is_no_model(tmp_path: Path, capsys) -> None:
    for model in (str(tmp_path / "none"), str(tmp_path), ""):
        assert main(["tune", model, "--no-tune"]) == 1
        assert repr(str(tmp_path / "none")) in (line := one_line(capsys)) or "config.json" in line or "''" in line


def test_types_have_short_names() -> None:
    assert checks.dtypes("bf16, float32,fp32,fp16,fp64") == ["bfloat16", "float32", "float16", "float64"]
    for command in (["prune", "m", "--out", "o"], ["eval", "m"], ["compare", "m"], ["convert", "m", "o"]):
        assert parser().parse_args([*command, "--dtype", "bf16"]).dtype == "bfloat16"
    assert parser().parse_args(["generate", "m", "--prompt", "x", "--dtype", "fp16"]).dtype == "float16"


def test_a_plot_that_cannot_be_written(tmp_path: Path) -> None:
    checks.plot(tmp_path / "plot.PNG")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(CheckpointError, match="is a folder"):
        checks.plot(tmp_path / "folder.png")


def test_too_little_memory_is_one_sentence(capsys) -> None:
    assert main([*LINEAR, "--shapes", "999999999x999999999"]) == 1
    assert "not enough memory" in one_line(capsys)


def test_converting_in_place_counts_the_bytes_there_were(folder: Path, tmp_path: Path, capsys) -> None:
    pruned_model("llama", ("2:4",), num_hidden_layers=1).save_pretrained(tmp_path / "model")
    before = (tmp_path / "model" / "model.safetensors").stat().st_size
    assert main(["convert", str(tmp_path / "model"), str(tmp_path / "model"), "--force"]) == 0
    after = (tmp_path / "model" / "model.safetensors").stat().st_size
    assert after < before and f"({100 * after / before:.2f} % of" in capsys.readouterr().out


@pytest.mark.skipif(importlib.util.find_spec("glassllm") is None, reason="glassllm is not installed")
def test_a_prompt_that_fills_the_context(capsys) -> None:
    assert main(["generate", "glass-0.9m", "--prompt", "hello " * 200]) == 2
    assert "--prompt has 601 tokens, which fill the context of 128" in one_line(capsys)
