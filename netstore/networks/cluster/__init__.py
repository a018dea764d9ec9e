"""What the nodes of a cluster share: who they are, the networks that span them, and what is on those."""
