"""Generated from proto/etcd by scripts/gen: never edited."""
