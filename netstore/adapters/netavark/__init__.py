"""netavark: the command that podman calls for its networks; see docs/howto/use-podman.md."""
