"""Tables of tiny random stock encoders: those that `attn_implementation="factorized"` serves and those it refuses."""

import inspect
import re
from dataclasses import dataclass, field

import pytest
import torch
import transformers
from torch import nn

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
TEXT = {**SIZES, "vocab_size": 64, "max_position_embeddings": 40}
IMAGE = {**SIZES, "image_size": 32, "patch_size": 8}
SPEECH = {
    **SIZES,
    "vocab_size": 32,
    "conv_dim": (16, 16),
    "conv_kernel": (4, 4),
    "conv_stride": (4, 4),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
}
SEQ2SEQ = {
    "vocab_size": 64,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
}
WHISPER = {
    **SEQ2SEQ,
    "num_mel_bins": 8,
    "max_source_positions": 16,
    "max_target_positions": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
MODERNBERT_TOKENS = {"pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1, "eos_token_id": 2}
T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}

PIXELS = (2, 3, 32, 32)
FRAMES = (2, 4, 3, 32, 32)
SAMPLES = (2, 320)


@dataclass
class Encoder:
    """A row of the table: how to build a tiny encoder and what to give it."""

    model: str
    fields: dict = field(default_factory=dict)
    shape: tuple[int, ...] | None = None  # of the float input; None where it is text
    config: str = ""
    part: str = ""  # the attribute that is the encoder, where the model has a decoder as well
    layers: int = 2

    @property
    def name(self) -> str:
        return f"{self.model}.{self.part}" if self.part else self.model

    def build(self, **options) -> nn.Module:
        config_name = self.config or re.sub(r"Model$", "Config", self.model)
        for name in (self.model, config_name):
            if not hasattr(transformers, name):
                pytest.skip(f"transformers {transformers.__version__} has no {name}")
        torch.manual_seed(0)
        model = getattr(transformers, self.model)(getattr(transformers, config_name)(**self.fields, **options)).eval()
        return getattr(model, self.part) if self.part else model

    def inputs(self, model: nn.Module) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(1)
        if self.shape is None:
            return {"input_ids": torch.randint(5, 60, (2, 7), generator=generator)}
        names = ("pixel_values", "pixel_values_videos", "input_values", "input_features", "past_values")
        name = next(name for name in names if name in inspect.signature(model.forward).parameters)
        return {name: torch.randn(self.shape, generator=generator)}


def text_tower(model: str, **fields) -> Encoder:
    return Encoder(model, {**TEXT, **fields}, config=re.sub(r"(Model|Encoder)$", "Config", model))


TEXT_ENCODERS = [
    text_tower("BertModel"),
    text_tower("RobertaModel"),
    text_tower("XLMRobertaModel"),
    text_tower("XLMRobertaXLModel"),
    text_tower("CamembertModel"),
    text_tower("RobertaPreLayerNormModel"),
    text_tower("ElectraModel", embedding_size=16),
    text_tower("ErnieModel"),
    text_tower("Data2VecTextModel"),
    text_tower("BertGenerationEncoder"),
    text_tower("SplinterModel"),
    text_tower("EsmModel", pad_token_id=1, mask_token_id=3, position_embedding_type="rotary"),
    text_tower("XmodModel", languages=["en_XX"], default_language="en_XX"),
    text_tower("RoCBertModel", pronunciation_vocab_size=64, shape_vocab_size=64),
    text_tower(
        "MobileBertModel",
        initializer_range=0.2,  # at 0.02 its bottlenecks leave the attention no visible part in the output
        trigram_input=False,  # mixes each token with its neighbours, padding included, before any attention
        embedding_size=16,
        true_hidden_size=16,
        intra_bottleneck_size=16,
        num_feedforward_networks=1,
    ),
    text_tower("AlbertModel", embedding_size=16),
    Encoder(
        "DistilBertModel",
        {"vocab_size": 64, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": 40},
    ),
    text_tower("LayoutLMModel", max_2d_position_embeddings=16),
    text_tower("MarkupLMModel", max_depth=4, xpath_unit_hidden_size=4),
    text_tower("EuroBertModel", num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2),
    text_tower("NomicBertModel"),
    text_tower("JinaEmbeddingsV3Model"),
    text_tower("GteModel"),
    Encoder("EsmcModel", {**SIZES, "vocab_size": 64, "pad_token_id": 1}),
    text_tower("SiglipTextModel"),
    text_tower("ChineseCLIPTextModel"),
    text_tower("AlignTextModel"),
]
VISION_ENCODERS = [
    Encoder("ViTModel", IMAGE, PIXELS),
    Encoder("DeiTModel", IMAGE, PIXELS),
    Encoder("Dinov2Model", IMAGE, PIXELS),
    Encoder("Dinov2WithRegistersModel", IMAGE, PIXELS),
    Encoder("DINOv3ViTModel", IMAGE, PIXELS),
    Encoder("ViTMAEModel", IMAGE, PIXELS),
    Encoder(
        "ViTMAEForPreTraining",
        {
            **IMAGE,
            "decoder_hidden_size": 16,
            "decoder_num_hidden_layers": 1,
            "decoder_num_attention_heads": 2,
            "decoder_intermediate_size": 16,
        },
        PIXELS,
        config="ViTMAEConfig",
        layers=3,
    ),
    Encoder("ViTMSNModel", IMAGE, PIXELS),
    Encoder("IJepaModel", IMAGE, PIXELS),
    Encoder("YolosModel", {**IMAGE, "image_size": [32, 32], "num_detection_tokens": 3}, PIXELS),
    Encoder(
        "DPTModel",
        {**IMAGE, "backbone_out_indices": [0, 1], "neck_hidden_sizes": [8, 8, 8, 8], "is_hybrid": False},
        PIXELS,
    ),
    Encoder("PixioModel", IMAGE, PIXELS),
    Encoder("MLCDVisionModel", IMAGE, PIXELS),
    Encoder("SiglipVisionModel", IMAGE, PIXELS),
    Encoder("CLIPVisionModel", IMAGE, PIXELS),
    Encoder("ChineseCLIPVisionModel", IMAGE, PIXELS),
    Encoder("AltCLIPVisionModel", IMAGE, PIXELS),
    Encoder("MetaClip2VisionModel", IMAGE, PIXELS),
    Encoder("Aimv2VisionModel", IMAGE, PIXELS),
    Encoder("JanusVisionModel", IMAGE, PIXELS),
    Encoder("InternVLVisionModel", {**IMAGE, "image_size": [32, 32], "patch_size": [8, 8]}, PIXELS),
    Encoder("Idefics3VisionTransformer", IMAGE, PIXELS, config="Idefics3VisionConfig"),
    Encoder("VideoMAEModel", {**IMAGE, "num_frames": 4, "tubelet_size": 2}, FRAMES),
    Encoder("VivitModel", {**IMAGE, "num_frames": 4, "tubelet_size": [2, 8, 8]}, FRAMES),
    Encoder(
        "VJEPA2Model",
        {
            **IMAGE,
            "crop_size": 32,
            "frames_per_clip": 4,
            "tubelet_size": 2,
            "pred_hidden_size": 32,
            "pred_num_attention_heads": 4,
            "pred_num_hidden_layers": 1,
        },
        FRAMES,
        layers=3,
    ),
]
AUDIO_ENCODERS = [
    Encoder("Wav2Vec2Model", SPEECH, SAMPLES),
    Encoder("HubertModel", SPEECH, SAMPLES),
    Encoder("UniSpeechModel", SPEECH, SAMPLES),
    Encoder("Data2VecAudioModel", {**SPEECH, "conv_pos_kernel_size": 5, "num_conv_pos_embeddings": 2}, SAMPLES),
    Encoder("SEWModel", {**SPEECH, "squeeze_factor": 2}, SAMPLES),
    Encoder("WhisperModel", WHISPER, (2, 8, 32), part="encoder"),
    Encoder(
        "Speech2TextModel", {**SEQ2SEQ, "input_feat_per_channel": 8, "conv_channels": 16}, (2, 32, 8), part="encoder"
    ),
    Encoder(
        "ASTModel",
        {**SIZES, "patch_size": 8, "frequency_stride": 8, "time_stride": 8, "max_length": 32, "num_mel_bins": 16},
        (2, 32, 16),
    ),
]
SERIES_ENCODERS = [
    Encoder(
        "PatchTSTModel",
        {
            "num_input_channels": 2,
            "context_length": 32,
            "patch_length": 8,
            "patch_stride": 8,
            "num_hidden_layers": 2,
            "d_model": 32,
            "num_attention_heads": 4,
            "ffn_dim": 48,
        },
        (2, 32, 2),
    )
]
WORKING = TEXT_ENCODERS + VISION_ENCODERS + AUDIO_ENCODERS + SERIES_ENCODERS

# Reach the attention function in 5.23 and compute attention themselves in 5.3: refused or ignored, never run wrong.
NOT_REACHED_IN_5_3 = [
    text_tower("AltCLIPTextModel", project_dim=8),
    Encoder("OwlViTVisionModel", IMAGE, PIXELS),
    Encoder(
        "SegformerModel",
        {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 16, 16], "num_attention_heads": [1, 2, 2, 2]},
        PIXELS,
        layers=4,
    ),
]

# What is refused: (row, a part of the message in every version that reaches the function or the mask function).
REFUSED = [
    (text_tower("ModernBertModel", num_hidden_layers=3, local_attention=4, **MODERNBERT_TOKENS), "sliding window"),
    (text_tower("CLIPTextModel", eos_token_id=2), "causal"),
    (text_tower("Aimv2TextModel"), "causal"),
    (text_tower("BertModel", is_decoder=True), "causal"),
    (Encoder("BartModel", {**SEQ2SEQ, "max_position_embeddings": 40}), "causal"),
    (Encoder("T5Model", T5), "position bias"),
    (Encoder("MT5EncoderModel", T5, config="MT5Config"), "position bias"),
    (Encoder("UMT5EncoderModel", T5, config="UMT5Config"), "position bias"),
    (Encoder("Wav2Vec2ConformerModel", SPEECH, SAMPLES), "position bias"),
    (Encoder("BeitModel", {**IMAGE, "use_relative_position_bias": True}, PIXELS), "over queries or heads"),
    (Encoder("SwinModel", SWIN, PIXELS), "over queries or heads"),
]

# Build their mask with transformers' helper and compute attention themselves.
TRAPPED = [
    text_tower("MPNetModel"),
    text_tower("RemBertModel", input_embedding_size=16, output_embedding_size=16),
    text_tower("MegatronBertModel"),
    text_tower("SqueezeBertModel", embedding_size=32),
    text_tower("NystromformerModel"),
    text_tower("RoFormerModel", embedding_size=32),
    text_tower("IBertModel"),
    text_tower("ConvBertModel"),
    text_tower("BigBirdModel", attention_type="original_full"),
    text_tower("LongformerModel", attention_window=4),
    text_tower("LukeModel", entity_vocab_size=8, entity_emb_size=8),
    text_tower("TapasModel", type_vocab_sizes=[3, 8, 8, 2, 8, 8, 10]),
    text_tower("VisualBertModel"),
    text_tower("BlipTextModel"),
    text_tower("FlavaTextModel"),
    text_tower("GroupViTTextModel"),
    Encoder("LEDModel", {**SEQ2SEQ, "attention_window": 4, "max_encoder_position_embeddings": 32}),
    Encoder("MvpModel", {**SEQ2SEQ, "max_position_embeddings": 40}),
]
