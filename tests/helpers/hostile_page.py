"""A report page whose every text from data is markup, a control character or a change of direction."""

from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import torch
from echo_answers import answer

from fa_transformers.pages.page import write_page
from fa_transformers.training.checkpointing import TrainingState
from fa_transformers.training.report_page import classifier_page
from fa_transformers.training.run_folder import PAGE_FILE

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</style><script>alert(2)</script>",
    "{{7*7}}{% raw %}",
    "' onmouseover='alert(3)",
    "\u202etxt.exe\u2066",
    "nul\x00 bell\x07 \x1b[31m",
    "<!-- --></td></table><iframe src=https://example.org>",
    "&lt;b&gt; javascript:alert(4)",
    "שלום עולם",
    "x" * 3000,
]
"""Texts as labels, documents, names of files and columns can be."""


def build_state() -> TrainingState:
    """A run's end with a curve of 60 steps and six evaluations."""
    state = TrainingState({}, step=60)
    state.curve.follow("accuracy")
    for step in range(1, 61):
        state.curve.steps.add(step, 2 / step, 1e-3 / step)
        if step % 10 == 0:
            state.step = step
            state.record_score({"accuracy": 0.9 - abs(40 - step) / 100, "loss": 1 / step}, "accuracy")
    return state


def build_summary(scores: dict, state: TrainingState, **more) -> dict:
    """The content of `all_results.json` of a run with these scores."""
    shown = {name: value for name, value in scores.items() if isinstance(value, float)}
    return {
        "task": "text-classification",
        "data": "d",
        "split": "test",
        "num_examples": scores["num_examples"],
        "model": shown,
        "baselines": {},
        "parameters": 12_345,
        "steps": state.step,
        "best_step": state.best_step,
        "train_seconds": 61.5,
        "tokens_per_second": 2987.1,
        "peak_memory_gib": None,
        "command": "accelerate launch scripts/finetune.py",
        **more,
    }


def write_hostile_page(folder: Path, names: list[str] = HOSTILE, num_rows: int = 60, **more) -> Path:
    """Write the page of a classifier with these labels to `folder`, which has files with such names."""
    random = np.random.default_rng(0)
    labels = np.arange(num_rows) % len(names)
    logits = random.normal(size=(num_rows, len(names))) + 2 * np.eye(len(names))[labels]
    texts = [f"{HOSTILE[index % len(HOSTILE)]} {HOSTILE[index % 3]}" for index in range(num_rows)]
    lengths = random.integers(5, 3000, num_rows).tolist()
    rows = datasets.Dataset.from_dict({"text": texts})
    scored, scores = answer(
        "single_label_classification", logits, names, labels, lengths, rows=rows, labels=labels.tolist()
    )
    state = build_state()
    folder.mkdir(exist_ok=True)
    for text in HOSTILE[:7]:
        (folder / text.replace("/", "-").replace("\0", "")).write_text("a file")
    summary = build_summary(scores, state, baselines={text: {"accuracy": 0.5} for text in HOSTILE[:4]}, **more)
    fitted = SimpleNamespace(scored=scored, scores=scores, state=state, model=torch.nn.Linear(1, 1))
    fitted.model.device = torch.device("cpu")
    job = SimpleNamespace(task="text-classification", is_text=True, model=SimpleNamespace(max_length=2048))
    data = SimpleNamespace(label_names=names, facts=SimpleNamespace(name=HOSTILE[1]))
    write_page(folder / PAGE_FILE, classifier_page(job, data, fitted, summary, folder))
    return folder / PAGE_FILE
