"""
Every number of our own in README.md and docs/ comes from results/, by the command beside it.

A section (from one heading to the next) that names a `python report.py FILE ...` command, in an sh block or a comment, may
only hold tables and numbers that this command prints. README's findings may hold what any of them prints.
"""
import contextlib
import io
import json
import re
import shlex
from pathlib import Path

import pytest

import report

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), ROOT / "dev/LOG.md"]
COMMAND = r"^(?:<!-- )?python report\.py (results/.*?)(?:\s+#.*| -->)?$"


def sections():
    """[(page and heading, text), ...] of the sections with a report.py command."""
    found = []
    for page in PAGES:
        for text in re.split(r"^(?=##+ )", page.read_text(encoding="utf-8").replace("\\\n", " "), flags=re.M):
            if re.search(COMMAND, text, flags=re.M):
                found.append((f"{page.name}: {text.splitlines()[0].strip('# ')}", text))
    return found


def cells(line):
    return tuple(cell.strip() for cell in line.strip().strip("|").split("|"))


def table_rows(text):
    """The rows of all Markdown tables in a text, tuples of cells, without the rules."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [cells(line) for line in lines if set(line) - set("|-: ")]


@pytest.fixture(scope="module")
def printed():
    """printed(text) -> what the report.py commands in the text print, each run once, each bootstrap too."""
    outputs = {}
    resampled = {}

    def once(resample):
        def found(*contents):
            key = json.dumps(contents)
            if key not in resampled:
                resampled[key] = resample(*contents)
            return resampled[key]
        return found

    def run(text):
        for command in re.findall(COMMAND, text, flags=re.M):
            if command not in outputs:
                out = io.StringIO()
                words = shlex.split(command)
                words = [str(ROOT / word) if word.startswith("results/") else word for word in words]
                for flag in ("--plot", "--curves", "--budgets"):    # figures are not drawn again
                    if flag in words:
                        at = words.index(flag)
                        del words[at:at + 2]
                with contextlib.redirect_stdout(out):
                    report.main(words)
                outputs[command] = out.getvalue()
        return "\n".join(outputs[command] for command in re.findall(COMMAND, text, flags=re.M))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "resample_perplexity", once(report.resample_perplexity))
        patch.setattr(report, "resample_probe", once(report.resample_probe))
        yield run


def numbers(text):
    """The numbers of a text that claim something: with a decimal point, in percent, or "N times"."""
    text = re.sub(r"`[^`]*`|\[[^\]]*\]\([^)]*\)|```.*?```", " ", text, flags=re.S)      # code and links
    text = re.sub(r"\barXiv \S+|\btorch [\d.]+|\bTheorem [\d.]+", " ", text)
    return set(re.findall(r"\d+\.\d+|\d+(?= %)|\d+(?= times)", text))


def readings(output):
    """Numbers that may be quoted from tables: as printed, rounded, and a ratio as a change in percent."""
    allowed = set()
    for number in re.findall(r"\d+(?:\.\d+)?", output):
        value = float(number)
        digits = len(number.partition(".")[2])
        for places in range(digits + 1):
            allowed.add(f"{value:.{places}f}")
        if digits == 3:                                                 # a ratio
            allowed |= {f"{abs(1 - value) * 100:.0f}"}
    return allowed


@pytest.mark.slow
@pytest.mark.parametrize("text", [pytest.param(text, id=name) for name, text in sections()])
def test_tables_and_numbers_are_those_of_the_command_beside_them(text, printed):
    output = printed(text)
    known = {tuple(cell.replace("\\|", "|") for cell in row) for row in table_rows(output)}
    for row in table_rows(text):
        assert row in known, f"no command here prints the row {' | '.join(row)}"
    prose = "\n".join(line for line in text.splitlines() if not line.startswith("|"))
    unknown = numbers(prose) - readings(output)
    assert not unknown, f"no command here prints {', '.join(sorted(unknown))}"


@pytest.mark.slow
def test_the_findings_in_the_readme_are_printed_somewhere(printed):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    [found] = re.findall(r"^## What we found\n(.*?)^## ", text, flags=re.M | re.S)
    everything = "\n".join(printed(section) for _, section in sections())
    unknown = numbers(found) - readings(everything)
    assert not unknown, f"no report.py command of the docs prints {', '.join(sorted(unknown))}"


def section(page, heading):
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.search(rf"^## {heading}.*?(?=^## |\Z)", text, flags=re.M | re.S)[0]


@pytest.mark.slow
def test_the_verdicts_are_printed_somewhere(printed):
    everything = "\n".join(printed(text) for _, text in sections())
    for row in table_rows(section("docs/RESULTS.md", "Verdicts"))[1:]:
        unknown = numbers(" ".join(row[1:])) - readings(everything)
        assert not unknown, f"{row[0]}: no report.py command of the docs prints {', '.join(sorted(unknown))}"


def test_there_are_such_sections():
    assert len(sections()) >= 3


def test_results_name_their_commit_and_no_machine():
    for path in ROOT.glob("results/*.json"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r'"/(home|work|root|tmp|Users)/', text), f"{path.name} holds a path of a machine"
        if '"differences"' in text:
            assert re.search(r'"commit": ?"[0-9a-f]{40}"', text), f"{path.name} does not name its commit"
