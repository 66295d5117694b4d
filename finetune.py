"""
Fine-tuning: the whole model is trained on a task, with a linear head on its pooled features.

    by_seed, how = finetune_seeds(model, task, eot, "mean", args)

The learning rate is chosen on held-out training examples. Every seed starts again from the given model,
which stays as it is.
"""
import copy
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from features import collate, extract, pooled_features
from glue_data import METRICS, subset
from probe import held_out

# For models of a few million parameters. Published recipes for models of BERT's size and above use
# lower rates: --lr 1e-5 2e-5 4e-5 8e-5
LEARNING_RATES = [1e-4, 3e-4, 1e-3, 3e-3]


def finetune_seeds(model, task, eot, kind, args):
    """Fine-tune with args.seeds seeds. task: a Task of token ids. kind: "mean", "max" or "last" pooling.

    The learning rate is chosen by the task's first metric on the held-out tenth of the training
    split, with seed 0.

    Returns (for each seed its predictions on each dev set; a dict that says how the rate was chosen).
    """
    metric = METRICS[task.metrics[0]]
    rates = sorted(set(args.lr))
    train = task.train
    fit = partial(finetune, model, n_classes=len(task.classes), eot=eot, kind=kind, args=args)

    # Choose the learning rate
    best = 0
    values = []
    if len(rates) > 1:
        out = held_out(train.groups)
        rest = subset(train, np.flatnonzero(~out))
        judged = subset(train, np.flatnonzero(out))
        for lr in rates:
            [predicted] = fit(rest, [judged], lr=lr, seed=0)
            values.append(metric(predicted, judged.y))
        best = best_rate(values)

    # Fine-tune on all of the training split
    dev = list(task.dev.values())
    by_seed = [fit(train, dev, lr=rates[best], seed=seed) for seed in range(args.seeds)]

    at_edge = len(rates) > 1 and best in (0, len(rates) - 1)
    how = {"lr": rates[best], "at_edge": at_edge, "held_out": dict(zip(map(str, rates), values))}
    return by_seed, how


def best_rate(values):
    """Index of the largest of the values, one per learning rate in ascending order.

    Of equal values, the one nearest to the middle of the grid: [1, 1, 1, 0] -> 1.
    """
    middle = (len(values) - 1) / 2
    ties = [i for i, value in enumerate(values) if value == max(values)]
    return min(ties, key=lambda i: abs(i - middle))


def finetune(model, train, tests, n_classes, eot, kind, lr, seed, args):
    """Train a copy of the model and a linear head on it: AdamW, warmup and linear decay.

    train and the members of tests are Splits of token ids. n_classes: 0 for a score (squared error).
    Returns the predictions on each test set, (m,) each. The model itself is left as it is, so every
    run begins at the checkpoint.
    """
    rng = np.random.default_rng(seed)
    device = next(model.parameters()).device
    model = copy.deepcopy(model).train()

    # The head starts at 0, or at the mean score
    head = torch.nn.Linear(model.config.n_embd, n_classes or 1).to(device)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    target = torch.from_numpy(train.y)                                          # (n,)
    if not n_classes:
        torch.nn.init.constant_(head.bias, float(train.y.mean()))
        target = target.float()                                                 # mps has no float64
    target = target.to(device)

    # Batches, epoch after epoch
    lengths = np.array([len(ids) for ids in train.examples])                    # (n,)
    order = []
    for _ in range(args.epochs):
        order += shuffled_batches(lengths, args.batch_size, rng)

    # Optimizer: 6 % warmup, then linear decay to 0
    steps = len(order)

    def schedule(step):
        warmup = (step + 1) / (0.06 * steps + 1)
        decay = 1 - step / steps
        return min(warmup, decay)

    parameters = [*model.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)

    # Train
    for index in tqdm(order, desc=f"finetune lr {lr:g} seed {seed}", leave=False, disable=None):
        ids, valid = collate([train.examples[i] for i in index], eot, device)
        features = pooled_features(model, ids, valid, args.layer, [kind])[kind]     # (B, C)
        scores = head(features)                                                     # (B, K)
        if n_classes:
            loss = F.cross_entropy(scores, target[index])
        else:
            loss = F.mse_loss(scores[:, 0], target[index])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        scheduler.step()

    # Predict
    predictions = []
    model.eval()
    for test in tests:
        features = extract(model, test.examples, eot, args.layer, [kind])[kind]
        with torch.inference_mode():
            scores = head(features.to(device)).cpu()
        predictions.append((scores.argmax(dim=1) if n_classes else scores[:, 0].double()).numpy())
    return predictions


def shuffled_batches(lengths, batch_size, rng):
    """One epoch: arrays of indices into lengths (n,), every index once, batch_size of them in each but one.

    Texts of a batch are padded to its longest, so texts of similar length come together: what is shuffled is
    sorted by length within blocks of 16 batches, and the batches are shuffled again.
    """
    block = 16 * batch_size
    shuffled = rng.permutation(len(lengths))
    blocks = [shuffled[start:start + block] for start in range(0, len(shuffled), block)]
    by_length = np.concatenate([indices[np.argsort(lengths[indices])] for indices in blocks])
    batches = np.split(by_length, range(batch_size, len(by_length), batch_size))
    return [batches[i] for i in rng.permutation(len(batches))]
