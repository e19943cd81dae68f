"""Self-contained HTML pages from templates: how they show numbers, pictures and charts."""

import base64
import hashlib
import io
import math
from collections.abc import Iterable
from typing import Any

import jinja2
import numpy as np
from jaxtyping import UInt8
from markupsafe import Markup
from PIL import Image

# Pixels. Pictures up to the first side are shown with hard pixels, those above the second are scaled down.
SMALL_PICTURE, LARGE_PICTURE = 128, 512
JPEG_QUALITY = 88
NO_BREAK_SPACE = "\u00a0"
# Parts of the package that have templates: pages share the first's.
TEMPLATE_ROOMS = ("reports", "vitality", "evaluation", "atlas")


def render(template: str, **content: Any) -> str:
    """An HTML page; every string of the content is escaped."""
    return _ENVIRONMENT.get_template(template).render(content)


def inline(svg: str, description: str) -> Markup:
    """An `<svg>` element that assistive software reads out as its description."""
    opening = Markup('<svg role="img" aria-label="{}"').format(description)
    return Markup(svg.replace("<svg", opening, 1))


def picture(pixels: UInt8[np.ndarray, "y x 3"], description: str) -> Markup:
    """An `<img>` element that holds its picture: small ones as PNG, others as JPEG."""
    image, data = Image.fromarray(pixels), io.BytesIO()
    small = max(image.size) <= SMALL_PICTURE
    image.thumbnail((LARGE_PICTURE, LARGE_PICTURE), Image.Resampling.LANCZOS)
    if small:
        image.save(data, "PNG")
    else:
        image.save(data, "JPEG", quality=JPEG_QUALITY)
    source = f"data:image/{'png' if small else 'jpeg'};base64,{base64.b64encode(data.getvalue()).decode()}"
    kind = "small" if small else "large"
    return Markup('<img class="{}" width="{}" height="{}" alt="{}" src="{}">').format(
        kind, image.width, image.height, description, source
    )


def number(value: float, digits: int = 3, signed: bool = False) -> str:
    """`0.123`; a dash for NaN."""
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    return f"{value:{'+' if signed else ''}.{digits}f}".replace("-", "−")


def sortable(value: float) -> str:
    """What a page's script reads: empty for NaN, which it sorts last."""
    return "" if math.isnan(value) else f"{value}".replace("inf", "Infinity")


def percent(share: float) -> str:
    """`94 %`; certain only if it is: 0.999 is `> 99 %`. Its spaces break no line."""
    if share not in (0, 1) and not 0.005 <= share < 0.995:
        text = "> 99 %" if share > 0.5 else "< 1 %"
    else:
        text = f"{share:.0%}".replace("%", " %")
    return text.replace(" ", NO_BREAK_SPACE)


def sha256(text: str) -> str:
    """By which a page's policy allows its own script and no other."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def layer_list(layers: Iterable[int]) -> str:
    """`0, 1, 2`, or `none`."""
    return ", ".join(map(str, layers)) or "none"


def plain(value: Any) -> str:
    """A setting or a cost in a few characters."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, dict):
        return ", ".join(f"{name} {plain(item)}" for name, item in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(map(plain, value)) or "none"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.ChoiceLoader([jinja2.PackageLoader("sflow_jax", room) for room in TEMPLATE_ROOMS]),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
_ENVIRONMENT.filters |= {
    "number": number,
    "sortable": sortable,
    "percent": percent,
    "layers": layer_list,
    "plain": plain,
    "sha256": sha256,
}
