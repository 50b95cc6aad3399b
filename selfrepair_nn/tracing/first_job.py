"""The smallest job there is: a few known vectors through every layer by itself, to tell which model answers.

Of `first_job` (told here, for the text of a function travels with each request, a module's does not): every layer is
given the same known stream [token, d_model], whatever the layers before it write, and its MLP is not told what its
attention wrote, so that what differs in one place shows in one place. It returns, in float64,

    mixing, mlp [layer, token + 1]    of what attention (or a mixer in its place) and MLP write, each behind the norm
                                      that follows it, if one does: sums over the last dimension times known numbers;
                                      and how large these are, the root mean square of what random numbers would give
    embedding, final_norm [token + 1] the same of what the first layer reads, and of the final norm on the known stream
    unembedding [3]                   the same of two of the known vectors
    dtype [1]                         zero in the number format that the model computes in
    weights [1]                       1 if attention gives its weights, as only an implementation does that makes them
    told [letter]                     what a process that has the weights knows: the name of attention's implementation,
                                      the tensor-parallel degree, the dtype of weights

What overflows a model's number format counts as nothing. Known numbers lie between -2 and 2 and are multiples of 1/64,
which every format holds; they follow from integers alone, the same on every machine.
"""

import torch
from nnsight import save

from selfrepair_nn.tracing.clean import no_logits
from selfrepair_nn.tracing.places import like_rows, part, place, written
from selfrepair_nn.tracing.readouts import widen


def first_job(model, arrays, plan, tick=None, known=None):
    tokens, layers = arrays["tokens"], place(model, plan, "layers")
    with torch.no_grad(), model.trace(tokens, use_cache=False, logits_to_keep=no_logits(plan)):
        found = save({"mixing": [], "mlp": []})
        stream = layers[0].input
        key = drawn(stream.shape[-1], 1)
        given = drawn(tokens.numel() * len(key), 2).view(1, -1, len(key)).to(stream.device, stream.dtype)
        found["embedding"] = keyed(stream, key)
        stream[:] = given
        for layer in range(len(layers)):
            through_mixer(model, plan, layer, key, found)
            found["mlp"].append(keyed(like_rows(written(part(model, plan, layer, "mlp")), tokens), key))
            if layer < len(layers) - 1:
                others = plan["model"]["returns"].get("layer", 1) - 1
                layers[layer].output = (given, *[None] * others) if "layer" in plan["model"]["returns"] else given
        norm = place(model, plan, "final_norm")
        last = norm.input
        found["dtype"] = torch.zeros(1, dtype=last.dtype)
        last[:] = given
        found["final_norm"] = keyed(norm.output, key)
        logits = place(model, plan, "unembedding")(given[0, :2].to(last.device))
        found["unembedding"] = keyed(logits, drawn(logits.shape[-1], 3))
    held = told(model._module).ljust(64)
    found["told"] = torch.tensor([float(ord(letter)) for letter in held])
    return {name: torch.stack(each) if isinstance(each, list) else each for name, each in found.items()}


def through_mixer(model, plan, layer, key, found):
    behind, headless = "post_norm" in plan["model"]["places"], layer in plan["model"]["headless"]
    if headless:
        silence(written(part(model, plan, layer, "mixer")), key, found)
    elif not behind:
        silence(part(model, plan, layer, "output_projection").output, key, found)
    if not headless and "weights" not in found:
        out = part(model, plan, layer, "attention").output
        found["weights"] = torch.tensor([float(isinstance(out, tuple) and out[1] is not None)])
    if behind:
        silence(part(model, plan, layer, "post_norm").output, key, found)


def silence(x, key, found):
    found["mixing"].append(keyed(x, key))
    x[:] = 0


def keyed(x, key):
    x, key = widen(x).cpu().flatten(0, -2).nan_to_num(0, 0, 0), widen(key)
    size = x.norm() * (key.square().mean() / len(x)).sqrt()
    return torch.cat([(x * key).sum(-1), size[None]]).double()


def drawn(count, salt):
    x = torch.arange(1, count + 1) * 48271 + salt
    for _ in range(3):
        x = (x * x + 16807 * x + salt) % (2**31 - 1)
    return (x % 255 - 127) / 64


def told(module):
    if module.device.type == "meta":
        return ""
    config = getattr(module.config, "text_config", None) or module.config
    return f"{config._attn_implementation} {module.tp_size or 1} {module.dtype}"
