"""Seeded damage to the content of files: bytes, lines, values of JSON and TOML, binary headers."""

from __future__ import annotations

import bz2
import gzip
import json
import random
import re
import struct
from collections.abc import Callable
from typing import Any

import pyarrow

HOSTILE_TEXTS = (
    "",
    "x",
    "../outside",
    "/proc/self/mem",
    "a\0b",
    "\x1b[2J\x1b]0;title\x07",
    "\u202eright to left\u2066",
    "\x9b31m",
    "<script>alert(1)</script><img src=x onerror=alert(1)>",
    "[bold red]x[/] [/nothing]",
    "{x} %s %(y)d",
    "\ud800",
    "\ufeff",
    "line\u2028line\r\nline",
    "NaN",
    "y" * 100_000,
)
HOSTILE = (  # JSON values, including some that Python's writer does not produce
    *("null", "true", "false", "-1", "0", "1", "2", "0.5", "-0.0", "1e-400", "1e400", "-1e400", "NaN", "-Infinity"),
    *(str(2**31), str(2**53 + 1), str(2**63 - 1), str(2**63), str(-(2**63) - 1), "1" * 400, "-" + "9" * 5000),
    *("1000000000", "1e18", "1e308", "1000000000000000000", "[]", "{}", "[[]]", "[null]", '{"":null}', "[{}]"),
    *("[" * 50 + "]" * 50, '{"a":' * 50 + "1" + "}" * 50, "[" * 5000 + "]" * 5000, '{"a":' * 5000 + "1" + "}" * 5000),
    *("[" + ",".join("0" for _ in range(10_000)) + "]", '["a","a"]', '[["a",1],["a",1]]', '{"a":1,"a":2}'),
    *(json.dumps(text) for text in HOSTILE_TEXTS),
)
HOSTILE_TOML = (
    *("true", "-1", "0", "2147483648", "9223372036854775808", "1" * 400, "1e400", "inf", "-inf", "nan", '""', '"x"'),
    *("1e308", "[]", "{}", "[[]]", "{a = 1}", "[" * 50 + "]" * 50, "[" * 5000 + "]" * 5000, "1979-05-27", "07:32:00"),
    *(
        "1979-05-27T07:32:00Z",
        "0001-01-01",
        "9999-12-31T23:59:59-23:59",
        "0xff",
        "'''x'''",
        r'"\u001b[2J"',
        r'"\u202e"',
    ),
    '"' + "y" * 100_000 + '"',
)
DEEP = b"[" * 100_000
NUMBERS = (0, 1, -1, 2**15, 2**16, 2**31 - 1, -(2**31), 20240520, 20240521, 10**6, 10**9)

Mutator = Callable[[bytes, random.Random], bytes]


def mutated(content: bytes, kind: str, rng: random.Random) -> bytes:
    """Return a damaged copy of a file's content, with damage that fits its kind.

    Args:
        content: content of a healthy file.
        kind: one of `KINDS`.
        rng: source of all random choices.
    """
    for _ in range(20):
        with_structure = rng.random() < 0.65
        found = KINDS[kind](content, rng) if with_structure else as_bytes(content, rng)
        if found != content:
            break
    return found


# --- any file ----------------------------------------------------------------------------------------------------


def as_bytes(content: bytes, rng: random.Random) -> bytes:
    """Change bits, runs of bytes or lines."""
    data, n = bytearray(content), len(content)
    at = _place(n, rng)
    end = min(n, at + rng.choice((1, 1, 2, 8, 64, 1024)))
    match rng.randrange(12):
        case 0 | 1:
            for _ in range(rng.randint(1, 8)):
                if n:
                    data[_place(n, rng)] ^= 1 << rng.randrange(8)
        case 2:
            del data[at:end]
        case 3:
            data[at:at] = rng.randbytes(rng.choice((1, 2, 16, 300)))
        case 4:
            data[at:at] = data[at:end]
        case 5:
            del data[at:]
        case 6:
            data[at:end] = b"\0" * rng.choice((1, end - at, 4096))
        case 7:
            data[at:at] = DEEP if rng.random() < 0.5 else b'{"a":' * 20_000
        case 8 | 9:
            return _lines(content, rng)
        case 10:
            data[at:end] = rng.choice(HOSTILE).encode("utf-8", "surrogatepass")
        case _:
            whole = (b"", b"\n", b"\0", b"\xff\xfe", b"\xef\xbb\xbf" + content, DEEP, content * 2, b"y" * 500_000)
            return rng.choice((*whole, *(value.encode("utf-8", "surrogatepass") for value in HOSTILE)))
    return bytes(data)


def _place(n: int, rng: random.Random) -> int:
    """Return a position among ``n`` bytes, more often near the start and the end, where formats have headers."""
    near = min(n, 512)
    return min(
        max(0, n - 1),
        rng.choice((rng.randrange(n + 1), rng.randrange(near + 1), n - 1 - rng.randrange(near + 1))) % (n + 1),
    )


def _lines(content: bytes, rng: random.Random) -> bytes:
    lines = content.splitlines(keepends=True) or [b""]
    i, j = rng.randrange(len(lines)), rng.randrange(len(lines))
    match rng.randrange(5):
        case 0:
            lines[i], lines[j] = lines[j], lines[i]
        case 1:
            lines.insert(j, lines[i])
        case 2:
            del lines[i]
        case 3:
            lines.insert(i, rng.choice(HOSTILE).encode("utf-8", "surrogatepass") + b"\n")
        case _:
            lines[i] = rng.choice(
                (b"\n", lines[i].rstrip() + lines[j], lines[i].replace(b'"', b"'"), b"\xff\n", b" \t\r\n")
            )
    return b"".join(lines)


# --- JSON --------------------------------------------------------------------------------------------------------


def as_json(content: bytes, rng: random.Random) -> bytes:
    """Change one or a few values, keys or elements."""
    if len(content) > 200_000:  # vocabularies are slow to parse
        return _one_entry(content, rng)
    value = json.loads(content)
    raw: dict[str, str] = {}
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        value = _changed(value, rng, raw)
    text = json.dumps(value, ensure_ascii=rng.random() < 0.5, indent=rng.choice((None, 2)))
    for mark, instead in raw.items():
        text = text.replace(json.dumps(mark), instead)
    return text.encode("utf-8", "surrogatepass")


def _one_entry(content: bytes, rng: random.Random) -> bytes:
    """Change the key or value of an entry with a number."""
    entry = re.compile(rb'"(?:[^"\\]|\\.)*"(: ?)\d+').search(content, rng.randrange(len(content) // 2))
    assert entry is not None
    value = rng.choice(HOSTILE).encode("utf-8", "surrogatepass")
    at, end = (entry.end(1), entry.end()) if rng.random() < 0.7 else (entry.start(), entry.start(1))
    return content[:at] + value + content[end:]


def as_json_lines(content: bytes, rng: random.Random) -> bytes:
    """Change the value of one line."""
    lines = content.splitlines()
    i = rng.randrange(len(lines))
    lines[i] = as_json(lines[i], rng).replace(b"\n", b" ")
    return b"\n".join(lines) + b"\n"


def _changed(value: Any, rng: random.Random, raw: dict[str, str]) -> Any:
    """Return ``value`` with one change; texts in ``raw`` replace marks in the result."""
    path: list[tuple[Any, Any]] = []
    inner = value
    while isinstance(inner, (dict, list)) and inner and (not path or rng.random() < 0.85):
        key = rng.choice(list(inner)) if isinstance(inner, dict) else rng.randrange(len(inner))
        path.append((inner, key))
        inner = inner[key]
    if not path or rng.random() < 0.02:
        return _hostile(rng, raw)
    holder, key = path[-1]
    what = rng.randrange(10)
    if what < 6:
        holder[key] = _hostile(rng, raw)
    elif isinstance(holder, list):
        match what:
            case 6:
                del holder[key]
            case 7:
                holder.insert(key, inner)
            case 8:
                holder.append(_hostile(rng, raw))
            case _:
                holder.reverse()
    else:
        match what:
            case 6:
                del holder[key]
            case 7:
                holder[f"{key}_" if rng.random() < 0.5 else rng.choice(HOSTILE_TEXTS)] = holder.pop(key)
            case 8:
                holder[rng.choice(("foreign", "a.b", "../x", *HOSTILE_TEXTS))] = _hostile(rng, raw)
            case _:  # duplicate the key
                other = rng.choice(HOSTILE)
                whole = ", ".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in holder.items())
                mark = _mark(raw, "{" + whole + f", {json.dumps(key)}: {other}" + "}")
                if len(path) == 1:
                    return mark
                above, at = path[-2]
                above[at] = mark
    return value


def _hostile(rng: random.Random, raw: dict[str, str]) -> str:
    return _mark(raw, rng.choice(HOSTILE))


def _mark(raw: dict[str, str], instead: str) -> str:
    for mark, text in raw.items():  # within text that is already written out
        instead = instead.replace(json.dumps(mark), text)
    mark = f"@@{len(raw)}@@"
    raw[mark] = instead
    return mark


# --- other formats -----------------------------------------------------------------------------------------------


def as_toml(content: bytes, rng: random.Random) -> bytes:
    """Change a value, a key or a line."""
    lines = content.decode().splitlines()
    settings = [i for i, line in enumerate(lines) if re.match(r"\w+ *=", line)]
    i = rng.choice(settings)
    key, _, old = lines[i].partition("=")
    match rng.randrange(8):
        case 0:
            del lines[i]
        case 1:
            lines.insert(i, lines[i])
        case 2:
            other = rng.choice(("foreign", "a.b", r'"\u001b"', f"{key.strip()}_"))
            lines[i] = f"{other} = {old}"
        case 3:
            strange = ("[x]", "[[price]]", "[price]", "x = 1", "[[x]]", "=", "[")
            lines.insert(rng.randrange(len(lines)), rng.choice(strange))
        case _:
            lines[i] = f"{key}= {rng.choice(HOSTILE_TOML)}"
    return ("\n".join(lines) + "\n").encode()


def as_safetensors(content: bytes, rng: random.Random) -> bytes:
    """Change the JSON header or its length."""
    (n,) = struct.unpack("<Q", content[:8])
    header, tensors = content[8 : 8 + n], content[8 + n :]
    if rng.random() < 0.2:
        n = rng.choice((0, 1, n - 1, n + 1, n + 1000, 10**8, 2**31, 2**63, 2**64 - 1))
        return struct.pack("<Q", n) + header + tensors
    header = as_json(header, rng) if rng.random() < 0.8 else as_bytes(header, rng)
    return struct.pack("<Q", len(header)) + header + tensors


def as_shard(content: bytes, rng: random.Random) -> bytes:
    """Change a number of llm.c's header, or cut or replace tokens."""
    data = bytearray(content)
    if rng.random() < 0.7:
        struct.pack_into("<i", data, 4 * rng.choice((0, 1, 2, 2, 2, rng.randrange(256))), rng.choice(NUMBERS))
    elif rng.random() < 0.5:
        del data[rng.randrange(1024, len(data)) :]
    else:
        data[1024:] = b"\xff" * (len(data) - 1024)
    return bytes(data)


def as_table(content: bytes, rng: random.Random) -> bytes:
    """Change a field of CSV."""
    lines = content.decode().splitlines()
    i = rng.randrange(len(lines))
    fields = lines[i].split(",")
    fields[rng.randrange(len(fields))] = rng.choice(
        ('"', '""', '"unclosed', "", "a\0b", '"' + "z" * 100_000 + '"', "z" * 500_000, *HOSTILE_TEXTS[1:])
    )
    lines[i] = ",".join(fields) + ("," * 1000 if rng.random() < 0.1 else "")
    return ("\n".join(lines) + "\n").encode("utf-8", "surrogatepass")


def compressed(unpack: Callable[[bytes], bytes], pack: Callable[[bytes], bytes], inner: Mutator) -> Mutator:
    """Change the content of a compressed file."""
    return lambda content, rng: pack(inner(unpack(content), rng))


def _unpack_zstd(content: bytes) -> bytes:
    stream: bytes = pyarrow.CompressedInputStream(pyarrow.BufferReader(content), "zstd").read()
    return stream


def _pack_zstd(content: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    packed: bytes = sink.getvalue().to_pybytes()
    return packed


def _pack_gzip(content: bytes) -> bytes:
    return gzip.compress(content, 1, mtime=0)


KINDS: dict[str, Mutator] = {
    "json": as_json,
    "jsonl": as_json_lines,
    "toml": as_toml,
    "safetensors": as_safetensors,
    "shard": as_shard,
    "csv": as_table,
    "text": _lines,
    "bytes": as_bytes,
    "gz": compressed(gzip.decompress, _pack_gzip, as_json_lines),
    "bz2": compressed(bz2.decompress, bz2.compress, as_json_lines),
    "zst": compressed(_unpack_zstd, _pack_zstd, as_json_lines),
}
