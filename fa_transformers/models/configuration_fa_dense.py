"""Configuration of FADense: a backbone, the pyramid on it, where attention blocks stand, and the heads."""

from transformers import AutoConfig, PretrainedConfig

from .configuration_fa import CheckedConfig
from .configuration_fa_resnet import ATTENTION_KINDS, NORM_GROUPS, FAResNetConfig, as_list
from .configuration_fa_vit import FAViTConfig

# isort: split
# Not used here: from a local folder, transformers 5.3 copies only the files that this one itself imports. The import
# can go when `setup.py` asks for a transformers that copies what those import too, as 5.23 does.
from .fa_checkpoint_names import translate_config  # noqa: F401

STAGE_PLACES = {f"res{number}": f"stage{number}" for number in (1, 2, 3, 4)}
LEVEL_PLACES = ("fp3", "fp4", "fp5")
PLACE_SETS = {
    "none": (),
    "five": ("res3", "res4", *LEVEL_PLACES),
    "seven": (*STAGE_PLACES, *LEVEL_PLACES),
}
"""The paper's named settings: its five and seven modules."""
OWN_BACKBONES = {FAResNetConfig.model_type: FAResNetConfig, FAViTConfig.model_type: FAViTConfig}
HEAD_STRIDE, MASK_STRIDE = 8, 4
"""Pixels per place of the heat map and of masks."""


class FADenseConfig(CheckedConfig, PretrainedConfig):
    """Configuration of `FADenseForObjectDetection` and `FADenseForInstanceSegmentation`, below 1 M weights by default.

    Args:
        backbone_config: configuration of the backbone, or its fields with `model_type`: "fa_resnet", "fa_vit" or a
            backbone of transformers. None is `FAResNetConfig` with its four stages. It returns four maps, taken for
            strides of 4, 8, 16 and 32 pixels, three, for 8, 16 and 32, or one for all; maps of other strides, as a
            ViT's, are resized to these.
        attention_places: places of attention blocks: "none", "five" or "seven" (the paper's settings: after stages 3 to
            4 or 1 to 4 and after all pyramid levels), or a list of "res1" ... "res4" (after a stage of "fa_resnet") and
            "fp3", "fp4", "fp5" (after the pyramid's levels of strides 8, 16 and 32). This decides the backbone's
            `attention_stages`, which must agree if they are given.
        attention_kind: "factorized", or "softmax", which is quadratic in the pixels, to compare with.
        key_channels: channels of queries and keys in each block; None is half the channels of its map.
        attention_heads: heads of each block.
        pyramid_channels: channels of the pyramid and the heads' towers; a multiple of 8.
        mask_channels: channels of the features at stride 4 that masks are read from; a multiple of 8.
        num_queries: objects that are returned for each image.
        heatmap_prior: probability of an object that the untrained heat map gives each place.
        box_loss_weight, mask_loss_weight: factors of these losses beside that of the heat map.
        kwargs: the fields of transformers' `PretrainedConfig`, such as `id2label`.

    Raises:
        ValueError: a field has a value that cannot be used; the message names it.

    Source of the places: Shen et al. 2021, arXiv:1812.01243, section 4 (modules after res3 to res4 and fp3 to fp5, and
    after res1 to res4 and fp3 to fp5).
    """

    model_type = "fa_dense"
    sub_configs = {"backbone_config": AutoConfig}
    AUTO_MAP = {
        "AutoConfig": "configuration_fa_dense.FADenseConfig",
        "AutoModelForObjectDetection": "modeling_fa_dense.FADenseForObjectDetection",
        "AutoModelForInstanceSegmentation": "modeling_fa_dense.FADenseForInstanceSegmentation",
        "AutoModelForImageSegmentation": "modeling_fa_dense.FADenseForInstanceSegmentation",
    }

    def __init__(
        self,
        backbone_config=None,
        attention_places=LEVEL_PLACES,
        attention_kind="factorized",
        key_channels=None,
        attention_heads=1,
        pyramid_channels=64,
        mask_channels=16,
        num_queries=100,
        heatmap_prior=0.05,
        box_loss_weight=2.0,
        mask_loss_weight=2.0,
        **kwargs,
    ):
        kwargs.setdefault("auto_map", dict(self.AUTO_MAP))
        super().__init__(**kwargs)
        self.attention_places = as_list(attention_places)
        self.attention_kind = attention_kind
        self.key_channels = key_channels
        self.attention_heads = attention_heads
        self.pyramid_channels = pyramid_channels
        self.mask_channels = mask_channels
        self.num_queries = num_queries
        self.heatmap_prior = heatmap_prior
        self.box_loss_weight = box_loss_weight
        self.mask_loss_weight = mask_loss_weight
        self._check_places()
        self.backbone_config = self._make_backbone(backbone_config)
        self.check_fields()

    @property
    def places(self):
        """The places of attention blocks, a named setting written out."""
        return (
            list(PLACE_SETS[self.attention_places]) if isinstance(self.attention_places, str) else self.attention_places
        )

    @property
    def stages_with_blocks(self):
        """Names of the backbone's stages with a block."""
        return [stage for place, stage in STAGE_PLACES.items() if place in self.places]

    def _make_backbone(self, backbone):
        blocks = {
            "attention_stages": self.stages_with_blocks,
            "attention_kind": self.attention_kind,
            "key_channels": self.key_channels,
            "attention_heads": self.attention_heads,
        }
        if backbone is None:
            return FAResNetConfig(out_features=list(STAGE_PLACES.values()), **blocks)
        if isinstance(backbone, dict):
            fields = dict(backbone)
            model_type = fields.pop("model_type", None)
            if model_type == FAResNetConfig.model_type:
                fields = blocks | fields
            if model_type in OWN_BACKBONES:
                return OWN_BACKBONES[model_type](**fields)
            if not isinstance(model_type, str):
                raise ValueError(f"`backbone_config` must have a `model_type`, got {backbone!r}.")
            return AutoConfig.for_model(model_type, **fields)
        return backbone

    def check_fields(self):
        self._check_places()
        if not isinstance(self.backbone_config, PretrainedConfig) or not hasattr(self.backbone_config, "out_features"):
            raise ValueError(
                "`backbone_config` must be the configuration of a backbone, with `out_features`, got "
                f"{type(self.backbone_config).__name__}."
            )
        if len(self.backbone_config.out_features) not in (1, 3, 4):
            raise ValueError(
                "`backbone_config` must return one, three or four maps, got `out_features` "
                f"{self.backbone_config.out_features}."
            )
        stages = getattr(self.backbone_config, "attention_stages", [])
        if stages != self.stages_with_blocks:
            raise ValueError(
                f"`attention_places` puts blocks after the backbone's stages {self.stages_with_blocks}, but "
                f"`backbone_config` ({self.backbone_config.model_type}) has them after {stages}. Only fa_resnet can "
                'have any; say where by `attention_places` alone, as "res1" to "res4".'
            )
        for name in ("attention_heads", "pyramid_channels", "mask_channels", "num_queries", "num_labels"):
            self.check_integer(name, minimum=1)
        for name in ("pyramid_channels", "mask_channels"):
            if getattr(self, name) % NORM_GROUPS:
                raise ValueError(f"`{name}` must be a multiple of {NORM_GROUPS}, got {getattr(self, name)}.")
        if self.key_channels is not None:
            self.check_integer("key_channels", minimum=1)
            if self.key_channels % self.attention_heads:
                raise ValueError(f"`key_channels` ({self.key_channels}) must be a multiple of `attention_heads`.")
        if self.pyramid_channels % self.attention_heads:
            raise ValueError(f"`attention_heads` ({self.attention_heads}) must divide `pyramid_channels`.")
        self.check_number("heatmap_prior", 1e-6, 0.5)
        self.check_number("box_loss_weight", 0.0)
        self.check_number("mask_loss_weight", 0.0)

    def _check_places(self):
        """Raise ValueError unless the places of blocks and their kind are known."""
        self.check_choice("attention_kind", ATTENTION_KINDS)
        places, known = self.attention_places, (*STAGE_PLACES, *LEVEL_PLACES)
        is_known = (
            places in PLACE_SETS
            if isinstance(places, str)
            else isinstance(places, list) and all(place in known for place in places)
        )
        if not is_known:
            raise ValueError(
                f"`attention_places` must be one of {list(PLACE_SETS)}, or a list of names from {known}, got "
                f"{places!r}."
            )
