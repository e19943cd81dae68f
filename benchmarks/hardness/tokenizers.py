"""Tokenizers and schedulers to be converted: what does not fit, lacks files, or is another one."""

import json
import random
from collections.abc import Callable, Iterator
from typing import Any

from hardness.cases import ACCEPT, EITHER, REFUSE, Box, Case, alive
from hardness.conversions import (
    SCHEDULERS,
    TOKENIZERS,
    source_case,
)


def cases(draw: random.Random) -> Iterator[Case]:
    """All of this file."""
    yield from tokenizer_cases()
    yield from scheduler_cases()


def tokenizer_cases() -> Iterator[Case]:
    """Tokenizers that do not fit, lack files, or would run code."""

    def folder(name: str) -> str:
        return f"source/{name}"

    def only(name: str, files: dict[str, bytes]) -> Callable[[Box], None]:
        def change(box: Box) -> None:
            for file in (box.work / folder(name)).iterdir():
                file.unlink()
            for file, content in files.items():
                box.write(f"{folder(name)}/{file}", content)

        return change

    def added(name: str, count: int) -> Callable[[Box], None]:
        """As many tokens as textual inversion may add; the embedding has no rows for them."""
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)

        def change(document: dict) -> None:
            first = 1 + max(document["model"]["vocab"].values())
            tokens = [{"id": first + i, "content": f"<my-cat-{i}>", **flags} for i in range(count)]
            document["added_tokens"] += tokens

        return lambda box: box.change_json(f"{folder(name)}/tokenizer.json", change)

    def larger(name: str) -> Callable[[Box], None]:
        def change(document: dict) -> None:
            vocabulary = document["model"]["vocab"]
            words = sorted(vocabulary, key=vocabulary.get)
            for word in words[10:14]:
                vocabulary[word] += 500

        return lambda box: box.change_json(f"{folder(name)}/tokenizer.json", change)

    def code(name: str) -> Callable[[Box], None]:
        def change(box: Box) -> None:
            box.write(f"{folder(name)}/evil.py", "open('EVIL', 'w').close()\nclass Evil: pass\n")
            box.change_json(
                f"{folder(name)}/tokenizer_config.json",
                lambda d: (
                    d | {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, "tokenizer_class": "Evil"}
                ),
            )

        return change

    def no_code(box: Box) -> str | None:
        return "code of the checkpoint ran" if (box.work / "EVIL").exists() else None

    def vocabulary_files(box: Box) -> None:
        document = json.loads((box.work / "source/tokenizer/tokenizer.json").read_text())
        (box.work / "source/tokenizer/tokenizer.json").unlink()
        box.write("source/tokenizer/vocab.json", json.dumps(document["model"]["vocab"]))
        box.write("source/tokenizer/merges.txt", "#version: 0.2\n")

    def length(name: str, value: Any) -> Callable[[Box], None]:
        def change(document: dict) -> None:
            document.pop("model_max_length")
            if value is not None:
                document["model_max_length"] = value

        return lambda box: box.change_json(f"{folder(name)}/tokenizer_config.json", change)

    for name in ("tokenizer", "tokenizer_2"):
        about = (name,)
        for label, change in {
            "empty": only(name, {}),
            "a README only": only(name, {"README.md": b"gone"}),
            "spiece.model only, broken": only(name, {"spiece.model": b"\n\x0e\n\x05<unk>"}),
            "broken files": only(name, {"tokenizer.json": b"{", "tokenizer_config.json": b"{}"}),
            "tokens beyond the embedding": added(name, 60),
            "a vocabulary beyond the embedding": larger(name),
            "without a length": length(name, None),
            "a length of text": length(name, "long"),
            "a length of 0": length(name, 0),
            "a negative length": length(name, -5),
            "a length of 10^30": length(name, 10**30),
            "a length of a billion": length(name, 10**9),
            "a length of NaN": length(name, float("nan")),
            "a class that nobody knows": lambda box, name=name: box.change_json(
                f"{folder(name)}/tokenizer_config.json", lambda d: d | {"tokenizer_class": "NoSuchTokenizer"}
            ),
        }.items():
            expects = EITHER if label == "a class that nobody knows" else REFUSE
            yield source_case(TOKENIZERS, f"{name}: {label}", expects, change, names=about)
        yield source_case(TOKENIZERS, f"{name}: code of its own", EITHER, code(name), names=about, check=no_code)
    yield source_case(TOKENIZERS, "tokenizer: vocab.json and merges.txt", ACCEPT, vocabulary_files)
    yield source_case(
        TOKENIZERS,
        "tokenizer: longer than CLIP's positions",
        EITHER,
        length("tokenizer", 77),
        names=("tokenizer",),
        check=alive,
    )


def scheduler_cases() -> Iterator[Case]:
    """Schedulers that this package does not have."""
    classes = ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "FlowMatchHeunDiscreteScheduler",
               "LCMScheduler", "EulerDiscreteScheduler", "DDIMScheduler", 7, None)  # fmt: skip
    changes: dict[str, dict[str, Any]] = {f"class {name}": {"_class_name": name} for name in classes}
    changes |= {
        "500 training steps": {"num_train_timesteps": 500},
        "karras": {"use_karras_sigmas": True},
        "exponential": {"use_exponential_sigmas": True},
        "beta": {"use_beta_sigmas": True},
        "shift_terminal": {"shift_terminal": 0.02},
        "inverted": {"invert_sigmas": True},
        "stochastic": {"stochastic_sampling": True},
        "linear time shift": {"time_shift_type": "linear"},
        "base as long as max": {"base_image_seq_len": 4096},
        "base longer than max": {"base_image_seq_len": 8192, "max_image_seq_len": 256},
        "an immense shift": {"max_shift": 1e6, "base_shift": 1e6},
        "a shift of 0": {"shift": 0.0, "use_dynamic_shifting": False},
        "a shift of -1": {"shift": -1.0, "use_dynamic_shifting": False},
    }
    for name, fields in changes.items():
        expects = EITHER if fields == {"_class_name": None} else REFUSE
        if name == "base longer than max":
            expects = EITHER
        yield source_case(
            SCHEDULERS,
            name,
            expects,
            lambda box, fields=fields: box.change_json(
                "source/scheduler/scheduler_config.json", lambda d: d | fields
            ),
            names=("scheduler", *fields),
            check=alive,
        )
