"""Table rows that every network has: a layer with kernel and bias, a norm with scale and bias."""

from sflow_convert.engine import DENSE, VECTOR, Piece, Transform

Rows = dict[str, tuple[Piece, ...]]


def layer(target: str, source: str, transform: Transform = DENSE) -> Rows:
    """Rows of a layer with bias whose source is one layer too."""
    return {
        f"{target}.kernel": (Piece(f"{source}.weight", transform),),
        f"{target}.bias": (Piece(f"{source}.bias", VECTOR),),
    }


def norm(target: str, source: str) -> Rows:
    """Rows of a norm with scale and bias."""
    return {
        f"{target}.scale": (Piece(f"{source}.weight", VECTOR),),
        f"{target}.bias": (Piece(f"{source}.bias", VECTOR),),
    }
