"""The command line: every subcommand, its JSON, and its exit status."""

import io
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

import mamba_core as mc
from mamba_core import chat, registry
from mamba_core.backends.native import library
from mamba_core.cli import COMMANDS, main
from mamba_core.registry import installed

from .layout_files import of_architecture

pytest.importorskip("rich")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    (folder / "a.py").write_text("def main():\n    return 'äöü'\n" * 200)
    (folder / "picture.bin").write_bytes(b"\xff\xfe\x00")
    return folder


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "config.json"
    path.write_text(json.dumps({"d_model": 16, "n_layer": 1, "vocab_size": 256, "d_state": 4}))
    return path


def train(backend, text, config_file, out, *more):
    sizes = ["--steps", "6", "--batch-size", "2", "--length", "16", "--warmup-steps", "2"]
    return main(["train", "--data", str(text), "--out", str(out), "--backend", backend, "--config", str(config_file),
                 *sizes, *more])  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(backend, text, config_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    assert train(backend.name, text, config_file, out) == 0
    return out


def test_every_command_explains_itself(capsys):
    for name in COMMANDS:
        with pytest.raises(SystemExit) as stopped:
            main([name, "--help"])
        assert stopped.value.code == 0
        assert COMMANDS[name] in " ".join(capsys.readouterr().out.split())


def test_info(capsys):
    assert main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["backends"]) >= {"torch", "mlx", "jax"}
    assert main(["info"]) == 0
    assert "kernels" in capsys.readouterr().out


NOT_BUILT = "not built; with a C++ compiler (gcc or clang) at hand, install mamba_core from its source again"


def test_info_says_once_that_the_cpu_kernels_are_left_out(capsys, monkeypatch):
    monkeypatch.setattr(library, "_built", list)
    monkeypatch.delenv("MAMBA_CORE_NATIVE", raising=False)
    monkeypatch.setattr(library, "_find", library._find.__wrapped__)
    kernels = {"selective_scan": {"native": NOT_BUILT, "cuda": "it runs on an NVIDIA GPU only", "chunked": None}}
    found = {name: registry.BackendInfo(name, "2.0", ("cpu",), kernels, None) for name in ("torch", "mlx")}
    monkeypatch.setattr(registry, "backends", lambda: found)
    assert main(["info"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert out.count("not built") == 1
    assert f"The CPU kernels in C++, native, are left out: {NOT_BUILT}." in out
    assert main(["info", "--json"]) == 0
    kernels = json.loads(capsys.readouterr().out)["backends"]["mlx"]["kernels"]
    assert kernels["selective_scan"]["native"] == NOT_BUILT


def test_train_inspect_convert_generate(backend, checkpoint, tmp_path, capsys):
    capsys.readouterr()
    assert main(["inspect", str(checkpoint), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["layout"] == "hf"
    assert found["config"]["d_model"] == 16
    assert main(["convert", str(checkpoint), str(tmp_path / "ssm"), "--to", "mamba_ssm", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["target_layout"] == "mamba_ssm"
    assert (tmp_path / "ssm" / "pytorch_model.bin").is_file()
    for source in (checkpoint, tmp_path / "ssm"):
        arguments = ["generate", str(source), "def ", "--max-new-tokens", "5", "--backend", backend.name]
        assert main([*arguments, "--json"]) == 0
        result = json.loads(capsys.readouterr().out)
        assert len(result["tokens"][0]) == 5
        assert main(arguments) == 0
        assert capsys.readouterr().out == f"def {result['text'][0]}\n"


def test_generate_reads_the_prompt_from_standard_input(backend, checkpoint, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("def "))
    assert main(["generate", str(checkpoint), "-", "--max-new-tokens", "1", "--backend", backend.name]) == 0
    assert capsys.readouterr().out.startswith("def ")


def test_generate_shows_speed_and_memory(backend, checkpoint, capsys):
    arguments = ["generate", str(checkpoint), "def ", "--max-new-tokens", "5", "--backend", backend.name]
    assert main(arguments) == 0
    error = capsys.readouterr().err
    assert re.fullmatch(r"5 tokens: the first after [\d.]+ s, then [\d.]+ tokens/s; [\d,]+ MiB at most\n", error)
    assert main([*arguments, "--json"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["peak_memory"] > 2**20
    assert shown.err == ""


def test_generate_several(backend, checkpoint, capsys):
    arguments = ["generate", str(checkpoint), "def ", "--max-new-tokens", "4", "--backend", backend.name, "-n", "2"]
    settings = ["--temperature", "2", "--presence-penalty", "0.5", "--frequency-penalty", "0.1", "--seed", "3"]
    assert main([*arguments, *settings, "--logit-bias", "32=-inf", "--top-logprobs", "2", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [len(row) for row in result["tokens"]] == [4, 4]
    assert not any(32 in row for row in result["tokens"])
    assert [[len(top) for top in row] for row in result["top_logprobs"]] == [[2] * 4] * 2
    assert main([*arguments, *settings, "--logit-bias", "32=-inf"]) == 0
    assert capsys.readouterr().out == "".join(f"--- {k}\ndef {text}\n" for k, text in enumerate(result["text"]))
    assert main([*arguments[:-2], "--stop-token", str(result["tokens"][0][0]), *settings, "--json"]) == 0


def test_generate_goes_on_from_a_file(backend, checkpoint, tmp_path, capsys):
    state = str(tmp_path / "state.safetensors")
    command = ["generate", str(checkpoint), "--backend", backend.name, "--json", "--max-new-tokens"]
    assert main([*command, "6", "def main"]) == 0
    whole = json.loads(capsys.readouterr().out)["text"]
    assert main([*command, "0", "def ", "--save-state", state]) == 0
    capsys.readouterr()
    assert main([*command, "6", "main", "--state", state]) == 0
    assert json.loads(capsys.readouterr().out)["text"] == whole
    assert main([*command, "6", "main", "--state", str(tmp_path / "nowhere")]) == 2


def test_generate_turn_by_turn(backend, checkpoint, tmp_path, monkeypatch, capsys):
    model = mc.load(checkpoint, backend=backend.name)
    first = mc.generate(model, "def a", max_new_tokens=5)
    # As tokens: what is generated need not be whole characters.
    row = [*b"def a", *first.tokens[0], *b"\nclass"]
    second = mc.generate(model, row, max_new_tokens=5)
    monkeypatch.setattr("sys.stdin", io.StringIO("def a\nclass\n"))
    command = ["generate", str(checkpoint), "--interactive", "--max-new-tokens", "5", "--backend", backend.name]
    path = tmp_path / "state.safetensors"
    assert main([*command, "--save-state", str(path)]) == 0
    shown = capsys.readouterr()
    whole = mc.generate(model, [*row, *second.tokens[0]], max_new_tokens=0, return_state=True).state
    for found, wanted in zip(mc.load_state(path, model).layers[0], whole.layers[0], strict=True):
        np.testing.assert_allclose(backend.to_numpy(found), backend.to_numpy(wanted), rtol=1e-3, atol=1e-6)
    assert shown.out == f"> {first.text[0]}\n> {second.text[0]}\n> \n"
    assert shown.err.count("5 tokens: the first after") == 2
    monkeypatch.setattr("sys.stdin", io.StringIO("\ndef a\n"))
    assert main(command) == 0, "a bad turn does not end the talk"
    shown = capsys.readouterr()
    assert "prompt 0 is empty" in shown.err
    assert first.text[0] in shown.out
    assert main([*command, "def a", "--json"]) == 2


TEMPLATE = "{% for message in messages %}<{{ message.role }}>{{ message.content }}\n{% endfor %}<assistant>"


def rendered(monkeypatch) -> list[str]:
    """What the chat template makes from now on."""
    texts, real = [], chat.render
    monkeypatch.setattr(chat, "render", lambda *arguments: texts.append(real(*arguments)) or texts[-1])
    return texts


def test_generate_answers_messages(backend, checkpoint, tmp_path, monkeypatch, capsys):
    shutil.copytree(checkpoint, tmp_path / "model")
    command = ["generate", str(tmp_path / "model"), "--chat", "--max-new-tokens", "5", "--backend", backend.name]
    assert main([*command, "Hello"]) == 2
    assert "messages need a chat template" in capsys.readouterr().err
    (tmp_path / "model" / "chat_template.jinja").write_text(TEMPLATE)
    model = mc.load(tmp_path / "model", backend=backend.name)
    wanted = mc.generate(model, "<system>Be kind.\n<user>Hello\n<assistant>", max_new_tokens=5)
    talk = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}]
    assert mc.generate(model, messages=talk, max_new_tokens=5).tokens == wanted.tokens
    state = tmp_path / "state.safetensors"
    assert main([*command, "Hello", "--system", "Be kind.", "--save-state", str(state)]) == 0
    assert capsys.readouterr().out == f"{wanted.text[0]}\n"
    mc.load_state(state, model)
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n"))
    read = rendered(monkeypatch)
    assert main([*command, "-", "--system", "Be kind.", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == wanted.tokens
    assert read == ["<system>Be kind.\n<user>Hello\n<assistant>"]
    assert main([*command, "Hello", "--system", "Be kind.", "-n", "2"]) == 0
    assert capsys.readouterr().out == "".join(f"--- {k}\n{wanted.text[0]}\n" for k in range(2))
    assert main([*command, "Hello", "--state", str(state)]) == 2
    assert main([*[item for item in command if item != "--chat"], "Hello", "--system", "x"]) == 2


def test_generate_talks(backend, checkpoint, tmp_path, monkeypatch, capsys):
    shutil.copytree(checkpoint, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(TEMPLATE)
    model = mc.load(tmp_path / "model", backend=backend.name)
    talk = [{"role": "user", "content": "a"}]
    first = mc.generate(model, messages=talk, max_new_tokens=5)
    talk += [{"role": "assistant", "content": first.text[0]}, {"role": "user", "content": "b"}]
    second = mc.generate(model, messages=talk, max_new_tokens=5)
    monkeypatch.setattr("sys.stdin", io.StringIO("a\nb\n"))
    command = ["generate", str(tmp_path / "model"), "--interactive", "--chat", "--max-new-tokens", "5"]
    read = rendered(monkeypatch)
    assert main([*command, "--backend", backend.name]) == 0
    assert read == ["<user>a\n<assistant>", f"<user>a\n<assistant>{first.text[0]}\n<user>b\n<assistant>"]
    assert capsys.readouterr().out == f"> {first.text[0]}\n> {second.text[0]}\n> \n"


class Interrupting:
    """A decode that is interrupted after some tokens, the first time."""

    def __init__(self, real, after):
        self.real, self.after = real, after

    def __call__(self, *arguments, **settings):
        for index, choice in enumerate(self.real(*arguments, **settings)):
            if index == self.after:
                self.after = None
                raise KeyboardInterrupt
            yield choice


def test_an_interrupt_ends_with_what_there_is(backend, checkpoint, monkeypatch, capsys):
    command = ["generate", str(checkpoint), "--max-new-tokens", "9", "--backend", backend.name]
    assert main([*command, "def ", "--json"]) == 0
    whole = json.loads(capsys.readouterr().out)
    real = backend.decode
    monkeypatch.setattr(backend, "decode", Interrupting(real, 4))
    assert main([*command, "def "]) == 130
    shown = capsys.readouterr()
    assert shown.out.startswith("def ")
    assert shown.out.endswith("\n")
    assert "4 tokens: the first after" in shown.err
    monkeypatch.setattr(backend, "decode", Interrupting(real, 4))
    assert main([*command, "def ", "--json"]) == 130
    result = json.loads(capsys.readouterr().out)
    assert result["tokens"] == [whole["tokens"][0][:4]]
    assert result["finish_reasons"] == [None]
    monkeypatch.setattr(backend, "decode", Interrupting(real, 4))
    monkeypatch.setattr("sys.stdin", io.StringIO("def \nclass\n"))
    assert main([*command, "--interactive"]) == 0
    shown = capsys.readouterr()
    assert "4 tokens: the first after" in shown.err
    assert "9 tokens: the first after" in shown.err, "the turn after the one that was interrupted"


def test_resume_is_exact(backend, text, config_file, tmp_path, capsys):
    """A run stopped by an interrupt after its checkpoint at step 4 ends with the bits of one that was not stopped."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert train(backend.name, text, config_file, whole, "--json") == 0
    expected = json.loads(capsys.readouterr().out)["history"]

    real = mc.training.save_checkpoint

    def save_and_interrupt(*arguments):
        real(*arguments)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mc.training, "save_checkpoint", save_and_interrupt)
        assert train(backend.name, text, config_file, stopped, "--checkpoint-every", "4") == 130
    capsys.readouterr()
    resume = ["train", "--data", str(text), "--out", str(stopped), "--resume", "--backend", backend.name, "--json"]
    assert main(resume) == 0
    assert json.loads(capsys.readouterr().out)["history"] == expected
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (whole / name).read_bytes() == (stopped / name).read_bytes(), name


@pytest.fixture(scope="module")
def untold(tmp_path_factory):
    """Checkpoints that are read only with help: by the option that gives it."""
    config = mc.MambaConfig(d_model=8, n_layer=1, vocab_size=256, d_state=2)
    folders = {name: tmp_path_factory.mktemp("untold") / "out" for name in ("--from", "--compat")}
    mc.save(mc.build(config, backend=installed()[0]), folders["--from"], layout="mambapy")
    (folders["--from"] / "config.json").write_text("{}")
    config = of_architecture(config, "minimamba")
    mc.save(mc.build(config, backend=installed()[0]), folders["--compat"], layout="minimamba")
    return folders


@pytest.mark.parametrize(("option", "value"), [("--from", "mambapy"), ("--compat", "minimamba")])
def test_every_command_that_reads_takes_the_option_that_its_refusal_names(untold, option, value, tmp_path, capsys):
    source, backend = str(untold[option]), installed()[0]
    for command in (
        ["inspect", source],
        ["convert", source, str(tmp_path / "hf"), "--to", "hf"],
        ["generate", source, "x", "--max-new-tokens", "1", "--backend", backend],
        ["parity", source, "--length", "2", "--backends", backend],
    ):
        assert main([*command, "--json"]) == 2, command
        assert option in capsys.readouterr().err
        assert main([*command, option, value, "--json"]) == 0, command
        assert json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND; see mamba-core --help"),
        (["nonsense"], "invalid choice: 'nonsense'"),
        (["inspect"], "the following arguments are required: CHECKPOINT; see mamba-core inspect --help"),
        (["inspect", "nowhere", "--two\nlines"], "unrecognized arguments: --two lines"),
        (["convert", "nowhere", "there", "--to", "abacus"], "argument --to: invalid choice: 'abacus'"),
        (["generate", "nowhere", "x", "--seed", "1.5"], "argument --seed: invalid int value: '1.5'"),
        (["generate", "nowhere", "--json"], "the following arguments are required: PROMPT"),
        (["generate", "nowhere", "x", "--logit-bias", "3"], "argument --logit-bias: '3' is not ID=X"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_status_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("mamba-core: error: ")
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("options", [["--tensors"], ["--json"], ["--help"]])
def test_a_reader_that_leaves_ends_the_command_in_silence(untold, options):
    """As head does: with --tensors rich meets the closed pipe, with the others the last flush."""
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "mamba_core.cli", "inspect", str(untold["--from"]), "--from", "mambapy", *options]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, env=buffered, timeout=300)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "nowhere"], "nowhere: no such file or folder"),
        (["inspect", ""], "no such file or folder"),
        (["convert", "nowhere", "there", "--to", "hf"], "nowhere: no such file or folder"),
        (["generate", "nowhere", "x"], "nowhere: no such file or folder"),
        (["train", "--data", "nowhere", "--out", "out"], "nowhere: no such file or folder"),
        (["demo", "nowhere"], "nowhere: no such file or folder"),
        (["demo", "--backends", "abacus"], "no backend 'abacus'"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not os.listdir(tmp_path), "nothing is left behind"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-new-tokens", "-1"], "max_new_tokens is -1"),
        (["--temperature", "-0.5"], "temperature is -0.5"),
        (["--temperature", "nan"], "temperature is nan"),
        (["--top-p", "1.5"], "top_p is 1.5"),
        (["--top-k", "-3"], "top_k is -3"),
        (["--kernels", "nonsense"], "no kernel 'nonsense'"),
        (["--stop", ""], "empty text"),
        (["--seed", "-1"], "seed is -1; expected at least 0"),
        (["-n", "0"], "n is 0; expected at least 1"),
        (["--prefill-chunk", "0"], "prefill_chunk is 0; expected at least 1"),
        (["--logit-bias", "256=1"], "logit_bias holds token 256; vocab_size is 256"),
        (["--logit-bias", "3=nan"], "logit_bias of token 3 is nan"),
        (["--presence-penalty", "inf"], "presence_penalty is inf"),
    ],
)
def test_bad_settings_of_generate(checkpoint, backend, options, message, capsys):
    assert main(["generate", str(checkpoint), "x", "--backend", backend.name, *options]) == 2
    assert message in capsys.readouterr().err


def test_train_does_not_overwrite_a_run(backend, text, config_file, checkpoint, capsys):
    assert train(backend.name, text, config_file, checkpoint) == 2
    assert "--resume" in capsys.readouterr().err
    resume = ["train", "--data", str(text), "--out", str(checkpoint), "--resume", "--learning-rate", "1"]
    assert main(resume) == 2
    assert "a run resumes as is" in capsys.readouterr().err


def test_demo(backend, text, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["demo", str(text), "--steps", "2", "--new-tokens", "5", "--out", str(out), "--backends", backend.name]
    assert main([*arguments, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((out / "report.json").read_text())
    assert report["conversion_exact"] is True
    assert report["backends"][backend.name]["passed"] is True
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_demo_leaves_what_is_not_its_own(text, tmp_path, capsys):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "thesis.txt").write_text("precious")
    assert main(["demo", str(text), "--steps", "1", "--new-tokens", "1", "--out", str(tmp_path)]) == 2
    assert "holds something else than a demo's results" in capsys.readouterr().err
    assert (tmp_path / "model" / "thesis.txt").read_text() == "precious"


def test_demo_fails_when_a_backend_is_wrong(backend, text, tmp_path, monkeypatch, capsys):
    from mamba_core.cli import demo

    real = demo._continue

    def wrong(name, *arguments):
        result = real(name, *arguments)
        return result | {"tokens": [*result["tokens"][:-1], -1]} if name == "jax" else result

    monkeypatch.setattr(demo, "_continue", wrong)
    monkeypatch.setattr(demo, "_converts_exactly", lambda *arguments: False)
    arguments = ["demo", str(text), "--steps", "1", "--new-tokens", "3", "--out", str(tmp_path / "out"), "--backends"]
    assert main([*arguments, f"{backend.name},jax" if backend.name != "jax" else "torch,jax"]) == 1
    shown = capsys.readouterr().out
    assert "other tokens" in shown
    assert "changed bits" in shown
