"""The only place that knows torch.export and ATen: a model in, a fused model out."""
