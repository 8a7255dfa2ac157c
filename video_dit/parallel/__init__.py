"""Training over many processes: the only place that imports torch.distributed."""
