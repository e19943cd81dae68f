"""What the commands share: the options for model, size and output, loading, and what a result's JSON says."""

import dataclasses
import functools
import importlib.metadata
import time
from collections.abc import Callable, Sequence
from typing import Any

import click
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from sflow_jax.attention import AUTOMATIC, KERNELS
from sflow_jax.console import parse_place
from sflow_jax.costs import propose_mesh
from sflow_jax.distributed import join
from sflow_jax.hardware import find_chip
from sflow_jax.pipeline import TEXT_ENCODER_PLACES, StableFlow
from sflow_jax.placement import QUANTISATIONS
from sflow_jax.planning import find_info
from sflow_jax.sharding import make_mesh, parse_mesh

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
PACKAGES = ("sflow_jax", "jax", "flax")


def options(*decorators: Callable) -> Callable:
    """Several click options as one decorator, in the order given."""

    def apply(command: Callable) -> Callable:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return apply


@dataclasses.dataclass(frozen=True)
class Chosen:
    """What the model's options say: which model, and how and where it runs. Field names are the options'."""

    model: str | None
    dtype: str | None
    mesh: str | None
    attention: str
    quantize: str | None
    offload: bool
    text_encoder: str
    coordinator: str | None
    process: str | None

    def meet(self) -> bool:
        """Join the other processes, if there are any, before anything touches a device; whether this one reports.

        ValueError for options that do not fit, or others that cannot be met.
        """
        if self.coordinator is None:
            if self.process is not None:
                raise ValueError("--process needs --coordinator HOST:PORT")
            return True
        join(self.coordinator, None if self.process is None else parse_place(self.process, "--process"))
        return jax.process_index() == 0

    def load(self, *, alone: bool = False) -> tuple[StableFlow, float]:
        """The model, and the seconds it took to load. alone: on this process's devices, whatever others do."""
        start = time.perf_counter()
        try:
            devices = jax.local_devices() if alone else jax.devices()
        except RuntimeError as error:
            raise ValueError(f"no usable device: {str(error).splitlines()[0]}") from error
        flow = StableFlow.load(
            self.model,
            mesh=self.place(devices, "sweep" if alone else "edit"),
            dtype=self.dtype and DTYPES[self.dtype],
            attention=self.attention,
            quantisation=self.quantize,
            offload=self.offload,
            text_encoder=self.text_encoder,
        )
        return flow, time.perf_counter() - start

    def place(self, devices: Sequence[jax.Device], work: str) -> Mesh | None:
        """The mesh asked for, or proposed for these devices and this work; ValueError where it does not fit."""
        if self.mesh is None:
            return None
        if self.mesh != AUTOMATIC:
            return make_mesh(parse_mesh(self.mesh), devices)
        chip = find_chip(devices[0].device_kind)
        changes = {"quantisation": self.quantize, "offload": self.offload}
        sizes, why = propose_mesh(find_info(self.model)[0].configs, chip, len(devices), work, **changes)
        click.echo(f"mesh {why}", err=True)
        return make_mesh(sizes, devices)


def _model_options(required: bool) -> Callable:
    """The model's options, given to the command as one `Chosen`."""

    def bundled(command: Callable) -> Callable:
        @functools.wraps(command)
        def run(**given):
            chosen = Chosen(**{field.name: given.pop(field.name) for field in dataclasses.fields(Chosen)})
            return command(chosen=chosen, **given)

        return run

    return options(
        click.option(
            "--model",
            "-m",
            required=required,
            help="Converted checkpoint (a folder, local or gs://), or toyworld, the embedded model.",
        ),
        click.option(
            "--dtype",
            type=click.Choice(list(DTYPES)),
            help="Weights and computation [float32 on CPU, else bfloat16].",
        ),
        click.option(
            "--attention",
            type=click.Choice([AUTOMATIC, *KERNELS]),
            default=AUTOMATIC,
            show_default=True,
            help="Attention kernel: cudnn on NVIDIA GPUs, splash on TPUs, else xla.",
        ),
        click.option("--mesh", help="Devices as axes data, fsdp and tensor, such as data=2,tensor=4; or auto."),
        click.option(
            "--quantize",
            type=click.Choice(list(QUANTISATIONS)),
            help="Blocks in 8 bits: int8 weights, or fp8 products where the hardware has them.",
        ),
        click.option("--offload", is_flag=True, help="Blocks wait in host memory, for devices too small for all."),
        click.option(
            "--text-encoder",
            type=click.Choice(TEXT_ENCODER_PLACES),
            default=TEXT_ENCODER_PLACES[0],
            show_default=True,
            help="Where T5 waits between prompts.",
        ),
        click.option(
            "--coordinator",
            help="Work together with other processes: auto (TPU pods, SLURM), or the first's HOST:PORT.",
        ),
        click.option("--process", help="Beside --coordinator HOST:PORT: which process this is, such as 2/8."),
        bundled,
    )


model_options, optional_model_options = _model_options(True), _model_options(False)
size_options = options(
    click.option("--steps", type=int, help="Steps of the solver [the model's default]."),
    click.option("--height", type=int, help="Height in pixels [the model's default]."),
    click.option("--width", type=int, help="Width in pixels [the model's default]."),
)
out_option = click.option("--out", "-o", required=True, help="Folder for the results.")


def record(model: str, settings: dict[str, Any], seconds: dict[str, float]) -> dict[str, Any]:
    """What a result's JSON says: settings, versions, device, seconds."""
    return {
        "model": model,
        **settings,
        "device": f"{jax.device_count()} × {jax.devices()[0].device_kind}",
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
    }
