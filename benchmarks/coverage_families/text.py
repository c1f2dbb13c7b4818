"""Families of text models, built by the package transformers."""

from coverage_families.transformers_models import (
    DECODER,
    ENCODER,
    TOKENS,
    classify_text,
    fill_in,
    make_family,
    predict_next,
    translate,
)

ROPE = DECODER | {"num_key_value_heads": 2, "head_dim": 16}
EXPERTS = ROPE | {"num_experts_per_tok": 2, "moe_intermediate_size": 48}
BART = TOKENS | {
    **{"d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 128},
    **{"decoder_ffn_dim": 128, "encoder_attention_heads": 4, "decoder_attention_heads": 4},
    **{"max_position_embeddings": 32, "decoder_start_token_id": 1, "use_cache": False},
}
T5 = TOKENS | {
    **{"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4},
    **{"decoder_start_token_id": 0, "use_cache": False},
}
GPT2 = TOKENS | {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 32, "use_cache": False}
MAMBA = TOKENS | {"hidden_size": 48, "num_hidden_layers": 2, "state_size": 8, "use_cache": False}
MAMBA2 = MAMBA | {"num_heads": 6, "head_dim": 16, "n_groups": 1, "chunk_size": 8}
LATENT = DECODER | {
    **{"num_experts_per_tok": 2, "moe_intermediate_size": 48, "num_key_value_heads": 4},
    **{"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    **{"kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8},
    **{"v_head_dim": 16, "n_shared_experts": 1},
}
DELTA = EXPERTS | {
    **{"num_experts": 4, "shared_expert_intermediate_size": 32, "layer_types": None, "head_dim": 16},
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16},
    **{"linear_value_head_dim": 16, "full_attention_interval": 2},
}
OPT = TOKENS | {
    **{"hidden_size": 64, "ffn_dim": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"max_position_embeddings": 32, "word_embed_proj_dim": 64, "use_cache": False},
}
FUNNEL = TOKENS | {"d_model": 48, "d_head": 12, "n_head": 4, "d_inner": 96, "block_sizes": [1, 1]}
XLNET = TOKENS | {"d_model": 64, "n_layer": 2, "n_head": 4, "d_inner": 128, "num_labels": 5}
JAMBA = ROPE | {
    **{"num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2},
    **{"expert_layer_offset": 1, "mamba_d_state": 8, "use_mamba_kernels": False},
}
PERCEIVER = {
    **{"vocab_size": 48, "num_latents": 8, "d_latents": 64, "d_model": 48, "max_position_embeddings": 16},
    **{"num_blocks": 1, "num_self_attends_per_block": 2, "num_self_attention_heads": 4, "num_labels": 5},
    "num_cross_attention_heads": 4,
}

TEXT = (
    make_family("gpt2", "GPT2LMHeadModel", predict_next, GPT2),
    make_family("gpt-j", "GPTJForCausalLM", predict_next, GPT2 | {"rotary_dim": 8}),
    make_family("gpt-neox", "GPTNeoXForCausalLM", predict_next, DECODER),
    make_family("opt", "OPTForCausalLM", predict_next, OPT),
    make_family("bloom", "BloomForCausalLM", predict_next, GPT2 | {"hidden_size": 64}),
    make_family("falcon", "FalconForCausalLM", predict_next, DECODER),
    make_family("mpt", "MptForCausalLM", predict_next, TOKENS | {"d_model": 64, "n_heads": 4, "n_layers": 2}),
    make_family("llama", "LlamaForCausalLM", predict_next, ROPE),
    make_family("qwen2", "Qwen2ForCausalLM", predict_next, ROPE),
    make_family("gemma", "GemmaForCausalLM", predict_next, ROPE),
    make_family("gemma2", "Gemma2ForCausalLM", predict_next, ROPE),
    make_family("phi", "PhiForCausalLM", predict_next, DECODER),
    make_family("mixtral", "MixtralForCausalLM", predict_next, ROPE | {"num_local_experts": 4}),
    make_family("qwen3-moe", "Qwen3MoeForCausalLM", predict_next, EXPERTS | {"num_experts": 4}),
    make_family("gpt-oss", "GptOssForCausalLM", predict_next, EXPERTS | {"num_local_experts": 4}),
    make_family("qwen3-next", "Qwen3NextForCausalLM", predict_next, DELTA),
    make_family("deepseek-v3", "DeepseekV3ForCausalLM", predict_next, LATENT),
    make_family("mamba", "MambaForCausalLM", predict_next, MAMBA),
    make_family("mamba2", "Mamba2ForCausalLM", predict_next, MAMBA2),
    make_family(
        "rwkv", "RwkvForCausalLM", predict_next, TOKENS | {"hidden_size": 48, "num_hidden_layers": 2}
    ),
    make_family("jamba", "JambaForCausalLM", predict_next, JAMBA),
    make_family("bert", "BertForSequenceClassification", classify_text, ENCODER),
    make_family("roberta", "RobertaForSequenceClassification", classify_text, ENCODER),
    make_family("albert", "AlbertForSequenceClassification", classify_text, ENCODER | {"embedding_size": 32}),
    make_family(
        "electra", "ElectraForSequenceClassification", classify_text, ENCODER | {"embedding_size": 32}
    ),
    make_family("modernbert", "ModernBertForMaskedLM", fill_in, ENCODER),
    make_family(
        "deberta-v2",
        "DebertaV2ForSequenceClassification",
        classify_text,
        ENCODER | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "max_relative_positions": 16},
    ),
    make_family(
        "distilbert",
        "DistilBertForSequenceClassification",
        classify_text,
        TOKENS
        | {
            "dim": 64,
            "hidden_dim": 128,
            "n_layers": 2,
            "n_heads": 4,
            "max_position_embeddings": 32,
            "num_labels": 5,
        },
    ),
    make_family(
        "longformer",
        "LongformerForSequenceClassification",
        classify_text,
        ENCODER | {"attention_window": 4, "sep_token_id": 2},
    ),
    make_family("funnel", "FunnelForMaskedLM", fill_in, FUNNEL),
    make_family("xlnet", "XLNetForSequenceClassification", classify_text, XLNET),
    make_family("perceiver", "PerceiverForSequenceClassification", classify_text, PERCEIVER),
    make_family("t5", "T5ForConditionalGeneration", translate, T5),
    make_family(
        "switch transformer",
        "SwitchTransformersForConditionalGeneration",
        translate,
        T5 | {"num_experts": 4, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
    ),
    make_family("bart", "BartForConditionalGeneration", translate, BART),
)
