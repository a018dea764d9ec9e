"""CNI: what container engines and Kubernetes call a network plugin by; see docs/howto/use-cni.md."""
