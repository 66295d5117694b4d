"""
Every command, file and flag that the README names exists:
commands are parsed by the scripts' own parsers. And the patch that it applies does what it says.
"""
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```sh\n(.*?)^```", README, flags=re.M | re.S)
LINES = [line.split(" #")[0].strip() for block in BLOCKS for line in block.replace("\\\n", " ").splitlines()]
COMMANDS = [line for line in LINES if re.search(r"\b[a-z_]+\.py\b", line)]
DOCSTRINGS = [line.split(" #")[0].strip() for path in sorted(ROOT.glob("*.py"))
              for line in path.read_text().split('"""')[1].replace("\\\n", " ").splitlines()
              if re.match(r"    (python|torchrun) (?!-m).*\.py", line) and "|" not in line]


@pytest.mark.parametrize("command", sorted(set(COMMANDS + DOCSTRINGS)))
def test_command_is_accepted_by_its_script(command):
    words = shlex.split(command)
    at = next(i for i, word in enumerate(words) if word.endswith(".py"))
    name = words[at].removesuffix(".py")
    script = importlib.import_module("flags" if name == "train" else name.replace("/", "."))
    if "--help" not in words:
        script.build_parser().parse_args(words[at + 1:])    # exits, and so fails, on a flag that is not there


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target


def test_files_named_exist():
    for name in set(re.findall(r"\b([a-z_]+\.py)\b", README)):
        assert any((ROOT / folder / name).exists() for folder in ("", "tests", "dev")), name


def test_flags_named_in_prose_exist():
    """Every `--flag` in the text belongs to some script (or to pytest, torchrun, pip)."""
    known = set()
    for path in [*ROOT.glob("*.py"), *ROOT.glob("dev/*.py")]:
        known |= (set(re.findall(r'"(--[a-z_]+)"', path.read_text()))
                  | {f"--{n}" for n in re.findall(r'\("([a-z_]+)", "', path.read_text())})
    foreign = {"--help", "--standalone", "--nproc_per_node", "--nnodes", "--rdzv_backend", "--rdzv_endpoint"}
    assert set(re.findall(r"(?<!-)--[a-z_]+", README)) - foreign <= known


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_the_patch_makes_nanogpts_model(tmp_path):
    """results/nanogpt.patch applies, and what comes out computes what GPT-2 does, without biases."""
    shutil.copy(ROOT / "model.py", tmp_path)
    subprocess.run(["git", "apply", str(ROOT / "results" / "nanogpt.patch")], cwd=tmp_path, check=True)
    code = """
import torch, torch.nn.functional as F
from model import Config, Transformer
model = Transformer(Config(100, 8, 2, 2, 16, causal=True)).double()
model.dtype = torch.float64
p, ids = dict(model.named_parameters()), torch.randint(100, (3, 6))
ln = lambda x: (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
x = p["wte.weight"][ids] + p["wpe.weight"][:6]
for i in range(2):
    q, k, v = [t.view(3, 6, 2, 8).transpose(1, 2)
               for t in (ln(x) @ p[f"blocks.{i}.attn.c_attn.weight"].T).split(16, dim=-1)]
    scores = (q @ k.transpose(2, 3) / 8 ** .5).masked_fill(~torch.ones(6, 6).tril().bool(), -torch.inf)
    y = (scores.softmax(-1) @ v).transpose(1, 2).reshape(3, 6, 16)
    x = x + y @ p[f"blocks.{i}.attn.c_proj.weight"].T
    x = x + F.gelu(ln(x) @ p[f"blocks.{i}.mlp.c_fc.weight"].T) @ p[f"blocks.{i}.mlp.c_proj.weight"].T
torch.testing.assert_close(model.features(ids), ln(x))
assert abs(p["wpe.weight"].std() - 0.02) < 5e-3 and p["blocks.0.mlp.c_proj.weight"].std() < 0.015
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
