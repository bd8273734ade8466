"""The examples in docstrings give what they say they give."""

import doctest
import importlib
import pkgutil

import pytest

import finetune_lens

MODULES = ["finetune_lens", *(m.name for m in pkgutil.walk_packages(finetune_lens.__path__, "finetune_lens."))]


@pytest.mark.parametrize("name", [name for name in MODULES if not name.endswith("__main__")])
def test_examples(name, recwarn):
    results = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert not results.failed
