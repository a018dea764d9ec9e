"""Networks and volumes for containers: a gRPC service that any engine can call."""

__all__ = ["__version__"]

__version__ = "0.1.0"
