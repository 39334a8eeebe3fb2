"""Names that exist, among those that schemathesis makes up for `benchmarks.fuzz_service`, so that it gets further."""

from __future__ import annotations

import json
import os
from typing import Any

import schemathesis
from hypothesis import strategies as st

KNOWN: dict[str, list[str]] = json.loads(os.environ.get("IFT_FUZZ_KNOWN", "{}"))
"""Values that exist, by the name of the field or parameter."""


def _with_known(values: Any) -> st.SearchStrategy[Any]:
    """`values` as they are, or with names that exist in place of some."""
    names = [name for name in KNOWN if isinstance(values, dict) and name in values]
    if not names:
        return st.just(values)
    drawn = st.fixed_dictionaries({name: st.sampled_from(KNOWN[name]) for name in names})
    return st.one_of(st.just(values), drawn.map(lambda known: {**values, **known}))


@schemathesis.hook
def flatmap_body(context: Any, body: Any) -> st.SearchStrategy[Any]:
    return _with_known(body)


@schemathesis.hook
def flatmap_path_parameters(context: Any, path_parameters: Any) -> st.SearchStrategy[Any]:
    return _with_known(path_parameters)
