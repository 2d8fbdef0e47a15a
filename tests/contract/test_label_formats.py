"""What every label format keeps to: it says what it needs, and claims nothing that is not its own."""

import inspect
from typing import get_args

import pytest

from gtsa.data.labels import Kind, LabelFormat, formats

KINDS = get_args(Kind)


@pytest.mark.parametrize("form", formats(), ids=lambda form: form.__name__)
def test_is_a_format_that_says_what_it_needs(form):
    assert issubclass(form, LabelFormat) and inspect.getdoc(form)
    assert form.needs and set(form.needs) <= set(KINDS) and all(form.needs.values())
    for name in ("claims", "read"):
        assert isinstance(inspect.getattr_static(form, name), staticmethod)


@pytest.mark.parametrize("form", formats(), ids=lambda form: form.__name__)
def test_claims_no_kind_but_its_own_and_no_foreign_file(form, scenes, tmp_path):
    foreign = tmp_path / "labels.unknown"
    foreign.write_text("nothing that anybody reads")
    for kind in KINDS:
        if kind != "none":  # a task without labels ignores them
            assert form.claims(str(scenes), str(foreign), kind) is False
        if kind not in form.needs:
            assert not any(form.claims(str(scenes), labels, kind) for labels in (None, str(scenes), str(tmp_path)))
