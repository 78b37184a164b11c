"""Families of Hugging Face's transformers, each as a small random model: two layers, a width of 128, 128 tokens."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from armopt.models import torchvision_ops
from benchmarks import random_weights
from benchmarks.coverage.cases import Case, Sample

SECTION = "Hugging Face"
TOKENS, DECODED, VOCABULARY, NEW = 128, 64, 1000, 8
#: What each configuration gets of these, by the names that it knows. Initialised so, layers of this width keep the
#: size of what passes through them; with the usual 0.02 they would add next to nothing to it.
SIZES: Mapping[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 256,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 256,
    "decoder_ffn_dim": 256,
    "max_position_embeddings": 512,
    "image_size": 64,
    "patch_size": 16,
    "initializer_range": 0.08,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "decoder_start_token_id": 1,
}
Inputs = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Entry:
    """A model class of transformers, what its configuration needs besides SIZES, and its inputs."""

    model: str
    options: Mapping[str, Any] = field(default_factory=dict)
    inputs: Callable[[torch.Generator], Inputs] | None = None
    generates: bool = False


def text(generator: torch.Generator) -> Inputs:
    """A prompt."""
    ids = torch.randint(3, VOCABULARY, (1, TOKENS), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def ids(generator: torch.Generator) -> Inputs:
    """A prompt without a mask, for a model that takes none of its own."""
    return {"input_ids": text(generator)["input_ids"]}


def pair(generator: torch.Generator) -> Inputs:
    """A text, and the beginning of an answer."""
    return text(generator) | {"decoder_input_ids": torch.randint(3, VOCABULARY, (1, DECODED), generator=generator)}


def noise(*more: Callable[[torch.Generator], Inputs], **shapes: tuple[int, ...]) -> Callable[[torch.Generator], Inputs]:
    """Tensors of such shapes by name, and other inputs."""

    def make(generator: torch.Generator) -> Inputs:
        found = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        for each in more:
            found |= each(generator)
        return found

    return make


def pixels(side: int = 64, *more: Callable[[torch.Generator], Inputs]) -> Callable[[torch.Generator], Inputs]:
    """One image, and other inputs."""
    return noise(*more, pixel_values=(1, 3, side, side))


def layout(generator: torch.Generator) -> Inputs:
    """A text whose words have places on a page."""
    corners = torch.randint(0, 500, (1, TOKENS, 2), generator=generator)
    return text(generator) | {"bbox": torch.cat([corners, corners + 100], 2)}


def decoded(generator: torch.Generator) -> Inputs:
    """The beginning of an answer alone."""
    return {"decoder_input_ids": torch.randint(3, VOCABULARY, (1, DECODED), generator=generator)}


def looked_at(generator: torch.Generator) -> Inputs:
    """A text in which 16 tokens stand for an image."""
    found = text(generator)
    found["input_ids"][0, 4:20] = _IMAGE_TOKEN
    return found


def prefix(generator: torch.Generator) -> Inputs:
    """Says which tokens see each other; without, PaliGemma's own mask is another in eager mode than when exported."""
    return {"token_type_ids": (torch.arange(TOKENS) >= TOKENS // 2).long()[None]}


_IMAGE_TOKEN = 7
_DEEP = {"encoder_layers": 2, "encoder_attention_heads": 4, "num_encoder_layers": 2, "num_decoder_layers": 2}
_T5 = {"d_kv": 32, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4, "d_ff": 256}
_BART = {"d_model": 128, "encoder_layers": 2, "encoder_attention_heads": 4}
_SOUND = {"conv_dim": [64] * 7, "num_feat_extract_layers": 7, "num_conv_pos_embedding_groups": 4}
_STAGES = {"depths": [1, 1, 1, 1], "num_heads": [2, 4, 4, 8], "embed_dim": 32, "window_size": 4, "patch_size": 4}
_CONVNEXT = {"num_stages": 4, "hidden_sizes": [32, 64, 96, 128], "depths": [1, 1, 1, 1], "patch_size": 4}
_PYRAMID = {"depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 5, 8]}
_TOWER = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256}
_VISION = {**_TOWER, "image_size": 64, "patch_size": 16, "initializer_range": 0.08}
_TEXT = {**_TOWER, "vocab_size": VOCABULARY, "max_position_embeddings": TOKENS, "initializer_range": 0.08}
_TEXT |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_GEMMA = {**_TEXT, "model_type": "gemma", "num_key_value_heads": 2, "head_dim": 32}
_CLAP = {"hidden_size": 256, "patch_embeds_hidden_size": 32, "depths": [1, 1, 1, 1]}
_TWO = {"text_config": _TEXT, "vision_config": _VISION, "projection_dim": 64}
_LATENT = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 32}
_GROUPS = {"n_routed_experts": 4, "moe_intermediate_size": 64, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
_LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}

FAMILIES: dict[str, tuple[Entry, ...]] = {
    "encoder": (
        Entry("BertForMaskedLM"),
        Entry("RobertaModel"),
        Entry("DistilBertForSequenceClassification"),
        Entry("ElectraForPreTraining", {"embedding_size": 64}),
        Entry("AlbertForMaskedLM", {"embedding_size": 64}),
        Entry("DebertaV2ForTokenClassification", {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}),
        Entry("DebertaModel", {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}),
        Entry("MPNetModel"),
        Entry("XLMRobertaForSequenceClassification"),
        Entry("CamembertForMaskedLM"),
        Entry("ModernBertForMaskedLM"),
        Entry("ConvBertModel", {"embedding_size": 64}),
        Entry("SqueezeBertModel", {"embedding_size": 128}),
        Entry("MobileBertModel", {"embedding_size": 64, "intra_bottleneck_size": 64}),
        Entry("FNetModel"),
        Entry("FunnelModel", {"block_sizes": [1, 1], "d_model": 128, "n_head": 4, "d_head": 32, "d_inner": 256}),
        Entry("RoFormerModel", {"embedding_size": 128}),
        Entry("NystromformerModel", {"num_landmarks": 16, "segment_means_seq_len": 128}, ids),
        Entry("BigBirdModel", {"block_size": 16, "num_random_blocks": 1}),
        Entry("LongformerModel", {"attention_window": 32}),
        Entry("XLNetModel", {"d_model": 128, "n_layer": 2, "n_head": 4, "d_inner": 256}),
        Entry("EsmModel", {"emb_layer_norm_before": False}),
        Entry("CanineModel", {"local_transformer_stride": 64, "num_hash_buckets": 512}),
        Entry("NomicBertModel"),
    ),
    "decoder": (
        Entry("GPT2LMHeadModel", generates=True),
        Entry("GPTNeoForCausalLM", {"attention_types": [[["global", "local"], 1]], "window_size": 32}),
        Entry("GPTNeoXForCausalLM"),
        Entry("GPTJForCausalLM", {"rotary_dim": 16}),
        Entry("GPTBigCodeForCausalLM"),
        Entry("CodeGenForCausalLM", {"rotary_dim": 16}),
        Entry("OPTForCausalLM", {"ffn_dim": 256, "word_embed_proj_dim": 128}, generates=True),
        Entry("BloomForCausalLM"),
        Entry("FalconForCausalLM"),
        Entry("MptForCausalLM", {"d_model": 128, "n_heads": 4, "n_layers": 2}),
        Entry("LlamaForCausalLM", generates=True),
        Entry("MistralForCausalLM", {"sliding_window": 64}),
        Entry("Qwen2ForCausalLM", generates=True),
        Entry("Qwen3ForCausalLM"),
        Entry("GemmaForCausalLM"),
        Entry("Gemma2ForCausalLM", {"sliding_window": 64}),
        Entry("Gemma3ForCausalLM", {"sliding_window": 64}, generates=True),
        Entry("PhiForCausalLM"),
        Entry("Phi3ForCausalLM"),
        Entry("Olmo2ForCausalLM"),
        Entry("Starcoder2ForCausalLM"),
        Entry("StableLmForCausalLM"),
        Entry("CohereForCausalLM"),
        Entry("GraniteForCausalLM"),
        Entry("SmolLM3ForCausalLM"),
        Entry("Glm4ForCausalLM"),
        Entry("NemotronForCausalLM"),
        Entry("XGLMForCausalLM", {"d_model": 128, "ffn_dim": 256, "num_layers": 2, "attention_heads": 4}),
        Entry("BioGptForCausalLM"),
    ),
    "encoder-decoder": (
        Entry("T5ForConditionalGeneration", _T5, pair, generates=True),
        Entry("MT5ForConditionalGeneration", _T5, pair),
        Entry("LongT5ForConditionalGeneration", {**_T5, "local_radius": 31}, pair),
        Entry("BartForConditionalGeneration", _BART, pair, generates=True),
        Entry("MBartForConditionalGeneration", _BART, pair),
        Entry("PegasusForConditionalGeneration", _BART, pair),
        Entry("MarianMTModel", _BART, pair),
        Entry("M2M100ForConditionalGeneration", _BART, pair),
        Entry("BlenderbotForConditionalGeneration", _BART, pair),
        Entry("LEDForConditionalGeneration", {**_BART, "attention_window": 32}, pair),
        Entry("ProphetNetForConditionalGeneration", {**_DEEP, "num_encoder_attention_heads": 4}, pair),
    ),
    "vision": (
        Entry("ViTForImageClassification", inputs=pixels()),
        Entry("DeiTForImageClassification", inputs=pixels()),
        Entry("BeitForImageClassification", inputs=pixels()),
        Entry("Dinov2ForImageClassification", inputs=pixels()),
        Entry("DINOv3ViTModel", inputs=pixels()),
        Entry("ViTMAEModel", {"mask_ratio": 0.0}, noise(pixel_values=(1, 3, 64, 64), noise=(1, 16))),
        Entry("SwinForImageClassification", _STAGES, pixels(128)),
        Entry("Swinv2ForImageClassification", {**_STAGES, "image_size": 128}, pixels(128)),
        Entry("ConvNextForImageClassification", _CONVNEXT, pixels(128)),
        Entry("ConvNextV2ForImageClassification", _CONVNEXT, pixels(128)),
        Entry("ResNetForImageClassification", inputs=pixels(128)),
        Entry("RegNetForImageClassification", inputs=pixels(128)),
        Entry("EfficientNetForImageClassification", {"width_coefficient": 1.0, "depth_coefficient": 1.0,
              "hidden_dim": 1280}, pixels(128)),
        Entry("MobileNetV2ForImageClassification", inputs=pixels(128)),
        Entry("MobileViTForImageClassification", {"image_size": 256, "patch_size": 2}, pixels(256)),
        Entry("SegformerForSemanticSegmentation", _PYRAMID, pixels(128)),
        Entry("PoolFormerForImageClassification", {"patch_size": 7}, pixels(128)),
        Entry("PvtV2ForImageClassification", _PYRAMID, pixels(128)),
        Entry("LevitForImageClassification", {"image_size": 224, "num_attention_heads": [4, 8, 12],
              "initializer_range": 0.02}, pixels(224)),
        Entry("CvtForImageClassification", inputs=pixels(128)),
        Entry("DPTForDepthEstimation", {"backbone_out_indices": [0, 1], "neck_hidden_sizes": [32, 64]}, pixels(64)),
        Entry("YolosForObjectDetection", {"image_size": [64, 64], "num_detection_tokens": 16}, pixels()),
        Entry("DetrForObjectDetection", {}, pixels(128)),
        Entry("SamVisionModel", inputs=pixels(64)),
        Entry("VideoMAEForVideoClassification", {"num_frames": 4}, noise(pixel_values=(1, 4, 3, 64, 64))),
        Entry("VivitForVideoClassification", {"num_frames": 4}, noise(pixel_values=(1, 4, 3, 64, 64))),
        Entry("TimesformerForVideoClassification", {"num_frames": 4}, noise(pixel_values=(1, 4, 3, 64, 64))),
    ),
    "audio": (
        Entry("WhisperForConditionalGeneration", {**_BART, "num_mel_bins": 40, "max_source_positions": 100,
              "suppress_tokens": None, "begin_suppress_tokens": None},
              noise(decoded, input_features=(1, 40, 200)), generates=True),
        Entry("Wav2Vec2ForCTC", _SOUND, noise(input_values=(1, 8000))),
        Entry("HubertForSequenceClassification", _SOUND, noise(input_values=(1, 8000))),
        Entry("WavLMModel", _SOUND, noise(input_values=(1, 8000))),
        Entry("UniSpeechSatModel", _SOUND, noise(input_values=(1, 8000))),
        Entry("SEWModel", {"squeeze_factor": 2, "num_conv_pos_embedding_groups": 4}, noise(input_values=(1, 8000))),
        Entry("Data2VecAudioModel", _SOUND, noise(input_values=(1, 8000))),
        Entry("Wav2Vec2BertModel", {"feature_projection_input_dim": 80}, noise(input_features=(1, 128, 80))),
        Entry("ASTForAudioClassification", {"max_length": 128, "num_mel_bins": 64}, noise(input_values=(1, 128, 64))),
        Entry("Speech2TextForConditionalGeneration", {**_BART, "input_feat_per_channel": 40},
              noise(decoded, input_features=(1, 200, 40))),
        Entry("MoonshineForConditionalGeneration", {"encoder_num_hidden_layers": 2, "decoder_num_hidden_layers": 2,
              "encoder_num_attention_heads": 4, "decoder_num_attention_heads": 4},
              noise(decoded, input_values=(1, 16000))),
        Entry("EncodecModel", {}, noise(input_values=(1, 1, 4800))),
        Entry("DacModel", {"encoder_hidden_size": 16, "decoder_hidden_size": 256}, noise(input_values=(1, 1, 5120))),
        Entry("VitsModel", {"noise_scale": 0.0, "noise_scale_duration": 0.0, "upsample_initial_channel": 64,
              "flow_size": 64, "spectrogram_bins": 65, "prior_encoder_num_flows": 2, "duration_predictor_num_flows": 2,
              "prior_encoder_num_wavenet_layers": 2}, text),
    ),
    "multimodal": (
        Entry("CLIPModel", _TWO, pixels(64, text)),
        Entry("SiglipModel", _TWO, pixels(64, text)),
        Entry("ChineseCLIPModel", _TWO, pixels(64, text)),
        Entry("BlipForImageTextRetrieval", _TWO, pixels(64, text)),
        Entry("CLIPSegForImageSegmentation", {**_TWO, "extract_layers": [0, 1]}, pixels(64, text)),
        Entry("OwlViTForObjectDetection", {**_TWO, "projection_dim": 128}, pixels(64, text)),
        Entry("ViltForQuestionAnswering", {}, pixels(64, text)),
        Entry("LayoutLMForTokenClassification", {}, layout),
        Entry("LayoutLMv3Model", {"input_size": 64, "coordinate_size": 22, "shape_size": 20}, pixels(64, layout)),
        Entry("LiltModel", {"hidden_size": 192}, layout),
        Entry("LlavaForConditionalGeneration", {"text_config": {**_TEXT, "model_type": "llama"},
              "vision_config": {**_VISION, "model_type": "clip_vision_model"}, "image_token_index": _IMAGE_TOKEN,
              "vision_feature_layer": -1}, pixels(64, looked_at)),
        Entry("PaliGemmaForConditionalGeneration", {"text_config": _GEMMA,
              "vision_config": {**_VISION, "model_type": "siglip_vision_model"}, "image_token_index": _IMAGE_TOKEN,
              "projection_dim": 128}, pixels(64, looked_at, prefix)),
        Entry("Blip2ForConditionalGeneration", {"text_config": {**_TEXT, "model_type": "opt", "ffn_dim": 256},
              "vision_config": _VISION, "num_query_tokens": 16, "image_token_index": _IMAGE_TOKEN,
              "qformer_config": {**_TEXT, "encoder_hidden_size": 128}}, pixels(64, looked_at)),
        Entry("VisualBertModel", {"visual_embedding_dim": 64}, noise(text, visual_embeds=(1, 16, 64))),
        Entry("ClapModel", {"text_config": {**_TEXT, "max_position_embeddings": 160}, "audio_config": _CLAP},
              noise(text, input_features=(1, 1, 1001, 64))),
    ),
    "state space": (
        Entry("MambaForCausalLM", {"state_size": 8}, generates=True),
        Entry("Mamba2ForCausalLM", {"state_size": 16, "num_heads": 8, "head_dim": 32, "n_groups": 2, "chunk_size": 32}),
        Entry("FalconMambaForCausalLM", {"state_size": 8}),
        Entry("RwkvForCausalLM", {"attention_hidden_size": 128, "context_length": 128}),
        Entry("RecurrentGemmaForCausalLM", {"lru_width": 128, "attention_window_size": 64}),
        Entry("JambaForCausalLM", {**_EXPERTS, "mamba_d_state": 8, "use_mamba_kernels": False,
              "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1}),
        Entry("BambaForCausalLM", {"mamba_n_heads": 8, "mamba_d_head": 32, "mamba_d_state": 16,
              "attn_layer_indices": [1], "mamba_n_groups": 1}),
        Entry("Zamba2ForCausalLM", {"mamba_d_state": 16, "n_mamba_heads": 8, "num_hidden_layers": 4,
              "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"]}),
        Entry("Qwen3NextForCausalLM", {**_EXPERTS, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
              "linear_key_head_dim": 32, "linear_value_head_dim": 32, "shared_expert_intermediate_size": 64,
              "layer_types": ["linear_attention", "full_attention"]}),
        Entry("xLSTMForCausalLM", {"embedding_dim": 128, "num_heads": 4, "num_blocks": 2}),
    ),
    "mixture of experts": (
        Entry("MixtralForCausalLM", _LOCAL, generates=True),
        Entry("Qwen2MoeForCausalLM", {**_EXPERTS, "shared_expert_intermediate_size": 64}),
        Entry("Qwen3MoeForCausalLM", _EXPERTS),
        Entry("OlmoeForCausalLM", _EXPERTS),
        Entry("DeepseekV3ForCausalLM", {**_GROUPS, **_LATENT, "first_k_dense_replace": 1, "num_key_value_heads": 4}),
        Entry("GptOssForCausalLM", {**_LOCAL, "sliding_window": 64}),
        Entry("GraniteMoeForCausalLM", _LOCAL),
        Entry("PhimoeForCausalLM", _LOCAL),
        Entry("SwitchTransformersForConditionalGeneration", {**_T5, "num_experts": 4, "num_sparse_encoder_layers": 1,
              "num_sparse_decoder_layers": 1}, pair),
        Entry("NllbMoeForConditionalGeneration", {**_BART, "num_experts": 4, "encoder_sparse_step": 2,
              "decoder_sparse_step": 2}, pair),
    ),
    "time series": (
        Entry("PatchTSTForPrediction", {"num_input_channels": 3, "context_length": 64, "patch_length": 8,
              "patch_stride": 8, "d_model": 128, "ffn_dim": 256, "prediction_length": 16},
              noise(past_values=(1, 64, 3))),
        Entry("PatchTSMixerForPrediction", {"num_input_channels": 3, "context_length": 64, "patch_length": 8,
              "patch_stride": 8, "prediction_length": 16}, noise(past_values=(1, 64, 3))),
    ),
}  # fmt: skip


def cases() -> Iterator[Case]:
    """One for each, and one more for each that generates."""
    for family, entries in FAMILIES.items():
        for entry in entries:
            yield Case(SECTION, family, entry.model, partial(build, entry))
            if entry.generates:
                yield Case(SECTION, family, f"{entry.model}.generate", partial(build, entry, generates=True))


def build(entry: Entry, generates: bool = False) -> Sample:
    """A model with random weights, and its inputs."""
    torchvision_ops.ensure_torchvision()
    library: Any = importlib.import_module("transformers")
    kind = getattr(library, entry.model)
    torch.manual_seed(0)
    model = random_weights.randomize(kind(config(kind.config_class, entry.options)))
    make = entry.inputs or text
    inputs, others = (make(torch.Generator().manual_seed(seed)) for seed in (1, 2))
    if not generates:
        return Sample(model, (((), inputs), ((), others)))
    inputs.pop("decoder_input_ids", None)
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW}
    if model.config.is_encoder_decoder:
        options["decoder_start_token_id"] = SIZES["decoder_start_token_id"]
    return Sample(model, (((), inputs),), generates=options)


def config(kind: Any, options: Mapping[str, Any]) -> Any:
    """A configuration of a class: of SIZES what it knows, and all of the options."""
    known, renamed = set(inspect.signature(kind).parameters), kind.attribute_map
    sizes = {renamed.get(name, name): value for name, value in SIZES.items()}
    return kind(**{name: value for name, value in sizes.items() if name in known} | dict(options))
