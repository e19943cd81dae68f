"""Remote paths stay as they are; local ones become absolute."""

from sflow_jax.storage.paths import absolute, cache_folder


def test_remote_paths_are_left_alone_and_local_ones_made_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert str(absolute("gs://bucket/flux") / "t5") == "gs://bucket/flux/t5"
    assert str(absolute("flux")) == str(tmp_path / "flux")


def test_the_cache_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "sflow_jax"
