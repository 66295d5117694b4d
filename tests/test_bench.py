"""
bench.py: that it measures what it says. CPU; times themselves are not tested.

    python -m pytest tests/test_bench.py
"""
import json
import signal
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


def parse(*flags):
    return bench.build_parser().parse_args([*SMALL, *flags])

# -----------------------------------------------------------------------------
# Measuring

def test_functions_take_turns():
    calls = []
    functions = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    times = bench.seconds(functions, repeats=4, warmup=1)
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


def test_ceiling_is_operations_over_time(monkeypatch):
    """A product of 2048 x 2048 matrices that takes 1 s is 2 * 2048^3 FLOP/s."""
    monkeypatch.setattr(bench, "seconds", lambda functions, *rest: {name: np.ones(3) for name in functions})
    assert bench.ceiling("cpu", torch.float32) == 2 * 2048 ** 3


def test_peak_memory_is_what_a_step_adds(monkeypatch):
    """On a GPU: 100 bytes exist before the step, 130 at its peak. On a CPU it is not known."""
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 100)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 130)
    steps = []
    assert bench.peak_memory(lambda: steps.append(1), "cuda:0") == 30 and steps == [1]
    assert bench.peak_memory(None, "cpu") is None and bench.peak_memory(None, "mps") is None

# -----------------------------------------------------------------------------
# Ours and plain

@pytest.mark.parametrize("objective", OBJECTIVES)
def test_plain_version_has_the_same_loss_and_gradient(objective):
    options = Options(objective=objective, block_size=16, vocab_size=50, dar_estimator="expectation")
    model = Transformer(Config(50, 16, 2, 2, 16, causal=OBJECTIVES[objective].causal))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)

    x = np.random.default_rng(0).integers(50, size=(4, 18))
    batch = to_device(OBJECTIVES[objective].batch(x, Draw(0, 0, range(4)), options), "cpu")
    every = bench.score_everywhere(batch)
    assert every.positions.tolist() == list(range(64))
    assert every.weights.sum() == batch.weights.sum()

    ours = model(*batch)
    plain = bench.plain_forward(model, *every)
    assert ours.item() == pytest.approx(plain.item(), rel=1e-5)
    parameters = list(model.parameters())
    for a, b in zip(torch.autograd.grad(ours, parameters), torch.autograd.grad(plain, parameters)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_plain_step_is_float32_eager_and_scores_every_position():
    args = parse("--dtype", "bfloat16", "--compile", "on")
    args.objective, args.overwrite = "mlm", True
    bench.flags.complete(args)
    step, _, numbers = bench.make_step(args, [np.arange(100)], plain=True)
    loss, _, batches, *_ = step.args
    model, = loss.args
    assert loss.func is bench.plain_forward and not numbers["compiled"]
    assert model.dtype == torch.float32
    assert [batch.positions.tolist() for batch in batches] == [list(range(32))] * 2


def test_repeats_are_the_same_work():
    """A step leaves the weights as they are."""
    args = parse()
    args.objective, args.overwrite = "vlm", True
    bench.flags.complete(args)
    step, _, _ = bench.make_step(args, [np.arange(100)])
    model = step.args[0]
    before = [p.clone() for p in model.parameters()]
    losses = [step()[0].item() for _ in range(2)]
    assert losses[0] == losses[1]
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before))


class DoesNotFit:
    """An executor in which the plain version runs out of memory."""
    def submit(self, function, *args):
        return self

    def result(self):
        raise torch.OutOfMemoryError("a GPU of another size")


def test_a_plain_step_that_does_not_fit_is_left_out(capsys):
    args = parse()
    args.objective, args.overwrite = "ar", True
    bench.flags.complete(args)
    numbers = bench.measure(args, "ar", [np.arange(100)], 1e9, DoesNotFit())
    assert "does not fit" in capsys.readouterr().out and "plain_ms" not in numbers
    assert bench.table({"ar": numbers}).split()[-2:] == ["-", "-"]

# -----------------------------------------------------------------------------
# The command

@pytest.mark.slow
def test_every_number_follows_from_the_times(monkeypatch, capsys):
    monkeypatch.setattr(bench, "ceiling", lambda device, dtype: 1e9)
    report = bench.run(parse())
    results = report["objectives"]
    assert list(results) == list(OBJECTIVES)
    for name, r in results.items():
        seconds = r["ms"] / 1e3
        config = Config(100, 16, 1, 2, 16, causal=OBJECTIVES[name].causal)
        needed = flops(config, 4, 16, r["scored"])
        assert r["tokens_per_second"] == pytest.approx(64 / seconds)
        assert r["of_ceiling"] == pytest.approx(needed / seconds / 1e9)
        assert r["plain_over_ours"] == pytest.approx(r["plain_ms"] / r["ms"])
    assert results["ar"]["scored"] == results["dar"]["scored"] == 64
    assert results["mlm"]["scored"] == 4 * round(.15 * 16)
    printed = capsys.readouterr().out
    assert all(f"{r['tokens_per_second']:.0f}" in printed for r in results.values())


def test_ctrl_c_is_for_the_process_that_measures(monkeypatch):
    """The other one would print a traceback of its own."""
    monkeypatch.setattr(bench, "ceiling", lambda device, dtype: 1e9)
    monkeypatch.setattr(bench, "table", str)

    def ignores_it(args, objective, shards, most, other):
        return other.submit(signal.getsignal, signal.SIGINT).result() == signal.SIG_IGN

    monkeypatch.setattr(bench, "measure", ignores_it)
    assert all(bench.run(parse())["objectives"].values())


@pytest.mark.slow
def test_json_as_a_user_makes_it(tmp_path):
    command = [sys.executable, str(ROOT / "dev" / "bench.py"), *SMALL, "--objective", "vlm", "--no_plain",
               "--json", "b.json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    saved = json.loads((tmp_path / "b.json").read_text())
    assert list(saved["objectives"]) == ["vlm"] and saved["flags"]["n_embd"] == 16
    assert [path.name for path in tmp_path.iterdir()] == ["b.json"], "nothing else is written"


@pytest.mark.parametrize("flags", [["--repeats", "0"], ["--n_embd", "17"], ["--batch_tokens", "65"],
                                   ["--vocab_size", "0"], ["--device", "cuda:77"]])
def test_bad_flags_are_one_line(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        bench.main([*SMALL, *flags])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
