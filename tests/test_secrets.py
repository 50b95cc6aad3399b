"""Keys and proxies: stripped and looked at where they are read, hidden however they are spelt, and never shown."""

import base64
import html
import json
import os
import shlex
import subprocess
import sys
import textwrap
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import cycle
from threading import Thread
from urllib.parse import quote, quote_plus

import numpy as np
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st
from terminal import ENVIRONMENT, HANGING, selfrepair
from tiers import representative

import selfrepair_nn as sr
from selfrepair_nn.backends.ndif.faults import Fault
from selfrepair_nn.backends.ndif.ledger import Ledger, ledger_path
from selfrepair_nn.backends.ndif.server import Server
from selfrepair_nn.errors import SelfRepairError, one_line
from selfrepair_nn.secrets import hidden, hub_token, ndif_key
from selfrepair_nn.store import Store

KEY = "Pl4nted+key/with\"quotes'&more%of=it"
UUID = "0a1b2c3d-4e5f-6071-8293-a4b5c6d7e8f9"
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")


@pytest.fixture(autouse=True)
def no_settings(monkeypatch, tmp_path):
    """Neither keys nor proxies of who runs the tests."""
    monkeypatch.setattr("nnsight.schema.config.CONFIG.API.APIKEY", None)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    for name in ("NDIF_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", *PROXIES, *map(str.lower, PROXIES)):
        monkeypatch.delenv(name, raising=False)


SPELLINGS = {
    "raw": str,
    "repr": repr,
    "bytes": lambda key: repr(key.encode()),
    "ascii": ascii,
    "repr of repr": lambda key: repr(repr(key)),
    "json": json.dumps,
    "json of json": lambda key: json.dumps({"detail": json.dumps({"key": key})}),
    "url": lambda key: quote(key, safe=""),
    "url, small letters": lambda key: quote(key, safe="").lower(),
    "url of url": lambda key: quote(quote(key, safe=""), safe=""),
    "form": quote_plus,
    "every byte": lambda key: "".join(f"%{byte:02x}" for byte in key.encode()),
    "html": html.escape,
    "html of html": lambda key: html.escape(html.escape(key)),
    "entities": lambda key: "".join(f"&#{ord(c)};" for c in key),
    "shell": shlex.quote,
    "\\x": lambda key: "".join(rf"\x{byte:02X}" for byte in key.encode()),
    "\\u": lambda key: "".join(rf"\u{ord(c):04x}" for c in key),
    "octal": lambda key: "".join(rf"\{byte:03o}" for byte in key.encode()),
    "base64": lambda key: base64.b64encode(key.encode()).decode(),
    "basic": lambda key: "Basic " + base64.b64encode(f"api:{key}".encode()).decode(),
    "base64 for addresses": lambda key: base64.urlsafe_b64encode(f"me@{key}!".encode()).decode(),
    "hex": lambda key: key.encode().hex(),
    "bearer": lambda key: f"{{'Authorization': 'Bearer {key}'}}",
    "capitals": str.upper,
    "carriage return": lambda key: f"{key}\r\n",
    "wrapped": lambda key: "\n    ".join(textwrap.wrap(key, 7)),
    "coloured": lambda key: f"{key[:5]}\x1b[0m{key[5:]}",
    "wrapped and quoted": lambda key: repr("\n".join(textwrap.wrap(key, 7))),
}


def pieces(text, size=5):
    """What would give a part of the key away: parts of its spelling of letters and digits."""
    return {text[i : i + size] for i in range(len(text) - size + 1) if text[i : i + size].isalnum()}


@pytest.mark.parametrize("key", [KEY, UUID, "hf_AbCdEfGhIjKlMnOpQr", "k3y:with spaces,é", "back\\slash\\n3w"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_key_is_hidden_in_every_spelling(monkeypatch, key, spelling):
    monkeypatch.setenv("NDIF_API_KEY", key + "\r")
    written = SPELLINGS[spelling](key)
    found = hidden(f"the header {written} is not accepted")
    assert "***" in found
    assert found.startswith("the header ")
    assert found.endswith(" is not accepted")
    assert not pieces(key) & pieces(found), found
    assert not (pieces(written, 7) - pieces("Authorization", 7)) & pieces(found, 7), found


@given(st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=8, max_size=40))
def test_any_key_is_hidden(key):
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("HF_TOKEN", key)
        for spelling in ("repr of repr", "json of json", "url of url", "html", "basic", "shell", "wrapped"):
            written = SPELLINGS[spelling](key)
            assert written not in hidden(f"< {written} >")
            assert key not in hidden(f"< {written} >")


def test_ordinary_text_is_left_alone(monkeypatch):
    monkeypatch.setenv("NDIF_API_KEY", UUID)
    monkeypatch.setenv("HF_TOKEN", "key")
    text = "A key of the basic kind, a bearer of news, 0a1b2c3d and https://a.b/c; hf_hub: 100% of a\\nb\n\tc@d.e"
    assert hidden(text) == text


def test_secrets_that_nobody_named():
    for said, kept in {
        "https://u:p4ss@host/x": "https://***@host/x",
        "https://host/x?X-Amz-Signature=1234&y=2 now": "https://host/x?*** now",
        "'authorization': 'Bearer abcdEFGH12345678'": "'authorization': 'Bearer ***'",
        "token hf_AbCdEfGhIjKlMnOpQrStUv": "token ***",
    }.items():
        assert hidden(said) == kept


def test_passwords_of_proxies_are_hidden(monkeypatch):
    monkeypatch.setenv("https_proxy", "http://me:p%40ssw0rd-of-mine@proxy:3128")
    for said in (
        "407 for p@ssw0rd-of-mine",
        "p%40ssw0rd-of-mine",
        base64.b64encode(b"me:p@ssw0rd-of-mine").decode(),
    ):
        assert "***" in hidden(said)
        assert not pieces("ssw0rdofmine") & pieces(hidden(said))


def test_no_part_of_a_key_is_left_where_a_message_is_cut(monkeypatch):
    monkeypatch.setenv("NDIF_API_KEY", UUID)
    for before in range(270, 300):
        said = one_line(ValueError("x" * before + UUID))
        assert not pieces(UUID) & pieces(said.replace("x", "-"))
        assert not pieces(UUID) & pieces(Fault("code", "y" * (2000 - before) + UUID + "x" * before).text)


@pytest.mark.parametrize("around", ["{}\r", "{}\r\n", " {}\t", "\n{}"])
def test_white_space_around_a_key_is_no_part_of_it(monkeypatch, tmp_path, around):
    monkeypatch.setenv("NDIF_API_KEY", around.format(UUID))
    assert ndif_key() == UUID
    server = Server("http://127.0.0.1:1", patience=1)
    assert server._http.headers["ndif-api-key"] == UUID
    monkeypatch.delenv("NDIF_API_KEY")
    monkeypatch.setattr("nnsight.schema.config.CONFIG.API.APIKEY", around.format(UUID))
    assert ndif_key() == UUID
    monkeypatch.setenv("HF_TOKEN", around.format(UUID))
    assert hub_token() == UUID
    monkeypatch.delenv("HF_TOKEN")
    (tmp_path / "token").write_text(around.format(UUID))
    assert hub_token() == UUID
    monkeypatch.setenv("NDIF_API_KEY", " \r\n")
    monkeypatch.setattr("nnsight.schema.config.CONFIG.API.APIKEY", None)
    assert ndif_key() is None


# What cannot work

BAD = {
    "é": "Pl4nted\xe9key",
    "line": "Pl4nted\nkey-more",
    "zero": "Pl4nted\x7fkey",
    "dash": "Pl4nted–key–more",
}


def assert_told(ended, *fragments, code=1):
    assert (ended.code, ended.out) == (code, "")
    assert ended.err.count("\n") == 1, ended.err
    for fragment in fragments:
        assert fragment in ended.err
    assert "Pl4nted" not in ended.err


def reached(*_a, **_k):
    pytest.fail("something was sent")


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("origin", ["NDIF_API_KEY", "nnsight"])
def test_a_key_that_no_header_can_carry(monkeypatch, tmp_path, origin, bad):
    monkeypatch.setattr("httpx.Client.send", reached)
    if origin == "nnsight":
        monkeypatch.setattr("nnsight.schema.config.CONFIG.API.APIKEY", BAD[bad])
    else:
        monkeypatch.setenv(origin, BAD[bad])
    run = ["run", "heads", "--host", "http://127.0.0.1:1", "--tokens", 256, "--out", tmp_path / "s.zarr"]
    assert_told(selfrepair(*run), origin, "character 8 of", "copy the key again")
    assert not (tmp_path / "s.zarr").exists()
    ended = selfrepair("doctor", "--host", "http://127.0.0.1:1")
    assert ended.code == 1
    assert (
        f"FAIL  NDIF key      {'NDIF_API_KEY' if origin != 'nnsight' else 'the API key in nnsight'}"
        in ended.out
    )
    assert "Pl4nted" not in ended.out + ended.err
    with pytest.raises(SelfRepairError, match="character 8 of"):
        Server("http://127.0.0.1:1", patience=1)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("what", ["--model", "--prompts"])
def test_a_token_that_no_header_can_carry(monkeypatch, tmp_path, what, bad):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("socket.socket.connect", reached)
    monkeypatch.setenv("HF_TOKEN", BAD[bad])
    assert_told(
        selfrepair("run", "heads", what, "owner/name", "--out", tmp_path / "s.zarr"),
        "HF_TOKEN",
        "character 8",
    )
    ended = selfrepair("doctor")
    assert (ended.code, "FAIL  HF_TOKEN      HF_TOKEN (not shown)" in ended.out) == (1, True)
    assert "Pl4nted" not in ended.out + ended.err
    assert selfrepair("plan", "heads", "--tokens", 256).code == 0


PROBLEMS = {
    "socks5://me:Pl4nted@127.0.0.1:1080": "pip install socksio",
    "socks5h://127.0.0.1:1080": "pip install socksio",
    "http://me:Pl4nted@proxy:3128\r": "holds a character that no address can",
    "http://me:Pl4n\tted@proxy:3128": "holds a character that no address can",
    "ftp://me:Pl4nted@proxy:21": "is not the address of a proxy",
    "socks4://127.0.0.1:1080": "is not the address of a proxy",
    "http://proxy:99999": "names no host and port",
    "http://:3128": "names no host",
    "http://": "names no host",
}


@pytest.mark.parametrize(
    ("address", "name"), zip(PROBLEMS, cycle(["HTTP_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"]))
)
def test_a_proxy_that_cannot_work(monkeypatch, tmp_path, name, address):
    monkeypatch.setattr("selfrepair_nn.settings.find_spec", lambda package: None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("socket.socket.connect", reached)
    monkeypatch.setenv(name, address)
    run = ["run", "heads", "--out", tmp_path / "s.zarr", "--tokens", 256]
    for more in (["--host", "http://127.0.0.1:1"], ["--model", "owner/name"], ["--prompts", "owner/name"]):
        assert_told(selfrepair(*run, *more), f"error: {name} ", PROBLEMS[address], "unset it")
    for more in ([], ["--host", "http://127.0.0.1:1"]):
        ended = selfrepair("doctor", *more)
        assert ended.code == 1
        assert f"FAIL  proxy         {name} " in ended.out
        assert PROBLEMS[address] in ended.out
        assert "Pl4n" not in ended.out + ended.err
    assert selfrepair("plan", "heads", "--tokens", 256).code == 0


def test_proxies_that_can_work(monkeypatch):
    monkeypatch.setenv("NDIF_API_KEY", UUID)
    for settings in (
        {"HTTPS_PROXY": "http://me:p%40ss@127.0.0.1:3128"},
        {"ALL_PROXY": "127.0.0.1:3128", "NO_PROXY": "localhost,127.0.0.1,::1,.a.b"},
        {"HTTPS_PROXY": "ftp://x", "NO_PROXY": "*"},
        {"HTTPS_PROXY": "ftp://x", "https_proxy": "http://127.0.0.1:3128"},
    ):
        with monkeypatch.context() as patched:
            for name, value in settings.items():
                patched.setenv(name, value)
            Server("http://127.0.0.1:1", patience=1)
    monkeypatch.setenv("no_proxy", "[::1]:x,a")
    with pytest.raises(SelfRepairError, match="no_proxy holds an entry that is no host"):
        Server("http://127.0.0.1:1", patience=1)


# Where keys flow


class Echo(BaseHTTPRequestHandler):
    """Answers everything with the headers that it got, as a hub or a server that is being debugged does."""

    status = 403

    def do_GET(self):
        said = " | ".join(f"{name}: {value}" for name, value in self.headers.items())
        body = json.dumps({"error": said, "detail": said}).encode()
        self.send_response(self.status, said)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        for name in ("X-Error-Message", "X-HF-Warning"):
            self.send_header(name, f"topic; \x1b[31m{said}")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_POST = do_GET

    def log_message(self, *_):
        pass


@contextmanager
def echo(status):
    with ThreadingHTTPServer(("127.0.0.1", 0), type("Echo", (Echo,), {"status": status})) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


def ended_in(folder, *arguments, **settings):
    """A command in a process of its own, online."""
    env = {k: v for k, v in os.environ.items() if k.upper() not in PROXIES} | ENVIRONMENT
    env |= {"HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0", "HF_HOME": str(folder / "hub")} | settings
    return subprocess.run(
        [sys.executable, "-m", "selfrepair_nn", *map(str, arguments)],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=HANGING,
    )


@pytest.mark.parametrize(
    "asked", representative(["--model 401", "--prompts 403", "--model 400"], "--model 401")
)
def test_a_hub_that_repeats_what_it_got(tmp_path, asked):
    what, status = asked.split()
    token = "hf_Pl4ntedPlantedPlanted"
    with echo(int(status)) as address:
        ended = ended_in(
            tmp_path, "run", "heads", what, "owner/name", HF_ENDPOINT=address, HF_TOKEN=f"{token}\r"
        )
    assert ended.returncode in (1, 2), ended
    assert "Pl4nted" not in ended.stdout + ended.stderr
    assert "\x1b" not in ended.stdout + ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_server_that_repeats_what_it_got(tmp_path):
    run = ["run", "heads", "--tokens", 256, "--out", tmp_path / "s.zarr", "--patience", 1]
    with echo(401) as address:
        asked = [
            ended_in(tmp_path, *run, "--host", address, NDIF_API_KEY=f"{UUID}\r"),
            ended_in(tmp_path, "doctor", "--host", address, NDIF_API_KEY=f"{UUID}\r"),
        ]
    for ended in asked:
        assert ended.returncode == 1
        assert not pieces(UUID) & pieces(ended.stdout + ended.stderr)
        assert "\x1b" not in ended.stdout + ended.stderr


def test_what_a_store_and_its_ledger_keep(monkeypatch, tmp_path):
    monkeypatch.setenv("NDIF_API_KEY", KEY)
    path = tmp_path / "s.zarr"
    monkeypatch.setattr(sys, "argv", ["selfrepair", "run", f"--host=http://x?k={KEY}"])
    sr.run(
        "heads",
        layers="7",
        heads="7.0",
        tokens=64,
        length=32,
        out=path,
        command=f"x --key {shlex.quote(KEY)}",
    )
    Store(path).annotate(server={"host": f"http://{quote(KEY, safe='')}", "ndif": KEY}, said=KEY)
    ledger = Ledger(ledger_path(path), "r")
    ledger.write("failed", "a part", kind="key", text=Fault("key", f"{KEY!r} is no key").text, job="j")
    xr.open_zarr(path).close()
    written = b"".join(each.read_bytes() for each in tmp_path.rglob("*") if each.is_file()).decode("latin-1")
    for spelling in SPELLINGS.values():
        assert spelling(KEY) not in written
    assert not pieces("Pl4nted") & pieces(written)
    attributes = xr.open_zarr(path).attrs
    assert "***" in attributes["command"]
    assert np.isfinite(xr.open_zarr(path).self_repair.sel(layer=7, head=0)).all()
    assert json.loads(attributes["server"]) == {"host": "http://***", "ndif": "***"}
