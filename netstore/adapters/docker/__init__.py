"""Docker's plugin protocol: networks, addresses and volumes for a dockerd."""
