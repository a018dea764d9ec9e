"""Names and numbers of signals."""

from __future__ import annotations

import signal

from netstore.errors import InvalidArgument

__all__ = ["parse_signal"]


def parse_signal(text: str) -> signal.Signals:
    """Return the signal that "SIGHUP", "HUP" or "1" means.

    Raises:
        InvalidArgument: none.
    """
    try:
        if text.isdecimal():
            return signal.Signals(int(text))
        return signal.Signals[text.upper() if text.upper().startswith("SIG") else f"SIG{text.upper()}"]
    except (ValueError, KeyError) as error:
        raise InvalidArgument("signal", text, "a signal such as SIGTERM, TERM or 15") from error
