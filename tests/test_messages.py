"""
What every script says when something is wrong or is stopped: one line, and the exit code. CPU, no network.

    python -m pytest tests/test_messages.py
"""
import importlib

import pytest

# -----------------------------------------------------------------------------
# Ctrl-C

# Each script, a function that its main calls, and flags that it needs
SCRIPTS = [("sample", "run", ["--checkpoint", "x"]), ("eval_ppl", "run", ["--checkpoint", "x"]),
           ("eval_glue", "run", ["--checkpoint", "x"]), ("spectrum", "pick_device", []), ("data", "prepare", []),
           ("cooccurrence", "check", []), ("report", "read", ["x"]), ("dev.bench", "run", []),
           ("dev.overlap", "print_overlap", []), ("dev.student_copy", "make_copy", ["x"])]


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
