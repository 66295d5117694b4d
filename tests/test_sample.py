"""
sample.py against explicit loops, enumerated probabilities, and its command line. CPU, no network.

    pytest tests/test_sample.py
"""
import io
import itertools
import math
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

import tokenizer
import sample
from common import load_checkpoint, save_checkpoint, save_config
from model import Config, Transformer
from sample import draw_tokens, encode_beginning, fill, generate, infill_ids

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PROMPT = [3, 1, 4, 1, 5]
VARIED = [7, 20, 33, 46, 8]               # a masked toy model continues it with several tokens


def tiny(causal, vocab_size=50, block_size=16):
    """A random model whose output depends on all of its input, with an embedding that favours padding."""
    torch.manual_seed(4)
    model = Transformer(Config(vocab_size, block_size, n_layer=2, n_head=2, n_embd=32, causal=causal)).eval()
    with torch.no_grad():
        model.wte.weight.mul_(20)
        model.wte.weight[vocab_size:] *= 10     # if not excluded, these would have most of the mass
        for block in model.blocks:
            block.attn.c_proj.weight.normal_(std=1.0)
            block.mlp.c_proj.weight.normal_(std=1.0)
    return model


def count_passes(model):
    """A list that receives the number of tokens of every forward pass."""
    lengths, features = [], model.features
    def counted(inputs, **kwargs):
        lengths.append(inputs.size(1))
        return features(inputs, **kwargs)
    model.features = counted
    return lengths


@torch.no_grad()
def probabilities(model, ids):
    """(T, V): the model's distribution at every position of ids, without a cache."""
    return model.logits(model.features(torch.tensor([ids])))[0].softmax(dim=-1)


def chi_square(counts, expected):
    """Asserts a good fit: the statistic within 4 standard deviations of its mean (df, variance 2 df)."""
    assert counts[expected == 0].sum() == 0
    counts, expected = counts[expected > 0], expected[expected > 0]
    statistic, df = ((counts - expected) ** 2 / expected).sum(), len(expected) - 1
    assert abs(statistic - df) < 4 * (2 * df) ** 0.5, (statistic, df)

# -----------------------------------------------------------------------------
# One draw

@pytest.mark.parametrize("temperature, top_k", [(1.0, None), (0.6, None), (1.5, 5), (1.0, 1000)])
def test_draws_follow_the_softmax(temperature, top_k):
    logits = torch.randn(20, generator=torch.Generator().manual_seed(1)) * 1.5
    logits[[2, 7]] = -torch.inf
    p = (logits / temperature).exp()
    if top_k:
        p[p < p.sort(descending=True).values[:top_k][-1]] = 0
    n = 40_000
    tokens = draw_tokens(logits.expand(n, 20), temperature, top_k, torch.Generator().manual_seed(2))
    chi_square(tokens.bincount(minlength=20).float(), n * p / p.sum())


def test_temperature_0_and_top_k_1_are_the_argmax():
    logits = torch.randn(500, 30)
    assert draw_tokens(logits, temperature=0).equal(logits.argmax(dim=-1))
    assert draw_tokens(logits, temperature=5.0, top_k=1).equal(logits.argmax(dim=-1))
    for temperature in (1e-320, 1e-7, 1e-5):        # no overflow, no division by 0
        assert draw_tokens(logits * 1000, temperature).equal(logits.argmax(dim=-1))

# -----------------------------------------------------------------------------
# Causal models

@pytest.mark.parametrize("block_size", [16, 7])
def test_cached_is_uncached(block_size):
    model = tiny(causal=True, block_size=block_size)
    ids, window = list(PROMPT), list(PROMPT)
    for _ in range(60):
        if len(window) == block_size + 1:
            window = window[-(block_size // 2):]
        token = int(probabilities(model, window)[-1].argmax())
        ids, window = ids + [token], window + [token]
    assert len(set(ids[5:])) > 10                   # a model that repeats itself would prove nothing
    assert generate(model, PROMPT, 60, temperature=0) == ids


def test_cache_is_used():
    model = tiny(causal=True)
    lengths = count_passes(model)
    generate(model, PROMPT, 30)
    # 5 tokens, then one at a time up to 16; then 8, and one at a time up to 16, twice
    assert lengths == [5] + 11 * [1] + [8] + 8 * [1] + [8] + 8 * [1]


def test_prompt_may_fill_the_window():
    model = tiny(causal=True)
    prompt = list(range(16))
    token = int(probabilities(model, prompt)[-1].argmax())
    assert generate(model, prompt, 1, temperature=0) == prompt + [token]

# -----------------------------------------------------------------------------
# Masked models

@pytest.mark.parametrize("steps, shares", [(None, 10 * [1]), (4, [3, 2, 3, 2]), (1, [10]), (99, 10 * [1])])
def test_left_to_right(steps, shares):
    model = tiny(causal=False)
    ids = VARIED + 11 * [model.config.mask_token]           # masks up to block_size, the first 10 are filled
    k = len(VARIED)
    for share in shares:
        p = probabilities(model, ids)
        for _ in range(share):
            ids[k] = int(p[k].argmax())
            k += 1
    assert len(set(ids[5:15])) > 2 or steps == 1
    lengths = count_passes(model)
    assert generate(model, VARIED, 10, temperature=0, steps=steps) == ids[:15]
    assert lengths == len(shares) * [16]


@pytest.mark.parametrize("steps, shares", [(None, 10 * [1]), (4, [3, 2, 3, 2])])
def test_most_confident_first(steps, shares):
    model = tiny(causal=False)
    ids, order = VARIED + 11 * [model.config.mask_token], []
    for share in shares:
        p = probabilities(model, ids)
        masked = [k for k in range(15) if ids[k] == model.config.mask_token]
        for k in sorted(masked, key=lambda k: -float(p[k].max()))[:share]:
            ids[k] = int(p[k].argmax())
            order.append(k)
    assert order != sorted(order)                   # else it would be the same as left to right
    assert generate(model, VARIED, 10, temperature=0, order="confidence", steps=steps) == ids[:15]
    assert generate(model, VARIED, 10, temperature=0, steps=steps) != ids[:15]


def test_few_new_tokens_see_masks_up_to_block_size():
    """As in training and evaluation: the first of 2 new tokens is what it is with 11 of them."""
    model = tiny(causal=False)
    seen, features = [], model.features
    def watched(inputs, **kwargs):
        seen.append(inputs[0].tolist())
        return features(inputs, **kwargs)
    model.features = watched
    short = generate(model, PROMPT, 2, temperature=0)
    assert seen[0] == PROMPT + 11 * [model.config.mask_token]
    assert seen[1] == short[:6] + 10 * [model.config.mask_token]
    assert short == generate(model, PROMPT, 11, temperature=0)[:7]


def test_fill_may_leave_the_later_masks():
    model = tiny(causal=False)
    mask = model.config.mask_token
    ids = [3, mask, 1, mask, mask, 5, mask]
    for order in ("left", "confidence"):
        filled = fill(model, ids, draw_tokens, order, n=2)
        assert [k for k in range(7) if filled[k] == mask] == [4, 6]
        assert [filled[k] for k in (0, 2, 5)] == [3, 1, 5]
        assert mask not in fill(model, ids, draw_tokens, order)


def test_long_text_slides():
    model = tiny(causal=False)
    mask = model.config.mask_token
    ids = list(PROMPT)
    for context, new in [(5, 11), (8, 8), (8, 8), (8, 3)]:              # windows of 16; 30 new tokens
        window = ids[-context:] + (16 - context) * [mask]
        for k in range(context, context + new):
            window[k] = int(probabilities(model, window)[k].argmax())
        ids += window[context:context + new]
    assert generate(model, PROMPT, 30, temperature=0) == ids
    lengths = count_passes(model)
    assert len(generate(model, PROMPT, 30, steps=10)) == 35
    assert lengths == 10 * [16]                             # shared as 11 : 8 : 8 : 3
    lengths.clear()
    assert len(generate(model, PROMPT, 30, steps=1)) == 35                  # a window takes one pass at least
    assert lengths == 4 * [16]

# -----------------------------------------------------------------------------
# Whole texts

def distribution(model, order, steps):
    """(9,): the exact probability of each two-token continuation of [0] in a vocabulary of three tokens."""
    mask, p = model.config.mask_token, torch.zeros(3, 3)
    for a, b in itertools.product(range(3), range(3)):
        if model.config.causal:
            p[a, b] = probabilities(model, [0])[0, a] * probabilities(model, [0, a])[1, b]
            continue
        first = probabilities(model, [0, mask, mask, mask])
        if steps == 1:
            p[a, b] = first[1, a] * first[2, b]
        elif order == "confidence" and first[2].max() > first[1].max():
            p[a, b] = first[2, b] * probabilities(model, [0, mask, b, mask])[1, a]
        else:
            p[a, b] = first[1, a] * probabilities(model, [0, a, mask, mask])[2, b]
    return p.flatten()


@pytest.mark.parametrize("causal, order, steps", [(True, "left", None), (False, "left", None),
                                                  (False, "confidence", None), (False, "left", 1)])
def test_texts_follow_the_model(causal, order, steps):
    model, n = tiny(causal, vocab_size=3, block_size=4), 1000
    with torch.no_grad():
        model.wte.weight[:3] *= 0.15                # rather even probabilities
    generator = torch.Generator().manual_seed(3)
    texts = [generate(model, [0], 2, order=order, steps=steps, generator=generator) for _ in range(n)]
    counts = torch.tensor([3 * a + b for _, a, b in texts]).bincount(minlength=9).float()
    expected = n * distribution(model, order, steps)
    assert expected.min() > 5                       # for the chi-square approximation
    chi_square(counts, expected)


@pytest.mark.parametrize("causal", [True, False])
def test_only_text_ids_are_emitted(causal):
    model = tiny(causal)
    generator = torch.Generator().manual_seed(4)
    ids = generate(model, PROMPT, 200, temperature=50.0, generator=generator)
    ids += generate(model, PROMPT, 200, temperature=50.0, top_k=64, generator=generator)
    hidden = model.features(torch.tensor([PROMPT]))[0, -1]
    ids += draw_tokens(model.logits(hidden).expand(20_000, 64), 50.0, generator=generator).tolist()
    assert set(ids) == set(range(50))         # every id of text, but not [MASK] = 50 nor padding 51 .. 63


@pytest.mark.parametrize("causal", [True, False])
def test_randomness(causal):
    model = tiny(causal)
    def run(seed, **kwargs):
        return generate(model, PROMPT, 30, generator=torch.Generator().manual_seed(seed), **kwargs)
    assert run(0) == run(0) != run(1)
    assert run(0, temperature=0) == run(1, temperature=0)
    assert run(0, temperature=0) == run(2, top_k=1) == run(3, top_k=1, temperature=3.0)
    assert run(0)[:5] == PROMPT and len(run(0)) == 35

# -----------------------------------------------------------------------------
# Prompts

def code_tokenizer():
    with open(sample.__file__) as file:
        return tokenizer.make_tokenizer("bpe:400", [file.read() + "x\n\n\n\ny" * 99])


@pytest.fixture(scope="module")
def words():
    """A vocabulary in which words bring the space before them."""
    return tokenizer.build_encoding(code_tokenizer())


@pytest.mark.parametrize("prompt, rest", [
    ("def ", "get(x)"), ("def", " get(x)"), ("if x:\n    ", "return"), ("if x:\n", "return"),
    ("return x\n\n\n", "def"), ("x):\n\t", "return"), ("x  ", "# end"), ("def get(", "x)"), (" ", "def")])
def test_a_prompt_has_the_tokens_that_it_has_in_a_text(words, prompt, rest):
    """Where white space ends the prompt: its tokens are the beginning of those of prompt + rest."""
    ids = encode_beginning(prompt, words)
    whole = words.encode_ordinary(prompt + rest)
    assert ids == whole[:len(ids)]
    begun = words.decode(ids)
    assert prompt in (begun, begun + " ")
    assert ids == encode_beginning("def", words) if prompt == "def " else True


def test_the_text_before_a_gap_too(words):
    config = Config(words.n_vocab, 64)
    mask = config.mask_token
    ids = infill_ids("def ____(x): ____", words, config, 1)
    assert ids == [*words.encode_ordinary("def"), mask, *words.encode_ordinary("(x):"), mask]
    assert ids == infill_ids("def____(x):____", words, config, 1)
    assert infill_ids("def ____ ", words, config, 1)[-1:] == words.encode_ordinary(" ")     # no gap after it


def test_a_vocabulary_of_bytes_keeps_the_space(tmp_path):
    """There a word does not bring its space."""
    tokenizer.save_tokenizer({"name": "bytes"}, tmp_path)
    encoding = tokenizer.load_tokenizer(tmp_path)
    assert encode_beginning("def ", encoding) == list(b"def ")


def test_a_space_at_the_end_of_the_prompt_does_not_matter(tmp_path, words, capsys):
    """On the command line, for causal and masked models."""
    for causal in (True, False):
        folder = tmp_path / str(causal)
        os.makedirs(folder)
        tokenizer.save_tokenizer(code_tokenizer(), folder)
        model = tiny(causal, vocab_size=400, block_size=32)
        save_checkpoint(folder, model, [], step=1)
        save_config(folder, model.config)
        flags = ["--checkpoint", folder, "--max_new_tokens", 8]
        assert text_of(capsys, *flags, "--prompt", "def ") == text_of(capsys, *flags, "--prompt", "def")

# -----------------------------------------------------------------------------
# --watch

class Terminal(io.StringIO):
    """A screen of 20 columns and 5 rows that knows "up N rows" and "clear from here"."""
    def __init__(self):
        super().__init__()
        self.rows, self.row, self.screens = [""], 0, []

    def isatty(self):
        return True

    def write(self, text):
        for up, rest in re.findall(r"(?:\x1b\[(\d+)A\r\x1b\[J)?([^\x1b]*)", text):
            if up:
                self.row -= int(up)
                assert self.row >= 0 and len(self.rows) - 1 - self.row <= 4, "beyond the screen's top"
                self.rows = [*self.rows[:self.row], ""]
            for line in rest.split("\n")[:-1]:
                assert len(line) <= 20
                self.rows[self.row:] = [line, ""]
                self.row += 1
        if text:
            self.screens.append(self.rows[:-1])


def test_watch_prints_in_place_on_a_terminal(monkeypatch):
    monkeypatch.setattr(sample.shutil, "get_terminal_size", lambda: os.terminal_size((20, 5)))
    monkeypatch.setattr(sample.time, "sleep", lambda seconds: None)
    terminal = Terminal()
    show = sample.show_passes(terminal)
    show("a _")
    show("a b\nc _")
    assert terminal.screens == [["a _"], ["a b", "c _"]]
    show(25 * "x" + "\n\nend")                               # wrapped by us, not by the terminal
    assert terminal.rows[:-1] == [20 * "x", 5 * "x", "", "end"]
    show("\n".join("1234567"))                               # taller than the screen: its end
    assert terminal.rows[:-1] == ["4", "5", "6", "7"]
    show("")
    assert terminal.rows == [""]


@pytest.mark.parametrize("order, steps", [("left", None), ("confidence", 4)])
def test_watch_is_one_line_per_pass_elsewhere(checkpoints, capsys, order, steps):
    """Masks are shown as _, of the tokens that will be printed only, and the sample is the same."""
    flags = ["--checkpoint", checkpoints / "vlm", "--prompt", "x = ", "--max_new_tokens", 6, "--order", order]
    flags += ["--steps", steps] if steps else []
    plain = text_of(capsys, *flags)
    lines = text_of(capsys, *flags, "--watch")
    assert lines.endswith(plain)
    passes = lines[:-len(plain)].split("\n")[:-1]
    assert passes[0] == "x = ______" and len(passes) == 1 + (steps or 6)
    encoding = tokenizer.load_tokenizer(checkpoints / "vlm")
    model, _ = load_checkpoint(checkpoints / "vlm")
    seen = []
    generate(model, encoding.encode_ordinary("x = "), 6, 0.8, None, order, steps,
             torch.Generator().manual_seed(0), seen.append)
    masks = [ids.count(model.config.mask_token) for ids in seen]
    assert masks == ([6, 5, 4, 3, 2, 1, 0] if steps is None else [6, 4, 3, 1, 0])
    shown = [sample.text_so_far(ids, encoding, model.config.mask_token) for ids in seen]
    assert passes == [text.replace("\n", "\\n") for text in shown]


def test_watch_a_causal_model_and_gaps(checkpoints, capsys):
    flags = ["--checkpoint", checkpoints / "ar", "--max_new_tokens", 5, "--watch"]
    out = text_of(capsys, *flags)
    assert out.count("\n") >= 6 and "<|endoftext|>" not in out.split("\n")[0]
    out = text_of(capsys, "--checkpoint", checkpoints / "vlm", "--infill", "a____b____c", "--watch")
    assert out.startswith("a_b_c\n")
    assert sample.text_so_far([97, 257, 195], tokenizer.load_tokenizer(checkpoints / "vlm"), 257) == "a_\ufffd"

# -----------------------------------------------------------------------------
# Command line

@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Folders "ar" and "vlm" as train.py leaves them, with a vocabulary of bytes."""
    folder = tmp_path_factory.mktemp("out")
    for name, causal in [("ar", True), ("vlm", False)]:
        os.makedirs(folder / name)
        tokenizer.save_tokenizer({"name": "bytes"}, folder / name)
        model = tiny(causal, vocab_size=257, block_size=64)
        save_checkpoint(folder / name, model, [], step=1)
        save_config(folder / name, model.config)
    return folder


def text_of(capsys, *flags):
    sample.main(list(map(str, flags)))
    return capsys.readouterr().out


@pytest.mark.parametrize("gap_tokens", [1, 3])
def test_infill(checkpoints, gap_tokens):
    model, _ = load_checkpoint(checkpoints / "vlm")
    encoding = tokenizer.load_tokenizer(checkpoints / "vlm")
    ids = infill_ids("____é = ______.__init__(____)____", encoding, model.config, gap_tokens)
    gap, mask = gap_tokens * [model.config.mask_token], model.config.mask_token
    pieces = [encoding.encode_ordinary(piece) for piece in ("é = ", ".__init__(", ")")]
    assert ids == gap + pieces[0] + gap + pieces[1] + gap + pieces[2] + gap
    for order, steps in [("left", None), ("confidence", 2)]:
        filled = fill(model, ids, draw_tokens, order, steps)
        assert all(new < mask if old == mask else new == old for new, old in zip(filled, ids))
        assert len(filled) == len(ids)


def test_infill_prints_the_text(checkpoints, capsys):
    out = text_of(capsys, "--checkpoint", checkpoints / "vlm", "--gap_tokens", 2,
                  "--infill", "for ____ in range(____):")
    gaps = re.fullmatch(r"for (.+) in range\((.+)\):\n", out, re.DOTALL)
    assert gaps and "____" not in out


@pytest.mark.parametrize("name", ["ar", "vlm"])
def test_prints_what_generate_returns(checkpoints, capsys, name):
    model, _ = load_checkpoint(checkpoints / name)
    encoding = tokenizer.load_tokenizer(checkpoints / name)
    generator = torch.Generator().manual_seed(7)
    texts = [encoding.decode(generate(model, [encoding.eot_token], 90, 0.9, 40, generator=generator)[1:])
             for _ in range(2)]         # an empty prompt starts from end-of-text, which is not printed
    out = text_of(capsys, "--checkpoint", checkpoints / name, "--max_new_tokens", 90, "--temperature", 0.9,
                  "--top_k", 40, "--num_samples", 2, "--seed", 7)
    assert out == texts[0] + "\n" + "-" * 15 + "\n" + texts[1] + "\n"


def test_bfloat16(checkpoints, capsys):
    for name in ("ar", "vlm"):
        flags = ["--prompt", "x = ", "--dtype", "bfloat16", "--device", "cpu"]
        assert text_of(capsys, "--checkpoint", checkpoints / name, *flags).startswith("x = ")
        model, _ = load_checkpoint(checkpoints / name, "cpu", "bfloat16")
        assert model.dtype == torch.bfloat16


@pytest.mark.slow
@pytest.mark.parametrize("flags", [["--checkpoint", "ar"],
                                   ["--checkpoint", "vlm", "--order", "confidence", "--steps", "9"]])
def test_script(checkpoints, flags):
    script = os.path.join(ROOT, "sample.py")
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}       # a terminal that cannot show é
    done = subprocess.run([sys.executable, script, *flags, "--prompt", "def é", "--max_new_tokens", "20"],
                          cwd=checkpoints, capture_output=True, text=True, env=env)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("def ?") and len(done.stdout) > 10


BAD = [("--checkpoint none", "none holds no checkpoint"),
       ("--checkpoint ar --prompt " + 65 * "x", "the prompt has 65 tokens"),
       ("--checkpoint vlm --prompt " + 64 * "x", "the prompt has 64 tokens"),
       ("--checkpoint vlm --temperature -1", "temperature must be"),
       ("--checkpoint vlm --temperature nan", "temperature must be"),
       ("--checkpoint vlm --temperature inf", "temperature must be"),
       ("--checkpoint ar --top_k 0", "top_k must be"),
       ("--checkpoint vlm --steps 0", "steps must be"),
       ("--checkpoint ar --steps 5", "order and steps are for masked models"),
       ("--checkpoint ar --order confidence", "order and steps are for masked models"),
       ("--checkpoint vlm --max_new_tokens 0", "max_new_tokens must be"),
       ("--checkpoint vlm --num_samples 0", "num_samples must be"),
       ("--checkpoint vlm --seed -1", "seed at least 0"),
       ("--checkpoint vlm --device tpu9", "device 'tpu9' is not available"),
       ("--checkpoint ar --infill a____b", "infill needs a masked model"),
       ("--checkpoint vlm --infill __init__", "infill needs a gap"),
       ("--checkpoint vlm --infill a____b --gap_tokens 0", "gap_tokens of at least 1"),
       ("--checkpoint vlm --infill a____b --gap_tokens 63", "the text has 65 tokens"),
       ("--checkpoint vlm --infill a____b --steps 0", "steps must be"),
       ("--checkpoint mixed", "is not the one of this training: it has 257 tokens, not 50")]


@pytest.mark.parametrize("flags, message", BAD)
def test_bad_input_is_one_line(checkpoints, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(checkpoints)
    if flags.endswith("mixed"):
        os.makedirs("mixed")
        tokenizer.save_tokenizer({"name": "bytes"}, "mixed")
        save_checkpoint("mixed", tiny(False), [], step=1)
        save_config("mixed", tiny(False).config)
    with pytest.raises(SystemExit) as stop:
        sample.main(flags.split())
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == ""
    assert err.startswith("error: ") and message in err and err.count("\n") == 1


def test_prompt_or_infill(checkpoints):
    with pytest.raises(SystemExit) as stop:
        sample.main(["--checkpoint", "vlm", "--prompt", "a", "--infill", "____"])
    assert stop.value.code == 2


@pytest.mark.parametrize("kwargs", [dict(prompt_ids=[]), dict(order="right"), dict(max_new_tokens=0)])
def test_generate_refuses(kwargs):
    with pytest.raises(ValueError):
        generate(tiny(False), **{**dict(prompt_ids=PROMPT, max_new_tokens=3), **kwargs})

# -----------------------------------------------------------------------------
# What train.py prints at its end

@pytest.fixture
def encoding(tmp_path):
    """Bytes: a token per character of ASCII text."""
    tokenizer.save_tokenizer({"name": "bytes"}, tmp_path)
    return tokenizer.load_tokenizer(tmp_path)


def ids_of(encoding, text):
    return np.array(encoding.encode_ordinary(text))


def test_half_of_the_tokens_are_masked_and_line_ends_stay(encoding):
    text = "a\nb\nc\nd\none line of text\nand another, longer one"
    shown, filled = sample.half_masked(tiny(False, encoding.n_vocab, 64), encoding, text)
    assert len(shown) == len(text) and shown.count("_") == math.ceil((len(text) - 5) / 2)
    assert all(a == b or (a == "_" and b != "\n") for a, b in zip(shown, text))
    assert filled != text and filled.count("\n") >= 5


def test_example_lines_are_successive_and_short_enough(encoding):
    good = [f"line number {i} of the text" for i in range(5)]
    ids = ids_of(encoding, "\n".join(["short", "x" * 100, *good]))
    assert sample.example_lines(encoding, ids, 256) == good[:3]
    assert sample.example_lines(encoding, ids, 256, n=2) == good[:2]
    assert sample.example_lines(encoding, ids_of(encoding, "\n".join(good[:3])), 256) == good[:3]
    assert sample.example_lines(encoding, ids_of(encoding, "a " * 100), 256) == [("a " * 24).strip()] * 3


@pytest.mark.parametrize("causal", [True, False])
def test_the_demonstration_continues_and_fills(encoding, causal):
    ids = ids_of(encoding, "a line of some words, number one\n" * 5)
    text = sample.demonstration(tiny(causal, encoding.n_vocab, 128), encoding, [ids], masked=not causal)
    assert text.count("continued by the model") == (2 if causal else 1)
    assert text.count("filled in by the model") == (0 if causal else 1)
    assert "--- 'a line of some' continued by the model\na line of some" in text
