"""Tests that need a whole machine: scripts/lab runs them inside one."""
