"""Measure a trained model on the held-out text, for its model card: `python -m training.evaluate DIR ...`."""

import argparse
import math
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from training.corpus import read_documents, split_documents, training_documents
from training.train import CONTEXT, pack, token_losses

POSITIONS = ((0, 16), (16, 64), (64, 128), (128, 255))
PRIORS = (3, 10, 30, 100, 300)


def consecutive_rows(stream, bos):
    """The stream cut into rows [rows, CONTEXT] that open with BOS; an incomplete last row is dropped."""
    text = stream[: len(stream) // (CONTEXT - 1) * (CONTEXT - 1)].view(-1, CONTEXT - 1)
    return torch.cat([torch.full((len(text), 1), bos), text], dim=1)


@torch.no_grad()
def heldout_losses(model, rows, batch=16):
    """Nats of every target, [rows, CONTEXT - 1]."""
    return torch.cat([token_losses(model, part) for part in rows.split(batch)])


def unigram_losses(stream, rows, vocabulary):
    """Nats of every target under the training frequencies of single tokens, plus one each."""
    counts = torch.bincount(stream, minlength=vocabulary).double() + 1
    return -(counts / counts.sum()).log()[rows[:, 1:]]


def bigram_losses(stream, rows, vocabulary, prior):
    """Nats of every target given the token before it: training counts plus `prior` counts spread as the unigram is."""
    pairs = torch.bincount(stream[:-1] * vocabulary + stream[1:], minlength=vocabulary**2)
    pairs = pairs.view(vocabulary, vocabulary).double()
    unigram = torch.bincount(stream, minlength=vocabulary).double() + 1
    smoothed = pairs + prior * unigram / unigram.sum()
    return -(smoothed / smoothed.sum(1, keepdim=True)).log()[rows[:, :-1], rows[:, 1:]]


def best_bigram_losses(stream, rows, vocabulary):
    """The bigram baseline at its best: with the prior that suits the held-out text itself."""
    return min((bigram_losses(stream, rows, vocabulary, prior) for prior in PRIORS), key=torch.mean)


def describe(name, losses, text_bytes):
    """One line: nats per token and bits per byte."""
    bits = losses.sum().item() / math.log(2) / text_bytes
    return f"{name:8} {losses.mean().item():.4f} nats/token  {bits:.4f} bits/byte"


def sample(model, tokenizer, prompt, tokens=80):
    """The prompt with a continuation sampled at temperature 0.8."""
    torch.manual_seed(0)
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer.encode(prompt, add_special_tokens=False)]])
    settings = dict(do_sample=True, temperature=0.8, top_k=0, pad_token_id=tokenizer.eos_token_id)
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, **settings)
    return tokenizer.decode(output[0, 1:])


def main():
    """Print the numbers and the samples of a model card."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="folder of the model")
    parser.add_argument("--sources", required=True)
    parser.add_argument("--heldout", type=Path, required=True)
    parser.add_argument(
        "--prompts", nargs="*", default=["And the LORD said unto", "HAMLET.\n", "Emma could not"]
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    backend, eos = tokenizer.backend_tokenizer, tokenizer.eos_token_id
    text = pack(split_documents(options.heldout.read_text()), backend, eos)
    rows = consecutive_rows(text, tokenizer.bos_token_id)
    text_bytes = len(tokenizer.decode(rows[:, 1:].flatten(), skip_special_tokens=True).encode())
    losses = heldout_losses(model, rows)
    print(f"{rows.shape[0]} rows, {losses.numel()} targets, {text_bytes} bytes")
    print(describe("model", losses, text_bytes))
    stream = pack(training_documents(read_documents(options.sources)), backend, eos)
    print(describe("bigram", best_bigram_losses(stream, rows, len(tokenizer)), text_bytes))
    print(describe("unigram", unigram_losses(stream, rows, len(tokenizer)), text_bytes))
    for start, end in POSITIONS:
        print(f"positions {start}-{end - 1}: {losses[:, start:end].mean():.4f} nats/token")
    for prompt in options.prompts:
        print("---", sample(model, tokenizer, prompt), sep="\n")


if __name__ == "__main__":
    main()
