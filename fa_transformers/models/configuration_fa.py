"""Configuration fields that FA models share, and the translation of a stock checkpoint's configuration to ours."""

import difflib
import math
from typing import TYPE_CHECKING, ClassVar

from transformers import BackboneConfigMixin, PretrainedConfig, logging
from transformers.activations import ACT2FN

from .fa_checkpoint_names import translate_config

logger = logging.get_logger(__name__)

NORMALIZATIONS = ("softmax", "scaling")
KEY_FEATURES = ("copies", "sign_pairs")
POSITION_EMBEDDING_TYPES = ("absolute", "periodic", "none")
POOLINGS = ("cls", "mean")
RECOVERIES = (None, "pending", "fine_tuned", "transferred", "distilled")
PROBLEM_TYPES = (None, "regression", "single_label_classification", "multi_label_classification")
FACTORIZED_FIELDS = (
    "attention_normalization", "key_feature_size", "key_features", "learned_temperatures", "local_kernel_size",
    "local_window", "softmax_layers", "recovery",
)  # fmt: skip
# How alike a field of no meaning and one of ours must be for a warning: "local_windw" is 0.96, and of the 2,594 names
# in transformers 5.23 the nearest is "focal_windows", 0.88.
MISSPELT = 0.9
DECODER_FIELDS = ("is_decoder", "add_cross_attention")
# Above these a field is a mistake, or meant to use up the memory; no encoder comes near.
LARGEST = {
    **dict.fromkeys(("num_hidden_layers", "num_attention_heads", "num_channels", "key_feature_size"), 10**5),
    **dict.fromkeys(("local_kernel_size", "patch_size", "num_register_tokens", "type_vocab_size"), 10**5),
    **dict.fromkeys(("hidden_size", "intermediate_size", "vocab_size", "max_position_embeddings"), 10**7),
    **dict.fromkeys(("image_size", "num_labels", "embedding_size", "local_window", "position_table_size"), 10**7),
}
# Names alone: a configuration loads without torch.
_DTYPES = (
    "auto",
    "float32",
    "float",
    "float64",
    "double",
    "float16",
    "half",
    "bfloat16",
    "float8_e4m3fn",
    "float8_e5m2",
)
# What an `attn_implementation` may be. The last one names what layers that aren't softmax do anyway, so that it can be
# set for stock models and for ours alike; the others say how `softmax_layers` run.
ATTENTION_IMPLEMENTATIONS = (None, "eager", "sdpa", "factorized")
_OBJECTS = ("id2label", "label2id", "auto_map", "task_specific_params", "quantization_config")


class CheckedConfig:
    """Mixin for configurations of ours, before the class of transformers that it adds to.

    Values are checked by `check_fields`, never corrected, also those that `from_pretrained` overrides. A saved folder
    names its own code.
    """

    AUTO_MAP: ClassVar[dict[str, str]] = {}

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        # The base class applies overrides after __init__, past its checks.
        return_unused = kwargs.pop("return_unused_kwargs", False)
        config, unused = super().from_dict(config_dict, return_unused_kwargs=True, **kwargs)  # type: ignore[misc]
        config.check_fields()
        return (config, unused) if return_unused else config

    def to_dict(self):
        # A saved folder carries its own code: references to the repository that the code was loaded from are dropped.
        config_dict = super().to_dict()  # type: ignore[misc]
        if config_dict.get("auto_map"):
            config_dict["auto_map"] = {
                auto_class: reference.split("--")[-1] for auto_class, reference in config_dict["auto_map"].items()
            }
        return config_dict

    @property
    def _attn_implementation(self):
        # As the base class has it, whose property torch.compile can't reach through `super()`.
        return self._attn_implementation_internal  # type: ignore[attr-defined]

    @_attn_implementation.setter
    def _attn_implementation(self, value):
        # Refused here and not by the model, which meets it only after it was set: it would stay in the configuration.
        chosen = _check_implementations(value)
        if chosen != "factorized":
            PretrainedConfig._attn_implementation.fset(self, chosen)
        elif not hasattr(self, "_attn_implementation_internal"):
            PretrainedConfig._attn_implementation.fset(self, None)

    def check_fields(self):
        """Raise ValueError, naming the field, if a value cannot be used."""
        raise NotImplementedError

    def check_integer(self, name, minimum):
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            raise ValueError(f"`{name}` must be an integer of at least {minimum}, got {value!r:.80}.")
        if value > LARGEST.get(name, value):
            raise ValueError(f"`{name}` must be at most {LARGEST[name]:,}, got {value!r:.80}.")

    def check_number(self, name, minimum=-math.inf, maximum=math.inf):
        value = getattr(self, name)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
            raise ValueError(f"`{name}` must be a number, got {value!r}.")
        if not minimum <= value <= maximum:
            raise ValueError(f"`{name}` must be from {minimum} to {maximum}, got {value!r}.")

    def check_activation(self, name):
        value = getattr(self, name)
        if not isinstance(value, str) or value not in ACT2FN:
            raise ValueError(f"`{name}` must be one of {sorted(ACT2FN)}, got {value!r}.")

    def check_boolean(self, name):
        if not isinstance(getattr(self, name), bool):
            raise ValueError(f"`{name}` must be True or False, got {getattr(self, name)!r}.")

    def check_choice(self, name, choices):
        value = getattr(self, name)
        if value not in choices:
            raise ValueError(f"`{name}` must be one of {choices}, got {value!r}.")


class StagesConfig(BackboneConfigMixin):
    """Mixin for configurations of backbones: `out_features` and `out_indices`, of which the last stage is the default.

    Subclasses have `stage_names` and call `choose_stages` once those are known. A default follows later changes of the
    stages; what was chosen must still exist.
    """

    def choose_stages(self, out_features, out_indices):
        """Set the stages whose maps a backbone returns; ValueError unless they are there and in order."""
        self._out_features, self._out_indices = out_features, out_indices
        if out_features is None and out_indices is None:
            return
        try:
            self.set_output_features_output_indices(out_features, out_indices)
        except IndexError as error:  # the base class takes -4 of three stages for one of them
            raise ValueError(f"`out_indices` must be indices of {self.stage_names}, got {out_indices!r}.") from error

    @property
    def out_features(self):
        return self.stage_names[-1:] if self._out_features is None else self._out_features

    @out_features.setter
    def out_features(self, out_features):
        self.choose_stages(out_features, None)

    @property
    def out_indices(self):
        return [len(self.stage_names) - 1] if self._out_indices is None else self._out_indices

    @out_indices.setter
    def out_indices(self, out_indices):
        self.choose_stages(None, out_indices)

    def verify_out_features_out_indices(self):
        try:
            super().verify_out_features_out_indices()
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"`out_features` and `out_indices` must name the same stages of {self.stage_names}, in their order, "
                f"got {self._out_features!r} and {self._out_indices!r}: {error}."
            ) from error


class FactorizedFields(CheckedConfig):
    """The fields that say what a factorized layer computes, with their checks: a mixin that a configuration inherits.

    Values are checked, never corrected: a bad one raises ValueError. The configuration has `hidden_size`,
    `num_attention_heads` and `num_hidden_layers` too, under these names or by its `attribute_map`.

    Args:
        attention_normalization: "softmax" (softmax over features of Q and over positions of K, as in the paper) or
            "scaling" (Q · (Kᵀ · V) divided by the number of real positions).
        key_feature_size: features per head that Q and K are compared in. None is the head width, without parameters. An
            integer adds learned maps, which start within noise of standard deviation 0.01 per weight of the plain
            operator. Smaller than the head width is an error.
        key_features: how the learned maps start: "copies" of Q's and K's own features, or "sign_pairs", where every
            second copy is negative, as in Hedgehog; those need `key_feature_size` and "softmax" normalization.
        learned_temperatures: whether every head learns the temperature of either softmax; both start at 1.
        local_kernel_size: width of a depthwise convolution over V that is added to the output, in tokens, or in
            patches along each axis of an image. Odd; 0 is off. Starts at zero.
        local_window: reach of a softmax branch over neighbours, in tokens to each side, or in patches along each axis
            of an image. A learned gate per head mixes it with the factorized output; the window's share
            is 0.8 at the start. 0 is off.
        softmax_layers: indices of layers that keep ordinary softmax attention, whose cost is quadratic.
        recovery: where the weights stand after softmax attention was replaced: "pending" (converted, not trained since,
            so worse than the checkpoint they come from), "fine_tuned" (trained on a task since, on labels alone),
            "transferred" (every layer learned its softmax layer's outputs before fine-tuning), "distilled" (recovered
            by distillation from it) or None (nothing was replaced: trained as they are, from scratch).
    """

    STOCK_MODEL_TYPES: ClassVar[tuple[str, ...]] = ()
    if TYPE_CHECKING:
        hidden_size: int
        num_attention_heads: int
        num_hidden_layers: int
        model_type: str

    def set_factorized_fields(
        self,
        *,
        attention_normalization="softmax",
        key_feature_size=None,
        key_features="copies",
        learned_temperatures=False,
        local_kernel_size=0,
        local_window=0,
        softmax_layers=(),
        recovery=None,
    ):
        """Set the fields as they are given, unchecked."""
        self.attention_normalization = attention_normalization
        self.key_feature_size = key_feature_size
        self.key_features = key_features
        self.learned_temperatures = learned_temperatures
        self.local_kernel_size = local_kernel_size
        self.local_window = local_window
        self.softmax_layers = list(softmax_layers) if isinstance(softmax_layers, tuple) else softmax_layers
        self.recovery = recovery

    @property
    def factorized_layers(self):
        """Indices of the layers whose softmax attention is replaced."""
        return [index for index in range(self.num_hidden_layers) if index not in self.softmax_layers]

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)  # type: ignore[misc]
        return translate_config(config_dict, cls.model_type, cls.STOCK_MODEL_TYPES), kwargs

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        return super().from_dict(translate_config(config_dict, cls.model_type, cls.STOCK_MODEL_TYPES), **kwargs)

    def check_factorized_fields(self):
        """Raise ValueError, naming the field, if a value cannot be used."""
        self.check_choice("attention_normalization", NORMALIZATIONS)
        self.check_choice("key_features", KEY_FEATURES)
        if self.key_features != "copies" and (
            self.key_feature_size is None or self.attention_normalization != "softmax"
        ):
            raise ValueError(
                f'`key_features` {self.key_features!r} needs a `key_feature_size` and the "softmax" normalization.'
            )
        self.check_boolean("learned_temperatures")
        self.check_choice("recovery", RECOVERIES)
        self.check_integer("local_kernel_size", minimum=0)
        if self.local_kernel_size and self.local_kernel_size % 2 == 0:
            raise ValueError(f"`local_kernel_size` must be odd or 0, got {self.local_kernel_size}.")
        self.check_integer("local_window", minimum=0)
        if self.key_feature_size is not None:
            self.check_integer("key_feature_size", minimum=1)
            head_size = self.hidden_size // self.num_attention_heads
            if self.key_feature_size < head_size:
                raise ValueError(
                    f"`key_feature_size` must be at least the head width {head_size}, got {self.key_feature_size}."
                )
        if not isinstance(self.softmax_layers, (list, tuple)) or any(
            not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < self.num_hidden_layers
            for index in self.softmax_layers
        ):
            raise ValueError(
                f"`softmax_layers` must be a list of layer indices from 0 to {self.num_hidden_layers - 1}, "
                f"got {self.softmax_layers!r}."
            )


class FactorizedConfig(FactorizedFields, PretrainedConfig):
    """Fields of every FA encoder: those of `FactorizedFields`, checked in the same way, and these.

    Args:
        position_embedding_type: "absolute" (a table: longer text is an error, images interpolate it), "periodic"
            (position modulo the table's length, so any length runs) or "none".
        classifier_pooling: what a sequence or image classifier reads: "cls" (the first real token) or "mean" (the mean
            over the real tokens; for images, over the patches).
        kwargs: the fields of `FactorizedFields` and of transformers' `PretrainedConfig`.
    """

    def __init__(self, *, position_embedding_type="absolute", classifier_pooling="cls", **kwargs):
        self.refuse_decoders(kwargs)
        check_content(kwargs)
        warn_of_misspelt(kwargs)
        for name in DECODER_FIELDS:
            kwargs.pop(name, None)
        factorized = {name: kwargs.pop(name) for name in FACTORIZED_FIELDS if name in kwargs}
        kwargs.setdefault("auto_map", dict(self.AUTO_MAP))
        super().__init__(**kwargs)
        self.set_factorized_fields(**factorized)
        self.position_embedding_type = position_embedding_type
        self.classifier_pooling = classifier_pooling

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        cls.refuse_decoders(kwargs)
        return super().from_dict(config_dict, **kwargs)

    def check_fields(self):
        """Raise ValueError, naming the field, if a value cannot be used."""
        self.refuse_decoders(vars(self))
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"):
            self.check_integer(name, minimum=1)
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"`hidden_size` ({self.hidden_size}) must divide by `num_attention_heads` ({self.num_attention_heads})."
            )
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
            self.check_number(name, 0.0, 1.0)
        self.check_number("initializer_range", 0.0)
        self.check_number("layer_norm_eps", 0.0)
        self.check_activation("hidden_act")
        self.check_integer("num_labels", minimum=1)
        self.check_integer("chunk_size_feed_forward", minimum=0)
        self.check_choice("problem_type", PROBLEM_TYPES)
        self.check_choice("position_embedding_type", POSITION_EMBEDDING_TYPES)
        self.check_choice("classifier_pooling", POOLINGS)
        self.check_factorized_fields()

    @classmethod
    def refuse_decoders(cls, fields):
        for name in DECODER_FIELDS:
            if fields.get(name):
                raise ValueError(f"`{name}` must be False: {cls.__name__} is for encoders only.")


def warn_of_misspelt(fields):
    """Warn of each field that no model reads and whose name is nearly one of ours: it would be kept and do nothing."""
    own = (*FACTORIZED_FIELDS, "classifier_pooling")
    for name in fields:
        if name not in own and (near := difflib.get_close_matches(name, own, 1, MISSPELT)):
            logger.warning(f"`{name}` is no field of an FA configuration and has no effect: did you mean `{near[0]}`?")


def check_content(fields):
    """Raise ValueError, naming the field, for a value that transformers itself can't take and doesn't name.

    `fields`: a mapping from names to values, as a configuration's file or a call has them.
    """
    for name, value in fields.items():
        if callable(getattr(PretrainedConfig, name, None)) or name in ("check_fields", "__class__"):
            raise ValueError(f"No field can be called `{name}`, which is a method of configurations.")
        if name in LARGEST:
            for size in value if isinstance(value, list) else [value]:
                if isinstance(size, (int, float)) and not abs(size) <= LARGEST[name]:
                    raise ValueError(f"`{name}` must be at most {LARGEST[name]:,}, got {size!r:.80}.")
        wanted = None if value is None else _wanted(name, value)
        if wanted:
            raise ValueError(f"`{name}` must be {wanted}, got {value!r:.80}.")


def _check_implementations(value):
    """Return an `attn_implementation`, of a mapping of parts without those that change nothing; or raise ValueError."""
    if isinstance(value, dict):
        checked = {part: _check_implementations(own) for part, own in value.items()}
        return {part: own for part, own in checked.items() if own != "factorized"}
    if value not in ATTENTION_IMPLEMENTATIONS:
        raise ValueError(
            f"`attn_implementation` must be None, 'eager' or 'sdpa', got {value!r}. It says how `softmax_layers` run; "
            "all other layers are factorized whatever it says, and 'factorized' changes nothing."
        )
    return value


def _wanted(name, value):
    """Return what a field must hold where `value` is none of that, or else None."""
    if name in _OBJECTS and not isinstance(value, dict) and not hasattr(value, "to_dict"):
        return "a JSON object"
    if name == "id2label" and not all(str(key).isdecimal() for key in value):
        return "a JSON object whose keys are numbers"
    if name in ("dtype", "torch_dtype") and str(value).removeprefix("torch.") not in _DTYPES:
        return f"the name of a dtype of torch, one of {_DTYPES}"
    if name == "architectures" and not (isinstance(value, list) and all(isinstance(item, str) for item in value)):
        return "a list of class names"
    if name == "num_labels" and (not isinstance(value, int) or isinstance(value, bool)):
        return "an integer of at least 1"
    return None
