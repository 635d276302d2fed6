"""torch's own wrappers: none, DistributedDataParallel, FSDP1, FSDP2."""
