"""Names for containers that were given none: two words, such as `quiet_harbour`."""

from __future__ import annotations

import secrets

__all__ = ["random_name"]

_FIRST = """
    able amber ample brave brief bright calm candid clear clever crisp deft eager early even fair fine firm fond free
    fresh gentle glad grand green happy keen kind light lively lucid mellow merry mild neat noble open plain prime
    proud quick quiet rapid ready robust sharp silent simple smart smooth solid spry steady stout sunny swift tidy
""".split()  # noqa: SIM905
_SECOND = """
    anchor arch atoll bay beacon birch bridge brook canal canyon cape cedar cliff cloud coast comet coral cove creek
    delta dune falcon fern field fjord forest garden glacier grove gull harbour haven heron hill inlet island lagoon
    lake larch ledge lynx maple marsh meadow mesa mill oak orchard otter peak pier pine pond prairie reef ridge river
""".split()  # noqa: SIM905


def random_name() -> str:
    """Return one of some 3,000 names; the caller tries again when it is taken."""
    return f"{secrets.choice(_FIRST)}_{secrets.choice(_SECOND)}"
