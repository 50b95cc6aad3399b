"""Train one of the two small models that ship with selfrepair_nn: `python -m training.train tiny-neox ...`."""

import argparse
import math
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig

from training.corpus import read_documents, training_documents
from training.tokenizer import bos_and_eos, save_tokenizer, train_tokenizer

CONTEXT, VOCABULARY = 256, 2048
ROTARY_SHARE = 0.5
SHAPE = dict(
    vocab_size=VOCABULARY,
    hidden_size=128,
    num_hidden_layers=8,
    num_attention_heads=8,
    max_position_embeddings=CONTEXT,
    use_cache=False,
)


def model_config(name, bos, eos):
    """The architecture of the embedded model `name`."""
    if name == "tiny-neox":
        return _neox_config(bos, eos)
    return LlamaConfig(
        **SHAPE,
        intermediate_size=352,
        num_key_value_heads=4,
        tie_word_embeddings=True,
        bos_token_id=bos,
        eos_token_id=eos,
    )


def _neox_config(bos, eos):
    config = GPTNeoXConfig(
        **SHAPE,
        intermediate_size=512,
        use_parallel_residual=True,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": ROTARY_SHARE,
        },
        tie_word_embeddings=False,
        bos_token_id=bos,
        eos_token_id=eos,
    )
    config.rotary_pct = ROTARY_SHARE  # where transformers 4 looks; without it, it takes 0.25 and says nothing
    return config


def pack(texts, tokenizer, eos):
    """All texts as one tensor of token ids, the end-of-text token after each."""
    encoded = tokenizer.encode_batch(texts, add_special_tokens=False)
    return torch.tensor([token for text in encoded for token in (*text.ids, eos)])


def random_rows(stream, bos, rows, generator):
    """Rows [rows, CONTEXT] that open with BOS and go on with text from a random place of the stream."""
    starts = torch.randint(len(stream) - CONTEXT + 1, (rows, 1), generator=generator)
    text = stream[starts + torch.arange(CONTEXT - 1)]
    return torch.cat([torch.full((rows, 1), bos), text], dim=1)


def token_losses(model, rows):
    """Cross-entropy in nats of every next token, [rows, CONTEXT - 1]."""
    logits = model(rows).logits[:, :-1].float()
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="none")
    return losses.view(len(rows), -1)


def learning_rate(progress, step, peak, warmup=200):
    """Linear warm-up over the first steps, then a cosine from `peak` down to a twentieth of it at progress 1."""
    cosine = 0.05 + 0.95 * (1 + math.cos(math.pi * min(progress, 1))) / 2
    return peak * cosine * min(1, (step + 1) / warmup)


def adamw(model, decay):
    """AdamW that decays the matrices and leaves biases and norms alone."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95))


def progress_of(options):
    """A function step → share of the training done, by steps, or by the clock if --minutes is given."""
    began = time.monotonic()
    if options.minutes:
        return lambda step: (time.monotonic() - began) / (60 * options.minutes)
    return lambda step: step / options.steps


def train(model, stream, bos, options, save, keep):
    """Optimise `model` in place until progress reaches 1; save now and then. Returns the number of steps.

    `keep(step)` is called after each of the steps that --checkpoints names.
    """
    kept = {int(step) for step in options.checkpoints.split(",") if step}
    generator = torch.Generator().manual_seed(options.seed)
    optimizer, progress = adamw(model, options.weight_decay), progress_of(options)
    step, mean, began, saved = 0, math.log(VOCABULARY), time.monotonic(), time.monotonic()
    while True:
        if step in kept:
            keep(step)
        if (done := progress(step)) >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(done, step, options.learning_rate)
        loss = token_losses(model, random_rows(stream, bos, options.rows, generator)).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step, mean = step + 1, 0.98 * mean + 0.02 * loss.item()
        if step % 100 == 0:
            seconds = time.monotonic() - began
            print(f"step {step} done {done:.3f} loss {mean:.4f} seconds {seconds:.0f}", flush=True)
        if time.monotonic() - saved > 60 * options.save_every:
            save()
            saved = time.monotonic()
    save()
    return step


def save_half(model, folder):
    """Write the model with its weights rounded to float16, and a config that asks for float32 arithmetic."""
    copy = type(model)(model.config)
    copy.load_state_dict(model.state_dict())
    copy.half().save_pretrained(folder)
    model.config.dtype = torch.float32
    model.config.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)


def parse_options():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=["tiny-neox", "tiny-llama"])
    parser.add_argument("--sources", required=True, help="folder of the texts, see training/README.md")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model and its tokenizer")
    parser.add_argument("--steps", type=int, default=4000, help="optimiser steps")
    parser.add_argument("--minutes", type=float, help="train for this long instead of for --steps")
    parser.add_argument("--rows", type=int, default=8, help="rows of 256 tokens per step")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--init", type=float, default=0.05, help="standard deviation of the initial weights")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--checkpoints", default="", help="steps after which to keep a model of its own: 0,64,256")
    parser.add_argument("--save-every", type=float, default=5, help="minutes between two checkpoints")
    return parser.parse_args()


def main():
    """Train the tokenizer and the model, and write both to --out."""
    options = parse_options()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    texts = training_documents(read_documents(options.sources))
    tokenizer = train_tokenizer(options.name, texts, VOCABULARY)
    save_tokenizer(options.name, tokenizer, options.out, CONTEXT)
    bos, eos = bos_and_eos(options.name, tokenizer)
    stream = pack(texts, tokenizer, eos)
    config = model_config(options.name, bos, eos)
    config.initializer_range = options.init
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    print(f"{len(stream)} tokens, {sum(p.numel() for p in model.parameters())} parameters", flush=True)

    def save(folder=options.out):
        save_half(model, folder)

    def keep(step):
        folder = options.out / f"step{step}"
        folder.mkdir(exist_ok=True)
        save_tokenizer(options.name, tokenizer, folder, CONTEXT)
        save(folder)

    steps = train(model, stream, bos, options, save, keep)
    print(f"finished after {steps} steps, {steps * options.rows * (CONTEXT - 1)} target tokens")


if __name__ == "__main__":
    main()
