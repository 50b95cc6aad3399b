"""Keys and proxies that cannot work: found where they are read, and told in a line that does not show them."""

import os
from collections.abc import Iterator
from importlib.util import find_spec
from urllib.request import getproxies

from selfrepair_nn.errors import SelfRepairError
from selfrepair_nn.secrets import HUB_VARIABLES, NDIF_VARIABLE, hub_token, ndif_key

ADDRESS = "write for example http://127.0.0.1:3128, or unset it"


def require_ndif() -> None:
    """SelfRepairError for a key or a proxy with which no NDIF server can be asked."""
    _require(ndif_fault(), *proxy_faults())


def require_hub() -> None:
    """SelfRepairError for a token or a proxy with which the Hugging Face Hub cannot be asked, if it will be."""
    from huggingface_hub import constants

    if not constants.HF_HUB_OFFLINE:
        _require(hub_fault(), *proxy_faults())


def ndif_fault() -> str | None:
    """What is wrong with the key for NDIF."""
    return _key_fault((NDIF_VARIABLE,), "the API key in nnsight's configuration", ndif_key())


def hub_fault() -> str | None:
    """What is wrong with the token for the Hugging Face Hub."""
    return _key_fault(HUB_VARIABLES, "the token that `hf auth login` stored", hub_token())


def proxy_faults() -> Iterator[str]:
    """What is wrong with the proxies that the environment names: a line for each that httpx cannot use."""
    import httpx

    given = getproxies()
    if "*" in (host.strip() for host in given.get("no", "").split(",")):
        return
    faults = {scheme: _proxy_fault(given[scheme]) for scheme in ("http", "https", "all") if given.get(scheme)}
    found = [f"{_variable(scheme)} {fault}" for scheme, fault in faults.items() if fault]
    if not found:
        try:
            httpx.Client(verify=False).close()
        except Exception:
            found = [
                f"{_variable('no')} holds an entry that is no host: write host names separated by commas"
            ]
    yield from found


def _require(*faults: str | None) -> None:
    if fault := next(filter(None, faults), None):
        raise SelfRepairError(fault)


def _key_fault(variables: tuple[str, ...], stored: str, key: str | None) -> str | None:
    """A header carries printable ASCII only."""
    bad = [i for i, c in enumerate(key or "", start=1) if not " " <= c <= "~"]
    if not bad:
        return None
    origin = next((name for name in variables if os.environ.get(name, "").strip()), stored)
    return (
        f"{origin} (not shown) cannot be a key: its character {bad[0]} of {len(key or '')} is not printable ASCII; "
        "copy the key again"
    )


def _proxy_fault(address: str) -> str | None:
    import httpx

    if any(c.isspace() or not c.isprintable() for c in address):
        return f"(not shown) holds a character that no address can, such as a line's end: {ADDRESS}"
    try:
        url = httpx.Proxy(address if "://" in address else f"http://{address}").url
    except (httpx.InvalidURL, ValueError):
        return f"(not shown) is not the address of a proxy of http, https or socks5: {ADDRESS}"
    if not url.host or not 0 < (url.port or 1) < 2**16:
        return f"(not shown) names no host and port: {ADDRESS}"
    if url.scheme.startswith("socks") and find_spec("socksio") is None:
        return "names a SOCKS proxy, and the package for those is missing: pip install socksio, or unset it"
    return None


def _variable(scheme: str) -> str:
    """The variable that says so: the one in small letters comes first."""
    name = f"{scheme}_proxy"
    return name if os.environ.get(name) else name.upper()
