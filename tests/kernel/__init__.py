"""What the kernel does, asked without a daemon."""
