"""The sections of a run's configuration: typed values, one clear error for every mistake."""

import difflib
import math
from typing import Annotated, Any, Literal, get_args, get_type_hints

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from data.paths import expand_path
from trainer.errors import ConfigError


def _expand_source(text: str) -> str:
    prefix, colon, name = text.partition(":")
    return f"{prefix}:{expand_path(name)}" if colon else text


# A path as a user writes it; and `hf:` or `timm:` before a name or a folder.
PathText = Annotated[str, AfterValidator(expand_path)]
SourceText = Annotated[str, AfterValidator(_expand_source)]
_PATH_SETTINGS_OF_METHODS = ("method.external_teacher",)


class Section(BaseModel):
    """Base of every configuration section: unknown keys are errors, values are frozen after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


class ModelConfig(Section):
    """Towers. `name` is an architecture of `models.registry`, `timm:<model>` or `hf:<hub name or folder>`."""

    name: SourceText
    # A text tower of transformers, `hf:<hub name or folder>` or `hf:builtin/bert_base`; None: the architecture's own.
    text_name: SourceText | None = None
    embed_dim: int | None = Field(None, ge=1)
    image_size: int | None = Field(None, ge=8)
    context_length: int = Field(77, ge=4)
    image_pooling: Literal["auto", "cls", "mean", "pooler"] = "auto"
    text_pooling: Literal["auto", "cls", "mean", "last", "pooler"] = "auto"
    image_projection: Literal["linear", "none"] = "linear"
    text_projection: Literal["linear", "none"] = "linear"
    text_projection_bias: bool = False
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"
    # Random start: CLIP's, or that of DeCLIP's released code (see `models.registry.build_model`).
    init: Literal["clip", "declip"] = "clip"
    # Of pixels in [0, 1]; ImageNet's, as DeCLIP.
    pixel_mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    pixel_std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    # Weights to start from: of the whole model, or of the backbones of timm and Hugging Face towers alone.
    pretrained: PathText | None = None
    pretrained_format: Literal["auto", "native", "openclip", "openai", "huggingface", "declip", "slip"] = "auto"
    image_pretrained: PathText | bool = False
    text_pretrained: bool = False
    lock_image: bool = False
    lock_image_unlocked_groups: int = Field(0, ge=0)
    lock_text: bool = False
    lock_text_unlocked_groups: int = Field(0, ge=0)
    freeze_patch_embed: bool = False
    activation_checkpointing: bool = False
    patch_dropout: float = Field(0.0, ge=0.0, lt=1.0)
    batch_norm: Literal["sync", "local"] = "sync"


# Keys of `model` that say where weights come from, not what the model is.
WEIGHT_SETTINGS = frozenset(("pretrained", "pretrained_format", "image_pretrained", "text_pretrained"))


class DataConfig(Section):
    """Shards, order and views.

    `train` is a path, brace range, list, URL, built-in name, {pattern: weight} or {name: {path: ..., weight: ...}}.
    """

    train: str | list[str] | dict[str, float | dict[str, Any]]
    # One augmentation per name in `method.image_views`: the name of a preset, or {preset: ..., field: value}.
    augmentation: dict[str, str | dict[str, Any]] = {}
    workers: int | Literal["auto"] = "auto"
    prefetch: int = Field(4, ge=1)
    shuffle_window: int = Field(8192, ge=1)
    lanes: int | Literal["auto"] = "auto"
    # `auto`: CLIP's, or the one that belongs to a Hugging Face text tower. Also `clip` and `hf:<hub name or folder>`.
    tokenizer: SourceText = Field("auto", pattern="^(auto|clip|hf:.+)$")
    # CLIP's tokenizer only: DeCLIP's id convention, with a mask token.
    mask_token: bool = False
    synonyms: PathText | None = None
    max_bad_fraction: float = Field(0.01, ge=0.0, le=1.0)
    max_image_pixels: int = Field(89_478_485, ge=1)
    max_caption_chars: int = Field(4096, ge=1)
    # Which of several captions of a sample is trained on.
    caption: Literal["random", "first"] = "random"
    allow_pipe: bool = False
    cache_dir: PathText | None = None
    cache_gib: float = Field(100.0, gt=0.0)

    @field_validator("train", mode="before")
    @classmethod
    def _check_mixture(cls, train: Any) -> Any:
        if not isinstance(train, dict):
            return train
        return {str(name): _check_source(str(name), value) for name, value in train.items()}


def _check_source(name: str, value: Any) -> float | dict[str, Any]:
    """A source of a mixture: its weight, or where it is and its weight."""
    if not isinstance(value, dict):
        return _check_weight(name, value)
    unknown = sorted(set(map(str, value)) - {"path", "weight"})
    if unknown or "path" not in value:
        raise ValueError(f"the source '{name}' takes path and weight, got {', '.join(map(str, value)) or 'nothing'}")
    path = value["path"]
    paths = path if isinstance(path, list) else [path]
    if not paths or not all(isinstance(entry, str) and entry for entry in paths):
        raise ValueError(f"the path of the source '{name}' must be a path or a list of paths, got {path!r}")
    return {"path": path, "weight": _check_weight(name, value.get("weight", 1.0))}


def _check_weight(name: str, weight: Any) -> float:
    try:
        number = float(weight)
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(weight, bool) or not 0.0 < number < math.inf:
        raise ValueError(f"the weight of the source '{name}' must be a number above 0, got {weight!r}")
    return number


class EvalSet(Section):
    """One evaluation set: a folder in CLIP_benchmark's layout, an image folder, or shards for retrieval only."""

    data: PathText
    tasks: list[Literal["zero_shot", "retrieval", "linear_probe", "few_shot", "bias"]] = ["zero_shot", "retrieval"]
    max_samples: int | None = Field(None, ge=1)
    # A file with one per line, or a list that open_clip ships: `imagenet`; `openai_imagenet`, `simple_imagenet`.
    class_names: PathText | None = None
    templates: PathText | None = None
    # The bias probe: class names by category, and the key of the .json member that tells a picture's group.
    probe: dict[str, list[str]] = {}
    probe_group: str = "group"


class EvalConfig(Section):
    """In-loop evaluation, spread over all ranks. `every: 0` evaluates only at the end."""

    every: int = Field(0, ge=0)
    at_end: bool = True
    batch_size: int = Field(256, ge=1)
    # Shorter side before the centre crop; None resizes straight to the model's image size.
    resize_size: int | None = Field(None, ge=8)
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    sets: dict[str, EvalSet] = {}


class TrainConfig(Section):
    """Length, batch and numerics of a run.

    `precision`: what towers and heads compute in; parameters, losses and the optimizer are fp32. `tf32` is fp32 whose
        products a GPU rounds to TF32; `fp32` rounds nowhere. `auto` is bf16 where the hardware is fast with it.
    `communication_dtype`: in which features travel between ranks; `gradient_dtype`: gradients, at every ZeRO stage.
    `timeout_minutes`: a step, save or evaluation set that makes no progress for so long ends the job on all ranks.
    `verify_replicas_every`: compare what must be equal on all ranks every so many steps; 0 never does.
    `cpu_threads`: of each rank for its own work on a CPU, where OMP_NUM_THREADS does not say; `auto` leaves a core to
        each loader worker, `all` takes the cores and has the workers run in what is left of them.
    `ema_decay`: keep a moving average of the weights with this decay, evaluate it, and export it by default.
    """

    steps: int = Field(ge=1)
    stop_after: int | None = Field(None, ge=1)
    global_batch_size: int = Field(ge=2)
    micro_batch_size: int | Literal["auto"] = "auto"
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = "auto"
    communication_dtype: Literal["fp32", "bf16"] = "fp32"
    gradient_dtype: Literal["fp32", "bf16"] = "fp32"
    seed: int = Field(0, ge=0, lt=2**31)
    log_every: int = Field(10, ge=1)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    compile: bool = False
    cpu_threads: Literal["auto", "all"] = "auto"
    timeout_minutes: float = Field(30.0, gt=0.0)
    verify_replicas_every: int = Field(0, ge=0)
    ema_decay: float | None = Field(None, gt=0.0, lt=1.0)


class GroupConfig(Section):
    """How the parameters of one module are trained, where not like the others; None leaves a thing as it is."""

    # Over `optimizer.lr` and both ends of the schedule; 0 leaves the module as it starts.
    lr_factor: float | None = Field(None, ge=0.0)
    weight_decay: float | None = Field(None, ge=0.0)

    @model_validator(mode="after")
    def _check(self) -> "GroupConfig":
        if self.lr_factor is None and self.weight_decay is None:
            raise ValueError("sets nothing; give lr_factor, weight_decay or both, or leave the module out")
        return self


class OptimizerConfig(Section):
    """`auto`: torch's fused AdamW, or DeepSpeed's CPUAdam under offload.

    `no_decay`: kinds of parameters that do not decay, wherever they are: gains and biases of `norms`, `biases` of other
    layers, the packed `attention_biases` of transformers, and `temperatures`, which are all parameters of one number.
    `groups`: modules of the method, by name, that are trained unlike the rest; the innermost counts.
    """

    name: Literal["auto", "adamw", "fused_adam", "apex_fused_adam", "cpu_adam", "sgd"] = "auto"
    lr: float = Field(gt=0.0)
    betas: tuple[Annotated[float, Field(ge=0.0, lt=1.0)], Annotated[float, Field(ge=0.0, lt=1.0)]] = (0.9, 0.98)
    eps: float = Field(1e-8, gt=0.0)
    momentum: float = Field(0.9, ge=0.0, lt=1.0)
    nesterov: bool = True
    weight_decay: float = Field(0.1, ge=0.0)
    no_decay: list[Literal["norms", "biases", "attention_biases", "temperatures"]] = [
        "norms",
        "biases",
        "attention_biases",
        "temperatures",
    ]
    groups: dict[str, GroupConfig] = {}
    gradient_clipping: float = Field(0.0, ge=0.0)


class ScheduleConfig(Section):
    """Linear warm-up from `start_lr` to `optimizer.lr`, then cosine to `end_lr` at `train.steps`."""

    warmup_steps: int = Field(0, ge=0)
    start_lr: float = Field(0.0, ge=0.0)
    end_lr: float = Field(0.0, ge=0.0)


class CheckpointConfig(Section):
    """`every: 0` saves only at the end; `keep_every` keeps each checkpoint whose step it divides."""

    every: int = Field(0, ge=0)
    keep_last: int = Field(3, ge=1)
    keep_every: int = Field(0, ge=0)


class GuardConfig(Section):
    """When a run goes back to its last good checkpoint and leaves out the samples it saw since.

    `max_skipped` steps in a row without finite gradients or, where `spike_factor` is not 0, `spike_steps` in a row with
    a loss above the median of the last `spike_window` good ones by `spike_factor` times their spread (scaled median
    absolute deviation, at least 1 % of the median). Looked at on logged steps. Going back more than `max_rollbacks`
    times ends the run.
    """

    max_skipped: int = Field(20, ge=1)
    spike_factor: float = Field(0.0, ge=0.0)
    spike_window: int = Field(200, ge=2)
    spike_steps: int = Field(10, ge=1)
    max_rollbacks: int = Field(3, ge=0)


class LoggingConfig(Section):
    """Where metrics go besides the console and metrics.jsonl."""

    tensorboard: bool = True
    wandb_project: str | None = None


class RunConfig(Section):
    """Everything a run is made of. `method` is validated by the method it names (`trainer.methods`)."""

    recipe: str = ""
    model: ModelConfig
    method: dict[str, Any]
    data: DataConfig
    eval: EvalConfig = EvalConfig()
    train: TrainConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig = ScheduleConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    guard: GuardConfig = GuardConfig()
    logging: LoggingConfig = LoggingConfig()

    @model_validator(mode="after")
    def _check(self) -> "RunConfig":
        if "name" not in self.method:
            raise ValueError("method.name is missing")
        if self.schedule.warmup_steps > self.train.steps:
            raise ValueError(
                f"schedule.warmup_steps {self.schedule.warmup_steps} is longer than train.steps {self.train.steps}; "
                "shorten the warm-up or train longer"
            )
        micro = self.train.micro_batch_size
        if micro != "auto" and (micro < 1 or self.train.global_batch_size % micro):
            raise ValueError(
                f"train.micro_batch_size {micro} does not divide train.global_batch_size "
                f"{self.train.global_batch_size}; use 'auto' or a divisor"
            )
        return self


def validate_section(section: type[Section], values: dict[str, Any], prefix: str = "") -> Any:
    """Validate a section, or the whole tree of them, with errors prefixed by its place.

    Raises:
        ConfigError: Unknown key, wrong type, value out of range; names the key, the value and the fix.
    """
    try:
        return section.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_one_line(error, section, prefix)) from None


def holds_path(dotted: str) -> bool:
    """Whether a dotted key is a path, a pattern or a source: text that is not to be read as YAML."""
    kind: Any = RunConfig
    for part in dotted.split("."):
        if isinstance(kind, type) and issubclass(kind, Section):
            kind = get_type_hints(kind, include_extras=True).get(part)
        else:
            # A mapping of names of the user's to sections.
            kind = next(iter(get_args(kind)[1:]), None)
    marks = [mark for choice in (kind, *get_args(kind)) for mark in getattr(choice, "__metadata__", ())]
    return any(isinstance(mark, AfterValidator) for mark in marks) or dotted in _PATH_SETTINGS_OF_METHODS


def _one_line(error: ValidationError, model: type[BaseModel], prefix: str = "") -> str:
    first = error.errors()[0]
    location = [str(part) for part in first["loc"] if not str(part).startswith(("function-", "literal["))]
    # Members of a union report their type name as the last part; the key above it is what the user wrote.
    while location and (location[-1] in ("int", "str", "float", "bool") or location[-1].startswith(("dict[", "list["))):
        location.pop()
    key = prefix + ".".join(location)
    if first["type"] == "extra_forbidden":
        location = [str(part) for part in first["loc"]]
        key = prefix + ".".join(location)
        names = _field_names(model, location[:-1])
        close = difflib.get_close_matches(location[-1], names, n=1)
        hint = f"did you mean '{prefix}{'.'.join([*location[:-1], close[0]])}'?" if close else f"known: {names}"
        return f"unknown key '{key}': {hint}"
    if first["type"] == "missing":
        return f"'{key}' is missing: add it to the recipe or pass --{key} VALUE"
    if first["type"] == "value_error":
        reason = str(first["ctx"]["error"])
        return f"{key}: {reason}" if key else reason
    given = repr(first["input"])
    return f"{key}: got {given[:80]}, but {first['msg'][0].lower()}{first['msg'][1:]}"


def _field_names(model: type[BaseModel], location: list[str]) -> list[str]:
    for part in location:
        field = model.model_fields.get(part)
        if field is None or not isinstance(field.annotation, type) or not issubclass(field.annotation, BaseModel):
            return []
        model = field.annotation
    return list(model.model_fields)
