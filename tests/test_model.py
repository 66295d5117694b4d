"""
The Transformer against a plain float64 reference, what it may see, what it may predict, its counts,
its checkpoints.

    pytest tests/test_model.py                  # a few seconds, CPU, no network

init_weights sets the last matrix of every attention and MLP to zero, so a fresh model is blind to its
context: every test here works on randomised weights.
"""
import json
import os
import pickle
import platform
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import model as model_file
from dev.bench import peak_memory
from common import load_checkpoint, pick_device, save_checkpoint, save_config
from model import Config, CrossEntropy, Transformer, attend, flops, num_params


def make(causal, seed=0, **kwargs):
    torch.manual_seed(seed)
    sizes = {"vocab_size": 70, "block_size": 12, "n_layer": 2, "n_head": 2, "n_embd": 16, **kwargs}
    model = Transformer(Config(causal=causal, **sizes))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.4)
    return model.eval()


def ids(B=3, T=12, seed=1):
    return torch.randint(71, (B, T), generator=torch.Generator().manual_seed(seed))         # text and [MASK]


both = pytest.mark.parametrize("causal", [False, True])

# -----------------------------------------------------------------------------
# A plain reference: numpy, float64, one query at a time, rotary positions as complex numbers

def reference_features(model, inputs, layer=None):
    """inputs (T,) -> (T, C)."""
    c = model.config
    w = {name: p.detach().double().numpy() for name, p in model.named_parameters()}
    norm = lambda x: x / np.sqrt((x ** 2).mean(-1, keepdims=True) + 1e-6)
    D, T = c.n_embd // c.n_head, len(inputs)
    frequency = 10000.0 ** (-np.arange(D // 2) / (D / 2))

    def rotate(x, position):
        z = (x[:D // 2] + 1j * x[D // 2:]) * np.exp(1j * position * frequency)
        return np.concatenate((z.real, z.imag))
    x = norm(w["wte.weight"][inputs])
    for i in range(c.n_layer if layer is None else layer):
        qkv = norm(x) @ w[f"blocks.{i}.attn.c_attn.weight"].T
        mixed = np.zeros_like(x)
        for h in range(c.n_head):
            q, k, v = (qkv[:, j * c.n_embd + h * D:j * c.n_embd + (h + 1) * D] for j in range(3))
            for t in range(T):
                sees = range(t + 1) if c.causal else range(T)
                score = [rotate(norm(q[t]), t) @ rotate(norm(k[s]), s) / D ** 0.5 for s in sees]
                p = np.exp(np.array(score) - max(score))
                mixed[t, h * D:(h + 1) * D] = sum(a * v[s] for a, s in zip(p / p.sum(), sees))
        x = x + mixed @ w[f"blocks.{i}.attn.c_proj.weight"].T
        hidden = np.maximum(norm(x) @ w[f"blocks.{i}.mlp.c_fc.weight"].T, 0) ** 2
        x = x + hidden @ w[f"blocks.{i}.mlp.c_proj.weight"].T
    return norm(x)


def reference_log_probs(model, hidden):
    logits = hidden @ model.wte.weight.detach().double().numpy()[:model.config.vocab_size].T
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@both
@pytest.mark.parametrize("layer", [None, 0, 1])
def test_features_equal_the_reference(causal, layer):
    model, x = make(causal), ids()
    expected = np.stack([reference_features(model, row, layer) for row in x.numpy()])
    np.testing.assert_allclose(model.features(x, layer=layer).detach().numpy(), expected, atol=2e-4)


@both
@pytest.mark.parametrize("K", [1, 3])
def test_loss_equals_the_reference(causal, K):
    model, x, g = make(causal), ids(), torch.Generator().manual_seed(2)
    positions = torch.randperm(36, generator=g)[:10]
    targets = torch.randint(70, (10, K), generator=g)
    weights = torch.rand(10, generator=g)
    weights[-2:] = 0                                                        # unused slots
    hidden = np.concatenate([reference_features(model, row) for row in x.numpy()])
    log_p = reference_log_probs(model, hidden)
    expected = -sum(float(w) * sum(log_p[p, t] for t in row) / K
                    for p, row, w in zip(positions.tolist(), targets.tolist(), weights))
    assert model(x, positions, targets, weights).item() == pytest.approx(expected, rel=2e-5)


@both
def test_head_on_scored_positions_equals_full_head(causal):
    model, x = make(causal), ids()
    positions = torch.tensor([0, 5, 11, 12, 30, 35])
    targets, weights = torch.tensor([[1], [2], [3], [4], [5], [69]]), torch.arange(1.0, 7)
    log_p = model.logits(model.features(x)).flatten(0, 1).log_softmax(-1)   # at all positions
    full = -(weights * log_p[positions, targets[:, 0]]).sum()
    gathered = model(x, positions, targets, weights)
    assert gathered.item() == pytest.approx(full.item(), rel=1e-5)
    for a, b in zip(*(torch.autograd.grad(l, model.parameters()) for l in (full, gathered))):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


@both
def test_slots_of_weight_0_change_nothing(causal):
    model, x = make(causal), ids()
    p, t, w = torch.tensor([3, 20]), torch.tensor([[1], [2]]), torch.ones(2)
    p0, t0, w0 = torch.tensor([3, 20, 7, 8]), torch.tensor([[1], [2], [3], [4]]), torch.tensor([1.0, 1, 0, 0])
    assert model(x, p, t, w).item() == pytest.approx(model(x, p0, t0, w0).item(), rel=1e-6)

# -----------------------------------------------------------------------------
# What a position sees

@both
def test_causality(causal):
    model, x = make(causal), ids(B=1)
    before = model.features(x)
    for k in range(12):
        y = x.clone()
        y[0, k] = (x[0, k] + 1) % 70
        moved = (model.features(y) - before).abs().amax(dim=-1)[0] > 1e-4   # (T,)
        if causal:
            assert not moved[:k].any(), \
                f"causal: token {k} changes an earlier position: the model sees the future"
            assert moved[k:].all(), f"causal: a position does not see the earlier token {k}"
        else:
            assert moved.all(), f"bidirectional: not every position sees token {k}"


@both
def test_order_of_the_context_matters(causal):
    model, x = make(causal), torch.arange(12)[None]
    y = x.clone()
    y[0, [2, 7]] = x[0, [7, 2]]
    assert (model.features(x) - model.features(y))[0, -1].abs().max() > 1e-4, "positions are not encoded"


@both
def test_padding_does_not_change_real_tokens(causal):
    model, lengths = make(causal), [12, 7, 1]
    x = ids()
    valid = torch.arange(12) < torch.tensor(lengths)[:, None]
    features = model.features(x, valid=valid)
    for row, n in enumerate(lengths):
        alone = model.features(x[row:row + 1, :n])
        torch.testing.assert_close(features[row, :n], alone[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("prompt", [1, 5, 12])
def test_key_value_cache_equals_full_forward(prompt):
    model, x = make(True), ids()
    cache = [[] for _ in range(2)]
    parts = [model.features(x[:, :prompt], cache=cache)]                # the prompt at once, then one by one
    parts += [model.features(x[:, t:t + 1], cache=cache) for t in range(prompt, 12)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model.features(x), atol=1e-5, rtol=1e-4)


def test_cache_refuses_what_it_cannot_do():
    """Several tokens after a filled cache, or more than block_size in all."""
    model = make(causal=True)
    cache = [[] for _ in model.blocks]
    model.features(torch.zeros(1, 4, dtype=torch.int64), cache=cache)
    with pytest.raises(ValueError, match="one by one"):
        model.features(torch.zeros(1, 2, dtype=torch.int64), cache=cache)
    with pytest.raises(ValueError, match="block_size"):
        model.features(torch.zeros(1, model.config.block_size + 1, dtype=torch.int64))


@pytest.mark.parametrize("vocab_size", [63, 64, 70])
def test_mask_token_and_padding_have_probability_0(vocab_size):
    model = make(False, vocab_size=vocab_size)
    c = model.config
    assert c.mask_token == vocab_size < c.padded_vocab_size and c.padded_vocab_size % 64 == 0
    p = model.logits(model.features(ids() % (vocab_size + 1))).softmax(dim=-1)
    assert p.dtype == torch.float32 and p.shape == (3, 12, c.padded_vocab_size)
    assert (p[..., vocab_size:] == 0).all(), "the mask token or a padded id can be predicted"
    assert (p[..., :vocab_size] > 0).all()
    torch.testing.assert_close(p[..., :vocab_size].sum(dim=-1), torch.ones(3, 12))


def test_fresh_model_predicts_uniformly_enough():
    torch.manual_seed(0)
    model = Transformer(Config(vocab_size=70, block_size=12, n_layer=2, n_head=2, n_embd=64))
    x = ids() % 70
    loss = model(x, torch.arange(36), torch.randint(70, (36, 1)), torch.ones(36)) / 36
    assert loss.item() == pytest.approx(np.log(70), abs=0.1), \
        "the loss before training is that of a uniform guess"


def test_odd_heads_are_refused():
    for sizes in ({"n_embd": 16, "n_head": 3}, {"n_embd": 15, "n_head": 3}):
        with pytest.raises(ValueError, match="n_head"):
            Transformer(Config(**sizes))

# -----------------------------------------------------------------------------
# The two fast paths against slow ones

@pytest.mark.parametrize("causal, masked, T, S", [(False, False, 12, 12), (True, False, 12, 12),
                                                  (False, True, 12, 12), (False, False, 1, 9)])
def test_attention_written_out_for_bfloat16_is_attention(causal, masked, T, S):
    """Against float64, loop by loop, with the gradient of float32's fused kernel. bfloat16 has 8 bits."""
    rng = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(2, 3, n, 8, generator=rng).bfloat16() for n in (T, S, S))
    mask = torch.arange(S) < torch.tensor([[[[7]]], [[[S]]]]) if masked else None           # (2, 1, 1, S)
    y = attend(q, k, v, causal, mask)
    assert y.dtype == torch.bfloat16
    for b, h, t in np.ndindex(2, 3, T):
        sees = [s for s in range(S) if not (causal and s > t) and (mask is None or mask[b, 0, 0, s])]
        score = np.array([(q[b, h, t].double() @ k[b, h, s].double()).item() for s in sees]) / 8 ** 0.5
        p = np.exp(score - score.max())
        expected = (p / p.sum()) @ v[b, h, sees].double().numpy()
        np.testing.assert_allclose(y[b, h, t].double().numpy(), expected, atol=0.04)
    slow, fast = ([x.clone().to(dtype).requires_grad_() for x in (q, k, v)]
                  for dtype in (torch.float32, torch.bfloat16))
    for inputs in (slow, fast):
        attend(*inputs, causal, mask).float().square().sum().backward()
    for a, b in zip(slow, fast):
        assert (a.grad - b.grad.float()).norm() < 0.02 * a.grad.norm()


def cross_entropy_case(K, V=70, vocab_size=66, N=23, C=8):
    rng = torch.Generator().manual_seed(4)
    hidden, weight = torch.randn(N, C, generator=rng), torch.randn(V, C, generator=rng)
    targets = torch.randint(vocab_size, (N, K), generator=rng)
    targets[0] = targets[0, :1]                                             # the same target K times
    return hidden.requires_grad_(), weight.requires_grad_(), targets, torch.rand(N, generator=rng), vocab_size


@pytest.mark.parametrize("K", [1, 3])
@pytest.mark.parametrize("rows", [1, 5, 23, 1000])
def test_cross_entropy_and_its_gradients_are_those_of_autograd(monkeypatch, K, rows):
    """However the rows are cut into chunks; loss by a float64 formula, gradients by autograd."""
    monkeypatch.setitem(model_file.CHUNK, False, rows * 70)
    hidden, weight, targets, weights, vocab_size = cross_entropy_case(K)
    loss = CrossEntropy.apply(hidden, weight, targets, weights, vocab_size)
    (3 * loss).backward()
    h, w = (x.detach().double().requires_grad_() for x in (hidden, weight))
    log_p = (h @ w[:vocab_size].T).log_softmax(dim=1)                       # padded ids do not exist
    expected = -(log_p.gather(1, targets).mean(dim=1) * weights.double()).sum()
    (3 * expected).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(hidden.grad, h.grad.float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weight.grad, w.grad.float(), rtol=1e-4, atol=1e-5)


def test_cross_entropy_never_holds_all_logits(monkeypatch):
    """N = 2000 rows, V = 4096: 31 MiB of float32 logits; in chunks of 100 rows a small part of that."""
    def peak(rows):
        monkeypatch.setitem(model_file.CHUNK, False, rows * 4096)
        hidden, weight, targets, weights, vocab_size = cross_entropy_case(1, V=4096, vocab_size=4000, N=2000)
        return peak_memory(lambda: CrossEntropy.apply(hidden, weight, targets, weights, vocab_size), "cpu")
    assert peak(100) < 2000 * 4096 * 4 / 5 < 2000 * 4096 * 4 < peak(2000)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="reuse_memory is for Linux with glibc")
def test_reuse_memory_saves_the_page_faults_of_large_buffers():
    """Buffers of 64 MiB are 16,384 pages each, if the kernel gives them anew. The first few always are."""
    code = """
import common, resource, torch
{}
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(15):
    torch.ones(2 ** 24)
before = faults()
for _ in range(5):
    torch.ones(2 ** 24)
print(faults() - before)
"""
    root = os.path.dirname(model_file.__file__)
    without, kept = (
        int(subprocess.check_output([sys.executable, "-c", code.format(call)], cwd=root, text=True))
        for call in ("", "common.reuse_memory()"))
    assert kept < 500 and kept < without / 10

# -----------------------------------------------------------------------------
# Counts

@pytest.mark.parametrize("sizes", [{}, {"n_layer": 3, "n_embd": 32, "vocab_size": 64}])
def test_num_params(sizes):
    model = make(False, **sizes)
    assert num_params(model.config) == sum(p.numel() for p in model.parameters())


def test_flops_equal_those_that_torch_counts():
    model, x, N = make(False), ids(), 10
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):                     # attention as plain matrix products
        model(x, torch.arange(N), torch.ones(N, 1, dtype=torch.int64), torch.ones(N)).backward()
    assert flops(model.config, 3, 12, N) == counter.get_total_flops()


def test_flops_of_a_causal_model_count_the_lower_triangle():
    full, causal = (flops(make(c).config, 3, 12, 10) for c in (False, True))
    skipped = 12 * 11 // 2                                          # (query, key) pairs above the diagonal
    assert full - causal == 3 * 2 * (2 * 2 * 16 * skipped * 3)      # backward, layers, q k^T and p v, B

# -----------------------------------------------------------------------------
# Checkpoints

def save(path, model, step=7, **rest):
    optimizer = torch.optim.AdamW(model.parameters())
    save_config(path, model.config, **rest)
    save_checkpoint(path, model, [optimizer], step)


def refused(path):
    with pytest.raises(ValueError) as error:
        load_checkpoint(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value), "one line that names the folder"
    return str(error.value)


@both
def test_checkpoint_roundtrip(tmp_path, causal):
    model = make(causal)
    save(tmp_path, model, train={"objective": "dar", "mask_range": [0.15, 1.0]})
    loaded, config = load_checkpoint(tmp_path)
    assert loaded.config == model.config and not loaded.training
    assert config["step"] == 7 and config["train"] == {"objective": "dar", "mask_range": [0.15, 1.0]}
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values(),
                                                 strict=True))
    assert torch.equal(model.features(ids()), loaded.features(ids()))
    assert sorted(os.listdir(tmp_path)) == ["ckpt.pt", "config.json"], "temporary files are left behind"


class Attack:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)                                       # would run when unpickled


@pytest.mark.parametrize("how", ["torch.save", "pickle"])
def test_unpickling_attack_is_refused(tmp_path, how):
    model, proof = make(False), str(tmp_path / "attacked")
    save(tmp_path, model)
    state = {"model": model.state_dict(), "optimizer": [], "step": Attack(proof)}
    with open(tmp_path / "ckpt.pt", "wb") as file:
        torch.save(state, file) if how == "torch.save" else pickle.dump(state, file, protocol=2)
    refused(tmp_path)
    assert not os.path.exists(proof), "code from the checkpoint was run"


def test_missing_checkpoint(tmp_path):
    message = refused(tmp_path / "nowhere")
    assert "config.json is missing" in message and "train.py" in message, \
        "say which file is missing and what to do"
    save_config(tmp_path, make(False).config)
    assert "ckpt.pt is missing" in refused(tmp_path)


@pytest.mark.parametrize("name", ["ckpt.pt", "config.json"])
@pytest.mark.parametrize("damage", ["half", "empty", "noise"])
def test_corrupt_checkpoint(tmp_path, name, damage):
    save(tmp_path, make(False))
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes({"half": data[:len(data) // 2], "empty": b"",
                                   "noise": b"\x93not it\n" * 50}[damage])
    refused(tmp_path)


@pytest.mark.parametrize("change", [{"n_embd": 32}, {"n_layer": 3}, {"n_layer": 1}, {"vocab_size": 200},
                                    {"colour": 1}, {"n_layer": "two"}, {"n_head": 3}])
def test_config_that_does_not_fit(tmp_path, change):
    save(tmp_path, make(False))
    config = json.loads((tmp_path / "config.json").read_text())
    config["model"].update(change)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError) as error:
        load_checkpoint(tmp_path)
    assert "\n" not in str(error.value)


def test_interrupted_save_leaves_the_old_checkpoint_whole(tmp_path, monkeypatch):
    old = make(False)
    save(tmp_path, old, step=1)

    def breaks(state, file, *args, **kwargs):
        file.write(b"half a checkpoint")
        raise KeyboardInterrupt
    monkeypatch.setattr(torch, "save", breaks)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, make(False, seed=9), [], 2)
    monkeypatch.undo()
    loaded, config = load_checkpoint(tmp_path)
    assert config["step"] == 1, "a save that was interrupted replaced the checkpoint"
    assert torch.equal(loaded.wte.weight, old.wte.weight)


@pytest.mark.parametrize("asked", ["auto", "cuda", "cuda:0"])
def test_every_process_of_torchrun_touches_its_own_gpu_only(asked, monkeypatch):
    touched = []
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "empty", lambda *size, device: touched.append(device))
    assert pick_device(asked) == "cuda:3" and touched == ["cuda:3"]
    assert pick_device("cpu") == "cpu"
