"""
The course's grader: what pytest does beyond running the tests.

    python -m pytest -m exercise1       # one exercise; the last line is its first failure in words
    python -m pytest --exercises        # all of them, as a table of points

The tests of exercise N have the marker exerciseN and stand in the order in which a student should see them.
A body that is still `raise NotImplementedError("exercise 2: dar, ...")` fails the exercise's own tests as
"not yet written". Other tests that need it are skipped with the reason. Code that cannot be imported ends the
grader with one line that says where and why, and an endless loop fails its test.
"""
import os
import re
import signal
import sys
import traceback
from collections import Counter
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import pytest

# Before numpy and torch are imported. On a busy machine the threads of OpenBLAS wait for each other, and a
# fit of two seconds takes minutes
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parents[1]
POINTS = 10             # per exercise, in proportion to the tests that pass
GRACE = 2               # seconds for code that ran too long to fail as it should
GRADED = pytest.StashKey()


def pytest_addoption(parser):
    parser.addoption("--exercises", action="store_true",
                     help="run the tests of the exercises only, and print a table of points")
    parser.addoption("--time_limit", type=int, default=120, metavar="SECONDS",
                     help="after which a test of an exercise fails (default: 120; not on Windows)")


def pytest_configure(config):
    config.stash[GRADED] = {}               # exercise -> list of (test, failure in words or None)
    if config.option.exercises:
        config.option.tbstyle = "no"        # the table says what failed
        config.option.reportchars = ""


def exercise(item):
    """The number of the exercise that a test belongs to, or None."""
    for mark in item.iter_markers():
        match = re.fullmatch(r"exercise(\d+)", mark.name)
        if match:
            return int(match[1])


def pytest_collection_modifyitems(config, items):
    if config.option.exercises:
        others = [item for item in items if not exercise(item)]
        items[:] = [item for item in items if exercise(item)]
        config.hook.pytest_deselected(items=others)


# -----------------------------------------------------------------------------
# Code that cannot be imported, code that does not end

def place(frames):
    """"line 80 of objectives.py", the last of the stack's frames that is in our code, or None."""
    ours = [frame for frame in frames if Path(frame.filename).parent in (ROOT, ROOT / "tests")]
    return f"line {ours[-1].lineno} of {Path(ours[-1].filename).name}" if ours else None


def pytest_exception_interact(call, report):
    """A test file that cannot be imported ends pytest with one line, instead of a traceback per test file."""
    if not isinstance(report, pytest.CollectReport):
        return
    error = call.excinfo.value
    if isinstance(error, pytest.Collector.CollectError):
        error = error.__cause__

    # Where is it, and what does Python say?
    if isinstance(error, pytest.fail.Exception):
        raise pytest.UsageError(error.msg)
    if isinstance(error, SyntaxError) and error.filename:
        where = f"line {error.lineno} of {Path(error.filename).name}"
        words = error.msg
    elif error is not None:
        where = place(traceback.extract_tb(error.__traceback__))
        words = str(error)
    if error is not None and where:
        first = words.split("\n")[0]
        raise pytest.UsageError(f"{where}: {type(error).__name__}: {first}")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_call(item):
    """A test of an exercise that runs for too long fails."""
    if exercise(item):
        with time_limit(item.config, item.name):
            yield
    else:
        yield


@pytest.hookimpl(hookwrapper=True)
def pytest_make_collect_report(collector):
    """A test file whose import runs for too long ends pytest."""
    if isinstance(collector, pytest.Module):
        with time_limit(collector.config, f"the import of {collector.path.name}"):
            yield
    else:
        yield


@contextmanager
def time_limit(config, name):
    """Fails after --time_limit seconds, where the system has an alarm (not on Windows).

    Code that catches that too ends the whole process, `GRACE` seconds later.
    """
    if not hasattr(signal, "SIGALRM"):
        yield
        return
    limit = config.option.time_limit
    alarms = []

    def too_long(number, frame):
        alarms.append(number)
        where = place(traceback.extract_stack(frame))
        words = f"{name} ran for {limit} s: an endless loop, or a slow one? ({where})"
        if len(alarms) == 1:
            signal.alarm(GRACE)
            pytest.fail(words, pytrace=False)
        # It was caught
        config.pluginmanager.getplugin("capturemanager").suspend_global_capture(in_=True)
        print(f"ERROR: {words} It catches every exception, so the grader ends here", file=sys.__stderr__, flush=True)
        os._exit(pytest.ExitCode.USAGE_ERROR)

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(limit)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# -----------------------------------------------------------------------------
# What is not yet written

def unwritten(report, call):
    """What a failed test says about a body that is not yet written, or None."""
    error = call.excinfo.value
    if isinstance(error, SystemExit):                       # a script makes one line of it, and exits
        error = error.__context__
    if isinstance(error, NotImplementedError):
        return str(error) or "NotImplementedError"
    # A script that ran in a process of its own
    match = re.search(r"[Ee]rror: (exercise \d.*)", report.longreprtext)
    if match:
        return match[1]
    # The same, where the test did not keep what the script said
    blank = blank_bodies()
    source = (ROOT / report.fspath).read_text(encoding="utf-8")             # a test may be in another folder
    return blank[0] if blank and "subprocess" in report.longreprtext + source else None


@lru_cache
def blank_bodies():
    """What the bodies that are not yet written say, from the source: ["exercise 2: dar, ...", ...]."""
    sources = [path.read_text() for path in sorted(ROOT.glob("*.py"))]
    return re.findall(r'raise NotImplementedError\("(exercise \d[^"]*)"\)', "\n".join(sources))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    report = outcome.get_result()
    number = exercise(item)
    missing = unwritten(report, call) if report.failed else None

    # A body that is not yet written. The table says of which exercise, if it is this one
    if missing and number:
        own = missing.removeprefix(f"exercise {number}: ")
        report.longrepr = f"not yet written: {own}"
    elif missing and missing.startswith("exercise") and blank_bodies():
        report.outcome = "skipped"
        report.longrepr = (str(item.path), item.location[1] or 0, f"Skipped: needs {missing}")

    # What the table and the last line say. A test is graded once, whichever of its phases fails
    if number and not report.skipped and (report.when == "call" or report.failed):
        words = in_words(report) if report.failed else None
        item.config.stash[GRADED].setdefault(number, []).append((item.nodeid, words))


# -----------------------------------------------------------------------------
# The table

def in_words(report):
    """The last line of a failure, without the path and pytest's decoration."""
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash else report.longreprtext
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    first = lines[0] if crash else lines[-1]
    return first.removeprefix("Failed: ").removeprefix("AssertionError: ")


def score(results):
    """(passed, failed, points) of one exercise."""
    failed = len({test for test, words in results if words})
    passed = len({test for test, words in results}) - failed
    return passed, failed, POINTS * passed // (passed + failed)


def titles(config):
    """{1: "the autoregressive objective, ar", ...}, from pytest.ini."""
    lines = [re.fullmatch(r"exercise(\d+): (.*)", line) for line in config.getini("markers")]
    return {int(line[1]): line[2] for line in lines if line}


def table(config):
    """The lines of the table: one per exercise, and the sum."""
    title, total = titles(config), Counter()
    lines = [f"{'exercise':<58}{'passed':>8}{'failed':>8}{'points':>10}"]
    for number, results in sorted(config.stash[GRADED].items()):
        passed, failed, points = score(results)
        total.update(points=points, most=POINTS)
        name = f"{number}  {title.get(number, '')}"
        lines.append(f"{name:<58}{passed:>8}{failed:>8}{points:>5} / {POINTS}")
    lines.append(f"{'in all':<74}{total['points']:>5} / {total['most']}")
    return lines


def first_failures(config):
    """One line per exercise: its first failure in words, or that all is well."""
    for number, results in sorted(config.stash[GRADED].items()):
        failures = [words for test, words in results if words]
        yield f"exercise {number}: {failures[0] if failures else f'all {len(results)} tests pass'}"


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config):
    """After pytest's own last line."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    one_exercise = config.option.markexpr.startswith("exercise")
    if reporter is None or not config.stash.get(GRADED, None):
        return
    if config.option.exercises:
        reporter.write_line("")
        for line in table(config):
            reporter.write_line(line)
    if config.option.exercises or one_exercise:
        reporter.write_line("")
        for line in first_failures(config):
            reporter.write_line(line)
