"""Which files of a repository a conversion reads, from their names alone: the layouts of `layouts`, `sd3_layouts`
and `features`, before anything is downloaded."""

import re
from collections.abc import Sequence

from sflow_convert.engine import ConversionError
from sflow_convert.parts import HERE, Places
from sflow_convert.sources import choose_weights

TEXT_ENCODERS, TOKENIZERS = ("text_encoder", "text_encoder_2"), ("tokenizer", "tokenizer_2")
# Of T5 in SD3, which may be missing.
OPTIONAL = ("text_encoder_3", "tokenizer_3")
SCHEDULER, INDEX = "scheduler/scheduler_config.json", "model_index.json"
SINGLE = re.compile(r"(flux1-|sd3)[^/]*\.safetensors")
AUTOENCODER_FILE = "ae.safetensors"
FEATURE_FILES = ("config.json", "preprocessor_config.json")
SHARD = re.compile(r"-(\d{5})-of-(\d{5})")


def choose_files(names: Sequence[str], repository: str, places: Places = HERE) -> list[str]:
    """Those that are read, sorted; ConversionError where the files are of no known layout, or some are missing.

    names: all paths of the repository. Of one with a diffusers folder and single files the folder is taken; of
    several variants of a network (`.fp16` in the names) the plain one, or the only one. places: what lies
    elsewhere, and is not taken from here.
    """
    if any(name.startswith("transformer/") for name in names):
        return _diffusers_files(names, repository, places)
    singles = [name for name in names if SINGLE.fullmatch(name)]
    if len(singles) == 1:
        return _single_files(names, singles[0], repository, places)
    if not singles and "config.json" in names:
        return sorted(_present(FEATURE_FILES, names, repository) + _weights("", names, repository))
    contents = (
        f"{', '.join(singles)}: download the one that you want, and name it"
        if singles
        else "neither transformer/ nor flux1-*.safetensors nor sd3*.safetensors (nor config.json of DINOv2 or CLIP)"
    )
    raise ConversionError(f"{repository} is not a checkpoint in a known layout: it has {contents}")


def is_weights(name: str) -> bool:
    """Whether a file is large, and can be judged without being read: all else comes first."""
    return name.endswith(".safetensors")


def _diffusers_files(names: Sequence[str], repository: str, places: Places) -> list[str]:
    networks = ["transformer"] + (["vae"] if places.autoencoder is None else [])
    tokenizers: list[str] = []
    if places.text_encoders is None:
        networks += [*TEXT_ENCODERS, *_there(OPTIONAL[:1], names)]
        tokenizers += [*TOKENIZERS, *_there(OPTIONAL[1:], names)]
    chosen = [name for name in names if name == INDEX] + _present([SCHEDULER], names, repository)
    for folder in networks:
        chosen += _present([f"{folder}/config.json"], names, repository) + _weights(folder, names, repository)
    return sorted(chosen + _tokenizer_files(tokenizers, names, repository))


def _single_files(names: Sequence[str], file: str, repository: str, places: Places) -> list[str]:
    """One file, with what lies beside it in folders; its tokenizers always do."""
    chosen = [file]
    if places.autoencoder is None:
        chosen += [name for name in names if name == AUTOENCODER_FILE]
    folders = _there(["vae"], names) if places.autoencoder is None else []
    if places.text_encoders is None:
        if missing := [folder for folder in TOKENIZERS if not _there([folder], names)]:
            raise ConversionError(
                f"{repository} has no {missing[0]}; name a folder that has them in `text_encoders`"
            )
        folders += _there([*TEXT_ENCODERS, *OPTIONAL[:1]], names)
        chosen += _tokenizer_files(_there([*TOKENIZERS, *OPTIONAL[1:]], names), names, repository)
    for folder in folders:
        chosen += _present([f"{folder}/config.json"], names, repository) + _weights(folder, names, repository)
    return sorted(chosen)


def _there(folders: Sequence[str], names: Sequence[str]) -> list[str]:
    return [folder for folder in folders if any(name.startswith(f"{folder}/") for name in names)]


def _present(wanted: Sequence[str], names: Sequence[str], repository: str) -> list[str]:
    """The same names; ConversionError if one is not there."""
    if missing := [name for name in wanted if name not in names]:
        raise ConversionError(f"{repository} is not a complete checkpoint: it has no {missing[0]}")
    return list(wanted)


def _tokenizer_files(folders: Sequence[str], names: Sequence[str], repository: str) -> list[str]:
    """All files of flat folders: which of them a tokenizer reads is its own affair."""
    files = [[name for name in names if re.fullmatch(rf"{folder}/[^/]+", name)] for folder in folders]
    if empty := [folder for folder, inside in zip(folders, files) if not inside]:
        raise ConversionError(f"{repository} is not a complete checkpoint: it has no {empty[0]}")
    return [name for inside in files for name in inside]


def _weights(folder: str, names: Sequence[str], repository: str) -> list[str]:
    """Weights of a network's folder ("" is the repository itself), with their index; all shards must be there."""
    start = f"{folder}/" if folder else ""
    inside = [name.removeprefix(start) for name in names if re.fullmatch(rf"{start}[^/]+", name)]
    files, index = choose_weights(inside, f"{folder or '.'} of {repository}")
    if index is not None:
        shards = {name: SHARD.search(name) for name in files}
        files = [name for name, shard in shards.items() if shard] or files
        count = max((int(shard[2]) for shard in shards.values() if shard), default=len(files))
        if len(files) != count:
            raise ConversionError(
                f"{repository} is not a complete checkpoint: {folder or '.'} has {len(files)} of {count} weights"
            )
    return [f"{start}{name}" for name in (*files, *([] if index is None else [index]))]
