"""Hypothesis times nothing here: the machine may be busy with other tests."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("busy", deadline=None)
settings.load_profile("busy")
