"""The cells of 14_scarce_tasks.ipynb that others use.

Written by `make execute` from the cells tagged `export`: change them there.
"""

import math

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from torch.nn.functional import cross_entropy
from transformers import get_cosine_schedule_with_warmup, set_seed

from rlora_lab.models.bases import load_base
from rlora_lab.models.methods import adapt
from rlora_lab.tasks.strings import LENGTH, QUESTION, SIZE, VOCABULARY, Synthetic, draw

SIZES = {
    "rotate back": 5000,
    "sort down": 1000,
    "first half twice": 200,
    "rotate 2": 60,
    "running min": 20,
}


def shares(sizes, T):
    """p_k proportional to n_k^(1/T), by task."""
    n = torch.tensor(list(sizes.values()), dtype=torch.double)
    p = n ** (1 / T)  # T = inf: every task the same
    return p / p.sum()


class Skewed(Synthetic):
    """String tasks with so many training examples each, drawn at temperature T."""

    def __init__(self, sizes, T=1.0, seed=0, augment=None):
        super().__init__(sizes)
        if bad := [task for task, n in sizes.items() if n < 1]:
            raise ValueError(f"tasks without examples: {', '.join(bad)}")
        if not T > 0:
            raise ValueError(f"T must be above 0, got {T}")
        generator = torch.Generator().manual_seed(seed)
        self.pools = {}
        for task, n in sizes.items():
            self.pools[task] = self.rows(task, draw(n, generator, "train"))
        self.p, self.augment = shares(sizes, T), augment or {}

    def sample(self, size, generator):
        """Rows (size, 14), and the number of each row's task (size,)."""
        which = torch.multinomial(self.p, size, True, generator=generator)
        ids = torch.empty(size, QUESTION + LENGTH, dtype=torch.long)
        for k, (task, pool) in enumerate(self.pools.items()):
            here = (which == k).nonzero()[:, 0]
            rows = pool[torch.randint(len(pool), (len(here),), generator=generator)]
            ids[here] = self.augment.get(task, lambda rows, _: rows)(rows, generator)
        return ids, which


def losses(model, ids):
    """The loss of each example, a mean over its answer's letters: (n,)."""
    logits = model(input_ids=ids).logits[:, QUESTION - 1 : -1]  # (n, 6, characters)
    return cross_entropy(logits.mT, ids[:, QUESTION:], reduction="none").mean(1)


def right(model, suite, split="validation", size=200):
    """Letters right by task."""
    scores = suite.score(model, split, size)
    return {task: score["letters"] for task, score in scores.items()}


def best_look(looks, by=min):
    """The look whose worst task is best; with another `by`, a mean say, by that."""
    return max(looks, key=lambda look: by(look[1].values()))


def train_skewed(model, suite, steps, lr, seed=0, batch=48, weights=None, every=0):
    """Train on draws; returns the looks: (step, {task: letters right}, adapter)."""
    set_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
    warmup = math.ceil(0.03 * steps)
    schedule = get_cosine_schedule_with_warmup(optimizer, warmup, steps)
    looks = []
    for step in range(1, steps + 1):
        ids, which = suite.sample(batch, generator)
        loss = losses(model.train(), ids)
        loss = (loss if weights is None else weights[which] * loss).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        if every and step % every == 0:
            state = get_peft_model_state_dict(model)
            adapter = {k: v.clone() for k, v in state.items()}
            looks.append((step, right(model, suite), adapter))
    return looks


def rename(rows, generator):
    """One random table of letters for question and answer of each row."""
    table = torch.rand(len(rows), SIZE, generator=generator).argsort(1)
    others = torch.arange(SIZE, len(VOCABULARY)).expand(len(rows), -1)  # tag, "="
    return torch.cat([table, others], 1).gather(1, rows)


def shuffle(rows, generator, both=False):
    """The question's letters in a random order; with `both`, the answer's too."""
    order = torch.rand(len(rows), LENGTH, generator=generator).argsort(1)
    rows = rows.clone()
    for start in (1, QUESTION) if both else (1,):
        part = slice(start, start + LENGTH)
        rows[:, part] = rows[:, part].gather(1, order)
    return rows


def alone(task, n, seed, augment=None, start=None, steps=120, lr=5e-3):
    """R-LoRA after training on n examples of one task, from an adapter or afresh."""
    suite = Skewed({task: n}, seed=seed, augment=augment and {task: augment})
    model = adapt("rlora", load_base("tiny"), suite, seed=seed)
    if start is not None:
        set_peft_model_state_dict(model, start)
    train_skewed(model, suite, steps, lr, seed, batch=32)
    return model.eval()
