"""Checkpoints to be converted as people have them, and files that are something else."""

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
from PIL import Image

from hardness.cases import ACCEPT, EITHER, REFUSE, Box, Case
from hardness.conversions import (
    LAYOUTS,
    NETWORK_FILES,
    raw_file,
    read_tensors,
    source_case,
    write_tensors,
)


def cases(draw: random.Random) -> Iterator[Case]:
    """All of this file."""
    yield from layout_cases()


def layout_cases() -> Iterator[Case]:
    """Checkpoints as people have them: fine ones, and those that should be said what they are."""
    yield from _variant_cases()
    yield from _single_file_cases()
    yield from _foreign_cases()
    yield from _quantised_cases()
    for part in ("transformer", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler"):
        yield source_case(LAYOUTS, f"without {part}", REFUSE, _removed(f"source/{part}"), names=(part,))
        yield source_case(LAYOUTS, f"{part} is a file", REFUSE, _file_instead(f"source/{part}"), names=(part,))
    yield source_case(LAYOUTS, "without model_index.json", ACCEPT, _removed("source/model_index.json"))
    yield source_case(
        LAYOUTS,
        "an empty folder",
        REFUSE,
        lambda box: (box.work / "empty").mkdir(),
        source="empty",
        names=("empty",),
    )
    yield source_case(LAYOUTS, "no folder", REFUSE, lambda box: None, source="nowhere", names=("nowhere",))
    yield source_case(
        LAYOUTS,
        "already converted",
        REFUSE,
        lambda box: None,
        part="converted",
        source="converted",
        names=("converted",),
    )
    yield source_case(
        LAYOUTS, "a picture", REFUSE, lambda box: None, part="photo.png", source="photo.png", names=("photo.png",)
    )
    yield source_case(
        LAYOUTS, "the embedded model's name", REFUSE, lambda box: None, source="toyworld", names=("toyworld",)
    )


def _removed(name: str) -> Callable[[Box], None]:
    def change(box: Box) -> None:
        path = box.work / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return change


def _file_instead(name: str) -> Callable[[Box], None]:
    def change(box: Box) -> None:
        _removed(name)(box)
        box.write(name, "a file")

    return change


def _variant_cases() -> Iterator[Case]:
    transformer = "source/transformer/diffusion_pytorch_model"

    def beside(box: Box) -> None:
        half = {name: x.astype("float16") for name, x in read_tensors(box, f"{transformer}.safetensors").items()}
        write_tensors(box, f"{transformer}.fp16.safetensors", half)

    def index_beside(box: Box) -> None:
        folder = box.work / "source/text_encoder_2"
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        half = {}
        for shard in set(index["weight_map"].values()):
            name = shard.replace("model-", "model.fp16-")
            half[shard] = name
            tensors = read_tensors(box, f"source/text_encoder_2/{shard}")
            write_tensors(
                box, f"source/text_encoder_2/{name}", {n: x.astype("float16") for n, x in tensors.items()}
            )
        renamed = {n: half[shard] for n, shard in index["weight_map"].items()}
        box.write(
            "source/text_encoder_2/model.safetensors.index.fp16.json", json.dumps(index | {"weight_map": renamed})
        )

    def only_variant(box: Box) -> None:
        (box.work / f"{transformer}.safetensors").rename(box.work / f"{transformer}.fp16.safetensors")

    def only_variant_index(box: Box) -> None:
        folder = box.work / "source/text_encoder_2"
        index = (folder / "model.safetensors.index.json").read_text().replace("model-", "model.fp16-")
        (folder / "model.safetensors.index.json").unlink()
        (folder / "model.safetensors.index.fp16.json").write_text(index)
        for shard in folder.glob("model-*"):
            shard.rename(folder / shard.name.replace("model-", "model.fp16-"))

    def pickles_beside(box: Box) -> None:
        box.write("source/vae/diffusion_pytorch_model.bin", b"pickle")
        box.write("source/text_encoder/pytorch_model.bin", b"pickle")

    def pickles_only(box: Box) -> None:
        file = box.work / NETWORK_FILES["vae"]
        file.rename(file.with_suffix(".bin"))

    def single_t5(edit: Callable[[dict], dict]) -> Callable[[Box], None]:
        def change(box: Box) -> None:
            folder, tensors = box.work / "source/text_encoder_2", {}
            for shard in sorted(folder.glob("*.safetensors")):
                tensors |= read_tensors(box, f"source/text_encoder_2/{shard.name}")
                shard.unlink()
            (folder / "model.safetensors.index.json").unlink()
            write_tensors(box, "source/text_encoder_2/model.safetensors", edit(tensors))

        return change

    def cached(box: Box) -> None:
        hub = box.work / "models--black-forest-labs--FLUX.1-dev"
        snapshot = hub / "snapshots" / ("0123456789abcdef" * 3)[:40]
        (hub / "blobs").mkdir(parents=True)
        (hub / "refs").mkdir()
        (hub / "refs" / "main").write_text(snapshot.name)
        for number, file in enumerate(sorted(p for p in (box.work / "source").rglob("*") if p.is_file())):
            blob = hub / "blobs" / f"{number:040x}"
            shutil.move(file, blob)
            place = snapshot / file.relative_to(box.work / "source")
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(os.path.relpath(blob, place.parent))
        shutil.rmtree(box.work / "source")

    def clip_prefixed(box: Box) -> None:
        file = NETWORK_FILES["clip"]
        tensors = read_tensors(box, file)
        plain = {name.removeprefix("text_model."): x for name, x in tensors.items()}
        write_tensors(box, file, {f"text_model.{name}": x for name, x in plain.items()})

    def tied(name: str) -> Callable[[dict], dict]:
        def edit(tensors: dict) -> dict:
            shared = tensors.pop("shared.weight", None)
            shared = tensors.pop("encoder.embed_tokens.weight", shared) if shared is None else shared
            return tensors | {name: shared}

        return edit

    def different(tensors: dict) -> dict:
        shared = tensors["shared.weight"]
        return tensors | {"encoder.embed_tokens.weight": shared + 1}

    hub = "models--black-forest-labs--FLUX.1-dev"
    yield source_case(LAYOUTS, "fp16 beside the plain file", ACCEPT, beside)
    yield source_case(LAYOUTS, "fp16 shards and index beside the plain ones", ACCEPT, index_beside)
    yield source_case(LAYOUTS, "only the fp16 file", ACCEPT, only_variant)
    yield source_case(LAYOUTS, "only fp16 shards with their index", ACCEPT, only_variant_index)
    yield source_case(LAYOUTS, "pickles beside safetensors", ACCEPT, pickles_beside)
    yield source_case(LAYOUTS, "only pickles", REFUSE, pickles_only, names=("vae", "pickle"))
    yield source_case(LAYOUTS, "t5 in one file", ACCEPT, single_t5(lambda tensors: tensors))
    yield source_case(
        LAYOUTS, "t5 with encoder.embed_tokens only", ACCEPT, single_t5(tied("encoder.embed_tokens.weight"))
    )
    yield source_case(
        LAYOUTS, "t5 with two different embeddings", REFUSE, single_t5(different), names=("embed_tokens",)
    )
    yield source_case(LAYOUTS, "the hub's cache folder", ACCEPT, cached, source=hub)
    yield source_case(LAYOUTS, "clip with its prefix", ACCEPT, clip_prefixed)


def _single_file_cases() -> Iterator[Case]:
    flux, ae = "single/flux1-dev.safetensors", "single/ae.safetensors"

    def prefixed(prefix: str) -> Callable[[Box], None]:
        def change(box: Box) -> None:
            write_tensors(box, flux, {f"{prefix}{name}": x for name, x in read_tensors(box, flux).items()})

        return change

    def with_tensors(edit: Callable[[dict], dict], file: str = flux) -> Callable[[Box], None]:
        return lambda box: write_tensors(box, file, edit(read_tensors(box, file)))

    def diffusers_vae(box: Box) -> None:
        shutil.copyfile(box.world / NETWORK_FILES["vae"].replace("source", "wide_source"), box.work / ae)

    def widened(channels: int) -> Callable[[dict], dict]:
        def edit(tensors: dict) -> dict:
            weight = tensors["img_in.weight"]
            return tensors | {"img_in.weight": np.zeros((weight.shape[0], channels), weight.dtype)}

        return edit

    def all_in_one(box: Box) -> None:
        tensors = {f"model.diffusion_model.{name}": x for name, x in read_tensors(box, flux).items()}
        tensors |= {f"vae.{name}": x for name, x in read_tensors(box, ae).items()}
        write_tensors(box, flux, tensors)

    def second(box: Box) -> None:
        shutil.copyfile(box.work / flux, box.work / "single/flux1-schnell.safetensors")

    def single(
        name: str, expects: str, change: Callable[[Box], None], source: str = "single", **options: Any
    ) -> Case:
        return source_case(
            LAYOUTS, f"single file: {name}", expects, change, part="single", source=source, **options
        )

    yield single("the folder", ACCEPT, lambda box: None)
    yield single("the file", ACCEPT, lambda box: None, flux)
    for prefix in ("model.diffusion_model.", "diffusion_model.", "transformer."):
        yield single(f"prefix {prefix}", ACCEPT, prefixed(prefix), flux)
    yield single(
        "an unknown prefix", REFUSE, prefixed("net.module."), flux, names=("flux1-dev", "prefix", "single")
    )
    yield single("ae with diffusers' names", ACCEPT, diffusers_vae, flux)
    yield single("ae missing", REFUSE, _removed(ae), flux, names=("ae.safetensors",))
    yield single("all in one", EITHER, all_in_one, flux, names=("flux1-dev",))
    yield single("two of them", REFUSE, second, names=("flux1-",))
    yield single("Fill by its channels", REFUSE, with_tensors(widened(384)), flux, names=("Fill",))
    yield single("Canny by its channels", REFUSE, with_tensors(widened(128)), flux, names=("Canny", "Depth"))
    yield single("without img_in", REFUSE, with_tensors(_without("img_in.weight")), flux, names=("img_in",))
    yield single(
        "without blocks", REFUSE, with_tensors(_without("double_blocks.")), flux, names=("flux1-dev", "double")
    )
    yield single(
        "ae without conv_in",
        REFUSE,
        with_tensors(_without("encoder.conv_in"), ae),
        flux,
        names=("ae.safetensors", "conv_in"),
    )
    yield single("ae as the model", REFUSE, lambda box: None, ae, names=("ae.safetensors",))
    yield single("no text encoders", REFUSE, _removed("single/text_encoder"), flux, names=("text_encoder",))


def _without(start: str) -> Callable[[dict], dict]:
    return lambda tensors: {name: x for name, x in tensors.items() if not name.startswith(start)}


def _foreign_cases() -> Iterator[Case]:
    """Files that are something else: the message should say what."""

    def file(name: str, tensors: Callable[[], dict]) -> Callable[[Box], None]:
        return lambda box: write_tensors(box, f"single/{name}", tensors())

    def zeros(*names: str) -> dict:
        return {name: np.zeros((4, 4), np.float32) for name in names}

    lora = [f"transformer.transformer_blocks.{i}.attn.to_q.lora_{x}.weight" for i in range(19) for x in "AB"]
    kohya = [f"lora_unet_double_blocks_{i}_img_attn_qkv.lora_{x}.weight" for i in range(19) for x in ("up", "down")]
    nf4 = [
        f"double_blocks.{i}.img_attn.qkv.weight{x}"
        for i in range(19)
        for x in ("", ".absmax", ".quant_map", ".quant_state.bitsandbytes__nf4")
    ]
    control = [f"controlnet_blocks.{i}.weight" for i in range(5)] + ["controlnet_x_embedder.weight"]
    sdxl = [f"model.diffusion_model.input_blocks.{i}.0.weight" for i in range(9)]
    foreign = {
        "a PEFT LoRA": ("lora.safetensors", lambda: zeros(*lora), ("LoRA",)),
        "a kohya LoRA": ("lora2.safetensors", lambda: zeros(*kohya), ("LoRA",)),
        "nf4": ("flux1-dev-bnb-nf4.safetensors", lambda: zeros(*nf4), ("nf4", "bitsandbytes", "4 bit", "4-bit")),
        "a ControlNet": ("controlnet.safetensors", lambda: zeros(*control), ("controlnet",)),
        "SDXL": ("sd_xl_base.safetensors", lambda: zeros(*sdxl), ("sd_xl_base",)),
    }
    for name, (path, tensors, names) in foreign.items():
        yield source_case(
            LAYOUTS, f"{name}", REFUSE, file(path, tensors), part="single", source=f"single/{path}", names=names
        )
    for name, content in {
        "a GGUF": ("model.gguf", b"GGUF\x03\0\0\0" + bytes(200)),
        "a GGUF by another name": ("flux1-dev-Q4.safetensors", b"GGUF\x03\0\0\0" + bytes(200)),
        "a torch checkpoint": ("flux1-dev.pt", b"PK\x03\x04" + bytes(200)),
        "a zip": ("flux1-dev.zip", b"PK\x05\x06" + bytes(18)),
    }.items():
        path, data = content
        yield source_case(
            LAYOUTS,
            name,
            REFUSE,
            lambda box, path=path, data=data: box.write(f"single/{path}", data),
            part="single",
            source=f"single/{path}",
            names=("GGUF",) if "GGUF" in name else (path,),
        )
    yield source_case(
        LAYOUTS, "a folder of a LoRA", REFUSE, _lora_folder, part="photo.png", source="lora", names=("LoRA", "lora")
    )
    quantised = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    yield source_case(
        LAYOUTS,
        "a config that says 4 bits",
        EITHER,
        lambda box: box.change_json("source/transformer/config.json", lambda d: d | quantised),
    )
    for channels, name in ((384, "Fill"), (128, "Canny")):
        yield source_case(
            LAYOUTS,
            f"{name} in diffusers' layout",
            REFUSE,
            lambda box, channels=channels: box.change_json(
                "source/transformer/config.json", lambda d: d | {"in_channels": channels, "out_channels": 64}
            ),
            names=(name, "transformer"),
        )
    for pipeline in ("FluxKontextPipeline", "FluxFillPipeline", "FluxControlPipeline", "StableDiffusionXLPipeline"):
        yield source_case(
            LAYOUTS,
            f"model_index.json says {pipeline}",
            REFUSE,
            lambda box, pipeline=pipeline: box.change_json(
                "source/model_index.json", lambda d: d | {"_class_name": pipeline}
            ),
            names=(pipeline, "Kontext", "Fill", "Control", "model_index.json"),
        )
    yield source_case(
        LAYOUTS,
        "another transformer class",
        EITHER,
        lambda box: box.change_json(
            "source/transformer/config.json", lambda d: d | {"_class_name": "SD3Transformer2DModel"}
        ),
        names=("SD3Transformer2DModel", "transformer"),
    )


def _lora_folder(box: Box) -> None:
    (box.work / "lora").mkdir()
    write_tensors(box, "lora/pytorch_lora_weights.safetensors", {"a.lora_A.weight": np.zeros((2, 2), np.float32)})
    box.write("lora/adapter_config.json", json.dumps({"peft_type": "LORA"}))


def _quantised_cases() -> Iterator[Case]:
    file = "single/flux1-dev.safetensors"

    def eights(scaled: bool, dtype: str = "float8_e4m3fn") -> Callable[[Box], None]:
        def change(box: Box) -> None:
            stored, header, data = {}, {}, b""
            for name, x in read_tensors(box, file).items():
                if x.ndim == 2:
                    scale = np.float32(np.abs(x).max() / 200) if scaled else np.float32(1)
                    stored[name] = (
                        "F8_E4M3" if "e4m3" in dtype else "F8_E5M2",
                        (x / scale).astype(getattr(ml_dtypes, dtype)),
                    )
                    if scaled:
                        stored[f"{name.removesuffix('.weight')}.scale_weight"] = ("F32", scale.reshape(()))
                else:
                    stored[name] = ("F32", x)
            for name, (kind, x) in stored.items():
                piece = np.asarray(x).tobytes()
                header[name] = {
                    "dtype": kind,
                    "shape": list(np.shape(x)),
                    "data_offsets": [len(data), len(data) + len(piece)],
                }
                data += piece
            box.write(file, raw_file(header, data))

        return change

    def single(name: str, expects: str, change: Callable[[Box], None], *options: str) -> Case:
        return source_case(
            LAYOUTS,
            name,
            expects,
            change,
            part="single",
            source=file,
            options=options,
            check=near_picture,
            names=("dtype", "F8"),
        )

    yield single("fp8 with --dtype", ACCEPT, eights(False), "--dtype", "float32")
    yield single("fp8 e5m2 with --dtype", ACCEPT, eights(False, "float8_e5m2"), "--dtype", "float32")
    yield single("fp8 without --dtype", EITHER, eights(False))
    yield single("fp8 with scales and --dtype", ACCEPT, eights(True), "--dtype", "float32")


def near_picture(box: Box) -> str | None:
    """What is wrong with a picture of weights in eight bits: too far from the right one."""
    places = (box.work / "painted", box.world / "painted_wide")
    found, right = (np.asarray(Image.open(place / "picture-1.png"), float) for place in places)
    error = np.abs(found - right).mean()
    return f"the picture is {error:.0f} levels from the right one on average" if error > 12 else None
