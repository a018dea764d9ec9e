"""Several daemons as hosts, with etcd."""
