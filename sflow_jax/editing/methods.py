"""Ways to edit a picture, by name: every one is numbers for the one step rule (`sampling.steps`).

What is measured here, is measured on the embedded model. Settings for FLUX.1-dev are the authors' own where a
method has authors; those of `coupled` are reasoned, and not measured.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from sflow_jax.errors import SettingError
from sflow_jax.sampling.solvers import SOLVERS
from sflow_jax.settings import NUDGE, REPLAYS, EditSettings, check_nudge

PATHS = ("inverted", "coupled", "noised", "painted")
NO_REGION, AUTO_REGION = "none", "auto"
REFERENCE = "reference"
# What edits a photo where nothing of the reference's is asked for: the best by the embedded world's known answers.
PHOTO_METHOD = "coupled"
# Beyond it the own tokens, or the source's, no longer count.
MOST_EXTENDED = 20
SHARES = ("begin", "free", "keys", "values", "inject_from", "until", "lock_until", "inside", "ratio")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """A way to edit a picture. Every number is a setting; change some with `changed`.

    name, paper: what people call it, and where it is from. path: "inverted" begins at the noise that the picture
    was inverted to, "coupled" adds the difference of the edit's and the source's velocities to the picture,
    "noised" begins at the picture mixed with drawn noise; "painted" has no picture, and paints source and edits
    from one noise.

    steps: of the solver. guidance: of the edits. source_guidance: of the source; None is the edits'. begin: share
    of the steps, from the noise's end, that is left out. free: share of the last steps that a coupled path runs by
    itself. solver: of the edits. inversion, inversion_guidance, nudge: how the picture is inverted, see `invert`.
    replay: how the source keeps to its inversion. ratio: share of the edit's velocity beside the pull to a coupled
    path (DNAEdit; 1 is none). steering: exponent of the trust in an edit that agrees with the source's way
    (SteerFlow; None is whole trust).

    layers: where the source's keys and values go into the edits, in the steps from the share inject_from to until.
    keys, values: how far, 0…1. extended: instead of replacing them, attend to the source's beside the own ones,
    with weight e^extended (such as −1); None replaces. region: "none", or a preset of `editing.regions.REGIONS`
    such as "auto". lock_until: until this share of the steps what is outside the region stays the source. inside:
    share of the injection inside the region.
    """

    name: str
    paper: str = ""
    path: str = "inverted"
    steps: int = 28
    guidance: float = 2.0
    source_guidance: float | None = None
    begin: float = 0.0
    free: float = 0.0
    solver: str = "euler"
    inversion: str = "reference"
    inversion_guidance: float = 1.0
    nudge: float = 1.0
    replay: str = "aligned"
    ratio: float = 1.0
    steering: float | None = None
    layers: Any = "none"
    keys: float = 1.0
    values: float = 1.0
    inject_from: float = 0.0
    until: float = 1.0
    extended: float | None = None
    region: str = NO_REGION
    lock_until: float = 0.0
    inside: float = 1.0

    def __post_init__(self) -> None:
        for name, allowed in (("path", PATHS), ("solver", SOLVERS), ("inversion", SOLVERS), ("replay", REPLAYS)):
            if getattr(self, name) not in allowed:
                raise SettingError(f"unknown `{name}` {getattr(self, name)!r}; choose one of {', '.join(allowed)}")
        for name in SHARES:
            if not 0 <= getattr(self, name) <= 1:
                raise SettingError(f"`{name}` must be a share from 0 to 1, found {getattr(self, name)}")
        if self.steps < 1 or self.begin >= 1 or self.steps <= self.left_out:
            raise SettingError(f"`begin` {self.begin} leaves none of the {self.steps} `steps`")
        if self.extended is not None and not abs(self.extended) <= MOST_EXTENDED:
            raise SettingError(
                f"`extended` must be between {-MOST_EXTENDED} and {MOST_EXTENDED}, found {self.extended}"
            )
        check_nudge(self.nudge)

    @property
    def inverts(self) -> bool:
        """Whether it needs the picture's path to noise."""
        return self.path == "inverted"

    @property
    def replays_exactly(self) -> bool:
        """Whether the source's row evaluates what the inversion evaluated."""
        return self.inverts and self.replay == "residual"

    @property
    def draws(self) -> bool:
        """Whether it draws noise, so that a seed matters."""
        return not self.inverts or self.region != NO_REGION or SOLVERS[self.inversion].towards_noise

    @property
    def left_out(self) -> int:
        """Steps left out at the noise's end."""
        return self.steps_of(self.begin)

    def steps_of(self, share: float) -> int:
        """A share of the steps as a number of them."""
        return round(share * self.steps)

    def changed(self, **settings: Any) -> "Method":
        """The same with other settings, None of them meaning as it is. SettingError for unknown or bad ones."""
        names = [field.name for field in dataclasses.fields(self) if field.name not in ("name", "paper")]
        unknown = sorted(settings.keys() - {"name", "paper", *names})
        if unknown:
            raise SettingError(f"method {self.name} has no setting {', '.join(unknown)}; it has {', '.join(names)}")
        return dataclasses.replace(self, **{name: value for name, value in settings.items() if value is not None})

    def read(self, assignments: Mapping[str, str]) -> "Method":
        """The same with settings written as text, such as `begin` "0.1"; `none` unsets what may be unset."""
        kinds = {field.name: field.type for field in dataclasses.fields(self)}
        values = {}
        for name, text in assignments.items():
            try:
                values[name] = _read(kinds.get(name), text)
            except ValueError as error:
                raise SettingError(f"`{name}` must be a number, found {text!r}") from error
        unset = [name for name, value in values.items() if value is None]
        changed = self.changed(**{name: value for name, value in values.items() if value is not None})
        return dataclasses.replace(changed, **dict.fromkeys(unset))


def _read(kind: Any, text: str) -> Any:
    """A setting's value from text."""
    if kind == float | None and text == "none":
        return None
    if kind is int:
        return int(text)
    return float(text) if kind in (float, float | None) else text


def parse_assignments(texts: tuple[str, ...]) -> dict[str, str]:
    """`begin=0.1` → {"begin": "0.1"}; SettingError for anything else."""
    pairs = [text.partition("=") for text in texts]
    for text, (name, sign, value) in zip(texts, pairs):
        if not (name and sign and value):
            raise SettingError(
                f"cannot read `set` {text!r}: write a setting of the method and its value, begin=0.1"
            )
    return {name.strip().replace("-", "_"): value.strip() for name, _, value in pairs}


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            name=REFERENCE, paper="Stable Flow, 2411.14430", steps=50, guidance=3.0, source_guidance=1.0,
            nudge=NUDGE, layers="vital",
        ),
        # Coupled velocities with what the embedded world's known answers preferred: equal guidance, fresh noise a
        # step, an early start, and the background kept for most of the way.
        Method(
            name="coupled", paper="this project, after FlowEdit", path="coupled", steps=20, guidance=1.5,
            begin=0.05, region=AUTO_REGION, lock_until=0.8,
        ),
        Method(
            name="flowedit", paper="FlowEdit, 2412.08629", path="coupled", steps=28, guidance=5.5,
            source_guidance=1.5, begin=4 / 28,
        ),
        Method(
            name="decflowedit", paper="DecFlowEdit", path="coupled", steps=28, guidance=5.5, source_guidance=1.5,
            begin=4 / 28, region="decflowedit", lock_until=1.0,
        ),
        Method(
            name="uniinv", paper="UniEdit-Flow, 2504.13109", steps=15, guidance=1.0, inversion="uni-inv",
        ),
        Method(
            name="rf-solver", paper="RF-Solver, 2411.04746", steps=25, guidance=2.0, source_guidance=1.0,
            solver="midpoint", inversion="midpoint", layers="late", keys=0.0, until=2 / 25,
        ),
        Method(
            name="fireflow", paper="FireFlow, 2412.07517", steps=8, guidance=2.0, source_guidance=1.0,
            solver="fireflow", inversion="fireflow", layers="late", keys=0.0, until=1 / 8,
        ),
        Method(
            name="directedit", paper="DirectEdit", steps=30, guidance=2.0, source_guidance=1.0,
            replay="residual", layers="late", keys=0.0, until=3 / 30,
        ),
        Method(
            name="dnaedit", paper="DNAEdit, 2506.01430", steps=28, guidance=2.5, source_guidance=1.0,
            inversion="dnaedit", replay="residual", begin=4 / 28, ratio=0.85,
        ),
        Method(
            name="steerflow", paper="SteerFlow, 2604.01715", steps=15, guidance=3.5, source_guidance=1.0,
            inversion="uni-inv", steering=4.5, region="steerflow", lock_until=1.0,
        ),
        Method(name="sdedit", paper="SDEdit, 2108.01073", path="noised", steps=28, guidance=3.5, begin=0.25),
    )
}  # fmt: skip


def find_method(method: "str | Method", of_model: Mapping[str, Mapping[str, Any]] | None = None) -> Method:
    """By name, with what the model's family says of it; own ones as they are. SettingError for an unknown name.

    of_model: method → settings for the model.
    """
    if isinstance(method, Method):
        return method
    if method not in METHODS:
        raise SettingError(f"unknown `method` {method!r}; choose one of {', '.join(METHODS)}")
    return METHODS[method].changed(**(of_model or {}).get(method, {}))


def default_method(asked: EditSettings, *, painted: bool, inverted: bool) -> str:
    """What edits where no method is named: the reference, but of photos only what asks for something of its own.

    painted: whether the model paints the source. inverted: whether an inversion stands for it.
    """
    own = inverted or asked.unnudge or any(x is not None for x in (asked.layers, asked.nudge, asked.replay))
    return REFERENCE if painted or own else PHOTO_METHOD


def describe_methods() -> list[tuple[str, str, str, str]]:
    """(name, where it is from, passes for one edit, what it needs) of every method."""
    return [(m.name, m.paper, str(passes(m)), needs(m)) for m in METHODS.values()]


def passes(method: Method) -> int:
    """Transformer passes for one edit of a photo: the inversion, the region, the source's and the edit's steps.

    The source's are none where the inversion keeps what exact replay needs (`editing.recording`).
    """
    from_noise, direction = method.steps - method.left_out, {True: 2, False: 1}
    inverting = 0
    if method.inverts:
        inverting = method.steps * direction[method.inversion == "midpoint"] + SOLVERS[method.inversion].warm_up
    moving = from_noise * direction[method.solver == "midpoint"] + SOLVERS[method.solver].warm_up
    region = 0 if method.region == NO_REGION else region_passes(method)
    return inverting + (1 if method.replays_exactly else 2) * moving + region


def region_passes(method: Method) -> int:
    """Passes that the region of one edit takes."""
    # Two sigmas and four noises, source and edit; or a whole path of the method.
    return 2 * (method.steps - method.left_out) if method.region == "decflowedit" else 16


def needs(method: Method) -> str:
    """What a method asks for beside the picture and both prompts, in words."""
    wants = []
    if method.inverts:
        wants.append(f"an inversion ({method.inversion})")
    if method.layers != "none":
        wants.append(f"{method.layers} layers")
    if method.region != NO_REGION:
        wants.append("a region (found by itself)")
    return ", ".join(wants) or "nothing"
