"""The model card with its code examples."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from hpo.errors import legible
from hpo.models.bundle.config import BundleConfig, preprocessing
from hpo.models.class_scores import ClassScore, Interval, PartScores, model_scores, worst_first
from hpo.models.config import ClassifierConfig
from hpo.models.preprocessing import ROUNDING
from hpo.models.stem import EPSILON

if TYPE_CHECKING:
    from hpo.models.estimate import Estimate
    from hpo.models.metrics import Scores

PICTURES = ("curves.svg", "confusion.svg", "reliability.svg")
PICTURES_BEFORE = ("curves.png", "confusion.png", "reliability.png")  # of models saved when these were PNG
SHOWN_NAME = 400  # characters of a name
CLASSES_SHOWN, GROUPS_SHOWN = 30, 10  # rows of a table, the worst


def readme(config: BundleConfig, exported: str = "safetensors", pictures: Collection[str] = PICTURES) -> str:
    """The model card, Markdown; `exported` adds how to run that format. pictures: the names of those beside it."""
    classifier = config.widest
    names = ", ".join(map(_name, config.classes))
    members = f"{config.networks} networks, probabilities averaged" if config.networks > 1 else "one network"
    if config.others:
        members = f"{config.networks} networks of {len(config.components)} configurations, probabilities averaged"
    title = config.provenance.get("study", "LSTM classifier")
    decision = (
        f"{_name(config.classes[1])} from probability {config.threshold:.6g} up" if len(config.classes) == 2 else ""
    )
    parts = [
        f"# {_escaped(str(title))}",
        f"Tells {len(config.classes)} classes of sequences apart: {names}.",
        f"An LSTM classifier of {members}, tuned for {config.metric}; {_epochs(config)}.",
        *_picture("curves", "training", pictures),
        _scores(config),
        *_picture("confusion", "confusion", pictures),
        *_by_class_and_group(config),
        *_decisions(config),
        *_calibration(config),
        *(_picture("reliability", "reliability", pictures) if config.calibration else []),
        "## Use it",
        _code("python", f"import hpo\n\nmodel = hpo.load({'.'!r})  # this folder\nprint(model.predict(X).labels)")
        + f"\n`X`: {_taken(classifier)}.",
        _code("sh", f"hpo predict . data.{'csv' if classifier.marks == 2 else 'npz'} --out predictions.csv"),
        "## Use it without hpo",
        "One sequence at a time, with torch and safetensors alone (the `lstm.` weights carry `torch.nn.LSTM`'s names):",
        _code("python", _torch_example(config)),
        *_exported(config, exported),
        "## What it is",
        _list(
            [f"input: (T, {classifier.given}) float32: {', '.join(map(_name, config.features))}{_marks(classifier)}"]
        ),
        *_networks(config, [*_temperature(config), *([decision] if decision else []), *_footprint(config)]),
        "## Where it comes from",
        _list([f"{_escaped(name)}: {_plain(value)}" for name, value in config.provenance.items()] or ["not recorded"]),
    ]
    return "\n\n".join(parts) + "\n"


def _networks(config: BundleConfig, together: list[str]) -> list[str]:
    """What happens to a sequence before the networks, what these are, by configuration, and what they have together."""
    if not config.others:
        classifier = config.classifier
        return [_list(preprocessing(config, classifier)), _list([_architecture(classifier), *together])]
    parts = []
    for i, each in enumerate(config.components):
        networks = "1 network, number" if each.members == 1 else f"{each.members} networks, numbers"
        parts.append(f"### Configuration {i + 1}: weight {each.weight:.4g}")
        parts.append(f"{networks} {_numbers(config, i)} of the weights' file:")
        parts.append(_list([*preprocessing(config, each.classifier), _architecture(each.classifier)]))
    text = "The probabilities of each configuration's networks are averaged, these averages by their weights."
    return [*parts, "### Together", text, *([_list(together)] if together else [])]


def _numbers(config: BundleConfig, component: int) -> str:
    """Which networks of the weights' file are a component's."""
    begin = sum(each.members for each in config.components[:component])
    last = begin + config.components[component].members - 1
    return f"{begin}" if last == begin else f"{begin} to {last}"


def _temperature(config: BundleConfig) -> list[str]:
    """What the probabilities go through last."""
    if config.temperature == 1:
        return []
    return [f"the probabilities p become softmax(log p / {config.temperature:.6g}): temperature scaling"]


def _footprint(config: BundleConfig) -> list[str]:
    """What a prediction takes."""
    found = config.footprint
    if found is None:
        return []
    steps = "1 step" if found.steps == 1 else f"{found.steps:,} steps"
    return [
        f"its weights take {found.size_mb:.3g} MB (10^6 bytes); a prediction of one sequence of {steps} takes "
        f"{found.latency_ms:.3g} ms on one thread of {_escaped(found.machine)}: the median of some calls at promotion"
    ]


def _epochs(config: BundleConfig) -> str:
    """Of which epoch the weights are."""
    if len(config.provenance.get("finals", ())) > 1:
        return (
            f"of each training the weights of its best epoch (of the first, whose curve this is, {config.best_epoch})"
        )
    return f"these are the weights of epoch {config.best_epoch}"


def _taken(config: ClassifierConfig) -> str:
    """What the model predicts."""
    if config.marks == 2:
        files = "`model.read(path)` for a npz, csv or parquet file, a data frame"
        arrays = '`{"X": …, "steps": …}` with (N, T, F) numbers and where the steps are (N, T)'
        return f"{files}, or {arrays}, times or numbers as in training"
    return "(N, T, F) numbers, or a list of (T, F); or `model.read(path)` for a npz, csv, parquet or .ts file"


def _marks(config: ClassifierConfig) -> str:
    """What else a step of the input holds."""
    kinds = ["whether each was observed (1) or filled (0)", "the times since each was observed before"][: config.marks]
    return "".join(f"; then {kind}" for kind in kinds)


def _name(name: str) -> str:
    """A name of the data as code: nothing in it is Markdown or HTML, whatever it holds."""
    text = legible(" ".join(name.split()) or '""', SHOWN_NAME)
    ticks = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{ticks}{text}{ticks}" if len(ticks) == 1 else f"{ticks} {text} {ticks}"


def _plain(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return _escaped(text)


def _escaped(text: str) -> str:
    """In one line, and neither HTML, nor a link, nor the end of a table's cell."""
    text = legible(" ".join(text.split()))
    return text.replace("<", "&lt;").replace("](", "]&#40;").replace("|", "\\|")


def _list(items: Sequence[str]) -> str:
    return "\n".join(f"- {item}" for item in items)


def _code(language: str, text: str) -> str:
    lines = (legible(line, len(line) + 1) for line in text.split("\n"))
    return "\n".join([f"```{language}", *lines, "```"])


def _architecture(config: ClassifierConfig) -> str:
    direction = "bidirectional " if config.bidirectional else ""
    head = f"{config.head_size} ReLU units, " if config.head_size else ""
    kind = "sigmoid" if config.classes == 2 else "softmax"
    stem = {
        "patch": f"patches of {config.folded} steps, " if config.folded > 1 else "",
        "conv": " and ".join(
            f"convolution of {kernel} steps to {config.stem_width} channels, stride {stride}"
            for _, kernel, stride in config.convolutions
        )
        + ", ",
    }.get(config.stem, "")
    skip = ", beside maximum and mean of what the LSTM reads" if config.skip else ""
    return (
        f"{stem}{config.layers}-layer {direction}LSTM of {config.hidden_size} units, {config.pooling} pooling over the "
        f"valid steps{skip}, {head}{kind}"
    )


def _picture(stem: str, text: str, pictures: Collection[str]) -> list[str]:
    return [f"![{text}]({name})" for name in pictures if name.startswith(f"{stem}.")]


def _scores(config: BundleConfig) -> str:
    """A table of every metric with its interval, and what the parts are."""
    parts = {"validation": config.validation, "test": config.test}
    known = {name: scores for name, scores in parts.items() if scores is not None}
    if not known:
        return "Its scores were not recorded."
    rows = ["| | " + " | ".join(f"{name} ({scores.sequences:,} sequences)" for name, scores in known.items()) + " |"]
    rows.append("|---|" + "---|" * len(known))
    for metric in dict.fromkeys(metric for scores in known.values() for metric in (*scores.metrics, *scores.undefined)):
        rows.append(f"| {metric} | {' | '.join(_cell(scores, metric) for scores in known.values())} |")
    flattered = "so its scores flatter the model" if config.estimate is None else "so a study's own values flatter it"
    text = (
        f"In brackets: 95 % intervals over the sequences of the part ({_methods(list(known.values()))}). The "
        f"validation part chose the hyperparameters, {flattered}; the test part was not seen "
        "before this model was final."
    )
    if "time" in config.columns:
        text += (
            f" Each part is later, by {_name(config.columns['time'])}, than what trains for it. Of rolling folds the "
            "validation scores are those of a network for each block, trained on what was before it; the last one is "
            "this model."
        )
    if any(scores.weighted for scores in known.values()):
        text += f" Sequences count by their weights, {_name(config.columns.get('weight', 'weight'))}."
    if len(config.classes) == 2:
        text += f" F1 and average precision are those of class {_escaped(config.classes[1])}."
    expected = "" if config.estimate is None else _expected(config, config.estimate) + "\n\n"
    return f"## Scores\n\n{expected}" + "\n".join(rows) + f"\n\n{text}"


def _expected(config: BundleConfig, found: Estimate) -> str:
    """How good the model is, by its finals."""
    together = "all of these trainings together" if len(config.provenance.get("finals", ())) > 1 else "one of these"
    if config.others:
        together += (
            f", with the trainings of {len(config.others)} other configurations that make them better for validation "
            "(greedy selection: Caruana et al., 2004)"
        )
    values = ", ".join(f"{value:.4f}" for value in found.values)
    low, high = found.interval
    return (
        f"Expect {config.metric} **{found.value:.4f}** on sequences like those of training, 95 % interval {low:.4f} to "
        f"{high:.4f}: the mean of {len(found.values)} trainings of this configuration on fresh seeds and fresh splits, "
        f"which nothing was chosen by ({values}; {found.method}). It was selected by {found.selected:.4f}, the best "
        f"of many values, which is too good on average. This model is {together}; each sequence's validation scores "
        "below are by the mean of those of its networks that were not trained on it."
    )


def _cell(scores: Scores, metric: str) -> str:
    value, interval = scores.metrics.get(metric), scores.intervals.get(metric)
    if value is None:
        return f"undefined: {_escaped(scores.undefined[metric])}" if metric in scores.undefined else "undefined"
    return _valued(value, interval)


def _by_class_and_group(config: BundleConfig) -> list[str]:
    """Tables of each part's classes and groups, those first in which the model fails most surely."""
    found = model_scores(config.classes, config.validation, config.test)
    parts = {"Test part": found.test, "Validation part": found.validation}
    tables = [table for title, part in parts.items() if part is not None for table in _part_tables(title, part)]
    if not tables:
        return []
    text = (
        "Each class against the rest, the surest failures first: in order of the upper end of the recall's interval "
        "(in brackets: 95 %, Clopper-Pearson). The last column is the class that its sequences are most often taken "
        "for, and how many of them."
    )
    return ["## Classes", text, *tables]


def _decisions(config: BundleConfig) -> list[str]:
    """What decisions cost, where that has chosen the threshold."""
    if config.costs is None:
        return []
    first, second = map(_name, config.classes)
    text = (
        f"To take {first} for {second} costs {config.costs.false_positive:g}, to take {second} for {first} "
        f"{config.costs.false_negative:g}. {second} is predicted from probability {config.threshold:.6g} up, where the "
        "predictions for the validation part cost least. What a decision costs on average, and what it would without a "
        "model, always the same class:"
    )
    rows = ["| | this model | always the cheaper class |", "|---|---|---|"]
    for part, scores in (("validation", config.validation), ("test", config.test)):
        if scores is not None:
            counts = scores.confusion
            rows.append(
                f"| {part} | {config.costs.mean(counts):.4g} | {config.costs.least_without_model(counts):.4g} |"
            )
    return ["## Decisions", text, "\n".join(rows)]


def _calibration(config: BundleConfig) -> list[str]:
    """What the temperature has brought, with the diagram of it."""
    if not config.calibration:
        return []
    names = [f"{part}, {when}" for part in config.calibration for when in ("before", "after")]
    found = [each for both in config.calibration.values() for each in (both.before, both.after)]
    rows = [f"| | {' | '.join(names)} |", "|---" * (1 + len(names)) + "|"]
    rows.append(f"| ECE | {' | '.join(f'{each.ece:.4f}' for each in found)} |")
    rows.append(f"| Brier score | {' | '.join(f'{each.brier:.4f}' for each in found)} |")
    kind = "as they are" if config.temperature == 1 else "milder" if config.temperature > 1 else "sharper"
    text = (
        f"Temperature scaling (Guo et al., 2017) with T = {config.temperature:.4g} leaves the networks' probabilities "
        f"{kind}; the predicted classes stay the same. T was fitted to the predictions for the validation part, each "
        "sequence's by networks that have not trained on it, so the numbers after it flatter there."
    )
    measures = (
        "ECE is the expected calibration error: by how much the probability of the most probable class is off, "
        f"averaged over {len(found[0].bins)} bins; with few sequences it is above 0 by chance, too. The Brier score is "
        "the squared distance of probabilities and truth, summed over the classes. The validation part's log-loss "
        "above is that before. A point of the diagram is a bin of sequences: how sure the model is of them, and how "
        "many it has right, with 95 % intervals (Clopper-Pearson); on the line both agree."
    )
    return ["## Calibration", text, "\n".join(rows), measures]


def _part_tables(title: str, part: PartScores) -> list[str]:
    rows = ["| class | sequences | recall | precision | F1 | taken for |", "|---|---|---|---|---|---|"]
    rows += [_class_row(each) for each in worst_first(part.by_class)[:CLASSES_SHOWN]]
    tables = [f"### {title}", "\n".join(rows)]
    if (more := len(part.by_class) - CLASSES_SHOWN) > 0:
        tables.append(f"And {more:,} classes more; the counts of all are in config.json.")
    if part.groups:
        groups = ["| sequences | accuracy |", "|---|---|"]
        groups += [f"| {g.sequences:,} | {_valued(g.accuracy, g.interval)} |" for g in part.by_group[:GROUPS_SHOWN]]
        tables += [_groups_text(part), "\n".join(groups)]
    return tables


def _groups_text(part: PartScores) -> str:
    """What the table of groups shows. Whoever gets the model is not told what they are called."""
    shown = min(GROUPS_SHOWN, len(part.by_group))
    which = f"the worst {shown} of {part.groups:,} groups" if shown < (part.groups or 0) else f"{shown} groups"
    return f"By {which} of the data (their names stay in the study's database):"


def _class_row(found: ClassScore) -> str:
    taken = found.mistaken_for
    cells = (
        _table_name(found.name),
        f"{found.sequences:,}",
        _valued(found.recall, found.recall_interval, found.undefined.get("recall")),
        _valued(found.precision, found.precision_interval, found.undefined.get("precision")),
        _valued(found.f1, None, found.undefined.get("f1")),
        "" if taken is None else f"{_table_name(taken.name)} ({taken.sequences:,})",
    )
    return f"| {' | '.join(cells)} |"


def _valued(value: float | None, interval: Interval | None, reason: str | None = None) -> str:
    """A value with its interval, or why there is none."""
    if value is None:
        return f"undefined: {reason}"
    return f"{value:.4f}" + (f" [{interval[0]:.4f}, {interval[1]:.4f}]" if interval else "")


def _table_name(name: str) -> str:
    """A name as code within a table, whose cell a bar in it does not end."""
    return _name(name).replace("|", "\\|")


def _methods(parts: Sequence[Scores]) -> str:
    """How the intervals were found: each method with its metrics."""
    by: dict[str, list[str]] = {}
    for metric, method in {name: method for scores in parts for name, method in scores.methods.items()}.items():
        by.setdefault(method, []).append(metric)
    return "; ".join(f"{', '.join(metrics)}: {_escaped(method)}" for method, metrics in by.items()) or "bootstrap"


def _torch_example(config: BundleConfig) -> str:
    """The model in plain torch."""
    head = ["import torch", "from safetensors.torch import load_file", "", 'tensors = load_file("model.safetensors")']
    code = [line for i in range(len(config.components)) for line in _component_code(config, i)]
    return "\n".join(
        [
            *head,
            *code,
            "",
            "",
            f"def probabilities(x):  # of {json.dumps(config.classes, ensure_ascii=False)}",
            *(f"    {line}" for line in _average_code(config)),
        ]
    )


def _component_code(config: BundleConfig, component: int) -> list[str]:
    """Lines of a function of one configuration's networks."""
    classifier, widest = config.components[component].classifier, config.widest.given
    narrower = [f"x = x[:, :{classifier.given}]"] if classifier.given < widest else []
    return [
        "",
        "",
        "@torch.no_grad()",
        f"def {_member_name(config, component)}(i, x):  # x: (T, {widest}) float32, one sequence without padding",
        *(f"    {line}" for line in (*narrower, *_member_code(classifier, config.temperature != 1))),
    ]


def _member_name(config: BundleConfig, component: int) -> str:
    return f"member_{component + 1}" if config.others else "member"


def _average_code(config: BundleConfig) -> list[str]:
    """Lines that give the probabilities of a sequence x from those of the networks, or from the logarithms of these."""
    k, T = config.networks, config.temperature
    if not config.others:
        if T == 1:
            return [f"return sum(member(i, x) for i in range({k})) / {k}"]
        return [f"return (torch.stack([member(i, x) for i in range({k})]).logsumexp(0) / {T!r}).softmax(0)"]
    lines, begin = ["found = []"], 0
    for i, each in enumerate(config.components):
        call, weight = f"{_member_name(config, i)}(i, x)", repr(each.weight / each.members)
        one = f"{call} * {weight}" if T == 1 else f"{call} + torch.tensor({weight}).log()"
        lines.append(f"found += [{one} for i in range({begin}, {begin + each.members})]")
        begin += each.members
    return [*lines, "return sum(found)" if T == 1 else f"return (torch.stack(found).logsumexp(0) / {T!r}).softmax(0)"]


def _member_code(c: ClassifierConfig, logs: bool) -> list[str]:
    """Lines of Python that give one member's probabilities of a sequence x, or the logarithms of these, from the
    tensors of all members."""
    width, inputs = c.hidden_size, c.inputs
    prepare = {
        f"x = x[-{c.sequence_length}:]": c.sequence_length,
        f"x, marks = x[:, :{c.features}], x[:, {c.features}:]": c.marks,
        "x = torch.cat([x, torch.diff(x, dim=0, prepend=x[:1])], 1)": c.difference,
        **_normalization_code(c),
        "x = torch.cat([x, marks], 1)": c.marks,
        f"x = torch.nn.functional.pad(x, (0, 0, 0, -len(x) % {c.folded})).reshape(-1, {inputs})": c.folded > 1,
        **_stem_code(c),
    }
    last = f"torch.cat([out[-1, :{width}], out[0, {width}:]])" if c.bidirectional else "out[-1]"
    pool = {
        "last": last,
        "mean": "out.mean(0)",
        "concat": f"torch.cat([out.amax(0), out.mean(0), {last}])",
        "max": "out.amax(0)",
        "attention": '((out @ w["attention.weight"].T + w["attention.bias"]).softmax(0) * out).sum(0)',
        "flatten": "out.flatten()",
    }[c.pooling]
    head = ['logits = w["head.weight"] @ pooled + w["head.bias"]']
    if c.head_size:
        head = ['hidden = (w["head.0.weight"] @ pooled + w["head.0.bias"]).relu()']
        head += ['logits = w["head.3.weight"] @ hidden + w["head.3.bias"]']
    return [
        'w = {name.removeprefix(f"member.{i}."): t for name, t in tensors.items() if name.startswith(f"member.{i}.")}',
        *(line for line, used in prepare.items() if used),
        f"lstm = torch.nn.LSTM({inputs}, {width}, {c.layers}, bidirectional={c.bidirectional})",
        'lstm.load_state_dict({n.removeprefix("lstm."): t for n, t in w.items() if n.startswith("lstm.")})',
        "out = lstm(x)[0]",
        f"pooled = {pool}",
        *(["pooled = torch.cat([pooled, x.amax(0), x.mean(0)])"] if c.skip else []),
        *head,
        _result_code(c.classes == 2, logs),
    ]


def _result_code(binary: bool, logs: bool) -> str:
    """The line that returns a member's probabilities or their logarithms."""
    if binary and logs:
        return "return torch.nn.functional.logsigmoid(torch.cat([-logits, logits]))"
    if binary:
        return "return torch.cat([1 - logits.sigmoid(), logits.sigmoid()])"
    return "return logits.log_softmax(0)" if logs else "return logits.softmax(0)"


def _normalization_code(c: ClassifierConfig) -> dict[str, bool]:
    """The lines that normalise x, and whether they are used."""
    channel, sequence = c.normalization == "channel", c.normalization == "sequence"
    if c.epsilon:
        return {
            f'x = (x - w["mean"]) / (w["deviation"] + {c.epsilon})': channel,
            f"x = (x - x.mean(0)) / (x.std(0, correction=0) + {c.epsilon})": sequence,
        }
    return {
        'x = torch.where(w["deviation"] == 0, 0.0, (x - w["mean"]) / w["deviation"])': channel,
        "x, mean = x.double(), x.double().mean(0)": sequence,
        "deviation = x.std(0, correction=0)": sequence,
        f"varies = deviation > {ROUNDING!r} * mean.abs()": sequence,
        "x = torch.where(varies, (x - mean) / deviation, 0.0).float()": sequence,
    }


def _stem_code(c: ClassifierConfig) -> dict[str, bool]:
    """The lines that are the stem."""
    lines = []
    for i, (_, kernel, stride) in enumerate(c.convolutions):
        left, name = max(0, (kernel - stride) // 2), f'w["stem.layers.{i}.'
        lines += [
            f"x = torch.nn.functional.pad(x.T, ({left}, -len(x) % {stride} + {kernel - stride - left}))",
            f'x = torch.nn.functional.conv1d(x[None], {name}weight"], stride={stride})[0].T',
            f'x = (x - {name}running_mean"]) / ({name}running_variance"] + {EPSILON}).sqrt()',
            f'x = (x * {name}scale"] + {name}shift"]).relu()',
        ]
    return dict.fromkeys(lines, True)


def _exported(config: BundleConfig, exported: str) -> list[str]:
    """How to run the exported graph: heading and code."""
    fixed = any(each.classifier.fixed_length for each in config.components)
    steps = config.classifier.steps if fixed else "T"
    gaps = (
        "It fills no missing values: a NaN or an infinity within a sequence's length gives NaN for that sequence. What "
        "lies beyond the length never counts. Fill gaps as below."
    )
    if config.widest.marks:
        gaps += " It takes the marks of the features, described there, behind them."
    inputs = f"values (N, {steps}, {config.widest.given}) float32, zeros after each end; lengths (N,) int64"
    if exported == "onnx":
        lines = ["import numpy as np", "import onnxruntime", ""]
        lines += ['session = onnxruntime.InferenceSession("model.onnx")', "", ""]
        lines += [f"def predict(values, lengths):  # {inputs}", '    inputs = {"values": values, "lengths": lengths}']
        lines += ["    probabilities = session.run(None, inputs)[0]  # (N, K)"]
        lines += [f"    names = np.array({json.dumps(config.classes, ensure_ascii=False)})"]
        lines += [f"    return names[{_decision(config)}], probabilities"]
        what = "The same with numpy and onnxruntime alone, many sequences at once:"
        return [what, _code("python", "\n".join(lines)), gaps]
    if exported == "pt2":
        lines = ["import torch", "", 'model = torch.export.load("model.pt2").module()']
        lines += [f"# {inputs}", "# probabilities = model(values, lengths)  # (N, K)"]
        return ["The same with torch alone, many sequences at once:", _code("python", "\n".join(lines)), gaps]
    return []


def _decision(config: BundleConfig) -> str:
    if len(config.classes) > 2:
        return "probabilities.argmax(1)"
    return f"(probabilities[:, 1].astype(np.float64) >= {config.threshold!r}).astype(int)"
