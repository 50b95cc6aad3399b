"""What other tools call an attention head, as "layer.head"."""

import re

_INDEX = r"\[(?:(?::|None|\.\.\.)\s*,\s*)*(\d+)(?:\s*,\s*(?::|None))*\]"
_WRITES = r"(?:hook_z|hook_result|o_proj|c_proj|out_proj|dense)"
_MODULE = rf"(?:\w+\.)*?(\d+)\.(?:attn|self_attn|attention)(?:\.\w+)*?(?:\.{_WRITES})?"
NAMES = (
    re.compile(r"a(\d+)\.h(\d+)"),
    re.compile(r"(?:head\s+)?L?(\d+)\s*\.?\s*H(\d+)", re.IGNORECASE),
    re.compile(r"head\s+(\d+)\.(\d+)", re.IGNORECASE),
    re.compile(r"layer\s*(\d+)[\s,]*head\s*(\d+)", re.IGNORECASE),
    re.compile(r"[(\[]\s*(\d+)\s*,\s*(\d+)\s*[)\]]"),
    re.compile(_MODULE + _INDEX),
)
_OURS = re.compile(r"L?\d+[.H](?:\d+|\*)")
_OTHER_PLACE = re.compile(r"hook_(?!z\b|result\b)\w+|[qkv]_proj|c_attn")
_APART = re.compile(r",(?![^\[]*\])(?![^(]*\))")


def plain(text: str) -> str:
    """The heads of a text, separated by commas, each as "layer.head" where it is called as another tool calls it.

    Known are a9.h6, blocks.9.attn.hook_z[6] and hook_result[:, :, 6], model.layers.9.self_attn.o_proj[6] and the like,
    l9h6, "layer 9 head 6", "(9, 6)". What is none of these stays as it is, and so does what is no head's write, as
    hook_q is: `select_heads` says what is wrong with it.
    """
    if (whole := _one(text)) != text.strip():
        return whole
    return ",".join(map(_one, _APART.split(text)))


def _one(text: str) -> str:
    text = text.strip()
    if _OURS.fullmatch(text) or _OTHER_PLACE.search(text):
        return text
    for name in NAMES:
        if found := name.fullmatch(text):
            return f"{int(found[1])}.{int(found[2])}"
    return text
