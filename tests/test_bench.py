"""
bench.py: that it measures what it says. CPU; times themselves are not tested.

    pytest tests/test_bench.py
"""
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from dev import bench
from model import Config, Transformer, flops
from objectives import OBJECTIVES, Draw, Options
from train import to_device

ROOT = Path(__file__).parents[1]
SMALL = ["--n_layer", "1", "--n_head", "2", "--n_embd", "16", "--block_size", "16", "--batch_size", "2",
         "--batch_tokens", "64", "--vocab_size", "100", "--repeats", "2", "--compile", "off",
         "--device", "cpu"]


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(bench, "ceilings",
                        lambda device, dtypes: {str(d)[6:]: 1e9 for d in dtypes} | {"copy": 1e9})


def test_functions_take_turns():
    calls = []
    times = bench.seconds({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")},
                          repeats=4, warmup=1)
    assert calls == ["a", "a", "b", "b"] * 5
    assert all(t.shape == (4,) and (t >= 0).all() for t in times.values())


def test_of_several_functions_the_second_call_of_a_turn_counts():
    """A function that is slow whenever another one was called before it is not charged for that."""
    last = []

    def f(name):
        time.sleep(0.05 * (last[-1:] != [name]))
        last.append(name)

    times = bench.seconds({"a": lambda: f("a"), "b": lambda: f("b")}, repeats=3, warmup=0)
    assert max(map(np.median, times.values())) < 0.03
    assert bench.seconds({"a": lambda: f("a")}, repeats=1, warmup=0)["a"] > 0.05


def test_median_and_quartiles():
    assert bench.median(np.array([5, 1, 2, 3, 4]) / 1e3) == {"ms": 3, "quartiles": [2, 4]}


def test_ceiling_is_operations_over_time(monkeypatch):
    """A product of 2048 x 2048 matrices that takes 1 s is 2 * 2048^3 FLOP/s;
    a copy reads and writes 256 MiB.
    """
    monkeypatch.setattr(bench, "seconds", lambda functions, *rest: {name: np.ones(3) for name in functions})
    assert bench.ceilings("cpu", [torch.float32]) == {"float32": 2 * 2048 ** 3, "copy": 2 * 2 ** 28}


@pytest.mark.parametrize("sizes", [[1], [3, 1], [1, 2, 4]])
def test_peak_memory_of_known_allocations(sizes):
    """Buffers of these sizes in MiB, all alive at once; and one after the other."""
    def together():
        return [torch.zeros(n * 2 ** 18) for n in sizes]

    def one_by_one():
        for n in sizes:
            torch.zeros(n * 2 ** 18)

    assert bench.peak_memory(together, "cpu") == pytest.approx(sum(sizes) * 2 ** 20, rel=0.01)
    assert bench.peak_memory(one_by_one, "cpu") == pytest.approx(max(sizes) * 2 ** 20, rel=0.01)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_plain_version_has_the_same_loss_and_gradient(objective):
    options = Options(objective=objective, block_size=16, vocab_size=50, dar_estimator="expectation")
    model = Transformer(Config(50, 16, 2, 2, 16, causal=OBJECTIVES[objective].causal))
    x = np.random.default_rng(0).integers(50, size=(4, 18))
    batch = to_device(OBJECTIVES[objective].batch(x, Draw(0, 0, range(4)), options), "cpu")
    every = bench.every_position(batch, 64)
    assert every[1].tolist() == list(range(64)) and every[3].sum() == batch[3].sum()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    losses = [model(*batch), bench.plain_loss(model, *every)]
    gradients = [torch.autograd.grad(loss, list(model.parameters())) for loss in losses]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_plain_step_is_float32_eager_and_scores_every_position():
    args = bench.build_parser().parse_args([*SMALL, "--dtype", "bfloat16", "--compile", "on"])
    args.objective, args.overwrite = "mlm", True
    bench.flags.complete(args)
    step = bench.make_step(args, [np.arange(100)], plain=True)["step"]
    loss, _, batches, *_ = step.args
    assert loss.func is bench.plain_loss and loss.args[0].dtype == torch.float32
    assert [batch[1].tolist() for batch in batches] == [list(range(32))] * 2


def test_a_plain_step_that_does_not_fit_is_left_out(monkeypatch):
    def make_step(*rest, **named):
        raise torch.OutOfMemoryError("a GPU of another size")

    monkeypatch.setattr(bench, "make_step", make_step)
    assert bench.start_plain(None, None) is False and bench.PLAIN == {}
    numbers = {"ms": 1.0, "quartiles": [1.0, 1.0], "tokens_per_second": 1.0, "flops_per_second": 1.0,
               "of_ceiling": 1.0, "floor_ms": 1.0, "peak_memory": 0, "load_ms": 0.0}
    assert bench.step_table({"ar": numbers}).split()[-3:] == ["-", "-", "-"]


def test_every_number_follows_from_the_times(quick, capsys):
    result = bench.run(bench.build_parser().parse_args(["--parts", "step", *SMALL]))
    steps = result["parts"]["step"]
    assert list(steps) == list(OBJECTIVES)
    for name, r in steps.items():
        seconds = r["ms"] / 1e3
        config = Config(100, 16, 1, 2, 16, causal=OBJECTIVES[name].causal)
        needed = flops(config, 4, 16, r["scored"])
        assert r["tokens_per_second"] == pytest.approx(64 / seconds)
        assert (r["of_ceiling"] == pytest.approx(needed / seconds / 1e9)
                and r["floor_ms"] == pytest.approx(needed / 1e6))
        assert r["times_plain"] == pytest.approx(r["plain"]["ms"] / r["ms"]) and r["peak_memory"] > 0
    assert (steps["ar"]["scored"] == steps["dar"]["scored"] == 64
            and steps["mlm"]["scored"] == 4 * round(.15 * 16))
    printed = capsys.readouterr().out
    assert all(f"{r['tokens_per_second']:.0f}" in printed for r in steps.values())


def test_comparison_is_new_over_old():
    old = {"ceilings": {"float32": 100.0}, "parts": {"step": {"ar": {"tokens_per_second": 50.0, "ms": 3.0}}}}
    new = {"ceilings": {"float32": 100.0}, "parts": {"step": {"ar": {"tokens_per_second": 75.0, "ms": 2.0},
                                                              "vlm": {"tokens_per_second": 1.0}}}}
    lines = bench.comparison(old, new).splitlines()
    assert [line.split()[-1] for line in lines] == ["1.00", "1.50"] and "parts step ar" in lines[1]
    with pytest.raises(ValueError):
        bench.comparison({}, new)


@pytest.mark.slow
def test_json_and_compare_as_a_user_runs_them(tmp_path):
    command = [sys.executable, str(ROOT / "dev" / "bench.py"), *SMALL, "--objective", "vlm", "--json", "b.json"]
    first = subprocess.run([*command, "--parts", "step", "score", "sample"], cwd=tmp_path,
                           capture_output=True, text=True)
    assert first.returncode == 0, first.stderr
    saved = json.loads((tmp_path / "b.json").read_text())
    assert set(saved["parts"]) == {"step", "score", "sample"} and saved["flags"]["n_embd"] == 16
    again = subprocess.run([*command, "--parts", "step", "--no_plain", "--compare", "b.json"], cwd=tmp_path,
                           capture_output=True, text=True)
    assert again.returncode == 0 and "parts step vlm tokens_per_second" in again.stdout
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b.json"]


def test_other_flags_do_not_compare():
    bench.check_same({"n_layer": 1, "seed": 0}, {"n_layer": 1, "seed": 1})
    with pytest.raises(ValueError, match="n_layer 2"):
        bench.check_same({"n_layer": 2}, {"n_layer": 1})


@pytest.mark.parametrize("flags", [["--repeats", "0"], ["--compare", "nowhere.json"], ["--n_embd", "17"],
                                   ["--batch_tokens", "65"], ["--vocab_size", "0"], ["--device", "cuda:77"]])
def test_bad_flags_are_one_line(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        bench.main([*SMALL, *flags])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
