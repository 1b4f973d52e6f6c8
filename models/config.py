"""What fixes a network and its training: `ClassifierConfig` and `TrainingConfig`, without torch or numpy."""

from __future__ import annotations

from dataclasses import dataclass, field

from hpo.errors import StudyFault
from hpo.models.fields import allowed, check, rules

FLOAT32_LEAST, FLOAT32_MOST = 2.0**-126, 2.0**128 - 2.0**104  # what a step computes with: less is 0, more infinite


class ClassifierError(StudyFault):
    """The classifier's configuration does not fit itself or the data."""


class TrainingError(StudyFault):
    """The training configuration is out of range or does not fit the data."""


@dataclass(frozen=True)
class ClassifierConfig:
    """What fixes a network's shape and arithmetic. JSON-able. Raises ClassifierError."""

    features: int = field(metadata=allowed(int, low=1))  # F, channels of the data
    # K; two classes share one logit. Scores are of K^2 counts, and a label of thousands of values is rather an id
    classes: int = field(metadata=allowed(int, low=2, high=1_000))
    steps: int = field(metadata=allowed(int, low=1))  # T, the longest training sequence; `flatten` needs exactly T
    hidden_size: int = field(default=64, metadata=allowed(int, low=1))  # H, units a direction and layer
    layers: int = field(default=1, metadata=allowed(int, low=1))  # stacked LSTM layers
    # between layers, and inside a two-layer head
    dropout: float = field(default=0.0, metadata=allowed(float, low=0, high=1, below=True))
    bidirectional: bool = field(default=False, metadata=allowed(bool))  # D = 2
    pooling: str = field(
        default="last", metadata=allowed(str, names=("last", "mean", "max", "attention", "concat", "flatten"))
    )  # of the last layer's outputs over the steps; concat: max, mean and last, one after another
    # a skip connection around the LSTM: what it reads goes to the head, too, as maximum and mean over the steps
    skip: bool = field(default=False, metadata=allowed(bool))
    # 0: one linear layer; else linear, ReLU, dropout, linear of this width
    head_size: int = field(default=0, metadata=allowed(int, low=0))
    # what stands before the LSTM: nothing; steps folded into patches; convolutions (see hpo.models.stem)
    stem: str = field(default="patch", metadata=allowed(str, names=("none", "patch", "conv")))
    patch_length: int = field(default=1, metadata=allowed(int, low=1))  # P, consecutive steps folded into the features
    stem_layers: int = field(default=1, metadata=allowed(int, low=1, high=4))  # convolutions
    stem_width: int = field(default=64, metadata=allowed(int, low=1))  # W, channels of each
    # k, steps that each sees; the first one no fewer than its stride, so that no step goes unseen
    stem_kernel: int = field(default=5, metadata=allowed(int, low=1))
    stem_stride: int = field(default=2, metadata=allowed(int, low=1))  # R, of the first one; the others take every step
    # interpolate: what is missing is filled, and that is all; mask: the network is told which values were observed, too
    missing: str = field(default="interpolate", metadata=allowed(str, names=("interpolate", "mask")))
    # with mask: the usual distance of two steps in training, in whose unit it is told the time since each feature was
    # last observed; 0: it is not
    interval: float = field(default=0.0, metadata=allowed(float, low=0))
    # each feature a second time, as what a step adds to the one before it
    difference: bool = field(default=False, metadata=allowed(bool))
    sequence_length: int = field(default=0, metadata=allowed(int, low=0))  # keep only the last so many steps; 0: all
    # by nothing, the training part's statistics of each channel, or each sequence's own
    normalization: str = field(default="none", metadata=allowed(str, names=("none", "channel", "sequence")))
    # added to a deviation before it divides. 0: nothing is, and a feature that does not vary becomes 0
    epsilon: float = field(default=0.0, metadata=allowed(float, low=0))

    def __post_init__(self) -> None:
        check(self, ClassifierError)

    @property
    def kept_steps(self) -> int:
        """T after cropping to `sequence_length`."""
        return min(self.steps, self.sequence_length) if self.sequence_length else self.steps

    @property
    def fixed_length(self) -> bool:
        """Whether every sequence must have exactly `steps` steps: `flatten` without a crop to fewer."""
        return self.pooling == "flatten" and self.kept_steps == self.steps

    @property
    def marks(self) -> int:
        """How many channels of each feature say what was observed, and when."""
        return 0 if self.missing == "interpolate" else 1 + (self.interval > 0)

    @property
    def given(self) -> int:
        """Numbers of a step that the network is given: all features, then each kind of their marks."""
        return self.features * (1 + self.marks)

    @property
    def scaled(self) -> int:
        """Channels that normalisation scales: the features, then their differences. Marks follow them as they are."""
        return self.features * (1 + self.difference)

    @property
    def channels(self) -> int:
        """C, numbers of a step once differences were taken."""
        return self.scaled + self.features * self.marks

    @property
    def folded(self) -> int:
        """P where steps are folded into patches, else 1."""
        return self.patch_length if self.stem == "patch" else 1

    @property
    def reduction(self) -> int:
        """Steps of the data that one of the LSTM's stands for."""
        return self.stem_stride if self.stem == "conv" else self.folded

    @property
    def convolutions(self) -> list[tuple[int, int, int]]:
        """Of each of the stem's convolutions: channels, k, stride."""
        found: list[tuple[int, int, int]] = []
        for layer in range(self.stem_layers if self.stem == "conv" else 0):
            stride = 1 if layer else self.stem_stride
            found.append((self.stem_width if layer else self.channels, max(self.stem_kernel, stride), stride))
        return found

    @property
    def inputs(self) -> int:
        """Numbers that the LSTM reads at a step."""
        return self.stem_width if self.stem == "conv" else self.channels * self.folded

    @property
    def patches(self) -> int:
        """S, the LSTM's steps of the longest sequence: a last, partial patch or stride counts."""
        return -(-self.kept_steps // self.reduction)

    @property
    def width(self) -> int:
        """D*H, numbers that the LSTM gives at a step."""
        return self.hidden_size * (1 + self.bidirectional)

    @property
    def pooled(self) -> int:
        """Numbers of a sequence that the head reads."""
        outputs = self.width * {"flatten": self.patches, "concat": 3}.get(self.pooling, 1)
        return outputs + 2 * self.inputs * self.skip

    @property
    def outputs(self) -> int:
        """Logits a sequence: 1 when binary, else K."""
        return 1 if self.classes == 2 else self.classes


@dataclass(frozen=True)
class TrainingConfig:
    """How one trial's weights are found. JSON-able. Raises TrainingError."""

    # the validation metric: see hpo.models.metrics
    metric: str = field(
        metadata=allowed(
            str,
            names=("accuracy", "balanced_accuracy", "f1", "macro_f1", "auroc", "average_precision", "log_loss"),
        )
    )
    epochs: int = field(default=50, metadata=allowed(int, low=1))  # at most
    patience: int | None = 10  # epochs without a better metric before the end; None: never end early
    batch_size: int = field(default=32, metadata=allowed(int, low=1))  # sequences
    optimizer: str = field(default="adamw", metadata=allowed(str, names=("adamw", "adam", "rmsprop", "sgd")))
    learning_rate: float = field(default=1e-3, metadata=allowed(float, low=FLOAT32_LEAST, high=FLOAT32_MOST))
    weight_decay: float = field(default=0.0, metadata=allowed(float, low=0, high=FLOAT32_MOST))
    # largest norm of a step's gradients; 0: no limit
    gradient_clip: float = field(default=1.0, metadata=allowed(float, low=0, high=FLOAT32_MOST))
    # of the learning rate
    schedule: str = field(default="constant", metadata=allowed(str, names=("constant", "cosine", "plateau")))
    # balanced: weigh each class by the inverse of its share
    class_weight: str = field(default="none", metadata=allowed(str, names=("none", "balanced")))
    # of two classes: half, 0.5; chosen, the best on validation data
    threshold: str = field(default="half", metadata=allowed(str, names=("half", "chosen")))
    # share of a label that is spread over all classes
    label_smoothing: float = field(default=0.0, metadata=allowed(float, low=0, high=1, below=True))
    # a of Beta(a, a), of which the shares are in which a sequence and its label are mixed with others (Zhang et al.,
    # 2018); 0: they are not
    mixup: float = field(default=0.0, metadata=allowed(float, low=0, high=100))
    # deviation of the noise that is added to a feature, in deviations of the feature, and of the factor, around 1, that
    # a sequence's feature is multiplied by
    jitter: float = field(default=0.0, metadata=allowed(float, low=0, high=FLOAT32_MOST))
    # bfloat16 is autocast
    precision: str = field(default="float32", metadata=allowed(str, names=("float32", "bfloat16")))
    seed: int = 0

    def __post_init__(self) -> None:
        check(self, TrainingError)


EARLIER_EPSILON = 1e-5  # of what earlier versions trained; signals of 1e-6 (tesla, strain) disappear in it
METRICS = rules(TrainingConfig)["metric"].names
STEM = ("stem", "stem_layers", "stem_width", "stem_kernel", "stem_stride")  # fields of ClassifierConfig
PRECISIONS = rules(TrainingConfig)["precision"].names
