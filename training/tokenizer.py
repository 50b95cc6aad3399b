"""The byte-level BPE tokenizers of the embedded models."""

import json

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIALS = {
    "tiny-neox": {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"},
    "tiny-llama": {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
}


def train_tokenizer(name, texts, vocab_size):
    """Learn a byte-level BPE from `texts`; the special tokens of the model `name` take the first ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(dict.fromkeys(SPECIALS[name].values())),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_tokenizer(name, tokenizer, folder, context):
    """Write tokenizer.json and tokenizer_config.json so that AutoTokenizer loads them as they are."""
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
        **SPECIALS[name],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def bos_and_eos(name, tokenizer):
    """The ids of the token that opens every row and of the one that ends every document."""
    return tuple(tokenizer.token_to_id(SPECIALS[name][key]) for key in ("bos_token", "eos_token"))
