"""
Every command, file and flag that README.md and docs/ name exists: commands are parsed by the scripts' own
parsers.
"""
import ast
import importlib
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
TEXT = {page: page.read_text() for page in PAGES}
SCRIPTS = [*sorted(ROOT.glob("*.py")), *sorted(ROOT.glob("dev/*.py"))]


def lines_of(text):
    """Its lines, continued ones joined, without comments."""
    return [line.split(" #")[0].strip() for line in text.replace("\\\n", " ").splitlines()]


def commands():
    """The lines that run a script of ours: in the pages' sh blocks, and in the scripts' docstrings."""
    found = []
    for text in TEXT.values():
        for block in re.findall(r"^```sh\n(.*?)^```", text, flags=re.M | re.S):
            found += [part.strip() for line in lines_of(block) for part in line.split("&&")]
    for path in SCRIPTS:
        docstring = (ast.get_docstring(ast.parse(path.read_text()), clean=False) or "").replace("\\\n", " ")
        found += lines_of("\n".join(re.findall(r"^    ((?:python|torchrun) .*)", docstring, flags=re.M)))
    ours = [line for line in found if re.search(r"\b[a-z_]+\.py\b", line) and "|" not in line]
    return sorted({line for line in ours if not line.startswith("python -m ")})


@pytest.mark.parametrize("command", commands())
def test_command_is_accepted_by_its_script(command):
    words = shlex.split(command)
    at = next(i for i, word in enumerate(words) if word.endswith(".py"))
    name = words[at].removesuffix(".py").replace("/", ".")
    script = importlib.import_module("flags" if name == "train" else name)
    if "--help" not in words:
        script.build_parser().parse_args(words[at + 1:])    # exits, and so fails, on an unknown flag


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", TEXT[page]):
        assert target.startswith("http") or (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_named_exist(page):
    for name in set(re.findall(r"\b([a-z_]+\.py)\b", TEXT[page])):
        assert any((ROOT / folder / name).exists() for folder in ("", "tests", "dev")), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_flags_named_in_prose_exist(page):
    """Every `--flag` in the text belongs to some script (or to pytest, torchrun, pip)."""
    known = {"--help", "--standalone", "--nproc_per_node", "--nnodes", "--rdzv_backend", "--rdzv_endpoint",
             "--tb", "--time_limit"}
    for path in SCRIPTS:
        text = path.read_text()
        known |= set(re.findall(r'"(--[a-z_]+)"', text))
        known |= {f"--{name}" for name in re.findall(r'\("([a-z_]+)", "', text)}
    assert set(re.findall(r"(?<!-)--[a-z_]+", TEXT[page])) <= known
