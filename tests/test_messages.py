"""
What every script says when something is wrong or is stopped: one line, and the exit code. CPU, no network.

    python -m pytest tests/test_messages.py
"""
import importlib

import numpy as np
import pytest

from common import save_checkpoint, save_config
from model import Config, Transformer
from tokenizer import save_tokenizer

# -----------------------------------------------------------------------------
# Ctrl-C

# Each script, a function that its main calls, and flags that it needs
SCRIPTS = [("sample", "run", ["--checkpoint", "x"]), ("eval_ppl", "run", ["--checkpoint", "x"]),
           ("eval_glue", "run", ["--checkpoint", "x"]), ("spectrum", "pick_device", []), ("data", "prepare", []),
           ("cooccurrence", "check", []), ("report", "read", ["x"]), ("dev.bench", "run", []),
           ("dev.overlap", "print_overlap", [])]


def stopped(capsys, script, *flags):
    """(exit code, what stands on stderr) of the main function of a script."""
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(script).main([*map(str, flags)])
    return stop.value.code, capsys.readouterr().err


def interrupt(*args, **kwargs):
    raise KeyboardInterrupt


@pytest.mark.parametrize("script, function, flags", SCRIPTS)
def test_ctrl_c_is_one_line(monkeypatch, capsys, script, function, flags):
    monkeypatch.setattr(importlib.import_module(script), function, interrupt)
    assert stopped(capsys, script, *flags) == (130, "interrupted\n")


def test_ctrl_c_in_a_comparison_says_how_to_resume(monkeypatch, capsys):
    monkeypatch.setattr(importlib.import_module("compare"), "compare", interrupt)
    code, error = stopped(capsys, "compare")
    assert code == 130 and error == "stopped; run the same command again to resume\n"

# -----------------------------------------------------------------------------
# Wrong flags and damaged checkpoints

@pytest.mark.parametrize("flags, message", [
    ("--colour 1", "unrecognized arguments: --colour 1 (--help lists all flags)"),
    ("--max_iter 1", "unrecognized arguments: --max_iter 1"), ("--lookahead x", "argument --lookahead: invalid int value"),
    ("--learning_rate nan", "learning_rate must be a number of at least 0, not nan\n"),
    ("--muon_lr inf", "muon_lr must be a number of at least 0, not inf\n"),
    ("--seed -1", "seed must be a number of at least 0, not -1\n"),
    (f"--seed {2**64}", "seed must be less than 2**63"),
    ("--min_lr_fraction nan", "min_lr_fraction must be in [0, 1], not nan\n")])
def test_a_wrong_flag_is_one_line(capsys, flags, message):
    """All flags are worth a look where a name is wrong, but not where a value is."""
    code, error = stopped(capsys, "train", *flags.split())
    assert code == 2 and error.count("\n") == 1 and error.startswith("error: ") and message in error
    assert ("--help" in error) == (message.startswith("unrecognized"))


def test_a_missing_flag_is_one_line(capsys):
    code, error = stopped(capsys, "eval_glue")
    assert code == 2 and error == ("error: the following arguments are required: --checkpoint "
                                   "(--help lists all flags)\n")


@pytest.mark.parametrize("script, flags", [("sample", []), ("eval_ppl", ["--text", __file__])])
@pytest.mark.parametrize("name, content, message", [
    ("ckpt.pt", b"text", "ckpt.pt cannot be read: it is no checkpoint"),
    ("ckpt.pt", None, "ckpt.pt cannot be read: it is no checkpoint"),               # half of it
    ("config.json", b"[1]", "config.json cannot be read: it says nothing of a model"),
    ("config.json", b'{"mod', "config.json cannot be read: "),
    ("tokenizer.json", b'{"name', "tokenizer.json is damaged (JSONDecodeError). Copy it again")])
def test_a_damaged_checkpoint_is_one_line(tmp_path, capsys, script, flags, name, content, message):
    model = Transformer(Config(257, 16, 1, 2, 16))
    save_config(tmp_path, model.config, train={})
    save_checkpoint(tmp_path, model, [], 1)
    save_tokenizer({"name": "bytes"}, tmp_path)
    np.save(tmp_path / "unigram.npy", np.ones(257, dtype=np.int64))
    path = tmp_path / name
    whole = path.read_bytes()
    path.write_bytes(whole[:len(whole) // 2] if content is None else content)
    code, error = stopped(capsys, script, "--checkpoint", tmp_path, *flags)
    assert code == 2 and error.count("\n") == 1 and f"error: {tmp_path / message}" in error


@pytest.mark.parametrize("script, flags", [("sample", []), ("eval_ppl", ["--text", __file__]),
                                           ("eval_glue", ["--tasks", "stdlib-pair"])])
def test_the_tokenizer_of_another_model_is_one_line(tmp_path, capsys, script, flags):
    model = Transformer(Config(300, 16, 1, 2, 16))
    save_config(tmp_path, model.config, train={})
    save_checkpoint(tmp_path, model, [], 1)
    save_tokenizer({"name": "bytes"}, tmp_path)
    np.save(tmp_path / "unigram.npy", np.ones(300, dtype=np.int64))
    code, error = stopped(capsys, script, "--checkpoint", tmp_path, *flags)
    assert code == 2 and error == (f"error: {tmp_path}/tokenizer.json is not the one of this training: "
                                   "it has 257 tokens, not 300\n")


@pytest.mark.parametrize("train", [{}, {"objective": "vlm"}])
def test_a_run_that_does_not_say_how_it_was_trained_is_not_resumed(tmp_path, capsys, train):
    model = Transformer(Config(257, 16, 1, 2, 16))
    save_config(tmp_path, model.config, train=train)
    save_checkpoint(tmp_path, model, [], 1)
    code, error = stopped(capsys, "train", "--resume", "--out_dir", tmp_path)
    assert code == 2 and error == (f"error: {tmp_path} cannot be resumed: its config.json holds no flags of "
                                   "train.py\n")
