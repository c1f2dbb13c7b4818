"""Families of models of images, sound and time series, built by the package transformers."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coverage_families.family import CLASSES, make_images, make_labels, make_tokens
from coverage_families.transformers_models import ENCODER, TOKENS, make_family


def classify_images(model: nn.Module) -> Tensor:
    return model(pixel_values=make_images(), labels=make_labels()).loss


def classify_large_images(model: nn.Module) -> Tensor:
    return model(pixel_values=make_images(4, 3, 32), labels=make_labels()).loss


def embed_images(model: nn.Module) -> Tensor:
    states = model(pixel_values=make_images()).last_hidden_state
    return F.mse_loss(states, torch.randn_like(states))


def segment_images(model: nn.Module) -> Tensor:
    return model(pixel_values=make_images(2, 3, 32), labels=torch.randint(CLASSES, (2, 32, 32))).loss


def fill_in_images(model: nn.Module) -> Tensor:
    return model(pixel_values=make_images()).loss


def detect_objects(model: nn.Module) -> Tensor:
    """A detector's logits and boxes against drawn ones; matching them would need scipy."""
    out = model(pixel_values=make_images(2, 3, 32))
    classes = torch.randint(CLASSES, out.logits.shape[:2])
    boxes = torch.rand_like(out.pred_boxes)
    return F.cross_entropy(out.logits.flatten(0, 1), classes.flatten()) + F.l1_loss(out.pred_boxes, boxes)


def match_captions(model: nn.Module) -> Tensor:
    return model(input_ids=make_tokens(), pixel_values=make_images(), return_loss=True).loss


def answer_about_images(model: nn.Module) -> Tensor:
    labels = torch.rand(4, CLASSES)
    return model(input_ids=make_tokens(), pixel_values=make_images(), labels=labels).loss


def classify_sound(model: nn.Module) -> Tensor:
    return model(input_values=torch.randn(4, 400), labels=make_labels()).loss


def classify_spectrogram(model: nn.Module) -> Tensor:
    return model(input_values=torch.randn(4, 32, 16), labels=make_labels()).loss


def transcribe(model: nn.Module) -> Tensor:
    return model(input_features=torch.randn(4, 16, 32), labels=make_tokens(length=8)).loss


def transcribe_frames(model: nn.Module) -> Tensor:
    return model(input_features=torch.randn(4, 32, 16), labels=make_tokens(length=8)).loss


def forecast_distribution(model: nn.Module) -> Tensor:
    """Probabilistic forecasting: 8 values after 12 seen ones and the lags before them."""
    past, future = torch.randn(4, 14), torch.randn(4, 4)
    times = {"past_time_features": torch.rand(4, 14, 1), "future_time_features": torch.rand(4, 4, 1)}
    return model(past_values=past, past_observed_mask=torch.ones(4, 14), future_values=future, **times).loss


def forecast(model: nn.Module) -> Tensor:
    return model(past_values=torch.randn(4, 16, 2), future_values=torch.randn(4, 4, 2)).loss


def decide(model: nn.Module) -> Tensor:
    """A decision transformer: predict the actions that led to these states and returns."""
    actions, steps = torch.randn(4, 6, 3), torch.arange(6).expand(4, 6)
    out = model(
        states=torch.randn(4, 6, 5), actions=actions, returns_to_go=torch.randn(4, 6, 1), timesteps=steps
    )
    return sum(
        (F.mse_loss(part, torch.randn_like(part)) for part in (out.action_preds, out.state_preds)),
        F.mse_loss(out.return_preds, torch.randn(4, 6, 1)),
    )


LABELS = {"num_labels": CLASSES}
LAYERS = {
    **{"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
    **LABELS,
}
PATCHES = LAYERS | {"image_size": 16, "patch_size": 4}
MASKED = PATCHES | {
    **{"decoder_hidden_size": 48, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 4},
    "decoder_intermediate_size": 96,
}
SPECTROGRAM = LAYERS | {
    **{"num_mel_bins": 16, "max_length": 32, "patch_size": 4, "time_stride": 4, "frequency_stride": 4}
}
RESNET = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "layer_type": "basic", **LABELS}
SWIN = {
    **{"image_size": 16, "patch_size": 2, "embed_dim": 24, "depths": [1, 1], "num_heads": [2, 4]},
    **{"window_size": 4, **LABELS},
}
CONVNEXT = {"num_stages": 2, "hidden_sizes": [24, 48], "depths": [1, 1], "patch_size": 2, **LABELS}
SEGFORMER = {
    **{"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [24, 48]},
    **{"patch_sizes": [3, 3], "strides": [2, 2], "num_attention_heads": [2, 4], "mlp_ratios": [2, 2]},
    **{"decoder_hidden_size": 32, **LABELS},
}
DETR = {
    **{"d_model": 48, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 96},
    **{"decoder_ffn_dim": 96, "encoder_attention_heads": 4, "decoder_attention_heads": 4},
    **{"num_queries": 6, "backbone_config": RESNET | {"model_type": "resnet", "out_features": ["stage2"]}},
    **LABELS,
}
MOBILENET = {"depth_multiplier": 0.25, "image_size": 32, "min_depth": 8, **LABELS}
EFFICIENTNET = {
    **{"width_coefficient": 0.5, "depth_coefficient": 0.5, "image_size": 32, "hidden_dim": 640, **LABELS},
    **{"in_channels": [32, 16, 24], "out_channels": [16, 24, 40], "kernel_sizes": [3, 3, 5]},
    **{"strides": [1, 2, 2], "num_block_repeats": [1, 1, 1], "expand_ratios": [1, 4, 4]},
    **{"depthwise_padding": []},
}
POOLFORMER = {
    **{"num_encoder_blocks": 2, "depths": [1, 1], "hidden_sizes": [24, 48], "patch_sizes": [3, 3]},
    **{"strides": [2, 2], "padding": [1, 1], **LABELS},
}
LEVIT = {
    **{"image_size": 32, "hidden_sizes": [16, 32, 48], "num_attention_heads": [2, 2, 4], "depths": [1, 1, 1]},
    **{"key_dim": [8, 8, 8], "mlp_ratio": [2, 2, 2], "attention_ratio": [2, 2, 2], **LABELS},
}
CLIP = {
    "text_config": ENCODER | {"eos_token_id": 47},
    **{"vision_config": PATCHES, "projection_dim": 32},
}
WAV2VEC2 = LAYERS | {
    **{"conv_dim": [16, 32], "conv_stride": [5, 4], "conv_kernel": [10, 8], "apply_spec_augment": False},
    **{"num_feat_extract_layers": 2, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4},
    **{"classifier_proj_size": 32, "mask_time_prob": 0.0},
}
SPEECH = TOKENS | {
    **{"d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 128},
    **{"decoder_ffn_dim": 128, "encoder_attention_heads": 4, "decoder_attention_heads": 4},
    **{"max_source_positions": 16, "max_target_positions": 16, "decoder_start_token_id": 1},
}
FRAMES = SPEECH | {"input_feat_per_channel": 16, "conv_channels": 48, "use_cache": False}
WHISPER = SPEECH | {"num_mel_bins": 16, "use_cache": False, "mask_time_prob": 0.0}
SERIES = {
    **{"prediction_length": 4, "context_length": 12, "lags_sequence": [1, 2], "num_time_features": 1},
    **{"d_model": 48, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 96},
    **{"decoder_ffn_dim": 96, "encoder_attention_heads": 4, "decoder_attention_heads": 4},
}
PATCHTST = {
    **{"num_input_channels": 2, "context_length": 16, "prediction_length": 4, "patch_length": 4},
    **{"patch_stride": 4, "d_model": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 96},
}
MIXER = {
    **{"num_input_channels": 2, "context_length": 16, "prediction_length": 4, "patch_length": 4},
    **{"patch_stride": 4, "d_model": 32, "num_layers": 2},
}
DECISION = {
    **{"state_dim": 5, "act_dim": 3, "hidden_size": 48, "max_ep_len": 16, "n_layer": 2, "n_head": 4},
    "n_positions": 32,
}

SENSES = (
    make_family("vit", "ViTForImageClassification", classify_images, PATCHES),
    make_family("dinov2", "Dinov2ForImageClassification", classify_images, PATCHES),
    make_family("beit", "BeitForImageClassification", classify_images, PATCHES),
    make_family("swin", "SwinForImageClassification", classify_images, SWIN),
    make_family("convnext", "ConvNextForImageClassification", classify_images, CONVNEXT),
    make_family("convnextv2", "ConvNextV2ForImageClassification", classify_images, CONVNEXT),
    make_family("resnet of transformers", "ResNetForImageClassification", classify_images, RESNET),
    make_family("mobilenet v1", "MobileNetV1ForImageClassification", classify_large_images, MOBILENET),
    make_family("mobilenet v2", "MobileNetV2ForImageClassification", classify_large_images, MOBILENET),
    make_family("efficientnet", "EfficientNetForImageClassification", classify_large_images, EFFICIENTNET),
    make_family("poolformer", "PoolFormerForImageClassification", classify_images, POOLFORMER),
    make_family("levit", "LevitForImageClassification", classify_large_images, LEVIT),
    make_family("vit mae", "ViTMAEForPreTraining", fill_in_images, MASKED),
    make_family("segformer", "SegformerForSemanticSegmentation", segment_images, SEGFORMER),
    make_family("detr", "DetrForObjectDetection", detect_objects, DETR),
    make_family("yolos", "YolosForObjectDetection", detect_objects, PATCHES | {"image_size": [32, 32]}),
    make_family("clip", "CLIPModel", match_captions, CLIP),
    make_family("vilt", "ViltForQuestionAnswering", answer_about_images, ENCODER | PATCHES),
    make_family("wav2vec2", "Wav2Vec2ForSequenceClassification", classify_sound, WAV2VEC2),
    make_family("audio spectrogram", "ASTForAudioClassification", classify_spectrogram, SPECTROGRAM),
    make_family("whisper", "WhisperForConditionalGeneration", transcribe, WHISPER),
    make_family("speech to text", "Speech2TextForConditionalGeneration", transcribe_frames, FRAMES),
    make_family("time series", "TimeSeriesTransformerForPrediction", forecast_distribution, SERIES),
    make_family("informer", "InformerForPrediction", forecast_distribution, SERIES),
    make_family("autoformer", "AutoformerForPrediction", forecast_distribution, SERIES),
    make_family("patchtst", "PatchTSTForPrediction", forecast, PATCHTST),
    make_family("patchtsmixer", "PatchTSMixerForPrediction", forecast, MIXER),
    make_family("decision transformer", "DecisionTransformerModel", decide, DECISION),
)
