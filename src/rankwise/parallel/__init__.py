"""Many processes: DistributedDataParallel, sharded models, DeepSpeed ZeRO."""
