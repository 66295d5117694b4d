"""
Every command, file and flag that the README names exists:
commands are parsed by the scripts' own parsers.
"""
import importlib
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```sh\n(.*?)^```", README, flags=re.M | re.S)
LINES = [line.split(" #")[0].strip() for block in BLOCKS for line in block.replace("\\\n", " ").splitlines()]
COMMANDS = [line for line in LINES if re.search(r"\b[a-z_]+\.py\b", line)]
DOCSTRINGS = [line.split(" #")[0].strip() for path in sorted(ROOT.glob("*.py"))
              for line in path.read_text().split('"""')[1].replace("\\\n", " ").splitlines()
              if re.match(r"    (python|torchrun) .*\.py", line) and "|" not in line]


@pytest.mark.parametrize("command", sorted(set(COMMANDS + DOCSTRINGS)))
def test_command_is_accepted_by_its_script(command):
    words = shlex.split(command)
    at = next(i for i, word in enumerate(words) if word.endswith(".py"))
    name = words[at].removesuffix(".py")
    script = importlib.import_module("flags" if name == "train" else name)
    if "--help" not in words:
        script.build_parser().parse_args(words[at + 1:])    # exits, and so fails, on a flag that is not there


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target


def test_files_named_exist():
    for name in set(re.findall(r"\b([a-z_]+\.py)\b", README)):
        assert (ROOT / name).exists() or (ROOT / "tests" / name).exists(), name


def test_flags_named_in_prose_exist():
    """Every `--flag` in the text belongs to some script (or to pytest, torchrun, pip)."""
    known = set()
    for path in ROOT.glob("*.py"):
        known |= (set(re.findall(r'"(--[a-z_]+)"', path.read_text()))
                  | {f"--{n}" for n in re.findall(r'\("([a-z_]+)", "', path.read_text())})
    foreign = {"--help", "--standalone", "--nproc_per_node", "--nnodes", "--rdzv_backend", "--rdzv_endpoint"}
    assert set(re.findall(r"(?<!-)--[a-z_]+", README)) - foreign <= known
