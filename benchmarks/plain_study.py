"""A study as people write it, what `hpo launch` is held against: Optuna, DataLoader, nn.LSTM, packed sequences.

    DATABASE_URL=postgresql+psycopg2://… python benchmarks/plain_study.py DATA.npz STUDY BEST.pt [--trials 40]
        [--epochs 50] [--metric auroc] [--pruner median] [--workers 2] [--threads 1] [--configurations LIST.json]

DATA.npz: X (N, T, F), lengths (N,), y (N,) and test_X, test_lengths, test_y; validation (N,) bool. It uses nothing of
this project. A configuration of the list is a dictionary of parameters; without a list the sampler draws them. The
best trial's best epoch is kept in BEST.pt. --threads 0 leaves torch's number of threads as it is.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch
from optuna.study import MaxTrialsCallback
from optuna.trial import TrialState
from sklearn.metrics import accuracy_score, roc_auc_score
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.data import DataLoader, TensorDataset

EVALUATION_BATCH = 256  # sequences
WARM_UP = 5  # epochs before the pruner looks


class LSTMClassifier(nn.Module):
    """The last hidden state of the last layer, of both directions, into a linear layer."""

    def __init__(self, features: int, hidden: int, layers: int, outputs: int, dropout: float, bidirectional: bool):
        super().__init__()
        self.lstm = nn.LSTM(
            features,
            hidden,
            layers,
            batch_first=True,
            dropout=dropout if layers > 1 else 0.0,
            bidirectional=bidirectional,
        )
        self.bidirectional = bidirectional
        self.head = nn.Linear(hidden * (2 if bidirectional else 1), outputs)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """x (B, T, F) and lengths (B,), None where all are T, to logits (B,) of two classes, else (B, K)."""
        if lengths is None:
            _, (hidden, _) = self.lstm(x)
        else:
            _, (hidden, _) = self.lstm(pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False))
        last = torch.cat([hidden[-2], hidden[-1]], 1) if self.bidirectional else hidden[-1]
        logits: Tensor = self.head(last)
        return logits.squeeze(1)


class Objective:
    """One trial: parameters, training, reports, the best epoch's weights in a file of the trial."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        arrays = np.load(options.data)
        x, y = torch.from_numpy(arrays["X"]), torch.from_numpy(arrays["y"])
        lengths, validation = torch.from_numpy(arrays["lengths"]), torch.from_numpy(arrays["validation"])
        test = [torch.from_numpy(arrays[f"test_{name}"]) for name in ("X", "lengths", "y")]
        self.train = TensorDataset(x[~validation], lengths[~validation], y[~validation])
        self.validation = TensorDataset(x[validation], lengths[validation], y[validation])
        self.test = TensorDataset(*test)
        self.features, self.classes = x.shape[2], int(y.max()) + 1
        self.variable = bool((lengths != x.shape[1]).any())
        self.loss = nn.BCEWithLogitsLoss() if self.classes == 2 else nn.CrossEntropyLoss()

    def __call__(self, trial: optuna.Trial) -> float:
        params = suggest(trial)
        torch.manual_seed(trial.number)
        model = self.model(params)
        optimizer = torch.optim.AdamW(model.parameters(), params["learning_rate"], weight_decay=params["weight_decay"])
        loader = DataLoader(self.train, params["batch_size"], shuffle=True)
        best, weights = -1.0, {}
        for epoch in range(1, self.options.epochs + 1):
            self.train_epoch(model, loader, optimizer)
            value = self.score(model, self.validation)
            if value > best:
                best, weights = value, {name: tensor.clone() for name, tensor in model.state_dict().items()}
            trial.report(value, epoch)
            if trial.should_prune():
                raise optuna.TrialPruned
        torch.save(weights, trial_file(self.options.best, trial.number))
        return best

    def model(self, params: dict[str, Any]) -> LSTMClassifier:
        outputs = 1 if self.classes == 2 else self.classes
        shape = (params["hidden_size"], params["layers"], outputs, params["dropout"], params["bidirectional"])
        return LSTMClassifier(self.features, *shape)

    def train_epoch(self, model: LSTMClassifier, loader: DataLoader[Any], optimizer: torch.optim.Optimizer) -> float:
        """The mean loss of a batch."""
        model.train()
        total = 0.0
        for x, lengths, y in loader:
            optimizer.zero_grad()
            logits = model(x, lengths if self.variable else None)
            loss = self.loss(logits, y.float() if self.classes == 2 else y)
            loss.backward()
            optimizer.step()
            total += loss.item()
        return total / len(loader)

    def score(self, model: LSTMClassifier, part: TensorDataset) -> float:
        """The metric on a part of the data."""
        logits, labels = self.predict(model, part)
        if self.options.metric == "auroc":
            return float(roc_auc_score(labels, logits))
        return float(accuracy_score(labels, logits > 0 if self.classes == 2 else logits.argmax(1)))

    @torch.no_grad()
    def predict(self, model: LSTMClassifier, part: TensorDataset) -> tuple[Any, Any]:
        """Logits and labels."""
        model.eval()
        loader = DataLoader(part, EVALUATION_BATCH)
        found = [(model(x, lengths if self.variable else None), y) for x, lengths, y in loader]
        return torch.cat([logits for logits, _ in found]).numpy(), torch.cat([y for _, y in found]).numpy()


def suggest(trial: optuna.Trial) -> dict[str, Any]:
    layers = trial.suggest_int("layers", 1, 2)
    return {
        "layers": layers,
        "hidden_size": trial.suggest_int("hidden_size", 8, 128, log=True),
        "bidirectional": trial.suggest_categorical("bidirectional", [False, True]),
        "dropout": trial.suggest_float("dropout", 0.0, 0.5) if layers > 1 else 0.0,
        "batch_size": trial.suggest_categorical("batch_size", [16, 32, 64]),
        "learning_rate": trial.suggest_float("learning_rate", 1e-3, 3e-2, log=True),
        "weight_decay": trial.suggest_float("weight_decay", 1e-6, 1e-2, log=True),
    }


def trial_file(best: Path, number: int) -> Path:
    return best.with_suffix(f".{number}.pt")


def pruner(name: str) -> optuna.pruners.BasePruner:
    return optuna.pruners.MedianPruner(n_warmup_steps=WARM_UP) if name == "median" else optuna.pruners.NopPruner()


def work(options: argparse.Namespace) -> None:
    """One worker process: trials until there are as many as asked for."""
    study = optuna.load_study(
        study_name=options.study, storage=os.environ["DATABASE_URL"], pruner=pruner(options.pruner)
    )
    states = (TrialState.RUNNING, TrialState.COMPLETE, TrialState.PRUNED)
    study.optimize(Objective(options), callbacks=[MaxTrialsCallback(options.trials, states)])


def create(options: argparse.Namespace) -> None:
    study = optuna.create_study(
        study_name=options.study, storage=os.environ["DATABASE_URL"], direction="maximize", load_if_exists=True
    )
    if options.configurations is not None:
        for configuration in json.loads(options.configurations.read_text()):
            study.enqueue_trial(configuration)


def keep_best(options: argparse.Namespace) -> None:
    """The best trial's weights under the name asked for, and how good they are on the test part."""
    study = optuna.load_study(study_name=options.study, storage=os.environ["DATABASE_URL"])
    shutil.copy(trial_file(options.best, study.best_trial.number), options.best)
    objective = Objective(options)
    model = objective.model({"dropout": 0.0} | study.best_trial.params)
    model.load_state_dict(torch.load(options.best, weights_only=True))
    print(f"best {study.best_value:.4f}, test {objective.score(model, objective.test):.4f}")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("data", type=Path)
    options.add_argument("study")
    options.add_argument("best", type=Path)
    options.add_argument("--trials", type=int, default=40)
    options.add_argument("--epochs", type=int, default=50)
    options.add_argument("--metric", default="auroc", choices=["auroc", "accuracy"])
    options.add_argument("--pruner", default="median", choices=["median", "none"])
    options.add_argument("--workers", type=int, default=2)
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--configurations", type=Path)
    given = options.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if given.threads:
        torch.set_num_threads(given.threads)
    create(given)
    processes = [multiprocessing.Process(target=work, args=(given,)) for _ in range(given.workers)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    keep_best(given)


if __name__ == "__main__":
    main()
