"""Inputs for fuzzing: any JSON, and JSON, headers and archives that were right once."""

from __future__ import annotations

import copy
import gzip
import struct
from typing import Any

from hypothesis import strategies as st

ODD = (
    None,
    True,
    -1,
    0,
    1.0,
    10**400,
    float("nan"),
    float("inf"),
    -0.5,
    "",
    "1",
    "../..",
    "\x00",
    "ü",
    [],
    {},
    [[]],
    [1, "a"],
)
"""What stands in JSON where something else should."""

json_values: st.SearchStrategy[Any] = st.recursive(
    st.sampled_from(ODD) | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@st.composite
def mutated(draw: st.DrawFn, base: Any) -> Any:
    """``base`` with one to three values replaced, removed, added or doubled, anywhere in it."""
    result = copy.deepcopy(base)
    for _ in range(draw(st.integers(1, 3))):
        where = result
        while isinstance(where, dict | list) and where:
            keys = list(where) if isinstance(where, dict) else list(range(len(where)))
            key = draw(st.sampled_from(keys))
            if isinstance(where[key], dict | list) and where[key] and draw(st.booleans()):
                where = where[key]
                continue
            how = draw(st.sampled_from(("replace", "replace", "remove", "add")))
            if how == "replace":
                where[key] = copy.deepcopy(draw(json_values))
            elif how == "remove":
                del where[key]
            elif isinstance(where, dict):
                where[draw(st.text(max_size=8))] = copy.deepcopy(draw(json_values))
            else:
                where.append(copy.deepcopy(draw(json_values)))
            break
    return result


NIFTI_FIELDS = (
    *((offset, "<h") for offset in range(40, 56, 2)),  # dim
    *((70, "<h"), (72, "<h"), (0, "<i"), (108, "<f"), (112, "<f"), (116, "<f"), (252, "<h"), (254, "<h")),
    *((offset, "<f") for offset in range(76, 108, 4)),  # pixdim
    *((offset, "<f") for offset in range(256, 328, 4)),  # quaternion, offsets, rows of the affine
)
"""Where the fields that readers use stand in NIfTI-1's header, and their types."""
_FLOATS = st.sampled_from((0.0, -1.0, 1e30, 353.0, 1e9, float("nan"), float("inf"))) | st.floats(width=32)


@st.composite
def nifti_files(draw: st.DrawFn, whole: bytes) -> bytes:
    """A NIfTI-1 file, gzipped or not, once ``whole``: header fields, bytes, the stream or its length are changed."""
    content = bytearray(whole)
    for _ in range(draw(st.integers(0, 3))):
        offset, form = draw(st.sampled_from(NIFTI_FIELDS))
        limit = 2 ** (8 * struct.calcsize(form) - 1)
        value = draw(_FLOATS if form == "<f" else st.sampled_from((0, -1, 7, 32767)) | st.integers(-limit, limit - 1))
        struct.pack_into(form, content, offset, value)
    for _ in range(draw(st.integers(0, 2))):
        content[draw(st.integers(0, 351))] = draw(st.integers(0, 255))
    if draw(st.booleans()):
        content = content[: draw(st.integers(0, len(content)))]
    if draw(st.booleans()):
        return bytes(content)
    packed = bytearray(gzip.compress(bytes(content), 1))
    if draw(st.booleans()):
        packed = packed[: draw(st.integers(0, len(packed)))]
    elif draw(st.booleans()):
        packed[draw(st.integers(0, len(packed) - 1))] ^= draw(st.integers(1, 255))
    return bytes(packed)
