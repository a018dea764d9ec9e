"""OCI runtime hooks: networks and volumes for engines without plugins; see docs/howto/use-oci-hook.md."""
