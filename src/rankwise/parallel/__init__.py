"""Training in many processes: DistributedDataParallel, sharded models, DeepSpeed ZeRO."""
