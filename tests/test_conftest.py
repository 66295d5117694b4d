"""
What the grader says of code that cannot be read or does not end, on a project of two files.

    python -m pytest tests/test_conftest.py
"""
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEST = """
import pytest
from objectives import ar

@pytest.mark.exercise1
def test_ar():
    assert ar() == 1

@pytest.mark.exercise2
def test_dar():
    pass
"""


def grade(folder, source, *arguments):
    """The pytest run of a project whose objectives.py is `source` and whose only test is TEST."""
    (folder / "tests").mkdir()
    shutil.copy(ROOT / "pytest.ini", folder)
    shutil.copy(ROOT / "tests/conftest.py", folder / "tests")
    (folder / "objectives.py").write_bytes(source)
    (folder / "tests/test_objectives.py").write_text(TEST)
    return subprocess.run([sys.executable, "-B", "-m", "pytest", "-p", "no:cacheprovider", *arguments],
                          cwd=folder, capture_output=True, text=True)


@pytest.mark.parametrize("source, words", [
    (b"\ndef ar(:\n    return 1\n", "line 2 of objectives.py: SyntaxError: invalid syntax"),
    (b"def ar():\nreturn 1\n", "line 2 of objectives.py: IndentationError: expected an indented block"),
    (b"x = 1\nx = y\n", "line 2 of objectives.py: NameError: name 'y' is not defined"),
    (b"import no_such_module\n", "line 1 of objectives.py: ModuleNotFoundError: No module named 'no_such_module'"),
    (b"ar2 = 1\n", "line 3 of test_objectives.py: ImportError: cannot import name 'ar'"),
    (b"raise NotImplementedError('later')\n", "line 1 of objectives.py: NotImplementedError: later"),
    (b"x = '\xe9'\n", "objectives.py: SyntaxError: (unicode error) 'utf-8' codec can't decode byte 0xe9"),
    (b"x = 1\0\n", "source code string cannot contain null bytes"),
], ids=["syntax", "indentation", "name", "module", "missing", "unwritten", "encoding", "null"])
def test_code_that_cannot_be_imported_is_one_line(tmp_path, source, words):
    done = grade(tmp_path, source, "--exercises")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    [line] = done.stderr.strip().splitlines()
    assert line.startswith("ERROR: ") and words in line
    assert "Traceback" not in done.stdout and "Error" not in done.stdout


HAS_ALARMS = pytest.mark.skipif(not hasattr(signal, "SIGALRM"), reason="no alarms here")


@HAS_ALARMS
def test_an_endless_loop_fails_and_the_other_tests_run(tmp_path):
    source = b"def ar():\n    while True:\n        x = 1\n"
    done = grade(tmp_path, source, "--exercises", "--time_limit", "1")
    assert done.returncode == 1
    first, second = done.stdout.strip().splitlines()[-2:]
    assert first in [f"exercise 1: test_ar ran for 1 s: an endless loop, or a slow one? (line {n} of objectives.py)" for n in (2, 3)]
    assert second == "exercise 2: all 1 tests pass"


@HAS_ALARMS
def test_an_endless_loop_at_import_is_one_line(tmp_path):
    done = grade(tmp_path, b"while True:\n    x = 1\n", "--exercises", "--time_limit", "1")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    [line] = done.stderr.strip().splitlines()
    assert line in [f"ERROR: the import of test_objectives.py ran for 1 s: an endless loop, or a slow one? (line {n} of objectives.py)"
                    for n in (1, 2)]


@pytest.mark.slow
@HAS_ALARMS
@pytest.mark.parametrize("where, name", [
    ("def ar():\n    ", "test_ar"), ("if True:\n    ", "the import of test_objectives.py")])
def test_an_endless_loop_that_catches_everything_ends_the_grader(tmp_path, where, name):
    loop = "while True:\n        try:\n            sum(range(10**6))\n        except:\n            pass\n"
    done = grade(tmp_path, (where + loop).encode(), "--exercises", "--time_limit", "1")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    [line] = done.stderr.strip().splitlines()
    assert line.startswith(f"ERROR: {name} ran for 1 s: an endless loop, or a slow one? (line ")
    assert line.endswith("It catches every exception, so the grader ends here")


def test_a_test_within_its_time_is_left_alone(tmp_path):
    done = grade(tmp_path, b"def ar():\n    return 1\n", "--exercises")
    assert done.returncode == 0 and "exercise 1: all 1 tests pass" in done.stdout
