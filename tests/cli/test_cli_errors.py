"""Exit codes: 2 for a wrong request, 1 with one sentence for what fails, and never a traceback unless asked for."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_models import tiny_model
from transformers import BertConfig, BertForMaskedLM

from wandapp_kernels.checkpoint import save
from wandapp_kernels.cli import commands, convert, main
from wandapp_kernels.errors import ModelError
from wandapp_kernels.models.load import load_model

pytestmark = pytest.mark.skipif(importlib.util.find_spec("glassllm") is None, reason="glassllm is not installed")


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """What was printed on standard error, which must be a single line; nothing may be on standard output."""
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1 and printed.err.startswith("wandapp: ") and "Traceback" not in printed.err
    return printed.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "wandda"], "method 'wandda' is unknown; choose one of magnitude, wanda,"),
        (["--score", "hessian"], "score 'hessian' is unknown"),
        (["--update", "obc"], "update 'obc' is unknown"),
        (["--sparsity", "0"], "sparsity '0' is not understood"),
        (["--sparsity", "1"], "sparsity '1' is not understood"),
        (["--sparsity", "1.5"], "sparsity '1.5' is not understood"),
        (["--sparsity", "abc"], "sparsity 'abc' is not understood"),
        (["--sparsity=-0.5"], "sparsity '-0.5' is not understood"),
        (["--sparsity", "4:4"], "sparsity '4:4' is not possible"),
        (["--method", "wanda", "--rounds", "3"], "--rounds belongs to the regional optimiser, which wanda does not"),
        (["--method", "wanda", "--lr", "1e-9"], "--lr belongs to the regional optimiser"),
        (
            ["--no-regional-optimizer", "--preset", "paper"],
            "--preset belongs to the regional optimiser, which wanda++rgs",
        ),
        (["--update", "none", "--method", "best", "--no-regional-optimizer", "--ro-norms"], "--ro-norms belongs to"),
        (["--relative-lr", "0.1", "--lr", "1e-9"], "--relative-lr and --lr both set the learning rate"),
        (["--relative-lr", "0.1", "--preset", "paper"], "--relative-lr and --preset both set the learning rate"),
        (["--lr", "1e-9", "--preset", "paper"], "--lr and --preset both set the learning rate"),
        (["--rounds", "0"], "at least one round"),
        (["--relative-lr", "0"], "learning rate must be above 0"),
        (["--relative-lr", "nan"], "learning rate must be above 0"),
        (["--alpha", "-1"], "alpha is -1"),
        (["--method", "wanda++rgs", "--alpha", "nan"], "alpha is nan"),
        (["--method", "magnitude", "--alpha", "5"], "--alpha changes the criteria rgs and gblm only, which magnitude"),
        (["--method", "pruner-zero", "--alpha", "5"], "--alpha changes"),
        (["--method", "gblm", "--x-norm", "mean"], "--x-norm changes the criterion rgs only"),
        (["--method", "wanda++rgs", "--recompute-gradient"], "--recompute-gradient changes the criterion rgs with a"),
        (["--method", "magnitude", "--sequential"], "--sequential changes criteria and updates that read a layer's"),
        (["--method", "pruner-zero", "--sequential"], "--sequential changes"),
        (["--method", "magnitude", "--self-calibration", "99"], "--self-calibration changes methods that read"),
        (["--seed", "99999999999999999999"], "--seed is 99999999999999999999, but must be"),
        (["--device", "abacus"], "device 'abacus' is unknown"),
        (["--seqlen", "129"], "--seqlen is 129, but must be 2 to 128, the context of glass-0.9m"),
        (["--seqlen", "1"], "--seqlen is 1, but must be 2 to 128"),
        (["--samples", "0"], "at least 1 sample"),
        (["--ignore", "lm_head", "--ignore", "nosuch"], "'nosuch', is that of no linear layer of the model; there is"),
        (["--ignore", "self_attn"], "'self_attn', is that of no linear layer"),
        (["--dtype", "int8"], "dtype int8"),
    ],
    ids=" ".join,
)
def test_wrong_requests_to_prune_give_2(arguments: list[str], message: str, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    assert main(["prune", "glass-0.9m", *arguments, "--out", str(out)]) == 2
    assert message in one_line(capsys)
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare", "glass-0.9m", "--methods", "wanda,wandda"], "method 'wandda' is unknown"),
        (["compare", "glass-0.9m", "--methods", " , "], "--methods is empty"),
        (["compare", "glass-0.9m", "--methods", "wanda,ria", "--ro-samples", "3"], "--ro-samples belongs to the"),
        (["compare", "glass-0.9m", "--methods", "wanda,ria", "--alpha", "3"], "gblm only, which wanda, ria does not"),
        (["compare", "glass-0.9m", "--seed=-99999999999999999999"], "--seed is -99999999999999999999, but must be"),
        (["compare", "glass-0.9m", "--ignore", "nosuch"], "'nosuch', is that of no linear layer"),
        (["compare", "glass-0.9m", "--sparsity", "2"], "sparsity '2' is not understood"),
        (["compare", "glass-0.9m", "--eval-seqlen", "500", "--samples", "2"], "--eval-seqlen is 500, but must be"),
        (["eval", "glass-0.9m", "--seqlen", "500"], "--seqlen is 500, but must be 2 to 128"),
        (["eval", "glass-0.9m", "--text", ","], "--text is empty"),
        (["eval", "glass-0.9m", "--tokens", "1"], "at least 2 tokens"),
    ],
    ids=" ".join,
)
def test_other_wrong_requests_give_2(arguments: list[str], message: str, capsys) -> None:
    assert main(arguments) == 2
    assert message in one_line(capsys)


@pytest.mark.parametrize(
    ("out", "save", "how"),
    [("same", "same", "the same folder"), ("a", "a/model", "inside one another"), ("a/../b/report", "b", "inside")],
)
def test_a_report_and_a_model_that_would_replace_each_other(
    out: str, save: str, how: str, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commands, "load_model", lambda *_, **__: pytest.fail("work was done"))
    (tmp_path / "a").mkdir()
    folders = ["--out", str(tmp_path / out), "--save", str(tmp_path / save)]
    for force in ([], ["--force"]):
        assert main(["compare", "glass-0.9m", *folders, *force]) == 2
        assert how in one_line(capsys)


@pytest.mark.parametrize(
    ("arguments", "refused"),
    [
        (["compare", "models/a", "--save", "models/a"], True),  # the next method would load what this one pruned
        (["compare", "models/a", "--out", "models/../models"], True),
        (["compare", "models/a", "--save", "models/b", "--out", "models/a/report"], False),
        (["prune", "models/a", "--out", "models"], True),
        (["prune", "models/a", "--out", "models/a"], False),
        (["prune", "glass-0.9m", "--out", "models"], False),
        (["convert", "models/a", "models"], True),
        (["convert", "models/a", "models/a"], False),
    ],
)
def test_the_model_is_not_replaced_while_it_is_read(
    arguments: list[str], refused: bool, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: object, **__: object) -> None:
        raise ModelError("loaded")

    monkeypatch.setattr(commands, "load_model", load)
    monkeypatch.setattr(convert, "load_model", load)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "a").mkdir(parents=True)
    assert main([*arguments, "--force"]) == (2 if refused else 1)
    assert ("holds the model models/a" if refused else "loaded") in one_line(capsys)


@pytest.mark.parametrize(
    "command", [["prune", "m", "--out", "a"], ["compare", "m", "--save", "a"], ["convert", "m", "a"]], ids=" ".join
)
def test_a_result_that_would_be_the_folder(command: list[str], capsys) -> None:
    assert main([*command, "--json", "b/../a"]) == 2
    assert "--json b/../a is the folder that is written" in one_line(capsys)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["shrink"],
        ["prune", "glass-0.9m"],
        ["prune", "glass-0.9m", "--out", "x", "--samples", "many"],
        ["prune", "glass-0.9m", "--out", "x", "--x-norm", "median"],
        ["eval", "glass-0.9m", "--split", "training"],
    ],
    ids=" ".join,
)
def test_arguments_that_do_not_parse_give_2(arguments: list[str], capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "usage: wandapp" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [["prune", "m", "--out", "o"], ["eval", "m"], ["compare", "m"], ["inspect", "m"]],
    ids=lambda command: command[0],
)
def test_a_report_that_cannot_be_written_stops_before_any_work(
    command: list[str], tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for work in ("load_model", "inspect_folder"):
        monkeypatch.setattr(commands, work, lambda *_, **__: pytest.fail("work was done"))
    assert main([*command, "--json", str(tmp_path)]) == 1
    assert "is a folder; name a file to write to" in one_line(capsys)


@pytest.mark.parametrize("command", [["prune", "glass-0.9m", "--out"], ["compare", "glass-0.9m", "--save"]])
def test_a_full_disk_stops_before_any_pruning(
    command: list[str], tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(save.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    monkeypatch.setattr(commands, "calibration_tokens", lambda *_, **__: pytest.fail("work was done"))
    assert main([*command, str(tmp_path / "out")]) == 1
    assert "needs 0.00 GB and its disk has 0.00 GB free" in one_line(capsys)


def test_absent_models_and_texts_give_1(tmp_path: Path, capsys) -> None:
    out = ["--out", str(tmp_path / "out")]
    assert main(["prune", str(tmp_path / "nowhere"), *out]) == 1
    assert "there is no folder" in one_line(capsys)
    assert main(["prune", "nobody/nothing", *out]) == 1
    assert "nobody/nothing is not on this machine" in one_line(capsys)
    assert main(["prune", "glass-0.9m", "--calibration", str(tmp_path / "nowhere.txt"), *out]) == 1
    assert "there is no text source" in one_line(capsys)
    assert main(["eval", "glass-0.9m", "--text", "wiki,nowhere.txt"]) == 1
    assert "there is no text source 'nowhere.txt'" in one_line(capsys)
    assert main(["inspect", str(tmp_path / "nowhere")]) == 1
    assert "is not a folder" in one_line(capsys)
    assert list(tmp_path.iterdir()) == []


def test_too_little_text_gives_1(tmp_path: Path, capsys) -> None:
    (tmp_path / "short.txt").write_text("\n\n".join(f"Sentence number {i} is short." for i in range(40)))
    command = ["prune", "glass-0.9m", "--calibration", str(tmp_path / "short.txt"), "--out", str(tmp_path / "out")]
    assert main([*command, "--samples", "64"]) == 1
    assert "use fewer or shorter samples, or more text" in one_line(capsys)


def save_with_tokenizer(model, folder: Path) -> str:
    model.save_pretrained(folder)
    load_model("glass-0.9m").tokenizer.save_pretrained(folder)
    return str(folder)


def test_models_that_cannot_be_pruned_give_1(tmp_path: Path, capsys) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    encoder = save_with_tokenizer(BertForMaskedLM(BertConfig(vocab_size=1024, **sizes)), tmp_path / "bert")
    capsys.readouterr()
    command = ["--out", str(tmp_path / "out"), "--samples", "2", "--seqlen", "16"]
    assert main(["prune", encoder, *command]) == 1
    assert "only decoder-only causal language models" in one_line(capsys)

    without = save_with_tokenizer(tiny_model("llama", vocab_size=1024, num_hidden_layers=0), tmp_path / "empty")
    capsys.readouterr()
    assert main(["prune", without, *command]) == 1
    assert "has no list of decoder blocks" in one_line(capsys)

    mute = tmp_path / "mute"
    tiny_model("llama", vocab_size=1024).save_pretrained(mute)
    capsys.readouterr()
    assert main(["prune", str(mute), *command]) == 1
    assert "has no tokenizer" in one_line(capsys)
    assert not (tmp_path / "out").exists()


def test_damaged_weights_give_1_and_name_the_layer(tmp_path: Path, capsys) -> None:
    model = tiny_model("llama", vocab_size=1024)
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    folder = save_with_tokenizer(model, tmp_path / "damaged")
    capsys.readouterr()
    command = ["prune", folder, "--method", "wanda", "--samples", "2", "--seqlen", "16", "--quiet"]
    assert main([*command, "--out", str(tmp_path / "out")]) == 1
    assert "1 of 1536 weights of model.layers.1.mlp.up_proj are NaN" in one_line(capsys)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


def test_debug_shows_the_traceback_and_the_sentence(tmp_path: Path, capsys) -> None:
    assert main(["prune", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out"), "--debug"]) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("Traceback (most recent call last):")
    assert re.match(r"wandapp: there is no folder .*", printed.splitlines()[-1])


def test_what_nobody_foresaw_is_one_line_too(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def fail(*_arguments: object, **_options: object) -> None:
        raise RuntimeError("several\n  lines")

    monkeypatch.setattr(commands, "load_model", fail)
    assert main(["eval", "glass-0.9m"]) == 1
    expected = "wandapp: unexpected RuntimeError: several lines (run again with --debug for the traceback)\n"
    assert one_line(capsys) == expected


def test_an_interrupt_gives_130(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def stop(*_arguments: object, **_options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "load_model", stop)
    assert main(["eval", "glass-0.9m"]) == 130
    assert "interrupted" in one_line(capsys)


@pytest.mark.parametrize("lines", [1, 100_000])
def test_a_reader_that_has_gone_is_no_error(lines: int) -> None:
    code = (
        "import sys; from wandapp_kernels.cli import commands, main\n"
        "commands.inspect_folder = lambda _: {}\n"
        f"commands.format_inspection = lambda *_, **__: 'a line\\n' * {lines}\n"
        "sys.stdin.read()\n"
        "sys.exit(main(['inspect', '.']))"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as running:
        assert running.stdin and running.stdout and running.stderr
        running.stdout.close()
        running.stdin.close()
        assert running.stderr.read() == ""
        assert running.wait() == 141


def test_warnings_are_one_line_each(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys) -> None:
    import warnings

    monkeypatch.setattr(commands, "inspect_folder", lambda _folder: warnings.warn("mind the gap", stacklevel=1))
    monkeypatch.setattr(commands, "format_inspection", lambda *_arguments, **_options: "done")
    assert main(["inspect", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    assert (printed.err, printed.out) == ("warning: mind the gap\n", "done\n")
