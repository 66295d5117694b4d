"""
compare.py: its table and differences against numbers made up here, and one small run of the real scripts.

    pytest tests/test_compare.py
"""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import compare

ROOT = Path(__file__).parents[1]
RESULTS = {
    "ar": {0: {"perplexity, all": 40.0, "t, accuracy, mean": 50.0,
               "t, accuracy, mean: its input embeddings": 45.0},
           1: {"perplexity, all": 60.0, "t, accuracy, mean": 52.0,
               "t, accuracy, mean: its input embeddings": 44.0}},
    "mlm": {0: {"perplexity, all": 400.0, "perplexity, all, suffix matched": 200.0,
                "t, accuracy, mean": 53.0},
            1: {"perplexity, all": 300.0, "perplexity, all, suffix matched": 200.0,
                "t, accuracy, mean": 59.0}},
    "vlm": {0: {"perplexity, all": 100.0, "t, accuracy, mean": 51.0}, 1: {"perplexity, all": 150.0}}}


def rows(text):
    return {tuple(c.strip() for c in line.split("|")[1:-2]): line.split("|")[-2].strip()
            for line in text.splitlines()}


def test_table_has_mean_least_and_greatest():
    lines = compare.table(RESULTS, ["ar", "mlm", "vlm"]).splitlines()
    assert "| perplexity, all | 50.0 [40.0, 60.0] | 350 [300, 400] | 125 [100, 150] |" in lines
    assert "| perplexity, all, suffix matched | - | 200 [200, 200] | - |" in lines


def test_claims_are_differences_of_runs_with_the_same_seed():
    said = rows(compare.claims(RESULTS))
    assert said["mlm - ar", "t, accuracy, mean, points"] == "5.0 [3.0, 7.0]"
    assert said["vlm - ar", "t, accuracy, mean, points"] == "1.0 [1.0, 1.0]"        # seed 1 has no number
    assert said["mlm / ar", "perplexity, all"] == "7.50 [5.00, 10.00]"
    assert said["vlm / mlm", "perplexity, all"] == "0.38 [0.25, 0.50]"
    assert said["vlm / mlm (suffix matched)", "perplexity, all"] == "0.62 [0.50, 0.75]"
    assert not any("embeddings" in measurement for _, measurement in said)


@pytest.mark.slow
def test_a_small_run_of_all_scripts_goes_on_where_it_stopped(tmp_path):
    for i in range(40):
        (tmp_path / f"{i}.txt").write_text("\n".join(f"line {i * j % 97} of file {i}" for j in range(40)))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, ROOT / "data.py", "--dataset", "toy", "--tokenizer", "bytes",
                    "--val_fraction", "0.2", "--files", *sorted(str(p) for p in tmp_path.glob("*.txt"))],
                   cwd=tmp_path, check=True, env=environment)
    command = [sys.executable, ROOT / "compare.py", "--objectives", "ar", "mlm", "--seeds", "0",
               "--max_iters", "3", "--train",
               "--dataset toy --n_layer 1 --n_embd 32 --n_head 2 --block_size 32 --compile off --device cpu",
               "--eval_ppl", "--val --max_windows 4", "--eval_glue", "--tasks stdlib-pair --max_train 40"]
    first = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert first.returncode == 0, first.stderr
    assert first.stdout.count("python train.py") == 2 and first.stdout.count("--suffix matched") == 1
    saved = json.loads((tmp_path / "out/compare/compare.json").read_text())["results"]
    report = json.loads((tmp_path / "out/compare/mlm-0/eval_ppl_val_left-to-right-matched.json").read_text())
    assert saved["mlm"]["0"]["perplexity, all, suffix matched"] == report["all"]["perplexity"]
    (tmp_path / "out/compare/ar-0/eval_glue.json").unlink()                     # as if stopped here
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert ([line.split()[1] for line in again.stdout.splitlines() if line.startswith("python")]
            == ["eval_glue.py"])
    assert again.stdout.split("\n\n", 1)[1] == first.stdout.split("\n\n", 1)[1], "the table is another"
    changed = subprocess.run([*command, "--max_iters", "4"], cwd=tmp_path, capture_output=True, text=True,
                             env=environment)
    assert changed.returncode == 2 and "other flags" in changed.stderr
    wrong = ["--out_dir", "out/b", "--train", "--dataset toy --n_head 3"]
    failing = subprocess.run([*command, *wrong], cwd=tmp_path, capture_output=True, text=True,
                             env=environment)
    assert failing.returncode == 2 and failing.stderr.startswith("error: ") and "n_head" in failing.stderr
