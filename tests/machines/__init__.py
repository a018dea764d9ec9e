"""Tests that drive several machines: scripts/lab tests/machines."""
