"""Families whose components do not add up to what they predict, each with the reason."""

STREAMS = (
    "it has several residual streams, which each layer mixes by weights that follow the text (hyper-connections): no "
    "component's write reaches the end as it was written"
)

REASONS = {
    **dict.fromkeys(("deepseek_v4", "hy_v4", "qwen4_exp_text", "glm5_next_text"), STREAMS),
    "gemma3n_text": "every layer predicts and corrects several copies of the residual stream by one another (AltUp)",
    **dict.fromkeys(
        ("gemma4_text", "gemma4_unified_text"),
        "each layer multiplies the whole stream at its end (layer_scalar), and heads' widths differ by layer",
    ),
    "muse_spark_text": "gates mix what enters a layer with what it writes (residual gates): earlier writes shrink",
    "doge": "learned gains multiply the stream that enters a layer (input_residual): earlier writes change",
    "nanochat": "its final norm also norms its embedding: one module called twice, and a trace sees one call",
    "openai-gpt": "its norms come after the residual sum, so no component's write is its own",
    "longcat_flash": "each of its layers has two attentions and two MLPs, beside a mixture that skips one of each",
    "mllama_text_model": "some of its layers attend to images instead of text",
    **dict.fromkeys(("zamba", "zamba2"), "its layers share one attention, which comes between them"),
    **dict.fromkeys(("mamba", "mamba2", "falcon_mamba", "rwkv", "xlstm"), "its layers have no attention heads"),
    **dict.fromkeys(
        ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"),
        "its layers of linear attention have heads of another number and width than the others",
    ),
    "falcon_h1": "each of its layers has Mamba beside attention, which is no head",
}
"""By model type; of a multimodal model that of its text part."""

ENCODED = "an encoder reads the text, and the decoder attends to that"


def reason(config: object) -> str | None:
    """Why a model of this configuration cannot be decomposed, whatever is said of its family; None if unknown."""
    if getattr(config, "is_encoder_decoder", False):
        return ENCODED
    return REASONS.get(getattr(config, "model_type", ""))
