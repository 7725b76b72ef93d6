"""Cases out of seeds: bytes that are turned, cut, doubled and mixed; numbers, texts and brackets that nobody expects."""

from __future__ import annotations

import random
import re
import struct
import zlib
from collections.abc import Callable, Sequence

_NUMBERS = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x100, 0x7FFF, 0x8000, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1)
_WORDS = (
    b"-1",
    b"1e999",
    b"NaN",
    b"null",
    b"true",
    b"[]",
    b"{}",
    b'""',
    b"9" * 30,
    b"9" * 5000,
    b"0.5",
    b"[" * 300 + b"]" * 300,
    b'{"a":' * 300 + b"1" + b"}" * 300,
    b'"\\ud800"',
    b'"\\u0000"',
    b'"../../etc/passwd"',
    b'"/dev/zero"',
    b"\xff\xfe",
    b"\0",
    b"\r",
    "\u2028".encode(),
)
_VALUE = re.compile(rb'"(?:[^"\\]|\\.)*"|-?\d+(?:\.\d+)?|null|true')


def mutate(draws: random.Random, seeds: Sequence[bytes]) -> bytes:
    """One case: a seed after one to four changes, with sums put right half the time."""
    data = bytearray(draws.choice(seeds))
    for _ in range(draws.choice((1, 1, 2, 4))):
        if data:
            draws.choice(_CHANGES)(draws, data, seeds)
    case = bytes(data[:2_000_000])
    return _with_sums(case) if draws.random() < 0.5 else case


def _span(draws: random.Random, data: bytearray) -> tuple[int, int]:
    start = draws.randrange(len(data))
    return start, min(len(data), start + draws.choice((1, 2, 4, 16, 100, 1000)))


def _turn(draws: random.Random, data: bytearray, _: Sequence[bytes]) -> None:
    for _ in range(draws.choice((1, 1, 3, 10))):
        data[draws.randrange(len(data))] ^= 1 << draws.randrange(8)


def _number(draws: random.Random, data: bytearray, _: Sequence[bytes]) -> None:
    form = draws.choice(("<B", "<H", ">H", "<I", ">I"))
    size = struct.calcsize(form)
    value = draws.choice(_NUMBERS) & (256**size - 1)
    where = draws.randrange(max(1, len(data) - size))
    data[where : where + size] = struct.pack(form, value)


def _cut(draws: random.Random, data: bytearray, _: Sequence[bytes]) -> None:
    start, end = _span(draws, data)
    del data[start:end]


def _end(draws: random.Random, data: bytearray, _: Sequence[bytes]) -> None:
    del data[draws.randrange(len(data)) :]


def _double(draws: random.Random, data: bytearray, _: Sequence[bytes]) -> None:
    start, end = _span(draws, data)
    data[end:end] = data[start:end] * draws.choice((1, 2, 50))


def _mix(draws: random.Random, data: bytearray, seeds: Sequence[bytes]) -> None:
    other = draws.choice(seeds)
    start, where = draws.randrange(len(other)), draws.randrange(len(data))
    data[where:] = other[start:]


def _noise(draws: random.Random, data: bytearray, _: Sequence[bytes]) -> None:
    start, end = _span(draws, data)
    data[start:end] = draws.randbytes(end - start)


def _word(draws: random.Random, data: bytearray, _: Sequence[bytes]) -> None:
    """Put something else in the place of a text or a number."""
    values = list(_VALUE.finditer(data, 0, 20_000))
    start, end = draws.choice(values).span() if values else _span(draws, data)
    data[start:end] = draws.choice(_WORDS)


_CHANGES: tuple[Callable[[random.Random, bytearray, Sequence[bytes]], None], ...] = (
    _turn,
    _number,
    _number,
    _cut,
    _end,
    _double,
    _mix,
    _noise,
    _word,
    _word,
)


def _with_sums(data: bytes) -> bytes:
    """The checksums of a PNG or tar put right, so that what was changed is looked at."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return _png_sums(data)
    if data[257:262] == b"ustar":
        return _tar_sums(data)
    return data


def _png_sums(data: bytes) -> bytes:
    out, at = bytearray(data), 8
    while at + 12 <= len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        end = at + 8 + size
        if end + 4 > len(data):
            break
        out[end : end + 4] = struct.pack(">I", zlib.crc32(data[at + 4 : end]))
        at = end + 4
    return bytes(out)


def _tar_sums(data: bytes) -> bytes:
    out = bytearray(data)
    for at in range(0, len(out) - 511, 512):
        if out[at + 257 : at + 262] == b"ustar":
            block = out[at : at + 512]
            block[148:156] = b" " * 8
            out[at + 148 : at + 156] = b"%06o\0 " % sum(block)
    return bytes(out)
