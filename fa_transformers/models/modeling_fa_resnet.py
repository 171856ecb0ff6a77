"""FAResNet: ResNet as a backbone with factorized attention blocks after chosen stages.

Paper: Shen et al. 2021, "Efficient Attention: Attention with Linear Complexities", arXiv:1812.01243, whose detectors
have such blocks after stages of a ResNet. The stages are transformers' own, with the names of stock checkpoints.
"""

import copy

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from transformers import ResNetBackbone
from transformers.modeling_outputs import BackboneOutput

from .configuration_fa_resnet import NORM_GROUPS, FAResNetConfig
from .fa_block import BlockProjection, insert_block
from .fa_validation import is_tracing

# isort: split
# Not used here: from a local folder, transformers 5.3 copies only the files that this one itself imports. A test keeps
# the list whole; it can go when `setup.py` asks for a transformers that copies what those import too, as 5.23 does.
from .configuration_fa import CheckedConfig  # noqa: F401
from .fa_attention import factorized_attention  # noqa: F401
from .fa_attention_blocked import blocked_attention  # noqa: F401
from .fa_attention_triton import why_unsupported  # noqa: F401
from .fa_checkpoint_names import translate_vit_name  # noqa: F401
from .fa_context import Workspace  # noqa: F401
from .fa_packed import PackedDocuments  # noqa: F401
from .fa_triton_kernels import triton  # noqa: F401

STRIP_NUMBERS = 2**21
"""Numbers that CPUs compute at once of a large map: what lies between the convolutions stays in caches, and in memory
that is used again."""


def group_norm(channels: int) -> nn.GroupNorm:
    """Make a norm over groups of two channels at least, so that maps of a single place have a deviation."""
    return nn.GroupNorm(min(NORM_GROUPS, channels // 2), channels)


def is_local(network: nn.Module) -> bool:
    """Return True where a part of a map can be computed alone: no gradients are recorded, no norm has statistics of the
    map that it is given, and no hook, nor a method in place of a layer's own, waits for a whole one."""
    if torch.is_grad_enabled() or is_tracing():
        return False
    return not any(
        module.training
        or isinstance(module, nn.GroupNorm)
        or (isinstance(module, nn.BatchNorm2d) and module.running_mean is None)
        or module._forward_hooks
        or module._forward_pre_hooks
        or "forward" in vars(module)
        for module in network.modules()
    )


def in_strips(layer: nn.Module, x: Tensor, stride: int) -> Tensor:
    """Run the stem or a residual layer on a map [B, C, H, W] in strips of its rows, which gives what it gives at once.

    A strip is seen with the rows around it that its places are computed from. Within two strides these are all: of the
    stem's 7×7 convolution and 3×3 pooling as of two 3×3 convolutions, whichever of them has the stride.
    """
    height, halo = x.shape[2], 2 * stride
    layer = fold_norms(layer)
    rows = max(STRIP_NUMBERS // x[:, :, 0].numel(), 16 * halo) // stride * stride
    strips = []
    for start in range(0, height, rows):
        first = max(start - halo, 0)
        strip = layer(x[:, :, first : start + rows + halo])
        strips.append(strip[:, :, (start - first) // stride :][:, :, : rows // stride])
    return torch.cat(strips, dim=2) if len(strips) > 1 else strips[0]


def fold_norms(layer: nn.Module) -> nn.Module:
    """Return a copy of the stem or a residual layer whose convolutions do what their batch norms do in evaluation.

    Its rectifiers work in place, as nothing reads again what they are given. What isn't changed is the layer's own, and
    not copied: a copy in depth would take longer than the convolutions of a small strip.
    """
    layer = copy.copy(layer)
    layer._modules = {name: None if child is None else fold_norms(child) for name, child in layer._modules.items()}
    convolution, norm = (layer._modules.get(name) for name in ("convolution", "normalization"))
    if type(convolution) is nn.Conv2d and isinstance(norm, nn.BatchNorm2d):
        mean, variance = norm.running_mean, norm.running_var
        assert mean is not None and variance is not None  # `is_local` says so
        weight, bias = fuse_conv_bn_weights(
            convolution.weight, convolution.bias, mean, variance, norm.eps, norm.weight, norm.bias
        )
        convolution._parameters = {"weight": weight, "bias": bias}  # of the copy that it is by now
        layer._modules["normalization"] = nn.Identity()
    if isinstance(layer, nn.ReLU):
        layer.inplace = True
    return layer


class FAResNetBackbone(ResNetBackbone):
    """The backbone: images [B, channels, height, width] -> maps of chosen stages.

    `from_pretrained` reads folders of stock ResNets, backbones and classifiers alike: only the blocks are missing
    there, which start as the identity, so that the maps equal the stock network's until the blocks are trained.
    """

    config_class = FAResNetConfig

    def __init__(self, config: FAResNetConfig):
        config.check_fields()
        super().__init__(config)
        widths = dict(zip(config.stage_names, self.num_features, strict=True))
        self.attention_blocks = nn.ModuleDict(
            {
                name: insert_block(config.attention_kind, widths[name], config.key_channels, config.attention_heads)
                for name in config.attention_stages
            }
        )
        if config.norm_type == "group":
            for module in list(self.modules()):
                for name, child in module.named_children():
                    if isinstance(child, nn.BatchNorm2d):
                        setattr(module, name, group_norm(child.num_features))
        self.post_init()

    @property
    def out_features(self):
        return self.config.out_features

    @property
    def out_indices(self):
        return self.config.out_indices

    @torch.no_grad()
    def _init_weights(self, module):
        if isinstance(module, BlockProjection):
            module.reset_parameters()
        else:
            super()._init_weights(module)

    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> BackboneOutput | tuple:
        """Run the stages, each with its block, and collect the maps of `out_features`, finest first.

        Args:
            pixel_values: [B, channels, height, width], any height and width; a map has a place for each begun stride.
            output_hidden_states: also return the maps of all stages.
            output_attentions: ignored, as by stock ResNets: there are no attention maps.
            return_dict: False returns a tuple.
            kwargs: ignored, as by stock ResNets.
        """
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        is_large = pixel_values.device.type == "cpu" and pixel_values.numel() > STRIP_NUMBERS and is_local(self)
        strides = [4, 2 if self.config.downsample_in_first_stage else 1, *[2] * (len(self.encoder.stages) - 1)]
        hidden_state, maps = pixel_values.to(self.embedder.embedder.convolution.weight.dtype), {}
        stages = [self.embedder, *self.encoder.stages]
        for name, stage, stride in zip(self.stage_names, stages, strides, strict=True):
            if is_large:
                for index, layer in enumerate(getattr(stage, "layers", [stage])):
                    hidden_state = in_strips(layer, hidden_state, 1 if index else stride)
            else:
                hidden_state = stage(hidden_state)
            if name in self.attention_blocks:
                hidden_state = self.attention_blocks[name](hidden_state)
            maps[name] = hidden_state
        output = BackboneOutput(
            feature_maps=tuple(maps[name] for name in self.out_features),
            hidden_states=tuple(maps.values()) if output_hidden_states else None,
        )
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()
