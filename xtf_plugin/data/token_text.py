"""The bytes of each token, and the tokens that a regular expression over the completion matches.

One character may be spread over several tokens, and decoding tokens one by one loses leading spaces. So each token is
turned into its bytes. A completion is their concatenation, decoded with `surrogateescape` so that no byte is lost; a
match in it is mapped back to bytes, and from there to tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import XTFUserError
from .ragged import CHUNK_TOKENS, Bools, Ints, chunks

SPREAD = 8  # tokens that one character may be spread over
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def byte_alphabet() -> dict[str, int]:
    """Byte of each character of byte-level BPE (GPT-2).

    Bytes that are visible in Latin-1 are written as themselves, the others in ascending order as U+0100, U+0101, ...
    """
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(0x100 + index): byte for index, byte in enumerate(hidden)}


def token_bytes(tokenizer: Any, ids: Sequence[int]) -> list[bytes]:
    """The bytes that each token contributes to a text, in the order of `ids`.

    Equals `tokenizer.decode([id]).encode()`, except that leading spaces and incomplete characters are kept. Byte-level
    BPE and SentencePiece-style vocabularies are read exactly, added and special tokens are their literal content, and
    other vocabularies are decoded token by token. An id that the tokenizer does not know has no bytes.

    Args:
        tokenizer: of transformers; or the bytes of each token, as a score table has them.
        ids: of tokens.
    """
    if isinstance(tokenizer, Mapping):
        return [tokenizer[i] for i in ids]
    from transformers import PreTrainedTokenizerFast  # not at the top: reports of stored scores need no tokenizer

    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        return [_decoded(tokenizer, int(i)) for i in ids]
    backend = tokenizer.backend_tokenizer
    # as JSON; the whole tokenizer's would hold its vocabulary, which takes seconds
    state = None if backend.decoder is None else json.loads(backend.decoder.__getstate__())
    to_bytes = _piece_decoder(state)
    # ordinary added tokens of SentencePiece vocabularies are written like the others (Gemma's runs of spaces)
    added = backend.get_added_tokens_decoder()
    literal = {i for i, token in added.items() if token.special or to_bytes in (None, _byte_level)}
    result = []
    for i in map(int, ids):
        piece = backend.id_to_token(i)
        if piece is None:
            result.append(b"")
        elif i in literal:
            result.append(_utf8(piece))
        else:
            result.append(_decoded(tokenizer, i) if to_bytes is None else to_bytes(piece))
    return result


def distinct_ids(token_ids: NDArray[Any]) -> NDArray[np.int64]:
    """`np.unique(token_ids)`, ascending, by a table of ids; in a tenth of the time."""
    seen = np.zeros(int(token_ids.max(initial=-1)) + 1, dtype=bool)
    for part in chunks(len(token_ids), CHUNK_TOKENS):
        seen[token_ids[part]] = True
    return np.flatnonzero(seen)


def characters(pieces: Sequence[bytes]) -> Iterator[tuple[int, int, bytes]]:
    """Group tokens that share a character: (first token, number of tokens, bytes) of each group, in order."""
    place = 0
    while place < len(pieces):
        reaches = (b"".join(pieces[place : place + number]) for number in range(1, SPREAD + 1))
        number = next((number for number, reach in enumerate(reaches, start=1) if is_text(reach)), 1)
        yield place, number, b"".join(pieces[place : place + number])
        place += number


def is_text(span: bytes) -> bool:
    """Whether bytes are valid UTF-8."""
    try:
        span.decode()
    except UnicodeDecodeError:
        return False
    return True


def match_spans(tokenizer: Any, token_ids: ArrayLike, run_offsets: ArrayLike, patterns: Sequence[str]) -> Bools:
    """Mark the tokens that a match of any pattern overlaps by at least one byte.

    Equals `re.finditer` over the decoded text of each run. An empty match marks nothing. Each run is searched by
    itself: `^` and `$` are its ends, and no match spans two runs.

    Args:
        tokenizer: a transformers tokenizer.
        token_ids: (M,) completion tokens.
        run_offsets: (R + 1,) ascending; run `r` is `token_ids[run_offsets[r] : run_offsets[r + 1]]`.
        patterns: regular expressions in Python's syntax.

    Returns:
        (M,) bool.

    Raises:
        XTFUserError: a pattern is not a regular expression.
    """
    return match_each(tokenizer, token_ids, run_offsets, patterns)[0]


def match_each(
    tokenizer: Any, token_ids: ArrayLike, run_offsets: ArrayLike, patterns: Sequence[str], left_out: Bools | None = None
) -> tuple[Bools, NDArray[np.int32], Bools]:
    """`match_spans` without the tokens `left_out`; how many tokens of each run each pattern marks, (P, R); and whether
    it matches some of `left_out`, (P,)."""
    compiled = [_compiled(pattern) for pattern in patterns]
    ids, offsets = np.asarray(token_ids), np.asarray(run_offsets, dtype=np.int64)
    marks, numbers = np.zeros(len(ids), dtype=bool), np.zeros((len(compiled), len(offsets) - 1), dtype=np.int32)
    beyond = np.zeros(len(compiled), dtype=bool)
    if not compiled or not len(ids):
        return marks, numbers, beyond
    distinct = distinct_ids(ids)
    pieces = token_bytes(tokenizer, distinct.tolist())
    for run, (start, stop) in enumerate(zip(offsets[:-1], offsets[1:], strict=True)):
        which = np.searchsorted(distinct, ids[start:stop])
        for place, found in match_run([pieces[i] for i in which.tolist()], compiled):
            if left_out is not None:
                beyond[place] |= (found & left_out[start:stop]).any()
                found &= ~left_out[start:stop]
            marks[start:stop] |= found
            numbers[place, run] = found.sum()
    return marks, numbers, beyond


def match_run(pieces: Sequence[bytes], patterns: Sequence[re.Pattern[str]]) -> Iterator[tuple[int, Bools]]:
    """The index of each pattern that matches in one run, given its tokens' bytes, and the tokens that it marks."""
    data = b"".join(pieces)
    text = data.decode("utf-8", errors="surrogateescape")
    for place, pattern in enumerate(patterns):
        spans = [match.span() for match in pattern.finditer(text) if match.end() > match.start()]
        if spans:
            sizes = np.fromiter(map(len, pieces), np.int64, len(pieces))
            yield place, _touched(byte_offsets(text, len(data))[np.asarray(spans)], sizes)


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise XTFUserError(
            f"xtf: {pattern!r} under protect.patterns or force_drop is not a regular expression in Python's syntax: "
            f"{error}. Put a backslash before characters that are meant literally."
        ) from error


def byte_offsets(text: str, size: int) -> Ints:
    """First byte of each character of a text that was decoded from `size` bytes, and `size`, (len(text) + 1,)."""
    if len(text) == size:  # one byte per character
        return np.arange(size + 1)
    codes = np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), dtype="<u4")
    width = 1 + (codes >= 0x80).astype(np.int64) + (codes >= 0x800) + (codes >= 0x10000)
    width[(codes >= 0xDC80) & (codes <= 0xDCFF)] = 1  # an escaped byte
    return np.concatenate([[0], np.cumsum(width)])


def _touched(spans: Ints, sizes: Ints) -> Bools:
    """Which of the consecutive tokens of these sizes share a byte with a span."""
    ends = np.cumsum(sizes)
    change = np.zeros(len(sizes) + 1, dtype=np.int64)
    np.add.at(change, np.searchsorted(ends, spans[:, 0], side="right"), 1)
    np.add.at(change, np.searchsorted(ends - sizes, spans[:, 1], side="left"), -1)
    return (np.cumsum(change[:-1]) > 0) & (sizes > 0)


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", errors="surrogatepass")


def _decoded(tokenizer: Any, index: int) -> bytes:
    return _utf8(tokenizer.decode([index], skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _steps(decoder: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    """The steps of a decoder, nested sequences flattened."""
    if decoder is not None and decoder["type"] == "Sequence":
        for inner in decoder["decoders"]:
            yield from _steps(inner)
    elif decoder is not None:
        yield decoder


def _piece_decoder(decoder: Mapping[str, Any] | None) -> Callable[[str], bytes] | None:
    """A function from vocabulary entries to bytes; None: the tokenizer's decoder is of no known kind."""
    steps = list(_steps(decoder))
    kinds = {step["type"] for step in steps}
    if "ByteLevel" in kinds:
        return _byte_level
    swaps = [(step["pattern"], step["content"]) for step in steps if step["type"] == "Replace"]
    # Strip removes the space at the start of a text and Fuse joins pieces: neither changes the bytes of a piece
    if not kinds - {"Fuse", "Strip"} or kinds - {"Metaspace", "Replace", "ByteFallback", "Fuse", "Strip"}:
        return None
    if not all("String" in pattern for pattern, _ in swaps):
        return None
    spelling = [(step["replacement"], " ") for step in steps if step["type"] == "Metaspace"]
    spelling += [(pattern["String"], content) for pattern, content in swaps]

    def to_bytes(piece: str) -> bytes:
        byte = _BYTE_PIECE.fullmatch(piece) if "ByteFallback" in kinds else None
        if byte:
            return bytes([int(byte[1], 16)])
        for pattern, content in spelling:
            piece = piece.replace(pattern, content)
        return _utf8(piece)

    return to_bytes


_ALPHABET = byte_alphabet()


def _byte_level(piece: str) -> bytes:
    """Bytes of a piece of byte-level BPE; a piece with other characters is literal, as in the tokenizers library."""
    try:
        return bytes([_ALPHABET[char] for char in piece])
    except KeyError:
        return _utf8(piece)
