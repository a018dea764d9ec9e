"""Where the command `netstore` starts: a runtime's hook is done before anything of the other commands is imported."""

import sys

__all__ = ["main"]


def main() -> None:
    """Run the command line."""
    if sys.argv[1:2] == ["hook"] and "--help" not in sys.argv:
        from netstore.cli.hook import main as hook

        sys.exit(hook(sys.argv[2:]))
    from netstore.cli.main import main as everything

    everything()
