"""The test settings turn deprecated calls in our own modules into errors, and leave others' alone."""

from __future__ import annotations

import warnings

import pytest


@pytest.mark.parametrize("category", [DeprecationWarning, PendingDeprecationWarning, FutureWarning])
def test_a_deprecation_in_our_own_module_is_an_error(category):
    code = compile("import warnings; warnings.warn('old', category)", "fake.py", "exec")
    with pytest.raises(category):
        exec(code, {"__name__": "readme_jax.models.fake", "category": category})
    with warnings.catch_warnings(record=True) as seen:
        exec(code, {"__name__": "another_package", "category": category})
    assert len(seen) == 1
