"""
Metrics, readers, built-in tasks and features of eval_glue.py against independent references.
No network.
"""
import http.server
import json
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import documents
import tokenizer
import eval_glue
import glue_data
from common import DataError, save_checkpoint, save_config, unzip
from glue_data import GLUE, f1, matthews, pearson, ranks, spearman
from model import Config, Transformer

def read_tsv(path, layout):
    return glue_data.parse(glue_data.read_lines(path), layout, path)


ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data" / "glue"


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)

# -----------------------------------------------------------------------------
# Metrics

def test_metrics_on_published_examples():
    # documentation of scikit-learn (matthews_corrcoef, f1_score), scipy (spearmanr); Anscombe's first quartet
    assert matthews(np.array([1, -1, 1, 1]), np.array([1, 1, 1, -1])) == pytest.approx(-1 / 3)
    assert f1(np.array([0, 1, 0, 0, 1, 1]), np.array([0, 1, 1, 0, 1, 0])) == pytest.approx(2 / 3)
    assert spearman(np.array([1, 2, 3, 4, 5.]), np.array([5, 6, 7, 8, 7.])) == pytest.approx(0.82078268)
    x = np.array([10, 8, 13, 9, 11, 14, 6, 4, 12, 7, 5.])
    y = np.array([8.04, 6.95, 7.58, 8.81, 8.33, 9.96, 7.24, 4.26, 10.84, 4.82, 5.68])
    assert pearson(x, y) == pytest.approx(0.81642052)


def test_matthews_and_f1_are_their_formulas():
    rng = np.random.default_rng(0)
    for _ in range(20):
        p, t = rng.integers(0, 2, (2, 30))
        tp, tn, fp, fn = [int(np.sum((p == a) & (t == b))) for a, b in [(1, 1), (0, 0), (1, 0), (0, 1)]]
        assert matthews(p, t) == pytest.approx((tp * tn - fp * fn)
                                               / ((tp+fp) * (tp+fn) * (tn+fp) * (tn+fn)) ** .5)
        assert f1(p, t) == pytest.approx(2 * (tp / (tp+fp)) * (tp / (tp+fn)) / (tp / (tp+fp) + tp / (tp+fn)))


def test_metrics_of_adversarial_cases():
    t, zeros, ones = np.array([0, 1, 1, 0]), np.zeros(4, int), np.ones(4, int)
    assert matthews(zeros, t) == matthews(ones, t) == matthews(t, zeros) == 0 and matthews(1 - t, t) == -1
    assert (f1(zeros, zeros) == 0 and f1(zeros, t) == 0 and f1(ones, zeros) == 0
            and f1(ones, t) == pytest.approx(2 / 3))
    assert pearson(np.full(4, .3), t) == 0 and spearman(np.full(4, .3), t) == 0
    assert ranks(np.array([3., 1, 3, 2, 3])).tolist() == [4, 1, 4, 2, 4]
    assert spearman(np.exp(np.arange(9.)), np.arange(9.)) == pytest.approx(1)


def test_bootstrap_is_the_binomial_error_of_an_accuracy():
    p, t = np.r_[np.ones(300, int), np.zeros(100, int)], np.ones(400, int)
    assert glue_data.bootstrap(glue_data.accuracy, p, t, np.arange(400)) == \
        pytest.approx((.75 * .25 / 400) ** .5, rel=0.15)


def test_bootstrap_keeps_groups_together():
    """400 examples in 100 groups of 4 that are right or wrong together are worth 100, not 400."""
    true = np.ones(400)
    predicted = np.repeat((np.arange(100) % 4 > 0).astype(float), 4)
    error = glue_data.bootstrap(glue_data.accuracy, predicted, true, np.repeat(np.arange(100), 4))
    assert error == pytest.approx((.75 * .25 / 100) ** .5, rel=0.15)

# -----------------------------------------------------------------------------
# Readers: tiny files in the official layouts

HEADERS = {"SST-2": "sentence\tlabel", "MRPC": "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String",
           "STS-B": "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
           "QQP": "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
           "QNLI": "index\tquestion\tsentence\tlabel",
           "MNLI": "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\t"
                   "sentence1_parse\tsentence2_parse\tsentence1\tsentence2\tlabel1\tgold_label",
           "RTE": "index\tsentence1\tsentence2\tlabel", "WNLI": "index\tsentence1\tsentence2\tlabel"}
MNLI_DEV = HEADERS["MNLI"].replace("gold_label", "label2\tlabel3\tlabel4\tlabel5\tgold_label")
COLUMNS = {"CoLA": (3, 1), "SST-2": (0, 1), "MRPC": (3, 4, 0), "STS-B": (7, 8, 9), "QQP": (3, 4, 5),
           "MNLI": (8, 9, 11), "QNLI": (1, 2, 3), "RTE": (1, 2, 3),
           "WNLI": (1, 2, 3)}               # 0-based, text and then label, as distributed
TEXTS = ['say "no', "it 's \u2028 é\x85"]   # stray quote; line separators that str.splitlines would cut at


def write(path, rows, header=None, end="\n", bom=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ([header] if header else []) + ["\t".join(row) for row in rows]
    path.write_bytes((b"\xef\xbb\xbf" if bom else b"") + "".join(line + end for line in lines).encode())
    return path


def rows_of(name, columns, width):
    labels = GLUE[name].labels or ("2.5", "0.0")
    out = []
    for i in range(6):
        row = ["x"] * width
        for text, column in zip(TEXTS if i % 2 else TEXTS[::-1], columns):
            row[column] = text
        row[columns[-1]] = labels[i % len(labels)]
        out.append(row)
    return out


@pytest.mark.parametrize("name", list(GLUE))
@pytest.mark.parametrize("end, bom", [("\n", False), ("\r\n", True)])
def test_official_layouts(tmp_path, name, end, bom):
    columns, header = COLUMNS[name], HEADERS.get(name)
    rows = rows_of(name, columns, len(header.split("\t")) if header else 4)
    examples, y, malformed = read_tsv(write(tmp_path / "t.tsv", rows + [["short"]], header, end, bom),
                                      GLUE[name])
    assert malformed == 1 and len(y) == 6
    assert examples == [tuple(row[i] for i in columns[:-1]) for row in rows]
    expected = [float(r[columns[-1]]) if name == "STS-B" else GLUE[name].labels.index(r[columns[-1]])
                for r in rows]
    assert y.tolist() == expected


def test_mnli_has_two_dev_sets_with_the_label_elsewhere(tmp_path):
    write(tmp_path / "MNLI/train.tsv", rows_of("MNLI", (8, 9, 11), 12), HEADERS["MNLI"])
    for n, kind in enumerate(["matched", "mismatched"], start=4):
        rows = rows_of("MNLI", (8, 9, 15), 16)[:n]
        rows[0][15] = "-"                                       # no gold label: malformed
        write(tmp_path / f"MNLI/dev_{kind}.tsv", rows, MNLI_DEV)
    task = glue_data.load_task("MNLI", tmp_path, download=False)
    assert ({k: len(d[1]) for k, d in task.dev.items()} == {"matched": 3, "mismatched": 4}
            and task.malformed == 2)


def test_mrpc_is_split_by_the_list_of_dev_ids(tmp_path):
    rows = [["1", "10", "20", 'a "b', "c"], ["0", "11", "21", "d", "e"], ["1", "10", "21", "f", "g"]]
    write(tmp_path / "MRPC/msr_paraphrase_train.txt", rows, HEADERS["MRPC"], "\r\n", bom=True)
    write(tmp_path / "MRPC/mrpc_dev_ids.tsv", [["11", "21"]])
    task = glue_data.load_task("MRPC", tmp_path, download=False)
    assert (task.train == [('a "b', "c"), ("f", "g")] and task.dev[""][0] == [("d", "e")]
            and task.y.tolist() == [1, 1])


@pytest.mark.parametrize("name, header, rows, message", [
    ("RTE", HEADERS["SST-2"], [["a", "1"]], "no column"),
    ("RTE", "index\tsentence1\tsentence2", [["0", "a", "b"]], "no column 'label'"),        # the test file
    ("SST-2", HEADERS["WNLI"].replace("sentence1", "sentence"), [["0", "a", "b", "maybe"]] * 3, "malformed"),
    ("CoLA", "index\tsentence", [["0", "a"]] * 3, "malformed"),                            # the test file
    ("CoLA", None, [], "malformed")])
def test_wrong_files_are_refused_in_one_line(tmp_path, name, header, rows, message):
    with pytest.raises(DataError, match=message) as error:
        read_tsv(write(tmp_path / "t.tsv", rows, header), GLUE[name])
    assert "\n" not in str(error.value)


def test_official_files_where_they_are():
    if not SHARED.exists():
        pytest.skip("needs ../shared/data/glue")
    for name, n, m in [("CoLA", 8551, 1043), ("SST-2", 67349, 872), ("RTE", 2490, 277), ("WNLI", 635, 71)]:
        task = glue_data.load_task(name, SHARED, download=False)
        assert (len(task.y), len(task.dev[""][1]), task.malformed) == (n, m, 0)

# -----------------------------------------------------------------------------
# Downloads

@pytest.fixture
def server(tmp_path):
    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(tmp_path / "www"))

        def log_message(self, *args):
            pass

    (tmp_path / "www").mkdir()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}/"
        running.shutdown()


def test_download(tmp_path, server):
    with zipfile.ZipFile(tmp_path / "www/RTE.zip", "w") as z:
        for file in ("train.tsv", "dev.tsv", "test.tsv"):
            z.writestr(f"RTE/{file}", file)
    glue_data.download_glue("RTE", tmp_path / "glue", ["train.tsv", "dev.tsv"], server)
    assert sorted(p.name for p in (tmp_path / "glue/RTE").iterdir()) == ["dev.tsv", "train.tsv"]
    with pytest.raises(DataError, match="404"):
        glue_data.download_glue("WNLI", tmp_path / "glue", ["train.tsv"], server)


@pytest.mark.parametrize("bad", ["../evil.tsv", "/evil.tsv", "RTE/../../evil.tsv", "..\\evil.tsv", None])
def test_bad_archives_are_refused(tmp_path, bad):
    archive = tmp_path / "in" / "RTE.zip"
    archive.parent.mkdir()
    if bad:
        with zipfile.ZipFile(archive, "w") as z:
            z.writestr("RTE/train.tsv", "x")
            z.writestr(bad, "x")
    else:
        archive.write_bytes(b"<html>not a zip</html>")
    with pytest.raises(DataError):
        unzip(archive, {"RTE/train.tsv": archive.parent / "train.tsv"})
    assert [p.name for p in tmp_path.rglob("*.tsv")] == []

# -----------------------------------------------------------------------------
# Built-in tasks, on an invented library

def library():
    rng = np.random.default_rng(1)
    words = ["alpha", "beta", "gamma", "delta", "if", "return", "self", "None"]
    return [(f"p{i % 4}/f{i}.py", "\n".join(" ".join(rng.choice(words, 6)) + f" {i}" for _ in range(60)))
            for i in range(120)]


def test_builtin_tasks_never_share_a_file_between_train_and_test():
    files = library()
    for make in glue_data.STDLIB.values():
        task = make(files)
        of_test = {text for _, text in files if documents.document_is_val(text, data.VAL_FRACTION["stdlib"])}
        for example in task.train:
            assert not any(example[0] in text for text in of_test)
        for example in task.dev[""][0]:
            assert any(example[0] in text for text in of_test)
    assert set(glue_data.stdlib_topic(files).classes) <= {"p0", "p1", "p2", "p3"}


def test_pair_is_balanced_and_its_halves_have_the_same_distribution_in_both_classes():
    task = glue_data.stdlib_pair(library())
    for examples, y in [(task.train, task.y), task.dev[""][:2]]:
        assert 2 * y.sum() == len(y)
        for half in (0, 1):
            kept = [sorted(e[half] for e, label in zip(examples, y) if label == k) for k in (0, 1)]
            assert kept[0] == kept[1]
    texts = [text for _, text in library()]
    for test in (lambda a, b, text: a + b in text,
                 lambda a, b, text: a in text and b in text):               # the latter: one file
        assert ([any(test(a, b, text) for text in texts) for a, b in task.train]
                == task.y.astype(bool).tolist())
    assert {len(half) for example in task.train for half in example} == {glue_data.CHUNK}


def test_pair_takes_equally_many_tokens_of_both_texts_where_they_meet():
    encoding, pair = tokenizer.build_encoding({"name": "bytes"}), ("abcdefgh", "123456")
    for T, half, a, b in [(64, 3, "fgh", "123"), (6, 3, "gh", "12"), (64, 0, *pair)]:
        (row,), _ = eval_glue.encode(encoding, [pair], T, half)
        assert row == [*a.encode(), encoding.eot_token, *b.encode()]

# -----------------------------------------------------------------------------
# Features

def trained(causal, n_layer=2):
    torch.manual_seed(3)
    model = Transformer(Config(vocab_size=257, block_size=24, n_layer=n_layer, n_head=2, n_embd=16,
                               causal=causal))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model.eval()


@pytest.mark.parametrize("causal", [False, True])
def test_features_do_not_depend_on_batching(causal):
    model, rng = trained(causal), np.random.default_rng(0)
    rows = [rng.integers(0, 256, n).tolist() for n in rng.integers(1, 25, 40)]
    for layer in (None, 1):
        batched = eval_glue.extract(model, rows, 256, layer, ["mean", "max", "last"])
        for i, row in enumerate(rows):
            hidden = model.features(torch.tensor([row]), layer=layer)[0].detach()
            for kind, value in [("mean", hidden.mean(0)), ("max", hidden.max(0).values),
                                ("last", hidden[-1])]:
                torch.testing.assert_close(batched[kind][i], value, atol=1e-5, rtol=1e-4)


def test_batches_hold_everything_once_within_the_limit():
    lengths = np.random.default_rng(0).integers(1, 100, 300).tolist()
    cut = list(eval_glue.batches(lengths, 500))
    assert sorted(np.concatenate(cut)) == list(range(300))
    assert all(max(lengths[i] for i in b) * len(b) <= 500 for b in cut)


def test_untrained_features_are_its_embeddings():
    model = eval_glue.untrained(trained(False))
    ids = torch.randint(257, (3, 24))
    assert torch.equal(model.features(ids), model.features(ids, layer=0))
    assert torch.equal(model.wte.weight, eval_glue.untrained(trained(True)).wte.weight)


def test_pairs_are_cut_to_fit():
    encoding = tokenizer.build_encoding({"name": "bytes"})
    for a, b in [("a" * 40, "bb"), ("aa", "b" * 40), ("a" * 40, "b" * 40), ("", ""), ("a" * 10, "b" * 13)]:
        [row], cut = eval_glue.encode(encoding, [(a, b)], 24)
        ids_a, ids_b = row[:row.index(256)], row[row.index(256) + 1:]
        assert len(row) == min(24, len(a) + len(b) + 1) and cut == (len(a) + len(b) + 1 > 24)
        assert set(ids_a) <= {97} and set(ids_b) <= {98}
        assert len(ids_a) >= min(len(a), 11) and len(ids_b) >= min(len(b), 11)
    assert eval_glue.encode(encoding, [("",)], 24) == ([[256]], 0)

# -----------------------------------------------------------------------------
# The script

@pytest.fixture
def checkpoints(tmp_path):
    for name in ("ar", "vlm"):
        (tmp_path / name).mkdir()
        model = trained(name == "ar")
        save_config(tmp_path / name, model.config, train={"objective": name})
        save_checkpoint(tmp_path / name, model, [], 7)
        tokenizer.save_tokenizer("bytes", tmp_path / name)
    rng = np.random.default_rng(0)
    for file, n in [("train.tsv", 120), ("dev.tsv", 40)]:
        y = rng.integers(0, 2, n)
        rows = [[str(i), "no" if k else "yes!", f"b{i}", GLUE["RTE"].labels[k]] for i, k in enumerate(y)]
        write(tmp_path / "glue/RTE" / file, rows, HEADERS["RTE"])
    return tmp_path


def run(folder, *flags):
    command = [sys.executable, str(ROOT / "eval_glue.py"), "--checkpoint", "ar", "vlm",
               "--glue_dir", "glue", *flags]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def test_script_writes_a_table_and_a_json_for_each_checkpoint(checkpoints):
    done = run(checkpoints, "--tasks", "RTE", "--pool", "mean", "last")
    assert done.returncode == 0, done.stderr
    assert "RTE, accuracy, mean" in done.stdout and "most frequent class" in done.stdout
    for name in ("ar", "vlm"):
        report = json.loads((checkpoints / name / "eval_glue.json").read_text())
        assert report["step"] == 7 and "--tasks RTE" in report["command"] and len(report["results"]) == 2
        mean = report["results"][0]
        assert mean["model"]["value"] == 1.0 and mean["n_train"] == 120 and mean["n_dev"] == 40
        assert mean["majority"]["value"] < 0.8 and mean["majority"]["se"] > 0


def test_result_does_not_depend_on_the_global_seed(checkpoints):
    values = []
    for seed in (0, 1):
        torch.manual_seed(seed), np.random.seed(seed)
        eval_glue.main(["--checkpoint", str(checkpoints / "vlm"), "--glue_dir", str(checkpoints / "glue"),
                        "--tasks", "RTE"])
        values.append(json.loads((checkpoints / "vlm/eval_glue.json").read_text())["results"])
        [row.pop("seconds") for row in values[-1]]
    assert values[0] == values[1]


def test_finetune_starts_at_the_checkpoint_and_leaves_it_unchanged(checkpoints, monkeypatch):
    monkeypatch.setattr(eval_glue, "LEARNING_RATES", [3e-3, 1e-2])
    args = ["--glue_dir", str(checkpoints / "glue"), "--tasks", "RTE", "--finetune", "--seeds", "2",
            "--epochs", "20"]
    model = trained(False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    task = glue_data.load_task("RTE", checkpoints / "glue", False)
    rows, _ = eval_glue.encode(tokenizer.build_encoding({"name": "bytes"}), task.train, 24)
    eval_glue.finetune(model, rows, task.y, [rows], 2, 256, None, "mean", 1e-3, seed=0, epochs=1)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    eval_glue.main(["--checkpoint", str(checkpoints / "vlm"), *args])
    [row] = json.loads((checkpoints / "vlm/eval_glue.json").read_text())["results"]
    assert (len(row["model"]["seeds"]) == 2 and row["model"]["value"] > 0.9
            and row["model_fit"]["lr"] in (3e-3, 1e-2))


@pytest.mark.parametrize("flags", [["--tasks", "WNLI"], ["--tasks", "RTE", "--layer", "9"],
                                   ["--tasks", "nonsense"], ["--tasks", "RTE", "--max_train", "-1"],
                                   ["--checkpoint", "nowhere"]])
def test_bad_input_gets_one_line_and_exit_code_2(checkpoints, capsys, monkeypatch, flags):
    monkeypatch.chdir(checkpoints)
    with pytest.raises(SystemExit) as stop:
        eval_glue.main(["--checkpoint", "ar", "--glue_dir", "glue", *flags])
    assert stop.value.code == 2 and capsys.readouterr().err.strip().splitlines()[-1].count("error: ") == 1
