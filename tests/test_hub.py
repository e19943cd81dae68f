"""Checkpoints by name: huggingface_hub's own client against a small server that speaks the Hub's protocol."""

import os
import re
import shutil
import socket
import subprocess
import sys
from collections import namedtuple

import huggingface_hub
import pytest
from commandline import run, run_convert
from hub_server import COMMIT, Hub, serve
from sflow_convert import hub as client
from sflow_convert.engine import ConversionError
from sflow_convert.hub import Repository, fetch, parse_repository
from sflow_convert.parts import Places
from sflow_convert.repository import choose_files

from sflow_jax import settings
from sflow_jax.catalogue import EMBEDDED_FEATURES, find_info, find_model, load_features, repository_folder
from sflow_jax.families.registry import published_models
from sflow_jax.storage.checkpoint import CheckpointError, load_info

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
NAME = "org/tiny"


@pytest.fixture(scope="module")
def repository_files(source_folder, tmp_path_factory):
    """The small FLUX with what else repositories hold: single files, other variants, other formats, documents."""
    folder = tmp_path_factory.mktemp("hub") / "tiny"
    shutil.copytree(source_folder, folder)
    others = ("flux1-dev.safetensors", "ae.safetensors", "README.md", "transformer/model.fp16.safetensors")
    for name in (
        *others,
        "text_encoder/pytorch_model.bin",
        "text_encoder/flax_model.msgpack",
        "vae/old/config.json",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("not read")
    return folder


def connect(patch, endpoint: str, home) -> None:
    """Let the client ask this server, and keep what it gets in `home`."""
    constants = huggingface_hub.constants
    patch.setattr(constants, "ENDPOINT", endpoint)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setenv("HF_TOKEN_PATH", str(home / "token"))
    patch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    patch.delenv("HF_TOKEN", raising=False)
    patch.setenv("XDG_CACHE_HOME", str(home / "cache"))


@pytest.fixture
def hub(repository_files, tmp_path, monkeypatch):
    """The repository on a server, for the client of this process; caches are empty."""
    with serve(Hub(repository_files)) as served:
        connect(monkeypatch, served.endpoint, tmp_path)
        monkeypatch.chdir(tmp_path)
        yield served


def leftovers(folder) -> list[str]:
    """Files that a failed command left, but for the client's own records."""
    kept = ("CACHEDIR.TAG", ".gitignore")
    return [
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and path.name not in kept and not {"trees", "refs", ".locks"} & set(path.parts)
    ]


def refusal(capsys) -> str:
    """The last and only line of an error."""
    lines = capsys.readouterr().err.strip().splitlines()
    assert [line for line in lines if line.startswith("Error")] == lines[-1:]
    assert len(lines[-1]) < 400
    return lines[-1]


def test_a_name_converts_to_the_model_that_its_files_make(hub, checkpoint, tmp_path, capsys):
    assert run_convert(NAME, tmp_path / "made", "--vital-layers", "0,2,3") == 0
    said = capsys.readouterr()
    assert f"{NAME} (commit {COMMIT[:10]})" in said.err and "GB from http://127.0.0.1" in said.err
    assert load_info(tmp_path / "made") == load_info(checkpoint)
    # Only what conversion reads: no single files, variants, other formats or documents.
    unread = {"flux1-dev.safetensors", "ae.safetensors", "README.md", "transformer/model.fp16.safetensors"}
    unread |= {"text_encoder/pytorch_model.bin", "text_encoder/flax_model.msgpack", "vae/old/config.json"}
    assert hub.fetched() == set(hub.files()) - unread


def test_a_model_by_name_is_fetched_once_and_then_needs_nobody(hub, checkpoint, tmp_path, capsys):
    painted = ("generate", "-m", NAME, "-p", "a cat", "--steps", 1, "-o")
    assert run(*painted, tmp_path / "first") == 0
    assert "downloading 0.00 GB" in capsys.readouterr().err
    assert (tmp_path / "first" / "picture-1.png").exists()
    hub.asked.clear()
    folder, info = find_model(NAME)
    assert folder == repository_folder(Repository(NAME)) and info.configs == load_info(checkpoint).configs
    assert run("info", NAME, "--verify") == 0 and hub.asked == []


def test_converting_without_a_destination_is_where_the_name_is_looked_for(hub, capsys):
    assert run("info", NAME) == 2
    assert f"sflow-convert {NAME}" in refusal(capsys) and hub.asked == []
    assert run_convert(f"{NAME}@v1") == 0
    assert find_info(f"{NAME}@v1")[0].variant == "dev"
    with pytest.raises(CheckpointError, match="no weights of org/tiny are here"):
        find_info(NAME)
    hub.asked.clear()
    assert run_convert(f"{NAME}@v1") == 2
    assert "exists" in refusal(capsys) and hub.asked == []


def test_a_source_that_is_a_path_needs_a_destination(hub, source_folder, capsys):
    assert run_convert(source_folder) == 2
    assert "DESTINATION is missing" in refusal(capsys) and hub.asked == []


def test_a_path_is_never_asked_for(hub, tmp_path, capsys):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "org").mkdir()
    for name in (
        "checkpoints/flux-dev",
        NAME,
        "./a/b",
        "a/b/c",
        str(tmp_path / "x" / "y"),
        "nowhere",
        "org/tiny@v1",
    ):
        assert run("generate", "-m", name, "-p", "a cat", "-o", tmp_path / "out") == 2
        assert "no checkpoint at" in refusal(capsys)
        assert run_convert(name, tmp_path / "made") == 2
        assert "no source at" in refusal(capsys)
    assert hub.asked == []
    assert parse_repository("gs://org/tiny") is None and parse_repository("a--b/c") is None


def test_what_stopped_goes_on_and_nothing_is_fetched_twice(hub, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)

    def vanish(*_) -> int:
        hub.gone = WEIGHTS
        return 0

    # The server fails when sizes are known and the download begins.
    with monkeypatch.context() as patch:
        patch.setattr(client, "_converted_bytes", vanish)
        assert run_convert(NAME, tmp_path / "made") == 2
    assert "not fetched twice" in refusal(capsys) and not (tmp_path / "made").exists()
    first, hub.gone = hub.fetched() - {WEIGHTS}, None
    assert first
    hub.asked.clear()
    assert run_convert(NAME, tmp_path / "made") == 0
    assert WEIGHTS in hub.fetched() and not hub.fetched() & first


def test_a_connection_that_breaks_goes_on_where_it_was(hub, tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 500)
    hub.cut = 1000
    folder = fetch(Repository(NAME), tmp_path / "made", announce=lambda _: None)
    assert (folder / WEIGHTS).read_bytes() == (hub.folder / WEIGHTS).read_bytes()
    parts = [part for method, path, part in hub.asked if method == "GET" and path.endswith(WEIGHTS)]
    assert parts[0] is None or parts[0] == "bytes=0-100000"
    assert re.fullmatch(r"bytes=[1-9]\d*-", parts[-1])


def test_an_earlier_download_is_enough_without_a_connection(hub, tmp_path, monkeypatch, capsys):
    fetch(Repository(NAME), tmp_path / "made", announce=lambda _: None)
    hub.asked.clear()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert run_convert(NAME, tmp_path / "made") == 0
    assert hub.asked == []
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", closed_endpoint())
    assert (fetch(Repository(NAME), tmp_path / "again") / WEIGHTS).exists()


def closed_endpoint() -> str:
    """An address where nobody listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_half_a_download_without_a_connection_is_named(hub, tmp_path, monkeypatch, capsys):
    folder = fetch(Repository(NAME), tmp_path / "made", announce=lambda _: None)
    (folder / WEIGHTS).unlink()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert run_convert(NAME, tmp_path / "made") == 2
    message = refusal(capsys)
    assert "only partly on this machine" in message and "HF_HUB_OFFLINE" in message


Case = namedtuple("Case", "name change message")
CASES = (
    Case(NAME, {"token": "secret"}, "is gated: accept its licence"),
    Case(NAME, {"gated": True}, "is gated: accept its licence"),
    Case("org/other", {}, "nor a model of this name"),
    Case(f"{NAME}@v9", {}, "has no revision v9"),
    Case(NAME, {"fails": 403}, "lets this token read no weights"),
    Case(NAME, {"fails": 429}, "answers with an error (429)"),
    Case(NAME, {"wrong_sizes": {WEIGHTS: 10**18}}, "make room, or choose another disk by HF_HOME"),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.message[:24])
@pytest.mark.parametrize("command", ["convert", "generate"])
def test_what_cannot_be_fetched_is_named_in_one_line_and_leaves_nothing(
    command, case, hub, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("time.sleep", lambda _: None)
    for name, value in case.change.items():
        setattr(hub, name, value)
    before = leftovers(tmp_path)
    if command == "convert":
        assert run_convert(case.name, tmp_path / "made") == 2
    else:
        assert run("generate", "-m", case.name, "-p", "a cat", "-o", tmp_path / "out") == 2
    assert case.message in refusal(capsys)
    assert leftovers(tmp_path) == before
    assert not hub.fetched()


def test_a_token_opens_what_is_gated(hub, tmp_path, monkeypatch, capsys):
    hub.token = "secret"
    monkeypatch.setenv("HF_TOKEN", "wrong")
    assert run_convert(NAME, tmp_path / "made") == 2
    assert "is gated" in refusal(capsys)
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert (fetch(Repository(NAME), tmp_path / "made", announce=lambda _: None) / WEIGHTS).exists()


@pytest.mark.parametrize("offline", [True, False])
def test_without_a_connection_it_says_so(offline, hub, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", closed_endpoint())
    assert run_convert(NAME, tmp_path / "made") == 2
    message = refusal(capsys)
    assert "is not on this machine" in message and ("HF_HUB_OFFLINE" in message) == offline
    assert leftovers(tmp_path) == []


def test_a_disk_that_is_full_is_known_before_anything_is_fetched(hub, tmp_path, monkeypatch, capsys):
    size = sum(map(len, hub.files().values()))
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(10 * size, 0, size))
    assert run_convert(NAME, tmp_path / "made") == 2
    message = refusal(capsys)
    assert "to be downloaded and" in message and "to be converted" in message
    assert not hub.fetched() and leftovers(tmp_path) == []


def test_other_pipelines_are_refused_before_their_weights_are_fetched(
    repository_files, tmp_path, monkeypatch, capsys
):
    other = shutil.copytree(repository_files, tmp_path / "other")
    (other / "model_index.json").write_text('{"_class_name": "FluxFillPipeline"}')
    with serve(Hub(other)) as hub:
        connect(monkeypatch, hub.endpoint, tmp_path)
        monkeypatch.chdir(tmp_path)
        assert run_convert(NAME, tmp_path / "made") == 2
        assert "FluxFillPipeline" in refusal(capsys)
        assert not [name for name in hub.fetched() if name.endswith(".safetensors")]


def test_feature_networks_by_name(tmp_path, monkeypatch, capsys):
    with serve(Hub(EMBEDDED_FEATURES["toyworld"], "org/dinov2")) as hub:
        connect(monkeypatch, hub.endpoint, tmp_path)
        monkeypatch.chdir(tmp_path)
        assert run_convert("org/dinov2", tmp_path / "dino") == 0
        assert run("info", tmp_path / "dino") == 0
        assert run_convert("org/dinov2", tmp_path / "other", "--vital-layers", "0") == 2
        assert "--vital-layers has no effect" in refusal(capsys)
        # Named where they are used, they are converted once, and must be what is needed.
        features = load_features("org/dinov2")
        assert (features.kind, features.digest) == ("dinov2", load_features(tmp_path / "dino").digest)
        hub.asked.clear()
        assert load_features("org/dinov2").digest == features.digest and hub.asked == []
        assert run("vital", "-m", "toyworld", "--clip", "org/dinov2", "--out", tmp_path / "run") == 2
        assert "org/dinov2 is a dinov2, where a clip is needed" in refusal(capsys)
        assert run("generate", "-m", "org/dinov2@main", "-p", "a cat", "-o", tmp_path / "out") == 2
        assert "is a network that compares pictures, where FLUX.1 or SD3 is needed" in refusal(capsys)


def test_models_are_no_feature_networks(hub, tmp_path, capsys):
    """Seen in the configs, before the weights are fetched."""
    assert run("vital", "-m", "toyworld", "--features", NAME, "--out", tmp_path / "run") == 2
    assert "is a model that paints, where a DINOv2 or CLIP is needed" in refusal(capsys)
    assert not [name for name in hub.fetched() if name.endswith(".safetensors")]


def test_the_environment_is_the_clients_own(hub, tmp_path):
    """In a process of its own: HF_ENDPOINT, HF_HOME, XDG_CACHE_HOME."""
    environment = os.environ | {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "0",
        "XDG_CACHE_HOME": str(tmp_path / "mine"),
    }
    program = "from sflow_jax.commands import convert; convert.main()"
    command = [sys.executable, "-c", program, NAME]
    ended = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "mine" / "sflow_jax" / "hub" / "org--tiny@main" / "model.json").exists()
    assert WEIGHTS in hub.fetched() and list((tmp_path / "home" / "hub").glob("models--org--tiny/snapshots/*"))


FLUX_DEV = """
.gitattributes LICENSE.md README.md ae.safetensors flux1-dev.safetensors dev_grid.jpg model_index.json
scheduler/scheduler_config.json text_encoder/config.json text_encoder/model.safetensors text_encoder_2/config.json
text_encoder_2/model-00001-of-00002.safetensors text_encoder_2/model-00002-of-00002.safetensors
text_encoder_2/model.safetensors.index.json tokenizer/merges.txt tokenizer/special_tokens_map.json
tokenizer/tokenizer_config.json tokenizer/vocab.json tokenizer_2/special_tokens_map.json tokenizer_2/spiece.model
tokenizer_2/tokenizer.json tokenizer_2/tokenizer_config.json transformer/config.json
transformer/diffusion_pytorch_model-00001-of-00003.safetensors
transformer/diffusion_pytorch_model-00002-of-00003.safetensors
transformer/diffusion_pytorch_model-00003-of-00003.safetensors
transformer/diffusion_pytorch_model.safetensors.index.json vae/config.json vae/diffusion_pytorch_model.safetensors
""".split()


def test_of_a_repository_with_both_layouts_the_folder_is_read():
    unread = {
        ".gitattributes",
        "LICENSE.md",
        "README.md",
        "ae.safetensors",
        "flux1-dev.safetensors",
        "dev_grid.jpg",
    }
    assert choose_files(FLUX_DEV, NAME) == sorted(set(FLUX_DEV) - unread)


def test_what_lies_elsewhere_is_not_fetched(tmp_path):
    places = Places(text_encoders=tmp_path, autoencoder=tmp_path)
    folders = {name.split("/")[0] for name in choose_files(FLUX_DEV, NAME, places)}
    assert folders == {"model_index.json", "scheduler", "transformer"}
    singles = ["flux1-schnell.safetensors", "ae.safetensors", "README.md"]
    assert choose_files(singles, NAME, Places(text_encoders=tmp_path)) == sorted(singles[:2])


@pytest.mark.parametrize(
    "names, message",
    [
        (["README.md"], "not a checkpoint in a known layout"),
        (["sd3_medium.safetensors", "sd3_medium_incl_clips.safetensors"], "download the one that you want"),
        (["flux1-schnell.safetensors"], "text_encoders"),
        ([name for name in FLUX_DEV if "00002-of-00003" not in name], "transformer has 2 of 3 weights"),
        ([name for name in FLUX_DEV if not name.startswith("vae/")], "it has no vae/config.json"),
        ([name for name in FLUX_DEV if not name.startswith("tokenizer_2/")], "it has no tokenizer_2"),
        ([name.replace("safetensors", "bin") for name in FLUX_DEV], "no .safetensors file"),
    ],
)
def test_repositories_that_cannot_be_converted_are_named(names, message):
    with pytest.raises(ConversionError, match=message):
        choose_files(names, NAME)


def test_names_without_files_are_listed_where_they_are_needed(capsys):
    assert settings.PUBLISHED == tuple(published_models())
    assert run("info", "--help") == 0
    assert "flux-krea-dev" in capsys.readouterr().out
    assert run("info", "flux-krea") == 2
    assert ", ".join(settings.PUBLISHED) in refusal(capsys)
    for name in ("flux-krea-dev", "black-forest-labs/FLUX.1-Krea-dev"):
        assert find_info(name)[0].title == "FLUX.1 Krea dev"
    assert run("info", "flux-dev") == 0
    assert "vital layers: 0, 1, 17, 18, 25, 28, 53, 54, 56 (Stable Flow's code" in capsys.readouterr().out
    assert run("generate", "-m", "flux-dev", "-p", "a cat", "-o", "out") == 2
    assert "sflow-convert black-forest-labs/FLUX.1-dev" in refusal(capsys)


def test_every_published_model_says_where_it_is():
    repositories = [model.repository for _, model in published_models().values()]
    assert all(map(parse_repository, repositories)) and len(set(repositories)) == len(repositories)
